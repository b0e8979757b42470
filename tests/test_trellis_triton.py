"""Triton kernels on rows that are coded along a trellis, against PyTorch; devices as in `test_kernels`."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch


pytest.importorskip("triton", reason="the kernels need triton, which is not installed")

from test_coded_key_kernels import GAINS, Shape, keys_for, query_for, random, unpacked  # noqa: E402
from test_kernels import (  # noqa: E402
    DTYPES,
    WIDTH_PATTERNS,
    assert_same,
    masked_bias,
    on_devices,
    pass_in_the_interpreter,
)
from test_kernels import reference as attention_of_numbers  # noqa: E402

from kvsplice_hf import ConfigError  # noqa: E402
from kvsplice_hf.attend import reference  # noqa: E402
from kvsplice_hf.attend.backend import CodedKeys  # noqa: E402
from kvsplice_hf.attend.triton import backend as triton_backend  # noqa: E402
from kvsplice_hf.attend.triton import calls as kernels  # noqa: E402
from kvsplice_hf.attend.triton import tables  # noqa: E402
from kvsplice_hf.attend.triton.calls import attend_packed, encode_pack, search_codes  # noqa: E402
from kvsplice_hf.code import trellis  # noqa: E402
from kvsplice_hf.code.codec import RowCodec  # noqa: E402
from kvsplice_hf.code.trellis import TrellisCodec, TrellisTables, closest_codes, squared_error  # noqa: E402


# Which chain columns are in that share the gain, and which one the others.
FRONT, BEHIND = 0, 1
CODECS: dict[str, type[RowCodec]] = {"plain": RowCodec, "trellis": TrellisCodec}
WIDTHS = WIDTH_PATTERNS | {
    "one bit": [1],
    "seven bits": [7],
    "fewer columns than it looks back": [0] * 9 + [3, 0, 8, 16, 2],
}


@pytest.mark.skipif(kernels.interpreted(), reason="this is the process that it starts")
def test_the_kernels_pass_these_tests_in_the_interpreter() -> None:
    pass_in_the_interpreter(__file__)


@pytest.fixture(autouse=True)
def _searched_by_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels are compared with takes nothing of theirs."""
    monkeypatch.setattr(trellis, "_fastest", closest_codes)


class Rows(NamedTuple):
    """Of a table of the tests: a shape, and a codec for it."""

    shape: Shape
    codec: str
    widths: str
    gains: str

    def make(self, device: str) -> RowCodec:
        n = self.shape.rank + self.shape.numbers
        widths = torch.tensor((WIDTHS[self.widths] * n)[:n])
        scales = torch.where(widths == 0, 0.0, 2 + random(n, seed=1).abs())  # may be anything at width 0
        sizes = (self.shape.rank, self.shape.numbers)
        of_value, of_key = (torch.ones(size if has else 0) for size, has in zip(sizes, GAINS[self.gains], strict=True))
        return CODECS[self.codec](widths, scales, 0.3 * random(n, seed=2), 0.7 * of_value, 1.3 * of_key).to(device)

    def packed(self, codec: RowCodec) -> torch.Tensor:
        """Rows in a larger buffer, whose values and keys differ in size from row to row."""
        batch, rows = self.shape.batch, self.shape.rows
        sizes = random(2, batch, rows, 1, seed=8).exp()
        value, key = random(batch, rows, codec.row_dim, seed=9).split([self.shape.rank, self.shape.numbers], -1)
        device = codec.widths.device
        buffer = torch.full((batch, rows + 3, codec.row_bytes), 255, dtype=torch.uint8, device=device)
        buffer[:, :rows] = codec.pack(torch.cat([value * sizes[0], key * sizes[1]], -1).to(device))
        return buffer[:, :rows]


