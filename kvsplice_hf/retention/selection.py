"""Which tokens stay, or keep their values: how many, and the choice among them.

Nothing here knows of models or caches. Value pruning (`kvsplice_hf.values`) uses it as well as retention.

Legend: `B` batch, `K` key heads, `S` stored tokens, `T` new ones, `C` candidates, `M` slots, `N` rows.
"""

import math
from typing import NamedTuple

import torch

from kvsplice_hf.errors import ConfigError


# The position of a slot without a token.
EMPTY = -1
SCORES = ("sum", "mean")


class Budget(NamedTuple):
    """How many tokens of a sequence stay, or keep their values.

    Attributes:
        keep: so many, or None.
        share: this share of its tokens so far, rounded up, or None.
        first, recent: of them the first tokens of the sequence and its last ones, whatever their scores.
    """

    keep: int | None
    share: float | None
    first: int
    recent: int

    def check(self) -> None:
        """Refuse numbers that cannot be.

        Raises:
            ConfigError: one is out of its range.
        """
        if (self.keep is None) == (self.share is None):
            raise ConfigError(
                f"`keep` is {self.keep} and `share` {self.share}; give one of them: how many tokens of a sequence to "
                "keep, or which share of all."
            )
        if self.first < 0 or self.recent < 1:
            raise ConfigError(
                f"`first` is {self.first} and `recent` {self.recent}; it takes 0 or more first tokens, and 1 or more "
                "recent ones: a token that nobody has read yet has no score."
            )
        if self.keep is not None and self.keep < self.first + self.recent:
            raise ConfigError(
                f"`keep` is {self.keep}, fewer than the {self.first} first and {self.recent} recent tokens that are "
                "always kept. Raise `keep`, or lower `first` or `recent`."
            )
        if self.share is not None and not 0 < self.share <= 1:
            raise ConfigError(f"`share` is {self.share}; it must be above 0, and 1 at most.")

    def of(self, tokens: int) -> int:
        """Tokens that are kept, of so many."""
        if self.keep is not None:
            return min(self.keep, tokens)
        assert self.share is not None
        return min(max(math.ceil(self.share * tokens), self.first + self.recent), tokens)


class Extent(NamedTuple):
    """Where the tokens of each sequence are among the S positions of a cache.

    Attributes:
        length: S.
        real: which positions hold tokens and no padding, bool [B, S]; None: all.
    """

    length: int
    real: torch.Tensor | None

    @property
    def counts(self) -> list[int]:
        """Tokens of each sequence; one number where all have as many."""
        return [self.length] if self.real is None else self.real.sum(-1).tolist()

    def ends(self) -> torch.Tensor | int:
        """One behind the last token of each sequence, [B, 1, 1]."""
        if self.real is None:
            return self.length
        behind = self.real.flip(-1).int().argmax(-1)
        return (self.length - behind)[:, None, None]

    def positions(self, new_tokens: int, device: torch.device) -> torch.Tensor:
        """Of the last T, int32 [B or 1, T]; `EMPTY` for padding."""
        start = self.length - new_tokens
        found = torch.arange(start, self.length, dtype=torch.int32, device=device)[None]
        return found if self.real is None else torch.where(self.real[:, start:], found, EMPTY)

    def ranks(self, new_tokens: int, device: torch.device) -> torch.Tensor:
        """How many tokens of the sequence come before each of the last T, int64 [B or 1, T]."""
        start = self.length - new_tokens
        if self.real is None:
            return torch.arange(start, self.length, dtype=torch.int64, device=device)[None]
        return (self.real.cumsum(-1) - 1)[:, start:]


def chosen(
    positions: torch.Tensor, scores: torch.Tensor, extent: Extent, budget: Budget, by: str
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The candidates that keep their values in each key head: the highest scores, and always the recent ones.

    Args:
        positions: of candidates, the first tokens not among them, int32 [B, K, C]; `EMPTY` for none.
        scores: attention that they have got, summed over queries, float32 [B, K, C].
        extent: of the sequences.
        budget: how many, the first tokens included.
        by: "sum", or "mean" over the queries that could see a token.

    Returns:
        Places among the candidates, int64 [B, K, M], and which of them hold a token that stays, bool [B, K, M]; None
        where all candidates stay.
    """
    counts = extent.counts
    limits = [max(budget.of(count) - min(budget.first, count), 0) for count in counts]
    slots, candidates = max(limits), positions.shape[-1]
    if candidates <= slots and len(set(counts)) == 1 and extent.real is None:
        return None
    ends = extent.ends()
    if by == "mean":
        scores = scores / (ends - positions).clamp_min(1)
    largest = torch.finfo(scores.dtype).max
    order = scores.masked_fill(positions >= ends - budget.recent, largest).masked_fill(positions == EMPTY, -1.0)
    found = order.topk(min(slots, candidates), dim=-1)
    within = torch.tensor(limits, dtype=torch.int64, device=scores.device)[:, None, None]
    ranks = torch.arange(found.indices.shape[-1], dtype=torch.int64, device=scores.device)
    return found.indices, (found.values >= 0) & (ranks < within)


def staying(
    real: torch.Tensor | None,
    count: int,
    limits: list[int],
    always: tuple[int, int],
    scores: torch.Tensor | None,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The rows that stay, in their order: the first ones, and the last ones or those with the highest scores.

    Args:
        real: which rows hold tokens and no padding, bool [B, N]; None: all.
        count: N.
        limits: how many rows stay, of all sequences alike, or of each.
        always: how many first and last tokens stay whatever their scores.
        scores: float32 [B, N]; None: the last ones stay.
        device: of the result.

    Returns:
        Places among the rows, int64 [B or 1, M], and which of them hold a row that stays, bool [B or 1, M]; None where
        all of them do.
    """
    first, recent = always
    slots = max(limits)
    if real is None and scores is None:
        places = torch.arange(slots, dtype=torch.int64, device=device)
        return torch.where(places < first, places, places + (count - slots))[None], None
    if real is None:
        rank = torch.arange(count, dtype=torch.int64, device=device)[None]
        behind = count - rank
    else:
        rank = real.cumsum(-1) - 1
        behind = real.sum(-1, keepdim=True) - rank
    # Whole numbers as float64: positions beyond 16 million have none of their own in float32.
    order = rank.double() if scores is None else scores.double()
    kept = (rank < first) | (behind <= recent)
    order = torch.where(kept, torch.finfo(order.dtype).max, order)
    if real is not None:
        order = order.masked_fill(~real, -1.0)
    found = order.topk(slots, dim=-1)
    within = torch.tensor(limits, dtype=torch.int64, device=device)[:, None]
    ranks = torch.arange(slots, dtype=torch.int64, device=device)
    stays = (found.values >= 0) & (ranks < within)
    # Slots without a row come first, so that the last row is the last token.
    by_place = torch.where(stays, found.indices, found.indices - count).argsort(-1)
    places, stays = found.indices.gather(-1, by_place), stays.gather(-1, by_place)
    return places, None if real is None else stays
