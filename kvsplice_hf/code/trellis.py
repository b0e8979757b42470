"""`TrellisCodec`: rows whose levels are chosen together, along a trellis, and so lie closer than by rounding.

A coordinate of b bits has 2^(b + 1) levels, in four subsets that alternate: level number v is in subset v % 4. Which
two subsets its bits choose from depends on the bits of the coordinates before it, by a convolutional code, so that a
writer that looks ahead (Viterbi) finds a closer row than one that rounds each coordinate by itself (Marcellin and
Fischer, Trellis coded quantization of memoryless and Gauss-Markov sources, 1990; the code is Ungerboeck's of 64
states). Reading stays parallel. With `u_i` the lowest bit of the code of column i (`layout`), its level is number

    4 * (code_i >> 1) + 2 * (u_i ^ u_(i-1) ^ u_(i-6)) + (u_(i-2) ^ u_(i-4))

where columns ahead of the first count as 0. The count begins anew behind the columns that share the gain, so that the
code of a key does not depend on that of its latent. Columns of 8 bits are rounded by themselves, as `RowCodec` does,
and are left out of the count. Bytes of a row, gains, scales and centres are those of `RowCodec`.

Legend: `T` rows, `n` coordinates, `c` columns of a trellis, `m` columns, `S` = 64 states.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from kvsplice_hf.code.codec import RowCodec
from kvsplice_hf.code.codecs import register_codec
from kvsplice_hf.code.levels import GRIDS, Grid
from kvsplice_hf.config import TRELLIS_CODEC
from kvsplice_hf.errors import ConfigError


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
_UNIT_ERRORS = (1.15e-1, 2.07e-2, 3.39e-3, 6.91e-4, 1.33e-4, 3.1e-5, 6.7e-6)
# What is not a number, or far out, must not spoil the sums of the search.
FARTHEST = 1e6
# Tables are as long as a multiple of this.
_COLUMNS_READ = 64
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
    """What the search needs of each column of the trellis, and of up to 63 behind the last one: all [>= c].

    Attributes:
        reaches, slopes, starts: `sinh(slope * number + start) / reach` is the level of that number, float32.
        weights: of squared errors in units of the scale, float32.
        widths: uint8.
        first_level: where its levels are in `levels`, int64.
        levels: of all grids, float32.
    """

    reaches: torch.Tensor
    slopes: torch.Tensor
    starts: torch.Tensor
    weights: torch.Tensor
    widths: torch.Tensor
    first_level: torch.Tensor
    levels: torch.Tensor

    def of_columns(self, count: int) -> "TrellisTables":
        """Without what is behind the last column."""
        return TrellisTables._make([*(table[:count] for table in self[:-1]), self.levels])


def closest_codes(unit: torch.Tensor, tables: TrellisTables) -> torch.Tensor:
    """The codes of the closest rows that the trellis has, uint8 [T, c].

    Args:
        unit: coordinates over their scales, float32 [T, c].
        tables: of the columns.
    """
    tables = tables.of_columns(unit.shape[1])
    parts = unit.nan_to_num(nan=-1.0).clamp(-FARTHEST, FARTHEST).split(_AT_ONCE)
    return torch.cat([_closest(part, tables) for part in parts])


def _closest(unit: torch.Tensor, tables: TrellisTables) -> torch.Tensor:
    numbers, errors = _nearest(unit, tables)
    states, subsets = _search(errors)
    chosen = numbers.gather(2, subsets[..., None])[..., 0]
    return (((chosen >> 2) << 1) | (states & 1)).to(torch.uint8)


def squared_error(unit: torch.Tensor, codes: torch.Tensor, tables: TrellisTables) -> torch.Tensor:
    """What the search makes small: the weighted squared errors of codes uint8 [T, c] of rows [T, c], float32 [T]."""
    tables = tables.of_columns(unit.shape[1])
    levels = tables.levels[level_numbers(codes, 1).long() + tables.first_level]
    return (tables.weights * (unit - levels).square()).sum(1)


def _nearest(unit: torch.Tensor, tables: TrellisTables) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each of the four subsets the nearest level to each number [T, c]: its number, and its error, [T, c, 4]."""
    place = ((torch.asinh(unit * tables.reaches) - tables.starts) / tables.slopes)[..., None]
    subset = torch.arange(4, dtype=torch.int64, device=unit.device)
    last = (2 ** (tables.widths.long() - 1) - 1)[:, None]
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


# What `quantise` calls: backends offer faster ones (`attend.choice`).
_fastest: Callable[[torch.Tensor, TrellisTables], torch.Tensor] = closest_codes


def search_by(search: Callable[[torch.Tensor, TrellisTables], torch.Tensor]) -> None:
    """Let rows be searched by something that gives what `closest_codes` gives."""
    global _fastest
    _fastest = search


def _searched(unit: torch.Tensor, tables: TrellisTables) -> torch.Tensor:
    if torch.compiler.is_compiling():  # which would unroll the loop over columns
        return torch.ops.kvsplice_hf.closest_codes(unit, *tables)
    return _fastest(unit, tables)


@functools.cache
def _register_operator() -> None:
    """Make the search one operator for compilers. Not at import, which registers nothing."""

    def search(  # noqa: PLR0917
        unit: torch.Tensor,
        reaches: torch.Tensor,
        slopes: torch.Tensor,
        starts: torch.Tensor,
        weights: torch.Tensor,
        widths: torch.Tensor,
        first_level: torch.Tensor,
        levels: torch.Tensor,
    ) -> torch.Tensor:
        return _fastest(unit, TrellisTables(reaches, slopes, starts, weights, widths, first_level, levels))

    def shaped(unit: torch.Tensor, *tables: torch.Tensor) -> torch.Tensor:
        return unit.new_empty(unit.shape, dtype=torch.uint8)

    operator = torch.library.custom_op("kvsplice_hf::closest_codes", search, mutates_args=())
    operator.register_fake(shaped)


