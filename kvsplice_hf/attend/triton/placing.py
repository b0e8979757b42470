"""Where rows lie inside a kernel: those of a batch entry side by side, or in pages; and which of them are left out.

A table names the pages of each entry, in the order of its rows. All pages hold as many rows, and are a fixed distance
apart, which may be more than their rows take: an engine keeps other things behind them. A row begins at any byte.

Legend: as in `attention`.
"""
# mypy: allow-untyped-defs

import triton
import triton.language as tl


@triton.jit
def addresses(
    rows, batch, row_index, held, row_batch, row_stride, pages, pages_batch, page_count, PAGE_ROWS: tl.constexpr
):
    """Where some rows of a batch entry begin, [BLOCK_S].

    `row_batch` is the distance of entries, or of pages, where there are any; `pages_batch` that of lines of the table.
    """
    if PAGE_ROWS > 0:
        page = tl.load(pages + batch * pages_batch + row_index // PAGE_ROWS, mask=held, other=0).to(tl.int64)
        # Whatever the table holds, nothing beside the pages is read.
        page = tl.minimum(tl.maximum(page, 0), page_count - 1)
        base = rows + page * row_batch + (row_index % PAGE_ROWS).to(tl.int64) * row_stride
    else:
        base = rows + batch * row_batch + row_index.to(tl.int64) * row_stride
    return base


@triton.jit
def hidden_among(hidden, count, row_index, HIDDEN: tl.constexpr):
    """How many of the indices int64 [count] at `hidden` each of some rows is, int32 [BLOCK_S]."""
    at = tl.arange(0, HIDDEN)
    index = tl.load(hidden + at, mask=at < count, other=-1)
    return tl.sum((row_index[:, None] == index[None, :]).to(tl.int32), 1)
