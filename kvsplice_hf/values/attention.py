"""Attention over the tokens that have values, and what each of them got of it.

Legend: `B` batch, `T` queries, `S` stored tokens, `N` of them with values, `H` query heads, `K` key heads, `G` = H / K,
`d`, `v` sizes of a key and of a value.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from kvsplice_hf.retention.scores import shares_by_block
from kvsplice_hf.retention.selection import EMPTY


class Scored(NamedTuple):
    """What attention gives.

    Attributes:
        output: [B, T, H, v].
        received: summed over queries and over the query heads of each key head, float32 [B, K, N].
        weights: [B, H, T, N], or None.
    """

    output: torch.Tensor
    received: torch.Tensor
    weights: torch.Tensor | None


def bias_of(mask: torch.Tensor | None, positions: torch.Tensor, start: int, queries: int) -> torch.Tensor:
    """What is added to the scores of tokens at `positions` [B, K, N], float32 [B, K, T, N].

    Args:
        mask: as of `real_tokens`, of these queries.
        positions: among all stored tokens; `EMPTY` is seen by nobody.
        start: position of the first query.
        queries: T.
    """
    lowest = torch.finfo(torch.float32).min
    if mask is None:
        own = torch.arange(start, start + queries, dtype=torch.int32, device=positions.device)
        seen = positions[:, :, None] <= own[:, None]
        return torch.zeros(seen.shape, dtype=torch.float32, device=seen.device).masked_fill(
            ~seen | (positions == EMPTY)[:, :, None], lowest
        )
    place = positions.clamp_min(0).long()[:, :, None].expand(-1, -1, queries, -1)
    found = mask.expand(len(positions), positions.shape[1], -1, -1).gather(-1, place)
    if found.dtype == torch.bool:
        added = torch.zeros(found.shape, dtype=torch.float32, device=found.device).masked_fill(~found, lowest)
    else:
        added = found.float().clamp_min(lowest)
    return added.masked_fill((positions == EMPTY)[:, :, None], lowest)


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    mix: Callable[[torch.Tensor], torch.Tensor],
    bias: Callable[[int, int], torch.Tensor],
    counted: torch.Tensor | None,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    return_weights: bool = False,
) -> Scored:
    """Softmax over the tokens that have values, a block of queries at a time.

    Args:
        query: [B, H, T, d].
        keys: of those tokens, [B, K, N, d].
        mix: values [B, K, n, v] of probabilities [B, K, n, N].
        bias: of the queries from one number to another, float32 [B, K, t, N].
        counted: which queries are tokens and no padding, bool [B, T]; None: all.
        scaling: of scores.
        softcap: bound of scores, as Gemma 2 has it.
        sinks: learned score of nothing for each head, [H], as gpt-oss has it.
        return_weights: hand back the probabilities.
    """
    received = torch.zeros(keys.shape[:3], dtype=torch.float32, device=keys.device)
    outputs, weights = [], []
    blocks = shares_by_block(query, keys, bias, scaling=scaling, softcap=softcap, sinks=sinks)
    for start, shares in blocks:
        end = start + shares.shape[3]
        of_block = shares if counted is None else shares * counted[:, None, None, start:end, None]
        received += of_block.sum((2, 3))
        shares = shares.to(query.dtype)
        outputs.append(mix(shares.flatten(2, 3)).unflatten(2, shares.shape[2:4]).flatten(1, 2))
        if return_weights:
            weights.append(shares.flatten(1, 2))
    output = torch.cat(outputs, dim=2).transpose(1, 2)
    return Scored(output.contiguous(), received, torch.cat(weights, dim=2) if return_weights else None)
