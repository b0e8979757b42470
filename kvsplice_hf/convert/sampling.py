"""Query-key pairs of the calibration text, as often as attention reads them.

What a change of the logits costs is, to second order, its variance under the attention weights: softmax ignores what is
the same for all keys of a query. So every statistic of this package is a mean over pairs drawn by attention weight;
that accounts for distances, for local and global heads, and for the sink token, without a model of any of them.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from kvsplice_hf.convert.source import SourceModel, to_complex


# Pairs per head: a few thousand queries change nothing any more.
QUERIES_PER_HEAD = 1024
KEYS_PER_QUERY = 32


@dataclass
class LayerActivations:
    """Unrotated queries and keys of one layer, for one calibration sequence.

    Attributes:
        queries: complex [T, H, F].
        keys: complex [T, G, F].
        inputs: what the attention module was given, [T, D].
    """

    queries: torch.Tensor
    keys: torch.Tensor
    inputs: torch.Tensor


@dataclass
class PairSample:
    """Pairs of one head in one sequence: `n` queries with `m` keys each.

    Attributes:
        query_index: positions of the queries, [n].
        key_index: positions of the keys, [n, m].
        weight: attention weights, made unbiased for the drawing; each row sums to 1. [n, m].
        logits: the attention logits before scaling, [n, m].
    """

    query_index: torch.Tensor
    key_index: torch.Tensor
    weight: torch.Tensor
    logits: torch.Tensor

    @property
    def distance(self) -> torch.Tensor:
        """Tokens from key to query, float [n, m]."""
        return (self.query_index[:, None] - self.key_index).float()

    def centred(self, values: torch.Tensor) -> torch.Tensor:
        """`values` [n, m, ...] less their mean under the attention weights of each query."""
        weight = self.weight.view(*self.weight.shape, *[1] * (values.dim() - 2))
        return values - (weight * values).sum(1, keepdim=True)


def capture_inputs(source: SourceModel, sequences: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """What each attention module is given, `[layer][sequence]` of shape [T, D], in the model's dtype.

    Args:
        source: the model.
        sequences: token ids, each [T].
    """
    captured: list[list[torch.Tensor]] = [[] for _ in source.layers]
    hooks = [
        layer.self_attn.register_forward_pre_hook(_Capture(captured[index]), with_kwargs=True)
        for index, layer in enumerate(source.layers)
    ]
    try:
        for tokens in sequences:
            source.model.get_decoder()(tokens[None].to(source.model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return captured


class _Capture:
    """A forward-pre-hook that keeps the hidden states."""

    def __init__(self, store: list[torch.Tensor]) -> None:
        self.store = store

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.store.append((args[0] if args else kwargs["hidden_states"])[0].detach())


def activations(source: SourceModel, layer: Any, inputs: Iterable[torch.Tensor]) -> list[LayerActivations]:
    """Queries and keys of a layer, before rotation, from the captured inputs of each sequence."""
    attention, result = layer.self_attn, []
    for hidden in inputs:
        queries = attention.q_proj(hidden).float().view(len(hidden), source.num_heads, source.head_dim)
        keys = attention.k_proj(hidden).float().view(len(hidden), source.num_key_heads, source.head_dim)
        result.append(LayerActivations(to_complex(queries), to_complex(keys), hidden))
    return result


def draw_pairs(
    source: SourceModel, sequence: LayerActivations, head: int, count: int, generator: torch.Generator
) -> PairSample:
    """Draw `count` queries of one head, and keys for each.

    Keys are drawn in proportion to the square root of their attention weight and weighted back: drawing by the weight
    itself would give the sink token half of the sample.

    Args:
        source: the model.
        sequence: activations of a layer in one sequence of T tokens.
        head: which query head.
        count: number of queries; at most T - 1, since the first token sees only itself.
        generator: on the CPU, so that the draw is the same on every device.
    """
    device = sequence.queries.device
    length = len(sequence.queries)
    index = (torch.randperm(length - 1, generator=generator, dtype=torch.int64, device="cpu")[:count] + 1).to(device)
    logits = rotated_logits(source, sequence, head, index)
    future = torch.arange(length, dtype=torch.int64, device=device) > index[:, None]
    attention = (source.logit_scale * logits).masked_fill(future, float("-inf")).softmax(-1)
    proposal = attention.sqrt() / attention.sqrt().sum(-1, keepdim=True)
    # Inverse transform sampling, one draw from each of m equal parts, so that draws spread over the sequence. The clamp
    # keeps rounding at the end of the cumulated sum out of the future.
    strata = torch.arange(KEYS_PER_QUERY, dtype=torch.float32, device="cpu") + torch.rand(
        len(index), KEYS_PER_QUERY, generator=generator, dtype=torch.float32, device="cpu"
    )
    uniform = (strata / KEYS_PER_QUERY).to(device)
    keys = torch.minimum(torch.searchsorted(proposal.cumsum(-1), uniform), index[:, None])
    weight = attention.gather(1, keys) / proposal.gather(1, keys).clamp(min=1e-12)
    weight = weight / weight.sum(-1, keepdim=True).clamp(min=1e-12)
    return PairSample(index, keys, weight, logits.gather(1, keys))


def rotated_logits(source: SourceModel, sequence: LayerActivations, head: int, index: torch.Tensor) -> torch.Tensor:
    """`q . k` of the queries at `index` [n] with all keys, rotated but not scaled: float [n, T]."""
    positions = torch.arange(len(sequence.keys), dtype=torch.int64, device=index.device)[:, None]
    turn = torch.polar(
        torch.ones((), dtype=torch.float32, device=index.device), positions * source.inv_freq.to(index.device)
    )
    queries = sequence.queries[index, head] * turn[index]
    keys = sequence.keys[:, head // source.heads_per_key] * turn
    return torch.view_as_real(queries).flatten(1) @ torch.view_as_real(keys).flatten(1).T


def queries_per_sequence(lengths: list[int]) -> list[int]:
    """How many queries to draw from each sequence, in proportion to its length."""
    total = sum(lengths)
    return [min(length - 1, max(1, round(QUERIES_PER_HEAD * length / total))) for length in lengths]
