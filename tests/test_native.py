"""The C++ code computes what PyTorch computes, whatever the vectors of the processor; and without it PyTorch serves."""

import itertools
import logging
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from native_checks import assert_as_close, assert_same
from tiny_models import build
from torch._subclasses import FakeTensorMode

from kvsplice_hf import (
    KVSpliceCalibrator,
    KVSpliceConfig,
    LearnedKVSplice,
    RowCodec,
    TrellisCodec,
    patch_model_with_kvsplice,
)
from kvsplice_hf.attend import choice as dispatch
from kvsplice_hf.attend import reference as streaming
from kvsplice_hf.attend.native import calls as native
from kvsplice_hf.attend.native import library as native_library
from kvsplice_hf.cache.exact import UNFILLED, ExactTokens
from kvsplice_hf.cache.rows import CompressedLatent
from kvsplice_hf.errors import ConfigError, UnsupportedError
from kvsplice_hf.patch.absorbed import absorbed_attention, step_of


COMPILER = next((name for name in ("g++", "clang++") if shutil.which(name)), None)
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
LOWEST = torch.finfo(torch.float32).min

# Sequences, queries, stored rows, numbers of a row, numbers of a value: fewer and more than any vector, group of
# queries, strip or tile holds; a value without rest; a value that is all of the row; more queries than go together.
SIZES = [
    (1, 1, 1, 1, 1),
    (2, 3, 5, 18, 12),
    (1, 9, 64, 48, 32),
    (3, 5, 65, 33, 17),
    (1, 16, 700, 72, 64),
    (2, 7, 300, 40, 40),
    (1, 130, 257, 20, 15),
]
WIDTHS = {
    "one width": [4],
    "all widths": [8, 7, 6, 5, 4, 3, 2, 1, 0],
    "wide": [8, 7],
    "some numbers as they are": [16, 4, 5, 0],
    "nothing but numbers": [16],
    "nothing but means": [0],
    "along a trellis": [7, 6, 5, 4, 3, 2, 1, 0],
    "some along a trellis": [8, 3, 1, 16, 2],
}


def rows_of(batch: int, queries: int, count: int, dim: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, queries, dim, generator=generator) / dim**0.5
    return query, 2 * torch.randn(batch, count, dim, generator=generator)


