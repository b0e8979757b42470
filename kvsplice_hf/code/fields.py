"""Codes as fields of bits in the bytes of a row.

Layout of the coded part of a row: four planes of 8-, 4-, 2- and 1-bit fields. Any width up to 8 is a sum of such fields
(5 = 4 + 1), the largest in the lowest bits. Within a plane of m bytes, byte j holds the fields j, j + m, j + 2 m and so
on, so that unpacking moves contiguous pieces only.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F


BIT_FIELDS = (8, 4, 2, 1)


class BitField(NamedTuple):
    """Where one field of a code is.

    Attributes:
        byte: in the row.
        shift: of its lowest bit in that byte.
        bits: how many.
        place: of its lowest bit in the code.
    """

    byte: int
    shift: int
    bits: int
    place: int


def as_bytes(numbers: torch.Tensor) -> torch.Tensor:
    """The bytes [..., 2 k] of bf16 numbers [..., k]."""
    # Through one dimension: a tensor with sizes 0 or 1 may have any strides there, which `view` refuses.
    return numbers.reshape(-1).view(torch.uint8).view(*numbers.shape[:-1], 2 * numbers.shape[-1])


def as_bf16(packed: torch.Tensor) -> torch.Tensor:
    """The bf16 numbers [..., k] of bytes [..., 2 k]."""
    return packed.reshape(-1).clone().view(torch.bfloat16).view(*packed.shape[:-1], packed.shape[-1] // 2)


def join_fields(values: torch.Tensor, field: int) -> torch.Tensor:
    """Bytes [..., m] of fields uint8 [..., k], m = ceil(k * field / 8): byte j holds fields j, j + m, j + 2 m ..."""
    per_byte = 8 // field
    size = -(-values.shape[-1] // per_byte)
    values = F.pad(values, (0, size * per_byte - values.shape[-1]))
    joined = values[..., :size]
    for index in range(1, per_byte):
        joined = joined | (values[..., index * size : (index + 1) * size] << (index * field))
    return joined


def split_fields(lines: torch.Tensor, field: int) -> torch.Tensor:
    """Fields uint8 [B, m * 8 / field, S] of lines of bytes [B, m, S]."""
    if field == 8:
        return lines
    return torch.cat([(lines >> shift) & (2**field - 1) for shift in range(0, 8, field)], dim=1)


class Piece(NamedTuple):
    """Neighbouring columns whose fields lie side by side in a plane and go to the same bits of their codes."""

    columns: slice
    fields: slice
    shift: int


def pieces_of(widths: list[int], field: int) -> list[Piece]:
    """The pieces of a plane, for columns of these widths."""
    pieces: list[Piece] = []
    seen = 0
    for column, width in enumerate(widths):
        if not width & field:
            continue
        shift, last = width & ~(2 * field - 1), pieces[-1] if pieces else None
        if last is not None and last.columns.stop == column and last.shift == shift:
            pieces[-1] = Piece(slice(last.columns.start, column + 1), slice(last.fields.start, seen + 1), shift)
        else:
            pieces.append(Piece(slice(column, column + 1), slice(seen, seen + 1), shift))
        seen += 1
    return pieces
