"""What is handed to the C++ code: the structures of `csrc`.

All their fields have eight bytes: counts, flags and addresses, with 0 for none, and now and then a float. They are
packed by `struct`, because a step of a model builds two of them per layer: `ctypes.Structure` looks every field up in a
table, which takes several times as long where what it looks up has left the processor's caches since the last layer.
"""

import functools
import struct
from typing import Any, NamedTuple, NoReturn, get_type_hints

import torch

from kvsplice_hf.errors import ConfigError


# `RowKind` of csrc/rows.h.
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}


class Codec(NamedTuple):
    """`Codec` of csrc/packed.h."""

    coded: int
    raw: int
    gained: int
    key_gained: int
    gained_raw: int
    has_gain: int
    has_key_gain: int
    row_bytes: int
    trellis: int
    fields: int
    slopes: int
    starts: int
    reaches: int
    gains: int
    index_: int  # a tuple has an `index` of its own
    scales: int
    centres: int
    widths: int


class Numbers(NamedTuple):
    """`Numbers` of csrc/weights.h."""

    data: int
    is_bfloat16: int


class Keys(NamedTuple):
    """`Keys` of csrc/keys.h."""

    dim: int
    rank: int
    start: int
    expand: Numbers
    mean: Numbers
    pairs: int
    table: int
    table_stride: int
    table_slots: int
    slots: int
    slots_stride: int
    room: int
    turns: int = 0


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
    pages: int
    pages_stride: int
    page_rows: int
    page_stride: int
    lengths: int
    query: int
    query_stride: int
    unscored: int
    scaling: float
    bias: int
    bias_queries: int
    bias_batch_stride: int
    bias_query_stride: int
    columns: int
    mixed: int
    column_scales: int
    codec: Codec
    keys: Keys
    splits: int
    threads: int
    hidden: int
    hidden_count: int
    output: int
    sizes: int
    room: int = 0


class Transform(NamedTuple):
    """`Transform` of csrc/transform.h."""

    scale: Numbers
    shift: Numbers
    offset: Numbers
    is_ready: int = 0


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


class Trellis(NamedTuple):
    """`Trellis` of csrc/trellis.h."""

    columns: int
    reaches: int
    slopes: int
    starts: int
    weights: int
    widths: int


class Search(NamedTuple):
    """`Search` of csrc/trellis.h."""

    count_: int  # as with `index_`
    units: int
    trellis: Trellis
    codes: int
    threads: int
    room: int = 0


class Packer(NamedTuple):
    """`Packer` of csrc/pack.h."""

    codec: Codec
    sized: int
    sigmas: int
    key_sized: int
    key_sigmas: int
    bends: int
    numbers: int
    first_chain: Trellis
    second_chain: Trellis


class Packing(NamedTuple):
    """`Packing` of csrc/pack.h."""

    count_: int  # as with `index_`
    dim: int
    rows: int
    packed: int
    packer: Packer
    threads: int
    room: int = 0


class KeyCoding(NamedTuple):
    """`KeyCoding` of csrc/encode.h."""

    rank: int
    compress: Numbers
    mean: Numbers
    pairs: int
    turns: int
    turned: int


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
    expand: Numbers
    predicted: int
    keys: KeyCoding
    kind: int
    packer: Packer
    rows: int
    threads: int
    room: int = 0


class Head(NamedTuple):
    """`Head` of csrc/heads.h."""

    coding: Encoding
    keys: Keys
    columns: int
    mixed: int
    first_byte: int
    prepared: int = 0


class HeadsDecoding(NamedTuple):
    """`HeadsDecoding` of csrc/heads.h."""

    count_: int  # as with `index_`
    heads: int
    in_bf16: int
    batch: int
    queries: int
    rows: int
    value: int
    key: int
    data: int
    batch_stride: int
    row_stride: int
    pages: int
    pages_stride: int
    page_rows: int
    page_stride: int
    lengths: int
    query: int
    scaling: float
    bias: int
    bias_batch_stride: int
    table: int
    table_stride: int
    table_slots: int
    slots: int
    slots_stride: int
    splits: int
    threads: int
    hidden: int
    hidden_count: int
    exact: int
    exact_is_bfloat16: int
    sinks: int
    output: int
    room: int = 0


