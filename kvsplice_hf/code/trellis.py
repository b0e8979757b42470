"""`TrellisCodec`: rows whose levels are chosen together, along a trellis, and so lie closer than by rounding.

A coordinate of b bits has 2^(b + 1) levels, in four subsets that alternate: level number v is in subset v % 4. Which
two subsets its bits choose from depends on the bits of the coordinates before it, by a convolutional code, so that a
writer that looks ahead (Viterbi) finds a closer row than one that rounds each coordinate by itself (Marcellin and
Fischer, Trellis coded quantization of memoryless and Gauss-Markov sources, 1990; the code is Ungerboeck's of 64
states). Reading stays parallel. With `u_i` the lowest bit of the code of column i (`layout`), its level is number

    4 * (code_i >> 1) + 2 * (u_i ^ u_(i-1) ^ u_(i-6)) + (u_(i-2) ^ u_(i-4))

where columns ahead of the first count as 0. Columns of 8 bits are rounded by themselves, as `RowCodec` does, and are
left out of the count. Bytes of a row, gains, scales and centres are those of `RowCodec`.

Legend: `T` rows, `n` coordinates, `c` columns of the trellis, `m` columns, `S` = 64 states.
"""

import functools
from typing import NamedTuple

import torch

from kvsplice_hf.code.codec import RowCodec
from kvsplice_hf.code.codecs import register_codec
from kvsplice_hf.code.levels import GRIDS, Grid
from kvsplice_hf.config import TRELLIS_CODEC


# The widths of columns that take part: the level numbers of wider ones would not fit into a byte.
LARGEST_WIDTH = 7
# How far back the columns are whose lowest bit turns a subset into its opposite, or into the one beside it.
OPPOSITE, BESIDE = (1, 6), (2, 4)
MEMORY = 6
STATES = 2**MEMORY
# By a search over bends and scales, 160 rows of 256 Gaussian coordinates whose scale is the best for rounding.
TRELLIS_GRIDS = {
    1: Grid(2, 1.6, 1.19),
    2: Grid(3, 1.9, 1.21),
    3: Grid(4, 2.15, 1.09),
    4: Grid(5, 2.45, 1.09),
    5: Grid(6, 2.6, 1.06),
    6: Grid(7, 2.6, 1.03),
    7: Grid(8, 2.6, 1.0),
    8: GRIDS[8],
}
# Of the same rows, by width: the mean squared error over that of rounding, and in units of the squared scale.
_ERROR_RATIOS = (0.806, 0.694, 0.656, 0.637, 0.621, 0.612, 0.604, 1.0)
_UNIT_ERRORS = (0.114533, 0.020664, 0.003393, 0.000691, 0.000145, 0.000031, 0.000007)
# What is not a number, or far out, must not spoil the sums of the search.
_FARTHEST = 1e6
# Rows that are searched at once: what this takes in passing should not fill the memory.
_AT_ONCE = 512


def level_numbers(codes: torch.Tensor, dim: int) -> torch.Tensor:
    """Which level of its grid each column is on, uint8 in the shape of the codes.

    Args:
        codes: uint8, all columns of the trellis in their order along `dim`.
        dim: from the first dimension on.
    """
    lowest, count = codes & 1, codes.shape[dim]
    opposite, beside = lowest.clone(), torch.zeros_like(lowest)
    for bit, lags in ((opposite, OPPOSITE), (beside, BESIDE)):
        for lag in lags:
            if lag < count:
                bit.narrow(dim, lag, count - lag).bitwise_xor_(lowest.narrow(dim, 0, count - lag))
    return ((codes >> 1) << 2) | (opposite << 1) | beside


class TrellisTables(NamedTuple):
    """What the search needs of each column of the trellis; all [c].

    Attributes:
        bends, reaches: see `Grid`.
        bits: of the grid, int64.
        first_level: where its levels are in `levels`.
        weights: of squared errors in units of the scale.
        levels: of all grids.
    """

    bends: torch.Tensor
    reaches: torch.Tensor
    bits: torch.Tensor
    first_level: torch.Tensor
    weights: torch.Tensor
    levels: torch.Tensor


def closest_codes(unit: torch.Tensor, tables: TrellisTables) -> torch.Tensor:
    """The codes of the closest rows that the trellis has, uint8 [T, c].

    Args:
        unit: coordinates over their scales, float32 [T, c].
        tables: of the columns.
    """
    numbers, errors = _nearest(unit.nan_to_num(nan=-1.0).clamp(-_FARTHEST, _FARTHEST), tables)
    states, subsets = _search(errors)
    chosen = numbers.gather(2, subsets[..., None])[..., 0]
    return (((chosen >> 2) << 1) | (states & 1)).to(torch.uint8)


