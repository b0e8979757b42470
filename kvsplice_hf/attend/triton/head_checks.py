"""What the attention kernel of ordinary attention takes: shapes, dtypes and strides.

Legend: as in `heads`, and `H` = K G.
"""

from collections.abc import Sequence

import torch

from kvsplice_hf.attend.backend import HeadRows
from kvsplice_hf.attend.triton.checks import MOST_ROWS, check_keys
from kvsplice_hf.attend.triton.pieces import WIDEST, WIDEST_HEAD
from kvsplice_hf.code.codec import RowCodec
from kvsplice_hf.errors import ConfigError


def check_heads(heads: Sequence[HeadRows]) -> None:
    """Refuse heads that the kernel does not read, by what stays the same from call to call, and by their rows.

    Raises:
        ConfigError: codecs of several kinds or of others than `RowCodec` and its own, keys that were not coded before
            their rotation, or what `checks.check_keys` does not let pass.
    """
    first, keys = heads[0].codec, heads[0].keys
    for number, head in enumerate(heads):
        if not isinstance(head.codec, RowCodec) or head.keys is None:
            raise ConfigError(
                f"Got key head {number} with rows of the codec {head.codec.kind!r} and "
                f"{'no ' if head.keys is None else ''}keys that were coded before their rotation; the kernel of all "
                "heads needs such keys and a RowCodec. Call `attend` for each head."
            )
        if head.codec.kind != first.kind:
            raise ConfigError(f"Got rows of the codecs {first.kind!r} and {head.codec.kind!r} in a layer; needed one.")
        assert keys is not None
        if head.keys.expand.shape[0] != keys.expand.shape[0]:
            raise ConfigError(
                f"Got keys of {keys.expand.shape[0]} and {head.keys.expand.shape[0]} numbers in a layer; needed the "
                "same of all heads."
            )
        check_keys(head.keys, head.rows, head.codec, head.value_dim, WIDEST_HEAD)
        if not 0 < head.keys.start(head.codec) <= WIDEST:
            raise ConfigError(
                f"Got a value's code of {head.keys.start(head.codec)} numbers; the kernel reads 1 to {WIDEST}."
            )


def check_call(query: torch.Tensor, heads: Sequence[HeadRows], bias: torch.Tensor | None) -> None:
    """Refuse what may differ from call to call of the same layer.

    Raises:
        ConfigError: shapes, dtypes, strides or devices other than those of `calls.attend_heads`.
    """
    if query.dim() != 3 or not query.is_floating_point() or not heads or query.shape[1] % len(heads):
        raise ConfigError(
            f"Got queries {query.dtype} {list(query.shape)} for {len(heads)} key heads; needed floats [B, H, d], H a "
            "multiple of the key heads."
        )
    rows, keys, place = heads[0].rows, heads[0].keys, heads[0].rows.data_ptr()
    if keys is None or not isinstance(heads[0].codec, RowCodec):
        check_heads(heads)
    assert keys is not None
    assert isinstance(heads[0].codec, RowCodec)
    if query.shape[2] != keys.expand.shape[0]:
        raise ConfigError(f"Got queries of {query.shape[2]} numbers for keys of {keys.expand.shape[0]}.")
    if rows.dim() != 3 or rows.shape[0] != query.shape[0] or rows.shape[1] > MOST_ROWS:
        raise ConfigError(
            f"Got rows {list(rows.shape)} for queries {list(query.shape)}; needed [{query.shape[0]}, S, bytes], S at "
            f"most {MOST_ROWS}."
        )
    check_keys(keys, rows, heads[0].codec, heads[0].value_dim, WIDEST_HEAD)
    for number, head in enumerate(heads):
        own, size = head.rows, getattr(head.codec, "row_bytes", None)
        if own.dtype != torch.uint8 or own.shape != (*rows.shape[:2], size):
            raise ConfigError(
                f"Got rows {own.dtype} {list(own.shape)} of key head {number}; its codec and the first head need "
                f"torch.uint8 {[*rows.shape[:2], size]}."
            )
        is_apart = own.stride() != rows.stride() or (own.shape[2] > 1 and own.stride(2) != 1)
        if own.numel() and (is_apart or own.data_ptr() != place):
            raise ConfigError(
                f"Got rows of key head {number} that do not lie beside those of the heads before it; needed views of "
                "the rows of a layer, such as `rows.split(sizes, dim=-1)` gives."
            )
        place += own.shape[2]
        if head.keys is not None and (head.keys.table is not keys.table or head.keys.slots is not keys.slots):
            raise ConfigError(f"Got another table of angles, or other slots, for key head {number}; needed the same.")
    if bias is not None and (bias.dtype != torch.float32 or bias.shape not in ((1, rows.shape[1]), rows.shape[:2])):
        raise ConfigError(
            f"Got a bias {bias.dtype} {list(bias.shape)}; needed float32 [{rows.shape[0]} or 1, {rows.shape[1]}]."
        )
