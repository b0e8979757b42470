"""What a kernel is started with: its grid, arguments and sizes, from tensors and the limits of a device.

Calls and compilation without a device (`compilation`) make their launches here, so that what is compiled is what runs.

Legend: as in `attention`.
"""

import itertools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from kvsplice_hf.attend.backend import CodedKeys, Paging
from kvsplice_hf.attend.triton.attention import attend_kernel
from kvsplice_hf.attend.triton.blocks import Blocks, Limits, choose_blocks, choose_splits
from kvsplice_hf.attend.triton.coded_keys import key_arguments, key_settings
from kvsplice_hf.attend.triton.merging import merge_kernel
from kvsplice_hf.attend.triton.packing import pack_kernel
from kvsplice_hf.attend.triton.pieces import PIECES, pieces_of
from kvsplice_hf.attend.triton.search import STATES, WORD, search_kernel
from kvsplice_hf.attend.triton.tables import FIELDS, Tables, tables_of
from kvsplice_hf.code.codec import RowCodec
from kvsplice_hf.code.trellis import TrellisTables


DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
# Rows that a program packs, and coordinates that it packs at once. Along a trellis it packs fewer rows, with one warp:
# a step from column to column has work for no more threads, and waits for those that there are.
PACKED_ROWS = 8
_SEARCHED_ROWS = 2
_PACKED_COORDINATES = 64
# Numbers that a program of the merging kernel holds in registers.
_MERGED_AT_ONCE = 4096


class Launch(NamedTuple):
    """One start of a kernel.

    Attributes:
        kernel: of Triton.
        grid: programs in each direction.
        arguments: by position.
        settings: by name: sizes that are compiled in, warps and stages.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    settings: dict[str, Any]

    def run(self) -> None:
        """Start it on the current device."""
        self.kernel[self.grid](*self.arguments, **self.settings)


class Problem(NamedTuple):
    """What attention is asked for.

    Attributes:
        query: [B, M, n], contiguous, its factor applied; [B, M, v + P] with `keys`.
        rows: [B, S, n], or packed uint8 [B, S, row_bytes] of `codec`; those of all pages with `paging`.
        codec: None where rows are numbers.
        value_dim, bias, lengths, input_precision: see `calls.attend_rows`.
        dtype: of products.
        keys: how the keys of packed rows `[code | key code]` are read, coded before their rotation.
        paging, hidden: see `calls.attend_rows`.
    """

    query: torch.Tensor
    rows: torch.Tensor
    codec: RowCodec | None
    value_dim: int
    bias: torch.Tensor | None
    lengths: torch.Tensor | None
    dtype: torch.dtype
    input_precision: str = "ieee"
    keys: CodedKeys | None = None
    paging: Paging | None = None
    hidden: torch.Tensor | None = None

    @property
    def row_count(self) -> int:
        """S, or with pages as many rows as there may be: lengths may say of each sequence that there are fewer."""
        if self.paging is None:
            return self.rows.shape[1]
        most = self.paging.table.shape[1] * self.rows.shape[1]
        return most if self.keys is None else min(most, self.keys.slots.shape[1])

    @property
    def read_dim(self) -> int:
        """The numbers of a row that are read as they are: n, or v with `keys`."""
        return self.query.shape[-1] if self.keys is None else self.value_dim

    @property
    def tables(self) -> Tables | None:
        """Those of the codec, for what is read of its rows."""
        if self.codec is None:
            return None
        start = None if self.keys is None else self.keys.start(self.codec)
        return tables_of(self.codec, self.read_dim, start)


def blocks_for(problem: Problem, limits: Limits) -> Blocks:
    """The blocks of its attention kernel on such a device."""
    _, queries, n = problem.query.shape
    return choose_blocks(queries, n, problem.dtype, problem.codec is not None, limits)


def splits_for(problem: Problem, blocks: Blocks, limits: Limits) -> int:
    """Into how many shares its rows are divided on such a device."""
    batch, queries, _ = problem.query.shape
    return choose_splits(problem.row_count, triton.cdiv(queries, blocks.queries) * batch, blocks.rows, limits)


def attend_launch(problem: Problem, blocks: Blocks, mixed: torch.Tensor, lse: torch.Tensor) -> Launch:
    """The attention kernel, writing means [B, M, splits, v] and log-sum-exp [B, M, splits]."""
    query, rows, codec, value_dim, bias, lengths, dtype, input_precision, keys, paging, hidden = problem
    batch, queries, n = *query.shape[:2], problem.read_dim
    gained, tables = 0 if codec is None else len(codec.sigmas), problem.tables
    arguments = (
        query,
        rows,
        bias,
        lengths if paging is None else paging.lengths,
        mixed,
        lse,
        *_codec_arguments(codec, tables),
        queries,
        problem.row_count,
        n,
        value_dim,
        gained,
        rows.stride(0),
        rows.stride(1),
        *_bias_strides(bias),
        *key_arguments(keys, codec, tables, dtype),
        *_place_arguments(rows, paging, hidden),
    )
    settings = {
        "HAS_BIAS": bias is not None,
        "HAS_LENGTHS": lengths is not None or paging is not None,
        "PACKED": codec is not None,
        "HAS_GAIN": gained > 0,
        **_piece_settings(pieces_of(n, keys is not None), value_dim, codec, tables),
        **key_settings(keys, codec, tables),
        "PAGE_ROWS": 0 if paging is None else rows.shape[1],
        "HIDDEN": 0 if hidden is None else triton.next_power_of_2(hidden.shape[1]),
        "BLOCK_M": blocks.queries,
        "BLOCK_S": blocks.rows,
        "DTYPE": DTYPES[dtype],
        "PRECISION": input_precision,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }
    grid = (triton.cdiv(queries, blocks.queries), batch, lse.shape[2])
    return Launch(attend_kernel, grid, arguments, settings)


def _place_arguments(rows: torch.Tensor, paging: Paging | None, hidden: torch.Tensor | None) -> tuple[Any, ...]:
    """The kernel's arguments from `pages` on. None leaves no trace in the kernel."""
    of_pages = (None,) * 3 if paging is None else (paging.table, paging.table.stride(0), rows.shape[0])
    return *of_pages, *((None, None) if hidden is None else (hidden, hidden.shape[1]))


