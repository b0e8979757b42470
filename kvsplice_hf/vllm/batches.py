"""Where the tokens of a step are: which sequences attend together, and which pages are theirs.

Legend: as in `pages`.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch

from kvsplice_hf.attend.backend import Paging
from kvsplice_hf.cache.pages import Request, grouped


@dataclass(frozen=True)
class Group:
    """Sequences that attend together: one with any number of new tokens, or several with one each.

    Attributes:
        queries: index of the new tokens among those of all sequences, [B, T].
        paging: where their stored tokens are.
        stored: S, those of the longest.
        shortest: those of the shortest.
        page_size: tokens of a page.
    """

    queries: torch.Tensor
    paging: Paging
    stored: int
    shortest: int
    page_size: int

    @functools.cached_property
    def places(self) -> torch.Tensor:
        """Which of its tokens each of S is, [B, S]: past its end a shorter sequence repeats its last, masked there."""
        column = torch.arange(self.stored, dtype=torch.int64, device=self.queries.device)
        return column.minimum(self.paging.lengths[:, None] - 1)

    @functools.cached_property
    def pages(self) -> torch.Tensor:
        """The pages of the stored tokens, [B, S]. Not asked for where a backend reads them by their table."""
        return self.paging.table.gather(1, self.places // self.page_size)

    @functools.cached_property
    def offsets(self) -> torch.Tensor:
        """Their places in these, [B, S]."""
        return self.places % self.page_size

    @functools.cached_property
    def mask(self) -> torch.Tensor | None:
        """Added to the scores, float32 [B, 1, 1, S]; None where all see all that was stored before them."""
        if self.shortest == self.stored:
            return None
        hidden = (
            torch.arange(self.stored, dtype=torch.int64, device=self.queries.device) >= self.paging.lengths[:, None]
        )
        nothing = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        return nothing.masked_fill_(hidden, torch.finfo(torch.float32).min)[:, None, None]


class Batch(NamedTuple):
    """What all layers of one step share.

    Attributes:
        positions: of the new tokens in their sequences, [Q].
        groups: the sequences.
    """

    positions: torch.Tensor
    groups: list[Group]


def batch_of(starts: list[int], lengths: list[int], block_table: torch.Tensor, page_size: int) -> Batch:
    """Where the tokens of a step are.

    Args:
        starts: first new token of each sequence among those of all, and how many there are in the end, [sequences + 1].
        lengths: stored tokens of each sequence, the new ones included.
        block_table: pages of each sequence, [sequences, pages].
        page_size: tokens of a page.
    """
    device = block_table.device
    positions = [
        torch.arange(length - (end - start), length, dtype=torch.int64, device="cpu")
        for start, end, length in zip(starts[:-1], starts[1:], lengths, strict=True)
    ]
    row_of = {start: row for row, (start, end) in enumerate(zip(starts[:-1], starts[1:], strict=True)) if end > start}
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    groups = [
        _group(requests, block_table[[row_of[request.first_query] for request in requests]], page_size)
        for requests in grouped(starts, bounds)
    ]
    return Batch(torch.cat(positions).to(device), groups)


def _group(requests: list[Request], tables: torch.Tensor, page_size: int) -> Group:
    """Sequences with equally many new tokens; `tables` are their lines of the block table."""
    device, count = tables.device, requests[0].queries
    first = torch.tensor([request.first_query for request in requests], dtype=torch.int64, device=device)
    keys = torch.tensor([request.keys for request in requests], dtype=torch.int64, device=device)
    shortest, longest = (function(request.keys for request in requests) for function in (min, max))
    # What a table holds behind the pages of a sequence means nothing.
    used = torch.arange(-(-longest // page_size), dtype=torch.int64, device=device)
    used = used.minimum((keys[:, None] - 1) // page_size)
    return Group(
        queries=first[:, None] + torch.arange(count, dtype=torch.int64, device=device),
        paging=Paging(tables.long().gather(1, used), keys),
        stored=longest,
        shortest=shortest,
        page_size=page_size,
    )
