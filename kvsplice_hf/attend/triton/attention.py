"""The attention kernel: queries against stored rows, plain or packed, in one pass over them.

All M queries of a batch entry read the same S rows, and the values are the first numbers of the keys. So a program
takes a block of queries through a share ("split") of the rows once, with a running softmax (split-KV flash decoding),
and a second kernel merges the splits by the log-sum-exp of their scores. Packed rows are decoded on the way, never in
memory:

    row_j = centre_j + scale_j * unit_j,   unit_j = level(width_j)[code_j], times the row's gain where j has one,

so the product with a query is one with `query * scale` over the units plus `query . centre`, which is the same for all
rows, and the weighted mean of the rows is that of the units, scaled and shifted once.

A row of n numbers is read in up to three pieces, since a block's sides are powers of two: 576 = 512 + 64.

Where keys were coded before their rotation, these pieces are the value alone, n = v, and what queries score on the key
comes from `turning`. Its code is behind the value, or the last part of it, and is then decoded once more there.

The rows of a batch entry lie side by side, or in pages that a table names (`placing`).

Legend: `B` batch, `M` queries, heads and tokens together, `S` stored rows, `n` numbers of a row, `v` of a value,
`F` pairs of numbers of a key that are turned together.
"""
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from kvsplice_hf.attend.triton.decoding import columns, decoded, of_layout
from kvsplice_hf.attend.triton.placing import addresses, hidden_among
from kvsplice_hf.attend.triton.tables import WIDTH
from kvsplice_hf.attend.triton.turning import pair_queries, turned_keys


