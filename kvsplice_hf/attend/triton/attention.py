# mypy: allow-untyped-defs
"""Triton kernels: attention straight on stored rows, plain or packed, and packing in one pass.

Nothing imports this module by itself, since it needs triton. On the CPU the kernels run only under the interpreter of
triton, for tests: `TRITON_INTERPRET=1`, set before triton is first imported (importing torch or transformers may do
so).

All M queries of a batch entry read the same S rows, and the values are the first numbers of the keys. So a program
takes a block of queries through a share ("split") of the rows once, with a running softmax (split-KV flash decoding),
and a second kernel merges the splits by the log-sum-exp of their scores. Packed rows are decoded on the way, never in
memory:

    row_j = centre_j + scale_j * unit_j,   unit_j = level(width_j)[code_j], times the row's gain where j has one,

so the product with a query is one with `query * scale` over the units plus `query . centre`, which is the same for all
rows, and the weighted mean of the rows is that of the units, scaled and shifted once.

A row of n numbers is read in up to three pieces, since a block's sides are powers of two: 576 = 512 + 64.

Legend: `B` batch, `M` queries, heads and tokens together, `S` stored rows, `n` numbers of a row, `v` of a value.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl

from kvsplice_hf.code.codec import RowCodec
from kvsplice_hf.errors import ConfigError, UnsupportedError


# What a codec's layout table holds of each coordinate: its width, where its field is in each plane (8 * byte + bit),
# where its 16-bit number is, and where the levels of its width start.
_WIDTH = tl.constexpr(0)
_IN_PLANE8 = tl.constexpr(1)
_IN_PLANE4 = tl.constexpr(2)
_IN_PLANE2 = tl.constexpr(3)
_IN_PLANE1 = tl.constexpr(4)
_RAW = tl.constexpr(5)
_FIRST_LEVEL = tl.constexpr(6)
_FIELDS = {8: _IN_PLANE8, 4: _IN_PLANE4, 2: _IN_PLANE2, 1: _IN_PLANE1}

_PIECES = 3
_WIDEST = 512
# Coordinates of packed rows that are decoded at once.
_CHUNK = 128
# Programs per multiprocessor that the splits should make: a second one works while the first waits for memory.
_PROGRAMS_PER_SM = 2
# Fewer blocks of rows than this are not worth a split, whose result is written and read again.
_BLOCKS_PER_SPLIT = 4


# ----------------------------------------------------------------------------------------------------------- attention


@triton.jit
def _of_layout(layout, entry: tl.constexpr, coordinates, n):
    """An entry of the layout table, [D]; 0 past the row."""
    return tl.load(layout + entry * n + coordinates, mask=coordinates < n, other=0)


@triton.jit
def _scales_and_centres(coordinates, n, layout, scales, centres):
    """Factor and offset from units to numbers, [D] each."""
    width = _of_layout(layout, _WIDTH, coordinates, n)
    coded = (width > 0) & (width < 16)
    # A codec does not say anything about the scales of the others.
    scale = tl.load(scales + coordinates, mask=(coordinates < n) & coded, other=1.0)
    centre = tl.load(centres + coordinates, mask=(coordinates < n) & (width < 16), other=0.0)
    return scale, centre


@triton.jit
def _query_tile(base, held, coordinates, n, layout, scales, centres, PACKED: tl.constexpr, DTYPE: tl.constexpr):
    """Queries against units, [BLOCK_M, D], and what they score on the centres, [BLOCK_M]."""
    query = tl.load(base[:, None] + coordinates[None, :], mask=held[:, None] & (coordinates < n)[None, :], other=0.0)
    if PACKED:
        query = query.to(tl.float32)
        scale, centre = _scales_and_centres(coordinates, n, layout, scales, centres)
        constant = tl.sum(query * centre[None, :], 1)
        query = query * scale[None, :]
    else:
        constant = tl.zeros([held.shape[0]], tl.float32)
    return query.to(DTYPE), constant


@triton.jit
def _field(base, held, coordinates, n, layout, width, FIELD: tl.constexpr, entry: tl.constexpr):
    """The bits [BLOCK_S, D] that the plane of `FIELD`-bit fields holds of each code, at their place in it."""
    place = _of_layout(layout, entry, coordinates, n)
    has_one = held[:, None] & ((width & FIELD) != 0)[None, :]
    byte = tl.load(base[:, None] + (place >> 3)[None, :], mask=has_one, other=0).to(tl.int32)
    bits = (byte >> (place & 7)[None, :]) & (2**FIELD - 1)
    # The larger fields of a code come first, in its lower bits.
    return bits << (width & ~(2 * FIELD - 1))[None, :]


@triton.jit
def _units(base, held, coordinates, n, gained, gain, layout, levels, PLANES: tl.constexpr):
    """Packed rows without their scales and centres, float32 [BLOCK_S, D]."""
    # The table is read again for each block of rows: it is in L1, and holding it would take many registers.
    stored = _of_layout(layout, _WIDTH, coordinates, n)
    width = tl.where(stored == 16, 0, stored)
    code = tl.zeros([held.shape[0], coordinates.shape[0]], tl.int32)
    if PLANES & 8:
        code += _field(base, held, coordinates, n, layout, width, 8, _IN_PLANE8)
    if PLANES & 4:
        code += _field(base, held, coordinates, n, layout, width, 4, _IN_PLANE4)
    if PLANES & 2:
        code += _field(base, held, coordinates, n, layout, width, 2, _IN_PLANE2)
    if PLANES & 1:
        code += _field(base, held, coordinates, n, layout, width, 1, _IN_PLANE1)
    unit = tl.load(levels + _of_layout(layout, _FIRST_LEVEL, coordinates, n)[None, :] + code)
    unit = unit * tl.where((coordinates < gained)[None, :], gain[:, None], 1.0)
    if PLANES & 16:
        raw = held[:, None] & (stored == 16)[None, :]
        place = base[:, None] + _of_layout(layout, _RAW, coordinates, n)[None, :]
        low = tl.load(place, mask=raw, other=0).to(tl.int32)
        high = tl.load(place + 1, mask=raw, other=0).to(tl.int32)
        # bf16 is the upper half of a float32. Rows need not be aligned to two bytes, so they are read one by one.
        number = ((low << 16) | (high << 24)).to(tl.float32, bitcast=True)
        unit = tl.where(raw, number, unit)
    return unit


@triton.jit
def _join(left, right):
    """Two [BLOCK_S, D] as one [BLOCK_S, 2 D], their columns in turns: no number changes its thread."""
    return tl.reshape(tl.join(left, right), [left.shape[0], 2 * left.shape[1]])


@triton.jit
def _decoded(base, held, start, n, gained, gain, layout, levels, PLANES: tl.constexpr, D: tl.constexpr, DTYPE):
    """The units of D coordinates of packed rows, in the order of `_columns`, [BLOCK_S, D]."""
    WIDE: tl.constexpr = D if D < 128 else 128
    at = start + tl.arange(0, WIDE)
    # In chunks, since a thread holds several addresses and codes for each number while it decodes it.
    tile = _units(base, held, at, n, gained, gain, layout, levels, PLANES & 31).to(DTYPE)
    if D == 256:
        other = _units(base, held, at + 128, n, gained, gain, layout, levels, (PLANES >> 5) & 31).to(DTYPE)
        tile = _join(tile, other)
    if D == 512:
        third = _units(base, held, at + 256, n, gained, gain, layout, levels, (PLANES >> 10) & 31).to(DTYPE)
        tile = _join(tile, third)
        second = _units(base, held, at + 128, n, gained, gain, layout, levels, (PLANES >> 5) & 31).to(DTYPE)
        fourth = _units(base, held, at + 384, n, gained, gain, layout, levels, (PLANES >> 15) & 31).to(DTYPE)
        tile = _join(tile, _join(second, fourth))
    return tile


@triton.jit
def _columns(start, D: tl.constexpr, PACKED: tl.constexpr):
    """Which coordinate each column of a piece is, [D]."""
    column = tl.arange(0, D)
    if PACKED and D > 128:
        column = column % (D // 128) * 128 + column // (D // 128)
    return start + column


@triton.jit
def _row_tile(
    base,
    held,
    start,
    n,
    gained,
    gain,
    layout,
    levels,
    PACKED: tl.constexpr,
    PLANES: tl.constexpr,
    D: tl.constexpr,
    DTYPE,
):
    """Stored rows, or the units of packed ones, [BLOCK_S, D]; finite at rows that are not `held`."""
    if PACKED:
        tile = _decoded(base, held, start, n, gained, gain, layout, levels, PLANES, D, DTYPE)
    else:
        at = start + tl.arange(0, D)
        tile = tl.load(base[:, None] + at[None, :], mask=held[:, None] & (at < n)[None, :], other=0.0).to(DTYPE)
    return tile


@triton.jit
def _store_mixed(
    base,
    held,
    coordinates,
    n,
    value_dim,
    mixed,
    total,
    layout,
    scales,
    centres,
    PACKED: tl.constexpr,
):
    """Write a piece [BLOCK_M, D] of the weighted means; 0 where there was no row to average."""
    seen = (total > 0)[:, None]
    mixed = mixed / tl.where(seen, total[:, None], 1.0)
    if PACKED:
        scale, centre = _scales_and_centres(coordinates, n, layout, scales, centres)
        mixed = tl.where(seen, mixed * scale[None, :] + centre[None, :], 0.0)
    mask = held[:, None] & (coordinates < value_dim)[None, :]
    tl.store(base[:, None] + coordinates[None, :], mixed, mask=mask)


# Numbers that grow from step to step must not compile the kernel anew whenever one of them is divisible by 16.
@triton.jit(do_not_specialize=["count", "bias_batch", "bias_query"])
def _attend_kernel(
    query,
    rows,
    bias,
    lengths,
    mixed,
    lse,
    layout,
    scales,
    centres,
    levels,
    gains,
    queries,
    count,
    n,
    value_dim,
    gained,
    row_batch,
    row_stride,
    bias_batch,
    bias_query,
    bias_key,
    bias_period,
    HAS_BIAS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    PLANES0: tl.constexpr,
    PLANES1: tl.constexpr,
    PLANES2: tl.constexpr,
    VALUES1: tl.constexpr,
    VALUES2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of queries [BLOCK_M, n] over one split of the rows of one batch entry.

    Writes `mixed` [B, M, splits, v], normalised over the split, and `lse` [B, M, splits].
    """
    batch = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    splits = tl.num_programs(2)
    query_index = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    query_held = query_index < queries
    flat_index = batch * queries + query_index

    end = count
    if HAS_LENGTHS:
        end = tl.minimum(tl.load(lengths + batch), count)
    share = tl.cdiv(tl.cdiv(end, splits), BLOCK_S) * BLOCK_S
    first = split * share
    end = tl.minimum(first + share, end)

    query_base = query + flat_index * n
    at0 = _columns(0, D0, PACKED)
    query0, constant = _query_tile(query_base, query_held, at0, n, layout, scales, centres, PACKED, DTYPE)
    mixed0 = tl.zeros([BLOCK_M, D0], tl.float32)
    if D1 > 0:
        at1 = _columns(D0, D1, PACKED)
        query1, more = _query_tile(query_base, query_held, at1, n, layout, scales, centres, PACKED, DTYPE)
        constant += more
    if D2 > 0:
        at2 = _columns(D0 + D1, D2, PACKED)
        query2, more = _query_tile(query_base, query_held, at2, n, layout, scales, centres, PACKED, DTYPE)
        constant += more
    if VALUES1:
        mixed1 = tl.zeros([BLOCK_M, D1], tl.float32)
    if VALUES2:
        mixed2 = tl.zeros([BLOCK_M, D2], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    for start in range(first, end, BLOCK_S):
        row_index = start + tl.arange(0, BLOCK_S)
        held = row_index < end
        base = rows + batch * row_batch + row_index.to(tl.int64) * row_stride
        gain = tl.full([BLOCK_S], 1.0, tl.float32)
        if HAS_GAIN:
            gain = tl.load(gains + tl.load(base, mask=held, other=0).to(tl.int32))
        tile0 = _row_tile(base, held, 0, n, gained, gain, layout, levels, PACKED, PLANES0, D0, DTYPE)
        score = tl.dot(query0, tl.trans(tile0), input_precision=PRECISION)
        if D1 > 0:
            tile1 = _row_tile(base, held, D0, n, gained, gain, layout, levels, PACKED, PLANES1, D1, DTYPE)
            score = tl.dot(query1, tl.trans(tile1), acc=score, input_precision=PRECISION)
        if D2 > 0:
            tile2 = _row_tile(base, held, D0 + D1, n, gained, gain, layout, levels, PACKED, PLANES2, D2, DTYPE)
            score = tl.dot(query2, tl.trans(tile2), acc=score, input_precision=PRECISION)
        if HAS_BIAS:
            place = bias + batch * bias_batch + row_index.to(tl.int64)[None, :] * bias_key
            place += (query_index % bias_period).to(tl.int64)[:, None] * bias_query
            score += tl.load(place, mask=query_held[:, None] & held[None, :], other=0.0)
        score = tl.where(held[None, :], score, float("-inf"))

        higher = tl.maximum(top, tl.max(score, 1))
        # A query that has not seen a row yet must not subtract infinity from infinity.
        base_score = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp(score - base_score[:, None])
        fade = tl.exp(top - base_score)
        total = total * fade + tl.sum(weight, 1)
        top = higher
        weight = weight.to(DTYPE)
        mixed0 = tl.dot(weight, tile0, acc=mixed0 * fade[:, None], input_precision=PRECISION)
        if VALUES1:
            mixed1 = tl.dot(weight, tile1, acc=mixed1 * fade[:, None], input_precision=PRECISION)
        if VALUES2:
            mixed2 = tl.dot(weight, tile2, acc=mixed2 * fade[:, None], input_precision=PRECISION)

    place = flat_index * splits + split
    found = top + constant + tl.log(tl.where(total > 0, total, 1.0))
    tl.store(lse + place, found, mask=query_held)
    out = mixed + place * value_dim
    _store_mixed(out, query_held, at0, n, value_dim, mixed0, total, layout, scales, centres, PACKED)
    if VALUES1:
        _store_mixed(out, query_held, at1, n, value_dim, mixed1, total, layout, scales, centres, PACKED)
    if VALUES2:
        _store_mixed(out, query_held, at2, n, value_dim, mixed2, total, layout, scales, centres, PACKED)


@triton.jit
def _merge_kernel(parts, part_lse, mixed, lse, splits, value_dim, BLOCK_SPLITS: tl.constexpr, BLOCK_V: tl.constexpr):
    """Weighted means [M, splits, v] of one query's splits into one, [M, v], by their log-sum-exp [M, splits]."""
    query = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, BLOCK_SPLITS)
    held = split < splits
    scores = tl.load(part_lse + query * splits + split, mask=held, other=float("-inf"))
    top = tl.max(scores, 0)
    base_score = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp(scores - base_score)
    total = tl.sum(weight, 0)
    weight = weight / tl.where(total > 0, total, 1.0)
    at = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    place = (query * splits + split)[:, None] * value_dim + at[None, :]
    part = tl.load(parts + place, mask=held[:, None] & (at < value_dim)[None, :], other=0.0)
    tl.store(mixed + query * value_dim + at, tl.sum(part * weight[:, None], 0), mask=at < value_dim)
    if tl.program_id(1) == 0:
        tl.store(lse + query, top + tl.log(tl.where(total > 0, total, 1.0)))


