"""Bits for coordinates: measured distortions, and reverse water-filling over coordinates and layers.

A coordinate's increments (its first bit, its second, ...) each save some cost. The best set of increments that fits a
number of bits is the set of those that save most per bit, which one threshold for all of them picks out. Whether a
layer's keys get a gain of their own is decided at that threshold as well: where the gain saves several times what its
eight bits would elsewhere.

Legend: `n` = R + P coordinates of a row, `M` sampled rows, `L` layers, `W` = len(STEPS) widths above 0.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kvsplice_hf.calibration.solve import LayerSolution
from kvsplice_hf.code.codec import RowCodec
from kvsplice_hf.code.codecs import Codec
from kvsplice_hf.code.levels import GRIDS
from kvsplice_hf.code.widths import row_bytes
from kvsplice_hf.errors import ConfigError


# Bits that each increment adds: widths 1 to 8, then the whole bf16 number.
STEPS = (1, 1, 1, 1, 1, 1, 1, 1, 8)
_BF16_DISTORTION = 2.0**-18 / 3  # relative: a mantissa of 8 bits, rounded
_TABLE_ROWS = 2048
_LIKELY_KEPT = 1e-3
# Largest level over root mean square. Some coordinates are near 0 for most tokens and far out for a few, which a whole
# context attends to (a "the" that serves as an attention sink): to clip those costs more than the mean error says.
_SCALES = torch.tensor(
    [0.6 + 0.2 * step for step in range(28)] + [6.5, 7.0, 7.5, 8.0, 9.0, 10.0, 12.0, 14.0, 16.0],
    dtype=torch.float32,
    device="cpu",
)
_COARSE = 4  # every so many scales are tried first
_BISECTIONS = 60
# So many times what its bits save elsewhere a gain of keys has to save: what it saves of sampled rows beyond those bits
# did not show on other text in a first trial (docs/keys.md).
_GAIN_MARGIN = 3.0


@dataclass
class Distortion:
    """What coordinates cost at each width.

    Attributes:
        relative: squared error over variance, float64 [n, W + 1]; 1 at width 0.
        with_key_gain: the same where keys have a gain of their own; None where they are stored as they come.
    """

    relative: torch.Tensor
    with_key_gain: torch.Tensor | None = None


@dataclass
class Allocation:
    """The bits of one layer.

    Attributes:
        widths: of its coordinates, [n].
        key_gain: whether its keys have a gain of their own.
    """

    widths: torch.Tensor
    key_gain: bool = False


def gains_of(codes: torch.Tensor) -> torch.Tensor:
    """Root mean square of each row of standardised codes [M, r], as [M, 1]."""
    if codes.shape[1] == 0:
        return torch.ones(len(codes), 1, dtype=codes.dtype, device=codes.device)
    return codes.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-6)


def standardised(
    solution: LayerSolution, gained: torch.Tensor, *, key_gain: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sampled codes over their root mean square and their row's gain, float32 [M, n], and the squared gains [M, n].

    Args:
        solution: of the layer.
        gained: which coordinates the gains are taken over, bool [n].
        key_gain: whether keys have a gain of their own; otherwise they have none.
    """
    R = solution.latent_dim
    unit = solution.codes / sigmas_of(solution)
    gains = torch.ones_like(unit)
    gains[:, :R] = gains_of(unit[:, :R][:, gained[:R]])
    if key_gain:
        gains[:, R:] = gains_of(unit[:, R:][:, gained[R:]])
    return (unit / gains).float(), gains.square().float()


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
    scales = _SCALES[_SCALES >= 0.9] if width > 3 else _SCALES
    best_error = torch.full((unit.shape[1],), torch.inf, dtype=torch.float32, device="cpu")
    best = torch.zeros(unit.shape[1], dtype=torch.int64, device="cpu")

    def compare(index: torch.Tensor) -> None:
        nonlocal best_error, best
        index = index.clamp(0, len(scales) - 1)
        scale = scales[index]
        error = (weight * (unit - quantised(unit / scale, width) * scale).square()).mean(0)
        better = error < best_error
        best_error, best = torch.where(better, error, best_error), torch.where(better, index, best)

    # Some of the scales, then those between the best ones: errors fall with the scale, and then rise.
    for index in range(0, len(scales) + _COARSE - 1, _COARSE):
        compare(torch.full_like(best, index))
    step = _COARSE // 2
    while step:
        middle = best
        compare(middle - step)
        compare(middle + step)
        step //= 2
    return scales[best], best_error


def quantised(unit: torch.Tensor, width: int) -> torch.Tensor:
    """Numbers put on the unit levels of a width, as `RowCodec` does."""
    bend = GRIDS[width].bend
    grid = torch.asinh(unit * math.sinh(bend)) / bend if bend else unit
    grid = ((grid + 1) * 2 ** (width - 1)).floor().clamp(0, 2**width - 1)
    grid = (2 * grid + 1) / 2**width - 1
    return torch.sinh(bend * grid) / math.sinh(bend) if bend else grid


def measure_distortion(solution: LayerSolution) -> Distortion:
    """Distortions of one layer from its sampled rows."""
    R, cost = solution.latent_dim, solution.cost
    # Which coordinates will share a gain is not known yet: take those that will probably get a bit.
    gained = torch.cat(
        [part > _LIKELY_KEPT * part.max().clamp(min=1e-30) for part in (cost[:R], cost[R:]) if len(part)]
    )
    relative = _relative(*standardised(solution, gained))
    if solution.pairs is None:
        return Distortion(relative)
    keys = _relative(*(part[:, R:] for part in standardised(solution, gained, key_gain=True)))
    return Distortion(relative, torch.cat([relative[:R], keys]))


