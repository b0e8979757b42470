"""What the attention kernel is handed of keys that were coded before their rotation: arguments and sizes.

Legend: as in `turning`.
"""

from typing import Any

import torch

from kvsplice_hf.attend.backend import CodedKeys
from kvsplice_hf.attend.triton.pieces import side_of
from kvsplice_hf.attend.triton.tables import Tables, circle_on
from kvsplice_hf.code.codec import RowCodec


# None leaves no trace in the kernel of rows without such keys.
_NO_ARGUMENTS: tuple[None, ...] = (None,) * 14
# Numbers of a key's code that are decoded at once: with more of them, more is spilled on AMD (docs/kernels.md).
_DECODED_AT_ONCE = 32
_NO_SETTINGS = {"KEY": 0, "KEY_CHUNK": 0, "PAIRS": 0, "KEY_PLANES": 0, "HAS_KEY_GAIN": False}


def key_arguments(
    keys: CodedKeys | None, codec: RowCodec | None, tables: Tables | None, dtype: torch.dtype
) -> tuple[Any, ...]:
    """The kernel's arguments from `key_layout` on.

    Args:
        keys: or None where rows hold no such keys.
        codec, tables: of the rows; not None where `keys` is not.
        dtype: of products.
    """
    if keys is None:
        return _NO_ARGUMENTS
    assert codec is not None
    assert tables is not None
    weights, mean = folded_weights(keys, codec)
    return (
        tables.key_layout,
        weights.to(dtype),
        mean,
        keys.pairs,
        keys.table,
        keys.slots,
        keys.expand.shape[1],
        len(codec.key_sigmas),
        keys.pairs.shape[1],
        keys.table.stride(0),
        keys.table.shape[1],
        *keys.slots.stride(),
        circle_on(keys.table.device),
    )


def key_settings(keys: CodedKeys | None, codec: RowCodec | None, tables: Tables | None) -> dict[str, Any]:
    """The sizes that are compiled in; arguments as in `key_arguments`."""
    if keys is None:
        return _NO_SETTINGS
    assert codec is not None
    assert tables is not None
    return {
        "KEY": side_of(keys.expand.shape[1]),
        "KEY_CHUNK": min(side_of(keys.expand.shape[1]), _DECODED_AT_ONCE),
        "PAIRS": side_of(keys.pairs.shape[1]),
        "KEY_PLANES": tables.key_planes,
        "HAS_KEY_GAIN": len(codec.key_sigmas) > 0,
    }


def folded_weights(keys: CodedKeys, codec: RowCodec) -> tuple[torch.Tensor, torch.Tensor]:
    """What units of a key's code are multiplied by, float32 [P, p], and what is added, [P].

    First numbers of all pairs, then second ones. Scales and centres of the codec are part of them; a coordinate of
    width 0 has the unit 0, so that nothing but its centre counts.
    """
    start = keys.start(codec)
    widths, scales = codec.widths[start:], codec.scales.detach()[start:]
    # A codec does not say anything about the scales of the others.
    scales = torch.where((widths > 0) & (widths < 16), scales, 1.0)
    expand = keys.expand.detach().float()[keys.pairs[:2].reshape(-1)]
    mean = keys.mean.detach().float()[keys.pairs[:2].reshape(-1)]
    # No matrix product, which would be rounded as the process has it set, or cast under autocast.
    return expand * scales, mean + (expand * codec.base[start:]).sum(-1)
