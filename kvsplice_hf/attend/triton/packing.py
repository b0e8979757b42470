"""The packing kernel: `RowCodec.pack` in one pass, a few rows per program.

Legend: `n` numbers of a row, of which the first `gained` share a gain, and perhaps those up to `last` another.
"""
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from kvsplice_hf.attend.triton.tables import FIRST_LEVEL, WIDTH


@triton.jit
def _asinh(x):
    """Inverse hyperbolic sine, exact to a few units in the last place also near 0."""
    size = tl.abs(x)
    square = size * size
    # log1p(y) = log(w) * y / (w - 1) with w = 1 + y rounded: the rounding errors of both factors cancel.
    y = size + tl.div_rn(square, 1.0 + tl.sqrt_rn(1.0 + square))
    w = 1.0 + y
    grown = w > 1.0
    log1p = tl.where(grown, tl.log(w) * tl.div_rn(y, tl.where(grown, w - 1.0, 1.0)), y)
    return tl.where(x < 0, -log1p, log1p)


@triton.jit
def _codes(base, mine, coordinates, n, gains, tables, HAS_KEY_GAIN: tl.constexpr):
    """The codes int32 [BLOCK_R, D] of the numbers at `coordinates` of some rows: `RowCodec.quantise`, step by step."""
    gained, factor, last, key_factor = gains
    layout, scales, centres, bends, stretches = tables
    number = tl.load(base[:, None] + coordinates[None, :], mask=mine, other=0.0).to(tl.float32)
    scale = tl.load(scales + coordinates)[None, :]
    own = scale
    if HAS_KEY_GAIN:
        own = tl.where((coordinates < last)[None, :], key_factor[:, None] * scale, scale)
    scale = tl.where((coordinates < gained)[None, :], factor[:, None] * scale, own)
    unit = tl.div_rn(number - tl.load(centres + coordinates)[None, :], scale)
    bend = tl.load(bends + coordinates)
    stretched = _asinh(unit * tl.load(stretches + coordinates)[None, :])
    bend = tl.broadcast_to(bend[None, :], stretched.shape)
    unit = tl.where(bend > 0, tl.div_rn(stretched, tl.where(bend > 0, bend, 1.0)), unit)
    # 2^b levels: those of smaller widths are as many but one.
    count = (tl.load(layout + FIRST_LEVEL * n + coordinates) + 1).to(tl.float32)[None, :]
    cell = tl.floor((unit + 1.0) * (count * 0.5))
    return tl.minimum(tl.maximum(cell, 0.0), count - 1.0).to(tl.int32)


