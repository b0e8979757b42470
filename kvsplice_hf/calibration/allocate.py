"""Bits for coordinates: measured distortions, and reverse water-filling over coordinates and layers.

A coordinate's increments (its first bit, its second, ...) each save some cost. The best set of increments that fits a
number of bits is the set of those that save most per bit, which one threshold for all of them picks out.

Legend: `n` = R + P coordinates of a row, `M` sampled rows, `L` layers, `W` = len(STEPS) widths above 0.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kvsplice_hf.calibration.solve import LayerSolution
from kvsplice_hf.code.levels import BEND
from kvsplice_hf.code.widths import row_bytes
from kvsplice_hf.errors import ConfigError


# Bits that each increment adds: widths 1 to 8, then the whole bf16 number.
STEPS = (1, 1, 1, 1, 1, 1, 1, 1, 8)
_BF16_DISTORTION = 2.0**-18 / 3  # relative: a mantissa of 8 bits, rounded
_TABLE_ROWS = 1024
_LIKELY_KEPT = 1e-3
_SCALES = torch.linspace(0.6, 6.0, 28, dtype=torch.float32, device="cpu")  # largest level over root mean square
_BISECTIONS = 60


@dataclass
class Distortion:
    """What coordinates cost at each width.

    Attributes:
        relative: squared error over variance, float64 [n, W + 1]; 1 at width 0.
    """

    relative: torch.Tensor


def gains_of(codes: torch.Tensor) -> torch.Tensor:
    """Root mean square of each row of standardised codes [M, r], as [M, 1]."""
    if codes.shape[1] == 0:
        return torch.ones(len(codes), 1, dtype=codes.dtype, device=codes.device)
    return codes.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-6)


def standardised(solution: LayerSolution, gained: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sampled codes over their root mean square and their row's gain, float32 [M, n], and the gains [M, 1].

    Args:
        solution: of the layer.
        gained: which latent coordinates the gain is taken over, bool [R].
    """
    R = solution.latent_dim
    unit = solution.codes / sigmas_of(solution)
    gains = gains_of(unit[:, :R][:, gained])
    unit = torch.cat([unit[:, :R] / gains, unit[:, R:]], dim=-1)
    return unit.float(), gains.float()


def sigmas_of(solution: LayerSolution) -> torch.Tensor:
    """Root mean square of the sampled codes, float64 [n]."""
    return solution.codes.square().mean(0).sqrt().clamp(min=1e-30)


def fit_scales(unit: torch.Tensor, weight: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest level for each coordinate that errs least, and its mean squared error.

    Args:
        unit: standardised samples, float32 [M, n].
        weight: weight of each row's squared error, [M, n] or [M, 1].
        width: 1 to 8.

    Returns:
        Scales and errors, float32 [n].
    """
    best_error = torch.full((unit.shape[1],), torch.inf, dtype=torch.float32, device="cpu")
    best_scale = torch.ones_like(best_error)
    for scale in _SCALES[_SCALES >= 0.9 if width > 3 else slice(None)].tolist():
        error = (weight * (unit - quantised(unit / scale, width) * scale).square()).mean(0)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
    return best_scale, best_error


def quantised(unit: torch.Tensor, width: int) -> torch.Tensor:
    """Numbers put on the unit levels of a width, as `RowCodec` does."""
    bend = BEND[width]
    grid = torch.asinh(unit * math.sinh(bend)) / bend if bend else unit
    grid = ((grid + 1) * 2 ** (width - 1)).floor().clamp(0, 2**width - 1)
    grid = (2 * grid + 1) / 2**width - 1
    return torch.sinh(bend * grid) / math.sinh(bend) if bend else grid


def measure_distortion(solution: LayerSolution) -> Distortion:
    """Distortions of one layer from its sampled rows."""
    cost = solution.cost[: solution.latent_dim]
    # Which coordinates will share the gain is not known yet: take those that will probably get a bit.
    gained = cost > _LIKELY_KEPT * cost.max().clamp(min=1e-30)
    unit, gains = standardised(solution, gained)
    unit, gains = unit[:_TABLE_ROWS], gains[:_TABLE_ROWS]
    weight = torch.ones_like(unit)
    weight[:, : solution.latent_dim] = gains.square()
    energy = (weight * unit.square()).mean(0).clamp(min=1e-30)
    columns = [torch.ones_like(energy)]
    columns += [fit_scales(unit, weight, width)[1] / energy for width in range(1, 9)]
    columns.append(torch.full_like(energy, _BF16_DISTORTION))
    relative = torch.stack(columns, dim=1).double()
    return Distortion(relative.cummin(dim=1).values)


def increments(solution: LayerSolution, distortion: Distortion) -> torch.Tensor:
    """Cost saved per bit by each increment, float64 [n, W], never rising from one increment to the next."""
    saved = -distortion.relative.diff(dim=1) * solution.cost[:, None]
    per_bit = saved / torch.tensor(STEPS, dtype=torch.float64, device="cpu")
    return per_bit.cummin(dim=1).values


def widths_above(per_bit: torch.Tensor, threshold: float, latent_dim: int) -> torch.Tensor:
    """Widths [n] of the increments that save more than `threshold` per bit; one latent coordinate gets a bit anyway."""
    taken = per_bit > threshold
    widths = (taken * torch.tensor(STEPS, dtype=torch.int64, device="cpu")).sum(1)
    if not widths[:latent_dim].any():
        widths[0] = 1
    return widths


def allocate(
    solutions: Sequence[LayerSolution], distortions: Sequence[Distortion], budget: float, *, per_layer: bool = False
) -> list[torch.Tensor]:
    """Widths [n] of every layer's coordinates, within `budget` bytes per row on average.

    Args:
        solutions, distortions: of the layers.
        budget: bytes per row; with `per_layer` of each layer, otherwise on average over layers.
        per_layer: give every layer the same bytes instead of letting them compete.

    Raises:
        ConfigError: the budget is less than a row of one bit.
    """
    tables = [increments(solution, distortion) for solution, distortion in zip(solutions, distortions, strict=True)]
    dims = [solution.latent_dim for solution in solutions]
    if per_layer:
        return [_fill([table], [dim], budget)[0] for table, dim in zip(tables, dims, strict=True)]
    return _fill(tables, dims, budget)


def _fill(tables: Sequence[torch.Tensor], dims: Sequence[int], budget: float) -> list[torch.Tensor]:
    def at(threshold: float) -> list[torch.Tensor]:
        return [widths_above(table, threshold, dim) for table, dim in zip(tables, dims, strict=True)]

    def size(widths: Sequence[torch.Tensor]) -> float:
        return sum(row_bytes(layer, dim) for layer, dim in zip(widths, dims, strict=True)) / len(widths)

    highest = max(float(table.max()) for table in tables)
    if size(at(highest)) > budget:
        raise ConfigError(
            f"A budget of {budget:.1f} bytes per token and layer is below the {size(at(highest)):.1f} bytes that the "
            "smallest row takes. Give more."
        )
    if size(at(0.0)) <= budget:
        return at(0.0)
    return at(_bisect(lambda threshold: size(at(threshold)) <= budget, highest))


def _bisect(fits: Callable[[float], bool], highest: float) -> float:
    """The lowest threshold found that fits; thresholds span many orders of magnitude, so their logarithm is halved."""
    low, high = math.log(max(highest, 1e-300)) - 80, math.log(max(highest, 1e-300))
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(math.exp(middle)) else (middle, high)
    return math.exp(high)
