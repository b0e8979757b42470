"""Triton kernels against plain torch, on a GPU where there is one, and in the interpreter of triton anywhere.

The interpreter has to be chosen before triton is first imported, and importing transformers imports it. So one test
runs this file again in a process of its own, where the variable is set, and there the tests of the kernels run.
"""

import copy
import itertools
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import NamedTuple

import pytest
import torch
from tiny_models import build

from kvsplice_hf import (
    ConfigError,
    KVSpliceCalibrator,
    KVSpliceConfig,
    RowCodec,
    patch_model_with_kvsplice,
)
from kvsplice_hf.attend import choice as dispatch
from kvsplice_hf.attend.triton import backend as triton_backend
from kvsplice_hf.code.widths import WIDTHS
from kvsplice_hf.errors import UnsupportedError


pytest.importorskip("triton", reason="the kernels need triton, which is not installed")

from kvsplice_hf.attend.triton import calls as kernels  # noqa: E402
from kvsplice_hf.attend.triton import tables  # noqa: E402
from kvsplice_hf.attend.triton.calls import attend_packed, attend_rows, encode_pack, kernels_available  # noqa: E402
from kvsplice_hf.attend.triton.pieces import pieces_of  # noqa: E402
from kvsplice_hf.upstream import cache_argument, cache_of


LOWEST = torch.finfo(torch.float32).min
DEVICES = ["cpu"] if kernels.interpreted() else ["cuda"] if torch.cuda.is_available() else []
# Products of 16-bit queries are taken in their type on a GPU, and in float32 in the interpreter.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

WIDTH_PATTERNS = {
    "four bits": [4],
    "every width": list(WIDTHS),
    "whole bytes": [8],
    "raw numbers": [16],
    "odd fields": [7, 5, 3, 1, 6, 0, 2, 7, 7],
    "nothing but zeros and one bit": [0, 0, 1],
    "another width in every 128": [8] * 128 + [4] * 128 + [16] * 128 + [1] * 128 + [2] * 64,
}


def on_devices(names: str, table: Iterable[tuple]) -> pytest.MarkDecorator:
    """Every row of a table on every device; one skip where there is no device."""
    cases = [(device, *row) for device, row in itertools.product(DEVICES, table)]
    names = f"device, {names}" if names else "device"
    if not cases:
        reason = "no GPU here; these run in the interpreter, in the process that another test starts"
        empty = [None] * len(names.split(","))
        return pytest.mark.parametrize(names.split(", "), [pytest.param(*empty, marks=pytest.mark.skip(reason=reason))])
    return pytest.mark.parametrize(names.split(", "), cases)


class Shape(NamedTuple):
    """`B` batch, `M` queries, `r` numbers of a value, `P` more of a row, `S` rows."""

    batch: int
    queries: int
    rank: int
    rot: int
    rows: int


