"""Packed rows in fewer bytes, without loss: each coordinate's symbols together, by Huffman codes of zlib.

A coordinate of b bits is not on each of its 2^b levels equally often, and in a packed row it pays for b bits all the
same. Here the symbols (`code.symbols`) of all tokens of a coordinate lie side by side, coordinates of the same bits
behind one another, and as many symbols to a byte as there is room for. Huffman codes of such bytes come within a few
thousandths of the entropy, for a byte holds several symbols; zlib makes the codes anew as the statistics change from
coordinate to coordinate, and keeps them in the stream, so nothing of calibration is needed to read a file.
docs/caches_at_rest.md has the figures, with those of arithmetic coding.

What is not packed rows (keys and values of layers without a splice, rows of numbers, exact tokens, positions) stays.

Legend: `S` rows, `m` symbols of a row.
"""

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from kvsplice_hf.code.codecs import Codec
from kvsplice_hf.code.heads import HeadSplices
from kvsplice_hf.code.symbols import bits_of, rows_of, symbols_of
from kvsplice_hf.errors import CheckpointError


# Deflate without a header of its own, with as many symbols to a table of codes as it allows.
_LEVEL, _RAW, _MOST_MEMORY = 6, -15, 9
# Bytes of rows from which on a bar is shown.
_LONG = 2**24


