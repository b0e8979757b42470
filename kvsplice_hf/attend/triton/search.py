"""The search of `TrellisCodec` inside a kernel (Viterbi): which codes make the closest rows that the trellis has.

A program takes its rows through three steps, each of which finds in memory what the one before it left there:

    nearest levels   of each column and each of the four subsets, and their errors: any order of columns
    paths            the least error up to each state, and from where it came: column by column
    codes            back along the path of least error: column by column

The last two go through the chains of columns one after the other, since the trellis begins anew with each.

State 2 q + b, with b the lowest bit of the last code, is reached from states q and 32 + q alone. These two choose
opposite subsets, and so do the bits 0 and 1: four paths of two different errors end in two states (a butterfly).

Legend: as in `packing`, and `c` columns of the trellis, from `begin` to `end` those of a chain, 64 states,
G = ceil(c / 32).
"""
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from kvsplice_hf.attend.triton.scaling import asinh, scaled
from kvsplice_hf.code.trellis import FARTHEST as _FARTHEST
from kvsplice_hf.code.trellis import STATES as _STATES


STATES = tl.constexpr(_STATES)
HALF = tl.constexpr(_STATES // 2)
# Columns whose ways are kept in the bits of one number.
WORD = tl.constexpr(32)
FARTHEST = tl.constexpr(_FARTHEST)


@triton.jit
def _nearest(unit, subset: tl.constexpr, place, last, first_level, weight, levels):
    """The nearest level of a subset to each number [BLOCK_R, D]: which one it is, int32, and its error, float32."""
    below = tl.floor((place - subset) * 0.25).to(tl.int32)
    low = 4 * tl.minimum(tl.maximum(below, 0), last) + subset
    high = 4 * tl.minimum(tl.maximum(below + 1, 0), last) + subset
    off_low = unit - tl.load(levels + first_level + low)
    off_high = unit - tl.load(levels + first_level + high)
    low_error, high_error = weight * (off_low * off_low), weight * (off_high * off_high)
    nearer = high_error < low_error
    return tl.where(nearer, high, low), tl.where(nearer, high_error, low_error)


@triton.jit
def nearest_levels(
    base, held, row, columns, steps, trellis, scratch, size, HAS_KEY_GAIN: tl.constexpr, BLOCK: tl.constexpr
):
    """Write the nearest levels of all subsets uint8 [BLOCK_R, c, 4] and their errors float32 [BLOCK_R, c, 4].

    With `steps`, those that `scaled` takes, rows are numbers, and the trellis is the coordinates `columns` of them;
    without they are its columns, over their scales.
    """
    reaches, slopes, starts, weights, widths, first_levels, levels = trellis
    errors, numbers, _, _ = scratch
    for first in range(0, size, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < size
        mine = held[:, None] & inside[None, :]
        if steps is None:
            unit = tl.load(base[:, None] + at[None, :], mask=mine, other=0.0)
        else:
            coordinates = tl.load(columns + at, mask=inside, other=0)
            unit = scaled(base, mine, coordinates, steps[0], steps[1], steps[2], HAS_KEY_GAIN)
        unit = tl.where(unit == unit, unit, -1.0)
        unit = tl.minimum(tl.maximum(unit, -FARTHEST), FARTHEST)
        reach = tl.load(reaches + at, mask=inside, other=1.0)[None, :]
        start = tl.load(starts + at, mask=inside, other=0.0)[None, :]
        slope = tl.broadcast_to(tl.load(slopes + at, mask=inside, other=1.0)[None, :], unit.shape)
        place = tl.div_rn(asinh(unit * reach) - start, slope)
        # Of 2^(width + 1) levels in four subsets.
        last = (1 << (tl.load(widths + at, mask=inside, other=1).to(tl.int32) - 1))[None, :] - 1
        first_level = tl.load(first_levels + at, mask=inside, other=0).to(tl.int32)[None, :]
        weight = tl.load(weights + at, mask=inside, other=0.0)[None, :]
        out = 4 * (row.to(tl.int64)[:, None] * size + at[None, :])
        for subset in tl.static_range(4):
            number, error = _nearest(unit, subset, place, last, first_level, weight, levels)
            tl.store(numbers + out + subset, number.to(tl.uint8), mask=mine)
            tl.store(errors + out + subset, error, mask=mine)


@triton.jit
def _subset(register):
    """The subset that the lowest bits of the last codes choose: bit k of `register` is that of k columns before."""
    opposite = (register ^ (register >> 1) ^ (register >> 6)) & 1
    beside = ((register >> 2) ^ (register >> 4)) & 1
    return 2 * opposite + beside


@triton.jit
def least_paths(held, row, scratch, size, begin, end):
    """The last state of the path of least error through a chain, int32 [BLOCK_R].

    Writes where the best path to each state came from, a bit per column, int32 [BLOCK_R, G, 2, 32]: that of column
    32 g + k of the chain is bit k, and that of state 2 q + b is at [g, b, q].
    """
    errors, _, ways, _ = scratch
    state = tl.arange(0, STATES)
    behind = tl.arange(0, HALF)
    mine = held[:, None] & (behind >= 0)[None, :]
    rows = row.to(tl.int64)[:, None]
    first_error = errors + 4 * (rows * size + begin)
    same = first_error + _subset(2 * behind)[None, :]
    other = first_error + (_subset(2 * behind) ^ 2)[None, :]
    out = ways + rows * (tl.cdiv(size, WORD) * STATES) + behind[None, :]
    cost = tl.where((state == 0)[None, :] & (row >= 0)[:, None], 0.0, float("inf"))
    # Errors are read a column ahead: they do not have to wait for the costs.
    columns = end - begin
    same_error = tl.load(same, mask=mine & (columns > 0), other=0.0)
    other_error = tl.load(other, mask=mine & (columns > 0), other=0.0)
    for first in range(0, columns, WORD):
        from_high0 = tl.zeros([held.shape[0], HALF], tl.int32)
        from_high1 = tl.zeros([held.shape[0], HALF], tl.int32)
        for column in range(first, tl.minimum(first + WORD, columns)):
            ahead = mine & (column + 1 < columns)
            next_same = tl.load(same + 4 * (column + 1), mask=ahead, other=0.0)
            next_other = tl.load(other + 4 * (column + 1), mask=ahead, other=0.0)
            halves = tl.permute(tl.reshape(cost, [held.shape[0], 2, HALF]), (0, 2, 1))
            low, high = tl.split(halves)
            low0, high0 = low + same_error, high + other_error
            low1, high1 = low + other_error, high + same_error
            from_high0 |= (high0 < low0).to(tl.int32) << (column - first)
            from_high1 |= (high1 < low1).to(tl.int32) << (column - first)
            joined = tl.join(tl.minimum(low0, high0), tl.minimum(low1, high1))
            cost = tl.reshape(joined, [held.shape[0], STATES])
            same_error, other_error = next_same, next_other
        tl.store(out, from_high0, mask=mine)
        tl.store(out + HALF, from_high1, mask=mine)
        out += STATES
    return tl.argmin(cost, 1)


@triton.jit
def write_codes(held, row, state, columns, scratch, size, begin, end, n):
    """Write the codes uint8 [BLOCK_R, n] of a chain of columns, or of coordinates `columns`, on paths to `state`."""
    _, numbers, ways, codes = scratch
    rows = row.to(tl.int64)
    words = ways + rows * (tl.cdiv(size, WORD) * STATES)
    for back in range(0, end - begin):
        column = end - 1 - back
        bit, step = state & 1, column - begin
        word = tl.load(words + step // WORD * STATES + bit * HALF + (state >> 1), mask=held, other=0)
        before = (state >> 1) + HALF * ((word >> (step % WORD)) & 1)
        subset = _subset(2 * before + bit)
        number = tl.load(numbers + 4 * (rows * size + column) + subset, mask=held, other=0).to(tl.int32)
        code = ((number >> 2) << 1) | bit
        place = column
        if columns is not None:
            place = tl.load(columns + column)
        tl.store(codes + rows * n + place, code.to(tl.uint8), mask=held)
        state = before


@triton.jit
def search(
    base, held, row, columns, steps, trellis, scratch, sizes, n, HAS_KEY_GAIN: tl.constexpr, BLOCK: tl.constexpr
):
    """Write the codes uint8 [BLOCK_R, n] of some rows; arguments as in `nearest_levels`.

    `sizes` are those of the chains that the columns are, one behind the other; any may be 0.
    """
    size = sizes[0] + sizes[1]
    nearest_levels(base, held, row, columns, steps, trellis, scratch, size, HAS_KEY_GAIN, BLOCK)
    for chain in range(0, 2):
        begin, end = chain * sizes[0], sizes[0] + chain * sizes[1]
        tl.debug_barrier()  # what follows reads what other threads wrote, and writes where they have read
        state = least_paths(held, row, scratch, size, begin, end)
        tl.debug_barrier()
        write_codes(held, row, state, columns, scratch, size, begin, end, n)


@triton.jit(do_not_specialize=["count"])
def search_kernel(
    unit,
    count,
    size,
    reaches,
    slopes,
    starts,
    weights,
    widths,
    first_levels,
    levels,
    errors,
    numbers,
    ways,
    codes,
    BLOCK_R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The codes uint8 [count, c] of rows that are over their scales, float32 [count, c]; BLOCK_R rows per program."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    trellis = (reaches, slopes, starts, weights, widths, first_levels, levels)
    scratch = (errors, numbers, ways, codes)
    base = unit + row.to(tl.int64) * size
    search(base, row < count, row, None, None, trellis, scratch, (size, 0), size, False, BLOCK)