def _relative(unit: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Squared errors over variances of standardised samples [M, n] at each width, float64 [n, W + 1]."""
    unit, weight = unit[:_TABLE_ROWS], weight[:_TABLE_ROWS]
    energy = (weight * unit.square()).mean(0).clamp(min=1e-30)
    columns = [torch.ones_like(energy)]
    columns += [fit_scales(unit, weight, width)[1] / energy for width in range(1, 9)]
    columns.append(torch.full_like(energy, _BF16_DISTORTION))
    return torch.stack(columns, dim=1).double().cummin(dim=1).values


def smallest_widths(solution: LayerSolution) -> torch.Tensor:
    """The bits of the smallest row, [n]: of what is not exact, one for the latent, and one for keys in a basis."""
    widths, R = torch.zeros(len(solution.cost), dtype=torch.int64, device="cpu"), solution.latent_dim
    widths[0] = 1
    if solution.exact_latent:
        widths[:R] = 16
    if solution.pairs is not None:
        widths[R] = 1
    if solution.exact_key:
        widths[R:] = 16
    return widths


def smallest_row(solution: LayerSolution) -> int:
    """Bytes of the smallest row, its gain included."""
    return row_bytes(smallest_widths(solution), solution.latent_dim)


def increments(solution: LayerSolution, relative: torch.Tensor) -> torch.Tensor:
    """Cost saved per bit by each increment, float64 [n, W], never rising from one increment to the next."""
    saved = -relative.diff(dim=1) * solution.cost[:, None]
    per_bit = saved / torch.tensor(STEPS, dtype=torch.float64, device="cpu")
    if solution.exact_latent:  # whose bits are not to be chosen
        per_bit[: solution.latent_dim] = 0
    if solution.exact_key:
        per_bit[solution.latent_dim :] = 0
    return per_bit.cummin(dim=1).values


class _LayerTable:
    """What the bits of one layer save.

    Args:
        solution, distortion: of the layer.
        ratios: of the codec, see `Codec.error_ratios`.
    """

    def __init__(self, solution: LayerSolution, distortion: Distortion, ratios: torch.Tensor) -> None:
        self.latent_dim, self.smallest = solution.latent_dim, smallest_widths(solution)
        self.per_bit = increments(solution, distortion.relative * ratios)
        self.with_key_gain = None
        if distortion.with_key_gain is not None:
            self.with_key_gain = increments(solution, distortion.with_key_gain * ratios)

    @property
    def highest(self) -> float:
        both = [table for table in (self.per_bit, self.with_key_gain) if table is not None]
        return max(float(table.max()) for table in both)

    def above(self, threshold: float) -> Allocation:
        """The increments that save more than `threshold` per bit."""
        plain = Allocation(self._widths(self.per_bit, threshold))
        if self.with_key_gain is None:
            return plain
        gained = Allocation(self._widths(self.with_key_gain, threshold), key_gain=True)
        saves_more = self._saved(self.with_key_gain, threshold) - self._saved(self.per_bit, threshold)
        return gained if saves_more > _GAIN_MARGIN * 8 * threshold else plain

    def _saved(self, per_bit: torch.Tensor, threshold: float) -> float:
        """Cost saved by the increments that save more, beyond what as many bits would save elsewhere."""
        steps = torch.tensor(STEPS, dtype=torch.float64, device="cpu")
        return float(((per_bit[self.latent_dim :] - threshold).clamp(min=0) * steps).sum())

    def _widths(self, per_bit: torch.Tensor, threshold: float) -> torch.Tensor:
        """Widths [n]; latents and keys that get no bit have those of the smallest row."""
        taken = per_bit > threshold
        widths = (taken * torch.tensor(STEPS, dtype=torch.int64, device="cpu")).sum(1)
        for part in (slice(self.latent_dim), slice(self.latent_dim, None)):
            if not widths[part].any():
                widths[part] = self.smallest[part]
        return widths

    def bytes_of(self, allocation: Allocation) -> int:
        """Bytes of a row with these bits."""
        keys = len(allocation.widths) - self.latent_dim
        return row_bytes(allocation.widths, self.latent_dim, keys if allocation.key_gain else 0)


def allocate(
    solutions: Sequence[LayerSolution],
    distortions: Sequence[Distortion],
    budget: float,
    *,
    kind: type[Codec] = RowCodec,
    layers: Sequence[int] | None = None,
) -> list[Allocation]:
    """The bits of every layer's coordinates, within `budget` bytes per row on average.

    Args:
        solutions, distortions: of the layers.
        budget: bytes per row; with `layers` on average over the solutions of each, otherwise over all.
        kind: the codec, which may err less than rounding.
        layers: of which layer each solution is, to give every layer the same bytes instead of letting them compete.

    Raises:
        ConfigError: the budget is less than a row of one bit.
    """
    ratios = kind.error_ratios()
    pairs = zip(solutions, distortions, strict=True)
    tables = [_LayerTable(solution, distortion, ratios) for solution, distortion in pairs]
    if layers is None:
        return _fill(tables, budget)
    found: dict[int, Allocation] = {}
    for layer in dict.fromkeys(layers):
        of_layer = [index for index, one in enumerate(layers) if one == layer]
        found |= zip(of_layer, _fill([tables[index] for index in of_layer], budget), strict=True)
    return [found[index] for index in range(len(tables))]


def _fill(tables: Sequence[_LayerTable], budget: float) -> list[Allocation]:
    def at(threshold: float) -> list[Allocation]:
        return [table.above(threshold) for table in tables]

    def size(found: Sequence[Allocation]) -> float:
        return sum(table.bytes_of(layer) for table, layer in zip(tables, found, strict=True)) / len(found)

    highest = max(table.highest for table in tables)
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
