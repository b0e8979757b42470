"""What the kernels look up in a codec: where each coordinate is in a row, and the factors of gains.

Legend: `n` numbers of a row, of which the first `v` are read as they are, and the last `p` may be the code of a key.
"""

import functools
from typing import NamedTuple, TypeAlias
from weakref import WeakKeyDictionary, ref

import torch
import triton.language as tl

from kvsplice_hf.attend.triton.pieces import CHUNK, pieces_of
from kvsplice_hf.code.codec import RowCodec
from kvsplice_hf.code.keys import TURN_STEPS, cosines_and_sines
from kvsplice_hf.code.trellis import BESIDE, OPPOSITE, TrellisCodec, TrellisTables


# What the layout table holds of each coordinate: its width, where its bit field is in each plane (8 * byte + bit),
# where its 16-bit number is, and where the levels of its width start; and of a column of a trellis, where the lowest
# bits of the codes of those before it are (8 * byte + bit, or -1 where there is none).
WIDTH = tl.constexpr(0)
IN_PLANE8 = tl.constexpr(1)
IN_PLANE4 = tl.constexpr(2)
IN_PLANE2 = tl.constexpr(3)
IN_PLANE1 = tl.constexpr(4)
RAW = tl.constexpr(5)
FIRST_LEVEL = tl.constexpr(6)
OPPOSITE1 = tl.constexpr(7)
OPPOSITE6 = tl.constexpr(8)
BESIDE2 = tl.constexpr(9)
BESIDE4 = tl.constexpr(10)
ENTRIES = 11
# Into how many angles a circle is divided.
STEPS = tl.constexpr(TURN_STEPS)
# By the bits of a bit field, the largest first, as in a row.
FIELDS = {8: IN_PLANE8, 4: IN_PLANE4, 2: IN_PLANE2, 1: IN_PLANE1}
# By how many columns of the trellis it is before.
NEIGHBOURS = dict(zip((*OPPOSITE, *BESIDE), (OPPOSITE1, OPPOSITE6, BESIDE2, BESIDE4), strict=True))
# What else may occur in a chunk of coordinates beside bit fields of 1, 2, 4 and 8 bits.
RAW_NUMBERS, TRELLIS_COLUMNS = 16, 32
# How many bits those are.
PLANE_BITS = 6


class Tables(NamedTuple):
    """The tables of one codec, on its device.

    Attributes:
        layout: int32 [11, v], see `WIDTH` and the others.
        gains: the 256 factors, float32.
        stretches: sinh of the coordinates' bends, [n].
        planes: of each piece, six bits for each of its chunks: which bit fields (of 1, 2, 4, 8 or 16) occur in it, and
            whether columns of a trellis do (32).
        key_layout: int32 [11, p], of the coordinates of a key's code.
        key_planes: the same of those coordinates.
        columns: which coordinates are the columns of the trellis, int64 [c]; None where there is none, as the next.
        trellis: tables of the search, [c].
        chains: how many of the columns are the trellis's first chain, and how many its second one.
    """

    layout: torch.Tensor
    gains: torch.Tensor
    stretches: torch.Tensor
    planes: tuple[int, ...]
    key_layout: torch.Tensor
    key_planes: int
    columns: torch.Tensor | None
    trellis: TrellisTables | None
    chains: tuple[int, int]


# By codec, and by device, v and where the code of a key begins; and from which table of the codec they were made, which
# is another one when other widths were loaded. Not buffers: a copied or loaded codec makes its own.
_Made: TypeAlias = tuple["ref[torch.Tensor]", Tables]
_tables: WeakKeyDictionary[RowCodec, dict[tuple[torch.device, int, int], _Made]] = WeakKeyDictionary()


