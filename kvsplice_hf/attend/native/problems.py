"""A call of attention as the C++ code takes it, and over how many threads it is spread.

Legend: as in `attend.backend`.
"""

import torch

from kvsplice_hf.attend.backend import CodedKeys, Paging
from kvsplice_hf.attend.native import types
from kvsplice_hf.attend.native.keys import columns_of, keys_of
from kvsplice_hf.attend.native.tables import codec_of
from kvsplice_hf.code.codec import RowCodec
from kvsplice_hf.errors import ConfigError


# Parts per thread that the rows are split into, so that a thread that is held up leaves the others something to do; and
# rows below which a part is not worth its share of the work around it.
_PARTS_PER_THREAD = 2
_SMALLEST_PART = 128
# Products that are worth waking another thread for.
_PRODUCTS_PER_THREAD = 1 << 17


def problem_of(
    rows: torch.Tensor,
    codec: RowCodec | None,
    batch: int,
    queries: int,
    dim: int,
    value_dim: int,
    bias: torch.Tensor | None,
    scaling: float,
    *,
    in_bf16: bool,
    keys: CodedKeys | None = None,
    hidden: torch.Tensor | None = None,
    paging: Paging | None = None,
    other_products: int = 0,
    query: int = 0,
    output: int = 0,
    sizes: int = 0,
) -> types.Problem:
    """Rows are [B, S, n] or [B, 1, S, n], or those of all pages; `other_products` are worth threads as well."""
    count = rows.shape[-2] if paging is None else longest_of(paging, rows, bias, batch)
    _require_rows(rows, batch, paging)
    columns, mixed = (dim, value_dim) if codec is None else columns_of(codec, keys, value_dim)
    products = batch * queries * count * (columns + mixed)
    return types.Problem(
        batch=batch,
        queries=queries,
        rows=count,
        dim=dim,
        values=value_dim,
        kind=types.KINDS[rows.dtype],
        in_bf16=in_bf16,
        data=rows.data_ptr(),
        batch_stride=rows.stride(0) * rows.itemsize,
        row_stride=rows.stride(-2) * rows.itemsize,
        **pages_of(rows, paging),
        query=query,
        query_stride=queries * dim,
        unscored=0,
        scaling=scaling,
        bias=0 if bias is None else bias.data_ptr(),  # float32, with strides; see `read_in_order`
        bias_queries=1 if bias is None else bias.shape[1],
        bias_batch_stride=0 if bias is None or bias.shape[0] == 1 else bias.stride(0),
        bias_query_stride=0 if bias is None else bias.stride(1),
        columns=columns,
        mixed=mixed,
        column_scales=0,
        codec=codec_of(codec),
        keys=keys_of(keys, codec, batch, count, dim, value_dim),
        splits=splits_for(threads_for(products), batch, count),
        threads=max(threads_for(products), threads_for(other_products)),
        hidden=types.address(hidden, torch.int64, 0 if hidden is None else batch * hidden.shape[1]),
        hidden_count=0 if hidden is None else hidden.shape[1],
        output=output,
        sizes=sizes,
    )


def _require_rows(rows: torch.Tensor, batch: int, paging: Paging | None) -> None:
    """Refuse rows that lie in another way than the library reads."""
    one_head = rows.dim() == 3 or (rows.dim() == 4 and rows.shape[1] == 1)
    side_by_side = rows.stride(-1) == 1 or rows.shape[-1] == 1
    if not (one_head and side_by_side and rows.is_cpu and (paging is not None or rows.shape[0] == batch)):
        raise ConfigError(
            f"Got rows {list(rows.shape)} on {rows.device} with strides {rows.stride()} for {batch} sequences of "
            "queries; the library reads rows of numbers side by side in the memory of the CPU."
        )


def pages_of(rows: torch.Tensor, paging: Paging | None) -> dict[str, int]:
    """Where sequences have their rows, as the library takes it."""
    return {
        "pages": 0 if paging is None else paging.table.data_ptr(),
        "pages_stride": 0 if paging is None else paging.table.stride(0),
        "page_rows": rows.shape[-2],
        "page_stride": rows.stride(0) * rows.itemsize,
        "lengths": 0 if paging is None else paging.lengths.data_ptr(),
    }


def longest_of(paging: Paging, rows: torch.Tensor, bias: torch.Tensor | None, batch: int) -> int:
    """How many rows the longest sequence has.

    Raises:
        ConfigError: a sequence has pages that are not there, or tensors are of other kinds.
    """
    table, lengths = paging
    fits = table.dim() == 2 and lengths.shape == table.shape[:1] == (batch,) and table.shape[1] > 0
    fits = fits and table.dtype is lengths.dtype is torch.int64 and table.is_cpu and lengths.is_cpu
    fits = fits and lengths.is_contiguous() and table.stride(1) == 1 and rows.dim() == 3 and bias is None
    if not (fits and rows.dtype is torch.uint8):
        raise ConfigError(
            f"Got pages {list(rows.shape)}, {rows.dtype}, with a table {list(table.shape)}, {table.dtype}, and lengths "
            f"{list(lengths.shape)}, {lengths.dtype}, for {batch} sequences; the library reads packed rows, by int64 "
            "tables in the memory of the CPU, and takes no bias with them."
        )
    shortest, longest = (int(end) for end in lengths.aminmax())
    first, last = (int(end) for end in table.aminmax())
    if shortest < 1 or longest > table.shape[1] * rows.shape[1] or first < 0 or last >= rows.shape[0]:
        raise ConfigError(
            f"Got sequences of {shortest} to {longest} rows on pages {first} to {last}; there are {rows.shape[0]}, "
            f"each of {rows.shape[1]} rows, and the table has {table.shape[1]} of them for each sequence."
        )
    return longest


def threads_for(products: int) -> int:
    return max(1, min(torch.get_num_threads(), products // _PRODUCTS_PER_THREAD))


def splits_for(threads: int, parts: int, rows: int) -> int:
    """How many times so many rows are split, of which there are so many parts anyhow."""
    return max(1, min(-(-_PARTS_PER_THREAD * threads // parts), rows // _SMALLEST_PART))


def read_in_order(bias: torch.Tensor | None, rows: torch.Tensor, queries: int) -> torch.Tensor | None:
    """The bias with its keys side by side.

    Raises:
        ConfigError: it does not fit.
    """
    if bias is None:
        return None
    if bias.dim() != 3 or bias.shape[0] not in (1, rows.shape[0]) or bias.shape[2] != rows.shape[-2]:
        raise ConfigError(f"Got a bias {list(bias.shape)} for rows {list(rows.shape)}; it must be [B or 1, T, S].")
    if queries % bias.shape[1]:
        raise ConfigError(f"Got a bias for {bias.shape[1]} tokens and {queries} queries; these must be a multiple.")
    if not bias.is_cpu:
        raise ConfigError(f"Got a bias on {bias.device}; the library reads the memory of the CPU.")
    bias = bias.float()
    return bias if bias.stride(-1) == 1 else bias.contiguous()
