"""The attention kernel of ordinary attention: all key heads of a layer in one launch.

A row of a layer is the rows of its key heads side by side, `[gains | code of the value | code of the key]` each. G
queries of one token read those of one head. A program takes the queries of one key head through a share ("split") of
the rows, with a running softmax; `merging` puts the splits together. Of each row the code of its key is decoded once.
A matrix product makes it a key, which is turned by the angle of the row's slot and scored (`turning`). Then the
value's code is mixed, which no query meets, and that of the key as well where values are predicted from it.

Heads differ in widths and ranks. What is looked up is stacked with room for the largest of them (`head_tables`);
what a head does not have is of width 0, and reads as 0.

Legend: `B` batch, `S` stored rows, `K` key heads, `G` queries of a key head, `d` numbers of a key, `F` = d / 2 pairs,
`r` numbers of a value's code, `p` of a key's, `V` room for r and p of any head.
"""
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from kvsplice_hf.attend.triton.decoding import columns, decoded, join, units
from kvsplice_hf.attend.triton.head_tables import (
    ENTRIES_OF_HEAD,
    FIRST_BYTE,
    GAINED,
    KEY_GAINED,
    MIXED_KEY_NUMBERS,
    NUMBERS,
)
from kvsplice_hf.attend.triton.tables import ENTRIES
from kvsplice_hf.attend.triton.turning import pair_queries, pair_weights, turned_pairs


_ENTRIES = tl.constexpr(ENTRIES)


@triton.jit
def _gains_of(base, held, gained, gains):
    """The gain of each row, [BLOCK_S], from the byte at `base`; 1 where the head has none."""
    has_one = held & (gained > 0)
    gain = tl.load(gains + tl.load(base, mask=has_one, other=0).to(tl.int32))
    return tl.where(has_one, gain, 1.0)


@triton.jit
def _key_chunk(
    chunk,
    code,
    weights,
    key_width,
    pair_count,
    sums,
    PLANES: tl.constexpr,
    CHUNK: tl.constexpr,
    F: tl.constexpr,
    DTYPE,
    PRECISION: tl.constexpr,
):
    """Some numbers of keys' codes, [BLOCK_S, CHUNK], and what all pairs add up to with them, twice [BLOCK_S, F]."""
    base, held, gains, layout, levels = code
    first, second = sums
    number = chunk * CHUNK + tl.arange(0, CHUNK)
    unit = units(base, held, number, key_width, gains, layout, levels, PLANES, False).to(DTYPE)
    weight = pair_weights(weights, number, key_width, pair_count, 0, F)
    first = tl.dot(unit, weight, acc=first, input_precision=PRECISION)
    weight = pair_weights(weights, number, key_width, pair_count, 1, F)
    second = tl.dot(unit, weight, acc=second, input_precision=PRECISION)
    return unit, (first, second)


@triton.jit
def _key_codes(
    code,
    weights,
    key_width,
    pair_count,
    PLANES: tl.constexpr,
    KEY: tl.constexpr,
    CHUNKS: tl.constexpr,
    F: tl.constexpr,
    DTYPE,
    PRECISION: tl.constexpr,
):
    """Keys' codes, [BLOCK_S, KEY], number i of chunk j as column `i * CHUNKS + j`; and sums as of `_key_chunk`.

    In chunks, since a thread holds several addresses and a weight for each number while it decodes it.
    """
    CHUNK: tl.constexpr = KEY // CHUNKS
    zero = tl.zeros([code[1].shape[0], F], tl.float32)
    tile, sums = _key_chunk(0, code, weights, key_width, pair_count, (zero, zero), PLANES, CHUNK, F, DTYPE, PRECISION)
    if CHUNKS == 2:
        other, sums = _key_chunk(1, code, weights, key_width, pair_count, sums, PLANES, CHUNK, F, DTYPE, PRECISION)
        tile = join(tile, other)
    if CHUNKS == 4:
        second, sums = _key_chunk(1, code, weights, key_width, pair_count, sums, PLANES, CHUNK, F, DTYPE, PRECISION)
        third, sums = _key_chunk(2, code, weights, key_width, pair_count, sums, PLANES, CHUNK, F, DTYPE, PRECISION)
        fourth, sums = _key_chunk(3, code, weights, key_width, pair_count, sums, PLANES, CHUNK, F, DTYPE, PRECISION)
        tile = join(join(tile, third), join(second, fourth))
    return tile, sums


@triton.jit
def _store(base, held, number, count, mixed, total, factors, offsets):
    """Write weighted means [BLOCK_M, D] of units as those of numbers; 0 where there was no row to average."""
    inside = number < count
    factor = tl.load(factors + number, mask=inside, other=0.0)
    offset = tl.load(offsets + number, mask=inside, other=0.0)
    seen = (total > 0)[:, None]
    mixed = mixed / tl.where(seen, total[:, None], 1.0)
    mixed = tl.where(seen, mixed * factor[None, :] + offset[None, :], 0.0)
    tl.store(base[:, None] + number[None, :], mixed, mask=held[:, None] & inside[None, :])


