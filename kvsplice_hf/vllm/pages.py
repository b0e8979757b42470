"""Spliced rows in the pages of an engine's cache: how they are laid out, written, and attended to.

A page holds the rows of so many tokens, and behind them room for the exact first tokens of a sequence:

    page = [ row 0 | row 1 | ... | row of the last token ] [ what K exact tokens have ]

All K exact tokens of a sequence lie in its first page; the room for them in other pages stays unused. As they lie
inside the page, whoever shares, copies or moves a page brings them along. A block table says which pages are those of a
sequence. How a key was rotated follows from the position of its token, so a table for all positions says it, and
nothing of it is stored.

Legend: `Q` new tokens of all sequences, `B` sequences that attend together, `T` new tokens of each, `S` stored tokens
of the longest of them, `H` heads, `K` exact tokens, `R` kv_lora_rank, `P` qk_rope_head_dim, `N` qk_nope_head_dim, `V`
v_head_dim, `F` angles of a token.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from kvsplice_hf.attend.backend import Paging
from kvsplice_hf.attend.choice import decode, encode
from kvsplice_hf.cache.exact import ExactTokens
from kvsplice_hf.cache.heads import exact_states
from kvsplice_hf.cache.pages import Request, grouped, token_bytes
from kvsplice_hf.cache.rows import CompressedLatent, RowGeometry
from kvsplice_hf.cache.turns import SLOT_DTYPE, Turns
from kvsplice_hf.code.projection import LearnedKVSplice
from kvsplice_hf.patch.absorbed import absorbed_attention, step_of
from kvsplice_hf.patch.expansion import absorbed_is_cheaper


class ServedLayer(NamedTuple):
    """What an engine needs of one layer of a saved splice.

    Attributes:
        splice: in the dtype of the model, on its device.
        geometry: sizes of its rows.
        dtype: of the latents.
        turns: how a key at each position is rotated, uint8 [positions, F]; None where rows hold rotated keys.
        order: which number of a key of the engine stands at each place of a key of transformers, int64 [P].
    """

    splice: LearnedKVSplice
    geometry: RowGeometry
    dtype: torch.dtype
    turns: torch.Tensor | None
    order: torch.Tensor

    @property
    def row_bytes(self) -> int:
        return token_bytes(self.geometry, self.dtype)[0]

    def page_bytes(self, tokens: int) -> int:
        """Bytes of a page of so many tokens."""
        row, exact = token_bytes(self.geometry, self.dtype)
        return tokens * row + self.geometry.sink_tokens * exact


class Pages(NamedTuple):
    """The pages of a layer, views of the bytes of the engine's cache.

    Attributes:
        rows: [pages, tokens per page, bytes of a row].
        exact: [pages, K, bytes of an exact token].
    """

    rows: torch.Tensor
    exact: torch.Tensor


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


def pages_of(cache: torch.Tensor, layer: ServedLayer) -> Pages:
    """The pages of a layer.

    Args:
        cache: the rows as the engine sees them, uint8 [pages, tokens per page, bytes of a row], with room behind each
            page as `page_bytes` says.
        layer: of the splice.
    """
    pages, tokens, width = cache.shape
    sinks, exact = layer.geometry.sink_tokens, token_bytes(layer.geometry, layer.dtype)[1]
    start = cache.storage_offset() + tokens * width
    return Pages(cache, cache.as_strided((pages, sinks, exact), (cache.stride(0), exact, 1), start))


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


def store(
    pages: Pages,
    layer: ServedLayer,
    latent: torch.Tensor,
    k_rot: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """Encode new tokens and write them.

    Args:
        pages: of the layer.
        layer: of the splice.
        latent, k_rot: [Q, R], and rotated keys in the order of the engine, [Q, P].
        slots: where each goes, page * tokens per page + place in it, [Q]; negative for what is not to be stored.
        positions: of the tokens in their sequences, [Q].
    """
    wanted = slots >= 0
    if not bool(wanted.all()):
        latent, k_rot, slots, positions = latent[wanted], k_rot[wanted], slots[wanted], positions[wanted]
    if not len(slots):
        return
    tokens = pages.rows.shape[1]
    latents, keys = latent[None, None], k_rot[None, None][..., layer.order]
    turns = None if layer.turns is None else layer.turns[positions][None, None]
    rows = encode(layer.splice, latents, keys, turns)
    pages.rows[slots // tokens, slots % tokens] = rows[0, 0].contiguous().view(torch.uint8)
    early = positions < layer.geometry.sink_tokens
    if bool(early.any()):
        exact = exact_states(layer.splice, latents, keys)[0, 0, early]
        pages.exact[slots[early] // tokens, positions[early]] = exact.contiguous().view(torch.uint8)


def attend_pages(
    pages: Pages,
    layer: ServedLayer,
    query: torch.Tensor,
    weight: torch.Tensor,
    value_dim: int,
    scaling: float,
    groups: list[Group],
) -> torch.Tensor:
    """Attention of the new tokens of all sequences over what is stored of them, their own rows included.

    Args:
        pages: of the layer.
        layer: of the splice.
        query: [Q, H, N + P], the last P numbers rotated and in the order of the engine.
        weight: that of `kv_b_proj`, [H * (N + V), R].
        value_dim: V.
        scaling: factor on the scores.
        groups: the sequences.

    Returns:
        [Q, H, V].
    """
    nope_dim = query.shape[-1] - len(layer.order)
    query = torch.cat([query[..., :nope_dim], query[..., nope_dim:][..., layer.order]], dim=-1)
    output = query.new_empty(*query.shape[:2], value_dim)
    latent_dim, rank, heads = layer.geometry.kv_lora_rank, layer.geometry.rank, query.shape[1]
    head_dims = nope_dim, len(layer.order), value_dim
    for group in groups:
        new = query[group.queries].transpose(1, 2)
        new_tokens, stored = new.shape[2], group.stored
        if not absorbed_is_cheaper(latent_dim, rank, heads, head_dims, new_tokens, stored):
            found = _expanded(new, _gathered(pages, layer, group), weight, value_dim, group.mask, scaling)
        elif new_tokens == 1:
            found = _decoded(pages, layer, group, new, weight, value_dim, scaling)
        else:
            found, _ = absorbed_attention(new, _gathered(pages, layer, group), weight, value_dim, group.mask, scaling)
        output[group.queries] = found
    return output


def _decoded(
    pages: Pages,
    layer: ServedLayer,
    group: Group,
    query: torch.Tensor,
    weight: torch.Tensor,
    value_dim: int,
    scaling: float,
) -> torch.Tensor:
    """Attention [B, 1, H, V] of one new token of each sequence, on rows in their pages where a backend reads them."""

    def gathered() -> torch.Tensor:
        states = _gathered(pages, layer, group)
        return absorbed_attention(query, states, weight, value_dim, group.mask, scaling)[0]

    rows = pages.rows.view(layer.geometry.row_dtype(layer.dtype))
    step = step_of(query, _states(pages, layer, group, rows), weight, value_dim, None, scaling, None)
    return decode(step._replace(paging=group.paging), gathered)


def _gathered(pages: Pages, layer: ServedLayer, group: Group) -> CompressedLatent:
    """What is stored of the sequences, their rows copied out of their pages."""
    rows = pages.rows[group.pages, group.offsets].view(layer.geometry.row_dtype(layer.dtype))
    return _states(pages, layer, group, rows[:, None])


def _states(pages: Pages, layer: ServedLayer, group: Group, rows: torch.Tensor) -> CompressedLatent:
    exact, turns = None, None
    if layer.geometry.sink_tokens:
        latents = pages.exact[group.paging.table[:, 0]].view(layer.dtype)
        count = torch.arange(latents.shape[1], dtype=torch.int64, device=rows.device)
        # Slots behind the end of a short sequence hold no position that is read, but anything else: also what is no
        # number, and nothing times that is not nothing.
        latents = latents.masked_fill((count >= group.paging.lengths[:, None])[..., None], 0)
        exact = ExactTokens(latents, count.expand(latents.shape[0], -1))
    if layer.turns is not None:
        batch, stored = len(group.paging.lengths), group.stored
        slots = torch.arange(stored, dtype=SLOT_DTYPE, device=rows.device).expand(batch, -1)
        turns = Turns(layer.turns[:stored].T.contiguous(), slots.contiguous())
    new_tokens = group.queries.shape[1]
    first = group.stored - new_tokens
    return CompressedLatent(rows, layer.splice, exact, new_tokens, first, layer.dtype, turns=turns)


def _expanded(
    query: torch.Tensor,
    states: CompressedLatent,
    weight: torch.Tensor,
    value_dim: int,
    mask: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """Attention [B, T, H, V] on the keys and values that rows decode to, for a prompt."""
    heads, new_tokens = query.shape[1:3]
    by_head = F.linear(states.latent()[:, 0], weight).unflatten(-1, (heads, -1)).transpose(1, 2)
    nope, value = by_head.split([by_head.shape[-1] - value_dim, value_dim], dim=-1)
    key = torch.cat([nope, states.k_rot.expand(-1, heads, -1, -1)], dim=-1)
    stored = key.shape[2]
    if mask is None and new_tokens > 1 and stored > new_tokens:
        row = torch.arange(stored - new_tokens, stored, dtype=torch.int64, device=key.device)
        mask = torch.arange(stored, dtype=torch.int64, device=key.device) <= row[:, None]
    elif mask is not None:
        mask = mask.to(query.dtype)
    # PyTorch's fused attention wants heads of one size: zeros behind the shorter ones change nothing.
    size = max(key.shape[-1], value_dim)
    query, key, value = (F.pad(part, (0, size - part.shape[-1])) for part in (query, key, value))
    is_causal = mask is None and new_tokens > 1
    mixed = F.scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal, scale=scaling)
    return mixed[..., :value_dim].transpose(1, 2)