SMALL = Shape(rank=20, numbers=11)
READ = [
    *(Rows(SMALL, "trellis", widths, gains) for widths in WIDTHS for gains in ("no gains", "a gain of values")),
    *(Rows(SMALL, "plain", widths, "a gain of values") for widths in ("odd fields", "every width")),
    # Two and three pieces, in chunks with columns of the trellis and without.
    *(Rows(Shape(1, 2, rank, 16, 64, 40), "trellis", "odd fields", "a gain of values") for rank in (140, 321)),
    Rows(Shape(1, 2, 512, 16, 64, 40), "trellis", "another width in every 128", "a gain of values"),
]


@on_devices("rows, splits", [*itertools.product(READ, (1,)), (READ[1], 3)])
def test_rows_are_read_as_their_codec_unpacks_them(device: str, rows: Rows, splits: int) -> None:
    shape, codec = rows.shape, rows.make(device)
    packed = rows.packed(codec)
    query = (random(shape.batch, shape.queries, codec.row_dim, seed=7) / codec.row_dim**0.5).to(device)
    found = attend_packed(query, packed, codec, shape.rank, splits=splits)
    assert_same(found, attention_of_numbers(query, codec.unpack(packed), shape.rank))


@on_devices("dtype", [(dtype,) for dtype in DTYPES[1:]])
def test_rows_are_read_by_queries_of_any_type(device: str, dtype: torch.dtype) -> None:
    rows = Rows(SMALL, "trellis", "odd fields", "a gain of values")
    codec = rows.make(device)
    packed, query = rows.packed(codec), (random(2, 5, codec.row_dim, seed=7) / 5).to(dtype).to(device)
    expected = attention_of_numbers(query.float(), codec.unpack(packed), SMALL.rank)
    assert_same(attend_packed(query, packed, codec, SMALL.rank), expected, dtype)


KEYS = [
    *(
        Rows(shape, codec, widths, gains)
        for shape in (Shape(), Shape(1, 3, 140, 64, 64, 40))
        for codec, widths in (("plain", "odd fields"), ("trellis", "odd fields"), ("trellis", "every width"))
        for gains in GAINS
    ),
    Rows(Shape(rope_dim=2, numbers=1), "trellis", "four bits", "two gains"),
    Rows(Shape(1, 2, 9, 128, 128, 20), "trellis", "every width", "two gains"),
    Rows(Shape(1, 2, 321, 32, 30, 5), "trellis", "odd fields", "two gains"),
    # The value has no column, or the key has none.
    Rows(Shape(rank=8, numbers=8), "trellis", "values of whole bytes", "two gains"),
    Rows(Shape(rank=8, numbers=8), "trellis", "keys of whole bytes", "two gains"),
]
WIDTHS |= {"fewer columns than 64": [8, 4, 16, 0, 2]}
WIDTHS |= {"values of whole bytes": [8] * 8 + [3] * 8, "keys of whole bytes": [3] * 8 + [8] * 8}


@on_devices("rows", [(rows,) for rows in KEYS])
def test_coded_keys_are_decoded_and_turned_as_pytorch_does_it(device: str, rows: Rows) -> None:
    """Without a gain of values the columns of values and of keys are one chain, sorted by width."""
    shape, codec = rows.shape, rows.make(device)
    query, packed, keys = query_for(shape, device), rows.packed(codec), keys_for(shape, device)
    expected = reference.attend(query, packed, codec, shape.rank, keys=keys)
    assert_same(attend_packed(query, packed, codec, shape.rank, keys=keys), expected)


