"""Coders of packed rows at rest, to be compared: those of the library of Python, zstandard and constriction.

Legend: `S` rows, `m` symbols of a row.
"""

import importlib
import importlib.util
import lzma
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from kvsplice_hf.code.codecs import Codec
from kvsplice_hf.code.symbols import symbols_of
from kvsplice_hf.rest import entropy


# Symbols of a table of frequencies are counted so often beforehand, so that none is impossible.
_PRIOR = 0.5
# Tokens behind which adaptive tables are counted anew.
_BLOCK = 256
# What a table of frequencies takes in a file, per symbol.
_BYTES_PER_FREQUENCY = 1


class Layer(NamedTuple):
    """The packed rows of a layer.

    Attributes:
        rows: uint8 [S, bytes].
        lines: their symbols, uint8 [m, S].
        bits: of each line.
        other: symbols of rows of another text, uint8 [m, S'].
    """

    rows: torch.Tensor
    lines: torch.Tensor
    bits: list[int]
    other: torch.Tensor


class Coded(NamedTuple):
    """What a coder made of a layer; times are None where bytes were counted without coding."""

    nbytes: float
    encode_s: float | None = None
    decode_s: float | None = None


Coder = Callable[[Layer], Coded | None]


def layer_of(codecs: Sequence[Codec], rows: torch.Tensor, other: torch.Tensor) -> Layer:
    """A layer of packed rows [S, bytes], and of those of another text."""
    sizes = [codec.row_bytes for codec in codecs]

    def lines(of: torch.Tensor) -> list[Any]:
        return [symbols_of(codec, part) for codec, part in zip(codecs, of.split(sizes, dim=1), strict=True)]

    found = lines(rows)
    bits = [width for part in found for width in part.bits]
    values = torch.cat([part.values for part in found])
    return Layer(rows, values, bits, torch.cat([part.values for part in lines(other)]))


def timed(encode: Callable[[], Any], decode: Callable[[Any], Any], size: Callable[[Any], int] = len) -> Coded:
    """Bytes and times of a coder.

    Args:
        encode: gives what is stored.
        decode: is given it.
        size: of it.
    """
    start = time.perf_counter()
    stored = encode()
    between = time.perf_counter()
    decode(stored)
    return Coded(size(stored), between - start, time.perf_counter() - between)


def as_they_are(layer: Layer) -> Coded:
    return Coded(layer.rows.numel())


def of_this_package(layer: Layer) -> Coded:
    """`compress="entropy"`, from symbols to symbols."""
    return timed(
        lambda: entropy.coded_lines(layer.lines, layer.bits),
        lambda stored: entropy.decoded_lines(stored[0], stored[1], layer.bits, layer.lines.shape[1]),
        lambda stored: len(stored[0]),
    )


def zlib_of_rows(layer: Layer) -> Coded:
    content = layer.rows.numpy().tobytes()
    return timed(lambda: zlib.compress(content), zlib.decompress)


def lzma_of_rows(layer: Layer) -> Coded:
    content = layer.rows.numpy().tobytes()
    return timed(lambda: lzma.compress(content), lzma.decompress)


def lzma_of_columns(layer: Layer) -> Coded:
    content = layer.lines.numpy().tobytes()
    return timed(lambda: lzma.compress(content), lzma.decompress)


def zstd_of_rows(layer: Layer) -> Coded | None:
    return _zstd(layer.rows.numpy().tobytes())


def zstd_of_columns(layer: Layer) -> Coded | None:
    """The bytes that this package codes, by zstandard."""
    return _zstd(b"".join(entropy.dense_groups(layer.lines, layer.bits)))


def _zstd(content: bytes) -> Coded | None:
    zstandard = _installed("zstandard")
    if zstandard is None:
        return None
    coder, decoder = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor()
    return timed(lambda: coder.compress(content), decoder.decompress)


def arithmetic(layer: Layer) -> Coded | None:
    """Range coding by constriction, with a table per coordinate that is kept in the file."""
    constriction = _installed("constriction")
    if constriction is None:
        return None
    coders, kind = constriction.stream.queue, constriction.stream.model.Categorical

    def model_of(counts: torch.Tensor) -> Any:
        return kind(_shares(counts).float().numpy(), perfect=False)

    def encode() -> tuple[Any, list[torch.Tensor]]:
        coder, tables = coders.RangeEncoder(), []
        for line, bits in zip(layer.lines, layer.bits, strict=True):
            tables.append(_counts(line, bits))
            coder.encode(line.int().numpy(), model_of(tables[-1]))
        return coder.get_compressed(), tables

    def decode(stored: tuple[Any, list[torch.Tensor]]) -> list[torch.Tensor]:
        decoder, count = coders.RangeDecoder(stored[0]), layer.lines.shape[1]
        return [torch.from_numpy(decoder.decode(model_of(counts), count)).to(torch.uint8) for counts in stored[1]]

    return timed(encode, decode, lambda stored: stored[0].nbytes + _table_bytes(layer.bits))


def entropy_of_own_tables(layer: Layer) -> Coded:
    """What an ideal coder needs that knows how often each symbol of a coordinate comes; the tables are not counted."""
    return Coded(_ideal(layer, layer.lines))


def entropy_of_tables_of_another_text(layer: Layer) -> Coded:
    """The same with tables of another text, which need not be in the file."""
    return Coded(_ideal(layer, layer.other))


def entropy_of_adaptive_tables(layer: Layer) -> Coded:
    """The same with the tables of the tokens before, counted anew every `_BLOCK` tokens; nothing is kept."""
    total = 0.0
    for line, bits in zip(layer.lines, layer.bits, strict=True):
        counts = torch.zeros(2**bits, dtype=torch.int64, device=line.device)
        for block in line.split(_BLOCK):
            new = _counts(block, bits)
            total += _bits_of(new, counts)
            counts += new
    return Coded(total / 8)


def _ideal(layer: Layer, tables: torch.Tensor) -> float:
    parts = zip(layer.lines, tables, layer.bits, strict=True)
    return sum(_bits_of(_counts(line, bits), _counts(table, bits)) for line, table, bits in parts) / 8


def _counts(line: torch.Tensor, bits: int) -> torch.Tensor:
    return torch.bincount(line, minlength=2**bits)


def _shares(counts: torch.Tensor) -> torch.Tensor:
    return (counts.double() + _PRIOR) / (counts.sum() + _PRIOR * len(counts))


def _bits_of(counts: torch.Tensor, table: torch.Tensor) -> float:
    """What symbols that come so often need by such a table."""
    return -float((counts * _shares(table).log2()).sum())


def _table_bytes(bits: Sequence[int]) -> int:
    return sum(_BYTES_PER_FREQUENCY * 2**width for width in bits)


def _installed(name: str) -> Any:
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


CODERS: dict[str, Coder] = {
    "packed rows": as_they_are,
    "zlib, of rows as they are": zlib_of_rows,
    "lzma, of rows as they are": lzma_of_rows,
    "zstandard, of rows as they are": zstd_of_rows,
    'compress="entropy": zlib, of columns': of_this_package,
    "zstandard, of columns": zstd_of_columns,
    "lzma, of columns": lzma_of_columns,
    "constriction (arithmetic), tables in the file": arithmetic,
    "bound: tables of the rows, not counted": entropy_of_own_tables,
    "bound: tables of another text": entropy_of_tables_of_another_text,
    "bound: adaptive tables": entropy_of_adaptive_tables,
}
