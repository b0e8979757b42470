"""The first real tokens of each sequence, whose latents are kept exactly.

Attention sinks: models put much attention on the first few tokens whatever they are (StreamingLLM, arXiv 2309.17453),
and their latents are far from all others, so coding them like the rest costs more than coding everything else. Which
tokens are first depends on where the padding of each row of the batch ends, so it is worked out from the mask.

Legend: `B` batch, `T` new tokens, `S` stored tokens, `K` exact tokens per sequence, `R` kv_lora_rank.
"""

from typing import Any, NamedTuple, TypeAlias

import torch
from torch.nn.attention.flex_attention import BlockMask, create_mask


# Position of a slot that no token has filled yet: beyond any length, while a token that left a sliding window has a
# negative one. So "how many sink tokens has this row seen" stays known after they are gone.
UNFILLED = torch.iinfo(torch.int32).max
# What an attention module receives: flex attention has a mask that is a function of indices.
Mask: TypeAlias = torch.Tensor | BlockMask
# Of a `BlockMask` so many pairs of query and key are looked at together, so that long prompts need no mask of T x S.
_PAIRS = 2**24


class ExactTokens(NamedTuple):
    """Exact latents of the first K real tokens of each row, and where their rows are.

    Attributes:
        latents: [B, K, R]; where rows are packed, k_rot follows: [B, K, R + P].
        positions: [B, K], int64, index among the stored rows; outside [0, S) where there is no such row.
    """

    latents: torch.Tensor
    positions: torch.Tensor

    def valid(self, length: int) -> torch.Tensor:
        """Which slots hold a token among the first `length` rows: bool [B, K]."""
        return (self.positions >= 0) & (self.positions < length)

    def shifted(self, dropped: int, length: int | torch.Tensor) -> "ExactTokens":
        """The same tokens after `dropped` rows went from the front and rows from `length` on went from the end."""
        filled = self.positions != UNFILLED
        positions = torch.where(filled, self.positions - dropped, UNFILLED)
        # A row cut off at the end was not seen, so its slot is free again.
        return ExactTokens(self.latents, torch.where(positions >= length, UNFILLED, positions))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "ExactTokens":
        return ExactTokens(*(tensor.to(device, non_blocking=non_blocking) for tensor in self))


def empty_exact_tokens(
    batch: int, count: int, latent_dim: int, dtype: torch.dtype, device: torch.device
) -> ExactTokens:
    """Slots for `count` tokens in each of `batch` rows, none filled."""
    return ExactTokens(
        torch.zeros(batch, count, latent_dim, dtype=dtype, device=device),
        torch.full((batch, count), UNFILLED, dtype=torch.long, device=device),
    )


def visible_keys(mask: torch.Tensor) -> torch.Tensor:
    """A boolean or additive mask as booleans, True where a query may look."""
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        return mask != 0
    return mask > torch.finfo(mask.dtype).min / 2


