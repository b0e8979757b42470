"""`prune_kvsplice`: takes the coordinates out of the code that hardly reach the heads, so that the rank shrinks.

After calibration the transform divides by standard deviations, so that a latent arrives at `compress` with units of
size 1, and coordinate j of the code has about the size `||C_j||`. Decoded and read, a unit of it changes what
`kv_b_proj` makes of the latent by `||W D_j||`. The product is the coordinate's effective scale,

    s_j = ||W D_j|| * ||C_j||,

and without the coordinates of a set the result changes by about sqrt(sum of their s_j^2) (exactly so on average where
the dimensions of the transformed latent are uncorrelated and rows of `C`, or columns of `W D`, are orthogonal).

Legend: `R` kv_lora_rank, `r` spliced rank, `P` qk_rope_head_dim, `C` [r, R] the weight of `compress`, `D` [R, r] the
matrix of `fold`, `W` [H * (N + V), R] the weight of `kv_b_proj`.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import nn

from kvsplice_hf.code.projection import LearnedKVSplice
from kvsplice_hf.errors import ConfigError, PatchStateError, UnsupportedError
from kvsplice_hf.patch.families import AttentionSite
from kvsplice_hf.patch.mla import effective_weight
from kvsplice_hf.patch.site_patch import SitePatch
from kvsplice_hf.patch.state import all_patched_sites, models_around, patched_sites
from kvsplice_hf.upstream import drop_persistent_manager
from kvsplice_hf.weights.offload import read_parameter


@dataclass(frozen=True)
class LayerPruning:
    """What pruning takes out of one layer.

    Attributes:
        layer_idx: cache layer.
        rank_before: r.
        coordinates: those that go, ascending.
        relative_error: sqrt(sum of their squared effective scales / sum of all); about the relative change of what the
            heads read.
    """

    layer_idx: int
    rank_before: int
    coordinates: tuple[int, ...]
    relative_error: float

    @property
    def rank_after(self) -> int:
        """What is left of r."""
        return self.rank_before - len(self.coordinates)


def prune_kvsplice(model: nn.Module, threshold: float = 0.1) -> list[LayerPruning]:
    """Remove the coordinates whose effective scale is below `threshold` times the median of their layer, in place.

    `compress`, `expand` and packed rows become smaller, and so does the cache. Caches that were filled before do not
    fit any more (a `CacheMismatchError` says so), and an optimiser made before holds parameters that are no longer
    read. The settings in force stay as they were; `save_kvsplice` writes the new ranks.

    Args:
        model: a patched model.
        threshold: above 0. At least one coordinate of each layer stays, whatever it is.

    Returns:
        What was removed, by ascending layer.

    Raises:
        PatchStateError: the model is not patched, or is merged.
        ConfigError: the threshold is out of range, or the code has a LayerNorm, through which each coordinate changes
            all others, or lies behind splines.
        UnsupportedError: the splice is offloaded, or a layer has ordinary attention.

    Whatever is raised, the model is as it was.

    Examples:
        >>> reports = prune_kvsplice(model, threshold=0.1)
        >>> all(report.rank_after <= report.rank_before for report in reports)
        True
    """
    sites = patched_sites(model)
    for site, patched in sites:
        _require_latent(site)
        _require_prunable(site, patched.splice)
    reports = pruning_candidates(model, threshold)
    for (site, patched), report in zip(sites, reports, strict=True):
        if report.coordinates:
            _remove(patched.splice, report.coordinates)
            _resize_rows(_readers(model, site), patched.splice)
    for around in models_around(model):
        drop_persistent_manager(around)  # its pages have rows of the old size
    return reports


def pruning_candidates(model: nn.Module, threshold: float = 0.1) -> list[LayerPruning]:
    """What `prune_kvsplice` would remove. The model stays as it is.

    Raises:
        PatchStateError: the model is not patched.
        ConfigError, UnsupportedError: as `prune_kvsplice`.
    """
    reports = []
    for site, patched in patched_sites(model):
        _require_latent(site)
        splice = patched.splice
        device = splice.fold()[0].device
        # A layer that reuses this latent reads it with a kv_b_proj of its own.
        readers = torch.cat([effective_weight(reader).to(device) for reader, _ in _readers(model, site)])
        reports.append(plan_pruning(site.layer_idx, effective_scales(splice, readers), threshold))
    return reports


@torch.no_grad()
def effective_scales(splice: LearnedKVSplice, reader_weight: torch.Tensor | None = None) -> torch.Tensor:
    """`||W D_j|| * ||C_j||` of each code coordinate j, float32 [r].

    Args:
        splice: the projection.
        reader_weight: W [any, R]; None where the model is not at hand: `||D_j|| * ||C_j||`.

    Raises:
        ConfigError: the code has a LayerNorm, or lies behind splines.
    """
    if splice.code_norm is not None:
        raise ConfigError(
            "The code has a LayerNorm: without one coordinate the norm of all others would change, so none can be "
            "pruned. Patch with use_layernorm=False."
        )
    if not splice.is_affine:
        raise ConfigError(
            'The latents of this splice go through splines (transform="spline"), so that what a coordinate costs '
            "differs from token to token. Patch with a smaller `rank` instead of pruning."
        )
    seen = splice.fold()[0][:, : splice.rank].float()
    if reader_weight is not None:
        seen = reader_weight.float() @ seen
    return seen.norm(dim=0) * read_parameter(splice.compress, "weight").float().norm(dim=1)


def plan_pruning(layer_idx: int, scales: torch.Tensor, threshold: float) -> LayerPruning:
    """Choose what to remove, given effective scales [r].

    Raises:
        ConfigError: the threshold is out of range.
    """
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 < threshold < math.inf:
        raise ConfigError(
            f"`threshold` is {threshold!r}; it must be a positive number: the part of the median effective scale below "
            "which a coordinate is removed."
        )
    scales = scales.cpu()  # float64 is not to be had on every device
    removed = scales < threshold * scales.median()
    removed[scales.argmax()] = False
    squares = scales.double().square()
    error = (squares[removed].sum() / squares.sum().clamp(min=torch.finfo(torch.float64).tiny)).sqrt()
    return LayerPruning(layer_idx, len(scales), tuple(removed.nonzero()[:, 0].tolist()), float(error))


def _require_latent(site: AttentionSite) -> None:
    if site.kv_heads:
        raise UnsupportedError(
            f"{site.name} has ordinary attention. Its rows are packed, and what matters least has no bits in them "
            "already: patch again with a smaller `bytes_per_token` instead of pruning."
        )


def _require_prunable(site: AttentionSite, splice: LearnedKVSplice) -> None:
    if splice.is_merged:
        raise PatchStateError(
            f"The splice of layer {site.layer_idx} is merged. Call unmerge_kvsplice(model) first, and merge again "
            "after pruning."
        )
    if any(parameter.is_meta for parameter in splice.parameters()):
        raise UnsupportedError(
            f"The splice of layer {site.layer_idx} is offloaded, so that its size cannot change. Prune before "
            "offloading, and save the result with save_kvsplice."
        )


def _readers(model: nn.Module, owner: AttentionSite) -> list[tuple[AttentionSite, SitePatch]]:
    """The modules that expand the latent of `owner`: itself, and layers that reuse it."""
    return [(site, state) for site, state in all_patched_sites(model) if state.owner is owner.module]


@torch.no_grad()
def _remove(splice: LearnedKVSplice, coordinates: tuple[int, ...]) -> None:
    """Take coordinates of the code out of the projections and of packed rows."""
    compress, expand = splice.compress.weight, splice.expand.weight
    kept = torch.ones(splice.rank, dtype=torch.bool, device=compress.device)
    kept[list(coordinates)] = False
    if splice.codec is not None:
        splice.codec = splice.codec.without(kept)
    # The modules stay: hooks hang on them.
    splice.compress.weight = nn.Parameter(compress[kept], compress.requires_grad)
    read = torch.cat([kept, kept.new_ones(splice.predicted_from)])
    splice.expand.weight = nn.Parameter(expand[:, read].contiguous(), expand.requires_grad)
    splice.rank = int(kept.sum())


def _resize_rows(readers: list[tuple[AttentionSite, SitePatch]], splice: LearnedKVSplice) -> None:
    packed_bytes = None if splice.codec is None else splice.codec.row_bytes
    for _, patched in readers:
        patched.geometry = replace(patched.geometry, rank=splice.rank, packed_bytes=packed_bytes)