def _nearest(unit: torch.Tensor, tables: TrellisTables) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each of the four subsets the nearest level to each number [T, c]: its number, and its error, [T, c, 4]."""
    grid = torch.asinh(unit * tables.reaches) / tables.bends
    place = ((grid + 1) * (2.0 ** (tables.bits - 1)) - 0.5)[..., None]
    subset = torch.arange(4, dtype=torch.int64, device=unit.device)
    last = (2 ** (tables.bits - 2) - 1)[:, None]
    below = ((place - subset) / 4).floor().long()
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for upper in (below, below + 1):
        number = 4 * torch.minimum(upper.clamp(min=0), last) + subset
        level = tables.levels[number + tables.first_level[:, None]]
        found.append((number, tables.weights[:, None] * (unit[..., None] - level).square()))
    (low, low_error), (high, high_error) = found
    nearer = high_error < low_error
    return torch.where(nearer, high, low), torch.where(nearer, high_error, low_error)


def _search(errors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The path of least error (Viterbi): the states after each column, and the subsets of its levels, int64 [T, c]."""
    count, columns, _ = errors.shape
    subset = _subsets(errors.device)
    cost = torch.full((count, STATES), torch.inf, dtype=torch.float32, device=errors.device)
    cost[:, 0] = 0
    from_high = torch.empty(columns, count, STATES, dtype=torch.bool, device=errors.device)
    for column in range(columns):
        # A state and a bit lead to state (2 * state + bit) % S: two states, half of S apart, to the same.
        taken = cost[:, :, None] + errors[:, column, subset]
        low, high = taken.view(count, 2, STATES).unbind(1)
        torch.lt(high, low, out=from_high[column])
        cost = torch.minimum(low, high)
    states = torch.empty(columns, count, dtype=torch.int64, device=errors.device)
    before = torch.empty_like(states)
    state = cost.argmin(1)
    for column in reversed(range(columns)):
        way = from_high[column].gather(1, state[:, None])[:, 0]
        states[column], state = state, (state >> 1) + way * (STATES // 2)
        before[column] = state
    return states.T, subset[before, states & 1].T


@functools.cache
def _subsets(device: torch.device) -> torch.Tensor:
    """The subset that a state and a bit choose, int64 [S, 2]."""
    with torch.inference_mode(False):
        register = torch.arange(2 * STATES, dtype=torch.int64, device=device)  # bit k is the lowest of k columns before
        opposite, beside = register & 1, torch.zeros_like(register)
        for lag in OPPOSITE:
            opposite = opposite ^ (register >> lag & 1)
        for lag in BESIDE:
            beside = beside ^ (register >> lag & 1)
        return (2 * opposite + beside).view(STATES, 2)


@register_codec
class TrellisCodec(RowCodec):
    """Packs rows as `RowCodec` does, into as many bytes, of levels that are chosen along a trellis.

    Its arguments are those of `RowCodec`. The mean squared error of Gaussian coordinates is 0.81, 0.69, 0.66 and 0.64
    of that of `RowCodec` at 1, 2, 3 and 4 bits.

    Examples:
        >>> codec = TrellisCodec(torch.tensor([4, 4, 3, 0]), torch.ones(4), torch.zeros(4), torch.ones(2))
        >>> codec.pack(torch.randn(2, 1, 7, 4)).shape
        torch.Size([2, 1, 7, 3])
    """

    kind = TRELLIS_CODEC
    grids = TRELLIS_GRIDS

    _chain: torch.Tensor
    _chain_numbers: torch.Tensor
    chain_weights: torch.Tensor

    def _add_tables(self) -> None:
        super()._add_tables()
        coded = self.column_index[: len(self.column_slopes)]
        of_columns = self.widths.long()[coded]
        chain = (of_columns <= LARGEST_WIDTH).nonzero()[:, 0]
        self.register_buffer("_chain", chain, persistent=False)
        self.register_buffer("_chain_numbers", coded[chain], persistent=False)
        # A coordinate's bits were allotted so that its error costs as much as those of others: so errors count by what
        # is expected of their width.
        weights = self._of_widths([1 / error for error in (*_UNIT_ERRORS, 1.0)], of_columns)
        self.register_buffer("chain_weights", weights, persistent=False)

    @classmethod
    def error_ratios(cls) -> torch.Tensor:
        plain = torch.ones(1, dtype=torch.float64, device="cpu")
        return torch.cat([plain, torch.tensor(_ERROR_RATIOS, dtype=torch.float64, device="cpu"), plain])

    @property
    def in_chain(self) -> torch.Tensor:
        """Which columns are columns of the trellis, in their order, int64 [c]."""
        return self._chain

    def level_numbers(self, codes: torch.Tensor) -> torch.Tensor:
        numbers = codes.clone()
        numbers[..., self._chain_numbers] = level_numbers(codes[..., self._chain_numbers], codes.dim() - 1)
        return numbers

    def _numbers_of_lines(self, lines: torch.Tensor) -> torch.Tensor:
        if len(self._chain) == lines.shape[1]:
            return level_numbers(lines, 1)
        lines[:, self._chain] = level_numbers(lines[:, self._chain], 1)
        return lines

    def quantise(self, rows: torch.Tensor, gains: torch.Tensor) -> torch.Tensor:
        codes = super().quantise(rows, gains)  # of the columns that are not in the trellis
        if len(self._chain) == 0:
            return codes
        unit = ((rows.float() - self.centres) / self._row_scales(gains))[..., self._chain_numbers]
        parts = unit.flatten(0, -2).split(_AT_ONCE)
        tables = self._trellis_tables()
        found = [closest_codes(part, tables) for part in parts] or [codes.new_empty(0, len(self._chain))]
        codes[..., self._chain_numbers] = torch.cat(found).view(*codes.shape[:-1], -1)
        return codes

    def _trellis_tables(self) -> TrellisTables:
        widths = self.widths.long()[self._chain_numbers]
        return TrellisTables(
            bends=self._bends[self._chain_numbers],
            reaches=self.column_reaches[self._chain],
            bits=widths + 1,
            first_level=self._first_level[self._chain_numbers],
            weights=self.chain_weights[self._chain],
            levels=self._levels,
        )
