"""What attention gives to the tokens of a cache: the probabilities of queries, a block of them at a time.

Legend: `B` batch, `T` queries, `N` tokens that they see, `S` stored tokens, `H` query heads, `K` key heads,
`G` = H / K, `d` size of a key.
"""

from collections.abc import Callable, Iterator

import torch

from kvsplice_hf.errors import UnsupportedError


# Queries whose probabilities are in memory at once.
_BLOCK = 256


def real_tokens(mask: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """Which positions hold tokens and no padding, bool [B, S]; None: all.

    The last query of a call sees all tokens of its sequence, so that what it does not see is padding.

    Args:
        mask: of full attention, bool or added to scores, [B, 1, T, S]; None: causal.
        length: S.

    Raises:
        UnsupportedError: a mask of another shape.
    """
    if mask is None:
        return None
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[-1] != length:
        raise UnsupportedError(
            f"An attention mask {list(mask.shape)} came for {length} cached tokens, which does not say which of them "
            "are padding; it takes one for all heads, [batch, 1, queries, tokens]. Give the model a mask [batch, "
            "tokens], or none."
        )
    last = mask[:, 0, -1]
    real = last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2
    return None if bool(real.all()) else real


def shares_by_block(
    query: torch.Tensor,
    keys: torch.Tensor,
    bias: Callable[[int, int], torch.Tensor],
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Softmax of queries over tokens, a block of queries at a time.

    Args:
        query: [B, H, T, d].
        keys: [B, K, N, d].
        bias: of the queries from one number to another, float32 [B or 1, K or 1, t, N].
        scaling: of scores.
        softcap: bound of scores, as Gemma 2 has it.
        sinks: learned score of nothing for each head, [H], as gpt-oss has it.

    Returns:
        The number of the first query of each block, and probabilities, float32 [B, K, G, t, N].
    """
    B, _, T, _ = query.shape
    K = keys.shape[1]
    grouped = query.unflatten(1, (K, -1))  # [B, K, G, T, d]
    for start in range(0, T, _BLOCK):
        block = grouped[:, :, :, start : start + _BLOCK]
        scores = (block.flatten(2, 3) @ keys.transpose(2, 3)).float().unflatten(2, block.shape[2:4]) * scaling
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores + bias(start, start + block.shape[3])[:, :, None]
        if sinks is not None:
            column = sinks.float().view(1, K, -1, 1, 1).expand(B, -1, -1, scores.shape[3], -1)
            yield start, torch.softmax(torch.cat([scores, column], dim=-1), dim=-1)[..., :-1]
        else:
            yield start, torch.softmax(scores, dim=-1)


def received_by(
    query: torch.Tensor,
    keys: torch.Tensor,
    mask: torch.Tensor | None,
    counted: torch.Tensor | None,
    *,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
    by_query: bool,
) -> torch.Tensor:
    """What tokens get of attention, summed over heads, float32 [B, T, N], or [B, 1, N] summed over queries as well.

    Args:
        query, keys, scaling, softcap, sinks: as of `shares_by_block`.
        mask: bool or added to scores, [B or 1, 1, T, N]; None: the last T of N tokens are the queries, and causal.
        counted: which queries are tokens and no padding, bool [B, T]; None: all.
        by_query: keep queries apart.
    """
    (B, _, T, _), N = query.shape, keys.shape[2]
    lowest = torch.finfo(torch.float32).min

    def bias(start: int, end: int) -> torch.Tensor:
        if mask is None:
            own = torch.arange(N - T + start, N - T + end, dtype=torch.int64, device=keys.device)[:, None]
            seen = torch.arange(N, dtype=torch.int64, device=keys.device) <= own
        elif mask.dtype == torch.bool:
            seen = mask[:, :, start:end]
        else:
            return mask[:, :, start:end].float().clamp_min(lowest)
        seen = seen.expand(1, 1, *seen.shape[-2:]) if seen.dim() == 2 else seen
        return torch.zeros(seen.shape, dtype=torch.float32, device=seen.device).masked_fill(~seen, lowest)

    total = torch.zeros(B, T if by_query else 1, N, dtype=torch.float32, device=keys.device)
    for start, shares in shares_by_block(query, keys, bias, scaling=scaling, softcap=softcap, sinks=sinks):
        found = shares.sum((1, 2))  # [B, t, N]
        end = start + found.shape[1]
        if counted is not None:
            found = found * counted[:, start:end, None]
        if by_query:
            total[:, start:end] = found
        else:
            total += found.sum(1, keepdim=True)
    return total