# Numbers that grow from step to step must not compile the kernel anew whenever one of them is divisible by 16.
# Long because a loop of Triton holds its tiles in variables by name, and cannot hand them all to a function.
@triton.jit(do_not_specialize=["count", "bias_batch", "table_stride", "table_slots", "slots_batch"])
def attend_heads_kernel(
    query,
    rows,
    bias,
    mixed,
    lse,
    heads,
    layout,
    key_layout,
    factors,
    offsets,
    key_factors,
    key_offsets,
    key_weights,
    key_mean,
    pairs,
    levels,
    gains,
    table,
    slots,
    circle,
    key_heads,
    group,
    count,
    width,
    key_width,
    mixed_width,
    pair_count,
    row_batch,
    row_stride,
    bias_batch,
    bias_key,
    table_stride,
    table_slots,
    slots_batch,
    slots_row,
    HAS_BIAS: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    HAS_KEY_GAIN: tl.constexpr,
    MIX_KEYS: tl.constexpr,
    D: tl.constexpr,
    PLANES: tl.constexpr,
    KEY: tl.constexpr,
    KEY_CHUNKS: tl.constexpr,
    KEY_PLANES: tl.constexpr,
    KEEP_WEIGHTS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of the queries of one key head, [BLOCK_M, d], over one split of the rows of one batch entry.

    Writes `mixed` [B, K G, splits, V], normalised over the split, and `lse` [B, K G, splits].
    """
    batch = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    splits = tl.num_programs(2)
    blocks = tl.cdiv(group, BLOCK_M)
    head = tl.program_id(0) // blocks
    member = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    query_held = member < group
    flat_index = (batch * key_heads + head) * group + member
    of_head = heads + head * ENTRIES_OF_HEAD
    first_byte = tl.load(of_head + FIRST_BYTE)
    gained = tl.load(of_head + GAINED)
    key_gained = tl.load(of_head + KEY_GAINED)
    layout += head * _ENTRIES * width
    key_layout += head * _ENTRIES * key_width
    key_weights += head * 2 * pair_count * key_width
    key_mean += head * 2 * pair_count
    pairs += head * 2 * pair_count

    share = tl.cdiv(tl.cdiv(count, splits), BLOCK_S) * BLOCK_S
    first = split * share
    end = tl.minimum(first + share, count)

    query_base = query + flat_index * (2 * pair_count)
    first_query = pair_queries(query_base, query_held, pairs, pair_count, 0, PAIRS, DTYPE)
    second_query = pair_queries(query_base, query_held, pairs, pair_count, 1, PAIRS, DTYPE)
    mixed_values = tl.zeros([BLOCK_M, D], tl.float32)
    if MIX_KEYS:
        mixed_keys = tl.zeros([BLOCK_M, KEY], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    for start in range(first, end, BLOCK_S):
        row_index = start + tl.arange(0, BLOCK_S)
        held = row_index < end
        # The same addresses, but the compiler cannot know that: it would read the tables ahead of the loop, and hold
        # them in more registers than there are.
        layout_here, key_layout_here = layout + (start >> 30), key_layout + (start >> 30)
        base = rows + batch * row_batch + row_index.to(tl.int64) * row_stride + first_byte
        key_gain = tl.full([BLOCK_S], 1.0, tl.float32)
        if HAS_KEY_GAIN:  # behind that of the value, which such rows have
            key_gain = _gains_of(base + 1, held, key_gained, gains)
        of_key = (key_gained, key_gain, key_gained, key_gain)
        weights_here = key_weights
        if not KEEP_WEIGHTS:
            weights_here = key_weights + (start >> 30)
        of_code = (base, held, of_key, key_layout_here, levels)
        code, sums = _key_codes(
            of_code, weights_here, key_width, pair_count, KEY_PLANES, KEY, KEY_CHUNKS, PAIRS, DTYPE, PRECISION
        )
        slot = tl.load(slots + batch * slots_batch + row_index.to(tl.int64) * slots_row, mask=held, other=0)
        turned = (table, table_stride, table_slots, circle, slot)
        keys = turned_pairs(sums[0], sums[1], held, key_mean, pair_count, turned, PAIRS, DTYPE)
        score = tl.dot(first_query, tl.trans(keys[0]), input_precision=PRECISION)
        score = tl.dot(second_query, tl.trans(keys[1]), acc=score, input_precision=PRECISION)
        if HAS_BIAS:
            place = bias + batch * bias_batch + row_index.to(tl.int64) * bias_key
            score += tl.load(place, mask=held, other=0.0)[None, :]
        score = tl.where(held[None, :], score, float("-inf"))

        higher = tl.maximum(top, tl.max(score, 1))
        # A program of no rows must not subtract infinity from infinity.
        base_score = tl.where(higher == float("-inf"), 0.0, higher)
        share_of_row = tl.exp(score - base_score[:, None])
        fade = tl.exp(top - base_score)
        total = total * fade + tl.sum(share_of_row, 1)
        top = higher
        share_of_row = share_of_row.to(DTYPE)
        gain = tl.full([BLOCK_S], 1.0, tl.float32)
        if HAS_GAIN:
            gain = _gains_of(base, held, gained, gains)
        tile = decoded(base, held, 0, width, (gained, gain, gained, gain), layout_here, levels, PLANES, False, D, DTYPE)
        mixed_values = tl.dot(share_of_row, tile, acc=mixed_values * fade[:, None], input_precision=PRECISION)
        if MIX_KEYS:
            mixed_keys = tl.dot(share_of_row, code, acc=mixed_keys * fade[:, None], input_precision=PRECISION)

    place = flat_index * splits + split
    tl.store(lse + place, top + tl.log(tl.where(total > 0, total, 1.0)), mask=query_held)
    out = mixed + place * mixed_width
    numbers = tl.load(of_head + NUMBERS)
    at = columns(0, D, True)
    _store(out, query_held, at, numbers, mixed_values, total, factors + head * width, offsets + head * width)
    if MIX_KEYS:
        number = tl.arange(0, KEY)
        number = number % KEY_CHUNKS * (KEY // KEY_CHUNKS) + number // KEY_CHUNKS
        count_mixed = tl.load(of_head + MIXED_KEY_NUMBERS)
        factors_of_key, offsets_of_key = key_factors + head * key_width, key_offsets + head * key_width
        _store(out + numbers, query_held, number, count_mixed, mixed_keys, total, factors_of_key, offsets_of_key)
