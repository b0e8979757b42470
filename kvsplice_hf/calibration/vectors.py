"""Samples of what a model caches: latents, or values and keys of each key head. See `kvsplice_hf.geometry`."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from kvsplice_hf.calibration.collect import Batch, Collector, select_counted
from kvsplice_hf.calibration.key_geometries import SampledKeys
from kvsplice_hf.code.heads import PartKey, layer_of
from kvsplice_hf.code.keys import TURN_DTYPE
from kvsplice_hf.errors import CalibrationError, ConfigError
from kvsplice_hf.patch.families import AttentionSite


def collect_vectors(
    model: nn.Module,
    batches: Sequence[torch.Tensor | Mapping[str, torch.Tensor]],
    *,
    max_samples: int = 120_000,
    max_batches: int = 64,
    sink_tokens: int = 4,
    seed: int = 0,
    layer_pattern: str | None = None,
    of: str = "heads",
    progress: bool = True,
) -> dict[PartKey, torch.Tensor]:
    """Latents of MLA layers and values of ordinary attention, by layer and key head: float32 [M, n], on the CPU.

    The model runs as it is, unpatched and without gradients. Of each batch tokens are drawn at random, as many as make
    up `max_samples` over all batches, and moved to the CPU at once.

    Args:
        model: with MLA or ordinary attention.
        batches: token ids [B, T], or `input_ids` with an `attention_mask`.
        max_samples: M, at most.
        max_batches: further ones are left out.
        sink_tokens: the first real tokens of a sequence, which are stored exactly and left out here.
        seed: of the drawing.
        layer_pattern: see `KVSpliceConfig`.
        of: "heads", the values of each key head by themselves, or "layers", those of a layer side by side.
        progress: show a bar.

    Raises:
        CalibrationError: no tokens are left, or tokens that the model does not know.
        ConfigError: `max_samples` or `max_batches` below 1, or `of` neither of the two.
        PatchStateError: the model is patched.
        NotMLAError: it has no attention layer that is known.
    """
    if of not in ("heads", "layers"):
        raise ConfigError(f'`of` is {of!r}; it must be "heads" or "layers".')
    settings: dict[str, Any] = {"max_samples": max_samples, "max_batches": max_batches, "sink_tokens": sink_tokens}
    settings |= {"seed": seed, "layer_pattern": layer_pattern, "progress": progress}
    drawn = {part: sample.vectors for part, sample in collect_samples(model, batches, **settings).items()}
    return drawn if of == "heads" else _by_layer(drawn)


class Sample(NamedTuple):
    """What was drawn of a layer, or of one of its key heads: of the same tokens in all of them.

    Attributes:
        vectors: latents or values, float32 [M, n].
        keys: those of the same tokens, or None where they were not asked for.
    """

    vectors: torch.Tensor
    keys: SampledKeys | None


def collect_samples(
    model: nn.Module,
    batches: Sequence[torch.Tensor | Mapping[str, torch.Tensor]],
    *,
    max_samples: int = 120_000,
    max_batches: int = 64,
    sink_tokens: int = 4,
    seed: int = 0,
    layer_pattern: str | None = None,
    progress: bool = True,
    with_keys: bool = False,
) -> dict[PartKey, Sample]:
    """As `collect_vectors` of each head, with the keys as well where `with_keys`.

    Raises:
        CalibrationError, ConfigError, PatchStateError, NotMLAError: as `collect_vectors`.
    """
    if min(max_samples, max_batches) < 1:
        raise ConfigError(f"`max_samples` is {max_samples} and `max_batches` {max_batches}; both must be 1 or more.")
    chosen: list[Batch] = [
        dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch} for batch in batches[:max_batches]
    ]
    quota = -(-max_samples // max(1, len(chosen)))
    collector = _VectorCollector(model, quota, sink_tokens, seed, layer_pattern, with_keys)
    collector.run(chosen, progress)
    drawn = {part: collector.sample(part, max_samples) for part, vectors in collector.drawn.items() if vectors}
    if not drawn or not all(len(sample.vectors) for sample in drawn.values()):
        raise CalibrationError(
            f"No tokens are left of {len(chosen)} batches: the first {sink_tokens} of each sequence are stored exactly "
            "and do not count. Give longer sequences."
        )
    return drawn


def _by_layer(drawn: Mapping[PartKey, torch.Tensor]) -> dict[PartKey, torch.Tensor]:
    """The vectors of the parts of each layer side by side: they are of the same tokens."""
    layers: dict[PartKey, list[torch.Tensor]] = {}
    for part, vectors in drawn.items():
        layers.setdefault(layer_of(part), []).append(vectors)
    return {layer: torch.cat(parts, dim=1) for layer, parts in layers.items()}


class _VectorCollector(Collector):
    """Keeps vectors where `Collector` keeps sums.

    Args:
        quota: tokens that are kept of each batch.
        with_keys: keep their keys as well.
    """

    def __init__(
        self,
        model: nn.Module,
        quota: int,
        sink_tokens: int,
        seed: int,
        layer_pattern: str | None,
        with_keys: bool,
    ) -> None:
        super().__init__(model, "pca", layer_pattern, sink_tokens, seed)
        self._quota, self._with_keys = quota, with_keys
        self._places: torch.Tensor | None = None
        self.drawn: dict[PartKey, list[torch.Tensor]] = {part: [] for site in self.sites for part in site.parts}
        self._keys: dict[PartKey, list[tuple[torch.Tensor, torch.Tensor]]] = {part: [] for part in self.drawn}

    def sample(self, part: PartKey, count: int) -> Sample:
        """What was drawn of a part, at most so many."""
        vectors = torch.cat(self.drawn[part])[:count]
        if not self._with_keys:
            return Sample(vectors, None)
        rotated, turns = (torch.cat(pieces)[:count] for pieces in zip(*self._keys[part], strict=True))
        return Sample(vectors, SampledKeys(rotated, turns, self.statistics[part].columns))

    def _run_batch(self, batch: Batch) -> None:
        self._places = None
        super()._run_batch(batch)

    def _count(self, site: AttentionSite, latent: torch.Tensor, k_rot: torch.Tensor) -> Any:
        turns = self._turns(site, latent.shape[0]) if self._with_keys else None
        for head, part in enumerate(site.parts):
            rows = select_counted(latent.detach(), self._counted, head)
            if self._places is None:  # the same tokens in all layers
                order = torch.randperm(len(rows), generator=self.generator, dtype=torch.int64, device="cpu")
                self._places = order[: self._quota]
            self.drawn[part].append(rows[self._places.to(rows.device)].float().cpu())
            if self._with_keys:
                self._keep_keys(part, select_counted(k_rot.detach(), self._counted, head), turns)
        return latent, k_rot

    def _keep_keys(self, part: PartKey, keys: torch.Tensor, turns: torch.Tensor | None) -> None:
        assert self._places is not None
        keys = keys[self._places.to(keys.device)].float().cpu()
        no_turns = torch.zeros(len(keys), 0, dtype=TURN_DTYPE, device="cpu")
        own = no_turns if turns is None else turns[self._places.to(turns.device)].cpu()
        self._keys[part].append((keys, own))
        # Others are refused once the first ones are counted, which nothing else does here.
        self.statistics[part].count.fill_(len(self._keys[part]))