@on_devices("gains", [(gains,) for gains in GAINS])
def test_neighbours_of_a_columns_code_are_in_its_own_chain(device: str, gains: str) -> None:
    rows = Rows(Shape(), "trellis", "odd fields", gains)
    codec, rank = rows.make(device), rows.shape.rank
    found, whole = tables.tables_of(codec, rank, rank), tables.tables_of(codec).layout
    assert torch.equal(torch.cat([found.layout, found.key_layout], 1), whole)
    of_key = codec._chain_numbers >= rank
    for part in codec.chains:
        for lag, entry in tables.NEIGHBOURS.items():
            places = whole[entry.value, codec._chain_numbers[part]].cpu()
            assert (places[:lag] == -1).all()
            assert (places[lag:] >= 0).all()
    if gains == "no gains":  # otherwise the table above would not show that neighbours in the other part are read
        assert len(codec._chain_numbers[codec.chains[FRONT]]) == 0
        assert (of_key[1:] != of_key[:-1]).any()
    else:
        assert torch.equal(codec._chain_numbers[codec.chains[FRONT]] < rank, ~of_key[: codec.chains[FRONT].stop])
        assert of_key[codec.chains[BEHIND]].all()


# The key's code is part of the value: in its last piece, in several, as raw numbers, and as all there is.
WHOLE = [
    *(
        Rows(shape, codec, widths, gains)
        for shape in (Shape(), Shape(1, 3, 140, 64, 64, 40))
        for codec, widths in (("plain", "every width"), ("trellis", "odd fields"), ("trellis", "every width"))
        for gains in GAINS
    ),
    Rows(Shape(rope_dim=2, numbers=1), "trellis", "four bits", "two gains"),
    Rows(Shape(1, 2, 9, 128, 128, 20), "trellis", "every width", "two gains"),
    Rows(Shape(1, 2, 512, 64, 64, 20), "trellis", "another width in every 128", "two gains"),
    Rows(Shape(rank=8, numbers=8), "trellis", "values of whole bytes", "two gains"),
    Rows(Shape(rank=8, numbers=8), "trellis", "keys of whole bytes", "a gain of values"),
]


