"""Keys that were coded before their rotation, inside a kernel: decoded, turned, and what queries score on them.

A row's key code of p numbers is decoded to units, multiplied to the numbers before the rotation, and turned by the
angle of the row's slot, whose cosine and sine are looked up:

    first_f, second_f   =  weights_f . units + mean_f,          of pair f
    score on the key    =  query_first . (first cos - second sin)  +  query_second . (first sin + second cos)

The scales of the codec are folded into the weights, its centres into the mean (`coded_keys`). First and second numbers
are tiles of their own, so that whichever numbers a model pairs up lie in the same thread.

Legend: as in `attention`, and `P` numbers of a rotated key, `F` = P / 2 pairs, `p` numbers of a key's code.
"""
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from kvsplice_hf.attend.triton.decoding import units
from kvsplice_hf.attend.triton.tables import STEPS


@triton.jit
def pair_queries(base, held, pairs, pair_count, SECOND: tl.constexpr, F: tl.constexpr, DTYPE: tl.constexpr):
    """Queries against the first or the second numbers of all pairs, [BLOCK_M, F]; `base` is where those on keys are."""
    pair = tl.arange(0, F)
    inside = pair < pair_count
    at = tl.load(pairs + SECOND * pair_count + pair, mask=inside, other=0)
    return tl.load(base[:, None] + at[None, :], mask=held[:, None] & inside[None, :], other=0.0).to(DTYPE)


@triton.jit
def pair_weights(weights, number, key_numbers, pair_count, SECOND: tl.constexpr, F: tl.constexpr):
    """What some numbers of a key's code add to the first or the second numbers of all pairs, [D, F]."""
    pair = tl.arange(0, F)
    place = (SECOND * pair_count + pair)[None, :] * key_numbers + number[:, None]
    return tl.load(weights + place, mask=(pair < pair_count)[None, :] & (number < key_numbers)[:, None], other=0.0)


@triton.jit
def _means(mean, pair_count, SECOND: tl.constexpr, F: tl.constexpr):
    """What is added to the first or the second numbers of all pairs, [1, F]."""
    pair = tl.arange(0, F)
    return tl.load(mean + SECOND * pair_count + pair, mask=pair < pair_count, other=0.0)[None, :]


@triton.jit
def _turns(table, table_stride, table_slots, circle, slot, held, pair_count, F: tl.constexpr):
    """Cosines and sines of some rows, float32 [BLOCK_S, F] each; of angle 0 past the pairs, and where not held."""
    line = tl.arange(0, F)
    inside = held[:, None] & (line < pair_count)[None, :]
    # Whatever a slot or an angle is, nothing beside its table is read.
    slot = tl.minimum(tl.maximum(slot, 0), table_slots - 1)
    place = table + line.to(tl.int64)[None, :] * table_stride + slot[:, None]
    angle = tl.load(place, mask=inside, other=0).to(tl.int32) % STEPS
    return tl.load(circle + angle), tl.load(circle + STEPS + angle)


@triton.jit
def turned_keys(
    code,
    weights,
    mean,
    pair_count,
    turned,
    PLANES: tl.constexpr,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    F: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The first and the second numbers of all pairs of some rows' rotated keys, [BLOCK_S, F] each.

    `code` and `turned` are what is taken apart here: where key codes are, and how; and where the angles are.
    """
    base, held, key_numbers, gains, layout, levels = code
    first = tl.zeros([held.shape[0], F], tl.float32)
    second = tl.zeros([held.shape[0], F], tl.float32)
    # A few numbers at a time: each of them takes registers for its address, its code and its weights.
    for part in tl.static_range(D // CHUNK):
        number = part * CHUNK + tl.arange(0, CHUNK)
        unit = units(base, held, number, key_numbers, gains, layout, levels, PLANES, False).to(DTYPE)
        weight = pair_weights(weights, number, key_numbers, pair_count, 0, F)
        first = tl.dot(unit, weight, acc=first, input_precision=PRECISION)
        weight = pair_weights(weights, number, key_numbers, pair_count, 1, F)
        second = tl.dot(unit, weight, acc=second, input_precision=PRECISION)
    return turned_pairs(first, second, held, mean, pair_count, turned, F, DTYPE)


@triton.jit
def turned_pairs(first, second, held, mean, pair_count, turned, F: tl.constexpr, DTYPE: tl.constexpr):
    """The two numbers of all pairs of some rows' rotated keys, from what the units of their codes add up to."""
    table, table_stride, table_slots, circle, slot = turned
    first += _means(mean, pair_count, 0, F)
    second += _means(mean, pair_count, 1, F)
    cos, sin = _turns(table, table_stride, table_slots, circle, slot, held, pair_count, F)
    return (first * cos - second * sin).to(DTYPE), (first * sin + second * cos).to(DTYPE)