def tables_of(codec: RowCodec, read_dim: int | None = None, key_start: int | None = None) -> Tables:
    """The tables of a codec, made once for its widths and for each device that it is on.

    Args:
        codec: of rows of n numbers.
        read_dim: v, how many numbers of a row are read as they are; or None for n.
        key_start: which number is the first of a key's code; or None for n, where rows hold no such code.
    """
    n = codec.row_dim
    key = codec.widths.device, n if read_dim is None else read_dim, n if key_start is None else key_start
    found = _tables.setdefault(codec, {})
    if key not in found or found[key][0]() is not codec.column_fields:
        with torch.inference_mode(False):
            found[key] = ref(codec.column_fields), _make_tables(codec, *key)
    return found[key][1]


@functools.cache
def circle_on(device: torch.device) -> torch.Tensor:
    """The cosines of all angles, and behind them their sines, float32 [2, 64]."""
    with torch.inference_mode(False):
        angles = torch.arange(TURN_STEPS, dtype=torch.uint8, device=device)
        return torch.stack(cosines_and_sines(angles))


def _make_tables(codec: RowCodec, device: torch.device, read_dim: int, key_start: int) -> Tables:
    widths = codec.widths.cpu().int()
    layout = torch.zeros(ENTRIES, codec.row_dim, dtype=torch.int32, device="cpu")
    layout[WIDTH.value] = widths
    layout[FIRST_LEVEL.value] = codec._first_level.cpu()
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
    columns, trellis, chains, occurring = None, None, (0, 0), widths.clone()
    # A trellis without columns is none: whole bytes are packed and read as those of other codecs.
    if isinstance(codec, TrellisCodec) and len(codec.in_chain):
        columns, trellis = codec._chain_numbers, _joined(codec)
        first = codec.chains[0].stop
        chains = (first, len(columns) - first)
        layout[[entry.value for entry in NEIGHBOURS.values()]] = -1
        for part in columns.cpu().split(chains):
            _add_neighbours(layout, part)
        occurring[columns.cpu()] |= TRELLIS_COLUMNS
    read, of_key = (part.contiguous().to(device) for part in (layout[:, :read_dim], layout[:, key_start:]))
    return Tables(
        read,
        gains,
        stretches,
        _planes(occurring[:read_dim], key_start < codec.row_dim),
        of_key,
        _occurring_in(occurring[key_start:]),
        columns,
        trellis,
        chains,
    )


def _joined(codec: TrellisCodec) -> TrellisTables:
    """What the search needs of the columns of both chains, without room between them."""
    parts = [codec.trellis_tables(chain).of_columns(part.stop - part.start) for chain, part in enumerate(codec.chains)]
    of_columns = [torch.cat(tables) for tables in zip(*(part[:-1] for part in parts), strict=True)]
    return TrellisTables._make([*of_columns, parts[0].levels])


def _add_neighbours(layout: torch.Tensor, columns: torch.Tensor) -> None:
    """Write where the lowest bits of the codes before each column of a chain are, which is in their largest field.

    Args:
        layout: [11, n], the other entries filled in, and -1 where no column is before another.
        columns: which coordinates they are, in their order, int64 [c].
    """
    widths, lowest = layout[WIDTH.value, columns], layout[IN_PLANE1.value, columns]
    for field in (2, 4):
        lowest = torch.where(widths & field > 0, layout[FIELDS[field].value, columns], lowest)
    for lag, entry in NEIGHBOURS.items():
        layout[entry.value, columns[lag:]] = lowest[:-lag]


def _occurring_in(occurring: torch.Tensor) -> int:
    """What occurs among these coordinates, a bit each."""
    return sum(bit for bit in (*FIELDS, RAW_NUMBERS, TRELLIS_COLUMNS) if (occurring & bit).any())


def _planes(occurring: torch.Tensor, coded_keys: bool) -> tuple[int, ...]:
    """See `Tables.planes`."""
    found, start = [], 0
    for piece in pieces_of(len(occurring), coded_keys):
        chunks = occurring[start : start + piece].split(CHUNK) if piece else ()
        found.append(sum(_occurring_in(chunk) << (PLANE_BITS * index) for index, chunk in enumerate(chunks)))
        start += piece
    return tuple(found)
