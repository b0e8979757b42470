"""Reading of packed rows inside a kernel: bit fields put together to codes, and codes looked up as units.

Legend: as in `attention`.
"""
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from kvsplice_hf.attend.triton.tables import (
    BESIDE2,
    BESIDE4,
    FIRST_LEVEL,
    IN_PLANE1,
    IN_PLANE2,
    IN_PLANE4,
    IN_PLANE8,
    OPPOSITE1,
    OPPOSITE6,
    RAW,
    WIDTH,
)


@triton.jit
def of_layout(layout, entry: tl.constexpr, coordinates, n):
    """An entry of the layout table, [D]; 0 past the row."""
    return tl.load(layout + entry * n + coordinates, mask=coordinates < n, other=0)


@triton.jit
def _field(base, held, coordinates, n, layout, width, FIELD: tl.constexpr, entry: tl.constexpr):
    """The bits [BLOCK_S, D] that the plane of `FIELD`-bit fields holds of each code, at their place in it."""
    place = of_layout(layout, entry, coordinates, n)
    has_one = held[:, None] & ((width & FIELD) != 0)[None, :]
    byte = tl.load(base[:, None] + (place >> 3)[None, :], mask=has_one, other=0).to(tl.int32)
    bits = (byte >> (place & 7)[None, :]) & (2**FIELD - 1)
    # The larger fields of a code come first, in its lower bits.
    return bits << (width & ~(2 * FIELD - 1))[None, :]


@triton.jit
def _neighbour(base, held, coordinates, n, layout, chained, entry: tl.constexpr):
    """The lowest bits [BLOCK_S, D] of the codes of columns before these, as the lowest of several bits."""
    place = of_layout(layout, entry, coordinates, n)
    has_one = held[:, None] & (chained & (place >= 0))[None, :]
    return tl.load(base[:, None] + (place >> 3)[None, :], mask=has_one, other=0).to(tl.int32) >> (place & 7)[None, :]


@triton.jit
def _level_numbers(base, held, coordinates, n, layout, width, code):
    """The levels [BLOCK_S, D] that codes stand for where they are columns of a trellis; see `code.trellis`."""
    chained = (width > 0) & (width < 8)
    opposite = code ^ _neighbour(base, held, coordinates, n, layout, chained, OPPOSITE1)
    opposite ^= _neighbour(base, held, coordinates, n, layout, chained, OPPOSITE6)
    beside = _neighbour(base, held, coordinates, n, layout, chained, BESIDE2)
    beside ^= _neighbour(base, held, coordinates, n, layout, chained, BESIDE4)
    number = ((code >> 1) << 2) | ((opposite & 1) << 1) | (beside & 1)
    return tl.where(chained[None, :], number, code)


@triton.jit
def units(base, held, coordinates, n, gains, layout, levels, PLANES: tl.constexpr, HAS_SECOND_GAIN: tl.constexpr):
    """Packed rows without their scales and centres, float32 [BLOCK_S, D].

    `gains` are how many coordinates share a gain, that gain of each row, up to where the next share a second one, and
    that one.
    """
    gained, gain, last, second_gain = gains
    stored = of_layout(layout, WIDTH, coordinates, n)
    width = tl.where(stored == 16, 0, stored)
    code = tl.zeros([held.shape[0], coordinates.shape[0]], tl.int32)
    if PLANES & 8:
        code += _field(base, held, coordinates, n, layout, width, 8, IN_PLANE8)
    if PLANES & 4:
        code += _field(base, held, coordinates, n, layout, width, 4, IN_PLANE4)
    if PLANES & 2:
        code += _field(base, held, coordinates, n, layout, width, 2, IN_PLANE2)
    if PLANES & 1:
        code += _field(base, held, coordinates, n, layout, width, 1, IN_PLANE1)
    if PLANES & 32:
        code = _level_numbers(base, held, coordinates, n, layout, width, code)
    unit = tl.load(levels + of_layout(layout, FIRST_LEVEL, coordinates, n)[None, :] + code)
    behind = 1.0
    if HAS_SECOND_GAIN:
        behind = tl.where((coordinates < last)[None, :], second_gain[:, None], 1.0)
    unit = unit * tl.where((coordinates < gained)[None, :], gain[:, None], behind)
    if PLANES & 16:
        raw = held[:, None] & (stored == 16)[None, :]
        place = base[:, None] + of_layout(layout, RAW, coordinates, n)[None, :]
        low = tl.load(place, mask=raw, other=0).to(tl.int32)
        high = tl.load(place + 1, mask=raw, other=0).to(tl.int32)
        # bf16 is the upper half of a float32. Rows need not be aligned to two bytes, so they are read one by one.
        number = ((low << 16) | (high << 24)).to(tl.float32, bitcast=True)
        unit = tl.where(raw, number, unit)
    return unit


@triton.jit
def join(left, right):
    """Two [BLOCK_S, D] as one [BLOCK_S, 2 D], their columns in turns: no number changes its thread."""
    return tl.reshape(tl.join(left, right), [left.shape[0], 2 * left.shape[1]])


@triton.jit
def decoded(
    base,
    held,
    start,
    n,
    gains,
    layout,
    levels,
    PLANES: tl.constexpr,
    HAS_SECOND_GAIN: tl.constexpr,
    D: tl.constexpr,
    DTYPE,
):
    """The units of D coordinates of packed rows, in the order of `columns`, [BLOCK_S, D]."""
    WIDE: tl.constexpr = D if D < 128 else 128
    at = start + tl.arange(0, WIDE)
    # In chunks, since a thread holds several addresses and codes for each number while it decodes it.
    tile = units(base, held, at, n, gains, layout, levels, PLANES & 63, HAS_SECOND_GAIN).to(DTYPE)
    if D == 256:
        other = units(base, held, at + 128, n, gains, layout, levels, (PLANES >> 6) & 63, HAS_SECOND_GAIN).to(DTYPE)
        tile = join(tile, other)
    if D == 512:
        third = units(base, held, at + 256, n, gains, layout, levels, (PLANES >> 12) & 63, HAS_SECOND_GAIN).to(DTYPE)
        tile = join(tile, third)
        second = units(base, held, at + 128, n, gains, layout, levels, (PLANES >> 6) & 63, HAS_SECOND_GAIN).to(DTYPE)
        fourth = units(base, held, at + 384, n, gains, layout, levels, (PLANES >> 18) & 63, HAS_SECOND_GAIN).to(DTYPE)
        tile = join(tile, join(second, fourth))
    return tile


@triton.jit
def columns(start, D: tl.constexpr, PACKED: tl.constexpr):
    """Which coordinate each column of a piece is, [D]."""
    column = tl.arange(0, D)
    if PACKED and D > 128:
        column = column % (D // 128) * 128 + column // (D // 128)
    return start + column
