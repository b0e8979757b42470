"""Rows of ordinary attention read back by the C++ code: what a prompt attends to with the stock attention function.

Legend: `B` sequences, `K` key heads, `S` stored rows, `d`, `v` numbers of a key and of a value.
"""

import torch

from kvsplice_hf.attend.native import types
from kvsplice_hf.attend.native.calls import require_library
from kvsplice_hf.attend.native.heads import PreparedHeads, heads_in_memory, keys_of_rows, lie_as_rows, run_heads
from kvsplice_hf.attend.native.problems import threads_for
from kvsplice_hf.errors import ConfigError


def read_heads(
    known: PreparedHeads, rows: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor] | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [B, K, S, d] and values [B, K, S, v] of rows [B, 1, S, bytes]; sums are float32.

    Args:
        known: of the key heads.
        rows: as stored.
        turns: the table and the slots of `backend.CodedKeys`, where keys were coded before their rotation.
        dtype: of the result, float32 or bf16.

    Raises:
        ConfigError: shapes, dtypes or strides other than these.
        UnsupportedError: the library is not there.
    """
    library = require_library()
    if len(known.sizes) != 1 or dtype not in _WRITTEN or not lie_as_rows(rows, known):
        raise ConfigError(
            f"Got rows {list(rows.shape)} in {rows.dtype} on {rows.device}, to be read as {dtype}, of "
            f"{len(known.heads)} key heads of {sorted(known.sizes)} numbers (values, keys); the library reads rows of "
            f"{known.row_bytes} bytes side by side, as float32 or bf16."
        )
    ((value, key),), count = known.sizes, len(known.heads)
    batch, _, stored, _ = rows.shape
    turned = keys_of_rows(batch, stored, turns, known)
    keys, values = (torch.empty(batch, count, stored, width, dtype=dtype, device="cpu") for width in (key, value))
    is_bfloat16 = int(dtype is torch.bfloat16)
    given = types.HeadsReading(
        stored=types.NO_STEP._replace(
            count_=count,
            heads=heads_in_memory(known, False),
            batch=batch,
            rows=stored,
            value=value,
            key=key,
            data=rows.data_ptr(),
            batch_stride=rows.stride(0),
            row_stride=rows.stride(2),
            table=turned.table,
            table_stride=turned.table_stride,
            table_slots=turned.table_slots,
            slots=turned.slots,
            slots_stride=turned.slots_stride,
            threads=threads_for(batch * stored * (known.key_products + count * value * known.columns)),
        ),
        keys=types.Numbers(keys.data_ptr(), is_bfloat16),
        values=types.Numbers(values.data_ptr(), is_bfloat16),
    )
    run_heads(library.kvsplice_read_heads, known, False, given)
    return keys, values


_WRITTEN = (torch.float32, torch.bfloat16)