@triton.jit
def _scales_and_centres(coordinates, n, layout, scales, centres):
    """Factor and offset from units to numbers, [D] each."""
    width = of_layout(layout, WIDTH, coordinates, n)
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
def _row_tile(
    base,
    held,
    start,
    n,
    gains,
    layout,
    levels,
    PACKED: tl.constexpr,
    PLANES: tl.constexpr,
    HAS_SECOND_GAIN: tl.constexpr,
    D: tl.constexpr,
    DTYPE,
):
    """Stored rows, or the units of packed ones, [BLOCK_S, D]; finite at rows that are not `held`."""
    if PACKED:
        tile = decoded(base, held, start, n, gains, layout, levels, PLANES, HAS_SECOND_GAIN, D, DTYPE)
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
# Long because up to three pieces of a row take part in each step, and a loop of Triton holds them in variables by name.
@triton.jit(
    do_not_specialize=[
        "count",
        "bias_batch",
        "bias_query",
        "table_stride",
        "table_slots",
        "slots_batch",
        "pages_batch",
        "page_count",
    ]
)
def attend_kernel(
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
    key_layout,
    key_weights,
    key_mean,
    pairs,
    table,
    slots,
    key_numbers,
    key_gained,
    pair_count,
    table_stride,
    table_slots,
    slots_batch,
    slots_row,
    circle,
    pages,
    pages_batch,
    page_count,
    hidden,
    hidden_count,
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
    KEY: tl.constexpr,
    KEY_CHUNK: tl.constexpr,
    PAIRS: tl.constexpr,
    KEY_PLANES: tl.constexpr,
    HAS_KEY_GAIN: tl.constexpr,
    KEY_GAINS0: tl.constexpr,
    KEY_GAINS1: tl.constexpr,
    KEY_GAINS2: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of queries [BLOCK_M, n] over one split of the rows of one batch entry.

    Writes `mixed` [B, M, splits, v], normalised over the split, and `lse` [B, M, splits]. With KEY > 0 a row ends
    with the code of a key, read with room for KEY numbers and PAIRS pairs; queries are [BLOCK_M, n + 2 F]. With
    PAGE_ROWS > 0 rows lie in pages of so many. With HIDDEN > 0 up to so many rows of an entry are left out.
    """
    batch = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    splits = tl.num_programs(2)
    query_index = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    query_held = query_index < queries
    flat_index = batch * queries + query_index

    end = count
    if HAS_LENGTHS:
        end = tl.minimum(tl.load(lengths + batch), count).to(tl.int32)
    share = tl.cdiv(tl.cdiv(end, splits), BLOCK_S) * BLOCK_S
    first = split * share
    end = tl.minimum(first + share, end)

    if KEY > 0:
        query_base = query + flat_index * (n + 2 * pair_count)
        first_query = pair_queries(query_base + n, query_held, pairs, pair_count, 0, PAIRS, DTYPE)
        second_query = pair_queries(query_base + n, query_held, pairs, pair_count, 1, PAIRS, DTYPE)
    else:
        query_base = query + flat_index * n
    at0 = columns(0, D0, PACKED)
    query0, constant = _query_tile(query_base, query_held, at0, n, layout, scales, centres, PACKED, DTYPE)
    mixed0 = tl.zeros([BLOCK_M, D0], tl.float32)
    if D1 > 0:
        at1 = columns(D0, D1, PACKED)
        query1, more = _query_tile(query_base, query_held, at1, n, layout, scales, centres, PACKED, DTYPE)
        constant += more
    if D2 > 0:
        at2 = columns(D0 + D1, D2, PACKED)
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
        # The same address, but the compiler cannot know that: it would read the table ahead of the loop, and hold it in
        # more registers than there are.
        layout_here = layout
        if PACKED:
            layout_here = layout + (start >> 30)
        base = addresses(rows, batch, row_index, held, row_batch, row_stride, pages, pages_batch, page_count, PAGE_ROWS)
        gain = tl.full([BLOCK_S], 1.0, tl.float32)
        if HAS_GAIN:
            gain = tl.load(gains + tl.load(base, mask=held, other=0).to(tl.int32))
        of_row = (gained, gain, gained, gain)
        if KEY_GAINS0 or KEY_GAINS1 or KEY_GAINS2:
            second_gain = tl.load(gains + tl.load(base + 1, mask=held, other=0).to(tl.int32))
            of_row = (gained, gain, gained + key_gained, second_gain)
        tile0 = _row_tile(base, held, 0, n, of_row, layout_here, levels, PACKED, PLANES0, KEY_GAINS0, D0, DTYPE)
        score = tl.dot(query0, tl.trans(tile0), input_precision=PRECISION)
        if D1 > 0:
            tile1 = _row_tile(base, held, D0, n, of_row, layout_here, levels, PACKED, PLANES1, KEY_GAINS1, D1, DTYPE)
            score = tl.dot(query1, tl.trans(tile1), acc=score, input_precision=PRECISION)
        if D2 > 0:
            tile2 = _row_tile(
                base, held, D0 + D1, n, of_row, layout_here, levels, PACKED, PLANES2, KEY_GAINS2, D2, DTYPE
            )
            score = tl.dot(query2, tl.trans(tile2), acc=score, input_precision=PRECISION)
        if KEY > 0:
            # Behind the product with the value: ahead of it, float32 queries are held in registers and spilled.
            slot = tl.load(slots + batch * slots_batch + row_index.to(tl.int64) * slots_row, mask=held, other=0)
            key_gain = tl.full([BLOCK_S], 1.0, tl.float32)
            if HAS_KEY_GAIN:  # behind that of the value, which such rows have
                key_gain = tl.load(gains + tl.load(base + 1, mask=held, other=0).to(tl.int32))
            of_key = (key_gained, key_gain, key_gained, key_gain)
            code = (base, held, key_numbers, of_key, key_layout + (start >> 30), levels)
            turned = (table, table_stride, table_slots, circle, slot)
            keys = turned_keys(
                code, key_weights, key_mean, pair_count, turned, KEY_PLANES, KEY, KEY_CHUNK, PAIRS, DTYPE, PRECISION
            )
            score = tl.dot(first_query, tl.trans(keys[0]), acc=score, input_precision=PRECISION)
            score = tl.dot(second_query, tl.trans(keys[1]), acc=score, input_precision=PRECISION)
        if HAS_BIAS:
            place = bias + batch * bias_batch + row_index.to(tl.int64)[None, :] * bias_key
            place += (query_index % bias_period).to(tl.int64)[:, None] * bias_query
            score += tl.load(place, mask=query_held[:, None] & held[None, :], other=0.0)
        seen = held
        if HIDDEN > 0:
            seen = held & (hidden_among(hidden + batch * hidden_count, hidden_count, row_index, HIDDEN) == 0)
        score = tl.where(seen[None, :], score, float("-inf"))

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