def bias_of(kind: str, batch: int, queries: int, count: int) -> torch.Tensor | None:
    """None, or a bias [B or 1, T, S] of random numbers that hides some rows, but never the last."""
    if kind == "none":
        return None
    tokens = next(n for n in (5, 3, 2, 1) if queries % n == 0) if kind == "by token" else 1
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(1 if kind == "shared" else batch, tokens, count, generator=generator)
    bias[torch.rand(bias.shape, generator=generator) < 0.3] = LOWEST
    bias[..., : count // 2] = LOWEST  # a whole strip, where there are several
    bias[..., -1] = 0
    return bias


def codec_of(named: str | list[int], dim: int, gained: int) -> RowCodec:
    widths = WIDTHS[named] if isinstance(named, str) else named
    kind = TrellisCodec if "trellis" in named else RowCodec
    generator = torch.Generator().manual_seed(2)
    every = torch.tensor([widths[index % len(widths)] for index in range(dim)])
    scales = 1 + torch.rand(dim, generator=generator)
    centres = torch.randn(dim, generator=generator) / 4
    return kind(every, scales, centres, 0.5 + torch.rand(gained, generator=generator))


def reference(
    query: torch.Tensor, rows: torch.Tensor, value_dim: int, bias: torch.Tensor | None, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = scaling * query.double() @ rows.double().transpose(1, 2)
    if bias is not None:
        scores = scores + bias.double().repeat(1, query.shape[1] // bias.shape[1], 1)
    return scores.softmax(-1) @ rows[..., :value_dim].double(), scores.logsumexp(-1)


@pytest.mark.parametrize("kind", ["none", "shared", "by token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_rows_of_numbers_are_attended_to(size: tuple[int, ...], dtype: torch.dtype, kind: str, threads: int) -> None:
    batch, queries, count, dim, value_dim = size
    query, rows = rows_of(batch, queries, count, dim)
    query, rows = query.to(dtype), rows.to(dtype)
    bias = bias_of(kind, batch, queries, count)
    mixed, sizes = native.attend_rows(query, rows, value_dim, bias, scaling=0.7)
    expected = reference(query, rows, value_dim, bias, 0.7)
    assert_same((sizes,), expected[1:])
    # Where products are taken in bf16, weights are rounded to it.
    assert_same((mixed,), expected[:1], 1e-5 if dtype == torch.float32 else 2**-9 * float(rows.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["none", "by token"])
@pytest.mark.parametrize("gained", ["all", "values", "none"])
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_packed_rows_are_attended_to_as_what_they_unpack_to(
    size: tuple[int, ...], widths: str, gained: str, kind: str, dtype: torch.dtype
) -> None:
    batch, queries, count, dim, value_dim = size
    query, rows = rows_of(batch, queries, count, dim)
    codec = codec_of(widths, dim, {"all": dim, "values": value_dim, "none": 0}[gained])
    if codec.row_bytes == 0:
        pytest.skip("no byte is stored")
    packed, query = codec.pack(rows), query.to(dtype)
    bias = bias_of(kind, batch, queries, count)
    found = native.attend_packed(query, packed, codec, value_dim, bias, scaling=0.7)
    # Where products are taken in bf16, levels, and queries times their scales, are rounded to it.
    tolerance = 3e-5 if dtype == torch.float32 else 0.02
    assert_same(found, reference(query, codec.unpack(packed), value_dim, bias, 0.7), tolerance)


@pytest.mark.parametrize("packed", [False, True])
def test_rows_may_be_a_view_of_a_larger_buffer_and_shared_by_the_batch(packed: bool) -> None:
    query, rows = rows_of(3, 4, 70, 18)
    rows = rows[:1]
    codec = codec_of([4, 5], 18, 12) if packed else None
    stored = codec.pack(rows) if codec else rows
    # What is around them is not read, or not a number would become of the sums.
    buffer = torch.full((1, 100, stored.shape[-1] + 3), 77 if packed else torch.nan, dtype=stored.dtype)
    buffer[:, :70, : stored.shape[-1]] = stored
    view = buffer[:, :70, : stored.shape[-1]].expand(3, -1, -1)
    if codec:
        found = native.attend_packed(query, view, codec, 12)
        rows = codec.unpack(stored)
    else:
        found = native.attend_rows(query, view, 12)
    assert_same(found, reference(query, rows.expand(3, -1, -1), 12, None, 1.0), 3e-5)


def test_a_codec_may_be_made_of_columns_of_a_table() -> None:
    query, rows = rows_of(2, 3, 70, 18)
    whole = codec_of([4, 6], 18, 12)
    names = ("widths", "scales", "centres", "sigmas")
    strided = RowCodec(*(torch.stack([getattr(whole, name)] * 2, dim=1)[:, 0] for name in names))
    packed = native.encode_pack(rows, strided)
    assert torch.equal(packed, native.encode_pack(rows, whole))
    assert_same(native.attend_packed(query, packed, strided, 12), native.attend_packed(query, packed, whole, 12))


def test_tensors_without_an_address_are_left_to_pytorch() -> None:
    assert native.reads(torch.zeros(2))
    with FakeTensorMode():
        assert not native.reads(torch.zeros(2))
    assert not native.reads(torch.zeros(2, dtype=torch.float64))
    assert not native.reads(torch.zeros(0))


@pytest.mark.parametrize("lowest", [LOWEST, -torch.inf])
def test_queries_that_see_nothing_leave_no_nan_and_others_do_not_mind(lowest: float) -> None:
    query, rows = rows_of(2, 3, 200, 18)
    bias = torch.zeros(2, 1, 200)
    bias[0], bias[1, 0, :150] = lowest, lowest
    mixed, sizes = native.attend_rows(query, rows, 12, bias)
    assert mixed.isfinite().all()
    assert (sizes[0] < LOWEST / 2).all()
    assert_same((mixed[1:], sizes[1:]), reference(query[1:], rows[1:, 150:], 12, None, 1.0))


@pytest.mark.parametrize("gained", [0, 12, 18])
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_are_packed_into_the_same_bytes(widths: str, gained: int, dtype: torch.dtype, threads: int) -> None:
    codec = codec_of(widths, 18, gained)
    rows = rows_of(3, 1, 500, 18)[1].to(dtype) * torch.logspace(-3, 3, 500)[:, None].to(dtype)
    rows[0, 0], rows[1, 0], rows[2, 0, 0] = 0, 1e30, -1e30
    found, expected = native.encode_pack(rows[:, None], codec), codec.pack(rows[:, None])
    assert found.shape == expected.shape
    if "trellis" in widths:  # where one digit may decide between two paths, whose bytes differ in many places
        assert_as_close(codec, rows[:, None], found, expected)
        return
    # At the border of two cells the last digit of a logarithm decides.
    assert (found != expected).sum() <= 1e-4 * found.numel()


STEPS = list(
    itertools.product(
        [
            (1, 1, 8, 5, 0, 4, 4, 1),
            (2, 5, 33, 17, 8, 7, 20, 70),
            (1, 16, 64, 64, 16, 32, 33, 300),
            (3, 4, 48, 31, 9, 16, 5, 40),
        ],
        [0, 4],
        ["numbers", "packed", "packed along a trellis"],
        ["none", "masked"],
        [False, True],
        [torch.float32, torch.bfloat16],
    )
)


@pytest.mark.parametrize(("sizes", "exact", "kind", "mask", "sinks", "dtype"), STEPS, ids=str)
@torch.no_grad()
def test_a_step_from_query_to_output_is_that_of_pytorch(
    sizes: tuple[int, ...], exact: int, kind: str, mask: str, sinks: bool, dtype: torch.dtype, monkeypatch: Any
) -> None:
    batch, heads, latent_dim, rank, rope_dim, nope_dim, value_dim, count = sizes
    torch.manual_seed(0)
    splice = LearnedKVSplice(latent_dim, rank)
    for parameter in splice.parameters():
        parameter.data.normal_(0, 0.3)
    splice = splice.to(dtype).float()  # numbers that both dtypes hold
    rows = torch.randn(batch, 1, count, rank + rope_dim).to(dtype).float()
    if kind != "numbers":
        widths = "along a trellis" if "trellis" in kind else [4, 6, 8, 3]
        splice.codec = codec_of(widths, rank + rope_dim, rank)
        rows = splice.codec.pack(rows)
    tokens = None
    if exact:
        positions = torch.stack([torch.randperm(max(count, exact))[:exact] for _ in range(batch)])
        positions = torch.where(positions >= count, UNFILLED, positions)
        width = latent_dim + (rope_dim if kind != "numbers" else 0)
        tokens = ExactTokens(torch.randn(batch, exact, width).to(dtype).float(), positions)
    weight = torch.randn(heads * (nope_dim + value_dim), latent_dim).to(dtype).float() / 8
    query = torch.randn(batch, heads, 1, nope_dim + rope_dim).to(dtype).float()
    visible = torch.rand(batch, 1, 1, count) > 0.3 if mask == "masked" else None
    if visible is not None:
        visible[..., -1] = True
    learned = torch.randn(heads).to(dtype).float() if sinks else None

    def arguments(dtype: torch.dtype) -> tuple[Any, ...]:
        mine = splice.to(dtype)
        stored = rows if kind != "numbers" else rows.to(dtype)
        kept = None if tokens is None else ExactTokens(tokens.latents.to(dtype), tokens.positions)
        latent = CompressedLatent(stored, mine, kept, 1, count - 1, dtype)
        logits = None if learned is None else learned.to(dtype)
        return query.to(dtype), latent, weight.to(dtype), value_dim, visible, 0.3, logits

    *most, logits = arguments(torch.float32)
    monkeypatch.setattr(dispatch, "_WITHOUT_KERNELS", True)
    expected, _ = absorbed_attention(*most, learned_sinks=logits)
    found = native.decode(step_of(*arguments(dtype)))
    assert found.shape == (batch, 1, heads, value_dim)
    tolerance = 1e-4 if dtype == torch.float32 else 0.02  # where products are taken in bf16
    torch.testing.assert_close(found, expected, atol=tolerance * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("kind", ["numbers", "packed"])
@pytest.mark.parametrize("dtypes", list(itertools.product([torch.float32, torch.bfloat16], repeat=2)), ids=str)
@pytest.mark.parametrize(
    "sizes", [(1, 1, 5, 1, 0), (2, 1, 33, 17, 8), (1, 3, 48, 31, 9), (1, 1, 321, 160, 64)], ids=str
)
@torch.no_grad()
def test_new_tokens_are_encoded_as_pytorch_encodes_them(
    sizes: tuple[int, ...],
    dtypes: tuple[torch.dtype, torch.dtype],
    kind: str,
    merged: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch, tokens, latent_dim, rank, rope_dim = sizes
    of_latents, of_weights = dtypes
    torch.manual_seed(0)
    splice = LearnedKVSplice(latent_dim, rank)
    for parameter in splice.parameters():
        parameter.normal_(0, 0.3)
    splice = splice.to(of_weights)
    if kind == "packed":
        splice.codec = codec_of([4, 6, 8, 3, 16], rank + rope_dim, rank)
    if merged:
        splice.merge()
    latent = torch.randn(batch, 1, tokens, latent_dim).to(of_latents)
    k_rot = torch.randn(batch, 1, tokens, rope_dim).to(of_latents)
    found = native.encode(latent, k_rot, splice.weights(), splice.codec)
    monkeypatch.setattr(dispatch, "_WITHOUT_KERNELS", True)
    expected = splice.rows(latent, k_rot)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    if kind == "numbers":
        # Sums in another order differ in their last digit, and now and then round to the other number of bf16.
        exact = torch.float32 in dtypes and dtypes[0] == dtypes[1]
        torch.testing.assert_close(found, expected, atol=1e-5 if exact else 1e-2, rtol=0 if exact else 2**-7)
        assert exact or (found != expected).float().mean() <= 0.02
    else:
        assert (found != expected).sum() <= 0.02 * found.numel()


@torch.no_grad()
def test_codes_with_a_layer_norm_are_left_to_pytorch() -> None:
    latent, k_rot = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 2)
    dispatch.encode(LearnedKVSplice(8, 4), latent, k_rot)  # after which calls of this kind go to C++
    codes = dispatch.encode(LearnedKVSplice(8, 4, use_layernorm=True), latent, k_rot)[..., :4]
    torch.testing.assert_close(codes.mean(-1), torch.zeros(1, 1, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3", "minicpm3", "glm4_moe_lite"])
@pytest.mark.parametrize("recipe", ["numbers", "packed"])
def test_a_patched_model_generates_the_same_with_and_without_it(
    model_type: str, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(model_type)
    ids = torch.randint(1, model.config.vocab_size, (16, 16), generator=torch.Generator().manual_seed(0))
    config = KVSpliceConfig(bits=5, sink_tokens=2) if recipe == "packed" else KVSpliceConfig(rank=9, sink_tokens=2)
    calibrator = KVSpliceCalibrator(model, sink_tokens=2).collect(list(ids), progress=False)
    patch_model_with_kvsplice(model, config, calibration=calibrator)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0

    @torch.no_grad()
    def logits() -> torch.Tensor:
        out = model.generate(
            ids[:2, :9],
            attention_mask=mask,
            max_new_tokens=6,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return torch.stack(out.logits)

    monkeypatch.setattr(dispatch, "_verdicts", {})
    monkeypatch.setattr(dispatch, "_WITHOUT_KERNELS", True)
    expected = logits()
    assert not dispatch._verdicts
    monkeypatch.setattr(dispatch, "_WITHOUT_KERNELS", False)
    for _ in range(2):  # the first call of each kind is computed both ways
        torch.testing.assert_close(logits(), expected, atol=1e-4, rtol=0)
    assert {kind[0] for kind in dispatch._verdicts} >= {"decode", "encode"}
    assert all(dispatch._verdicts.values())


def test_wrong_input_is_refused() -> None:
    query, rows = rows_of(2, 3, 10, 18)
    codec, splice = codec_of([4], 18, 12), LearnedKVSplice(18, 12)
    packed = codec.pack(rows)
    for wrong in (
        lambda: native.attend_rows(query, rows[..., :17], 12),
        lambda: native.attend_rows(query, rows.double(), 12),
        lambda: native.attend_rows(query, rows.transpose(1, 2).contiguous().transpose(1, 2), 12),
        lambda: native.attend_rows(query, rows[:1], 12),
        lambda: native.attend_rows(query, rows, 12, torch.zeros(2, 1, 9)),
        lambda: native.attend_rows(query, rows, 12, torch.zeros(2, 2, 10)),
        lambda: native.attend_packed(query, packed[..., 1:], codec, 12),
        lambda: native.attend_packed(query[..., 1:], packed, codec, 12),
        lambda: native.encode_pack(rows[..., 1:], codec),
        lambda: native.encode(rows[..., 1:], rows[..., :3], splice.weights()),
        lambda: native.encode(rows, rows[:1, :, :3], splice.weights()),
        lambda: native.encode(rows, rows[..., :3], splice.weights(), codec),
        lambda: native.encode(rows.double(), rows[..., :3], splice.weights()),
    ):
        with pytest.raises(ConfigError):
            wrong()


def test_a_step_of_tensors_that_do_not_fit_is_refused() -> None:
    splice = LearnedKVSplice(8, 5)
    rows, exact = torch.zeros(2, 1, 7, 7), ExactTokens(torch.zeros(2, 3, 8), torch.zeros(2, 3, dtype=torch.long))
    latent = CompressedLatent(rows, splice, exact, 1, 6)
    step = step_of(torch.zeros(2, 4, 1, 6), latent, torch.zeros(28, 8), 3, None, 1.0, torch.zeros(4))
    with torch.no_grad():
        assert native.decode(step).shape == (2, 1, 4, 3)
    for change in (
        {"query": torch.zeros(1, 4, 1, 6)},
        {"query": torch.zeros(2, 4, 1, 7)},
        {"rows": rows[..., :6]},
        {"rows": rows[:1]},
        {"codec": codec_of([4], 7, 5)},
        {"weight": torch.zeros(27, 8)},
        {"weight": torch.zeros(28, 7)},
        {"weight": torch.zeros(28, 8, dtype=torch.float16)},
        {"v_dim": 9},
        {"projection": LearnedKVSplice(8, 4).weights()},
        {"exact": torch.zeros(2, 3, 7)},
        {"exact": torch.zeros(2, 2, 8)},
        {"query": torch.zeros(2, 4, 2, 6)},
        {"exact": torch.zeros(1, 3, 8), "positions": torch.zeros(1, 3, dtype=torch.long)},
        {"positions": None},
        {"positions": torch.zeros(2, 3, dtype=torch.int32)},
        {"bias": torch.zeros(2, 1, 6)},
        {"sinks": torch.zeros(3)},
    ):
        with pytest.raises(ConfigError, match="Got"):
            native.decode(step._replace(**change))


@pytest.fixture
def fresh_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nothing compiled so far."""
    monkeypatch.setenv("KVSPLICE_CACHE", str(tmp_path))
    monkeypatch.setenv("CXXFLAGS", "-Wall -Wextra -Werror -Wno-maybe-uninitialized")
    native_library.load_library.cache_clear()
    yield tmp_path / "native"
    native_library.load_library.cache_clear()


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("/nowhere/g++", "/nowhere/g++"), ("false", "non-zero exit status"), ("", "no C++ compiler")],
)
def test_without_a_compiler_pytorch_serves_and_the_reason_is_said_once(
    compiler: str,
    reason: str,
    fresh_library: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("CXX", compiler)
    if not compiler:
        monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(dispatch, "_verdicts", {})
    query, rows = rows_of(2, 3, 10, 18)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            found = dispatch.attend(query, rows, None, 12, None, scaling=0.7)
    assert_same(found, reference(query, rows, 12, None, 0.7))
    assert [reason in record.getMessage() for record in caplog.records] == [True]
    assert not list(fresh_library.glob("*"))
    with pytest.raises(UnsupportedError, match="could not be compiled"):
        native.attend_rows(query, rows, 12)


def test_it_is_compiled_once_for_a_machine(fresh_library: Path) -> None:
    assert native_library.load_library() is not None
    (made,) = fresh_library.iterdir()
    written = made.stat().st_mtime_ns
    native_library.load_library.cache_clear()
    assert native_library.load_library() is not None
    assert [path.stat().st_mtime_ns for path in fresh_library.iterdir()] == [written]


@pytest.mark.skipif("KVSPLICE_TEST_VECTORS" in os.environ, reason="this is the process that it starts")
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the flags are those of x86-64")
@pytest.mark.parametrize("flags", ["-march=x86-64", "-march=x86-64-v3"])
def test_it_computes_the_same_on_processors_with_shorter_vectors(flags: str) -> None:
    environment = {**os.environ, "CXXFLAGS": flags, "KVSPLICE_TEST_VECTORS": flags, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-x", __file__]
    command += ["-k", "attended or packed or step or encoded"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr


def test_streaming_and_the_library_agree_on_what_they_return() -> None:
    query, rows = rows_of(2, 6, 300, 24)
    bias = bias_of("by token", 2, 6, 300)
    assert bias is not None
    by_torch = streaming.attend_rows(query, rows, 16, bias[:, None], scaling=0.5)
    assert_same(native.attend_rows(query, rows, 16, bias, scaling=0.5), by_torch)
