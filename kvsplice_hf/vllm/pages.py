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
import logging
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F

from kvsplice_hf.attend.choice import decode, encode, refusal
from kvsplice_hf.cache.exact import ExactTokens
from kvsplice_hf.cache.heads import exact_states
from kvsplice_hf.cache.pages import token_bytes
from kvsplice_hf.cache.rows import CompressedLatent, RowGeometry
from kvsplice_hf.cache.turns import SLOT_DTYPE, Turns
from kvsplice_hf.code.projection import LearnedKVSplice
from kvsplice_hf.patch.absorbed import absorbed_attention, step_of
from kvsplice_hf.patch.expansion import absorbed_is_cheaper
from kvsplice_hf.vllm.batches import Group


logger = logging.getLogger(__name__)


class RowsOfLayer(Protocol):
    """What pages need to know of a layer, whatever its rows hold.

    Attributes:
        geometry: sizes of its rows.
        dtype: of what is stored exactly.
        turns: how a key at each position is rotated, uint8 [positions, F]; None where rows hold rotated keys.
    """

    @property
    def geometry(self) -> RowGeometry: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def turns(self) -> torch.Tensor | None: ...


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
        return bytes_of_page(self, tokens)


class Pages(NamedTuple):
    """The pages of a layer, views of the bytes of the engine's cache.

    Attributes:
        rows: [pages, tokens per page, bytes of a row].
        exact: [pages, K, bytes of an exact token].
    """

    rows: torch.Tensor
    exact: torch.Tensor


def bytes_of_page(layer: RowsOfLayer, tokens: int) -> int:
    """Bytes of a page of so many tokens, what is exact behind its rows included."""
    row, exact = token_bytes(layer.geometry, layer.dtype)
    return tokens * row + layer.geometry.sink_tokens * exact


def pages_of(cache: torch.Tensor, layer: RowsOfLayer) -> Pages:
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
    latents, keys = latent[None, None], k_rot[None, None][..., layer.order]

    def rows(which: torch.Tensor, turns: torch.Tensor | None) -> torch.Tensor:
        return encode(layer.splice, latents[:, :, which], keys[:, :, which], turns)

    def exact(which: torch.Tensor) -> torch.Tensor:
        return exact_states(layer.splice, latents[:, :, which], keys[:, :, which])

    write(pages, layer, rows, exact, slots, positions)


def write(
    pages: Pages,
    layer: RowsOfLayer,
    rows: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor],
    exact: Callable[[torch.Tensor], torch.Tensor],
    slots: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """Write those new tokens that have a place, and what is exact of the first ones of a sequence.

    Args:
        pages: of the layer.
        layer: of the splice.
        rows: called with which tokens those are, [q], and how their keys are rotated, uint8 [1, 1, q, F] or None; gives
            their rows [1, 1, q, w].
        exact: called with which of them are kept exactly, [e]; gives what is kept, [1, 1, e, numbers].
        slots, positions: as in `store`.
    """
    kept = (slots >= 0).nonzero().flatten()
    if not len(kept):
        return
    slots, positions, tokens = slots[kept], positions[kept], pages.rows.shape[1]
    coded = rows(kept, None if layer.turns is None else layer.turns[positions][None, None])
    pages.rows[slots // tokens, slots % tokens] = coded[0, 0].contiguous().view(torch.uint8)
    early = positions < layer.geometry.sink_tokens
    if bool(early.any()):
        states = exact(kept[early])[0, 0].contiguous().view(torch.uint8)
        pages.exact[slots[early] // tokens, positions[early]] = states


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
    rows = pages.rows.view(layer.geometry.row_dtype(layer.dtype))
    step = step_of(query, _states(pages, layer, group, rows), weight, value_dim, None, scaling, None)

    def gathered() -> torch.Tensor:
        tell_what_is_in_the_way(refusal(step.numbers, step.codec, step.keys is not None))
        states = _gathered(pages, layer, group)
        return absorbed_attention(query, states, weight, value_dim, group.mask, scaling)[0]

    return decode(step._replace(paging=group.paging), gathered)


@functools.cache
def tell_what_is_in_the_way(reason: str | None) -> None:
    """Say once why no kernel reads rows in their pages. (None: it is being compared, or rows are numbers.)"""
    if reason is not None:
        logger.warning("Rows are gathered from their pages and read by PyTorch, which takes longer: %s.", reason)


def _gathered(pages: Pages, layer: ServedLayer, group: Group) -> CompressedLatent:
    """What is stored of the sequences, their rows copied out of their pages."""
    return _states(pages, layer, group, gathered_rows(pages, layer, group))


def gathered_rows(pages: Pages, layer: RowsOfLayer, group: Group) -> torch.Tensor:
    """The rows [B, 1, S, w] of the sequences, copied out of their pages."""
    return pages.rows[group.pages, group.offsets].view(layer.geometry.row_dtype(layer.dtype))[:, None]


def _states(pages: Pages, layer: ServedLayer, group: Group, rows: torch.Tensor) -> CompressedLatent:
    exact, turns = exact_of(pages, layer, group), turns_of_group(layer, group)
    return CompressedLatent(rows, layer.splice, exact, *new_rows(group), layer.dtype, turns=turns)


def new_rows(group: Group) -> tuple[int, int]:
    """How many of the rows of a sequence are new, and which is the first of them."""
    new_tokens = group.queries.shape[1]
    return new_tokens, group.stored - new_tokens


def exact_of(pages: Pages, layer: RowsOfLayer, group: Group) -> ExactTokens | None:
    """The exact first tokens of the sequences; None where there are none."""
    if not layer.geometry.sink_tokens:
        return None
    latents = pages.exact[group.paging.table[:, 0]].view(layer.dtype)
    count = torch.arange(latents.shape[1], dtype=torch.int64, device=latents.device)
    # Slots behind the end of a short sequence hold no position that is read, but anything else: also what is no
    # number, and nothing times that is not nothing.
    latents = latents.masked_fill((count >= group.paging.lengths[:, None])[..., None], 0)
    return ExactTokens(latents, count.expand(latents.shape[0], -1))


def turns_of_group(layer: RowsOfLayer, group: Group) -> Turns | None:
    """How the keys of the sequences are rotated; None where rows hold rotated keys."""
    if layer.turns is None:
        return None
    batch, stored = len(group.paging.lengths), group.stored
    slots = torch.arange(stored, dtype=SLOT_DTYPE, device=group.queries.device).expand(batch, -1)
    return Turns(layer.turns[:stored].T.contiguous(), slots.contiguous())


def _expanded(
    query: torch.Tensor,
    states: CompressedLatent,
    weight: torch.Tensor,
    value_dim: int,
    mask: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """Attention [B, T, H, V] on the keys and values that rows decode to, for a prompt."""
    heads = query.shape[1]
    by_head = F.linear(states.latent()[:, 0], weight).unflatten(-1, (heads, -1)).transpose(1, 2)
    nope, value = by_head.split([by_head.shape[-1] - value_dim, value_dim], dim=-1)
    key = torch.cat([nope, states.k_rot.expand(-1, heads, -1, -1)], dim=-1)
    return attention_in_order(query, key, value, mask, scaling)


def attention_in_order(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """Attention [B, T, H, v] of the last T tokens of sequences, each over itself and what is before it.

    Args:
        query, key, value: [B, H, T, d], [B, H, S, d] and [B, H, S, v].
        mask: instead of that order, added to the scores, [B, 1, T, S]; or None.
        scaling: factor on the scores.
    """
    new_tokens, stored, value_dim = query.shape[2], key.shape[2], value.shape[-1]
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