def _keys_seen(mask: BlockMask, queries: int) -> torch.Tensor:
    """How many keys each of the `queries` last queries sees, of the first head: int32 [B, T]."""
    batch, _, rows, keys = mask.shape
    device, step = mask.kv_num_blocks.device, max(1, _PAIRS // (batch * keys))
    counts = []
    for start in range(rows - queries, rows, step):

        def visible(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor, start: int = start) -> Any:
            return mask.mask_mod(b, h, q + start, k)

        part = create_mask(visible, batch, 1, min(step, rows - start), keys, device=str(device))
        counts.append(part[:, 0].sum(-1, dtype=torch.int32))
    return torch.cat(counts, dim=1)


def real_tokens(mask: Mask, new_tokens: int) -> torch.Tensor:
    """Which of the `new_tokens` last tokens are not padding: bool [B or 1, T].

    Args:
        mask: what the attention module receives: [B, S or T] with nonzero at real tokens; or [B, 1, T, S], boolean,
            additive or a `BlockMask`. In the latter a padding token sees no key at all, and every other sees at least
            itself.
    """
    if isinstance(mask, BlockMask):
        return _keys_seen(mask, new_tokens) >= 1
    if mask.dim() == 2:
        return visible_keys(mask[:, -new_tokens:])
    return visible_keys(mask[:, 0, -new_tokens:]).any(-1)


def exact_in_full_sequence(mask: Mask | None, tokens: int, count: int, device: torch.device) -> torch.Tensor:
    """Which tokens of whole sequences are among the first `count` real ones: bool [B or 1, T]. For calls without cache.

    A square mask [B, 1, T, T] counts, for each query, the keys it sees. That is its rank in its sequence under left
    padding and in packed rows alike.
    """
    if mask is None:
        return torch.arange(tokens, dtype=torch.int64, device=device)[None] < count
    if isinstance(mask, BlockMask):
        rank = _keys_seen(mask, tokens).to(device)
        return (rank >= 1) & (rank <= count)
    mask = mask.to(device)
    if mask.dim() == 2:
        real = visible_keys(mask[:, -tokens:])
        return real & (real.cumsum(-1) <= count)
    rank = visible_keys(mask[:, 0, -tokens:]).sum(-1, dtype=torch.int32)
    return (rank >= 1) & (rank <= count)


def fill_exact_tokens(
    exact: ExactTokens, latents: torch.Tensor, mask: Mask | None, first_row: int | torch.Tensor
) -> ExactTokens:
    """`exact` with those new tokens added that are still among the first K of their row.

    Only tensor operations of fixed shapes: no synchronisation with the device, no recompilation.

    Args:
        exact: the slots so far.
        latents: the new tokens' latents, [B, T, R].
        mask: the attention module's mask (see `real_tokens`), or None where nothing is padded.
        first_row: row index of the first new token, an integer or a tensor of no dimensions.
    """
    batch, new_tokens, _ = latents.shape
    count = exact.positions.shape[1]
    device = latents.device
    if mask is None:
        real = torch.ones(1, new_tokens, dtype=torch.bool, device=device)
    else:
        real = real_tokens(mask, new_tokens).to(device)
    seen = (exact.positions != UNFILLED).sum(-1, keepdim=True)  # [B, 1]
    rank = (seen + real.cumsum(-1)).expand(batch, -1)  # [B, T], 1 for the first real token of a row
    slots = torch.arange(1, count + 1, dtype=torch.int64, device=device)[None, :, None]
    hits = real[:, None, :] & (rank[:, None, :] == slots)  # [B, K, T], at most one True along T
    found, token = hits.any(-1), hits.int().argmax(-1)
    new_latents = latents.gather(1, token[..., None].expand(-1, -1, latents.shape[-1]))
    return ExactTokens(
        torch.where(found[..., None], new_latents, exact.latents),
        torch.where(found, token + first_row, exact.positions),
    )


def relocated(exact: ExactTokens, before: torch.Tensor, after: torch.Tensor) -> ExactTokens:
    """The same tokens after somebody has taken rows out by hand, or put them in another order.

    A row is known again by what is in it: it depends on the token, on its position and on all tokens before it. Where
    rows are equal all the same, the first one left is taken for the first one there was.

    Args:
        exact: the tokens, as indexed in `before`.
        before, after: the stored rows, [B, S, w] and [B, S', w].
    """
    left = torch.zeros(after.shape[:2], dtype=torch.bool, device=after.device)
    places = []
    for slot in range(exact.positions.shape[1]):
        place = exact.positions[:, slot]
        row = before.gather(1, place.clamp(0, before.shape[1] - 1)[:, None, None].expand(-1, 1, before.shape[2]))
        same = (after == row).all(-1) & ~left
        found = same.any(-1) & (place >= 0) & (place < before.shape[1])
        at = same.int().argmax(-1)
        left.scatter_(1, at[:, None], left.gather(1, at[:, None]) | found[:, None])
        places.append(torch.where(found, at, torch.where(place == UNFILLED, place, -1)))
    positions = torch.stack(places, dim=1)
    gone = (positions == -1) & (exact.positions >= 0)
    # Where only the end was cut off, those tokens were not seen: new ones take their slots, as after a crop.
    cut_off = (positions == exact.positions) | (gone & (exact.positions >= after.shape[1]))
    return ExactTokens(exact.latents, torch.where(gone & cut_off.all(-1, keepdim=True), UNFILLED, positions))


def overlay_exact(latents: torch.Tensor, exact: ExactTokens) -> torch.Tensor:
    """Decoded latents [B, 1, S, R] with the exact ones put at their places; in place where autograd allows."""
    flat = latents[:, 0]
    valid = exact.valid(flat.shape[1])
    # A scatter needs every slot to go somewhere. Slots without a token repeat a slot that has one, or, where none has,
    # put back what is there: equal values at equal places, so the order of the writes does not matter.
    first = valid.int().argmax(-1, keepdim=True)
    slots = torch.arange(valid.shape[1], dtype=torch.int64, device=valid.device)
    slot = torch.where(valid, slots, first)
    any_valid = valid.any(-1, keepdim=True)
    rows = torch.where(any_valid, exact.positions.gather(1, slot), 0)[..., None].expand_as(exact.latents)
    values = exact.latents.gather(1, slot[..., None].expand_as(exact.latents)).to(flat.dtype)
    values = torch.where(any_valid[..., None], values, flat.gather(1, rows))
    if values.requires_grad:  # a place that is written several times has its gradient once
        writes_first = slot == slots
        values = torch.where(writes_first[..., None], values, values.detach())
    if torch.is_grad_enabled() and flat.requires_grad:  # autograd still needs what was gathered from
        return flat.scatter(1, rows, values)[:, None]
    flat.scatter_(1, rows, values)
    return latents
