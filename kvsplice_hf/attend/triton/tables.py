"""What the kernels look up in a codec: where each coordinate is in a row, and the factors of gains."""

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import triton.language as tl

from kvsplice_hf.attend.triton.pieces import CHUNK, pieces_of
from kvsplice_hf.code.codec import RowCodec


# What the layout table holds of each coordinate: its width, where its bit field is in each plane (8 * byte + bit),
# where its 16-bit number is, and where the levels of its width start.
WIDTH = tl.constexpr(0)
IN_PLANE8 = tl.constexpr(1)
IN_PLANE4 = tl.constexpr(2)
IN_PLANE2 = tl.constexpr(3)
IN_PLANE1 = tl.constexpr(4)
RAW = tl.constexpr(5)
FIRST_LEVEL = tl.constexpr(6)
ENTRIES = 7
# By the bits of a bit field, the largest first, as in a row.
FIELDS = {8: IN_PLANE8, 4: IN_PLANE4, 2: IN_PLANE2, 1: IN_PLANE1}


class Tables(NamedTuple):
    """The tables of one codec, on its device.

    Attributes:
        layout: int32 [7, n], see `WIDTH` and the others.
        gains: the 256 factors, float32.
        stretches: sinh of the coordinates' bends, [n].
        planes: of each piece, five bits for each of its chunks: which bit fields (of 1, 2, 4, 8 or 16) occur in it.
    """

    layout: torch.Tensor
    gains: torch.Tensor
    stretches: torch.Tensor
    planes: tuple[int, ...]


# By codec and device. Not buffers: these follow from the widths, and a copied or loaded codec makes its own.
_tables: WeakKeyDictionary[RowCodec, dict[torch.device, Tables]] = WeakKeyDictionary()


def tables_of(codec: RowCodec) -> Tables:
    """The tables of a codec, made once for each device that it is on."""
    device = codec.widths.device
    by_device = _tables.setdefault(codec, {})
    if device not in by_device:
        with torch.inference_mode(False):
            by_device[device] = _make_tables(codec, device)
    return by_device[device]


def _make_tables(codec: RowCodec, device: torch.device) -> Tables:
    widths = codec.widths.cpu().int()
    small = torch.where(widths == 16, 0, widths)
    layout = torch.zeros(ENTRIES, codec.row_dim, dtype=torch.int32, device="cpu")
    layout[WIDTH.value] = widths
    layout[FIRST_LEVEL.value] = torch.where(small > 0, 2**small - 1, 0)
    start = int(len(codec.sigmas) > 0)
    raw = codec._raw.cpu()
    layout[RAW.value, raw] = start + 2 * torch.arange(len(raw), dtype=torch.int32, device="cpu")
    start += 2 * len(raw)
    for field, entry in FIELDS.items():
        members = codec._plane(field)[0].cpu()
        size = -(-len(members) * field // 8)
        index = torch.arange(len(members), dtype=torch.int32, device="cpu")
        # Byte j of a plane of m holds the fields j, j + m, j + 2 m and so on.
        slot = index // max(size, 1)
        layout[entry.value, members] = 8 * (start + index - slot * size) + slot * field
        start += size
    gains = torch.exp2((torch.arange(256, dtype=torch.float32, device=device) - 128) / 16)
    stretches = torch.sinh(torch.where(codec._bends > 0, codec._bends, 1.0))
    return Tables(layout.to(device), gains, stretches, _planes(widths))


def _planes(widths: torch.Tensor) -> tuple[int, ...]:
    """See `Tables.planes`."""
    found, start = [], 0
    for piece in pieces_of(len(widths)):
        chunks = widths[start : start + piece].split(CHUNK) if piece else ()
        sets = [sum(field for field in (1, 2, 4, 8, 16) if (chunk & field).any()) for chunk in chunks]
        found.append(sum(planes << (5 * index) for index, planes in enumerate(sets)))
        start += piece
    return tuple(found)
