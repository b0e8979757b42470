"""Samples of what a model caches: latents, or the values of each key head. See `kvsplice_hf.geometry`."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from kvsplice_hf.calibration.collect import Batch, Collector, select_counted
from kvsplice_hf.code.heads import PartKey, layer_of
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
    if min(max_samples, max_batches) < 1:
        raise ConfigError(f"`max_samples` is {max_samples} and `max_batches` {max_batches}; both must be 1 or more.")
    if of not in ("heads", "layers"):
        raise ConfigError(f'`of` is {of!r}; it must be "heads" or "layers".')
    chosen: list[Batch] = [
        dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch} for batch in batches[:max_batches]
    ]
    collector = _VectorCollector(model, -(-max_samples // max(1, len(chosen))), sink_tokens, seed, layer_pattern)
    collector.run(chosen, progress)
    drawn = {part: torch.cat(vectors)[:max_samples] for part, vectors in collector.drawn.items() if vectors}
    if of == "layers":
        drawn = _by_layer(drawn)
    if not drawn or not all(map(len, drawn.values())):
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
    """

    def __init__(self, model: nn.Module, quota: int, sink_tokens: int, seed: int, layer_pattern: str | None) -> None:
        super().__init__(model, "pca", layer_pattern, sink_tokens, seed)
        self._quota = quota
        self._places: torch.Tensor | None = None
        self.drawn: dict[PartKey, list[torch.Tensor]] = {part: [] for site in self.sites for part in site.parts}

    def _run_batch(self, batch: Batch) -> None:
        self._places = None
        super()._run_batch(batch)

    def _count(self, site: AttentionSite, latent: torch.Tensor, k_rot: torch.Tensor) -> Any:
        for head, part in enumerate(site.parts):
            rows = select_counted(latent.detach(), self._counted, head)
            if self._places is None:  # the same tokens in all layers
                order = torch.randperm(len(rows), generator=self.generator, dtype=torch.int64, device="cpu")
                self._places = order[: self._quota]
            self.drawn[part].append(rows[self._places.to(rows.device)].float().cpu())
        return latent, k_rot
