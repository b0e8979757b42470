"""From packed bytes to levels in one pass over memory, on the CPU.

PyTorch takes a pass over memory for every operation, of which unpacking needs some twenty; `torch.compile` makes one
loop of them. That takes a C++ compiler and, once per process, some seconds, so it is done for long contexts only. Where
it fails, the caller goes on without; `KVSPLICE_KERNELS=torch` in the environment leaves it out.

Legend: `B` batch, `S` rows, `m` columns (one per coordinate that is stored), `K` fields that a code is put together of
at most, `w` 32-bit words of a row.
"""

import functools
import logging
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F


logger = logging.getLogger(__name__)

_BYTES_OF_WORD = 4
# sinh(x) / x as a polynomial in x^2, for |x| up to the largest bend: a Chebyshev fit with a relative error below 5e-7.
# Several times faster than the sinh of the library, which keeps its precision for any x.
_SINH = (1.0000004732391539, 0.16666250581334213, 0.00833884425232733, 0.00019595608535080897, 3.1881204272216436e-06)


class Field(NamedTuple):
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


class FieldTables(NamedTuple):
    """The fields of all columns, as tensors.

    Attributes:
        word: which word of a row, int64 [K, m].
        shift, mask, place: int32 [K, m, 1]; a mask of 0 where a code has fewer fields.
    """

    word: torch.Tensor
    shift: torch.Tensor
    mask: torch.Tensor
    place: torch.Tensor

    @classmethod
    def of(cls, columns: list[list[Field]]) -> "FieldTables":
        """Tables of columns with these fields."""
        most = max((len(fields) for fields in columns), default=0)
        none = Field(0, 0, 0, 0)
        table = torch.tensor([[*fields, *[none] * (most - len(fields))] for fields in columns], dtype=torch.int32)
        byte, shift, bits, place = table.view(len(columns), most, 4).permute(2, 1, 0).unbind()
        shift = (8 * (byte % _BYTES_OF_WORD) + shift)[..., None]  # of the word, little-endian
        return cls((byte // _BYTES_OF_WORD).long(), shift, (2 ** bits[..., None] - 1), place[..., None].contiguous())


def sinh_(x: torch.Tensor) -> torch.Tensor:
    """sinh in place, for |x| up to the largest bend."""
    square = x * x
    sum_ = square * _SINH[-1]
    for coefficient in _SINH[-2:0:-1]:
        sum_.add_(coefficient).mul_(square)
    return x.mul_(sum_.add_(_SINH[0]))


def levels_in_one_pass(
    packed: torch.Tensor,
    tables: FieldTables,
    slopes: torch.Tensor,
    starts: torch.Tensor,
    gains: torch.Tensor,
    gained: torch.Tensor,
) -> torch.Tensor | None:
    """The columns gain * sinh(slope * code + start) of packed rows, or None where they cannot be had in this way.

    Args:
        packed: uint8 [B, S, row_bytes].
        tables: of the columns.
        slopes, starts: [m, 1].
        gains: of the rows, [B, 1, S].
        gained: which columns have the gain, bool [m, 1]; it is 1 for the others.

    Returns:
        float32 [B, m, S].
    """
    run = _compiled() if len(tables.word) and packed.shape[1] > 1 else None
    if run is None:
        return None
    try:
        with torch.no_grad():
            return run(_words(packed), *tables, slopes, starts, gains, gained)
    except Exception as error:  # whatever the compiler of this machine raises
        logger.warning(
            "Packed rows are read without compiled code, which takes several times as long: %s: %s",
            type(error).__name__,
            str(error).splitlines()[0] if str(error) else "",
        )
        _given_up.append(error)
        return None


_given_up: list[Exception] = []


def _words(packed: torch.Tensor) -> torch.Tensor:
    """int32 [B, w, S] of packed rows, filled up to whole words."""
    padded = F.pad(packed, (0, -packed.shape[-1] % _BYTES_OF_WORD)).contiguous()
    return padded.view(torch.int32).transpose(1, 2).contiguous()


def _compiled() -> Callable[..., torch.Tensor] | None:
    if _given_up or torch.compiler.is_compiling() or os.environ.get("KVSPLICE_KERNELS") == "torch":
        return None
    return _compile()


@functools.cache
def _compile() -> Callable[..., torch.Tensor]:
    logger.info("Compiling the reading of packed rows, once in this process.")
    return torch.compile(_levels, dynamic=True)


def _levels(
    words: torch.Tensor,
    word: torch.Tensor,
    shift: torch.Tensor,
    mask: torch.Tensor,
    place: torch.Tensor,
    slopes: torch.Tensor,
    starts: torch.Tensor,
    gains: torch.Tensor,
    gained: torch.Tensor,
) -> torch.Tensor:
    codes = ((words[:, word[0]] >> shift[0]) & mask[0]) << place[0]
    for index in range(1, word.shape[0]):
        codes = codes | (((words[:, word[index]] >> shift[index]) & mask[index]) << place[index])
    x = codes.float() * slopes + starts
    square = x * x
    total = square * _SINH[-1]
    for coefficient in _SINH[-2:0:-1]:
        total = (total + coefficient) * square
    return x * (total + _SINH[0]) * torch.where(gained, gains, 1.0)
