"""Packed rows as one symbol per column and row, each of a distribution of its own, and back: what entropy coding takes.

In the bytes of a row the fields of several coordinates lie side by side, and the codes along a trellis say which of two
levels is meant only together with the codes before them. Neither shows how often a coordinate is on which level. The
symbols here do: of a coordinate the number of its level, counted so that it has one distribution whatever was before.

Along a trellis the levels with even numbers and those with odd ones take turns as the choice, by the bits before. The
odd ones are the even ones seen in a mirror, so they are counted from the far end. With `u_i` the lowest bit of the code
of column i, as in `trellis`,

    beside_i = u_(i-2) ^ u_(i-4)
    symbol_i = (level number of i >> 1) ^ (beside_i ? all ones : 0)
    u_i = lowest bit of symbol_i ^ u_(i-1) ^ u_(i-2) ^ u_(i-4) ^ u_(i-6)

The last line is how the way back finds the codes, a column after the other.

Legend: `S` rows, `m` symbols of a row.
"""

from typing import NamedTuple

import torch

from kvsplice_hf.code.codec import RowCodec
from kvsplice_hf.code.codecs import Codec
from kvsplice_hf.code.trellis import BESIDE, OPPOSITE, TrellisCodec


_BYTE = 8


class Symbols(NamedTuple):
    """Rows as symbols.

    Attributes:
        values: uint8 [m, S].
        bits: of each line; its symbols are below `2**bits`. Length m.
    """

    values: torch.Tensor
    bits: tuple[int, ...]


def bits_of(codec: Codec) -> tuple[int, ...]:
    """`Symbols.bits` of the rows of a codec."""
    # A subclass may mean something else by its codes; of bytes nothing need be known.
    if type(codec) not in (RowCodec, TrellisCodec):
        return (_BYTE,) * codec.row_bytes
    assert isinstance(codec, RowCodec)
    coded = codec.column_index[: len(codec.column_slopes)]
    return (_BYTE,) * _plain_bytes(codec) + tuple(codec.widths[coded].tolist())


def symbols_of(codec: Codec, packed: torch.Tensor) -> Symbols:
    """The symbols of packed rows uint8 [S, row_bytes].

    Raises:
        ConfigError: the bytes are not those of one row of this codec.
    """
    bits = bits_of(codec)
    if type(codec) not in (RowCodec, TrellisCodec):
        return Symbols(packed.T.contiguous(), bits)
    assert isinstance(codec, RowCodec)
    codes = codec.code_lines(packed)
    if isinstance(codec, TrellisCodec):
        for chain in (codec.in_chain[part] for part in codec.chains):
            codes[chain] = _counted(codes[chain], _halves(codec, chain))
    return Symbols(torch.cat([packed[:, : _plain_bytes(codec)].T, codes]), bits)


def rows_of(codec: Codec, values: torch.Tensor) -> torch.Tensor:
    """Packed rows uint8 [S, row_bytes] of symbols uint8 [m, S]: the inverse of `symbols_of`."""
    if type(codec) not in (RowCodec, TrellisCodec):
        return values.T.contiguous()
    assert isinstance(codec, RowCodec)
    plain = _plain_bytes(codec)
    codes = values[plain:]
    if isinstance(codec, TrellisCodec):
        codes = codes.clone()
        for chain in (codec.in_chain[part] for part in codec.chains):
            codes[chain] = _uncounted(codes[chain], _halves(codec, chain))
    return codec.join_lines(values[:plain].T, codes)


def _plain_bytes(codec: RowCodec) -> int:
    """How many bytes ahead of the codes: gains, and 16-bit numbers."""
    return codec.row_bytes - codec.coded_bytes


def _halves(codec: RowCodec, columns: torch.Tensor) -> torch.Tensor:
    """The largest value of all but the lowest bit of the codes of columns, uint8 [c, 1]."""
    widths = codec.widths[codec.column_index[columns]].long()
    return (2 ** (widths - 1) - 1).to(torch.uint8)[:, None]


def _beside(lowest: torch.Tensor) -> torch.Tensor:
    """Whether the choice is among odd level numbers, 0 or 1, uint8 [c, S], by the lowest bits of codes [c, S]."""
    found = torch.zeros_like(lowest)
    for lag in BESIDE:
        if lag < len(lowest):
            found[lag:] ^= lowest[: len(lowest) - lag]
    return found


def _counted(codes: torch.Tensor, halves: torch.Tensor) -> torch.Tensor:
    """Symbols of codes along a trellis, uint8 [c, S]."""
    lowest = codes & 1
    beside = _beside(lowest)
    turned = lowest ^ beside
    for lag in OPPOSITE:
        if lag < len(lowest):
            turned[lag:] ^= lowest[: len(lowest) - lag]
    return (((codes >> 1) ^ (beside * halves)) << 1) | turned


def _uncounted(symbols: torch.Tensor, halves: torch.Tensor) -> torch.Tensor:
    """Codes of symbols along a trellis, uint8 [c, S]."""
    lowest = symbols & 1
    lines = list(lowest)
    for index, line in enumerate(lines):
        for lag in (*BESIDE, *OPPOSITE):
            if lag <= index:
                line ^= lines[index - lag]  # noqa: PLW2901  in place: these are the lines of `lowest`
    return (((symbols >> 1) ^ (_beside(lowest) * halves)) << 1) | lowest
