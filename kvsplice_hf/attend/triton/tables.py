"""What the kernels look up in a codec: where each coordinate is in a row, and the factors of gains."""

import functools
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import triton.language as tl

from kvsplice_hf.attend.triton.pieces import CHUNK, pieces_of
from kvsplice_hf.code.codec import RowCodec
from kvsplice_hf.code.keys import TURN_STEPS, cosines_and_sines


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
# Into how many angles a circle is divided.
STEPS = tl.constexpr(TURN_STEPS)
# By the bits of a bit field, the largest first, as in a row.
FIELDS = {8: IN_PLANE8, 4: IN_PLANE4, 2: IN_PLANE2, 1: IN_PLANE1}


class Tables(NamedTuple):
    """The tables of one codec, on its device.

    Attributes:
        layout: int32 [7, r], see `WIDTH` and the others.
        gains: the 256 factors, float32.
        stretches: sinh of the coordinates' bends, [n].
        planes: of each piece, five bits for each of its chunks: which bit fields (of 1, 2, 4, 8 or 16) occur in it.
        key_layout: int32 [7, n - r].
        key_planes: which bit fields occur among those coordinates.
    """

    layout: torch.Tensor
    gains: torch.Tensor
    stretches: torch.Tensor
    planes: tuple[int, ...]
    key_layout: torch.Tensor
    key_planes: int


# By codec, and by device and r. Not buffers: these follow from the widths, and a copied or loaded codec makes its own.
_tables: WeakKeyDictionary[RowCodec, dict[tuple[torch.device, int], Tables]] = WeakKeyDictionary()


def tables_of(codec: RowCodec, rank: int | None = None) -> Tables:
    """The tables of a codec, made once for each device that it is on.

    Args:
        codec: of rows of n numbers.
        rank: r, the numbers ahead of the code of a key; or None for n, where rows hold no such code.
    """
    key = codec.widths.device, codec.row_dim if rank is None else rank
    found = _tables.setdefault(codec, {})
    if key not in found:
        with torch.inference_mode(False):
            found[key] = _make_tables(codec, *key)
    return found[key]


@functools.cache
def circle_on(device: torch.device) -> torch.Tensor:
    """The cosines of all angles, and behind them their sines, float32 [2, 64]."""
    with torch.inference_mode(False):
        angles = torch.arange(TURN_STEPS, dtype=torch.uint8, device=device)
        return torch.stack(cosines_and_sines(angles))


def _make_tables(codec: RowCodec, device: torch.device, rank: int) -> Tables:
    widths = codec.widths.cpu().int()
    small = torch.where(widths == 16, 0, widths)
    layout = torch.zeros(ENTRIES, codec.row_dim, dtype=torch.int32, device="cpu")
    layout[WIDTH.value] = widths
    layout[FIRST_LEVEL.value] = torch.where(small > 0, 2**small - 1, 0)
    start = codec.gain_bytes
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
    front, back = (part.contiguous().to(device) for part in (layout[:, :rank], layout[:, rank:]))
    return Tables(
        front, gains, stretches, _planes(widths[:rank], rank < codec.row_dim), back, _fields_in(widths[rank:])
    )


def _fields_in(widths: torch.Tensor) -> int:
    """Which bit fields occur in these widths, a bit each."""
    return sum(field for field in (1, 2, 4, 8, 16) if (widths & field).any())


def _planes(widths: torch.Tensor, coded_keys: bool) -> tuple[int, ...]:
    """See `Tables.planes`."""
    found, start = [], 0
    for piece in pieces_of(len(widths), coded_keys):
        chunks = widths[start : start + piece].split(CHUNK) if piece else ()
        found.append(sum(_fields_in(chunk) << (5 * index) for index, chunk in enumerate(chunks)))
        start += piece
    return tuple(found)
