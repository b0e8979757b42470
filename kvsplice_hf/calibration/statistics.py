"""What calibration remembers of each layer: sums over tokens, and a fixed number of sampled rows.

Its size does not depend on the number of tokens, and several processes' statistics add up. They are made outside of
`torch.inference_mode`, even where the caller is inside, because tensors made there cannot be added to later on.

Legend: `R` kv_lora_rank, `P` qk_rope_head_dim, `M` sampled rows, `T` tokens.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

import safetensors.torch
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from kvsplice_hf import folders
from kvsplice_hf.errors import CalibrationError


SAMPLED_ROWS = 2048
_FORMAT = "kvsplice_hf.statistics.1"
_HOLDOUT = "holdout"
_CHECKSUM = "sha256"


@dataclass
class LayerStatistics:
    """Sums over the calibration tokens of one layer, float64 on the CPU unless said otherwise.

    Attributes:
        count: number of tokens, [1].
        latent_sum: [R].
        latent_outer: sum of c c^T, [R, R].
        rot_sum, rot_square: sums of the rotated keys and of their squares, [P].
        fisher: sum of g g^T, g being the gradient of the log-likelihood of sampled labels at the latent, [R, R].
        rot_fisher: its diagonal for the rotated keys, [P].
        readers, rot_readers: the same from forward passes only (see `readers.py`), [R, R] and [P].
        rows: a sample of rows `[latent | k_rot]`, float32 [M, R + P].
        draws: one random number per sampled row, [M]. The M smallest are kept, whatever the order of the tokens.
    """

    count: torch.Tensor
    latent_sum: torch.Tensor
    latent_outer: torch.Tensor
    rot_sum: torch.Tensor
    rot_square: torch.Tensor
    fisher: torch.Tensor
    rot_fisher: torch.Tensor
    readers: torch.Tensor
    rot_readers: torch.Tensor
    rows: torch.Tensor
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
            rot_sum=zeros(P),
            rot_square=zeros(P),
            fisher=zeros(R, R),
            rot_fisher=zeros(P),
            readers=zeros(R, R),
            rot_readers=zeros(P),
            rows=zeros(0, R + P).float(),
            draws=zeros(0),
        )

    @property
    def latent_dim(self) -> int:
        return len(self.latent_sum)

    @property
    def rope_dim(self) -> int:
        return len(self.rot_sum)

    @property
    def mean(self) -> torch.Tensor:
        """mu, [R]."""
        return self.latent_sum / self.count

    @property
    def covariance(self) -> torch.Tensor:
        """Sigma, [R, R]."""
        return self.latent_outer / self.count - torch.outer(self.mean, self.mean)

    def add_rows(self, latents: torch.Tensor, k_rot: torch.Tensor, generator: torch.Generator) -> None:
        """Count tokens: latents [T, R] and rotated keys [T, P], on any device."""
        self.count += len(latents)
        self.latent_outer += _outer(latents.float())
        latents, k_rot = latents.float().cpu(), k_rot.float().cpu()
        self.latent_sum += _sum(latents)
        self.rot_sum += _sum(k_rot)
        self.rot_square += _sum(k_rot.square())
        draws = torch.rand(len(latents), generator=generator, dtype=torch.float64, device="cpu")
        # Only rows that can be among the M smallest draws are of use.
        bound = float(self.draws.max()) if len(self.draws) == SAMPLED_ROWS else torch.inf
        chosen = draws < bound
        self._keep(torch.cat([latents[chosen], k_rot[chosen]], dim=-1), draws[chosen])

    def add_gradients(self, latents: torch.Tensor) -> None:
        """Count gradients at the latents, [T, R]."""
        self.fisher += _outer(latents.float())

    def add_rot_gradients(self, k_rot: torch.Tensor) -> None:
        """Count gradients at the rotated keys, [T, P]."""
        self.rot_fisher += _sum(k_rot.float().cpu().square())

    def _keep(self, rows: torch.Tensor, draws: torch.Tensor) -> None:
        draws = torch.cat([self.draws, draws])
        rows = torch.cat([self.rows, rows])
        if len(draws) > SAMPLED_ROWS:
            order = draws.argsort()[:SAMPLED_ROWS]
            rows, draws = rows[order], draws[order]
        self.rows, self.draws = rows, draws

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
        for field in fields(self):
            if field.name not in ("rows", "draws"):
                getattr(self, field.name).add_(getattr(other, field.name))
        self._keep(other.rows, other.draws)

    def check(self, where: str) -> None:
        """Refuse what nothing can be fitted to.

        Raises:
            CalibrationError: no token, values that are not finite, or latents that never vary.
        """
        if self.count < 2:
            raise CalibrationError(f"{where} was given {int(self.count)} calibration tokens. Give it more text.")
        sums = torch.cat([self.latent_outer.flatten(), self.fisher.flatten(), self.rot_square, self.rot_fisher])
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


def _outer(vectors: torch.Tensor) -> torch.Tensor:
    """Sum of v v^T over vectors [T, n]: fp32 products on their device, fp64 sum on the CPU."""
    with torch.autocast(vectors.device.type, enabled=False):  # it would round the products
        return (vectors.T @ vectors).cpu().double()


Statistics = dict[int, LayerStatistics]


@torch.inference_mode(False)
def merge_across_processes(statistics: Statistics) -> Statistics:
    """The sum over all processes of `torch.distributed`, the same in each; as given where there is one process."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return statistics
    gathered: list[Statistics | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, statistics)
    total: Statistics = {}
    for part in gathered:
        for layer_idx, layer in (part or {}).items():
            if layer_idx in total:
                total[layer_idx].merge(layer)
            else:
                total[layer_idx] = layer
    return total


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
        f"{layer_idx}.{field.name}": getattr(layer, field.name).contiguous()
        for layer_idx, layer in statistics.items()
        for field in fields(layer)
    }
    tensors |= {f"{_HOLDOUT}.{index}": ids.contiguous().cpu() for index, ids in enumerate(holdout)}
    note = {"format": _FORMAT, _CHECKSUM: _digest(tensors), **note}
    folders.write_bytes(Path(path), safetensors.torch.save(tensors, metadata=note))


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and values. (A flipped bit may turn a sum into another one.)"""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
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
    if metadata.get("format") != _FORMAT:
        raise CalibrationError(
            f'{path} holds no calibration statistics of this release ("format" is {metadata.get("format")!r}, needed '
            f"is {_FORMAT!r}). Calibrate again."
        )
    if metadata.get(_CHECKSUM, "") not in ("", _digest(tensors)):  # files of before have none
        raise CalibrationError(f"{path} is damaged: its checksum is not that of what it holds. Calibrate again.")
    by_layer: dict[int, dict[str, torch.Tensor]] = {}
    holdout = [tensors.pop(name) for name in sorted(tensors) if name.startswith(_HOLDOUT)]
    for name, tensor in tensors.items():
        layer_idx, _, field_name = name.partition(".")
        by_layer.setdefault(int(layer_idx), {})[field_name] = tensor
    try:
        statistics = {layer_idx: LayerStatistics(**values) for layer_idx, values in sorted(by_layer.items())}
    except TypeError as error:
        raise CalibrationError(f"{path} is damaged: {error}. Calibrate again.") from error
    return statistics, holdout, metadata
