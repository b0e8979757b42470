"""From a solution and its widths to parameters: a `LearnedKVSplice`, with a codec where rows are packed.

Legend: `R` kv_lora_rank, `P` qk_rope_head_dim, `r` spliced rank, `M` sampled rows.
"""

import copy
from dataclasses import dataclass

import torch

from kvsplice_hf.calibration.allocate import Allocation, fit_scales, sigmas_of, standardised
from kvsplice_hf.calibration.key_geometries import KeyGeometry
from kvsplice_hf.calibration.solve import LayerSolution
from kvsplice_hf.calibration.statistics import LayerStatistics
from kvsplice_hf.code.bent import BentKeyProjection, SplineSplice
from kvsplice_hf.code.codec import RowCodec
from kvsplice_hf.code.codecs import Codec
from kvsplice_hf.code.keys import KeyProjection
from kvsplice_hf.code.projection import LearnedKVSplice
from kvsplice_hf.errors import ConfigError
from kvsplice_hf.geometry import SplinePCA


# Scale of the transform of a latent that is to be stored as it comes: softplus gives back what is above 20 exactly, and
# products with a power of two are exact.
_POWER_OF_TWO = 32.0
_SMALLEST_STD = 1e-6  # relative to the largest; a dimension that never varies keeps a finite scale


@dataclass
class LayerFit:
    """What a layer's splice is made of.

    Attributes:
        transform_scale, transform_shift: as applied to the latent (the softplus already taken), [R].
        compress, expand: [r, R] and [R, r + q].
        predicted_from: q, the numbers of a key's code that latents are predicted from.
        codec: packs the rows, or None where codes are stored as numbers.
        keys: codes keys before their rotation, or None where rows hold rotated ones.
        predicted_loss: nats per token by the metric, before any interaction between layers; NaN where it is not known.
        bending: knots [R, n] and slopes [R, n + 1] of the splines ahead of the transform, or None.
    """

    transform_scale: torch.Tensor
    transform_shift: torch.Tensor
    compress: torch.Tensor
    expand: torch.Tensor
    codec: Codec | None
    keys: KeyProjection | None
    predicted_loss: float
    predicted_from: int = 0
    bending: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def rank(self) -> int:
        return len(self.compress)


def fit_rank(statistics: LayerStatistics, solution: LayerSolution, rank: int) -> LayerFit:
    """The `rank` coordinates that cost most, as numbers."""
    kept = torch.zeros(solution.latent_dim, dtype=torch.bool, device="cpu")
    kept[:rank] = True
    return _layer_fit(statistics, solution, kept, None, None, float(solution.cost[rank : solution.latent_dim].sum()))


def fit_widths(
    statistics: LayerStatistics, solution: LayerSolution, allocation: Allocation, kind: type[RowCodec] = RowCodec
) -> LayerFit:
    """Packed rows with these bits, scales fitted to the sampled rows."""
    R, widths = solution.latent_dim, allocation.widths
    kept = widths > 0
    unit, weight = standardised(solution, kept, key_gain=allocation.key_gain)
    scales = torch.ones(len(widths), dtype=torch.float32, device="cpu")
    errors = (weight * unit.square()).mean(0)  # of width 0
    for width in range(1, 9):
        chosen = (widths == width).nonzero()[:, 0]
        if len(chosen):
            scales[chosen], errors[chosen] = fit_scales(unit[:, chosen], weight[:, chosen], width)
            errors[chosen] *= kind.error_ratios()[width].float()
    errors[widths == 16] = 0
    sigmas = sigmas_of(solution).float()
    centres = torch.zeros_like(scales)
    if solution.pairs is None:
        # k_rot is packed in its own units, codes in units of their root mean square; and of it all is kept.
        scales[R:] *= sigmas[R:] * solution.key_decode.diagonal().float()
        centres[R:], kept[R:] = solution.key_mean.float(), True
    unit_sigmas = torch.ones(int(kept.sum()), dtype=torch.float32, device="cpu")  # by construction of the basis
    rank = int(kept[:R].sum())
    codec = kind(
        widths=widths[kept],
        scales=scales[kept].clamp(min=1e-30),
        centres=centres[kept],
        sigmas=unit_sigmas[:rank],
        key_sigmas=unit_sigmas[rank:] if allocation.key_gain else None,
    )
    loss = float((errors.double() * sigmas.double().square()).sum() / 2)
    return _layer_fit(statistics, solution, kept, codec, _fit_keys(solution, kept[R:]), loss)


def _fit_keys(solution: LayerSolution, kept: torch.Tensor) -> KeyProjection | None:
    """The projection onto the kept coordinates of keys, bool [P], in units of their root mean square."""
    if solution.pairs is None:
        return None
    with torch.random.fork_rng(devices=[]):  # the constructor draws random numbers
        keys = KeyProjection(len(kept), int(kept.sum()), dtype=torch.float32, device="cpu")
    sigmas = sigmas_of(solution)[solution.latent_dim :][kept]
    with torch.no_grad():
        keys.mean.copy_(solution.key_mean)
        keys.compress.weight.copy_(solution.key_encode[kept] / sigmas[:, None])
        keys.expand.weight.copy_(solution.key_decode[:, kept] * sigmas)
        keys.pairs.copy_(solution.pairs)
    return keys


