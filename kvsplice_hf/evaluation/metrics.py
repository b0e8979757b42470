"""Quality of a spliced model against the same weights without the splice: perplexity, KL divergence, agreement.

The three are `evaluate.Metric` classes over per-token values, so that they compose with the rest of `evaluate`; nothing
is downloaded. `score_windows` produces those values, through the cache or without it.

Legend: `W` windows, `T` tokens of a window.
"""

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import datasets
import evaluate
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from kvsplice_hf.errors import ConfigError
from kvsplice_hf.patch.state import splice_disabled
from kvsplice_hf.upstream import cache_argument, cache_of
from kvsplice_hf.weights.offload import input_device


_CITATION = "Kullback and Leibler, On Information and Sufficiency, 1951."


def _info(description: str, values: str) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(
        description=description,
        citation=_CITATION,
        inputs_description=f"predictions: {values}, one number per token",
        features=datasets.Features({"predictions": datasets.Value("float64")}),
    )


class TokenPerplexity(evaluate.Metric):
    """exp of the mean negative log-likelihood (nats) over tokens."""

    def _info(self) -> evaluate.MetricInfo:
        return _info("Perplexity over tokens.", "negative log-likelihoods in nats")

    def _compute(self, predictions: list[float]) -> dict[str, float]:
        mean = math.fsum(predictions) / len(predictions)
        return {"perplexity": math.exp(mean), "nll": mean}


class TokenKLDivergence(evaluate.Metric):
    """Mean over tokens of KL(original || spliced), in nats."""

    def _info(self) -> evaluate.MetricInfo:
        return _info("Mean divergence of the next-token distributions.", "divergences in nats")

    def _compute(self, predictions: list[float]) -> dict[str, float]:
        return {"kl": math.fsum(predictions) / len(predictions)}


class Top1Agreement(evaluate.Metric):
    """Share of tokens at which both models find the same next token most likely."""

    def _info(self) -> evaluate.MetricInfo:
        return _info("Agreement of the most likely next token.", "1 where both agree, else 0")

    def _compute(self, predictions: list[float]) -> dict[str, float]:
        return {"top1_agreement": math.fsum(predictions) / len(predictions)}


@dataclass
class WindowScores:
    """Values per predicted token, of all windows in a row.

    Attributes:
        window: tokens per window; `window - 1` of them are predicted.
        nll: negative log-likelihoods of the model under test, nats.
        original_nll: of the original model.
        kl: divergences of the two distributions, nats.
        agrees: 1.0 where the most likely next token is the same.
    """

    window: int
    nll: list[float] = field(default_factory=list)
    original_nll: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    agrees: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """The metrics, and the standard error of both perplexities over windows (None for a single window)."""
        result: dict[str, Any] = {"tokens": len(self.nll), "window": self.window, "stride": self.window}
        spliced = _metric(TokenPerplexity, self.nll)["perplexity"]
        original = _metric(TokenPerplexity, self.original_nll)["perplexity"]
        result |= {
            "perplexity": spliced,
            "original_perplexity": original,
            "loss_percent": 100 * (spliced / original - 1),
        }
        result |= _metric(TokenKLDivergence, self.kl) | _metric(Top1Agreement, self.agrees)
        result["perplexity_stderr"] = self._standard_error(self.nll)
        result["original_perplexity_stderr"] = self._standard_error(self.original_nll)
        return result

    def _standard_error(self, nll: list[float]) -> float | None:
        """Standard error of the perplexity, from the spread of the windows' mean log-likelihoods (delta method).

        None for a single window.
        """
        size = self.window - 1
        means = [statistics.fmean(nll[start : start + size]) for start in range(0, len(nll), size)]
        if len(means) < 2:
            return None
        return math.exp(statistics.fmean(means)) * statistics.stdev(means) / math.sqrt(len(means))


def _metric(kind: type[evaluate.Metric], values: list[float]) -> dict[str, float]:
    return kind(keep_in_memory=True).compute(predictions=values)


@torch.no_grad()
def score_windows(
    model: nn.Module, windows: torch.Tensor, *, batch_size: int = 1, chunk: int | None = 256, progress: bool = True
) -> WindowScores:
    """Score a patched model against itself with the splice disabled, on the same windows.

    Args:
        model: a patched model.
        windows: token ids, int64 [W, T].
        batch_size: windows per forward.
        chunk: tokens per forward through the cache (chunked prefill), or None to run without a cache.
        progress: show a progress bar.

    Raises:
        PatchStateError: the model is not patched.
        ConfigError: windows of less than two tokens.

    Examples:
        >>> windows = token_windows(tokenizer, texts, window=64, samples=2)
        >>> score_windows(model, windows, progress=False).summary()["perplexity"] > 1
        True
    """
    if windows.dim() != 2 or windows.shape[1] < 2:
        raise ConfigError(f"`windows` has shape {tuple(windows.shape)}; it must be [windows, tokens] with tokens >= 2.")
    scores = WindowScores(window=windows.shape[1])
    bar = tqdm(total=len(windows), desc="windows" if chunk else "windows, no cache", disable=not progress)
    for batch in windows.split(batch_size):
        batch = batch.to(input_device(model))
        with splice_disabled(model):
            original = list(_log_probabilities(model, batch, chunk))
        spliced = _log_probabilities(model, batch, chunk)
        parts = [_compare(*pair, batch) for pair in zip(original, spliced, strict=True)]
        for name in ("nll", "original_nll", "kl", "agrees"):
            joined = torch.cat([part[name] for part in parts], dim=1)
            getattr(scores, name).extend(joined.cpu().double().flatten().tolist())
        bar.update(len(batch))
    bar.close()
    return scores


LogProbabilities = tuple[int, torch.Tensor]


def _log_probabilities(model: nn.Module, ids: torch.Tensor, chunk: int | None) -> Iterator[LogProbabilities]:
    """`(first position, log-probabilities [B, t, vocabulary] of the tokens after each)` chunk by chunk."""
    step = chunk or ids.shape[1]
    cache = None
    for start in range(0, ids.shape[1], step):
        output = model(ids[:, start : start + step], use_cache=chunk is not None, **cache_argument(cache))
        cache = cache_of(output) if chunk is not None else None
        yield start, F.log_softmax(output.logits.float(), dim=-1)


def _compare(original: LogProbabilities, spliced: LogProbabilities, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Per-token values [B, t] of one chunk; the last token of a window predicts nothing that is known."""
    start, p = original
    targets = ids[:, start + 1 : start + 1 + p.shape[1], None]
    p, q = p[:, : targets.shape[1]], spliced[1][:, : targets.shape[1]]
    return {
        "nll": -q.gather(-1, targets)[..., 0],
        "original_nll": -p.gather(-1, targets)[..., 0],
        "kl": (p.exp() * (p - q)).sum(-1),
        "agrees": (p.argmax(-1) == q.argmax(-1)).float(),
    }