def merge_launch(parts: torch.Tensor, part_lse: torch.Tensor, mixed: torch.Tensor, lse: torch.Tensor) -> Launch:
    """The merging kernel, from means [B, M, splits, v] and log-sum-exp [B, M, splits] to [B, M, v] and [B, M]."""
    batch, queries, splits, value_dim = parts.shape
    shares = triton.next_power_of_2(splits)
    block = min(max(8, _MERGED_AT_ONCE // shares), 64, triton.next_power_of_2(value_dim))
    grid = (batch * queries, triton.cdiv(value_dim, block))
    arguments = (parts, part_lse, mixed, lse, splits, value_dim)
    return Launch(merge_kernel, grid, arguments, {"BLOCK_SPLITS": shares, "BLOCK_V": block})


def pack_launch(rows: torch.Tensor, packed: torch.Tensor, codec: RowCodec, most_rows: int | None = None) -> Launch:
    """The packing kernel, from rows [count, n] to bytes [count, row_bytes].

    Args:
        rows, packed: contiguous.
        codec: of the rows. Along a trellis the launch holds memory as well, `search_bytes` per row.
        most_rows: per program; or None for as many as suit a device.
    """
    tables, count = tables_of(codec), len(rows)
    members = [codec._raw, *(codec._plane(field)[0] for field in FIELDS)]
    is_trellis = tables.trellis is not None
    if most_rows is None:
        most_rows = _SEARCHED_ROWS if is_trellis else PACKED_ROWS
    block = min(most_rows, triton.next_power_of_2(count))
    arguments = (
        rows,
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
        *((codec.key_sigmas, len(codec.key_sigmas)) if len(codec.key_sigmas) else (None, None)),
        *_search_arguments(tables, count, codec.row_dim, rows.device),
    )
    settings = {
        "HAS_GAIN": len(codec.sigmas) > 0,
        "HAS_KEY_GAIN": len(codec.key_sigmas) > 0,
        "TRELLIS": is_trellis,
        "BLOCK_R": block,
        "BLOCK": _PACKED_COORDINATES,
        **({"num_warps": 1} if is_trellis else {}),
    }
    return Launch(pack_kernel, (triton.cdiv(count, block),), arguments, settings)


def search_launch(
    unit: torch.Tensor, tables: TrellisTables, codes: torch.Tensor, most_rows: int | None = None
) -> Launch:
    """The search along a trellis, from rows over their scales float32 [count, c] to codes uint8 [count, c].

    Args:
        unit, codes: contiguous.
        tables: of the columns.
        most_rows: see `pack_launch`, and there for what memory it takes.
    """
    count, size = unit.shape
    block = min(_SEARCHED_ROWS if most_rows is None else most_rows, triton.next_power_of_2(count))
    arguments = (unit, count, size, *_by_column(tables), *_search_memory(count, size, unit.device), codes)
    settings = {"BLOCK_R": block, "BLOCK": _PACKED_COORDINATES, "num_warps": 1}
    return Launch(search_kernel, (triton.cdiv(count, block),), arguments, settings)


def searched_columns(codec: RowCodec) -> int:
    """c, how many columns of a row are coded along a trellis."""
    columns = tables_of(codec).columns
    return 0 if columns is None else len(columns)


def search_bytes(size: int) -> int:
    """How much memory the search takes in passing, per row of c columns."""
    return 21 * size + 4 * STATES.value * triton.cdiv(size, WORD.value)


def _search_arguments(tables: Tables, count: int, n: int, device: torch.device) -> tuple[Any, ...]:
    """The packing kernel's arguments from `columns` on, of `count` rows of n numbers."""
    columns, trellis = tables.columns, tables.trellis
    if columns is None or trellis is None:
        return (None,) * 14
    codes = torch.empty(count, n, dtype=torch.uint8, device=device)
    return columns, *tables.chains, *_by_column(trellis), *_search_memory(count, len(columns), device), codes


def _by_column(tables: TrellisTables) -> tuple[torch.Tensor, ...]:
    """In the order of the kernels' arguments."""
    grids = (tables.reaches, tables.slopes, tables.starts)
    return *grids, tables.weights, tables.widths, tables.first_level, tables.levels


def _search_memory(count: int, size: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Room for errors, level numbers, and where paths come from; see `search`."""
    return (
        torch.empty(count, size, 4, dtype=torch.float32, device=device),
        torch.empty(count, size, 4, dtype=torch.uint8, device=device),
        torch.empty(count, triton.cdiv(size, WORD.value), STATES.value, dtype=torch.int32, device=device),
    )


def _codec_arguments(codec: RowCodec | None, tables: Tables | None) -> tuple[torch.Tensor | None, ...]:
    if codec is None or tables is None:
        return (None,) * 5
    return tables.layout, codec.scales, codec.centres, codec._levels, tables.gains


def _piece_settings(
    pieces: tuple[int, ...], value_dim: int, codec: RowCodec | None, tables: Tables | None
) -> dict[str, Any]:
    planes = (0,) * PIECES if tables is None else tables.planes
    settings: dict[str, Any] = {f"D{index}": piece for index, piece in enumerate(pieces)}
    settings |= {f"PLANES{index}": plane for index, plane in enumerate(planes)}
    key_gained = range(0) if codec is None else range(len(codec.sigmas), value_dim if len(codec.key_sigmas) else 0)
    ends = itertools.accumulate(pieces)
    settings |= {f"KEY_GAINS{i}": len(key_gained) > 0 and end > key_gained.start for i, end in enumerate(ends)}
    # What only scores (the rotated key) needs no mean.
    return settings | {f"VALUES{i}": pieces[i] > 0 and sum(pieces[:i]) < value_dim for i in range(1, PIECES)}


def _bias_strides(bias: torch.Tensor | None) -> tuple[int, int, int, int]:
    """Strides over batch, queries and keys, and the number of queries after which the bias repeats."""
    if bias is None:
        return 0, 0, 0, 1
    batch, queries, keys = bias.stride()
    return batch if bias.shape[0] > 1 else 0, queries, keys, bias.shape[1]
