"""What is run of the Triton kernels: attention straight on stored rows, plain or packed, and packing in one pass.

Nothing imports this module by itself, since it needs triton. On the CPU the kernels run only under the interpreter of
triton, for tests: `TRITON_INTERPRET=1`, set before triton is first imported (importing torch or transformers may do
so).

Legend: `B` batch, `M` queries, heads and tokens together, `S` stored rows, `n` numbers of a row, `v` of a value.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl

from kvsplice_hf.attend.backend import CodedKeys, HeadRows, Paging
from kvsplice_hf.attend.triton.attention import attend_kernel
from kvsplice_hf.attend.triton.blocks import limits_of
from kvsplice_hf.attend.triton.checks import check_keys, check_shapes
from kvsplice_hf.attend.triton.head_checks import check_call
from kvsplice_hf.attend.triton.head_launch import (
    attend_heads_launch,
    head_blocks_for,
    head_problem,
    head_splits_for,
)
from kvsplice_hf.attend.triton.launch import (
    Problem,
    attend_launch,
    blocks_for,
    merge_launch,
    pack_launch,
    search_bytes,
    search_launch,
    searched_columns,
    splits_for,
)
from kvsplice_hf.attend.triton.pieces import WIDEST_HEAD, WIDEST_KEY
from kvsplice_hf.code.codec import RowCodec
from kvsplice_hf.code.trellis import TrellisTables
from kvsplice_hf.errors import ConfigError, UnsupportedError


# Of the packing kernel in the interpreter, which pays for programs, not for numbers.
_INTERPRETED_ROWS = 64
# Memory that the search along a trellis takes in passing.
_MOST_BYTES = 64 << 20


def interpreted() -> bool:
    """Whether the kernels run in the interpreter of triton."""
    # Functions that were imported before the variable was set are compiled ones, and the two do not mix.
    return not any(isinstance(function, triton.JITFunction) for function in (attend_kernel, tl.sum))


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
    paging: Paging | None = None,
    hidden: torch.Tensor | None = None,
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
        paging: where each batch entry has its rows, if `rows` are those of all pages, [pages, rows of a page, n], pages
            any distance apart. There is no bias then, and no `lengths`. A page that is not there is read as the nearest
            one.
        hidden: indices of rows that are left out, int64 [B, K]; others than those of rows are none. Or None.

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
    check_shapes(query, rows, query.shape[-1], value_dim, bias, splits, lengths, input_precision, paging, hidden)
    dtype = query.dtype if query.dtype == rows.dtype else torch.float32
    problem = Problem(
        _scaled(query, scaling),
        rows.detach(),
        None,
        value_dim,
        bias,
        lengths,
        dtype,
        input_precision,
        paging=paging,
        hidden=hidden,
    )
    return _attend(problem, splits)


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
    keys: CodedKeys | None = None,
    paging: Paging | None = None,
    hidden: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend_rows` on rows that `codec` packed, without unpacking them in memory.

    Args:
        query: [B, M, n]; [B, M, v + P] with `keys`, the last P numbers rotated. Products are taken in its type.
        packed: uint8 [B, S, row_bytes], the last dimension contiguous. The others may have any strides.
        codec: the codec of the rows, on the same device.
        value_dim, bias, splits, scaling, lengths, input_precision, paging, hidden: see `attend_rows`.
        keys: how the keys of rows `[code | key code]` are read, where they were coded before their rotation. value_dim
            is the numbers of the code, or n: the key's code is then part of the values as well. At most 128 numbers of
            a key; the table's lines are contiguous, slots may have any strides. A slot beside the table reads its first
            or last one. With pages, there are as many slots as the longest sequence has rows.

    Returns:
        As `attend_rows`, of `codec.unpack(packed)`.

    Raises:
        ConfigError: shapes, dtypes or strides other than these, or rows of another codec.
        UnsupportedError: a CPU tensor outside the interpreter, or one that needs gradients.
    """
    _check_device(query)
    query_dim = codec.row_dim
    if keys is not None:
        query_dim += keys.expand.shape[0] - (keys.expand.shape[-1] if value_dim < codec.row_dim else 0)
    if packed.dtype != torch.uint8 or query.shape[-1] != query_dim:
        raise ConfigError(
            f"Got packed rows of {packed.dtype} and queries of {query.shape[-1]} numbers; this codec needs torch.uint8 "
            f"and {query_dim}."
        )
    check_shapes(query, packed, codec.row_bytes, value_dim, bias, splits, lengths, input_precision, paging, hidden)
    check_keys(keys, packed, codec, value_dim, paging=paging)
    query = _scaled(query, scaling)
    problem = Problem(
        query, packed, codec, value_dim, bias, lengths, query.dtype, input_precision, keys, paging, hidden
    )
    return _attend(problem, splits)


