"""Triton kernels on rows whose keys were coded before their rotation, against PyTorch; devices as in `test_kernels`."""

import itertools
from typing import Any, NamedTuple

import pytest
import torch


pytest.importorskip("triton", reason="the kernels need triton, which is not installed")

from test_kernels import (  # noqa: E402
    DTYPES,
    WIDTH_PATTERNS,
    assert_same,
    masked_bias,
    on_devices,
    pass_in_the_interpreter,
)
from test_kernels import reference as attention_of_numbers  # noqa: E402

from kvsplice_hf import ConfigError, RowCodec  # noqa: E402
from kvsplice_hf.attend import choice as dispatch  # noqa: E402
from kvsplice_hf.attend import reference  # noqa: E402
from kvsplice_hf.attend.backend import CodedKeys  # noqa: E402
from kvsplice_hf.attend.triton import backend as triton_backend  # noqa: E402
from kvsplice_hf.attend.triton import calls as kernels  # noqa: E402
from kvsplice_hf.attend.triton.calls import attend_packed, encode_pack  # noqa: E402
from kvsplice_hf.code.keys import TURN_STEPS, Pairs, half_pairs, neighbour_pairs, redo_turns  # noqa: E402


SLOTS = 50


@pytest.mark.skipif(kernels.interpreted(), reason="this is the process that it starts")
def test_the_kernels_pass_these_tests_in_the_interpreter() -> None:
    pass_in_the_interpreter(__file__)


class Shape(NamedTuple):
    """`B` batch, `M` queries, `r` numbers of a value, `P` of a key, `p` of its code, `S` rows."""

    batch: int = 2
    queries: int = 5
    rank: int = 20
    rope_dim: int = 16
    numbers: int = 11
    rows: int = 70


SMALL, WIDE = Shape(), Shape(1, 3, 140, 64, 64, 40)
# Whether the value has a gain, and whether the key has one.
GAINS = {"no gains": (False, False), "a gain of values": (True, False), "two gains": (True, True)}
WIDTHS = {name: WIDTH_PATTERNS[name] for name in ("odd fields", "every width", "raw numbers")}


def random(*sizes: int, seed: int) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def codec_for(shape: Shape, device: str, widths: list[int], gains: str) -> RowCodec:
    n = shape.rank + shape.numbers
    every = torch.tensor((widths * n)[:n])
    scales = torch.where(every == 0, 0.0, 2 + random(n, seed=1).abs())  # may be anything at width 0
    of_value, of_key = (torch.ones(size if has else 0) for size, has in zip(shape[2:5:2], GAINS[gains], strict=True))
    return RowCodec(every, scales, 0.3 * random(n, seed=2), 0.7 * of_value, 1.3 * of_key).to(device)


def keys_for(shape: Shape, device: str, dtype: torch.dtype = torch.float32, neighbours: bool = False) -> CodedKeys:
    """Slots anywhere in a table whose lines are part of longer ones."""
    pairs = shape.rope_dim // 2
    table = torch.randint(0, TURN_STEPS, (pairs, SLOTS + 9), generator=torch.Generator().manual_seed(3))
    slots = torch.randint(0, SLOTS, (shape.batch, shape.rows + 2), generator=torch.Generator().manual_seed(4))
    expand = (random(shape.rope_dim, shape.numbers, seed=5) / shape.numbers**0.5).to(dtype)
    mean = random(shape.rope_dim, seed=6).to(dtype)
    columns = (neighbour_pairs if neighbours else half_pairs)(torch.arange(pairs))
    return CodedKeys(
        expand.to(device),
        mean.to(device),
        columns.to(device),
        table.to(torch.uint8).to(device)[:, 4 : 4 + SLOTS],
        slots.to(torch.int32).to(device)[:, : shape.rows],
    )


