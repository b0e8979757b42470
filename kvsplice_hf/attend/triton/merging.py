"""The merging kernel: what the splits of the rows gave, put together.

Legend: as in `attention`.
"""
# mypy: allow-untyped-defs

import triton
import triton.language as tl


@triton.jit
def merge_kernel(parts, part_lse, mixed, lse, splits, value_dim, BLOCK_SPLITS: tl.constexpr, BLOCK_V: tl.constexpr):
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
