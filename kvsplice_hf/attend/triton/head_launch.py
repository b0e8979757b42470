"""What the kernel of ordinary attention is started with, from tensors and the limits of a device; see `launch`.

Legend: as in `heads`, and `H` = K G.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton

from kvsplice_hf.attend.backend import CodedKeys, HeadRows
from kvsplice_hf.attend.triton.blocks import Blocks, Limits, choose_head_blocks, choose_splits, keeps_weights
from kvsplice_hf.attend.triton.head_checks import check_heads
from kvsplice_hf.attend.triton.head_tables import HeadTables, head_tables
from kvsplice_hf.attend.triton.heads import attend_heads_kernel
from kvsplice_hf.attend.triton.launch import DTYPES, Launch
from kvsplice_hf.attend.triton.pieces import side_of
from kvsplice_hf.attend.triton.tables import circle_on


# Numbers of a key's code that are decoded at once, if that makes no more chunks than these.
_DECODED_AT_ONCE, _MOST_CHUNKS = 32, 4


class HeadProblem(NamedTuple):
    """What attention over the keys of a layer is asked for.

    Attributes:
        query: [B, H, d], contiguous, its factor applied.
        heads: the rows of each key head, checked.
        bias: float32 [B or 1, S], or None.
        dtype: of products.
        input_precision: see `calls.attend_rows`.
        tables: those of the heads.
    """

    query: torch.Tensor
    heads: Sequence[HeadRows]
    bias: torch.Tensor | None
    dtype: torch.dtype
    input_precision: str
    tables: HeadTables

    @property
    def keys(self) -> CodedKeys:
        """Of the first head; table and slots are those of all."""
        keys = self.heads[0].keys
        assert keys is not None
        return keys

    @property
    def rows(self) -> torch.Tensor:
        """The layer's rows from the first byte of the first head on, [B, S, bytes of that]."""
        return self.heads[0].rows

    @property
    def group(self) -> int:
        """G."""
        return self.query.shape[1] // len(self.heads)


def head_problem(
    query: torch.Tensor,
    heads: Sequence[HeadRows],
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    input_precision: str = "ieee",
) -> HeadProblem:
    """A problem with the tables of its heads, which are looked up once per call.

    Raises:
        ConfigError: the heads are not what the kernel reads.
    """
    tables = head_tables(heads, dtype, lambda: check_heads(heads))
    return HeadProblem(query, heads, bias, dtype, input_precision, tables)


def head_blocks_for(problem: HeadProblem, limits: Limits) -> Blocks:
    """The blocks of its kernel on such a device."""
    tables = problem.tables
    widest = max(side_of(tables.layout.shape[2]), side_of(tables.key_layout.shape[2]))
    return choose_head_blocks(widest, problem.dtype, limits)


def head_splits_for(problem: HeadProblem, blocks: Blocks, limits: Limits) -> int:
    """Into how many shares its rows are divided on such a device."""
    programs = triton.cdiv(problem.group, blocks.queries) * len(problem.heads) * problem.query.shape[0]
    return choose_splits(problem.rows.shape[1], programs, blocks.rows, limits)


def attend_heads_launch(
    problem: HeadProblem, blocks: Blocks, limits: Limits, mixed: torch.Tensor, lse: torch.Tensor
) -> Launch:
    """The kernel on such a device, writing means [B, H, splits, V] and log-sum-exp [B, H, splits]."""
    tables, keys, rows, bias = problem.tables, problem.keys, problem.rows, problem.bias
    width, key_width = tables.layout.shape[2], tables.key_layout.shape[2]
    pair_count = tables.pairs.shape[2]
    arguments = (
        problem.query,
        rows,
        bias,
        mixed,
        lse,
        tables.heads,
        tables.layout,
        tables.key_layout,
        tables.factors,
        tables.offsets,
        tables.key_factors,
        tables.key_offsets,
        tables.weights,
        tables.mean,
        tables.pairs,
        tables.levels,
        tables.gains,
        keys.table,
        keys.slots,
        circle_on(keys.table.device),
        len(problem.heads),
        problem.group,
        rows.shape[1],
        width,
        key_width,
        tables.mixed_width,
        pair_count,
        rows.stride(0),
        rows.stride(1),
        0 if bias is None or bias.shape[0] == 1 else bias.stride(0),
        0 if bias is None else bias.stride(1),
        keys.table.stride(0),
        keys.table.shape[1],
        *keys.slots.stride(),
    )
    groups = triton.cdiv(problem.group, blocks.queries)
    grid = (groups * len(problem.heads), problem.query.shape[0], lse.shape[2])
    return Launch(attend_heads_kernel, grid, arguments, _settings(problem, blocks, limits))


def _settings(problem: HeadProblem, blocks: Blocks, limits: Limits) -> dict[str, Any]:
    """The sizes that are compiled in."""
    tables = problem.tables
    width, key_width, pair_count = tables.layout.shape[2], tables.key_layout.shape[2], tables.pairs.shape[2]
    return {
        "HAS_BIAS": problem.bias is not None,
        "HAS_GAIN": tables.has_gain,
        "HAS_KEY_GAIN": tables.has_key_gain,
        "MIX_KEYS": tables.mixes_keys,
        "D": side_of(width),
        "PLANES": tables.planes,
        "KEY": side_of(key_width),
        "KEY_CHUNKS": min(max(1, side_of(key_width) // _DECODED_AT_ONCE), _MOST_CHUNKS),
        "KEEP_WEIGHTS": keeps_weights(pair_count, key_width, problem.dtype, limits),
        "KEY_PLANES": tables.key_planes,
        "PAIRS": side_of(pair_count),
        "BLOCK_M": blocks.queries,
        "BLOCK_S": blocks.rows,
        "DTYPE": DTYPES[problem.dtype],
        "PRECISION": problem.input_precision,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }
