"""The quality figures are what they say: exact where nothing is lost, large where the splice is broken."""

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from byte_tokenizer import byte_tokenizer, trained_model

from kvsplice_hf import ConfigError, KVSpliceConfig, PatchStateError, patch_model_with_kvsplice
from kvsplice_hf.evaluation import TokenKLDivergence, TokenPerplexity, Top1Agreement, score_windows
from kvsplice_hf.text import load_texts, token_windows


WINDOW = 48


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return token_windows(byte_tokenizer(), load_texts("pydoc", "evaluation"), WINDOW, samples=6)


def patched(**settings: object) -> torch.nn.Module:
    return patch_model_with_kvsplice(copy.deepcopy(trained_model()), KVSpliceConfig(**settings))


def test_full_rank_shows_no_loss(windows: torch.Tensor) -> None:
    summary = score_windows(patched(compression_ratio=1.0), windows, chunk=13, progress=False).summary()
    assert abs(summary["loss_percent"]) < 1e-3
    assert abs(summary["kl"]) < 1e-5
    assert summary["top1_agreement"] == 1.0


def test_a_random_projection_shows_a_large_loss(windows: torch.Tensor) -> None:
    model = patched(compression_ratio=0.25, init="orthogonal", sink_tokens=0)
    summary = score_windows(model, windows, chunk=13, progress=False).summary()
    assert summary["loss_percent"] > 10
    assert summary["kl"] > 0.1
    assert summary["top1_agreement"] < 0.9


@pytest.mark.parametrize("chunk", [1, 7, 48, 100])
def test_the_cache_and_any_chunk_give_the_figures_of_no_cache(windows: torch.Tensor, chunk: int) -> None:
    model = patched(compression_ratio=0.5)
    expected = score_windows(model, windows, chunk=None, progress=False).summary()
    found = score_windows(model, windows, chunk=chunk, batch_size=4, progress=False).summary()
    assert found == pytest.approx(expected, rel=1e-4)


def test_every_token_but_the_first_is_predicted_once(windows: torch.Tensor) -> None:
    scores = score_windows(patched(compression_ratio=1.0), windows, chunk=10, progress=False)
    assert len(scores.nll) == len(scores.kl) == len(scores.agrees) == windows.shape[0] * (WINDOW - 1)
    with torch.no_grad():
        logits = trained_model()(windows, use_cache=False).logits[:, :-1]
    expected = F.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none").flatten()
    torch.testing.assert_close(torch.tensor(scores.original_nll), expected, atol=1e-4, rtol=0)
    summary = scores.summary()
    assert summary["original_perplexity"] == pytest.approx(expected.mean().exp().item(), rel=1e-5)
    means = expected.view(len(windows), -1).mean(1)
    error = means.mean().exp() * means.std() / math.sqrt(len(windows))
    assert summary["original_perplexity_stderr"] == pytest.approx(error.item(), rel=1e-3)
    assert (summary["window"], summary["stride"], summary["tokens"]) == (WINDOW, WINDOW, len(scores.nll))


def test_the_trained_model_predicts_text_better_than_chance(windows: torch.Tensor) -> None:
    summary = score_windows(patched(compression_ratio=1.0), windows, chunk=None, progress=False).summary()
    assert summary["original_perplexity"] < 20, "the fixture must have learnt something for a loss to mean anything"


@pytest.mark.parametrize(
    ("metric", "values", "expected"),
    [
        (TokenPerplexity, [0.0, math.log(4.0)], {"perplexity": 2.0, "nll": math.log(2.0)}),
        (TokenKLDivergence, [0.5, 1.5], {"kl": 1.0}),
        (Top1Agreement, [1.0, 0.0, 1.0, 1.0], {"top1_agreement": 0.75}),
    ],
)
def test_metrics_compose_with_evaluate(metric: type, values: list[float], expected: dict[str, float]) -> None:
    whole = metric(keep_in_memory=True).compute(predictions=values)
    assert whole == pytest.approx(expected)
    parts = metric()
    for value in values:
        parts.add_batch(predictions=[value])
    assert parts.compute() == pytest.approx(expected)


def test_scoring_what_cannot_be_scored_is_refused(windows: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(PatchStateError, match="not patched"):
        score_windows(copy.deepcopy(trained_model()), windows, progress=False)
    with pytest.raises(ConfigError, match="tokens >= 2"):
        score_windows(patched(compression_ratio=1.0), windows[:, :1], progress=False)
