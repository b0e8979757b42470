"""How much pruned and compressed values cost: a prompt fills the cache, and what comes after it is scored.

A prompt of P tokens runs in one call, in which nothing is pruned yet. The tokens after it run in calls of a few tokens
each, as in decoding, on what is left in the cache. Only these are scored.

Legend: `W` windows, `P` tokens of a prompt, `C` tokens after it, `V` tokens of the vocabulary.
"""

import sys
from collections.abc import Sequence
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


class Reference(NamedTuple):
    """What is kept of the full model: negative log-likelihoods [W, C - 1], and its most likely tokens [W, C - 1, n]."""

    nll: torch.Tensor
    top: torch.Tensor
    tokens: torch.Tensor


@torch.no_grad()
def prefilled(model: Any, window: torch.Tensor, protocol: Protocol) -> DynamicCache:
    """A cache with the prompt of a window [P + C]."""
    cache = DynamicCache(config=model.config)
    ids = window[None, : protocol.prompt].to(model.device)
    model(ids, use_cache=True, logits_to_keep=1, **cache_argument(cache))
    return cache


@torch.no_grad()
def continued(model: Any, window: torch.Tensor, cache: DynamicCache, protocol: Protocol) -> torch.Tensor:
    """Log-probabilities [C - 1, V] of the tokens after the first behind the prompt, which is in the cache."""
    end, found = protocol.prompt + protocol.continuation, []
    for start in range(protocol.prompt, end, protocol.chunk):
        part = window[None, start : min(start + protocol.chunk, end)].to(model.device)
        found.append(model(part, use_cache=True, **cache_argument(cache)).logits[0].float())
    return torch.cat(found)[:-1].log_softmax(-1)


def reference_of(model: Any, windows: torch.Tensor, protocol: Protocol, label: str) -> Reference:
    """Run the full model over windows [W, P + C]."""
    nll, top, tokens = [], [], []
    for window in tqdm(windows, desc=label, file=sys.stderr):
        found = continued(model, window, prefilled(model, window, protocol), protocol)
        best = most_likely(found)
        nll.append(_nll(found, window, protocol))
        top.append(best.values.cpu())
        tokens.append(best.indices.cpu())
    return Reference(*map(torch.stack, (nll, top, tokens)))


class Scores:
    """What is measured of one variant, window by window.

    Args:
        reference: the full model on the same windows.
        protocol: how they are run.
    """

    def __init__(self, reference: Reference, protocol: Protocol) -> None:
        self._reference, self._protocol = reference, protocol
        self._nll: list[torch.Tensor] = []
        self._divergence: list[torch.Tensor] = []
        self._agrees: list[torch.Tensor] = []

    def add(self, log_probabilities: torch.Tensor, window: torch.Tensor) -> None:
        """The next window."""
        place = len(self._nll)
        top, tokens = self._reference.top[place], self._reference.tokens[place]
        found = log_probabilities.gather(-1, tokens.to(log_probabilities.device)).cpu()
        self._nll.append(_nll(log_probabilities, window, self._protocol))
        self._divergence.append(lumped_divergence(top, found).mean())
        self._agrees.append((log_probabilities.argmax(-1).cpu() == tokens[:, 0]).double().mean())

    def row(self) -> dict[str, Any]:
        """Change of perplexity, divergence and agreement."""
        row = change_of_perplexity(torch.stack(self._nll), self._reference.nll[: len(self._nll)])
        row["kl_nats"] = torch.stack(self._divergence).mean().item()
        row["top1_agreement"] = torch.stack(self._agrees).mean().item()
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
