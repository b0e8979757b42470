"""Packed rows as symbols: the level that each coordinate is on, and back to the very same bytes.

The numbers of a row that come back together form a group: those that share the gain, and those behind them (of a key,
mostly), see `code.codec`. Along a trellis (`code.trellis`) the coordinates before it leave a coordinate every other
level; so the symbol is which of these, and takes as many bits as the code. The symbols of a group are written without
those of any other.

Legend: `T` rows, `c` columns of a group, `n` coordinates of a row.
"""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from kvsplice_hf.code.codec import RowCodec
from kvsplice_hf.code.fields import BIT_FIELDS, join_fields
from kvsplice_hf.code.trellis import BESIDE, LARGEST_WIDTH, OPPOSITE, TrellisCodec


Bytes: TypeAlias = NDArray[np.uint8]


@dataclass(frozen=True)
class Group:
    """Columns of the rows of one codec.

    Attributes:
        coordinates: of a row, in the order of the columns, int64 [c].
        widths: bits of each, [c].
        chain: how many of them, from the first, lie along a trellis.
        gain: which of the gains of a row is theirs; None: none.
    """

    coordinates: NDArray[np.int64]
    widths: tuple[int, ...]
    chain: int
    gain: int | None

    def steps(self) -> list[int]:
        """Of each column, 2 where only every other level is free to choose, otherwise 1."""
        return [2 if column < self.chain else 1 for column in range(len(self.widths))]


def groups_of(codec: RowCodec) -> list[Group]:
    """The groups of rows, those behind the shared gain first: other numbers may be predicted from keys."""
    order = codec.column_index[: len(codec.column_slopes)].cpu()
    widths, first, last = codec.widths.long().cpu(), len(codec.sigmas), len(codec.sigmas) + len(codec.key_sigmas)
    found = []
    for behind in (True, False):
        own = order[(order >= first) == behind]
        is_chained = (widths[own] <= LARGEST_WIDTH) & isinstance(codec, TrellisCodec)
        own = torch.cat([own[is_chained], own[~is_chained]])
        gain = None
        if not behind and first:
            gain = 0
        elif behind and last > first:
            gain = codec.gain_bytes - 1
        found.append(Group(own.numpy(), tuple(widths[own].tolist()), int(is_chained.sum()), gain))
    return found


def levels_of(codec: RowCodec, width: int) -> NDArray[np.float64]:
    """Where the levels of a width are on which a column of the codec is put, where its scale is 1; ascending."""
    return codec.grids[width].levels().double().numpy()


def level_numbers(codec: RowCodec, packed: torch.Tensor, group: Group) -> Bytes:
    """On which level each column of a group is, [T, c], of packed rows uint8 [T, row_bytes]."""
    numbers = codec.level_numbers(codec.codes(packed))
    return numbers[:, torch.from_numpy(group.coordinates)].numpy()


class Parity:
    """Which levels a trellis leaves its next column, as codes come one by one.

    Args:
        rows: T.
    """

    def __init__(self, rows: int) -> None:
        self._nothing = np.zeros(rows, dtype=np.int64)
        self._lowest: list[NDArray[np.int64]] = []

    def _bits(self, lags: tuple[int, ...]) -> NDArray[np.int64]:
        bits = self._nothing
        for lag in lags:
            if lag <= len(self._lowest):
                bits = bits ^ self._lowest[-lag]
        return bits

    def free(self) -> NDArray[np.int64]:
        """Levels whose number is even (0) or odd (1) are left, [T]."""
        return self._bits(BESIDE)

    def code(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """The codes of levels [T] of the next column."""
        lowest = (numbers >> 1 & 1) ^ self._bits(OPPOSITE)
        self._lowest.append(lowest)
        return (numbers >> 2 << 1) | lowest


def packed_rows(codec: RowCodec, codes: torch.Tensor, gains: torch.Tensor, raw: torch.Tensor) -> torch.Tensor:
    """Bytes uint8 [T, row_bytes] of codes uint8 [T, n], gains uint8 [T, 2, 1 or 0] and the bytes of 16-bit numbers."""
    parts = [gains, raw]
    for field in BIT_FIELDS:
        coordinates, shifts = codec._plane(field)
        parts.append(join_fields((codes[..., coordinates] >> shifts) & (2**field - 1), field))
    return torch.cat(parts, dim=-1)
