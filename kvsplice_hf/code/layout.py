"""Where the numbers of a row are in its bytes.

Layout of a row: the gains, all 16-bit numbers, then four planes of 8-, 4-, 2- and 1-bit fields. Any width up to 8 is a
sum of such fields (5 = 4 + 1), the largest in the lowest bits. Coordinates that share the gain come first, the widest
ones ahead, then those that share the second one, then the others in the same way, so that coordinates of one width lie
side by side in every plane. Within a plane of m bytes, byte j holds the fields j, j + m, j + 2 m and so on. Thus
unpacking moves contiguous pieces only.

Legend: `n` = r + p coordinates of a row, `m` columns of bytes in a plane, `B` sequences, `S` rows.
"""

import math
from typing import ClassVar

import torch

from kvsplice_hf.code.codecs import Codec
from kvsplice_hf.code.fields import BIT_FIELDS, BitField, join_fields, pieces_of, split_fields
from kvsplice_hf.code.levels import GRIDS, Grid
from kvsplice_hf.code.widths import row_bytes
from kvsplice_hf.errors import ConfigError


# Of the table `column_fields`.
NUMBERS_PER_COLUMN = len(BIT_FIELDS) * len(BitField._fields)


class RowLayout(Codec):
    """The tables that follow from the widths and gains of a `RowCodec`, and reading of codes by them.

    Buffers: `widths` uint8 [n], `sigmas` and `key_sigmas` float32, see `RowCodec`; and the tables, which move with the
    module but are not saved.
    """

    # By width, the levels that coordinates are put on.
    grids: ClassVar[dict[int, Grid]] = GRIDS

    widths: torch.Tensor
    sigmas: torch.Tensor
    key_sigmas: torch.Tensor
    _raw: torch.Tensor
    _bends: torch.Tensor
    _levels: torch.Tensor
    _first_level: torch.Tensor
    column_index: torch.Tensor
    column_slopes: torch.Tensor
    column_starts: torch.Tensor
    column_reaches: torch.Tensor
    column_fields: torch.Tensor

    def _add_tables(self) -> None:
        """What follows from the widths: byte count, and index tensors that move with the module but are not saved."""
        widths = self.widths.long()
        self.row_bytes = row_bytes(widths, len(self.sigmas), len(self.key_sigmas))
        small = torch.where(widths == 16, 0, widths)
        order = torch.argsort(100 * self._gain_groups() - small, stable=True)
        order = order[small[order] > 0]
        for field in BIT_FIELDS:
            coordinates = order[small[order] & field > 0]
            # The larger fields of the same code come first, in its lower bits.
            shifts = small[coordinates] & ~(2 * field - 1)
            self.register_buffer(f"_coordinates{field}", coordinates, persistent=False)
            self.register_buffer(f"_shifts{field}", shifts.to(torch.uint8), persistent=False)
        self.register_buffer("_raw", (widths == 16).nonzero()[:, 0], persistent=False)
        self.register_buffer(
            "_bends", self._of_widths([grid.bend for grid in self.grids.values()], widths), persistent=False
        )
        nothing = torch.zeros(1, dtype=torch.float32, device="cpu")
        levels = [nothing, *(grid.levels() for grid in self.grids.values())]
        self.register_buffer("_levels", torch.cat(levels).to(widths.device), persistent=False)
        # Where the levels of each width start, behind those of all smaller ones.
        starts = [sum(map(len, levels[:width])) for width in self.grids]
        self.register_buffer("_first_level", self._of_widths(starts, widths), persistent=False)
        self._add_columns(order)

    @staticmethod
    def _of_widths(values: list[float] | list[int], widths: torch.Tensor) -> torch.Tensor:
        """Of each width, 1 to 8, the value at its place, float32 or int64; 0 of widths 0 and 16."""
        dtype = torch.float32 if isinstance(values[0], float) else torch.int64
        table = torch.zeros(17, dtype=dtype, device=widths.device)
        table[1 : len(values) + 1] = torch.tensor(values, dtype=dtype, device=widths.device)
        return table[widths]

    def _gain_groups(self) -> torch.Tensor:
        """Of each coordinate: 0 with the gain, 1 with that of keys, 2 without one; int64 [n]."""
        place = torch.arange(len(self.widths), dtype=torch.int64, device=self.widths.device)
        gained, last = len(self.sigmas), len(self.sigmas) + len(self.key_sigmas)
        return (place >= gained).long() + (place >= last).long()

    @property
    def gain_bytes(self) -> int:
        """How many gains a row has, a byte each."""
        return int(len(self.sigmas) > 0) + int(len(self.key_sigmas) > 0)

    def _add_columns(self, order: torch.Tensor) -> None:
        """Tables of `read_columns`, whose columns are the coordinates `order`, and after them the 16-bit numbers."""
        widths = self.widths[order].long()
        grids = self.grids.values()
        # sinh(slope * number + start) / reach is the level of that number.
        slopes = [2 * grid.last / (2**grid.bits - 1) for grid in grids]
        self.register_buffer("column_slopes", self._of_widths(slopes, widths), persistent=False)
        self.register_buffer("column_starts", self._of_widths([-grid.last for grid in grids], widths), persistent=False)
        self.register_buffer(
            "column_reaches", self._of_widths([grid.reach for grid in grids], widths), persistent=False
        )
        self.register_buffer("column_index", torch.cat([order, self._raw]), persistent=False)
        groups = self._gain_groups()[order]
        self.gained_columns = int((groups == 0).sum())
        self.key_gained_columns = int((groups == 1).sum())
        # How many of the 16-bit numbers are among the coordinates that share the gain.
        self.gained_raw = int((self._raw < len(self.sigmas)).sum())
        # Whether the columns behind those with the gain hold none of these coordinates.
        self.gains_all = len(self.sigmas) > 0 and self.gained_raw == 0
        self._pieces = {field: pieces_of(widths.tolist(), field) for field in BIT_FIELDS}
        fields = [
            fields + (len(BIT_FIELDS) - len(fields)) * [BitField(0, 0, 0, 0)] for fields in self._fields(len(order))
        ]
        # Where the codes are in a row, int32 [columns, 4 fields, 4 attributes of a `BitField`].
        table = torch.tensor(fields, dtype=torch.int32, device=order.device)
        self.register_buffer(
            "column_fields", table.view(len(order), len(BIT_FIELDS), len(BitField._fields)), persistent=False
        )

    def _fields(self, columns: int) -> list[list[BitField]]:
        """Where the code of each column is in a row."""
        found: list[list[BitField]] = [[] for _ in range(columns)]
        start = self.gain_bytes + 2 * len(self._raw)
        for field, pieces in self._pieces.items():
            size = -(-pieces[-1].fields.stop * field // 8) if pieces else 0
            for piece in pieces:
                places = range(piece.fields.start, piece.fields.stop)
                for column, index in enumerate(places, start=piece.columns.start):
                    shift = index // size * field
                    found[column].append(BitField(start + index % size, shift, field, piece.shift))
            start += size
        return found

    def codes(self, packed: torch.Tensor) -> torch.Tensor:
        """Codes uint8 [..., n] of bytes uint8 [..., row_bytes]: the exact inverse of packing them.

        Raises:
            ConfigError: the bytes are not those of one row of this codec.
        """
        lines = self._code_lines(self._flat(packed)[None])[0]
        codes = lines.new_zeros(self.row_dim, lines.shape[1])
        codes[self.column_index[: len(lines)]] = lines
        return codes.T.reshape(*packed.shape[:-1], self.row_dim)

    @property
    def coded_bytes(self) -> int:
        """How many bytes of a row hold codes: all behind the gains and the 16-bit numbers."""
        return self.row_bytes - self.gain_bytes - 2 * len(self._raw)

    def code_lines(self, packed: torch.Tensor) -> torch.Tensor:
        """Codes uint8 [m, S] of packed rows [S, row_bytes], in the order of columns.

        Raises:
            ConfigError: the bytes are not those of one row of this codec.
        """
        return self._code_lines(self._flat(packed)[None])[0]

    def join_lines(self, plain: torch.Tensor, lines: torch.Tensor) -> torch.Tensor:
        """Packed rows [S, row_bytes]: the inverse of `code_lines`.

        Args:
            plain: the bytes ahead of the codes, uint8 [S, row_bytes - coded_bytes].
            lines: codes uint8 [m, S].
        """
        parts = [plain.T]
        for field, pieces in self._pieces.items():
            if pieces:
                fields = [(lines[piece.columns] >> piece.shift) & (2**field - 1) for piece in pieces]
                parts.append(join_fields(torch.cat(fields).T, field).T)
        return torch.cat(parts).T.contiguous()

    def _flat(self, packed: torch.Tensor) -> torch.Tensor:
        """All rows in one dimension, [S, row_bytes]."""
        if packed.dtype != torch.uint8 or packed.shape[-1] != self.row_bytes:
            raise ConfigError(
                f"Got packed rows {packed.dtype} {list(packed.shape)}; this codec's rows are uint8 of {self.row_bytes} "
                "bytes. The cache belongs to another splice."
            )
        return packed.reshape(math.prod(packed.shape[:-1]), self.row_bytes)

    def _code_lines(self, packed: torch.Tensor) -> torch.Tensor:
        """Codes uint8 [B, m, S] of packed rows [B, S, row_bytes], of the columns that hold codes."""
        end = self.gain_bytes + 2 * len(self._raw)
        lines = packed[..., end:].transpose(1, 2).contiguous()  # whole lines move at the speed of memory
        codes = lines.new_zeros(lines.shape[0], len(self.column_slopes), lines.shape[2])
        end = 0
        for field, pieces in self._pieces.items():
            if not pieces:
                continue
            start, end = end, end + -(-pieces[-1].fields.stop * field // 8)
            values = split_fields(lines[:, start:end], field)
            for piece in pieces:
                codes[:, piece.columns] |= values[:, piece.fields] << piece.shift
        return codes

    def _plane(self, field: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._buffers[f"_coordinates{field}"], self._buffers[f"_shifts{field}"]  # type: ignore[return-value]