# ------------------------------------------------------------------------------------------------------------- packing


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
def _codes(base, mine, coordinates, n, gained, factor, layout, scales, centres, bends, stretches):
    """The codes int32 [BLOCK_R, D] of the numbers at `coordinates` of some rows: `RowCodec.quantise`, step by step."""
    number = tl.load(base[:, None] + coordinates[None, :], mask=mine, other=0.0).to(tl.float32)
    scale = tl.load(scales + coordinates)[None, :]
    scale = tl.where((coordinates < gained)[None, :], factor[:, None] * scale, scale)
    unit = tl.div_rn(number - tl.load(centres + coordinates)[None, :], scale)
    bend = tl.load(bends + coordinates)
    stretched = _asinh(unit * tl.load(stretches + coordinates)[None, :])
    bend = tl.broadcast_to(bend[None, :], stretched.shape)
    unit = tl.where(bend > 0, tl.div_rn(stretched, tl.where(bend > 0, bend, 1.0)), unit)
    # 2^b levels: those of smaller widths are as many but one.
    count = (tl.load(layout + _FIRST_LEVEL * n + coordinates) + 1).to(tl.float32)[None, :]
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
    gained,
    factor,
    layout,
    scales,
    centres,
    bends,
    stretches,
    FIELD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the plane of `FIELD`-bit fields, those of the coordinates `members` [size]; returns where it ends."""
    bytes_ = (size * FIELD + 7) // 8
    for first in range(0, bytes_, BLOCK):
        at = first + tl.arange(0, BLOCK)
        byte = tl.zeros([held.shape[0], BLOCK], tl.int32)
        for slot in tl.static_range(8 // FIELD):
            member = slot * bytes_ + at
            inside = (at < bytes_) & (member < size)
            coordinates = tl.load(members + member, mask=inside, other=0)
            mine = held[:, None] & inside[None, :]
            code = _codes(base, mine, coordinates, n, gained, factor, layout, scales, centres, bends, stretches)
            shift = tl.load(layout + _WIDTH * n + coordinates) & ~(2 * FIELD - 1)
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
def _pack_kernel(
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
    HAS_GAIN: tl.constexpr,
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
    out = _pack_raw(base, out, held, members16, size16, BLOCK)
    # A code of several fields is computed for each of them. That is cheaper than to exchange codes between threads.
    out = _pack_plane(
        base, out, held, members8, size8, n, gained, factor, layout, scales, centres, bends, stretches, 8, BLOCK
    )
    out = _pack_plane(
        base, out, held, members4, size4, n, gained, factor, layout, scales, centres, bends, stretches, 4, BLOCK
    )
    out = _pack_plane(
        base, out, held, members2, size2, n, gained, factor, layout, scales, centres, bends, stretches, 2, BLOCK
    )
    _pack_plane(
        base, out, held, members1, size1, n, gained, factor, layout, scales, centres, bends, stretches, 1, BLOCK
    )


# -------------------------------------------------------------------------------------------------- what codecs look up


class _Tables(NamedTuple):
    """What the kernels look up in a codec, on its device.

    Attributes:
        layout: int32 [7, n], see `_WIDTH` and the others.
        gains: the 256 factors, float32.
        stretches: sinh of the coordinates' bends, [n].
        planes: of each piece, five bits for each of its chunks: which field sizes (1, 2, 4, 8 and 16) occur in it.
    """

    layout: torch.Tensor
    gains: torch.Tensor
    stretches: torch.Tensor
    planes: tuple[int, ...]


# By codec and device. Not buffers: these follow from the widths, and a copied or loaded codec makes its own.
_tables: WeakKeyDictionary[RowCodec, dict[torch.device, _Tables]] = WeakKeyDictionary()


def _tables_of(codec: RowCodec) -> _Tables:
    device = codec.widths.device
    by_device = _tables.setdefault(codec, {})
    if device not in by_device:
        with torch.inference_mode(False):
            by_device[device] = _make_tables(codec, device)
    return by_device[device]


def _make_tables(codec: RowCodec, device: torch.device) -> _Tables:
    widths = codec.widths.cpu().int()
    small = torch.where(widths == 16, 0, widths)
    layout = torch.zeros(7, codec.row_dim, dtype=torch.int32, device="cpu")
    layout[_WIDTH.value] = widths
    layout[_FIRST_LEVEL.value] = torch.where(small > 0, 2**small - 1, 0)
    start = int(len(codec.sigmas) > 0)
    raw = codec._raw.cpu()
    layout[_RAW.value, raw] = start + 2 * torch.arange(len(raw), dtype=torch.int32, device="cpu")
    start += 2 * len(raw)
    for field, entry in _FIELDS.items():
        members = codec._plane(field)[0].cpu()
        size = -(-len(members) * field // 8)
        index = torch.arange(len(members), dtype=torch.int32, device="cpu")
        # Byte j of a plane of m holds the fields j, j + m, j + 2 m and so on.
        slot = index // max(size, 1)
        layout[entry.value, members] = 8 * (start + index - slot * size) + slot * field
        start += size
    gains = torch.exp2((torch.arange(256, dtype=torch.float32, device=device) - 128) / 16)
    stretches = torch.sinh(torch.where(codec._bends > 0, codec._bends, 1.0))
    return _Tables(layout.to(device), gains, stretches, _planes(widths))


def _planes(widths: torch.Tensor) -> tuple[int, ...]:
    """See `_Tables.planes`."""
    found, start = [], 0
    for piece in _pieces(len(widths)):
        chunks = widths[start : start + piece].split(_CHUNK) if piece else ()
        sets = [sum(field for field in (1, 2, 4, 8, 16) if (chunk & field).any()) for chunk in chunks]
        found.append(sum(planes << (5 * index) for index, planes in enumerate(sets)))
        start += piece
    return tuple(found)


def _pieces(n: int) -> tuple[int, ...]:
    """Powers of two from 16 up, of which three at most, the others 0, together hold n numbers with little to spare."""
    pieces: list[int] = []
    rest = n
    while rest > 0:
        above = min(_WIDEST, max(16, triton.next_power_of_2(rest)))
        # One piece that is an eighth empty is cheaper than three full ones.
        whole = len(pieces) == _PIECES - 1 or above - rest <= rest // 8 or rest <= 16
        pieces.append(above if whole else above // 2)
        rest -= pieces[-1]
    return (*pieces, *[0] * (_PIECES - len(pieces)))


# ---------------------------------------------------------------------------------------------------------- what is run


class _Blocks(NamedTuple):
    """Sizes of a program: its queries, the rows of a step, warps, and steps whose loads are under way."""

    queries: int
    rows: int
    warps: int
    stages: int


def interpreted() -> bool:
    """Whether the kernels run in the interpreter of triton."""
    # Functions that were imported before the variable was set are compiled ones, and the two do not mix.
    return not any(isinstance(function, triton.JITFunction) for function in (_attend_kernel, tl.sum))


def kernels_available(device: torch.device | str) -> bool:
    """Whether the kernels can run on tensors of this device: on CUDA and ROCm, and anywhere in the interpreter."""
    return torch.device(device).type == "cuda" or interpreted()


def attend_rows(
    query: torch.Tensor,
    rows: torch.Tensor,
    value_dim: int,
    bias: torch.Tensor | None = None,
    splits: int | None = None,
    *,
    scaling: float | None = None,
    lengths: torch.Tensor | None = None,
    input_precision: str = "ieee",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of M queries over the same S rows, whose first numbers are the values.

    Args:
        query: [B, M, n]. With rows of the same 16-bit type, products are taken in it, as
            `torch.matmul` would; otherwise in float32.
        rows: bf16, fp16 or fp32, [B, S, n], the last dimension contiguous. The others may have any strides.
        value_dim: v, the numbers of a row that are mixed.
        bias: added to the scores, float32 [B or 1, T, S] with M = H * T or T = 1: query m reads row m % T. Any
            strides. The lowest finite number masks a row.
        splits: into how many shares the rows are divided, or None for as many as fill the device.
        scaling: factor on the query, or None for 1.
        lengths: rows of each batch entry that are read, int32 [B], or None for all S.
        input_precision: of float32 products on tensor cores: "ieee" keeps all bits, "tf32" is faster with 10 bits.

    Returns:
        The weighted means float32 [B, M, v], and the natural log-sum-exp of the scores, float32 [B, M], by which
        results over other rows can be merged. Without any row they are 0 and -inf.

    Raises:
        ConfigError: shapes, dtypes or strides other than these.
        UnsupportedError: a CPU tensor outside the interpreter, or one that needs gradients.
    """
    _check_device(query)
    if rows.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ConfigError(f"Got rows of {rows.dtype}; they must be bfloat16, float16 or float32. Convert them first.")
    _check_shapes(query, rows, query.shape[-1], value_dim, bias, splits, lengths, input_precision)
    dtype = query.dtype if query.dtype == rows.dtype else torch.float32
    return _attend(_scaled(query, scaling), rows, None, value_dim, bias, splits, lengths, dtype, input_precision)


