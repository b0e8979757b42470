"""What is handed to the C++ code: the structures of `csrc`, and what fills them from tensors.

All their fields have eight bytes: counts, flags and addresses, with 0 for none, and now and then a float. They are
packed by `struct`, because a step of a model builds two of them per layer: `ctypes.Structure` looks every field up in a
table, which takes several times as long where what it looks up has left the processor's caches since the last layer.
"""

import functools
import struct
from typing import Any, NamedTuple, get_type_hints

import torch

from kvsplice_hf.codec import RowCodec, gain_factors
from kvsplice_hf.errors import ConfigError


# `RowKind` of csrc/rows.h.
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}


class Codec(NamedTuple):
    """`Codec` of csrc/packed.h."""

    coded: int
    raw: int
    gained: int
    has_gain: int
    row_bytes: int
    fields: int
    slopes: int
    starts: int
    reaches: int
    gains: int
    index_: int  # a tuple has an `index` of its own
    scales: int
    centres: int
    widths: int


class Problem(NamedTuple):
    """`Problem` of csrc/rows.h."""

    batch: int
    queries: int
    rows: int
    dim: int
    values: int
    kind: int
    in_bf16: int
    data: int
    batch_stride: int
    row_stride: int
    query: int
    scaling: float
    bias: int
    bias_queries: int
    bias_batch_stride: int
    bias_query_stride: int
    columns: int
    mixed: int
    codec: Codec
    splits: int
    threads: int
    hidden: int
    hidden_count: int
    output: int
    sizes: int
    room: int = 0


class Numbers(NamedTuple):
    """`Numbers` of csrc/weights.h."""

    data: int
    is_bfloat16: int


class Transform(NamedTuple):
    """`Transform` of csrc/transform.h."""

    scale: Numbers
    shift: Numbers
    offset: Numbers


class Decoding(NamedTuple):
    """`Decoding` of csrc/decode.h."""

    rows: Problem
    latent: int
    rank: int
    rotated: int
    nope: int
    value: int
    query: int
    weight: Numbers
    expand: Numbers
    transform: Transform
    exact: Numbers
    sinks: int
    output: int
    room: int = 0


class Packer(NamedTuple):
    """`Packer` of csrc/pack.h."""

    codec: Codec
    sized: int
    sigmas: int
    bends: int


class Packing(NamedTuple):
    """`Packing` of csrc/pack.h."""

    count_: int  # as with `index_`
    dim: int
    rows: int
    packed: int
    packer: Packer
    threads: int


class Encoding(NamedTuple):
    """`Encoding` of csrc/encode.h."""

    tokens: int
    latent: int
    rank: int
    rotated: int
    latents: Numbers
    rotations: Numbers
    transform: Transform
    compress: Numbers
    kind: int
    packer: Packer
    rows: int
    threads: int
    room: int = 0


_NO_CODEC = Codec(*[0] * len(Codec._fields))
_NO_PACKER = Packer(_NO_CODEC, 0, 0, 0)
_NO_NUMBERS = Numbers(0, 0)


def as_bytes(given: Any) -> bytes:
    """A structure as it lies in memory."""
    values: list[int | float] = []
    _flatten(given, values)
    return _layout(given.__class__).pack(*values)


def _flatten(given: tuple[Any, ...], values: list[int | float]) -> None:
    for value in given:
        if isinstance(value, tuple):
            _flatten(value, values)
        else:
            values.append(value)


@functools.cache
def _layout(structure: type) -> struct.Struct:
    return struct.Struct(_format(structure))


def _format(kind: Any) -> str:
    if kind in (int, float):
        return "q" if kind is int else "d"
    return "".join(map(_format, get_type_hints(kind).values()))


def address(tensor: torch.Tensor | None) -> int:
    """Where a contiguous tensor begins; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def numbers_of(tensor: torch.Tensor | None) -> Numbers:
    """A contiguous tensor of numbers, or none.

    Raises:
        ConfigError: a dtype that the library does not read.
    """
    if tensor is None:
        return _NO_NUMBERS
    if tensor.dtype is torch.float32:
        return Numbers(tensor.data_ptr(), 0)
    if tensor.dtype is torch.bfloat16:
        return Numbers(tensor.data_ptr(), 1)
    raise ConfigError(f"Got {tensor.dtype}; the library reads float32 and bfloat16.")


def codec_of(codec: RowCodec | None) -> Codec:
    """The tables of a codec, or none."""
    if codec is None:
        return _NO_CODEC
    has_gain = len(codec.sigmas) > 0
    coded = len(codec.column_starts)
    return Codec(
        coded=coded,
        raw=len(codec.column_index) - coded,
        gained=codec.gained_columns if has_gain else 0,
        has_gain=has_gain,
        row_bytes=codec.row_bytes,
        fields=codec.column_fields.data_ptr(),
        slopes=codec.column_slopes.data_ptr(),
        starts=codec.column_starts.data_ptr(),
        reaches=codec.column_reaches.data_ptr(),
        gains=_gains().data_ptr(),
        index_=codec.column_index.data_ptr(),
        scales=codec.scales.data_ptr(),
        centres=codec.centres.data_ptr(),
        widths=codec.widths.data_ptr(),
    )


def packer_of(codec: RowCodec | None) -> Packer:
    """The tables of a codec, those for packing included; or none."""
    if codec is None:
        return _NO_PACKER
    return Packer(codec_of(codec), len(codec.sigmas), codec.sigmas.data_ptr(), codec._bends.data_ptr())


@functools.cache
def _gains() -> torch.Tensor:
    return gain_factors(torch.arange(256))
