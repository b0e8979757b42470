"""Attention straight on codes: the projections are folded into the queries and into the output.

Decoding is affine, `c_hat = D z + mu`, and `kv_b_proj` is linear, so with its halves `W_UK[h]` (N x R) and `W_UV[h]`
(V x R) head h of a query scores a stored token as

    q_nope . W_UK[h] (D z + mu) + q_rot . k_rot  =  (D^T W_UK[h]^T q_nope) . z + q_rot . k_rot + const(q)

and its output is `W_UV[h] (D (p @ z) + sum(p) mu)`. All heads read the same rows: multi-query attention of head size
r + P. This is weight absorption (DeepSeek-V2, arXiv 2405.04434, section 2.1) with one more linear map inside.

Softmax ignores `const(q)` as long as every score carries it. The exact first tokens, scored on their latents, and
learned sinks do not, so it is taken off theirs.

Legend: `B` batch, `T` queries, `S` stored tokens, `H` heads, `K` exact tokens, `R` kv_lora_rank, `r` spliced rank,
`P` qk_rope_head_dim, `N` qk_nope_head_dim, `V` v_head_dim.
"""

from typing import NamedTuple

import torch

from kvsplice_hf.attend.backend import Attended, CodedKeys, Step
from kvsplice_hf.attend.choice import attend, decode
from kvsplice_hf.cache.exact import ExactTokens
from kvsplice_hf.cache.rows import CompressedLatent
from kvsplice_hf.patch.shares import as_bias, four_dimensional, hide, merge_shares, split_bias, spread_weights


class AbsorbedWeights(NamedTuple):
    """`kv_b_proj.weight` by head: `key` [H, N, R] and `value` [H, V, R], views of one tensor."""

    key: torch.Tensor
    value: torch.Tensor


class _ExactKeys(NamedTuple):
    """The exact tokens that the queries read beside the rows.

    Attributes:
        latents: minus mu, [B, K, R].
        rot: rotated keys, [B, K, P].
        bias: added to their scores, float [B, 1, T or 1, K].
        positions: index among all S rows, [B, K].
    """

    latents: torch.Tensor
    rot: torch.Tensor
    bias: torch.Tensor
    positions: torch.Tensor


class _Keys(NamedTuple):
    """The rows that the queries read.

    Attributes:
        rows: [B, S', r + P], or packed [B, S', bytes].
        bias: added to the scores of `rows`, float [B or 1, 1, T or 1, S'], or None. Rows of exact tokens are out.
        exact: the exact tokens, or None.
        row_index: index of `rows` among all S rows, [B, S'], or None where they are all S.
        coded: how the keys of `rows` are read, where they were coded before their rotation; or None.
    """

    rows: torch.Tensor
    bias: torch.Tensor | None
    exact: _ExactKeys | None
    row_index: torch.Tensor | None
    coded: CodedKeys | None = None


def split_weight(weight: torch.Tensor, nope_dim: int, v_dim: int) -> AbsorbedWeights:
    """The halves of `kv_b_proj.weight`, [H * (N + V), R]. H is derived, so that sharded weights work."""
    by_head = weight.view(-1, nope_dim + v_dim, weight.shape[-1])
    return AbsorbedWeights(by_head[:, :nope_dim], by_head[:, nope_dim:])