def attend_packed(
    query: torch.Tensor,
    packed: torch.Tensor,
    codec: RowCodec,
    value_dim: int,
    bias: torch.Tensor | None = None,
    splits: int | None = None,
    *,
    scaling: float | None = None,
    lengths: torch.Tensor | None = None,
    input_precision: str = "ieee",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend_rows` on rows that `codec` packed, without unpacking them in memory.

    Args:
        query: [B, M, n]. Products are taken in its type.
        packed: uint8 [B, S, row_bytes], the last dimension contiguous. The others may have any strides.
        codec: the codec of the rows, on the same device.
        value_dim, bias, splits, scaling, lengths, input_precision: see `attend_rows`.

    Returns:
        As `attend_rows`, of `codec.unpack(packed)`.

    Raises:
        ConfigError: shapes, dtypes or strides other than these, or rows of another codec.
        UnsupportedError: a CPU tensor outside the interpreter, or one that needs gradients.
    """
    _check_device(query)
    if packed.dtype != torch.uint8 or query.shape[-1] != codec.row_dim:
        raise ConfigError(
            f"Got packed rows of {packed.dtype} and queries of {query.shape[-1]} numbers; this codec needs torch.uint8 "
            f"and {codec.row_dim}."
        )
    _check_shapes(query, packed, codec.row_bytes, value_dim, bias, splits, lengths, input_precision)
    return _attend(
        _scaled(query, scaling), packed, codec, value_dim, bias, splits, lengths, query.dtype, input_precision
    )


def encode_pack(rows: torch.Tensor, codec: RowCodec) -> torch.Tensor:
    """`codec.pack(rows)` in one kernel: uint8 [..., row_bytes] of rows [..., n], of any float type.

    Its logarithms are not those of torch to the last bit, so about one code in a million, at the border of two cells,
    comes out as the other.

    Raises:
        ConfigError: rows of other than n numbers.
        UnsupportedError: a CPU tensor outside the interpreter.
    """
    _check_device(rows, gradients=True)
    if rows.shape[-1] != codec.row_dim:
        raise ConfigError(f"Got rows of {rows.shape[-1]} numbers; this codec packs rows of {codec.row_dim}.")
    flat = rows.detach().reshape(-1, codec.row_dim).contiguous()
    count = flat.shape[0]
    packed = torch.empty(count, codec.row_bytes, dtype=torch.uint8, device=rows.device)
    if packed.numel():
        tables = _tables_of(codec)
        members = [codec._raw, *(codec._plane(field)[0] for field in _FIELDS)]
        block = min(64 if interpreted() else 8, triton.next_power_of_2(count))
        with _on(rows.device):
            _pack_kernel[(triton.cdiv(count, block),)](
                flat,
                packed,
                count,
                codec.row_dim,
                codec.row_bytes,
                len(codec.sigmas),
                tables.layout,
                codec.scales,
                codec.centres,
                codec.sigmas,
                tables.gains,
                codec._bends,
                tables.stretches,
                *members,
                *(len(coordinates) for coordinates in members),
                HAS_GAIN=len(codec.sigmas) > 0,
                BLOCK_R=block,
                BLOCK=64,
            )
    return packed.view(*rows.shape[:-1], codec.row_bytes)


def _scaled(query: torch.Tensor, scaling: float | None) -> torch.Tensor:
    return query if scaling is None else query * scaling


def _attend(
    query: torch.Tensor,
    rows: torch.Tensor,
    codec: RowCodec | None,
    value_dim: int,
    bias: torch.Tensor | None,
    splits: int | None,
    lengths: torch.Tensor | None,
    dtype: torch.dtype,
    input_precision: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, queries, n = query.shape
    count, device = rows.shape[1], query.device
    if batch * queries * count == 0:
        return query.new_zeros(batch, queries, value_dim, dtype=torch.float32), torch.full(
            (batch, queries), float("-inf"), dtype=torch.float32, device=device
        )
    # The interpreter computes wrong numbers in bf16 and slow ones in fp16.
    dtype = torch.float32 if interpreted() else dtype
    pieces = _pieces(n)
    blocks = _choose_blocks(queries, sum(pieces), dtype, codec is not None, device)
    programs = triton.cdiv(queries, blocks.queries) * batch
    splits = _choose_splits(count, programs, blocks.rows, device) if splits is None else splits
    mixed = torch.empty(batch, queries, splits, value_dim, dtype=torch.float32, device=device)
    lse = torch.empty(batch, queries, splits, dtype=torch.float32, device=device)
    with _on(device):
        _attend_kernel[(triton.cdiv(queries, blocks.queries), batch, splits)](
            query.detach().contiguous(),
            rows.detach(),
            bias,
            lengths,
            mixed,
            lse,
            *_codec_arguments(codec),
            queries,
            count,
            n,
            value_dim,
            0 if codec is None else len(codec.sigmas),
            rows.stride(0),
            rows.stride(1),
            *_bias_strides(bias),
            HAS_BIAS=bias is not None,
            HAS_LENGTHS=lengths is not None,
            PACKED=codec is not None,
            HAS_GAIN=codec is not None and len(codec.sigmas) > 0,
            **_piece_arguments(pieces, value_dim, codec),
            BLOCK_M=blocks.queries,
            BLOCK_S=blocks.rows,
            DTYPE={torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype],
            PRECISION=input_precision,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )
        return _merge(mixed, lse)


def _merge(parts: torch.Tensor, part_lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Means [B, M, v] and log-sum-exp [B, M] of all rows from those of the splits, [B, M, splits, v] and so on."""
    batch, queries, splits, value_dim = parts.shape
    if splits == 1:
        return parts[:, :, 0], part_lse[:, :, 0]
    mixed, lse = parts.new_empty(batch, queries, value_dim), parts.new_empty(batch, queries)
    shares = triton.next_power_of_2(splits)
    block = min(max(8, 4096 // shares), 64, triton.next_power_of_2(value_dim))  # what fits into registers
    _merge_kernel[(batch * queries, triton.cdiv(value_dim, block))](
        parts, part_lse, mixed, lse, splits, value_dim, BLOCK_SPLITS=shares, BLOCK_V=block
    )
    return mixed, lse


def _codec_arguments(codec: RowCodec | None) -> tuple[torch.Tensor | None, ...]:
    if codec is None:
        return (None,) * 5
    tables = _tables_of(codec)
    return tables.layout, codec.scales, codec.centres, codec._levels, tables.gains


def _piece_arguments(pieces: tuple[int, ...], value_dim: int, codec: RowCodec | None) -> dict[str, Any]:
    planes = (0,) * _PIECES if codec is None else _tables_of(codec).planes
    arguments: dict[str, Any] = {f"D{index}": piece for index, piece in enumerate(pieces)}
    arguments |= {f"PLANES{index}": plane for index, plane in enumerate(planes)}
    # What only scores (the rotated key) needs no mean.
    return arguments | {f"VALUES{i}": pieces[i] > 0 and sum(pieces[:i]) < value_dim for i in range(1, _PIECES)}


def _bias_strides(bias: torch.Tensor | None) -> tuple[int, int, int, int]:
    """Strides over batch, queries and keys, and the number of queries after which the bias repeats."""
    if bias is None:
        return 0, 0, 0, 1
    batch, queries, keys = bias.stride()
    return batch if bias.shape[0] > 1 else 0, queries, keys, bias.shape[1]


def _choose_blocks(queries: int, width: int, dtype: torch.dtype, packed: bool, device: torch.device) -> _Blocks:
    """Sizes that the shared memory holds. The more queries a program takes, the less often a row is decoded."""
    if device.type != "cuda":
        return _Blocks(16, 64, 4, 1)  # the interpreter pays for steps, not for numbers
    size = dtype.itemsize
    # Hopper's tensor cores take 64 queries at a time. On others, decoding needs the registers that these would take.
    # In float32, products do.
    small = size == 4 or packed and torch.cuda.get_device_properties(device).major not in (9, 10)
    tall = 16 if queries <= 16 or small else 64
    rows, stages = 64 // size, 1 if packed else 2
    while _needed(tall, rows, stages, width, size) > _shared_memory(device) and tall + stages > 17:
        tall, stages = (tall, stages - 1) if stages > 1 else (tall // 2, stages)
    return _Blocks(tall, rows, 4 if tall == 16 and width <= 256 else 8, stages)


def _needed(queries: int, rows: int, stages: int, width: int, size: int) -> int:
    """Bytes of shared memory: queries and rows while products are taken, the widest piece of means in the end."""
    return max((queries + stages * rows) * width * size, queries * min(width, _WIDEST) * 4) + 4096


def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may take."""
    if device.type != "cuda":
        return 1 << 20
    # 64 KiB is what devices have that do not say, AMD's among them.
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 1 << 16)


def _choose_splits(count: int, programs: int, block: int, device: torch.device) -> int:
    """So many splits that all programs run at once, of a few blocks of rows each."""
    if device.type != "cuda":
        return 1
    slots = _PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(slots // programs, count // (_BLOCKS_PER_SPLIT * block)))


def _on(device: torch.device) -> AbstractContextManager[Any]:
    # triton launches on the current device, whatever the tensors' is
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


# ------------------------------------------------------------------------------------------------------------ what fits


def _check_device(tensor: torch.Tensor, gradients: bool = False) -> None:
    if not kernels_available(tensor.device):
        raise UnsupportedError(
            f"Got a tensor on {tensor.device}; the kernels need a CUDA or ROCm device. For tests on the CPU, set "
            "TRITON_INTERPRET=1 before anything imports triton."
        )
    if tensor.requires_grad and torch.is_grad_enabled() and not gradients:
        raise UnsupportedError(
            "Got a query that requires gradients; the kernels have no backward pass. Use them under torch.no_grad(), "
            "or absorbed_attention for training."
        )


def _check_shapes(
    query: torch.Tensor,
    rows: torch.Tensor,
    row_size: int,
    value_dim: int,
    bias: torch.Tensor | None,
    splits: int | None,
    lengths: torch.Tensor | None,
    input_precision: str,
) -> None:
    batch, queries, n = query.shape
    if rows.dim() != 3 or rows.shape[0] != batch or rows.shape[2] != row_size:
        raise ConfigError(
            f"Got rows {list(rows.shape)} for queries {list(query.shape)}; needed [{batch}, S, {row_size}]."
        )
    if rows.stride(2) != 1 and row_size > 1:
        raise ConfigError(f"Got rows of strides {rows.stride()}; the numbers of a row must lie side by side.")
    if not query.is_floating_point() or not 0 < value_dim <= n <= _PIECES * _WIDEST:
        raise ConfigError(
            f"Got {query.dtype} queries of {n} numbers and value_dim {value_dim}; needed floats, at most "
            f"{_PIECES * _WIDEST} numbers and value_dim from 1 to {n}."
        )
    if bias is not None and not _bias_fits(bias, batch, queries, rows.shape[1]):
        raise ConfigError(
            f"Got a bias {bias.dtype} {list(bias.shape)}; needed float32 [{batch} or 1, T, {rows.shape[1]}] with T a "
            f"divisor of the {queries} queries."
        )
    if lengths is not None and (lengths.dtype != torch.int32 or lengths.shape != (batch,)):
        raise ConfigError(f"Got lengths {lengths.dtype} {list(lengths.shape)}; needed int32 [{batch}].")
    if splits is not None and splits < 1:
        raise ConfigError(f"Got {splits} splits; at least one is needed.")
    if input_precision not in ("ieee", "tf32"):
        raise ConfigError(f"Got input_precision {input_precision!r}; it must be 'ieee' or 'tf32'.")


def _bias_fits(bias: torch.Tensor, batch: int, queries: int, count: int) -> bool:
    if bias.dtype != torch.float32 or bias.dim() != 3 or bias.shape[0] not in (1, batch) or bias.shape[2] != count:
        return False
    return queries == 0 or (bias.shape[1] > 0 and queries % bias.shape[1] == 0)
