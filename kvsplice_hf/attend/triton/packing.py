"""The packing kernel: `RowCodec.pack` in one pass, a few rows per program, and that of `TrellisCodec` likewise.

Legend: `n` numbers of a row, of which the first `gained` share a gain, and perhaps those up to `last` another.
"""
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from kvsplice_hf.attend.triton.scaling import asinh, gain_bytes, scaled
from kvsplice_hf.attend.triton.search import search
from kvsplice_hf.attend.triton.tables import WIDTH


@triton.jit
def _codes(base, mine, coordinates, n, gains, tables, HAS_KEY_GAIN: tl.constexpr):
    """The codes int32 [BLOCK_R, D] of the numbers at `coordinates` of some rows: `RowCodec.quantise`, step by step."""
    layout, scales, centres, bends, stretches = tables
    unit = scaled(base, mine, coordinates, gains, scales, centres, HAS_KEY_GAIN)
    bend = tl.load(bends + coordinates)
    stretched = asinh(unit * tl.load(stretches + coordinates)[None, :])
    bend = tl.broadcast_to(bend[None, :], stretched.shape)
    unit = tl.where(bend > 0, tl.div_rn(stretched, tl.where(bend > 0, bend, 1.0)), unit)
    count = (1 << tl.load(layout + WIDTH * n + coordinates)).to(tl.float32)[None, :]
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
    found,
    HAS_KEY_GAIN: tl.constexpr,
    TRELLIS: tl.constexpr,
    FIELD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the plane of `FIELD`-bit fields, those of the coordinates `members` [size]; returns where it ends.

    `gains` and `tables` are those that `_codes` takes apart; codes of a trellis are `found` already.
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
            if TRELLIS:
                code = tl.load(found[:, None] + coordinates[None, :], mask=mine, other=0).to(tl.int32)
            else:
                code = _codes(base, mine, coordinates, n, gains, tables, HAS_KEY_GAIN)
            shift = tl.load(tables[0] + WIDTH * n + coordinates) & ~(2 * FIELD - 1)
            bits = (code >> shift[None, :]) & (2**FIELD - 1)
            byte += tl.where(mine, bits << (slot * FIELD), 0)
        tl.store(out[:, None] + at[None, :], byte.to(tl.uint8), mask=held[:, None] & (at < bytes_)[None, :])
    return out + bytes_


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


# Long because each tensor is an argument of its own, with those of a trellis too, which other rows are handed None for.
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
    columns,
    first_chain,
    second_chain,
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
    HAS_GAIN: tl.constexpr,
    HAS_KEY_GAIN: tl.constexpr,
    TRELLIS: tl.constexpr,
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
        gain = gain_bytes(base, held, gained, centres, sigmas, BLOCK)
        tl.store(out, gain.to(tl.uint8), mask=held)
        factor = tl.load(gains + gain)
        out += 1
    key_factor, last = factor, gained
    if HAS_KEY_GAIN:
        gain = gain_bytes(base + gained, held, key_gained, centres + gained, key_sigmas, BLOCK)
        tl.store(out, gain.to(tl.uint8), mask=held)
        key_factor = tl.load(gains + gain)
        last += key_gained
        out += 1
    out = _pack_raw(base, out, held, members16, size16, BLOCK)
    of_row, tables = (gained, factor, last, key_factor), (layout, scales, centres, bends, stretches)
    found = codes
    if TRELLIS:
        trellis = (reaches, slopes, starts, weights, widths, first_levels, levels)
        steps, scratch = (of_row, scales, centres), (errors, numbers, ways, codes)
        chains = (first_chain, second_chain)
        search(base, held, row, columns, steps, trellis, scratch, chains, n, HAS_KEY_GAIN, BLOCK)
        tl.debug_barrier()  # what follows reads what other threads wrote
        found = codes + row.to(tl.int64) * n
    # Columns of whole bytes are in no trellis.
    out = _pack_plane(base, out, held, members8, size8, n, of_row, tables, found, HAS_KEY_GAIN, False, 8, BLOCK)
    # A code of several fields is computed for each of them. That is cheaper than to exchange codes between threads.
    out = _pack_plane(base, out, held, members4, size4, n, of_row, tables, found, HAS_KEY_GAIN, TRELLIS, 4, BLOCK)
    out = _pack_plane(base, out, held, members2, size2, n, of_row, tables, found, HAS_KEY_GAIN, TRELLIS, 2, BLOCK)
    _pack_plane(base, out, held, members1, size1, n, of_row, tables, found, HAS_KEY_GAIN, TRELLIS, 1, BLOCK)