def fit_codec(
    statistics: LayerStatistics, solution: LayerSolution, kind: type[Codec], budget: float, where: str
) -> LayerFit:
    """Packed rows of all coordinates, by a codec that is fitted to this layer alone.

    Args:
        statistics, solution: of the layer.
        kind: the class of the codec.
        budget: bytes of a row, at most.
        where: names the layer in the error.

    Raises:
        ConfigError: the codec's rows are larger.
    """
    R, sigmas = solution.latent_dim, sigmas_of(solution)
    rows, units = solution.codes / sigmas, sigmas
    if (
        solution.pairs is None
    ):  # as the cache will hold them: codes in units of their root mean square, k_rot in its own
        key_units = solution.key_decode.diagonal()
        rotated = solution.codes[:, R:] * key_units + solution.key_mean
        rows, units = torch.cat([rows[:, :R], rotated], dim=-1), torch.cat([sigmas[:R], 1 / key_units])
    codec = kind.fit(rows, R, budget)
    if codec.row_bytes > budget:
        raise ConfigError(
            f"Rows of the codec {kind.kind!r} take {codec.row_bytes} bytes in {where}; the budget is {budget:.1f}. "
            "Give more `bytes_per_token` or `bits`, or another `codec`."
        )
    loss = ((codec.round_trip(rows) - rows) * units).square().sum(-1).mean() / 2
    everything = torch.ones(len(solution.cost), dtype=torch.bool, device="cpu")
    keys = _fit_keys(solution, everything[R:])
    return _layer_fit(statistics, solution, everything, codec, keys, float(loss))


def fit_geometry(geometry: SplinePCA, key_dim: int | None, keys: KeyGeometry | None = None) -> LayerFit:
    """A spline and principal components, as numbers; of a key head packed with its key, all in bf16.

    Args:
        geometry: fitted.
        key_dim: numbers of the key of a key head; None for a latent.
        keys: of the key head, where its keys go through a geometry as well.
    """
    spline, mean, basis = geometry.fitted()
    ones = torch.ones_like(mean)
    codec, projection = None, None if keys is None else _bent_keys(keys)
    if key_dim is not None:
        stored = key_dim if projection is None else projection.rank
        row = torch.ones(geometry.k + stored, dtype=torch.float32, device="cpu")
        codec = RowCodec(widths=16 * row.int(), scales=row, centres=0 * row, sigmas=row[:0])
    bending = spline.knots, spline.slopes.detach()
    return LayerFit(ones, -mean, basis.T, basis, codec, projection, float("nan"), bending=bending)


def _bent_keys(keys: KeyGeometry) -> BentKeyProjection:
    spline, mean, basis = keys.geometry.fitted()
    rope_dim, rank = basis.shape
    with torch.random.fork_rng(devices=[]):  # the constructor draws random numbers
        made = BentKeyProjection(rope_dim, rank, knots=keys.geometry.knots, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        made.mean.copy_(mean)
        made.compress.weight.copy_(basis.T)
        made.expand.weight.copy_(basis)
        made.pairs.copy_(keys.pairs)
        made.bending.set_to(spline.knots, spline.slopes.detach())
    return made


def _layer_fit(
    statistics: LayerStatistics,
    solution: LayerSolution,
    kept: torch.Tensor,
    codec: Codec | None,
    keys: KeyProjection | None,
    loss: float,
) -> LayerFit:
    if solution.exact_latent:
        return _exact_fit(solution, codec, keys, loss)
    std = statistics.covariance.diagonal().clamp(min=0).sqrt()
    std = torch.maximum(std, _SMALLEST_STD * std.max()).clamp(min=1e-30)
    sigmas, R = sigmas_of(solution), solution.latent_dim
    of_latent, of_key = kept[:R].nonzero()[:, 0], kept[R:].nonzero()[:, 0]
    expand = solution.decode[:, of_latent] * sigmas[of_latent]
    if solution.predict is not None:
        expand = torch.cat([expand, solution.predict[:, of_key] * sigmas[R + of_key]], dim=1)
    return LayerFit(
        transform_scale=1 / std,
        transform_shift=-solution.mean / std,
        compress=solution.encode[of_latent] * std / sigmas[of_latent, None],
        expand=expand / std[:, None],
        codec=codec,
        keys=keys,
        predicted_loss=loss,
        predicted_from=0 if solution.predict is None else len(of_key),
    )


def _exact_fit(solution: LayerSolution, codec: Codec | None, keys: KeyProjection | None, loss: float) -> LayerFit:
    """A latent that is stored as it comes, up to a power of two."""
    same = torch.eye(solution.latent_dim, dtype=torch.float64, device="cpu")
    scale = torch.full_like(solution.mean, _POWER_OF_TWO)
    return LayerFit(scale, torch.zeros_like(scale), same, same, codec, keys, loss)


@torch.no_grad()
def write_fit_(splice: LearnedKVSplice, fit: LayerFit) -> None:
    """Set the parameters of a splice of the same rank, in place."""
    # The inverse of softplus, without overflow.
    scale = fit.transform_scale
    splice.transform_scale.copy_(torch.where(scale > 20, scale, torch.expm1(scale.clamp(max=20)).log()))
    splice.transform_shift.copy_(fit.transform_shift)
    splice.compress.weight.copy_(fit.compress)
    splice.expand.weight.copy_(fit.expand)
    if fit.bending is not None:
        assert isinstance(splice, SplineSplice)
        splice.bending.set_to(*fit.bending)
    # A copy: one fit may be written into several models.
    weight = splice.compress.weight
    splice.codec = None if fit.codec is None else copy.deepcopy(fit.codec).to(weight.device)
    splice.keys = None if fit.keys is None else copy.deepcopy(fit.keys).to(weight.device, weight.dtype)