def absorbed_attention(
    query: torch.Tensor,
    latent: CompressedLatent,
    weight: torch.Tensor,
    v_dim: int,
    mask: torch.Tensor | None,
    scaling: float,
    *,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    indices: torch.Tensor | None = None,
    learned_sinks: torch.Tensor | None = None,
    return_weights: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of `query` over the rows of `latent`.

    Args:
        query: [B, H, T, N + P], the last P numbers rotated.
        latent: the stored rows, the new tokens' included.
        weight: that of `kv_b_proj`, [H * (N + V), R].
        v_dim: V.
        mask: [B or 1, 1, T, S], boolean (True: visible) or additive; [B, S] with nonzero at real tokens; or None for
            purely causal attention.
        scaling: factor on the scores.
        dropout: probability of dropping an attention weight.
        sliding_window: keys visible to a query; only read where `mask` is not of four dimensions.
        indices: rows selected for each query by a sparse-attention indexer, [B, T, k], or None.
        learned_sinks: one extra logit per head, [H], that takes part in the softmax and carries no value.
        return_weights: also return the attention weights.

    Returns:
        The output [B, T, H, V], and the weights [B, H, T, S] or None.
    """
    mask = four_dimensional(mask, latent, query.shape[2], sliding_window)

    def in_torch() -> tuple[torch.Tensor, torch.Tensor | None]:
        weights = split_weight(weight, weight.shape[0] // query.shape[1] - v_dim, v_dim)
        return _attention_in_torch(
            query, latent, weights, mask, scaling, dropout, indices, learned_sinks, return_weights
        )

    one_call = query.shape[2] == 1 and query.device.type == "cpu" and indices is None
    if not one_call or dropout or return_weights:
        return in_torch()
    return decode(step_of(query, latent, weight, v_dim, mask, scaling, learned_sinks), lambda: in_torch()[0]), None


def step_of(
    query: torch.Tensor,
    latent: CompressedLatent,
    weight: torch.Tensor,
    v_dim: int,
    mask: torch.Tensor | None,
    scaling: float,
    learned_sinks: torch.Tensor | None,
) -> Step:
    """A decode step, arguments as of `absorbed_attention`; the mask is of four dimensions."""
    return Step(
        query=query,
        rows=latent.rows,
        codec=latent.splice.codec,
        keys=latent.coded_keys,
        weight=weight,
        v_dim=v_dim,
        projection=latent.splice.weights(),
        exact=None if latent.exact is None else latent.exact.latents,
        positions=None if latent.exact is None else latent.exact.positions,
        bias=None if mask is None else as_bias(mask)[:, 0],
        sinks=learned_sinks,
        scaling=scaling,
    )


def _attention_in_torch(
    query: torch.Tensor,
    latent: CompressedLatent,
    weights: AbsorbedWeights,
    mask: torch.Tensor | None,
    scaling: float,
    dropout: float,
    indices: torch.Tensor | None,
    learned_sinks: torch.Tensor | None,
    return_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`absorbed_attention` by one operation of PyTorch after the other, with a mask of four dimensions or none."""
    nope_dim = weights.key.shape[1]
    q_nope, q_rot = query[..., :nope_dim], query[..., nope_dim:]
    # einsum batches over heads; a broadcast matmul would copy the weight for each row of the batch
    q_latent = torch.einsum("bhtn,hnr->bhtr", q_nope, weights.key)
    matrix, offset = latent.splice.fold()
    keys = _select_keys(latent, offset, mask, indices)
    queries = _Queries(q_latent, q_rot, matrix, offset, scaling)
    splice = latent.splice
    on_rows = attend(
        queries.flat(),
        keys.rows,
        splice.codec,
        splice.value_dim,
        keys.bias,
        scaling=scaling,
        dropout=dropout,
        keys=keys.coded,
    )
    others = _other_scores(queries, keys, learned_sinks)
    mixed, shares = _merge(queries, on_rows, others, keys, dropout)
    output = torch.einsum("bhtr,hvr->bthv", mixed, weights.value)
    if not return_weights:
        return output, None
    return output, _weights(queries, latent, keys, on_rows, shares)


def _select_keys(
    latent: CompressedLatent, offset: torch.Tensor, mask: torch.Tensor | None, indices: torch.Tensor | None
) -> _Keys:
    rows, row_index, coded = latent.rows[:, 0], None, latent.coded_keys
    keys = rows.shape[1]
    bias = None if mask is None else as_bias(mask)
    if indices is not None and indices.shape[1] == 1 and indices.shape[-1] < keys:
        # One query: read its k rows only. Several queries select different rows, for which a mask is cheaper.
        row_index = indices[:, 0].long()
        if bias is not None:
            wide = bias.expand(row_index.shape[0], -1, -1, -1)
            bias = wide.gather(3, row_index[:, None, None])
        rows = rows.gather(1, row_index[..., None].expand(-1, -1, rows.shape[-1]))
        if coded is not None:
            coded = coded._replace(slots=coded.slots.gather(1, row_index))
    elif indices is not None:
        unread = torch.ones(*indices.shape[:2], keys, dtype=torch.bool, device=indices.device)
        bias = hide(bias, unread.scatter_(-1, indices.long(), False)[:, None])
    if latent.exact is None:
        return _Keys(rows, bias, None, row_index, coded)
    exact, exact_rot = latent.exact, None
    if latent.is_packed:  # the rows hold k_rot inexactly, so it is kept beside the latent
        R = latent.splice.latent_dim
        exact, exact_rot = ExactTokens(exact.latents[..., :R], exact.positions), exact.latents[..., R:]
    return _split_off_exact(exact, exact_rot, latent.splice.rank, offset, rows, bias, row_index)._replace(coded=coded)


def _split_off_exact(
    exact: ExactTokens,
    exact_rot: torch.Tensor | None,
    rank: int,
    offset: torch.Tensor,
    rows: torch.Tensor,
    bias: torch.Tensor | None,
    row_index: torch.Tensor | None,
) -> _Keys:
    """Take the rows of exact tokens out of the scores, and set their exact latents beside."""
    bias, exact_bias, column = split_bias(exact, bias, rows.shape[1], row_index)
    if exact_rot is None:
        rotated = rows[..., rank:]
        exact_rot = rotated.gather(1, column[..., None].expand(-1, -1, rotated.shape[-1]))
    latents = exact.latents - offset.to(exact.latents.dtype)
    return _Keys(rows, bias, _ExactKeys(latents, exact_rot, exact_bias, exact.positions), row_index)


class _Queries(NamedTuple):
    """Queries, and the projection whose codes they meet.

    Attributes:
        latent: against the latent, [B, H, T, R].
        rot: against the rotated key, [B, H, T, P].
        matrix, offset: D [R, r] and mu [R].
        scaling: factor on their scores.
    """

    latent: torch.Tensor
    rot: torch.Tensor
    matrix: torch.Tensor
    offset: torch.Tensor
    scaling: float

    def flat(self) -> torch.Tensor:
        """Against rows: [B, H * T, r + P]. All heads read the same rows, so heads and queries are one dimension."""
        on_codes = self.latent @ self.matrix.to(self.latent.dtype)
        return torch.cat([on_codes, self.rot], dim=-1).flatten(1, 2)


def _other_scores(queries: _Queries, keys: _Keys, learned_sinks: torch.Tensor | None) -> torch.Tensor:
    """Scores of exact tokens and learned sinks, float32 [B, H, T, K (+ 1)]."""
    scores = queries.latent.new_zeros(*queries.latent.shape[:3], 0, dtype=torch.float32)
    if keys.exact is not None:
        exact = torch.cat([keys.exact.latents, keys.exact.rot], dim=-1)
        full = torch.cat([queries.latent, queries.rot], dim=-1).flatten(1, 2)
        scores = (full @ exact.transpose(1, 2)).float().view(*scores.shape[:3], -1) * queries.scaling
        scores = scores + keys.exact.bias
    if learned_sinks is not None:
        # What every other score leaves out.
        constant = (queries.latent.float() @ queries.offset.float()) * queries.scaling
        sinks = learned_sinks.float().view(1, -1, 1) - constant
        scores = torch.cat([scores, sinks[..., None]], dim=-1)
    return scores


def _merge(
    queries: _Queries, on_rows: Attended, others: torch.Tensor, keys: _Keys, dropout: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One softmax over rows and other keys.

    Returns:
        Mixed latents [B, H, T, R], and the shares of all rows together and of each other key, float32
        [B, H, T, 1 + K (+ 1)].
    """
    sizes, dtype = queries.latent.shape[:3], queries.latent.dtype
    offset = queries.offset.to(dtype)
    mixed = on_rows.mixed.to(dtype) @ queries.matrix.T.to(dtype) + offset
    exact = None if keys.exact is None else keys.exact.latents + offset  # kept without mu, for the scores
    mixed, shares = merge_shares(mixed, on_rows.lse, others.flatten(1, 2), exact, dropout)
    return mixed.view(*sizes, -1), shares.view(*sizes, -1)


def _weights(
    queries: _Queries, latent: CompressedLatent, keys: _Keys, on_rows: Attended, shares: torch.Tensor
) -> torch.Tensor:
    """Attention weights [B, H, T, S] over the stored tokens, for callers that ask to see them."""
    turns = None if keys.coded is None else keys.coded.turns().permute(1, 2, 0)
    rows = torch.cat(latent.splice.read(keys.rows, queries.latent.dtype, turns), dim=-1)
    scores = (queries.flat() @ rows.transpose(1, 2)).float().view(*shares.shape[:3], -1) * queries.scaling
    if keys.bias is not None:
        scores = scores + keys.bias
    weights = torch.exp(scores - on_rows.lse.view(*shares.shape[:3], 1)) * shares[..., :1]
    if keys.row_index is not None:
        spread = weights.new_zeros(*weights.shape[:3], latent.rows.shape[2])
        weights = spread.scatter_add(3, keys.row_index[:, None, None].expand_as(weights), weights)
    positions = None if keys.exact is None else keys.exact.positions
    return spread_weights(weights, shares[..., 1:], positions)