class HeadsEncoding(NamedTuple):
    """`HeadsEncoding` of csrc/heads.h."""

    count_: int  # as with `index_`
    heads: int
    in_bf16: int
    batch: int
    tokens: int
    values: int
    values_are_bfloat16: int
    keys: int
    keys_are_bfloat16: int
    values_from_sequence: int
    values_from_head: int
    values_from_token: int
    keys_from_sequence: int
    keys_from_head: int
    keys_from_token: int
    turns: int
    turns_stride: int
    rows: int
    row_bytes: int
    threads: int


class HeadsReading(NamedTuple):
    """`HeadsReading` of csrc/read_heads.h."""

    stored: HeadsDecoding
    keys: Numbers
    values: Numbers
    room: int = 0


NO_CODEC = Codec(*[0] * len(Codec._fields))
NO_TRELLIS = Trellis(*[0] * len(Trellis._fields))
NO_PACKER = Packer(NO_CODEC, 0, 0, 0, 0, 0, 0, NO_TRELLIS, NO_TRELLIS)
NO_NUMBERS = Numbers(0, 0)
NO_KEYS = Keys(0, 0, 0, NO_NUMBERS, NO_NUMBERS, 0, 0, 0, 0, 0, 0, 0)
NO_STEP = HeadsDecoding(*[0] * (len(HeadsDecoding._fields) - 1))
NO_KEY_CODING = KeyCoding(0, NO_NUMBERS, NO_NUMBERS, 0, 0, 0)


def as_bytes(given: Any) -> bytes:
    """A structure as it lies in memory."""
    layout, is_flat = _layout(given.__class__)
    if is_flat:  # as those of the steps of a model are
        return layout.pack(*given)
    values: list[int | float] = []
    _flatten(given, values)
    return layout.pack(*values)


def _flatten(given: tuple[Any, ...], values: list[int | float]) -> None:
    for value in given:
        if isinstance(value, tuple):
            _flatten(value, values)
        else:
            values.append(value)


@functools.cache
def _layout(structure: type) -> tuple[struct.Struct, bool]:
    """How a structure lies in memory, and whether none of its fields is a structure."""
    kinds = get_type_hints(structure).values()
    return struct.Struct(_format(structure)), all(kind in (int, float) for kind in kinds)


def _format(kind: Any) -> str:
    if kind in (int, float):
        return "q" if kind is int else "d"
    return "".join(map(_format, get_type_hints(kind).values()))


def address(tensor: torch.Tensor | None, dtype: torch.dtype, count: int) -> int:
    """Where a tensor begins of which the library reads `count` values of a dtype, one after the other; 0 for none.

    Raises:
        ConfigError: it is anything else.
    """
    if tensor is None:
        return 0
    if tensor.dtype is not dtype or not _lies_ready(tensor, count):
        _refuse(tensor, f"{count} values of {dtype}")
    return tensor.data_ptr()


def numbers_of(tensor: torch.Tensor | None, count: int) -> Numbers:
    """A tensor of which the library reads `count` numbers, float32 or bfloat16, one after the other; or none.

    Raises:
        ConfigError: it is anything else.
    """
    if tensor is None:
        return NO_NUMBERS
    if tensor.dtype not in _NUMBERS or not _lies_ready(tensor, count):
        _refuse(tensor, f"{count} numbers, float32 or bfloat16")
    return Numbers(tensor.data_ptr(), int(tensor.dtype is torch.bfloat16))


_NUMBERS = (torch.float32, torch.bfloat16)


def _lies_ready(tensor: torch.Tensor, count: int) -> bool:
    return tensor.is_cpu and tensor.numel() == count and tensor.is_contiguous()


def _refuse(tensor: torch.Tensor, needed: str) -> NoReturn:
    raise ConfigError(
        f"Got {tensor.dtype} {list(tensor.shape)} on {tensor.device} with strides {tensor.stride()}; the library reads "
        f"{needed}, side by side in the memory of the CPU."
    )
