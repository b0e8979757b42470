"""The structures that are handed to the C++ code, field by field as in `csrc`, and what fills them from tensors."""

import ctypes
import functools

import torch

from kvsplice_hf.codec import RowCodec, gain_factors
from kvsplice_hf.errors import ConfigError


# `RowKind` of csrc/attend.h.
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


def _sizes(names: str) -> list[tuple[str, type]]:
    return _fields(ctypes.c_int64, names)


def _addresses(names: str) -> list[tuple[str, type]]:
    return _fields(ctypes.c_void_p, names)


class Codec(ctypes.Structure):
    """`Codec` of csrc/packed.h."""

    _fields_ = [
        *_sizes("coded raw gained has_gain row_bytes"),
        *_addresses("fields slopes starts reaches gains index scales centres widths"),
    ]


class Problem(ctypes.Structure):
    """`Problem` of csrc/attend.h."""

    _fields_ = [
        *_sizes("batch queries rows dim values kind"),
        *_addresses("data"),
        *_sizes("batch_stride row_stride"),
        *_addresses("query"),
        ("scaling", ctypes.c_double),
        *_addresses("bias"),
        *_sizes("bias_queries bias_batch_stride bias_query_stride columns mixed"),
        ("codec", Codec),
        *_sizes("splits threads"),
        *_addresses("hidden"),
        *_sizes("hidden_count"),
        *_addresses("room output sizes"),
    ]


class Numbers(ctypes.Structure):
    """`Numbers` of csrc/weights.h."""

    _fields_ = [*_addresses("data"), *_sizes("is_bfloat16")]


class Transform(ctypes.Structure):
    """`Transform` of csrc/transform.h."""

    _fields_ = _fields(Numbers, "scale shift offset")


class Decoding(ctypes.Structure):
    """`Decoding` of csrc/decode.h."""

    _fields_ = [
        ("rows", Problem),
        *_sizes("latent rank rotated nope value"),
        *_addresses("query"),
        *_fields(Numbers, "weight expand"),
        ("transform", Transform),
        ("exact", Numbers),
        *_addresses("sinks room output"),
    ]


class Packer(ctypes.Structure):
    """`Packer` of csrc/pack.h."""

    _fields_ = [("codec", Codec), *_sizes("sized"), *_addresses("sigmas bends")]


class Packing(ctypes.Structure):
    """`Packing` of csrc/pack.h."""

    _fields_ = [*_sizes("count dim"), *_addresses("rows packed"), ("packer", Packer), *_sizes("threads")]


class Encoding(ctypes.Structure):
    """`Encoding` of csrc/encode.h."""

    _fields_ = [
        *_sizes("tokens latent rank rotated"),
        *_fields(Numbers, "latents rotations"),
        ("transform", Transform),
        ("compress", Numbers),
        *_sizes("kind"),
        ("packer", Packer),
        *_addresses("rows"),
        *_sizes("threads"),
        *_addresses("room"),
    ]


def address(tensor: torch.Tensor | None) -> int | None:
    """Where a contiguous tensor begins."""
    return None if tensor is None else tensor.data_ptr()


def numbers_of(tensor: torch.Tensor | None) -> Numbers:
    """A contiguous tensor of numbers, or none.

    Raises:
        ConfigError: a dtype that the library does not read.
    """
    if tensor is None:
        return Numbers()
    if tensor.dtype not in (torch.float32, torch.bfloat16):
        raise ConfigError(f"Got {tensor.dtype}; the library reads float32 and bfloat16.")
    return Numbers(tensor.data_ptr(), tensor.dtype == torch.bfloat16)


def described(codec: RowCodec) -> Codec:
    """The tables of a codec."""
    has_gain = len(codec.sigmas) > 0
    tables = (
        codec.column_fields,
        codec.column_slopes,
        codec.column_starts,
        codec.column_reaches,
        _gains(),
        codec.column_index,
        codec.scales,
        codec.centres,
        codec.widths,
    )
    coded = len(codec.column_starts)
    raw = len(codec.column_index) - coded
    return Codec(
        coded,
        raw,
        codec.gained_columns if has_gain else 0,
        has_gain,
        codec.row_bytes,
        *map(torch.Tensor.data_ptr, tables),
    )


def packer(codec: RowCodec) -> Packer:
    """The tables of a codec, those for packing included."""
    return Packer(described(codec), len(codec.sigmas), codec.sigmas.data_ptr(), codec._bends.data_ptr())


@functools.cache
def _gains() -> torch.Tensor:
    return gain_factors(torch.arange(256))
