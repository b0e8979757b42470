"""Compressed rows in files: they come back bit for bit, take fewer bytes, and no other rows ever come back."""

import random
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from test_caches_at_rest import NAME, filled, made
from toy_codec import LargestCodec

from kvsplice_hf import CheckpointError, ConfigError, RowCodec, TrellisCodec, load_cache, save_cache
from kvsplice_hf.code.codecs import Codec
from kvsplice_hf.code.symbols import bits_of, rows_of, symbols_of
from kvsplice_hf.rest import compression, entropy
from kvsplice_hf.rest import file as cache_file


CODECS = {"rows": RowCodec, "trellis": TrellisCodec}
WIDTHS = {
    "every width": [8, 4, 4, 0, 3, 2, 1, 1, 16, 5, 6, 7, 3, 3, 2, 0, 4],
    "one coordinate": [3],
    "only 8 bits": [8, 8],
    "only 16 bits": [16],
    "nothing stored": [0, 0],
    "a long trellis": [3] * 40 + [2] * 31,
}
GAINS = {"no gain": (0, 0), "one gain": (1, 0), "two gains": (1, 1)}


def codec_of(kind: str, widths: str = "every width", gains: str = "two gains") -> Any:
    bits = torch.tensor(WIDTHS[widths])
    gained, key_gained = GAINS[gains]
    first = (len(bits) + 1) // 2
    ones = torch.ones(len(bits))
    sigmas = ones[: gained * first], ones[: key_gained * (len(bits) - first)]
    return CODECS[kind](bits, 2 * ones, torch.zeros(len(bits)), *sigmas)


def rows_from(codec: Codec, count: int = 33) -> torch.Tensor:
    torch.manual_seed(count)
    return codec.pack(1.5 * torch.randn(count, codec.row_dim))


# ----------------------------------------------------------------------------------------------------------- symbols


@pytest.mark.parametrize("count", [0, 1, 33])
@pytest.mark.parametrize("gains", GAINS)
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("kind", CODECS)
def test_symbols_say_all_of_a_row_and_no_more_than_their_bits(kind: str, widths: str, gains: str, count: int) -> None:
    codec = codec_of(kind, widths, gains)
    packed = rows_from(codec, count)
    values, bits = symbols_of(codec, packed)
    assert values.shape == (len(bits), count)
    assert bits == bits_of(codec)
    assert all(int(line.max()) < 2**width for line, width in zip(values, bits, strict=True) if count)
    assert torch.equal(rows_of(codec, values), packed)


def test_symbols_along_a_trellis_count_levels_and_those_of_the_odd_choice_in_a_mirror() -> None:
    codec = codec_of("trellis", "a long trellis", "no gain")
    packed = rows_from(codec, 200)
    values, bits = symbols_of(codec, packed)
    levels = codec.level_numbers(codec.codes(packed))[:, codec.column_index].T.long()
    last = torch.tensor([2**width - 1 for width in bits])[:, None]
    assert torch.equal(values.long(), torch.where(levels % 2 == 1, last - (levels >> 1), levels >> 1))


def test_rows_of_a_codec_that_is_not_known_here_are_bytes() -> None:
    codec = LargestCodec(torch.zeros(6))
    packed = rows_from(codec)
    values, bits = symbols_of(codec, packed)
    assert bits == (8,) * codec.row_bytes
    assert torch.equal(values, packed.T)
    assert torch.equal(rows_of(codec, values), packed)


# ----------------------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize("count", [0, 1, 7, 500])
def test_lines_of_any_bits_come_back(count: int) -> None:
    bits = [1, 8, 3, 2, 5, 4, 7, 6, 1, 3]
    values = torch.stack([torch.randint(0, 2**width, (count,), dtype=torch.uint8) for width in bits])
    content, sizes = entropy.coded_lines(values, bits)
    assert len(content) == sum(sizes)
    assert torch.equal(entropy.decoded_lines(content, sizes, bits, count), values)


class Splice(torch.nn.Module):
    """What of a splice compression asks for."""

    def __init__(self, codec: Codec) -> None:
        super().__init__()
        self.codec = codec


def stored(codec: Codec, rows: torch.Tensor) -> tuple[dict[str, torch.Tensor], Any, torch.Tensor]:
    """The tensors and the record of a file with these rows, and what is read of them."""
    splices = {"0.keys": Splice(codec)}
    tensors = {"0.keys": rows, "other": torch.arange(5)}
    smaller, record = entropy.pack_rows(tensors, splices)
    reader = entropy.unpack_rows(lambda name: smaller[name], record, splices)
    assert torch.equal(reader("other"), tensors["other"])
    return smaller, record, reader("0.keys")


@pytest.mark.parametrize("kind", CODECS)
def test_rows_take_less_than_in_memory_and_nearly_their_entropy(kind: str) -> None:
    codec = codec_of(kind, "a long trellis", "no gain")
    rows = rows_from(codec, 4096)[None, None]
    smaller, _, read = stored(codec, rows)
    assert torch.equal(read, rows)
    values = symbols_of(codec, rows[0, 0]).values
    needed = 0.0
    for line in values:
        share = torch.bincount(line).double() / len(line)
        needed -= float((share * share.clamp(min=1e-12).log2()).sum()) * len(line) / 8
    assert needed < 0.99 * rows.numel()
    assert smaller["0.keys"].numel() < 1.02 * needed