def attention_of_whole_rows(
    query: torch.Tensor, packed: torch.Tensor, codec: RowCodec, keys: CodedKeys, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """All numbers of a row are its value, and its rotated key is behind them."""
    key = unpacked(packed, codec, keys, keys.start(codec))[..., keys.start(codec) :]
    return attention_of_numbers(query, torch.cat([codec.unpack(packed), key], -1), codec.row_dim, bias)


def whole_query_for(rows: Rows, device: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    shape, n = rows.shape, rows.shape.rank + rows.shape.numbers + rows.shape.rope_dim
    return (random(shape.batch, shape.queries, n, seed=7) / n**0.5).to(dtype).to(device)


@on_devices("rows", [(rows,) for rows in WHOLE])
def test_the_code_of_a_key_may_be_part_of_the_value_as_well(device: str, rows: Rows) -> None:
    codec, keys, query = rows.make(device), keys_for(rows.shape, device), whole_query_for(rows, device)
    packed = rows.packed(codec)
    found = attend_packed(query, packed, codec, codec.row_dim, scaling=0.8, keys=keys)
    assert found[0].shape[2] == codec.row_dim
    assert_same(found, attention_of_whole_rows(0.8 * query, packed, codec, keys))


@on_devices("dtype, splits", itertools.product(DTYPES, (1, 3)))
def test_whole_rows_are_read_in_splits_and_with_a_bias(device: str, dtype: torch.dtype, splits: int) -> None:
    rows = Rows(Shape(rows=150, queries=6), "trellis", "odd fields", "two gains")
    codec, keys, query = rows.make(device), keys_for(rows.shape, device), whole_query_for(rows, device, dtype)
    packed, bias = rows.packed(codec), masked_bias((2, 3, 150), device)
    found = attend_packed(query, packed, codec, codec.row_dim, bias, splits, keys=keys)
    assert_same(found, attention_of_whole_rows(query.float(), packed, codec, keys, bias), dtype)


@on_devices("", [()])
def test_a_gain_of_a_part_of_the_key_is_one_of_that_part(device: str) -> None:
    rows, n = Rows(SMALL, "trellis", "odd fields", "two gains"), SMALL.rank + SMALL.numbers
    whole, keys = rows.make("cpu"), keys_for(SMALL, device)
    for sigmas, key_sigmas in ((SMALL.rank, 4), (0, 0)):
        sizes = whole.sigmas[:sigmas], whole.key_sigmas[:key_sigmas]
        codec = TrellisCodec(whole.widths, whole.scales, whole.centres, *sizes).to(device)
        packed, query = rows.packed(codec), whole_query_for(rows, device)
        found = attend_packed(query, packed, codec, n, keys=keys)
        assert_same(found, attention_of_whole_rows(query, packed, codec, keys))


@on_devices("value_dim", [(value_dim,) for value_dim in (SMALL.rank - 1, SMALL.rank + 1)])
def test_values_that_end_within_a_code_are_refused(device: str, value_dim: int) -> None:
    rows = Rows(SMALL, "trellis", "odd fields", "two gains")
    codec = rows.make(device)
    query = query_for(SMALL, device)
    with pytest.raises(ConfigError, match=f"needed {value_dim} of a value and 11 of a key, or values of all 31"):
        attend_packed(query, rows.packed(codec), codec, value_dim, keys=keys_for(SMALL, device))


PACKING = [
    *(
        (Rows(Shape(rank=70, numbers=66), "trellis", widths, gains), torch.float32)
        for widths in WIDTHS
        for gains in ("no gains", "two gains")
    ),
    *((Rows(Shape(rank=70, numbers=66), "trellis", "odd fields", "two gains"), dtype) for dtype in DTYPES[1:]),
    (Rows(Shape(rank=70, numbers=66), "trellis", "every width", "a gain of values"), torch.float32),
    (Rows(Shape(rank=70, numbers=66), "plain", "every width", "a gain of values"), torch.float32),
]


def numbers_for(codec: RowCodec, sizes: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    """Rows of different sizes, some numbers of which are beyond the outermost level."""
    rows = random(*sizes, codec.row_dim, seed=10) * random(*sizes, 1, seed=11).exp()
    rows[..., 1::17] *= 50
    return rows.to(dtype).to(device)


def assert_searched(
    unit: torch.Tensor, codec: RowCodec, search: Callable[[torch.Tensor, TrellisTables], torch.Tensor] = search_codes
) -> None:
    """Codes of both chains, whose columns are the numbers of `unit`, are those of PyTorch."""
    for chain, part in enumerate(codec.chains):
        of_chain, made = unit[:, part].contiguous(), codec.trellis_tables(chain)
        assert torch.equal(search(of_chain, made), closest_codes(of_chain, made))


def errors_of(packed: torch.Tensor, rows: torch.Tensor, codec: RowCodec) -> torch.Tensor:
    return ((codec.unpack(packed) - rows.float()) / torch.where(codec.scales > 0, codec.scales, 1.0)).square().sum(-1)


@on_devices("rows, dtype", PACKING)
def test_packed_rows_are_as_close_as_those_of_pytorch(device: str, rows: Rows, dtype: torch.dtype) -> None:
    codec = rows.make(device)
    numbers = numbers_for(codec, (2, 19), dtype, device)
    found, expected = encode_pack(numbers, codec), codec.pack(numbers)
    assert found.shape == expected.shape
    torch.testing.assert_close(
        errors_of(found, numbers, codec), errors_of(expected, numbers, codec), rtol=1e-3, atol=1e-6
    )
    # Paths that are nearly as close as one another are rare.
    assert (found != expected).any(-1).float().mean() <= (0.02 if kernels.interpreted() else 0.1)


# How many numbers share a gain, and how many behind them another one.
GAINED = {"none": (0, 0), "some": (40, 0), "all": (136, 0), "values": (70, 0), "keys": (70, 66), "only keys": (0, 9)}


@on_devices("gained, widths", itertools.product(GAINED, ("odd fields", "every width", "fewer columns than 64")))
def test_each_chain_is_packed_from_state_0_on(device: str, gained: str, widths: str) -> None:
    sigmas, key_sigmas = GAINED[gained]
    every, plain = torch.tensor((WIDTHS[widths] * 136)[:136]), torch.ones(136)
    codec = TrellisCodec(every, plain, 0.1 * plain, plain[:sigmas], plain[:key_sigmas]).to(device)
    sizes = [part.stop - part.start for part in codec.chains]
    assert (min(sizes) == 0) == (gained in ("none", "all", "only keys"))
    numbers = numbers_for(codec, (23,), torch.float32, device)
    found, expected = encode_pack(numbers, codec), codec.pack(numbers)
    assert (found != expected).any(-1).sum() <= (0 if kernels.interpreted() else 2)


@on_devices("sizes", [((),), ((1,),), ((0, 4),), ((3, 1, 5),)])
def test_rows_of_any_shape_are_packed(device: str, sizes: tuple[int, ...]) -> None:
    codec = Rows(SMALL, "trellis", "odd fields", "two gains").make(device)
    numbers = numbers_for(codec, sizes, torch.float32, device)
    assert torch.equal(encode_pack(numbers, codec), codec.pack(numbers[None])[0])


@on_devices("", [()])
def test_long_inputs_are_packed_in_parts(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = Rows(SMALL, "trellis", "every width", "two gains").make(device)
    numbers = numbers_for(codec, (40,), torch.float32, device)
    columns, whole = len(codec.in_chain), encode_pack(numbers, codec)
    monkeypatch.setattr(kernels, "_MOST_BYTES", 17 * kernels.search_bytes(columns) + 1)
    assert kernels._rows_at_once(columns) == 17
    assert torch.equal(encode_pack(numbers, codec), whole)
    assert_searched(random(40, columns, seed=12).to(device), codec)


@on_devices("", [()])
def test_what_is_not_a_number_and_what_is_far_out_gets_a_code_all_the_same(device: str) -> None:
    codec = Rows(SMALL, "trellis", "odd fields", "a gain of values").make(device)
    numbers = numbers_for(codec, (6,), torch.float32, device)
    numbers[1, 3], numbers[2], numbers[3, 4], numbers[4, 5] = torch.nan, torch.nan, torch.inf, -1e30
    found = encode_pack(numbers, codec)
    assert (codec.codes(found) < 2 ** codec.widths.int()).all()
    same = [0, 5] if device == "cuda" else [0, 3, 4, 5]  # what a gain that is not a number is as a byte, is not defined
    assert torch.equal(found[same], codec.pack(numbers)[same])
    unit = random(6, len(codec.in_chain), seed=13).to(device)
    unit[1, 3], unit[2], unit[3, 4], unit[4, 5] = torch.nan, torch.nan, torch.inf, -1e30
    assert_searched(unit, codec)


@on_devices("widths", [(widths,) for widths in WIDTHS])
def test_the_search_finds_paths_as_close_as_that_of_pytorch(device: str, widths: str) -> None:
    codec = Rows(Shape(rank=70, numbers=66), "trellis", widths, "no gains").make(device)
    made = codec.trellis_tables(BEHIND)
    unit = (random(23, len(codec.in_chain), seed=14) / 2).to(device)
    found, expected = search_codes(unit, made), closest_codes(unit, made)
    assert found.dtype == torch.uint8
    torch.testing.assert_close(squared_error(unit, found, made), squared_error(unit, expected, made))


def test_the_backend_reads_and_writes_both_codecs() -> None:
    assert triton_backend.TritonBackend.codecs == {RowCodec.kind, TrellisCodec.kind}


@on_devices("", [()])
def test_the_backend_packs_and_searches(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "_triton_kernels", lambda: kernels)
    backend, codec = triton_backend.TritonBackend(), Rows(SMALL, "trellis", "odd fields", "two gains").make(device)
    numbers = numbers_for(codec, (9,), torch.float32, device)
    assert torch.equal(backend.pack(numbers, codec), codec.pack(numbers))
    assert_searched(random(9, len(codec.in_chain), seed=15).to(device), codec, backend.search)
