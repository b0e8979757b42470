"""How much pruned and compressed values cost: a prompt fills the cache, and what comes after it is scored.

A prompt of P tokens runs in one call, in which nothing is pruned yet. The tokens after it run in calls of a few tokens
each, as in decoding, on what is left in the cache. Only these are scored.

Legend: `W` windows, `P` tokens of a prompt, `C` tokens after it, `V` tokens of the vocabulary.
"""

import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import DynamicCache

from kvsplice_hf.evaluation.reference import change_of_perplexity, lumped_divergence, most_likely
from kvsplice_hf.manage.sizes import cache_nbytes
from kvsplice_hf.upstream import cache_argument
from kvsplice_hf.values import ValuePrunedLayer


@dataclass(frozen=True)
class Protocol:
    """How windows are run.

    Attributes:
        prompt: P.
        continuation: C.
        chunk: tokens of a call after the prompt.
    """

    prompt: int
    continuation: int
    chunk: int


class Variant(NamedTuple):
    """Something that is measured.

    Attributes:
        name: in tables.
        context: within which the model runs; called anew each time.
    """

    name: str
    context: Callable[[], contextlib.AbstractContextManager[Any]]


class Reference(NamedTuple):
    """What is kept of the full model: negative log-likelihoods [W, C - 1], and its most likely tokens [W, C - 1, n]."""

    nll: torch.Tensor
    top: torch.Tensor
    tokens: torch.Tensor


@torch.no_grad()
def after_prompt(model: Any, window: torch.Tensor, protocol: Protocol) -> tuple[torch.Tensor, DynamicCache]:
    """Log-probabilities [C - 1, V] of the tokens after the first behind the prompt, and the cache at the end."""
    cache, ids = DynamicCache(config=model.config), window[None].to(model.device)
    end = protocol.prompt + protocol.continuation
    settings = cache_argument(cache)
    model(ids[:, : protocol.prompt], use_cache=True, logits_to_keep=1, **settings)
    found = []
    for start in range(protocol.prompt, end, protocol.chunk):
        part = ids[:, start : min(start + protocol.chunk, end)]
        found.append(model(part, use_cache=True, **settings).logits[0].float())
    return torch.cat(found)[:-1].log_softmax(-1), cache


def reference_of(model: Any, windows: torch.Tensor, protocol: Protocol, label: str) -> Reference:
    """Run the full model over windows [W, P + C]."""
    nll, top, tokens = [], [], []
    for window in tqdm(windows, desc=label, file=sys.stderr):
        found, _ = after_prompt(model, window, protocol)
        best = most_likely(found)
        nll.append(_nll(found, window, protocol))
        top.append(best.values.cpu())
        tokens.append(best.indices.cpu())
    return Reference(*map(torch.stack, (nll, top, tokens)))


def score(model: Any, windows: torch.Tensor, reference: Reference, protocol: Protocol, label: str) -> dict[str, Any]:
    """Run a variant over the same windows: change of perplexity, divergence and agreement."""
    nll, divergence, agrees = [], [], []
    for window, top, tokens in tqdm(
        zip(windows, reference.top, reference.tokens, strict=True), label, len(windows), file=sys.stderr
    ):
        found, _ = after_prompt(model, window, protocol)
        nll.append(_nll(found, window, protocol))
        divergence.append(lumped_divergence(top, found.gather(-1, tokens.to(found.device)).cpu()).mean())
        agrees.append((found.argmax(-1).cpu() == tokens[:, 0]).double().mean())
    row = change_of_perplexity(torch.stack(nll), reference.nll)
    row["kl_nats"] = torch.stack(divergence).mean().item()
    row["top1_agreement"] = torch.stack(agrees).mean().item()
    row["nll"] = torch.stack(nll).mean().item()
    return row


def _nll(log_probabilities: torch.Tensor, window: torch.Tensor, protocol: Protocol) -> torch.Tensor:
    targets = window[protocol.prompt + 1 : protocol.prompt + protocol.continuation, None].to(log_probabilities.device)
    return -log_probabilities.gather(-1, targets)[:, 0].cpu().double()


def sizes_of(cache: DynamicCache) -> dict[str, float]:
    """Bytes of a cache per token and layer: in all, of values, and of the positions and scores of pruned values."""
    layers, length = cache.layers, cache.get_seq_length()
    values = sum(map(_value_bytes, layers))
    beside = sum(map(_beside_bytes, layers))
    whole = cache_nbytes(cache)
    count = length * len(layers)
    return {"bytes": whole / count, "value_bytes": values / count, "beside_bytes": beside / count}


def _value_bytes(layer: Any) -> int:
    parts: Sequence[Any] = [layer.values]
    if isinstance(layer, ValuePrunedLayer):
        parts = [layer.values, layer.first_values]
    return sum(part.nbytes for part in parts)


def _beside_bytes(layer: Any) -> int:
    if not isinstance(layer, ValuePrunedLayer):
        return 0
    return sum(part.nbytes for part in (layer.positions, layer.scores, layer.first_positions) if part is not None)
