"""What is handed to the C++ code: the structures of `csrc`, and what fills them from tensors.

All their fields have eight bytes: counts, flags and addresses, with 0 for none, and now and then a float. They are
packed by `struct`, because a step of a model builds two of them per layer: `ctypes.Structure` looks every field up in a
table, which takes several times as long where what it looks up has left the processor's caches since the last layer.
"""

import functools
import operator
import struct
import weakref
from typing import Any, NamedTuple, NoReturn, get_type_hints

import torch

from kvsplice_hf.code.codec import RowCodec, gain_factors
from kvsplice_hf.code.layout import NUMBERS_PER_COLUMN
from kvsplice_hf.code.trellis import TrellisCodec, TrellisTables
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


class Strides(NamedTuple):
    """Of sequences, heads and tokens."""

    sequence: int
    head: int
    token: int


class HeadsEncoding(NamedTuple):
    """`HeadsEncoding` of csrc/heads.h."""

    count_: int  # as with `index_`
    heads: int
    in_bf16: int
    batch: int
    tokens: int
    values: Numbers
    keys: Numbers
    value_strides: Strides
    key_strides: Strides
    turns: int
    turns_stride: int
    rows: int
    row_bytes: int
    threads: int


_NO_CODEC = Codec(*[0] * len(Codec._fields))
_NO_TRELLIS = Trellis(*[0] * len(Trellis._fields))
_NO_PACKER = Packer(_NO_CODEC, 0, 0, 0, 0, 0, 0, _NO_TRELLIS, _NO_TRELLIS)
NO_NUMBERS = Numbers(0, 0)
NO_KEYS = Keys(0, 0, 0, NO_NUMBERS, NO_NUMBERS, 0, 0, 0, 0, 0, 0, 0)
NO_KEY_CODING = KeyCoding(0, NO_NUMBERS, NO_NUMBERS, 0, 0, 0)


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


class _Tables(NamedTuple):
    """The tables of a codec that were looked at, and what they are to the library."""

    tensors: tuple[torch.Tensor, ...]
    addresses: tuple[int, ...]
    packer: Packer


# By codec. What lies at an address is checked once, and again when there is another tensor or it lies elsewhere.
_tables: "weakref.WeakKeyDictionary[RowCodec, _Tables]" = weakref.WeakKeyDictionary()
# Buffers of a codec that the library reads, and what they are. (Scales and centres may be parameters.)
_TABLES = {
    "column_fields": torch.int32,
    "column_slopes": torch.float32,
    "column_starts": torch.float32,
    "column_reaches": torch.float32,
    "column_index": torch.int64,
    "scales": torch.float32,
    "centres": torch.float32,
    "widths": torch.uint8,
    "sigmas": torch.float32,
    "key_sigmas": torch.float32,
    "_bends": torch.float32,
}
# Further ones of a codec with a trellis.
_CHAIN = {
    "chain_reaches": torch.float32,
    "chain_slopes": torch.float32,
    "chain_starts": torch.float32,
    "chain_weights": torch.float32,
    "chain_widths": torch.uint8,
}
_ALL_TABLES = _TABLES | _CHAIN


def codec_of(codec: RowCodec | None) -> Codec:
    """The tables of a codec, or none.

    Raises:
        ConfigError: they are not what a codec makes.
    """
    return _NO_CODEC if codec is None else packer_of(codec).codec


def packer_of(codec: RowCodec | None) -> Packer:
    """The tables of a codec, those for packing included; or none.

    Raises:
        ConfigError: they are not what a codec makes.
    """
    if codec is None:
        return _NO_PACKER
    # Past the lookup of attributes in modules, which is slow.
    held = {**codec._buffers, **codec._parameters}
    names = _ALL_TABLES if isinstance(codec, TrellisCodec) else _TABLES
    tensors: Any = tuple([held[name] for name in names])
    addresses = tuple([tensor.data_ptr() for tensor in tensors])
    known = _tables.get(codec)
    if known is None or known.addresses != addresses or any(map(operator.is_not, known.tensors, tensors)):
        known = _tables[codec] = _Tables(tensors, addresses, _look_at(codec, dict(zip(names, tensors, strict=True))))
    return known.packer


def _look_at(codec: RowCodec, tables: dict[str, torch.Tensor]) -> Packer:
    coded, columns, size = len(tables["column_starts"]), len(tables["column_index"]), len(tables["widths"])
    sized, key_sized = len(tables["sigmas"]), len(tables["key_sigmas"])
    counts = {"column_fields": coded * NUMBERS_PER_COLUMN, "column_index": columns}
    counts |= {"sigmas": sized, "key_sigmas": key_sized}
    counts |= dict.fromkeys(("column_slopes", "column_starts", "column_reaches"), coded)
    counts |= {name: len(tables[name]) for name in _CHAIN if name in tables}
    counts |= dict.fromkeys(("scales", "centres", "widths", "_bends"), size)
    at = {name: address(tensor, _ALL_TABLES[name], counts[name]) for name, tensor in tables.items()}
    chains = [_NO_TRELLIS] * 2
    if isinstance(codec, TrellisCodec):
        sizes = [part.stop - part.start for part in codec.chains]
        chains = [trellis_of(codec.trellis_tables(chain), size) for chain, size in enumerate(sizes)]
    seen = Codec(
        coded=coded,
        raw=columns - coded,
        gained=codec.gained_columns if sized else 0,
        key_gained=codec.key_gained_columns if key_sized else 0,
        gained_raw=codec.gained_raw,
        has_gain=sized > 0,
        has_key_gain=key_sized > 0,
        row_bytes=codec.row_bytes,
        trellis=isinstance(codec, TrellisCodec),
        fields=at["column_fields"],
        slopes=at["column_slopes"],
        starts=at["column_starts"],
        reaches=at["column_reaches"],
        gains=address(_gains(), torch.float32, 256),
        index_=at["column_index"],
        scales=at["scales"],
        centres=at["centres"],
        widths=at["widths"],
    )
    return Packer(seen, sized, at["sigmas"], key_sized, at["key_sigmas"], at["_bends"], size, *chains)


def trellis_of(tables: TrellisTables, columns: int) -> Trellis:
    """What a search reads.

    Raises:
        ConfigError: the tables are not what a codec makes.
    """
    floats = (tables.reaches, tables.slopes, tables.starts, tables.weights)
    at = [address(table, torch.float32, len(tables.widths)) for table in floats]
    return Trellis._make([columns, *at, address(tables.widths, torch.uint8, len(tables.widths))])


@functools.cache
def _gains() -> torch.Tensor:
    with torch.inference_mode(False):
        return gain_factors(torch.arange(256, dtype=torch.uint8, device="cpu"))
