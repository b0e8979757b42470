"""What the kernel of ordinary attention looks up: the tables of all key heads of a layer, stacked.

They are kept, since what makes them takes dozens of small operations, which a decode step would wait for. What follows
from parameters is kept as long as these are the same tensors, and nobody has written to them.

Legend: as in `heads`, and `N` room for the value's code of any head, `M` for the key's.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl

from kvsplice_hf.attend.backend import HeadRows
from kvsplice_hf.attend.triton.coded_keys import folded_weights
from kvsplice_hf.attend.triton.pieces import CHUNK, pieces_of
from kvsplice_hf.attend.triton.tables import PLANE_BITS, Tables, tables_of
from kvsplice_hf.code.codec import RowCodec


# What is known of each key head: which byte of the layer's row is its first, r, how many of these numbers share the
# gain, how many numbers of the key's code share the gain behind it, and how many numbers of that code are mixed.
FIRST_BYTE = tl.constexpr(0)
NUMBERS = tl.constexpr(1)
GAINED = tl.constexpr(2)
KEY_GAINED = tl.constexpr(3)
MIXED_KEY_NUMBERS = tl.constexpr(4)
ENTRIES_OF_HEAD = tl.constexpr(5)


class HeadTables(NamedTuple):
    """The tables of one layer, on its device.

    Attributes:
        heads: int32 [K, 5], see `FIRST_BYTE` and the others.
        layout, key_layout: int32 [K, 11, N] and [K, 11, M], see `tables.WIDTH` and the others.
        levels, gains: those of all codecs of the kind, float32.
        planes, key_planes: what occurs in any head; see `tables.Tables`.
        factors, offsets: from units of a value's code to its numbers, float32 [K, N].
        key_factors, key_offsets: the same of a key's code, [K, M].
        weights: what units of a key's code are multiplied by, in the type of products [K, d, M]: first numbers of all
            pairs, then second ones. Factors of the codec are part of them.
        mean: what is added, float32 [K, d].
        pairs: int64 [K, 2, F].
        has_gain, has_key_gain: whether any head has one.
        mixes_keys: whether values of any head are decoded from the code of the key as well.
        mixed_width: V, the most numbers that values of a head are decoded from.
    """

    heads: torch.Tensor
    layout: torch.Tensor
    key_layout: torch.Tensor
    levels: torch.Tensor
    gains: torch.Tensor
    planes: int
    key_planes: int
    factors: torch.Tensor
    offsets: torch.Tensor
    key_factors: torch.Tensor
    key_offsets: torch.Tensor
    weights: torch.Tensor
    mean: torch.Tensor
    pairs: torch.Tensor
    has_gain: bool
    has_key_gain: bool
    mixes_keys: bool
    mixed_width: int


class _Kept(NamedTuple):
    sources: list[tuple[Any, int, int]]
    tables: HeadTables


# By the codec of the first head, and by the type of products. Not kept beyond that codec.
_kept: "weakref.WeakKeyDictionary[RowCodec, dict[torch.dtype, _Kept]]" = weakref.WeakKeyDictionary()


def head_tables(heads: Sequence[HeadRows], dtype: torch.dtype, check: Callable[[], None]) -> HeadTables:
    """The tables of a layer, made anew where one of the tensors they follow from is another or was written to.

    Args:
        heads: of the layer, whose codecs are `RowCodec`s and whose keys were coded before their rotation.
        dtype: of products.
        check: is called before tables are made, and raises where heads are not what the kernel reads.
    """
    codec: Any = heads[0].codec
    sources = _sources(heads)
    known = _kept.setdefault(codec, {}) if isinstance(codec, RowCodec) else {}
    if dtype in known and _are_unchanged(known[dtype].sources, sources):
        return known[dtype].tables
    check()
    with torch.inference_mode(False), torch.no_grad():
        made = _make(heads, dtype)
    known[dtype] = _Kept([(weakref.ref(tensor), tensor.data_ptr(), _version(tensor)) for tensor in sources], made)
    return made


def _sources(heads: Sequence[HeadRows]) -> list[torch.Tensor]:
    """All tensors that the tables follow from."""
    found: list[torch.Tensor] = []
    for _, codec, _, keys in heads:
        found += codec.meaning()
        if keys is not None:
            found += [keys.expand, keys.mean, keys.pairs]
    return found


def _version(tensor: torch.Tensor) -> int:
    """How often it was written to, or -1 where that is not counted."""
    return -1 if tensor.is_inference() else tensor._version


def _are_unchanged(kept: Sequence[tuple[Any, int, int]], sources: Sequence[torch.Tensor]) -> bool:
    if len(kept) != len(sources):
        return False
    # By the tensor itself: at the address of one that is gone there may be another by now.
    return all(
        source() is tensor and address == tensor.data_ptr() and version == _version(tensor) >= 0
        for (source, address, version), tensor in zip(kept, sources, strict=True)
    )


def _make(heads: Sequence[HeadRows], dtype: torch.dtype) -> HeadTables:
    layouts, key_layouts, numbers, weights, means = [], [], [], [], []
    factors, offsets, planes, key_planes, first_byte = [], [], 0, 0, 0
    tables: list[Tables] = []
    for _, codec, value_dim, keys in heads:
        assert isinstance(codec, RowCodec)
        assert keys is not None
        r = keys.start(codec)
        tables.append(tables_of(codec, r, r))
        layouts.append(tables[-1].layout)
        key_layouts.append(tables[-1].key_layout)
        planes |= _in_one_piece(tables[-1].planes, r)
        key_planes |= tables[-1].key_planes
        numbers.append([first_byte, r, len(codec.sigmas), len(codec.key_sigmas), value_dim - r])
        first_byte += codec.row_bytes
        weight, mean = folded_weights(keys, codec)
        weights.append(weight)
        means.append(mean)
        # A codec does not say anything about the scales of the others.
        has_scale = (codec.widths > 0) & (codec.widths < 16)
        factors.append(torch.where(has_scale, codec.scales.detach(), 1.0).split([r, codec.row_dim - r]))
        offsets.append(codec.base.split([r, codec.row_dim - r]))
    device = layouts[0].device
    first: Any = heads[0].codec
    return HeadTables(
        torch.tensor(numbers, dtype=torch.int32, device=device),
        _stacked(layouts),
        _stacked(key_layouts),
        first._levels,
        tables[0].gains,
        planes,
        key_planes,
        _stacked([of_value for of_value, _ in factors]),
        _stacked([of_value for of_value, _ in offsets]),
        _stacked([of_key for _, of_key in factors]),
        _stacked([of_key for _, of_key in offsets]),
        _stacked(weights).to(dtype),
        torch.stack(means),
        torch.stack([keys.pairs[:2] for *_, keys in heads if keys is not None]).contiguous(),
        any(entries[GAINED.value] for entries in numbers),
        any(entries[KEY_GAINED.value] for entries in numbers),
        any(entries[MIXED_KEY_NUMBERS.value] for entries in numbers),
        max(value_dim for _, _, value_dim, _ in heads),
    )


def _in_one_piece(planes: Sequence[int], r: int) -> int:
    """What occurs in r numbers that are read in one piece, six bits for each of its chunks; see `tables.Tables`."""
    found, start = 0, 0
    for piece, bits in zip(pieces_of(r, coded_keys=True), planes, strict=True):
        for chunk in range(start, start + piece, CHUNK):
            found |= (bits & (1 << PLANE_BITS) - 1) << PLANE_BITS * (chunk // CHUNK)
            bits >>= PLANE_BITS
        start += piece
    return found


def _stacked(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """[K, ..., n] of [..., n] each, with zeros behind the shorter ones."""
    width = max(part.shape[-1] for part in parts)
    padded = [torch.nn.functional.pad(part, (0, width - part.shape[-1])) for part in parts]
    return torch.stack(padded).contiguous()