def pack_rows(
    tensors: Mapping[str, torch.Tensor], splices: Mapping[str, nn.Module]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors of a file, with streams in the place of packed rows.

    Args:
        tensors: by name.
        splices: that made the packed rows, uint8 [..., row_bytes], among the tensors, by the names of these.

    Returns:
        The tensors of the file, of which the streams are uint8 [bytes], and what `unpack_rows` must know, for JSON.
    """
    kept, streams = dict(tensors), dict[str, dict[str, Any]]()
    total = sum(tensors[name].numel() for name in splices)
    for name, splice in tqdm(splices.items(), "coding rows", disable=total < _LONG):
        rows = tensors[name].contiguous()
        content, how = _coded(rows.reshape(math.prod(rows.shape[:-1]), rows.shape[-1]), codecs_of(splice))
        kept[name] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        streams[name] = {"shape": list(rows.shape), "crc32": _checksum(rows), **how}
    return kept, {"streams": streams}


def unpack_rows(
    tensor: Callable[[str], torch.Tensor], record: Mapping[str, Any], splices: Mapping[str, nn.Module]
) -> Callable[[str], torch.Tensor]:
    """What gives the tensors that `pack_rows` was given, by name.

    Args:
        tensor: gives those of the file.
        record: what `pack_rows` told.
        splices: as of `pack_rows`.

    Raises:
        CheckpointError: by what is returned: a stream is damaged.
    """

    def read(name: str) -> torch.Tensor:
        known = record["streams"].get(name)
        return tensor(name) if known is None else _rows_of_stream(name, tensor(name), known, splices[name])

    return read


def codecs_of(splice: Any) -> list[Codec]:
    """Of the parts of a packed row: of each key head, or of the one latent. None where rows are not packed."""
    parts = splice if isinstance(splice, HeadSplices) else [splice]
    return [part.codec for part in parts if part.codec is not None]


def coded_lines(values: torch.Tensor, bits: Sequence[int]) -> tuple[bytes, list[int]]:
    """A stream for each group of lines of the same bits, joined; and their lengths.

    Args:
        values: uint8 [m, S].
        bits: of each line.
    """
    parts = []
    for content in dense_groups(values, bits):
        coder = zlib.compressobj(_LEVEL, zlib.DEFLATED, _RAW, _MOST_MEMORY, zlib.Z_HUFFMAN_ONLY)
        parts.append(coder.compress(content) + coder.flush())
    return b"".join(parts), [len(part) for part in parts]


def dense_groups(values: torch.Tensor, bits: Sequence[int]) -> list[bytes]:
    """What `coded_lines` codes: of each group of lines of the same bits the symbols, several to a byte."""
    return [_dense(values[lines], width).numpy().tobytes() for width, lines in _groups(bits)]


def decoded_lines(content: bytes, sizes: Sequence[int], bits: Sequence[int], count: int) -> torch.Tensor:
    """Lines uint8 [m, S] of `coded_lines`.

    Args:
        content, sizes: as `coded_lines` gave them.
        bits: of each line.
        count: S.

    Raises:
        zlib.error: no such stream.
        ValueError: it holds other lines.
    """
    values = torch.zeros(len(bits), count, dtype=torch.uint8, device="cpu")
    start = 0
    for (width, lines), size in zip(_groups(bits), sizes, strict=True):
        needed = len(lines) * -(-count // _per_byte(width))
        decoder = zlib.decompressobj(_RAW)
        dense = decoder.decompress(content[start : start + size], needed + 1)  # no more, whatever a stream promises
        start += size
        if len(dense) != needed or not decoder.eof:
            raise ValueError(f"a stream holds other than the {needed} bytes that were coded")
        if needed:
            found = torch.frombuffer(bytearray(dense), dtype=torch.uint8).view(len(lines), -1)
            values[lines] = _spread(found, width, count)
    return values


def _coded(rows: torch.Tensor, codecs: Sequence[Codec]) -> tuple[bytes, dict[str, Any]]:
    """The streams of rows [S, bytes], and whether they are of symbols, and their lengths."""
    parts = rows.split([codec.row_bytes for codec in codecs], dim=1)
    symbols = [symbols_of(codec, part) for codec, part in zip(codecs, parts, strict=True)]
    back = [rows_of(codec, found.values) for codec, found in zip(codecs, symbols, strict=True)]
    # Bits that no field has are 0, unless something else than these codecs wrote the rows: then bytes are the symbols.
    as_symbols = torch.equal(torch.cat(back, dim=1), rows)
    values = torch.cat([found.values for found in symbols]) if as_symbols else rows.T
    content, sizes = coded_lines(values, _bits(codecs, as_symbols))
    return content, {"symbols": as_symbols, "sizes": sizes}


def _decoded(content: bytes, known: Mapping[str, Any], codecs: Sequence[Codec], count: int) -> torch.Tensor:
    """Rows [S, bytes] of what `_coded` gave."""
    values = decoded_lines(content, known["sizes"], _bits(codecs, known["symbols"]), count)
    if not known["symbols"]:
        return values.T.contiguous()
    lines = values.split([len(bits_of(codec)) for codec in codecs])
    return torch.cat([rows_of(codec, part) for codec, part in zip(codecs, lines, strict=True)], dim=1)


def _rows_of_stream(name: str, stream: torch.Tensor, known: Mapping[str, Any], splice: nn.Module) -> torch.Tensor:
    shape = known["shape"]
    try:
        rows = _decoded(stream.numpy().tobytes(), known, codecs_of(splice), math.prod(shape[:-1]))
    except (zlib.error, ValueError) as error:
        raise CheckpointError(f"The compressed rows of {name!r} are damaged: {error}. Save the cache again.") from error
    if _checksum(rows) != known["crc32"]:
        raise CheckpointError(
            f"The compressed rows of {name!r} are damaged: they do not have the checksum of those that were saved. "
            "Save the cache again."
        )
    return rows.view(shape)


def _checksum(rows: torch.Tensor) -> int:
    return zlib.crc32(rows.numpy().tobytes())


def _bits(codecs: Sequence[Codec], as_symbols: bool) -> list[int]:
    """Of the lines of a layer."""
    return [bits for codec in codecs for bits in (bits_of(codec) if as_symbols else (8,) * codec.row_bytes)]


def _groups(bits: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """Bits, and which lines have so many, the most bits first."""
    for width in sorted(set(bits), reverse=True):
        yield width, [line for line, found in enumerate(bits) if found == width]


def _per_byte(bits: int) -> int:
    """How many symbols of so many bits go into a byte."""
    return 8 // bits


def _dense(lines: torch.Tensor, bits: int) -> torch.Tensor:
    """Symbols uint8 [c, S] of so many bits, as many to a byte as there is room for; uint8 [c, S / symbols per byte].

    Symbols far apart share a byte: those that are next to one another in it move in one piece.
    """
    share = _per_byte(bits)
    size = -(-lines.shape[1] // share)
    padded = F.pad(lines, (0, size * share - lines.shape[1])).view(len(lines), share, size)
    dense = padded[:, 0].clone()
    for place in range(1, share):
        dense |= padded[:, place] << (bits * place)
    return dense


def _spread(dense: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The inverse of `_dense`: symbols uint8 [c, S]."""
    share = _per_byte(bits)
    if share == 1:
        return dense
    return torch.cat([(dense >> (bits * place)) & (2**bits - 1) for place in range(share)], dim=1)[:, :count]
