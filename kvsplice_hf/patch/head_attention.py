"""Attention of one new token on the rows of all key heads of a layer, as they are stored.

Keys are scored, and what values are decoded from is mixed, by `attend.choice.attend_heads`. Exact first tokens and
learned sinks are scored beside, and take their shares of one softmax (`shares.merge_shares`).

Legend: `B` batch, `S` stored tokens, `K` key heads, `G` query heads of each, `H` = K G, `X` exact tokens, `d`, `v`
numbers of a key and of a value.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from kvsplice_hf.attend.backend import HeadRows
from kvsplice_hf.attend.choice import attend_heads
from kvsplice_hf.cache.rows import CompressedLatent
from kvsplice_hf.patch.shares import as_bias, four_dimensional, merge_shares, split_bias, spread_weights


class _ExactHeads(NamedTuple):
    """The exact tokens of all heads.

    Attributes:
        values, keys: [B, K, X, v] and [B, K, X, d].
        bias: added to their scores, float [B, 1, 1, X].
        positions: index among all S rows, [B, X].
    """

    values: torch.Tensor
    keys: torch.Tensor
    bias: torch.Tensor
    positions: torch.Tensor


def attention_on_heads(
    query: torch.Tensor,
    heads: Sequence[CompressedLatent],
    mask: torch.Tensor | None,
    scaling: float,
    *,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    learned_sinks: torch.Tensor | None = None,
    return_weights: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of queries [B, H, 1, d], rotated, over the packed rows of all key heads.

    Args:
        query: of one token per sequence; query heads of one key head side by side.
        heads: the stored rows of each key head, the new token's included, as values and keys.
        mask, scaling, dropout, sliding_window, learned_sinks, return_weights: as of `absorbed.absorbed_attention`.

    Returns:
        The output [B, 1, H, v], and the weights [B, H, 1, S] or None.
    """
    first, count = heads[0], heads[0].rows.shape[2]
    mask = four_dimensional(mask, first, 1, sliding_window)
    bias, exact = None if mask is None else as_bias(mask), None
    if first.exact is not None:
        bias, exact_bias, _ = split_bias(first.exact, bias, count)
        kept = torch.stack([head.exact.latents for head in heads if head.exact is not None], dim=1)
        values, keys = kept.split([first.splice.latent_dim, query.shape[-1]], dim=-1)
        exact = _ExactHeads(values, keys, exact_bias, first.exact.positions)
    rows = [_rows_of(head) for head in heads]
    on_rows = attend_heads(
        query[:, :, 0], rows, None if bias is None else bias[:, 0, 0], scaling=scaling, dropout=dropout
    )
    mixed = torch.cat(
        [_values(head, found.mixed, query.dtype) for head, found in zip(heads, on_rows, strict=True)], dim=1
    )
    lse = torch.cat([found.lse for found in on_rows], dim=1)
    others = _other_scores(query, len(heads), exact, learned_sinks, scaling)
    output, shares = _merge(mixed, lse, others, exact, len(heads), dropout)
    if not return_weights:
        return output[:, None], None
    on_keys = _scores(query, heads, bias, scaling)
    weights = torch.exp(on_keys - lse[..., None, None]) * shares[..., :1]
    return output[:, None], spread_weights(weights, shares[..., 1:], None if exact is None else exact.positions)


def _rows_of(head: CompressedLatent) -> HeadRows:
    codec = head.splice.codec
    assert codec is not None  # rows of ordinary attention are always packed
    return HeadRows(head.rows[:, 0], codec, head.splice.value_dim, head.coded_keys)


def _values(head: CompressedLatent, mixed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Values [B, G, v] of mixed codes [B, G, r + q]."""
    matrix, offset = head.splice.fold()
    return mixed.to(dtype) @ matrix.T.to(dtype) + offset.to(dtype)


def _other_scores(
    query: torch.Tensor, key_heads: int, exact: _ExactHeads | None, learned_sinks: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """Scores of exact tokens and learned sinks, float32 [B, H, X (+ 1)]."""
    by_head = query[:, :, 0].unflatten(1, (key_heads, -1))
    scores = query.new_zeros(*query.shape[:2], 0, dtype=torch.float32)
    if exact is not None:
        on_exact = (by_head @ exact.keys.transpose(2, 3)).float() * scaling
        scores = (on_exact + exact.bias).flatten(1, 2)
    if learned_sinks is not None:
        sinks = learned_sinks.float().view(1, -1, 1).expand(len(scores), -1, -1)
        scores = torch.cat([scores, sinks], dim=-1)
    return scores


def _merge(
    mixed: torch.Tensor,
    lse: torch.Tensor,
    others: torch.Tensor,
    exact: _ExactHeads | None,
    key_heads: int,
    dropout: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [B, H, v], and shares [B, H, 1, 1 + X (+ 1)], each key head a sequence of its own for the softmax."""
    of_rows, of_lse, of_others = (part.unflatten(1, (key_heads, -1)).flatten(0, 1) for part in (mixed, lse, others))
    values = None if exact is None else exact.values.flatten(0, 1)
    output, shares = merge_shares(of_rows, of_lse, of_others, values, dropout)
    return output.view_as(mixed), shares.view(*lse.shape, 1, -1)


def _scores(
    query: torch.Tensor, heads: Sequence[CompressedLatent], bias: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """What queries score on the keys of rows, float32 [B, H, 1, S], for callers that ask to see the weights."""
    found = []
    for part, head in zip(query.chunk(len(heads), dim=1), heads, strict=True):
        coded = head.coded_keys
        turns = None if coded is None else coded.turns().permute(1, 2, 0)
        _, keys = head.splice.read(head.rows[:, 0], query.dtype, turns)
        found.append((part @ keys[:, None].transpose(2, 3)).float() * scaling)
    scores = torch.cat(found, dim=1)
    return scores if bias is None else scores + bias