def attend_heads(
    query: torch.Tensor,
    heads: Sequence[HeadRows],
    bias: torch.Tensor | None = None,
    splits: int | None = None,
    *,
    scaling: float | None = None,
    input_precision: str = "ieee",
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Attention of one token per sequence over the keys of all heads of a layer, in one launch, and one that merges.

    Args:
        query: rotated, [B, H, d], the G = H / K queries of a key head side by side. Products are taken in its type.
        heads: the packed rows of each of K key heads: views of the layer's rows, side by side, with one table of angles
            and one tensor of slots. Keys were coded before their rotation, and have at most 256 numbers, 128 in
            float32. The codecs are of one kind, and may differ in widths and sizes. What is made of them is kept, and
            made anew when their tensors change.
        bias: added to the scores of all heads, float32 [B or 1, S], any strides.
        splits, scaling, input_precision: see `attend_rows`.

    Returns:
        Of each head the weighted means of what its values are decoded from, float32 [B, G, value_dim], and the natural
        log-sum-exp of its scores, float32 [B, G]. Without any row they are 0 and -inf.

    Raises:
        ConfigError: shapes, dtypes or strides other than these, or rows of other codecs.
        UnsupportedError: a CPU tensor outside the interpreter, or one that needs gradients.
    """
    _check_device(query)
    check_call(query, heads, bias)
    if splits is not None and splits < 1:
        raise ConfigError(f"Got {splits} splits; at least one is needed.")
    # The interpreter computes wrong numbers in bf16 and slow ones in fp16.
    dtype = torch.float32 if interpreted() else query.dtype
    if dtype == torch.float32 and query.shape[2] > WIDEST_KEY and not interpreted():
        raise ConfigError(
            f"Got float32 queries of {query.shape[2]} numbers; in float32 the kernel of all key heads reads keys of at "
            f"most {WIDEST_KEY}, and of {WIDEST_HEAD} in 16 bits. Run the model in bfloat16, or let PyTorch serve."
        )
    problem = head_problem(_scaled(query, scaling), heads, bias, dtype, input_precision)
    (batch, queries, _), device = query.shape, query.device
    mixed_width = problem.tables.mixed_width
    if batch * queries * problem.rows.shape[1] == 0:
        mixed = torch.zeros(batch, queries, mixed_width, dtype=torch.float32, device=device)
        lse = torch.full((batch, queries), float("-inf"), dtype=torch.float32, device=device)
    else:
        limits = limits_of(device)
        blocks = head_blocks_for(problem, limits)
        splits = head_splits_for(problem, blocks, limits) if splits is None else splits
        parts = torch.empty(batch, queries, splits, mixed_width, dtype=torch.float32, device=device)
        part_lse = torch.empty(batch, queries, splits, dtype=torch.float32, device=device)
        with _on(device):
            attend_heads_launch(problem, blocks, limits, parts, part_lse).run()
            mixed, lse = _merged(parts, part_lse)
    of_heads = zip(heads, mixed.chunk(len(heads), dim=1), lse.chunk(len(heads), dim=1), strict=True)
    return [(part[..., : head.value_dim], own_lse) for head, part, own_lse in of_heads]


def encode_pack(rows: torch.Tensor, codec: RowCodec) -> torch.Tensor:
    """`codec.pack(rows)` in one kernel: uint8 [..., row_bytes] of rows [..., n], of any float type.

    Its logarithms are not those of torch to the last bit, so about one code in a million, at the border of two cells,
    comes out as the other, and about one gain in as many. Of rows along a trellis all codes may be others then, which
    err as little.

    Raises:
        ConfigError: rows of other than n numbers.
        UnsupportedError: a CPU tensor outside the interpreter.
    """
    _check_device(rows, gradients=True)
    if rows.shape[-1] != codec.row_dim:
        raise ConfigError(f"Got rows of {rows.shape[-1]} numbers; this codec packs rows of {codec.row_dim}.")
    flat = rows.detach().reshape(-1, codec.row_dim).contiguous()
    packed = torch.empty(len(flat), codec.row_bytes, dtype=torch.uint8, device=rows.device)
    if packed.numel():
        at_once = _rows_at_once(searched_columns(codec))
        with _on(rows.device):
            for part, out in zip(flat.split(at_once), packed.split(at_once), strict=True):
                pack_launch(part, out, codec, _most_rows()).run()
    return packed.view(*rows.shape[:-1], codec.row_bytes)


def search_codes(unit: torch.Tensor, tables: TrellisTables) -> torch.Tensor:
    """`closest_codes(unit, tables)` in one kernel: uint8 [T, c] of float32 [T, c].

    Raises:
        UnsupportedError: a CPU tensor outside the interpreter.
    """
    _check_device(unit, gradients=True)
    unit = unit.detach().float().contiguous()
    codes = torch.empty(unit.shape, dtype=torch.uint8, device=unit.device)
    if codes.numel():
        at_once = _rows_at_once(unit.shape[1])
        with _on(unit.device):
            for part, out in zip(unit.split(at_once), codes.split(at_once), strict=True):
                search_launch(part, tables, out, _most_rows()).run()
    return codes


def _most_rows() -> int | None:
    return _INTERPRETED_ROWS if interpreted() else None


def _rows_at_once(columns: int) -> int:
    """How many rows of so many columns of a trellis are searched at once; any number without one."""
    return max(1, _MOST_BYTES // max(1, search_bytes(columns)))


def _scaled(query: torch.Tensor, scaling: float | None) -> torch.Tensor:
    query = query.detach()
    return (query if scaling is None else query * scaling).contiguous()


def _attend(problem: Problem, splits: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    query, value_dim = problem.query, problem.value_dim
    batch, queries, _ = query.shape
    device = query.device
    if batch * queries * problem.row_count == 0:
        mixed = torch.zeros(batch, queries, value_dim, dtype=torch.float32, device=device)
        return mixed, torch.full((batch, queries), float("-inf"), dtype=torch.float32, device=device)
    if interpreted():  # it computes wrong numbers in bf16 and slow ones in fp16
        problem = problem._replace(dtype=torch.float32)
    limits = limits_of(device)
    blocks = blocks_for(problem, limits)
    splits = splits_for(problem, blocks, limits) if splits is None else splits
    mixed = torch.empty(batch, queries, splits, value_dim, dtype=torch.float32, device=device)
    lse = torch.empty(batch, queries, splits, dtype=torch.float32, device=device)
    with _on(device):
        attend_launch(problem, blocks, mixed, lse).run()
        return _merged(mixed, lse)


def _merged(parts: torch.Tensor, part_lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Means [B, M, v] and log-sum-exp [B, M] of all rows from those of the splits, [B, M, splits, v] and so on."""
    batch, queries, splits, value_dim = parts.shape
    if splits == 1:
        return parts[:, :, 0], part_lse[:, :, 0]
    mixed, lse = parts.new_empty(batch, queries, value_dim), parts.new_empty(batch, queries)
    merge_launch(parts, part_lse, mixed, lse).run()
    return mixed, lse


def _on(device: torch.device) -> AbstractContextManager[Any]:
    # triton launches on the current device, whatever the tensors' is
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


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