def test_bits_that_no_field_has_come_back_as_they_were() -> None:
    codec = codec_of("rows", "one coordinate", "no gain")  # 2 + 1 bits in two bytes
    rows = rows_from(codec)[None, None] | 0b10010000
    _, record, read = stored(codec, rows)
    assert not record["streams"]["0.keys"]["symbols"]
    assert torch.equal(read, rows)


@pytest.mark.parametrize("shape", [(2, 1, 0), (0, 1, 3), (1, 1, 1)])
def test_few_rows_or_none_come_back(shape: tuple[int, ...]) -> None:
    codec = codec_of("trellis")
    rows = torch.zeros(*shape, codec.row_bytes, dtype=torch.uint8)
    assert torch.equal(stored(codec, rows)[2], rows)


# ------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", [NAME, "llama"])
def test_a_file_of_a_long_prompt_is_smaller(name: str, tmp_path: Path) -> None:
    model = made(name, "packed")
    cache, _, _ = filled(model, length=400)
    sizes = [save_cache(cache, tmp_path / "cache", model, compress=form) for form in (None, "entropy")]
    assert sizes[1] < sizes[0]


def test_what_is_no_packed_row_stays_as_it_is(tmp_path: Path) -> None:
    model = made(NAME, "packed")
    cache, ids, mask = filled(model)
    files = []
    for form in (None, "entropy"):
        save_cache(cache, tmp_path / "cache", model, input_ids=ids, attention_mask=mask, compress=form)
        files.append(cache_file.open_cache_file(tmp_path / "cache"))
    plain, smaller = ({name: file.tensor(name) for name in file.names} for file in files)
    coded = set(files[1].description["compression"]["streams"])
    assert coded == {"0.keys", "1.keys"}
    assert plain.keys() == smaller.keys()
    for name in plain.keys() - coded:
        assert torch.equal(plain[name], smaller[name])


def test_a_changed_stream_gives_no_other_rows_even_without_the_digest_of_the_file(tmp_path: Path) -> None:
    model, chance, path = made(NAME, "packed"), random.Random(0), tmp_path / "cache"
    cache, _, _ = filled(model, length=64)
    save_cache(cache, path, model, compress="entropy")
    content, file = path.read_bytes(), cache_file.open_cache_file(path)
    streams = [file.tensor(name).numpy().tobytes() for name in file.description["compression"]["streams"]]
    noticed = 0
    for _ in range(60):
        stream = chance.choice(streams)
        place = content.index(stream) + chance.randrange(len(stream))
        changed = content[:place] + bytes([content[place] ^ chance.randrange(1, 256)]) + content[place + 1 :]
        path.write_bytes(changed)
        try:
            loaded = load_cache(model, path, verify=False)
        except CheckpointError:
            noticed += 1
        else:  # up to seven bits behind the end of a stream say nothing
            assert all(torch.equal(a.keys, b.keys) for a, b in zip(loaded.layers, cache.layers, strict=True))
    assert noticed > 55


def test_a_compression_that_is_not_known_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(NAME, "packed")
    cache, _, _ = filled(model)
    with pytest.raises(ConfigError, match="`compress` is 'zip'; it must be one of 'entropy'"):
        save_cache(cache, tmp_path / "cache", model, compress="zip")
    assert not list(tmp_path.iterdir())
    monkeypatch.setitem(compression.COMPRESSIONS, "later", compression.COMPRESSIONS["entropy"])
    save_cache(cache, tmp_path / "cache", model, compress="later")
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="made smaller by 'later'"):
        load_cache(model, tmp_path / "cache")


def test_a_cache_without_packed_rows_is_saved_as_it_is_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = made(NAME, "stock")
    cache = filled(model)[0]
    save_cache(cache, tmp_path / "cache", model)
    assert "no packed rows" not in caplog.text
    save_cache(cache, tmp_path / "cache", model, compress="entropy")
    assert "no packed rows in this cache" in caplog.text
    loaded = load_cache(model, tmp_path / "cache")
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(loaded.layers, cache.layers, strict=True))


def test_rows_that_a_decoder_gets_wrong_are_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(NAME, "packed")
    save_cache(filled(model)[0], tmp_path / "cache", model, compress="entropy")
    decoded = entropy.decoded_lines
    monkeypatch.setattr(entropy, "decoded_lines", lambda *args: decoded(*args).flip(1))
    with pytest.raises(CheckpointError, match="checksum"):
        load_cache(model, tmp_path / "cache")
    monkeypatch.setattr(entropy, "decoded_lines", lambda *args: (_ for _ in ()).throw(zlib.error("invalid")))
    with pytest.raises(CheckpointError, match="are damaged: invalid"):
        load_cache(model, tmp_path / "cache")
