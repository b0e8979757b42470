"""How much pruned and compressed values cost: a prompt fills the cache, and what comes after it is scored.

A prompt of P tokens runs in one call, in which nothing is pruned yet. The tokens after it run in calls of a few tokens
each, as in decoding, on what is left in the cache. Only these are scored.

Legend: `W` windows, `P` tokens of a prompt, `C` tokens after it, `V` tokens of the vocabulary.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from kvsplice_hf.code.heads import HeadKey, PartKey
from kvsplice_hf.evaluation.reference import change_of_perplexity, lumped_divergence, most_likely
from kvsplice_hf.manage.sizes import cache_nbytes
from kvsplice_hf.upstream import cache_argument
from kvsplice_hf.values import ValuePrunedLayer
from kvsplice_hf.values.fitting import kept_rows


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


class Scores:
    """What is measured of one variant beside the full model, window by window."""

    def __init__(self) -> None:
        self._nll: list[torch.Tensor] = []
        self._full_nll: list[torch.Tensor] = []
        self._divergence: list[torch.Tensor] = []
        self._agrees: list[torch.Tensor] = []

    def add(self, found: torch.Tensor, full: torch.Tensor, targets: torch.Tensor) -> None:
        """Log-probabilities [C - 1, V] of the variant and of the full model, and what came, [C - 1]."""
        best = most_likely(full)
        self._nll.append(_nll(found, targets))
        self._full_nll.append(_nll(full, targets))
        self._divergence.append(lumped_divergence(best.values, found.gather(-1, best.indices)).mean().cpu())
        self._agrees.append((found.argmax(-1) == full.argmax(-1)).double().mean().cpu())

    def row(self) -> dict[str, Any]:
        """Change of perplexity, divergence and agreement."""
        row = change_of_perplexity(torch.stack(self._nll), torch.stack(self._full_nll))
        row["kl_nats"] = torch.stack(self._divergence).mean().item()
        row["top1_agreement"] = torch.stack(self._agrees).mean().item()
        return row


def _nll(log_probabilities: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return -log_probabilities.gather(-1, targets[:, None].to(log_probabilities.device))[:, 0].cpu().double()


def add_vectors(drawn: dict[PartKey, list[torch.Tensor]], cache: DynamicCache) -> None:
    """Put the values in the slots of a cache, of each key head, to those of others: [n, v] each."""
    for layer_idx, layer in enumerate(cache.layers):
        if isinstance(layer, ValuePrunedLayer):
            for head, rows in enumerate(kept_rows(layer)):
                drawn.setdefault(HeadKey(layer_idx, head), []).append(rows.float().cpu())


def joined(drawn: dict[PartKey, list[torch.Tensor]]) -> dict[PartKey, torch.Tensor]:
    """The values of each head, [M, v]."""
    return {part: torch.cat(rows) for part, rows in drawn.items()}


def sizes_of(cache: DynamicCache) -> dict[str, float]:
    """Bytes of a cache per token and layer: in all, of values, and of the positions and scores of pruned values.

    Of its tensors with their numbers in bf16; scores are float32 and positions int32 whatever the model is.
    """
    cache = copy.deepcopy(cache)
    layer: Any
    for layer in cache.layers:
        for name in ("keys", "values", "first_values"):
            if getattr(layer, name, None) is not None:
                setattr(layer, name, getattr(layer, name).to(torch.bfloat16))
    count = cache.get_seq_length() * len(cache.layers)
    parts = {"bytes": cache_nbytes(cache)}
    parts["value_bytes"] = sum(_nbytes(layer, "values", "first_values") for layer in cache.layers)
    parts["beside_bytes"] = sum(_nbytes(layer, "positions", "scores", "first_positions") for layer in cache.layers)
    return {name: nbytes / count for name, nbytes in parts.items()}


def _nbytes(layer: Any, *names: str) -> int:
    held = (getattr(layer, name, None) for name in names)
    return sum(tensor.nbytes for tensor in held if tensor is not None)
