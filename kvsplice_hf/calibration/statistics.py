"""What calibration remembers of each layer: sums over tokens, and a fixed number of sampled rows.

Its size does not depend on the number of tokens, and several processes' statistics add up. They are made outside of
`torch.inference_mode`, even where the caller is inside, because tensors made there cannot be added to later on.

Rotated keys are counted in three ways: as they are, and with their rotation undone (`code.keys`) for each of the two
ways in which models pair their numbers. Which one a model uses shows in what it costs to code (`solve`).

Legend: `R` kv_lora_rank, `P` qk_rope_head_dim, `F` pairs of numbers of a key (0 where no rotation was seen), `M`
sampled rows, `T` tokens.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from kvsplice_hf import folders
from kvsplice_hf.code.heads import HeadKey, PartKey
from kvsplice_hf.code.keys import TURN_DTYPE, Pairs, half_pairs, neighbour_pairs, undo_turns
from kvsplice_hf.errors import CalibrationError
from kvsplice_hf.weights.processes import gathered, process_rank


SAMPLED_ROWS = 2048
# How the numbers of a key may be paired: not at all (keys as they come), half by half, neighbour by neighbour.
PAIRINGS = (lambda columns: torch.stack([columns[:0]] * 3), half_pairs, neighbour_pairs)
# Of latents, and of key heads, which releases before know nothing of.
_FORMAT, _FORMAT_OF_HEADS = "kvsplice_hf.statistics.3", "kvsplice_hf.statistics.4"
_HOLDOUT = "holdout"
_CHECKSUM = "sha256"


@dataclass
class LayerStatistics:
    """Sums over the calibration tokens of one layer, float64 on the CPU unless said otherwise.

    Attributes:
        count: number of tokens, [1].
        latent_sum: [R].
        latent_outer: sum of c c^T, [R, R].
        rot_sum, rot_outer: the same of keys, by `PAIRINGS`: [3, P] and [3, P, P].
        cross: sum of c k^T, by `PAIRINGS`: [3, R, P].
        fisher: sum of g g^T, g being the gradient of the log-likelihood of sampled labels at the latent, [R, R].
        rot_fisher: the same for keys, by `PAIRINGS`: [3, P, P].
        readers, rot_readers: the same from forward passes only (see `readers.py`), [R, R], and for the rotated keys the
            diagonal, [P].
        rows: a sample of rows `[latent | k_rot]`, float32 [M, R + P].
        turns: how their keys were rotated (`code.keys`), uint8 [M, F].
        columns: which of a model's angles turn its keys, int64 [F].
        draws: one random number per sampled row, [M]. The M smallest are kept, whatever the order of the tokens.
    """

    count: torch.Tensor
    latent_sum: torch.Tensor
    latent_outer: torch.Tensor
    rot_sum: torch.Tensor
    rot_outer: torch.Tensor
    cross: torch.Tensor
    fisher: torch.Tensor
    rot_fisher: torch.Tensor
    readers: torch.Tensor
    rot_readers: torch.Tensor
    rows: torch.Tensor
    turns: torch.Tensor
    columns: torch.Tensor
    draws: torch.Tensor

    @classmethod
    @torch.inference_mode(False)
    def empty(cls, latent_dim: int, rope_dim: int) -> Self:
        """Statistics of no token."""

        def zeros(*sizes: int) -> torch.Tensor:
            return torch.zeros(sizes, dtype=torch.float64, device="cpu")

        R, P = latent_dim, rope_dim
        return cls(
            count=zeros(1),
            latent_sum=zeros(R),
            latent_outer=zeros(R, R),
            rot_sum=zeros(len(PAIRINGS), P),
            rot_outer=zeros(len(PAIRINGS), P, P),
            cross=zeros(len(PAIRINGS), R, P),
            fisher=zeros(R, R),
            rot_fisher=zeros(len(PAIRINGS), P, P),
            readers=zeros(R, R),
            rot_readers=zeros(P),
            rows=zeros(0, R + P).float(),
            turns=zeros(0, 0).to(TURN_DTYPE),
            columns=zeros(0).long(),
            draws=zeros(0),
        )

    @property
    def latent_dim(self) -> int:
        return len(self.latent_sum)

    @property
    def rope_dim(self) -> int:
        return self.rot_sum.shape[1]

    def pairs(self, pairing: int) -> Pairs:
        """The pairs of one of `PAIRINGS`; there are none in the first, nor where no rotation was seen."""
        return Pairs(*PAIRINGS[pairing](self.columns))

    @property
    def mean(self) -> torch.Tensor:
        """mu, [R]."""
        return self.latent_sum / self.count

    @property
    def covariance(self) -> torch.Tensor:
        """Sigma, [R, R]."""
        return self.latent_outer / self.count - torch.outer(self.mean, self.mean)

    def see_columns(self, columns: torch.Tensor | None) -> None:
        """Say which of the model's angles turn its keys, before the first token of a pass is counted.

        Raises:
            CalibrationError: others than before.
        """
        found = self.columns[:0] if columns is None else columns
        if self.count == 0:
            self.columns = found.clone()  # which key heads of a layer are told of together, and files hold apart
            self.turns = self.turns.new_zeros(0, len(found))
        elif not torch.equal(found, self.columns):
            raise CalibrationError(
                "The model rotates its keys in one way on a part of the calibration text and in another way on the "
                "rest. Calibrate on token ids alone, without positions of your own."
            )

    def add_rows(
        self,
        latents: torch.Tensor,
        k_rot: torch.Tensor,
        generator: torch.Generator,
        turns: torch.Tensor | None = None,
    ) -> None:
        """Count tokens: latents [T, R], rotated keys [T, P], and how they were rotated, [T, F]; on any device."""
        self.count += len(latents)
        self.latent_outer += _outer(latents.float())
        latents, k_rot = latents.float().cpu(), k_rot.float().cpu()
        turns = self.turns.new_zeros(len(k_rot), 0) if turns is None else turns.cpu()
        self.latent_sum += _sum(latents)
        for pairing, keys in enumerate(self._in_all_pairings(k_rot, turns)):
            self.rot_sum[pairing] += _sum(keys)
            self.rot_outer[pairing] += _outer(keys)
            self.cross[pairing] += _outer(latents, keys)
        draws = torch.rand(len(latents), generator=generator, dtype=torch.float64, device="cpu")
        # Only rows that can be among the M smallest draws are of use.
        bound = float(self.draws.max()) if len(self.draws) == SAMPLED_ROWS else torch.inf
        chosen = draws < bound
        self._keep(torch.cat([latents[chosen], k_rot[chosen]], dim=-1), turns[chosen], draws[chosen])

    def pass_over(self, count: int, generator: torch.Generator) -> None:
        """Draw for tokens that another process counts, so that it draws what a single process would."""
        torch.rand(count, generator=generator, dtype=torch.float64, device="cpu")

    def add_gradients(self, latents: torch.Tensor) -> None:
        """Count gradients at the latents, [T, R]."""
        self.fisher += _outer(latents.float())

    def add_rot_gradients(self, k_rot: torch.Tensor, turns: torch.Tensor | None = None) -> None:
        """Count gradients at the rotated keys, [T, P], which were rotated by turns [T, F]."""
        k_rot = k_rot.float().cpu()
        turns = self.turns.new_zeros(len(k_rot), 0) if turns is None else turns.cpu()
        # Rotations are orthogonal: their transpose, by which gradients go back, undoes them.
        for pairing, gradients in enumerate(self._in_all_pairings(k_rot, turns)):
            self.rot_fisher[pairing] += _outer(gradients)

    def _in_all_pairings(self, k_rot: torch.Tensor, turns: torch.Tensor) -> Iterator[torch.Tensor]:
        """Keys, or gradients at them, as they are and with their rotation undone, [T, P] each."""
        yield k_rot
        for pairing in range(1, len(PAIRINGS)):
            yield undo_turns(k_rot, turns, self.pairs(pairing)) if len(self.columns) else k_rot

    def sampled_keys(self, pairing: int) -> torch.Tensor:
        """The keys of the sampled rows in one of `PAIRINGS`, float64 [M, P]."""
        k_rot = self.rows[:, self.latent_dim :]
        undone = pairing > 0 and len(self.columns) > 0
        return (undo_turns(k_rot, self.turns, self.pairs(pairing)) if undone else k_rot).double()

    def _keep(self, rows: torch.Tensor, turns: torch.Tensor, draws: torch.Tensor) -> None:
        draws = torch.cat([self.draws, draws])
        rows, turns = torch.cat([self.rows, rows]), torch.cat([self.turns, turns])
        if len(draws) > SAMPLED_ROWS:
            order = draws.argsort()[:SAMPLED_ROWS]
            rows, turns, draws = rows[order], turns[order], draws[order]
        self.rows, self.turns, self.draws = rows, turns, draws

    def merge(self, other: "LayerStatistics") -> None:
        """Add what another process, or another text, has counted.

        Raises:
            CalibrationError: the other statistics are of a layer of other sizes.
        """
        if (self.latent_dim, self.rope_dim) != (other.latent_dim, other.rope_dim):
            raise CalibrationError(
                f"Statistics of rows of {self.latent_dim} + {self.rope_dim} numbers cannot be joined with those of "
                f"{other.latent_dim} + {other.rope_dim}: they are of other models."
            )
        if other.count == 0:
            return
        self.see_columns(other.columns)
        for field in fields(self):
            if field.name not in ("rows", "turns", "columns", "draws"):
                getattr(self, field.name).add_(getattr(other, field.name))
        self._keep(other.rows, other.turns, other.draws)

    def check(self, where: str) -> None:
        """Refuse what nothing can be fitted to.

        Raises:
            CalibrationError: no token, values that are not finite, or latents that never vary.
        """
        if self.count < 2:
            raise CalibrationError(f"{where} was given {int(self.count)} calibration tokens. Give it more text.")
        parts = (self.latent_outer, self.fisher, self.rot_outer, self.cross, self.rot_fisher)
        sums = torch.cat([part.flatten() for part in parts])
        if not torch.isfinite(sums).all():
            raise CalibrationError(
                f"{where} computed latents or gradients that are not finite on the calibration text. Load the model in "
                "bfloat16 or float32 (float16 overflows), and check that it predicts text at all."
            )
        if not (self.covariance.diagonal() > 0).any():
            raise CalibrationError(
                f"The latents of {where} are the same for all {int(self.count)} calibration tokens. Give it text that "
                "varies."
            )


def _sum(vectors: torch.Tensor) -> torch.Tensor:
    """Sum of vectors [T, n] on the CPU, in fp64, which not every device has."""
    return vectors.sum(0, dtype=torch.float64)


def _outer(vectors: torch.Tensor, others: torch.Tensor | None = None) -> torch.Tensor:
    """Sum of v w^T, or v v^T, over vectors [T, n] and [T, m]: fp32 products on their device, fp64 sum on the CPU."""
    with torch.autocast(vectors.device.type, enabled=False):  # it would round the products
        return (vectors.T @ (vectors if others is None else others)).cpu().double()


Statistics = dict[PartKey, LayerStatistics]


@torch.inference_mode(False)
def merge_across_processes(statistics: Statistics) -> Statistics:
    """The sum over all processes of `torch.distributed`, the same in each; as given where there is one process."""
    total: Statistics = {}
    for counted in gathered(statistics):
        for layer_idx, layer in counted.items():
            if layer_idx in total:
                total[layer_idx].merge(layer)
            else:
                total[layer_idx] = layer
    return total


@torch.inference_mode(False)
def join_across_processes(statistics: Statistics) -> Statistics:
    """Of each part those of the first process that has counted it, the same in each: all have seen the same text."""
    holders = gathered([part for part, layer in statistics.items() if layer.count])
    firsts = {part: rank for rank, parts in reversed(list(enumerate(holders))) for part in parts}
    own = {part: statistics[part] for part, rank in firsts.items() if rank == process_rank()}
    found: Statistics = {part: layer for counted in gathered(own) for part, layer in counted.items()}
    return {part: found.get(part, layer) for part, layer in statistics.items()}


def save_statistics(
    statistics: Statistics, path: str | Path, note: Mapping[str, str], holdout: Sequence[torch.Tensor]
) -> None:
    """Write a safetensors file: whole or not at all, with a checksum of what is in it.

    Args:
        statistics: by cache layer index.
        path: the file.
        note: what else is to be known about it.
        holdout: token ids [B, T] that were held out.
    """
    tensors = {
        f"{written_part(layer_idx)}.{field.name}": getattr(layer, field.name).contiguous()
        for layer_idx, layer in statistics.items()
        for field in fields(layer)
    }
    tensors |= {f"{_HOLDOUT}.{index}": ids.contiguous().cpu() for index, ids in enumerate(holdout)}
    in_heads = any(isinstance(part, HeadKey) for part in statistics)
    note = {"format": _FORMAT_OF_HEADS if in_heads else _FORMAT, _CHECKSUM: _digest(tensors), **note}
    folders.write_bytes(Path(path), safetensors.torch.save(tensors, metadata=note))


def written_part(part: PartKey) -> str:
    """A part as files name it: "3", or "3h1" of a key head."""
    return f"{part.layer_idx}h{part.head}" if isinstance(part, HeadKey) else str(part)


def part_of_name(text: str) -> PartKey:
    """What `written_part` has written.

    Raises:
        ValueError: it is no name of a part.
    """
    layer_idx, is_head, head = text.partition("h")
    return HeadKey(int(layer_idx), int(head)) if is_head else int(layer_idx)


def _order(part: PartKey) -> tuple[int, int]:
    return (part.layer_idx, part.head) if isinstance(part, HeadKey) else (part, -1)


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and values. (A flipped bit may turn a sum into another one.)"""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@torch.inference_mode(False)
def load_statistics(path: str | Path) -> tuple[Statistics, list[torch.Tensor], dict[str, str]]:
    """Read a file of `save_statistics`: the statistics, the held-out tokens, and the note.

    Raises:
        CalibrationError: the file is missing, damaged, or something else.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        raise CalibrationError(f"Cannot read calibration statistics from {path}: {error}. Calibrate again.") from error
    if metadata.get("format") not in (_FORMAT, _FORMAT_OF_HEADS):
        raise CalibrationError(
            f'{path} holds no calibration statistics of this release ("format" is {metadata.get("format")!r}, needed '
            f"is {_FORMAT!r}). Calibrate again."
        )
    if metadata.get(_CHECKSUM, "") not in ("", _digest(tensors)):  # files of before have none
        raise CalibrationError(f"{path} is damaged: its checksum is not that of what it holds. Calibrate again.")
    by_layer: dict[PartKey, dict[str, torch.Tensor]] = {}
    holdout = [tensors.pop(name) for name in sorted(tensors) if name.startswith(_HOLDOUT)]
    for name, tensor in tensors.items():
        layer_idx, _, field_name = name.partition(".")
        by_layer.setdefault(part_of_name(layer_idx), {})[field_name] = tensor
    try:
        statistics = {part: LayerStatistics(**by_layer[part]) for part in sorted(by_layer, key=_order)}
    except TypeError as error:
        raise CalibrationError(f"{path} is damaged: {error}. Calibrate again.") from error
    return statistics, holdout, metadata