@triton.jit
def _pack_plane(
    base,
    out,
    held,
    members,
    size,
    n,
    gains,
    tables,
    HAS_KEY_GAIN: tl.constexpr,
    FIELD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the plane of `FIELD`-bit fields, those of the coordinates `members` [size]; returns where it ends.

    `gains` and `tables` are those that `_codes` takes apart.
    """
    bytes_ = (size * FIELD + 7) // 8
    for first in range(0, bytes_, BLOCK):
        at = first + tl.arange(0, BLOCK)
        byte = tl.zeros([held.shape[0], BLOCK], tl.int32)
        for slot in tl.static_range(8 // FIELD):
            member = slot * bytes_ + at
            inside = (at < bytes_) & (member < size)
            coordinates = tl.load(members + member, mask=inside, other=0)
            mine = held[:, None] & inside[None, :]
            code = _codes(base, mine, coordinates, n, gains, tables, HAS_KEY_GAIN)
            shift = tl.load(tables[0] + WIDTH * n + coordinates) & ~(2 * FIELD - 1)
            bits = (code >> shift[None, :]) & (2**FIELD - 1)
            byte += tl.where(mine, bits << (slot * FIELD), 0)
        tl.store(out[:, None] + at[None, :], byte.to(tl.uint8), mask=held[:, None] & (at < bytes_)[None, :])
    return out + bytes_


@triton.jit
def _gain_bytes(base, held, gained, centres, sigmas, BLOCK: tl.constexpr):
    """The gains' bytes int32 [BLOCK_R] of some rows."""
    total = tl.zeros([held.shape[0]], tl.float32)
    for first in range(0, gained, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < gained
        number = tl.load(base[:, None] + at[None, :], mask=held[:, None] & inside[None, :], other=0.0).to(tl.float32)
        number -= tl.load(centres + at, mask=inside, other=0.0)[None, :]
        sigma = tl.broadcast_to(tl.load(sigmas + at, mask=inside, other=1.0)[None, :], number.shape)
        relative = tl.where(held[:, None] & inside[None, :], tl.div_rn(number, sigma), 0.0)
        total += tl.sum(relative * relative, 1)
    size = tl.maximum(tl.sqrt_rn(total / gained), 1e-30)
    # Adding 1.5 * 2^23 leaves no fractional bits: this rounds halves to even, as torch does.
    steps = (16.0 * tl.log2(size) + 128.0 + 12582912.0) - 12582912.0
    return tl.minimum(tl.maximum(steps, 0.0), 255.0).to(tl.int32)


@triton.jit
def _pack_raw(base, out, held, members, size, BLOCK: tl.constexpr):
    """Write the bf16 numbers at the coordinates `members` [size]; returns where they end."""
    for first in range(0, size, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < size
        mask = held[:, None] & inside[None, :]
        coordinates = tl.load(members + at, mask=inside, other=0)
        number = tl.load(base[:, None] + coordinates[None, :], mask=mask, other=0.0).to(tl.float32)
        bits = number.to(tl.uint32, bitcast=True)
        # To the nearest, halves to even, in integers: the interpreter only truncates.
        bits = tl.where(number != number, 0x7FC0, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
        tl.store(out[:, None] + 2 * at[None, :], (bits & 0xFF).to(tl.uint8), mask=mask)
        tl.store(out[:, None] + 2 * at[None, :] + 1, (bits >> 8).to(tl.uint8), mask=mask)
    return out + 2 * size


@triton.jit(do_not_specialize=["count"])
def pack_kernel(
    rows,
    packed,
    count,
    n,
    row_bytes,
    gained,
    layout,
    scales,
    centres,
    sigmas,
    gains,
    bends,
    stretches,
    members16,
    members8,
    members4,
    members2,
    members1,
    size16,
    size8,
    size4,
    size2,
    size1,
    key_sigmas,
    key_gained,
    HAS_GAIN: tl.constexpr,
    HAS_KEY_GAIN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Pack rows [count, n] into bytes [count, row_bytes], BLOCK_R rows per program."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    held = row < count
    base = rows + row.to(tl.int64) * n
    out = packed + row.to(tl.int64) * row_bytes
    factor = tl.full([BLOCK_R], 1.0, tl.float32)
    if HAS_GAIN:
        gain = _gain_bytes(base, held, gained, centres, sigmas, BLOCK)
        tl.store(out, gain.to(tl.uint8), mask=held)
        factor = tl.load(gains + gain)
        out += 1
    key_factor, last = factor, gained
    if HAS_KEY_GAIN:
        gain = _gain_bytes(base + gained, held, key_gained, centres + gained, key_sigmas, BLOCK)
        tl.store(out, gain.to(tl.uint8), mask=held)
        key_factor = tl.load(gains + gain)
        last += key_gained
        out += 1
    out = _pack_raw(base, out, held, members16, size16, BLOCK)
    of_row, tables = (gained, factor, last, key_factor), (layout, scales, centres, bends, stretches)
    # A code of several fields is computed for each of them. That is cheaper than to exchange codes between threads.
    out = _pack_plane(base, out, held, members8, size8, n, of_row, tables, HAS_KEY_GAIN, 8, BLOCK)
    out = _pack_plane(base, out, held, members4, size4, n, of_row, tables, HAS_KEY_GAIN, 4, BLOCK)
    out = _pack_plane(base, out, held, members2, size2, n, of_row, tables, HAS_KEY_GAIN, 2, BLOCK)
    _pack_plane(base, out, held, members1, size1, n, of_row, tables, HAS_KEY_GAIN, 1, BLOCK)