@register_codec
class TrellisCodec(RowCodec):
    """Packs rows as `RowCodec` does, into as many bytes, of levels that are chosen along a trellis.

    Its arguments are those of `RowCodec`. The mean squared error of Gaussian coordinates is 0.81, 0.69, 0.66 and 0.64
    of that of `RowCodec` at 1, 2, 3 and 4 bits.

    Examples:
        >>> codec = TrellisCodec(torch.tensor([4, 4, 3, 0]), torch.ones(4), torch.zeros(4), torch.ones(2))
        >>> codec.pack(torch.randn(2, 1, 7, 4)).shape
        torch.Size([2, 1, 7, 4])
    """

    kind = TRELLIS_CODEC
    grids = TRELLIS_GRIDS

    in_chain: torch.Tensor
    _chain_numbers: torch.Tensor

    def _add_tables(self) -> None:
        _register_operator()
        super()._add_tables()
        coded = self.column_index[: len(self.column_slopes)]
        chain = (self.widths[coded] <= LARGEST_WIDTH).nonzero()[:, 0]
        # Which columns are columns of a trellis, in their order, and which coordinates these are, int64 [c].
        self.register_buffer("in_chain", chain, persistent=False)
        self.register_buffer("_chain_numbers", coded[chain], persistent=False)
        first = int((chain < self.gained_columns).sum())
        self.chains = [slice(0, first), slice(first, len(chain))]
        tables = [self._tables_of(chain[part], coded[chain[part]]) for part in self.chains]
        self._chain_places = [slice(0, len(tables[0].widths)), slice(len(tables[0].widths), None)]
        for name, *parts in zip(TrellisTables._fields[:-1], *(table[:-1] for table in tables), strict=True):
            self.register_buffer(f"chain_{name}", torch.cat(parts), persistent=False)

    def __setstate__(self, state: dict[str, Any]) -> None:
        _register_operator()  # a copy may be in another process
        super().__setstate__(state)

    def _tables_of(self, columns: torch.Tensor, numbers: torch.Tensor) -> TrellisTables:
        """What the search needs of these columns, which are these coordinates."""
        # A coordinate's bits were allotted so that its error costs as much as those of others: so errors count by what
        # is expected of their width.
        weights = [1 / error for error in (*_UNIT_ERRORS, 1.0)]
        tables = (
            self.column_reaches[columns],
            self.column_slopes[columns],
            self.column_starts[columns],
            self._of_widths(weights, self.widths.long()[numbers]),
            self.widths[numbers],
            self._first_level[numbers],
        )
        more = -len(columns) % _COLUMNS_READ  # because C++ reads whole vectors
        return TrellisTables._make([*(torch.cat([table, table.new_ones(more)]) for table in tables), self._levels])

    @classmethod
    def error_ratios(cls) -> torch.Tensor:
        plain = torch.ones(1, dtype=torch.float64, device="cpu")
        return torch.cat([plain, torch.tensor(_ERROR_RATIOS, dtype=torch.float64, device="cpu"), plain])

    def level_numbers(self, codes: torch.Tensor, start: int = 0) -> torch.Tensor:
        numbers = codes.clone()
        for part in self.chains[1:] if start else self.chains:
            chain = self._chain_numbers[part]
            numbers[..., chain] = level_numbers(codes[..., chain], codes.dim() - 1)
        return numbers

    def _numbers_of_lines(self, lines: torch.Tensor) -> torch.Tensor:
        if len(self.in_chain) == lines.shape[1]:  # without gathering them
            return torch.cat([level_numbers(lines[:, part], 1) for part in self.chains], dim=1)
        for part in self.chains:
            chain = self.in_chain[part]
            lines[:, chain] = level_numbers(lines[:, chain], 1)
        return lines

    def behind(self, numbers: torch.Tensor, start: int) -> torch.Tensor:
        if start != len(self.sigmas):
            raise ConfigError(
                f"The numbers from {start} on are asked for alone, and {len(self.sigmas)} share a gain: along a "
                "trellis, those behind these come back by themselves. Calibrate again."
            )
        return super().behind(numbers, start)

    def quantise(self, rows: torch.Tensor, gains: torch.Tensor, start: int = 0) -> torch.Tensor:
        if len(self.in_chain) == len(self.column_reaches):
            codes = torch.zeros(rows.shape, dtype=torch.uint8, device=rows.device)
        else:  # of the columns that are not in a trellis
            codes = super().quantise(rows, gains, start)
        unit = self._in_units(rows, gains, start)
        asked = self.chains[1:] if start else self.chains
        for chain, part in enumerate(asked, start=len(self.chains) - len(asked)):
            numbers = self._chain_numbers[part]
            if len(numbers) and codes.numel():
                of_chain = unit[..., numbers - start]
                found = _searched(of_chain.reshape(-1, len(numbers)), self.trellis_tables(chain))
                codes[..., numbers] = found.view(of_chain.shape)
        return codes

    def trellis_tables(self, chain: int) -> TrellisTables:
        """What the search needs of one of `chains`: of the columns that share the gain, or of those behind."""
        part = self._chain_places[chain]
        held = [getattr(self, f"chain_{name}")[part] for name in TrellisTables._fields[:-1]]
        return TrellisTables._make([*held, self._levels])