def query_for(shape: Shape, device: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(shape.batch, shape.queries, shape.rank + shape.rot, generator=generator)
    return (2 * query / query.shape[-1] ** 0.5).to(dtype).to(device)


def rows_for(shape: Shape, device: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows that lie in a larger buffer, as those of a cache that grows ahead."""
    generator = torch.Generator().manual_seed(2)
    buffer = torch.randn(shape.batch, shape.rows + 5, shape.rank + shape.rot, generator=generator)
    return buffer.to(dtype).to(device)[:, : shape.rows]


def codec_for(shape: Shape, device: str, widths: list[int], gained: int | None = None) -> RowCodec:
    n = shape.rank + shape.rot
    gained = shape.rank if gained is None else gained
    generator = torch.Generator().manual_seed(3)
    scales, centres = 2 + torch.rand(n, generator=generator), 0.3 * torch.randn(n, generator=generator)
    every = torch.tensor((widths * n)[:n])
    scales[every == 0] = 0  # may be anything there
    return RowCodec(every, scales, centres, 0.5 + torch.rand(gained, generator=generator)).to(device)


def packed_for(shape: Shape, device: str, codec: RowCodec) -> torch.Tensor:
    packed = codec.pack(rows_for(shape, device))
    buffer = torch.full((shape.batch, shape.rows + 3, codec.row_bytes), 255, dtype=torch.uint8, device=device)
    buffer[:, : shape.rows] = packed
    return buffer[:, : shape.rows]


def reference(
    query: torch.Tensor, rows: torch.Tensor, value_dim: int, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = (query.double() @ rows.double().transpose(1, 2)).float()
    if bias is not None:
        periods = query.shape[1] // bias.shape[1]
        scores = scores + bias.repeat(1, periods, 1)
    return torch.softmax(scores, -1) @ rows[..., :value_dim].float(), torch.logsumexp(scores, -1)


def assert_same(
    found: tuple[torch.Tensor, torch.Tensor],
    expected: tuple[torch.Tensor, torch.Tensor],
    dtype: torch.dtype = torch.float32,
) -> None:
    # In which order a processor adds makes differences of up to 3e-5 of numbers around 1.
    tolerance = 5e-5 if kernels.interpreted() else TOLERANCE[dtype]
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def masked_bias(shape: tuple[int, ...], device: str) -> torch.Tensor:
    """A bias with a third of the rows hidden, the first ones as in left padding, but never the last."""
    generator = torch.Generator().manual_seed(4)
    bias = torch.randn(shape, generator=generator)
    bias[..., : shape[-1] // 3] = LOWEST
    return bias.to(device)


def pass_in_the_interpreter(path: str) -> None:
    """Run the tests of a file in a process where kernels run in the interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-x", path]
    command += ["-k", "not interpreter and not importing"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "skipped" not in result.stdout


@pytest.mark.skipif(kernels.interpreted(), reason="this is the process that it starts")
def test_the_kernels_pass_these_tests_in_the_interpreter() -> None:
    pass_in_the_interpreter(__file__)


SHAPES = [
    Shape(1, 1, 7, 16, 1),
    Shape(1, 5, 7, 16, 17),
    Shape(3, 1, 7, 16, 300),
    Shape(1, 16, 321, 64, 17),
    Shape(3, 5, 32, 0, 17),
    Shape(1, 37, 17, 3, 130),
    Shape(1, 2, 512, 64, 70),
    Shape(1, 1, 130, 510, 3),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@on_devices("shape, dtype, splits", [*itertools.product(SHAPES, DTYPES, [None]), *((s, DTYPES[0], 3) for s in SHAPES)])
def test_rows_are_mixed_by_the_softmax_of_their_scores(
    device: str, shape: Shape, dtype: torch.dtype, splits: int | None
) -> None:
    query, rows = query_for(shape, device, dtype), rows_for(shape, device, dtype)
    found = attend_rows(query, rows, shape.rank, splits=splits)
    assert found[0].shape == (shape.batch, shape.queries, shape.rank)
    assert_same(found, reference(query, rows, shape.rank), dtype)


PACKED = [
    *((SHAPES[1], widths, None, splits) for widths in WIDTH_PATTERNS for splits in (1, 3)),
    *((SHAPES[1], widths, 0, None) for widths in WIDTH_PATTERNS),
    *((shape, "every width", None, 3) for shape in SHAPES),
    *((shape, "four bits", None, None) for shape in SHAPES),
    (SHAPES[6], "odd fields", 100, None),
    (SHAPES[6], "another width in every 128", None, None),
]


@on_devices("shape, widths, gained, splits", PACKED)
def test_packed_rows_are_read_as_their_codec_unpacks_them(
    device: str, shape: Shape, widths: str, gained: int | None, splits: int | None
) -> None:
    codec = codec_for(shape, device, WIDTH_PATTERNS[widths], gained)
    query, packed = query_for(shape, device), packed_for(shape, device, codec)
    found = attend_packed(query, packed, codec, shape.rank, splits=splits)
    assert_same(found, reference(query, codec.unpack(packed), shape.rank))


@on_devices("dtype", [(dtype,) for dtype in DTYPES])
def test_packed_rows_are_read_by_queries_of_any_type(device: str, dtype: torch.dtype) -> None:
    shape = SHAPES[5]
    codec = codec_for(shape, device, WIDTH_PATTERNS["odd fields"])
    query, packed = query_for(shape, device, dtype), packed_for(shape, device, codec)
    found = attend_packed(query, packed, codec, shape.rank)
    assert_same(found, reference(query, codec.unpack(packed), shape.rank), dtype)


def both(shape: Shape, device: str) -> list[tuple[torch.Tensor, Callable]]:
    """Rows, and the attention over them, as plain numbers and packed."""
    codec = codec_for(shape, device, WIDTH_PATTERNS["odd fields"])
    rows, packed = rows_for(shape, device), packed_for(shape, device, codec)
    return [
        (rows, lambda query, given=rows, **more: attend_rows(query, given, shape.rank, **more)),
        (
            codec.unpack(packed),
            lambda query, given=packed, **more: attend_packed(query, given, codec, shape.rank, **more),
        ),
    ]


BIASES = {"one for all": (1, 1), "by batch entry": (2, 1), "by token": (2, 2), "by head and token": (1, 6)}


@on_devices("kind, splits", [*((kind, 1) for kind in BIASES), ("by token", 2)])
def test_a_bias_is_added_and_may_repeat_over_batch_and_heads(device: str, kind: str, splits: int) -> None:
    shape = Shape(2, 6, 20, 16, 90)
    query, bias = query_for(shape, device), masked_bias((*BIASES[kind], shape.rows), device)
    for rows, attend in both(shape, device):
        expected = reference(query, rows, shape.rank, bias)
        assert_same(attend(query, bias=bias, splits=splits), expected)
        spread = bias.expand(2, -1 if bias.shape[1] > 1 else 6, -1)  # strides of 0
        assert_same(attend(query, bias=spread, splits=splits), expected)
        strided = bias.transpose(1, 2).contiguous().transpose(1, 2)
        assert_same(attend(query, bias=strided, splits=splits), expected)


@on_devices("splits", [(2,), (5,), (9,)])
def test_the_number_of_splits_does_not_matter(device: str, splits: int) -> None:
    shape = Shape(2, 3, 20, 16, 200)
    query = query_for(shape, device)
    for rows, attend in both(shape, device):
        assert_same(attend(query, splits=splits), reference(query, rows, shape.rank))


@on_devices("splits", [(1,), (3,)])
def test_rows_behind_a_length_are_not_read(device: str, splits: int) -> None:
    shape = Shape(4, 5, 20, 16, 150)
    query, lengths = query_for(shape, device), torch.tensor([0, 1, 70, 999], dtype=torch.int32, device=device)
    for rows, attend in both(shape, device):
        if rows.stride(0) != rows[0].numel():  # the plain ones, whose attention reads these very numbers
            rows[2, 70:] = float("nan")
        mixed, lse = attend(query, lengths=lengths, splits=splits)
        assert (mixed[0] == 0).all()
        assert (lse[0] == -torch.inf).all()
        for entry, length in ((1, 1), (2, 70), (3, 150)):
            part = slice(entry, entry + 1)
            assert_same((mixed[part], lse[part]), reference(query[part], rows[part, :length], shape.rank))


@on_devices("splits", [(1,), (3,)])
def test_a_query_that_sees_no_row_gets_finite_numbers(device: str, splits: int) -> None:
    shape = Shape(1, 2, 20, 16, 200)
    query, bias = query_for(shape, device), torch.zeros(1, 2, shape.rows, device=device)
    bias[:, 0] = LOWEST
    for rows, attend in both(shape, device):
        mixed, lse = attend(query, bias=bias, splits=splits)
        assert torch.isfinite(mixed).all()
        assert lse[0, 0] < -1e38
        assert torch.isfinite(lse).all()
        expected = reference(query, rows, shape.rank, bias)
        assert_same((mixed[:, 1:], lse[:, 1:]), (expected[0][:, 1:], expected[1][:, 1:]))
        if splits == 1:  # the lowest number swallows the logarithms of how many rows there are in each split
            assert_same((mixed, lse), expected)
        mixed, lse = attend(query, bias=torch.where(bias < 0, -torch.inf, bias), splits=splits)
        assert (mixed[0, 0] == 0).all()
        assert lse[0, 0] == -torch.inf
        assert torch.isfinite(mixed).all()


@on_devices("shape", [(Shape(2, 3, 20, 16, 0),), (Shape(0, 3, 20, 16, 9),), (Shape(2, 0, 20, 16, 9),)])
def test_nothing_to_read_mixes_to_zero(device: str, shape: Shape) -> None:
    for _, attend in both(shape, device):
        mixed, lse = attend(query_for(shape, device))
        assert mixed.shape == (shape.batch, shape.queries, shape.rank)
        assert (mixed == 0).all()
        assert (lse == -torch.inf).all()


@on_devices("", [()])
def test_parts_can_be_merged_by_their_log_sum_exp(device: str) -> None:
    shape = Shape(2, 3, 20, 16, 50)
    query, codec = query_for(shape, device), codec_for(shape, device, WIDTH_PATTERNS["every width"])
    packed, rows = packed_for(shape, device, codec), rows_for(shape, device)
    parts = [attend_packed(query, packed, codec, shape.rank), attend_rows(query, rows, shape.rank)]
    shares = torch.softmax(torch.stack([lse for _, lse in parts]), 0)
    mixed = sum(share[..., None] * part for share, (part, _) in zip(shares, parts, strict=True))
    expected = reference(query, torch.cat([codec.unpack(packed), rows], 1), shape.rank)
    assert_same((mixed, torch.logaddexp(*(lse for _, lse in parts))), expected)


@on_devices("", [()])
def test_a_query_in_any_memory_layout_will_do(device: str) -> None:
    shape = Shape(2, 6, 20, 16, 50)
    query = query_for(shape, device)
    turned = query.transpose(1, 2).contiguous().transpose(1, 2)
    for rows, attend in both(shape, device):
        assert_same(attend(turned), reference(query, rows, shape.rank))


PACKING = [
    *((widths, gained, (2, 19), torch.float32) for widths in WIDTH_PATTERNS for gained in (None, 0)),
    *(("every width", None, shape, torch.float32) for shape in [(), (1,), (2, 1, 70), (0, 4)]),
    *(("odd fields", None, (2, 19), dtype) for dtype in DTYPES[1:]),
]


@on_devices("widths, gained, sizes, dtype", PACKING)
def test_packing_gives_the_bytes_of_the_codec(
    device: str, widths: str, gained: int | None, sizes: tuple[int, ...], dtype: torch.dtype
) -> None:
    shape = Shape(1, 1, 70, 16, 0)
    codec = codec_for(shape, device, WIDTH_PATTERNS[widths], gained)
    rows = 3 * torch.randn(*sizes, codec.row_dim, generator=torch.Generator().manual_seed(5)).to(dtype).to(device)
    rows[..., 1::17] *= 50  # beyond the outermost level
    found, expected = encode_pack(rows, codec), codec.pack(rows)
    assert found.shape == expected.shape
    if kernels.interpreted():
        assert torch.equal(found, expected)
        return
    off = (codec.codes(found).int() - codec.codes(expected).int()).abs()
    assert off.numel() == 0 or (off.max() <= 1 and (off > 0).float().mean() < 1e-3)


@on_devices("", [()])
def test_packing_many_rows_differs_in_next_to_no_code(device: str) -> None:
    codec = codec_for(Shape(1, 1, 256, 64, 0), device, [8, 7, 6, 5, 4, 3, 2, 1])
    rows = torch.randn(400, codec.row_dim, generator=torch.Generator().manual_seed(6)).to(device)
    off = (codec.codes(encode_pack(rows, codec)).int() - codec.codes(codec.pack(rows)).int()).abs()
    assert off.max() <= 1
    assert (off > 0).float().mean() < 1e-4


@on_devices("", [()])
def test_raw_numbers_are_rounded_as_torch_rounds_them(device: str) -> None:
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x00000001], dtype=torch.int32)
    rows = torch.cat([ties.view(torch.float32), torch.tensor([torch.inf, -torch.inf, -0.0])]).to(device)
    codec = RowCodec(torch.full((8,), 16), torch.ones(8), torch.zeros(8), torch.empty(0)).to(device)
    assert torch.equal(encode_pack(rows, codec), codec.pack(rows))


@on_devices("", [()])
def test_copies_of_a_codec_work_and_tables_are_not_part_of_it(device: str) -> None:
    shape = SHAPES[1]
    codec = codec_for(shape, device, WIDTH_PATTERNS["every width"])
    buffers, attributes = set(codec._buffers), set(vars(codec))
    query, packed = query_for(shape, device), packed_for(shape, device, codec)
    expected = attend_packed(query, packed, codec, shape.rank)
    assert (set(codec._buffers), set(vars(codec))) == (buffers, attributes)
    for other in (copy.deepcopy(codec), pickle.loads(pickle.dumps(codec)), copy.deepcopy(codec).to(torch.float16)):
        assert torch.equal(encode_pack(rows_for(shape, device), other), packed)
        for found, wanted in zip(attend_packed(query, packed, other, shape.rank), expected, strict=True):
            assert torch.equal(found, wanted)
    before = len(tables._tables)
    del codec, other
    assert len(tables._tables) < before


@on_devices("", [()])
def test_gradients_are_refused_and_not_dropped(device: str) -> None:
    shape = SHAPES[1]
    query = query_for(shape, device).requires_grad_()
    for rows, attend in both(shape, device):
        with pytest.raises(UnsupportedError, match="no backward pass"):
            attend(query)
        with torch.no_grad():
            assert_same(attend(query), reference(query, rows, shape.rank))


WRONG = {
    "rows of other numbers": ({"rows": torch.zeros(1, 9, 22)}, r"needed \[1, S, 23\]"),
    "rows of another batch": ({"rows": torch.zeros(2, 9, 23)}, r"needed \[1, S, 23\]"),
    "rows of integers": ({"rows": torch.zeros(1, 9, 23, dtype=torch.int32)}, "torch.int32"),
    "rows with gaps": ({"rows": torch.zeros(1, 9, 46)[..., ::2]}, "side by side"),
    "a value wider than a row": ({"value_dim": 24}, "value_dim 24"),
    "a bias of another type": ({"bias": torch.zeros(1, 1, 9, dtype=torch.float16)}, "torch.float16"),
    "a bias over other rows": ({"bias": torch.zeros(1, 1, 8)}, "needed float32"),
    "a bias that does not repeat": ({"bias": torch.zeros(1, 2, 9)}, "divisor of the 5"),
    "lengths of another type": ({"lengths": torch.tensor([3])}, "needed int32"),
    "no splits": ({"splits": 0}, "0 splits"),
    "an unknown precision": ({"input_precision": "fast"}, "'fast'"),
}


@on_devices("kind", [(kind,) for kind in WRONG])
def test_what_does_not_fit_is_refused(device: str, kind: str) -> None:
    changes, phrase = WRONG[kind]
    changes = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in changes.items()}
    arguments = {"rows": torch.zeros(1, 9, 23, device=device), "value_dim": 7, **changes}
    with pytest.raises(ConfigError, match=phrase):
        attend_rows(torch.zeros(1, 5, 23, device=device), **arguments)


@on_devices("", [()])
def test_packed_rows_of_another_codec_are_refused(device: str) -> None:
    shape = SHAPES[1]
    codec = codec_for(shape, device, [4])
    packed = packed_for(shape, device, codec)
    with pytest.raises(ConfigError, match="needed"):
        attend_packed(query_for(shape, device), packed[..., 1:], codec, shape.rank)
    with pytest.raises(ConfigError, match=r"torch\.uint8"):
        attend_packed(query_for(shape, device), packed.float(), codec, shape.rank)
    with pytest.raises(ConfigError, match="packs rows of 23"):
        encode_pack(torch.zeros(2, 22, device=device), codec)


@on_devices("packed", [(False,), (True,)])
def test_a_patched_model_decodes_on_the_kernels(device: str, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("deepseek_v2").to(device)
    vocabulary = model.config.vocab_size
    ids = torch.randint(1, vocabulary, (16, 16), generator=torch.Generator().manual_seed(0)).to(device)
    config = KVSpliceConfig(bits=5, sink_tokens=2) if packed else KVSpliceConfig(rank=9, sink_tokens=2)
    calibrator = KVSpliceCalibrator(model, sink_tokens=2).collect(list(ids), progress=False) if packed else None
    patch_model_with_kvsplice(model, config, calibration=calibrator)

    @torch.no_grad()
    def decoded() -> torch.Tensor:
        cache = cache_of(model(ids[:2, :9], use_cache=True))
        return torch.stack([model(ids[:2, i : i + 1], **cache_argument(cache)).logits for i in (9, 10)])

    monkeypatch.setattr(dispatch, "_verdicts", {})
    monkeypatch.setattr(triton_backend, "_triton_kernels", lambda: None)
    expected = decoded()
    monkeypatch.setattr(triton_backend, "_triton_kernels", lambda: kernels)
    for _ in range(2):  # the first call of each kind is computed both ways
        torch.testing.assert_close(decoded(), expected, atol=1e-4, rtol=0)
    assert dispatch._verdicts
    assert all(dispatch._verdicts.values())


@pytest.mark.skipif(kernels.interpreted(), reason="the interpreter runs on the CPU")
def test_without_a_gpu_or_the_interpreter_the_kernels_say_what_they_need() -> None:
    assert kernels_available("cuda")
    assert not kernels_available(torch.device("cpu"))
    codec = codec_for(SHAPES[0], "cpu", [4])
    for run in (
        lambda: attend_rows(torch.zeros(1, 1, 23), torch.zeros(1, 1, 23), 7),
        lambda: attend_packed(torch.zeros(1, 1, 23), torch.zeros(1, 1, 13, dtype=torch.uint8), codec, 7),
        lambda: encode_pack(torch.zeros(1, 23), codec),
    ):
        with pytest.raises(UnsupportedError, match=r"on cpu.*CUDA.*TRITON_INTERPRET=1"):
            run()


def test_pieces_cover_a_row_and_waste_little() -> None:
    for n in range(1, 1537):
        pieces = [piece for piece in pieces_of(n) if piece]
        assert all(16 <= piece <= 512 and piece & (piece - 1) == 0 for piece in pieces)
        assert sum(pieces) - pieces[-1] < n <= sum(pieces)
        assert sum(pieces) <= max(n + 15, 1.25 * n)
    assert pieces_of(576) == (512, 64, 0)


def test_ahead_of_a_coded_key_there_are_two_pieces_where_they_suffice() -> None:
    for n in range(1, 1537):
        pieces = [piece for piece in pieces_of(n, coded_keys=True) if piece]
        assert sum(pieces) - pieces[-1] < n <= sum(pieces)
        assert len(pieces) <= 2 or n > 1024
    assert pieces_of(321, coded_keys=True) == (256, 128, 0)


def test_importing_the_package_does_not_import_the_kernels() -> None:
    command = "import sys, kvsplice_hf.attend.triton; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, timeout=120, check=True)
    of_triton = {name for name in result.stdout.split() if name.startswith("kvsplice_hf.attend.triton")}
    assert of_triton <= {"kvsplice_hf.attend.triton", "kvsplice_hf.attend.triton.backend"}
