"""The tables of a codec, as the C++ code takes them."""

import functools
import operator
import weakref
from typing import Any, NamedTuple

import torch

from kvsplice_hf.attend.native import types
from kvsplice_hf.code.codec import RowCodec, gain_factors
from kvsplice_hf.code.layout import NUMBERS_PER_COLUMN
from kvsplice_hf.code.trellis import TrellisCodec, TrellisTables


class _Tables(NamedTuple):
    """The tables of a codec that were looked at, and what they are to the library."""

    tensors: tuple[torch.Tensor, ...]
    addresses: tuple[int, ...]
    packer: types.Packer


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


def codec_of(codec: RowCodec | None) -> types.Codec:
    """The tables of a codec, or none.

    Raises:
        ConfigError: they are not what a codec makes.
    """
    return types.NO_CODEC if codec is None else packer_of(codec).codec


def packer_of(codec: RowCodec | None) -> types.Packer:
    """The tables of a codec, those for packing included; or none.

    Raises:
        ConfigError: they are not what a codec makes.
    """
    if codec is None:
        return types.NO_PACKER
    # Past the lookup of attributes in modules, which is slow.
    held = {**codec._buffers, **codec._parameters}
    names = _ALL_TABLES if isinstance(codec, TrellisCodec) else _TABLES
    tensors: Any = tuple([held[name] for name in names])
    addresses = tuple([tensor.data_ptr() for tensor in tensors])
    known = _tables.get(codec)
    if known is None or known.addresses != addresses or any(map(operator.is_not, known.tensors, tensors)):
        known = _tables[codec] = _Tables(tensors, addresses, _look_at(codec, dict(zip(names, tensors, strict=True))))
    return known.packer


def _look_at(codec: RowCodec, tables: dict[str, torch.Tensor]) -> types.Packer:
    coded, columns, size = len(tables["column_starts"]), len(tables["column_index"]), len(tables["widths"])
    sized, key_sized = len(tables["sigmas"]), len(tables["key_sigmas"])
    counts = {"column_fields": coded * NUMBERS_PER_COLUMN, "column_index": columns}
    counts |= {"sigmas": sized, "key_sigmas": key_sized}
    counts |= dict.fromkeys(("column_slopes", "column_starts", "column_reaches"), coded)
    counts |= {name: len(tables[name]) for name in _CHAIN if name in tables}
    counts |= dict.fromkeys(("scales", "centres", "widths", "_bends"), size)
    at = {name: types.address(tensor, _ALL_TABLES[name], counts[name]) for name, tensor in tables.items()}
    chains = [types.NO_TRELLIS] * 2
    if isinstance(codec, TrellisCodec):
        sizes = [part.stop - part.start for part in codec.chains]
        chains = [trellis_of(codec.trellis_tables(chain), size) for chain, size in enumerate(sizes)]
    seen = types.Codec(
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
        gains=types.address(_gains(), torch.float32, 256),
        index_=at["column_index"],
        scales=at["scales"],
        centres=at["centres"],
        widths=at["widths"],
    )
    return types.Packer(seen, sized, at["sigmas"], key_sized, at["key_sigmas"], at["_bends"], size, *chains)


def trellis_of(tables: TrellisTables, columns: int) -> types.Trellis:
    """What a search reads.

    Raises:
        ConfigError: the tables are not what a codec makes.
    """
    floats = (tables.reaches, tables.slopes, tables.starts, tables.weights)
    at = [types.address(table, torch.float32, len(tables.widths)) for table in floats]
    return types.Trellis._make([columns, *at, types.address(tables.widths, torch.uint8, len(tables.widths))])


@functools.cache
def _gains() -> torch.Tensor:
    with torch.inference_mode(False):
        return gain_factors(torch.arange(256, dtype=torch.uint8, device="cpu"))
