"""Spliced rows of ordinary attention in the pages of an engine: the keys and values of all key heads of a layer.

Pages, block tables and groups of sequences are those of `pages`; a row is the rows of the key heads side by side, and
what is kept of an exact token are the value and the key of each head. C++ reads the rows of a decode step by block
table; those of a prompt are gathered from their pages and decoded.

Legend: as in `pages`, and `H` query heads, `K` key heads, `d` numbers of a key, `v` of a value.
"""

from typing import NamedTuple

import torch

from kvsplice_hf.attend.heads import decode_heads, refusal_of_heads
from kvsplice_hf.cache.heads import CompressedHeads, encode_states, exact_states
from kvsplice_hf.cache.pages import token_bytes
from kvsplice_hf.cache.rows import RowGeometry
from kvsplice_hf.code.heads import HeadSplices
from kvsplice_hf.patch.heads import attention_of_step, step_of_heads
from kvsplice_hf.vllm.batches import Group
from kvsplice_hf.vllm.pages import (
    Pages,
    attention_in_order,
    bytes_of_page,
    exact_of,
    gathered_rows,
    new_rows,
    tell_what_is_in_the_way,
    turns_of_group,
    write,
)


class ServedHeads(NamedTuple):
    """What an engine needs of one layer of a saved splice of ordinary attention.

    Attributes:
        splice: of the key heads, in the dtype of the model, on its device.
        identity: of the splice, which an engine does not change.
        geometry: sizes of its rows.
        dtype: of keys and values.
        turns: how a key at each position is rotated, uint8 [positions, F]; None where rows hold rotated keys.
    """

    splice: HeadSplices
    identity: str
    geometry: RowGeometry
    dtype: torch.dtype
    turns: torch.Tensor | None

    @property
    def row_bytes(self) -> int:
        return token_bytes(self.geometry, self.dtype)[0]

    def page_bytes(self, tokens: int) -> int:
        """Bytes of a page of so many tokens."""
        return bytes_of_page(self, tokens)


def store_heads(
    pages: Pages,
    layer: ServedHeads,
    key: torch.Tensor,
    value: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """Encode new tokens and write them.

    Args:
        pages: of the layer.
        layer: of the splice.
        key, value: rotated keys [Q, K, d] and values [Q, K, v].
        slots: where each goes, page * tokens per page + place in it, [Q]; negative for what is not to be stored.
        positions: of the tokens in their sequences, [Q].
    """
    values, keys = value.transpose(0, 1)[None], key.transpose(0, 1)[None]

    def rows(which: torch.Tensor, turns: torch.Tensor | None) -> torch.Tensor:
        return encode_states(layer.splice, values[:, :, which], keys[:, :, which], turns, layer.identity)

    def exact(which: torch.Tensor) -> torch.Tensor:
        return exact_states(layer.splice, values[:, :, which], keys[:, :, which])

    write(pages, layer, rows, exact, slots, positions)


def attend_heads_in_pages(
    pages: Pages, layer: ServedHeads, query: torch.Tensor, scaling: float, groups: list[Group]
) -> torch.Tensor:
    """Attention of the new tokens of all sequences over what is stored of them, their own rows included.

    One new token of a sequence attends to rows as they are stored; several have them decoded.

    Args:
        pages: of the layer.
        layer: of the splice.
        query: rotated, [Q, H, d], the query heads of one key head side by side.
        scaling: factor on the scores.
        groups: the sequences.

    Returns:
        [Q, H, v].
    """
    value_dim = layer.geometry.kv_lora_rank // layer.geometry.heads
    output = query.new_empty(*query.shape[:2], value_dim)
    for group in groups:
        new = query[group.queries].transpose(1, 2)
        if new.shape[2] == 1 and layer.splice.is_affine:
            output[group.queries] = _decoded(pages, layer, group, new, scaling)
            continue
        shared = new.shape[1] // layer.geometry.heads
        key, value = (
            part.repeat_interleave(shared, dim=1) for part in _gathered(pages, layer, group).keys_and_values()
        )
        output[group.queries] = attention_in_order(new, key, value, group.mask, scaling)
    return output


def _decoded(pages: Pages, layer: ServedHeads, group: Group, query: torch.Tensor, scaling: float) -> torch.Tensor:
    """Attention [B, 1, H, v] of one new token of each sequence, on rows in their pages where a backend reads them."""

    def gathered() -> torch.Tensor:
        tell_what_is_in_the_way(refusal_of_heads(step.numbers, layer.splice))
        return attention_of_step(query, _gathered(pages, layer, group), group.mask, scaling)

    step = step_of_heads(query, _states(pages, layer, group, pages.rows), None, scaling, None)
    return decode_heads(step._replace(paging=group.paging), gathered)


def _gathered(pages: Pages, layer: ServedHeads, group: Group) -> CompressedHeads:
    """What is stored of the sequences, their rows copied out of their pages."""
    return _states(pages, layer, group, gathered_rows(pages, layer, group))


def _states(pages: Pages, layer: ServedHeads, group: Group, rows: torch.Tensor) -> CompressedHeads:
    exact, turns = exact_of(pages, layer, group), turns_of_group(layer, group)
    return CompressedHeads(rows, layer.splice, exact, *new_rows(group), layer.dtype, None, turns, layer.identity)