def query_for(shape: Shape, device: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    n = shape.rank + shape.rope_dim
    return (random(shape.batch, shape.queries, n, seed=7) / n**0.5).to(dtype).to(device)


def packed_for(shape: Shape, device: str, codec: RowCodec) -> torch.Tensor:
    """Rows in a larger buffer, whose values and keys differ in size from row to row."""
    sizes = random(2, shape.batch, shape.rows, 1, seed=8).exp()
    value, key = random(shape.batch, shape.rows, codec.row_dim, seed=9).split([shape.rank, shape.numbers], -1)
    buffer = torch.full((shape.batch, shape.rows + 3, codec.row_bytes), 255, dtype=torch.uint8)
    buffer[:, : shape.rows] = codec.cpu().pack(torch.cat([value * sizes[0], key * sizes[1]], -1))
    codec.to(device)
    return buffer.to(device)[:, : shape.rows]


def unpacked(packed: torch.Tensor, codec: RowCodec, keys: CodedKeys, rank: int) -> torch.Tensor:
    """Values and rotated keys, one step after the other."""
    numbers = codec.unpack(packed)
    key = numbers[..., rank:] @ keys.expand.float().T + keys.mean.float()
    key = redo_turns(key, keys.turns().permute(1, 2, 0), Pairs(*keys.pairs))
    return torch.cat([numbers[..., :rank], key], -1)


TABLE = [
    *((shape, *rest, torch.float32) for shape in (SMALL, WIDE) for rest in itertools.product(GAINS, WIDTHS)),
    *((shape, "two gains", "every width", dtype) for shape in (SMALL, WIDE) for dtype in DTYPES[1:]),
    *((SMALL._replace(queries=count), "two gains", "odd fields", torch.float32) for count in (1, 16, 37)),
    # One pair; no power of two; the most numbers; a value in three pieces; fewer rows than a block, and one.
    (Shape(rope_dim=2, numbers=1), "two gains", "odd fields", torch.float32),
    (Shape(rope_dim=24, numbers=20), "two gains", "every width", torch.float32),
    (Shape(1, 2, 9, 128, 128, 20), "two gains", "every width", torch.float32),
    (Shape(1, 2, 321, 32, 30, 5), "two gains", "odd fields", torch.float32),
    (Shape(3, 2, 20, 16, 16, 1), "two gains", "odd fields", torch.float32),
]


@on_devices("shape, gains, widths, dtype", TABLE)
def test_keys_are_decoded_and_turned_as_pytorch_does_it(
    device: str, shape: Shape, gains: str, widths: str, dtype: torch.dtype
) -> None:
    codec = codec_for(shape, device, WIDTHS[widths], gains)
    query, packed = query_for(shape, device, dtype), packed_for(shape, device, codec)
    for neighbours in (False, True):
        keys = keys_for(shape, device, dtype, neighbours)
        # A factor is applied in the type of the query.
        expected = reference.attend((query * 0.8).float(), packed, codec, shape.rank, keys=keys)
        found = attend_packed(query, packed, codec, shape.rank, scaling=0.8, keys=keys)
        assert_same(found, expected, dtype)


@on_devices("splits, biased", [*itertools.product((1, 3, 5), (False, True))])
def test_splits_and_biases_are_those_of_other_rows(device: str, splits: int, biased: bool) -> None:
    shape = SMALL._replace(rows=150, queries=6)
    codec, keys = codec_for(shape, device, [4], "two gains"), keys_for(shape, device)
    query, packed = query_for(shape, device), packed_for(shape, device, codec)
    bias = masked_bias((2, 3, shape.rows), device) if biased else None
    expected = attention_of_numbers(query, unpacked(packed, codec, keys, shape.rank), shape.rank, bias)
    assert_same(attend_packed(query, packed, codec, shape.rank, bias, splits, keys=keys), expected)


@on_devices("splits", [(1,), (3,)])
def test_slots_behind_a_length_are_not_read(device: str, splits: int) -> None:
    shape = SMALL._replace(batch=4, rows=150)
    codec, keys = codec_for(shape, device, [4], "two gains"), keys_for(shape, device)
    lengths = torch.tensor([0, 1, 70, 999], dtype=torch.int32, device=device)
    query, packed = query_for(shape, device), packed_for(shape, device, codec)
    expected = unpacked(packed, codec, keys, shape.rank)
    keys.slots[2, 70:] = torch.iinfo(torch.int32).max
    mixed, lse = attend_packed(query, packed, codec, shape.rank, None, splits, lengths=lengths, keys=keys)
    assert (mixed[0] == 0).all()
    assert (lse[0] == -torch.inf).all()
    for entry, length in ((1, 1), (2, 70), (3, 150)):
        part = slice(entry, entry + 1)
        rows = expected[part, :length]
        assert_same((mixed[part], lse[part]), attention_of_numbers(query[part], rows, shape.rank))


@on_devices("", [()])
def test_nothing_beside_the_tables_is_read_whatever_slots_and_angles_are(device: str) -> None:
    codec, keys = codec_for(SMALL, device, [4], "two gains"), keys_for(SMALL, device)
    query, packed = query_for(SMALL, device), packed_for(SMALL, device, codec)
    ends = torch.tensor([-1, SLOTS, -(2**31), 2**31 - 1], dtype=torch.int32, device=device)
    keys.slots[:, 5:9] = ends
    keys.table[:, ::2] += 3 * TURN_STEPS  # the same angles, if they were any
    found = attend_packed(query, packed, codec, SMALL.rank, keys=keys)
    inside = keys._replace(slots=keys.slots.clamp(0, SLOTS - 1))
    assert_same(found, reference.attend(query, packed, codec, SMALL.rank, keys=inside))


@on_devices("", [()])
def test_slots_in_any_memory_layout_will_do(device: str) -> None:
    codec, keys = codec_for(SMALL, device, [4], "two gains"), keys_for(SMALL, device)
    query, packed = query_for(SMALL, device), packed_for(SMALL, device, codec)
    keys = keys._replace(slots=keys.slots[:1].expand(2, -1))
    expected = reference.attend(query, packed, codec, SMALL.rank, keys=keys)
    assert_same(attend_packed(query, packed, codec, SMALL.rank, keys=keys), expected)
    keys = keys._replace(slots=keys.slots.T.contiguous().T)
    assert_same(attend_packed(query, packed, codec, SMALL.rank, keys=keys), expected)


@on_devices("", [()])
def test_scales_that_have_changed_since_the_last_call_count(device: str) -> None:
    codec, keys = codec_for(SMALL, device, [4], "two gains"), keys_for(SMALL, device)
    query, packed = query_for(SMALL, device), packed_for(SMALL, device, codec)
    attend_packed(query, packed, codec, SMALL.rank, keys=keys)
    codec.scales.mul_(1.5)
    codec.centres.add_(0.1)
    expected = reference.attend(query, packed, codec, SMALL.rank, keys=keys)
    assert_same(attend_packed(query, packed, codec, SMALL.rank, keys=keys), expected)


@on_devices("", [()])
def test_widths_that_were_loaded_since_the_last_call_count(device: str) -> None:
    """Of rows with as many bytes: there is no other sign of them."""
    codec, keys = codec_for(SMALL, device, WIDTHS["odd fields"], "no gains"), keys_for(SMALL, device)
    query, packed = query_for(SMALL, device), packed_for(SMALL, device, codec)
    attend_packed(query, packed, codec, SMALL.rank, keys=keys)
    codec.load_state_dict({**codec.state_dict(), "widths": codec.widths.flip(0), "scales": codec.scales.flip(0)})
    expected = reference.attend(query, packed, codec, SMALL.rank, keys=keys)
    assert_same(attend_packed(query, packed, codec, SMALL.rank, keys=keys), expected)


@on_devices("", [()])
def test_calls_are_served_by_the_kernels(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_verdicts", {})
    monkeypatch.setattr(triton_backend, "_triton_kernels", lambda: kernels)
    codec, keys = codec_for(SMALL, device, [4], "two gains"), keys_for(SMALL, device)
    query, packed = query_for(SMALL, device), packed_for(SMALL, device, codec)
    expected = reference.attend(query, packed, codec, SMALL.rank, scaling=0.5, keys=keys)
    for _ in range(2):  # the first call is computed both ways
        found = dispatch.attend(query, packed, codec, SMALL.rank, None, scaling=0.5, keys=keys)
        assert_same(tuple(found), tuple(expected))
    assert list(dispatch._verdicts.values()) == [True]


PACKING = [
    *((widths, "two gains", torch.float32) for widths in WIDTH_PATTERNS),
    *(("odd fields", "two gains", dtype) for dtype in DTYPES[1:]),
    ("every width", "a gain of values", torch.float32),
]


@on_devices("widths, gains, dtype", PACKING)
def test_packing_gives_the_bytes_of_the_codec(device: str, widths: str, gains: str, dtype: torch.dtype) -> None:
    shape = Shape(rank=70, numbers=66)
    codec = codec_for(shape, device, WIDTH_PATTERNS[widths], gains)
    rows = random(2, 19, codec.row_dim, seed=10) * random(2, 19, 1, seed=11).exp()
    rows[..., shape.rank :] *= random(2, 19, 1, seed=12).exp()
    rows[..., 1::17] *= 50  # beyond the outermost level
    rows = rows.to(dtype).to(device)
    found, expected = encode_pack(rows, codec), codec.pack(rows)
    assert found.shape == expected.shape
    if kernels.interpreted():
        assert torch.equal(found, expected)
        return
    off = (codec.codes(found).int() - codec.codes(expected).int()).abs()
    assert off.numel() == 0 or (off.max() <= 1 and (off > 0).float().mean() < 1e-3)


@on_devices("", [()])
def test_a_second_gain_may_reach_over_some_coordinates_or_stand_alone(device: str) -> None:
    for gained, key_gained in ((20, 5), (0, 7)):
        widths = torch.tensor((WIDTH_PATTERNS["every width"] * 4)[:31])
        codec = RowCodec(widths, torch.ones(31), torch.zeros(31), torch.ones(gained), torch.ones(key_gained)).to(device)
        rows = (3 * random(19, 31, seed=13)).to(device)
        assert torch.equal(codec.codes(encode_pack(rows, codec)), codec.codes(codec.pack(rows)))


def turned(slots: int, pairs: int = 8) -> torch.Tensor:
    return torch.zeros(pairs, slots, dtype=torch.uint8)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a code that is longer than the key": ({"expand": torch.zeros(16, 17)}, r"expand \[16, 17\]"),
    "a key of an odd number": ({"expand": torch.zeros(15, 11)}, "P even"),
    "a key that is too long": ({"expand": torch.zeros(130, 11)}, "P <= 128"),
    "a mean of another length": ({"mean": torch.zeros(15)}, r"needed floats \[16\]"),
    "a mean of integers": ({"mean": torch.zeros(16, dtype=torch.int32)}, "torch.int32"),
    "pairs of another type": ({"pairs": torch.zeros(3, 8)}, r"needed int64 \[3, 8\]"),
    "pairs of another key": ({"pairs": torch.zeros(3, 7, dtype=torch.int64)}, r"needed int64 \[3, 8\]"),
    "a table of another type": ({"table": torch.zeros(8, 9)}, "needed torch.uint8"),
    "a table of another key": ({"table": turned(9, 16)}, r"needed torch.uint8 \[8, slots\]"),
    "a table without slots": ({"table": turned(0)}, r"\[8, 0\]"),
    "a table with gaps": ({"table": turned(18)[:, ::2]}, "side by side"),
    "slots of another type": ({"slots": torch.zeros(2, 70, dtype=torch.int64)}, "needed int32"),
    "slots of other rows": ({"slots": torch.zeros(2, 69, dtype=torch.int32)}, r"needed int32 \[2, 70\]"),
    "a code of another length": ({"expand": torch.zeros(16, 10)}, "20 of a value and 10 of a key"),
    "a mean that is elsewhere": ({"mean": torch.zeros(16, device="meta")}, "one device"),
}


@on_devices("kind", [(kind,) for kind in WRONG])
def test_what_does_not_fit_is_refused(device: str, kind: str) -> None:
    changes, phrase = WRONG[kind]
    changes = {name: value if value.is_meta else value.to(device) for name, value in changes.items()}
    codec = codec_for(SMALL, device, [4], "two gains")
    keys = keys_for(SMALL, device)._replace(**changes)
    width = codec.row_dim - keys.expand.shape[1] + keys.expand.shape[0]
    query = torch.zeros(2, 5, width, device=device)
    with pytest.raises(ConfigError, match=phrase):
        attend_packed(query, packed_for(SMALL, device, codec), codec, SMALL.rank, keys=keys)


@on_devices("", [()])
def test_gains_that_the_kernel_does_not_read_are_refused(device: str) -> None:
    n, keys = SMALL.rank + SMALL.numbers, keys_for(SMALL, device)
    for sigmas, key_sigmas in ((SMALL.rank + 1, 0), (SMALL.rank - 1, 3), (0, 3)):
        widths = torch.full((n,), 4)
        codec = RowCodec(widths, torch.ones(n), torch.zeros(n), torch.ones(sigmas), torch.ones(key_sigmas)).to(device)
        with pytest.raises(ConfigError, match=f"gains of {sigmas} and {key_sigmas}"):
            attend_packed(query_for(SMALL, device), packed_for(SMALL, device, codec), codec, SMALL.rank, keys=keys)


@on_devices("", [()])
def test_a_second_gain_without_keys_is_refused(device: str) -> None:
    codec = codec_for(SMALL, device, [4], "two gains")
    query = torch.zeros(2, 5, codec.row_dim, device=device)
    with pytest.raises(ConfigError, match="coded before their rotation"):
        attend_packed(query, packed_for(SMALL, device, codec), codec, SMALL.rank)


@on_devices("", [()])
def test_queries_of_another_length_are_refused(device: str) -> None:
    codec, keys = codec_for(SMALL, device, [4], "two gains"), keys_for(SMALL, device)
    with pytest.raises(ConfigError, match="and 36"):
        attend_packed(query_for(SMALL, device)[..., 1:], packed_for(SMALL, device, codec), codec, SMALL.rank, keys=keys)
