"""Attention over rows in blocks: the softmax of all keys, and no more than a block of rows unpacked at once."""

import math
from typing import Any

import pytest
import torch
from tiny_models import build
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import StaticCache

from kvsplice_hf import (
    KVSpliceCalibrator,
    KVSpliceConfig,
    LearnedKVSplice,
    RowCodec,
    patch_model_with_kvsplice,
)
from kvsplice_hf.attend import reference as streaming
from kvsplice_hf.attend.reference import attend_packed, attend_rows
from kvsplice_hf.cache.rows import CompressedLatent
from kvsplice_hf.patch.absorbed import absorbed_attention
from kvsplice_hf.upstream import cache_argument


B, H, T, R, P = 2, 3, 2, 12, 6
CODECS = {
    "one width": ([4] * (R + P), R),
    "mixed widths": ([8, 7, 6, 5, 4, 3, 2, 1, 0, 0, 4, 4, 8, 6, 5, 4, 0, 3], R),
    "some numbers as they are": ([16, 4, 4, 5, 0, 3, 16, 2, 1, 4, 4, 4, 16, 16, 8, 4, 4, 4], R),
    "no gain": ([4, 5, 6, 3, 2, 1, 4, 4, 16, 0, 5, 4, 8, 6, 5, 4, 0, 3], 0),
    "no code at all": ([0] * R + [8] * P, R),
}


def make_codec(name: str) -> RowCodec:
    widths, gained = CODECS[name]
    generator = torch.Generator().manual_seed(0)
    n = len(widths)
    centres = torch.randn(n, generator=generator)
    centres[:gained] *= 0.1
    return RowCodec(torch.tensor(widths), 2 + torch.rand(n, generator=generator), centres, torch.ones(gained))


def problem(keys: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries [B, H * T, n], rows [B, S, n], and a bias [B, 1, T, S] that hides some rows."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(B, H * T, R + P, generator=generator)
    rows = 2 * torch.randn(B, keys, R + P, generator=generator)
    hidden = torch.rand(B, 1, T, keys, generator=generator) < 0.3
    return query, rows, torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)


def reference(
    query: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor | None, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = (query.double() @ rows.double().transpose(1, 2)) * scaling
    if bias is not None:
        scores = (scores.view(B, H, T, -1) + bias.double()).flatten(1, 2)
    return scores.softmax(-1) @ rows[..., :R].double(), scores.logsumexp(-1)


@pytest.fixture(params=[2, 7, 1000])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Rows per block."""
    monkeypatch.setattr(streaming, "_SMALLEST_BLOCK", request.param)
    monkeypatch.setattr(streaming, "_MAX_SCORES", 1)
    return request.param


@pytest.mark.parametrize("keys", [1, 13, 40])
@pytest.mark.parametrize("biased", [False, True])
def test_blocks_of_rows_add_up_to_the_softmax_of_all(block: int, keys: int, biased: bool) -> None:
    query, rows, bias = problem(keys)
    found = attend_rows(query, rows, R, bias if biased else None, scaling=0.3)
    for ours, wanted in zip(found, reference(query, rows, bias if biased else None, 0.3), strict=True):
        torch.testing.assert_close(ours.double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("keys", [1, 13, 40])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", CODECS)
def test_packed_rows_are_read_as_what_they_unpack_to(block: int, name: str, keys: int, biased: bool) -> None:
    codec = make_codec(name)
    query, rows, bias = problem(keys)
    packed = codec.pack(rows)
    found = attend_packed(query, packed, codec, R, bias if biased else None, scaling=0.3)
    wanted = reference(query, codec.unpack(packed), bias if biased else None, 0.3)
    for ours, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, -math.inf])
def test_blocks_and_queries_that_see_nothing_leave_no_nan(block: int, lowest: float) -> None:
    query, rows, _ = problem(40)
    bias = torch.zeros(B, 1, T, 40)
    bias[..., :20] = lowest
    wanted = attend_rows(query, rows[:, 20:], R)
    torch.testing.assert_close(attend_rows(query, rows, R, bias), wanted, atol=1e-5, rtol=1e-5)
    bias[0] = lowest
    assert attend_rows(query, rows, R, bias).mixed.isfinite().all()


def test_dropped_weights_are_made_up_for_on_average() -> None:
    query, rows, _ = problem(13)
    torch.manual_seed(0)
    runs = torch.stack([attend_rows(query, rows, R, scaling=0.1, dropout=0.5).mixed for _ in range(400)])
    wanted = attend_rows(query, rows, R, scaling=0.1).mixed
    assert (runs[0] - wanted).abs().max() > 0.1
    assert (runs.mean(0) - wanted).abs().max() < 5 * runs.std(0).max() / math.sqrt(400)


class LargestTensor(TorchDispatchMode):
    """Notes the bytes of the largest tensor that is made, views left out."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return output


@pytest.mark.parametrize("keys", [4096, 20_000])
def test_decoding_never_holds_more_than_a_share_of_the_rows_unpacked(keys: int) -> None:
    latent_dim, rope_dim, heads, nope_dim = 128, 32, 4, 32
    n = latent_dim + rope_dim
    codec = RowCodec(torch.full((n,), 4), torch.ones(n), torch.zeros(n), torch.ones(latent_dim))
    splice = LearnedKVSplice(latent_dim, latent_dim)
    splice.codec = codec
    rows = torch.randint(0, 256, (1, 1, keys, codec.row_bytes), dtype=torch.uint8)
    latent = CompressedLatent(rows, splice, None, 1, keys - 1, torch.float32)
    weight = torch.randn(heads * 2 * nope_dim, latent_dim)
    with torch.no_grad(), LargestTensor() as watch:
        absorbed_attention(torch.randn(1, heads, 1, nope_dim + rope_dim), latent, weight, nope_dim, None, 1.0)
    stock = keys * n * 4
    assert 0 < watch.bytes < stock / 16


@pytest.mark.compiles
def test_a_packed_static_cache_compiles_without_graph_breaks_and_only_once_for_all_steps() -> None:
    model = build("deepseek_v2")
    vocabulary = model.config.vocab_size
    ids = torch.randint(1, vocabulary, (16, 16), generator=torch.Generator().manual_seed(0))
    calibrator = KVSpliceCalibrator(model, sink_tokens=2).collect(list(ids), progress=False)
    patch_model_with_kvsplice(model, KVSpliceConfig(bits=5, sink_tokens=2), calibration=calibrator)

    def steps(forward: Any) -> torch.Tensor:
        cache = StaticCache(config=model.config, max_cache_len=16)
        cache.early_initialization(1, 1, 1, torch.float32, torch.device("cpu"))
        mask = torch.ones(1, 16, dtype=torch.long)
        with torch.no_grad():
            logits = [model(ids[:1, :5], **cache_argument(cache), attention_mask=mask[:, :5]).logits[:, -1]]
            for step in range(5, 10):
                position = torch.tensor([[step]])
                out = forward(ids[:1, step : step + 1], **cache_argument(cache), position_ids=position)
                logits.append(out.logits[:, -1])
        return torch.stack(logits)

    expected = steps(model)
    torch._dynamo.reset()
    counter = CompileCounter()
    found = steps(torch.compile(model, backend=counter, fullgraph=True))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert counter.frame_count == 1
