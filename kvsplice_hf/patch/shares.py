"""One softmax over stored rows, exact tokens and learned sinks: masks taken apart, and shares put together.

Legend: `B` batch, `T` queries, `S` stored tokens, `M` queries and their heads, `K` exact tokens, `R` numbers of a
latent or of a value.
"""

import torch
import torch.nn.functional as F

from kvsplice_hf.cache.exact import ExactTokens, visible_keys
from kvsplice_hf.cache.heads import CompressedHeads
from kvsplice_hf.cache.rows import CompressedLatent


def four_dimensional(
    mask: torch.Tensor | None, latent: CompressedLatent | CompressedHeads, queries: int, sliding_window: int | None
) -> torch.Tensor | None:
    """Spell out what a missing or two-dimensional mask leaves to the attention function: causality and the window."""
    keys, device = latent.rows.shape[2], latent.rows.device
    if mask is not None and mask.dim() == 4:
        return mask.to(device)[..., :keys]
    # Unfilled rows of a static cache lie behind the last query, so that causality hides them as well.
    all_seen = queries == 1 and isinstance(latent.first_row, int)
    if mask is None and all_seen and (sliding_window is None or keys <= sliding_window):
        return None
    q_index = (torch.arange(queries, dtype=torch.int64, device=device) + latent.first_row)[:, None]
    k_index = torch.arange(keys, dtype=torch.int64, device=device)[None]
    visible = k_index <= q_index
    if sliding_window is not None:
        visible = visible & (k_index > q_index - sliding_window)
    visible = visible[None, None]
    if mask is None:
        return visible
    return visible & visible_keys(mask.to(device))[:, None, None, -keys:]


def as_bias(mask: torch.Tensor) -> torch.Tensor:
    if mask.dtype != torch.bool:
        return mask.float()
    return hide(None, ~mask)


def hide(bias: torch.Tensor | None, hidden: torch.Tensor) -> torch.Tensor:
    """`bias` with the keys out that `hidden` marks."""
    # The lowest finite number, not -inf: a padding query that sees no key must not turn into NaN.
    lowest = torch.finfo(torch.float32).min
    if bias is None:
        nothing = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        return nothing.masked_fill_(hidden, lowest)
    return bias.masked_fill(hidden, lowest)


def split_bias(
    exact: ExactTokens, bias: torch.Tensor | None, count: int, row_index: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A bias [B or 1, 1, T or 1, count] without the rows of exact tokens, and that of exact tokens alone.

    Returns:
        Both, the second [B, 1, T or 1, K]; and the columns of exact tokens, [B, K].
    """
    present, column, replaced = _locate_exact(exact, count, row_index)
    exact_bias = None
    if bias is not None:
        wide = bias.expand(present.shape[0], -1, -1, -1)
        exact_bias = wide.gather(3, column[:, None, None].expand(-1, wide.shape[1], wide.shape[2], -1))
    return hide(bias, replaced[:, None, None]), hide(exact_bias, ~present[:, None, None]), column


def _locate_exact(
    exact: ExactTokens, count: int, row_index: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where the exact tokens are among `count` rows read.

    Returns:
        Whether each is there, bool [B, K]; its column, [B, K]; and which rows are such tokens, bool [B, count].
    """
    if row_index is not None:
        matches = row_index[:, :, None] == exact.positions[:, None, :]  # [B, S', K]
        return matches.any(1), matches.int().argmax(1), matches.any(-1)
    present = exact.valid(count)
    # Slots without a token mark one row too many, which is cut off again.
    marks = torch.zeros(present.shape[0], count + 1, dtype=torch.bool, device=present.device)
    marks.scatter_(1, torch.where(present, exact.positions, count), True)
    return present, exact.positions.clamp(0, count - 1), marks[:, :count]


def merge_shares(
    mixed: torch.Tensor, lse: torch.Tensor, others: torch.Tensor, exact: torch.Tensor | None, dropout: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One softmax over rows, exact tokens and learned sinks.

    Args:
        mixed, lse: of the rows, [B, M, R] and float32 [B, M].
        others: scores of K exact tokens and perhaps of a sink behind them, float32 [B, M, K (+ 1)].
        exact: what exact tokens mix, [B, K, R], or None.
        dropout: probability of dropping a weight.

    Returns:
        Mixed latents or values [B, M, R], and the shares of all rows together and of each other key, float32
        [B, M, 1 + K (+ 1)].
    """
    if others.shape[-1] == 0:
        return mixed, others.new_ones(*lse.shape, 1)
    shares = torch.softmax(torch.cat([lse[..., None], others], dim=-1), dim=-1)
    mixed = mixed * shares[..., :1].to(mixed.dtype)
    if exact is not None:
        on_exact = F.dropout(shares[..., 1 : 1 + exact.shape[1]], dropout, training=dropout > 0).to(mixed.dtype)
        mixed = mixed + on_exact @ exact
    return mixed, shares


def spread_weights(on_rows: torch.Tensor, others: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    """Weights over rows [B, H, T, S], with those of exact tokens put at the places of these, [B, K].

    `others`: [B, H, T, K (+ 1)], perhaps with that of a learned sink at the end.
    """
    if positions is None:
        return on_rows
    on_exact = others[..., : positions.shape[1]]
    # A slot without a token has weight 0, so it may be added anywhere.
    places = positions.clamp(0, on_rows.shape[-1] - 1)[:, None, None].expand_as(on_exact)
    return on_rows.scatter_add(3, places, on_exact)
