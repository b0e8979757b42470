"""Trellis-coded quantisation, simulated: what rows would lose if their levels were chosen along a trellis.

A coordinate of b bits has twice as many levels as its bits can name, in four subsets that alternate. Which two subsets
its bits choose from depends on the bits of the coordinates before it, by a convolutional code, so that an encoder that
looks ahead (Viterbi) finds a closer row than rounding does (Marcellin and Fischer, Trellis coded quantization of
memoryless and Gauss-Markov sources, 1990; the code is Ungerboeck's). The decoder stays parallel: with `u_i` the lowest
bit of coordinate i, its level is number `4 * upper_i + 2 * (u_i ^ u_(i-1) ^ u_(i-3)) + u_(i-2)` of the larger grid.

Nothing is packed here: it is for measuring what such rows would lose.

Legend: `T` rows, `n` coordinates, `S` = 8 states.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch


class Grid(NamedTuple):
    """The larger grid of a width, fitted to Gaussian coordinates.

    Attributes:
        bend: see `kvsplice_hf.code.levels`.
        scale: largest level over that of the grid that coordinates are rounded to.
        ratio: mean squared error over that of rounding.
    """

    bend: float
    scale: float
    ratio: float


# By a search over bends and scales, 160 rows of 256 coordinates. Beyond 6 bits as at 6.
GRIDS = {
    1: Grid(1.6, 1.19, 0.862),
    2: Grid(1.6, 1.15, 0.737),
    3: Grid(2.1, 1.12, 0.690),
    4: Grid(2.2, 1.0, 0.680),
    5: Grid(2.3, 1.0, 0.678),
    6: Grid(2.5, 1.0, 0.668),
    7: Grid(2.6, 1.0, 0.668),
    8: Grid(2.7, 1.0, 0.668),
}
_MEMORY = 3  # bits of the state: the lowest bits of so many coordinates before, the latest first


def trellis_levels(width: int) -> torch.Tensor:
    """The 2^(width + 1) levels for coordinates that are rounded to levels within (-1, 1), ascending, float32."""
    bend, scale, _ = GRIDS[width]
    grid = (2 * torch.arange(2 ** (width + 1), dtype=torch.float64, device="cpu") + 1) / 2 ** (width + 1) - 1
    return (scale * torch.sinh(bend * grid) / math.sinh(bend)).float()


def trellis_rounded(unit: torch.Tensor, widths: Sequence[int], weight: torch.Tensor) -> torch.Tensor:
    """The closest rows that the code has.

    Args:
        unit: rows [T, n], in units of what `trellis_levels` are within.
        widths: of the coordinates, 1 to 8, n of them.
        weight: of their squared errors, [n].

    Returns:
        Levels, [T, n].
    """
    before, subset = _steps()
    count, n = unit.shape
    levels = {width: trellis_levels(width).to(unit.device) for width in set(widths)}
    cost = torch.full((count, 2**_MEMORY), torch.inf, dtype=torch.float32, device=unit.device)
    cost[:, 0] = 0
    choices, nearest = [], []
    for i in range(n):
        found = _nearest(unit[:, i], levels[widths[i]])
        error = weight[i] * (found - unit[:, i, None]).square()
        first, second = (cost[:, before[:, way]] + error[:, subset[:, way]] for way in (0, 1))
        choices.append(second < first)
        nearest.append(found)
        cost = torch.minimum(first, second)
    state = cost.argmin(1)
    rounded = torch.empty_like(unit)
    for i in reversed(range(n)):
        way = choices[i].gather(1, state[:, None])[:, 0].long()
        rounded[:, i] = nearest[i].gather(1, subset[state, way][:, None])[:, 0]
        state = before[state, way]
    return rounded


def _nearest(numbers: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """The nearest level of each of the four subsets to numbers [T]: [T, 4]."""
    numbers = numbers.contiguous()
    subsets = (levels[first::4].contiguous() for first in range(4))
    return torch.stack([part[torch.bucketize(numbers, (part[1:] + part[:-1]) / 2)] for part in subsets], dim=1)


def _steps() -> tuple[torch.Tensor, torch.Tensor]:
    """By state and way: the state before, and the subset that the step took, int64 [S, 2] each."""
    size = 2**_MEMORY
    before: list[list[int]] = [[] for _ in range(size)]
    subset: list[list[int]] = [[] for _ in range(size)]
    for state in range(size):
        bits = [state >> k & 1 for k in range(_MEMORY)]
        for bit in (0, 1):
            after = (2 * state + bit) % size
            before[after].append(state)
            subset[after].append(2 * (bit ^ bits[0] ^ bits[2]) + bits[1])
    return tuple(torch.tensor(table, dtype=torch.int64, device="cpu") for table in (before, subset))  # type: ignore[return-value]
