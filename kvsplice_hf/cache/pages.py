"""Continuous batching (`generate_batch`) on codes: spliced rows in the pages of transformers' paged cache.

Stock transformers cannot run Multi-head Latent Attention there: its paged cache is sized by `head_dim`, which MLA
configs set to P, and is written with expanded keys and values. What is reused here, whole, is its bookkeeping: which
block of memory holds which token, prefix sharing, forking, offloading, scheduling. Those treat a block as bytes, so the
bytes can be laid out differently:

    block = for each layer: [ row 0 | row 1 | ... | row of the last token of the page ] [ exact latents of K tokens ],
            and where keys are coded before their rotation, once: [ how each token of the page was rotated ]

with rows as in `rows.py`, of the width that each layer has. The exact latents belong to the first K tokens of a
request, all of which lie in its first block; the room for them in other blocks stays unused. Since they lie inside the
block, a shared prefix, a fork and an offloaded request bring them along.

The packed batch holds the new tokens of many requests in one row. Attention takes it apart again and runs each request
as `generate` would, absorbed or expanded; requests with one new token (decoding) run together, by similar length.

Legend: `Q` new tokens of all requests, `B` requests in a group, `T` new tokens per request of the group, `S` stored
tokens of the longest of them, `H` heads, `K` exact tokens, `R` kv_lora_rank, `P` qk_rope_head_dim, `V` v_head_dim.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from kvsplice_hf import upstream
from kvsplice_hf.attend.choice import encode
from kvsplice_hf.cache.exact import ExactTokens
from kvsplice_hf.cache.rows import CompressedLatent, RowGeometry
from kvsplice_hf.cache.turns import SLOT_DTYPE, Turns, embedding_tensor
from kvsplice_hf.code.projection import LearnedKVSplice
from kvsplice_hf.errors import CacheMismatchError, UnsupportedError


ROWS_ATTRIBUTE = "_kvsplice_rows"
# Stored tokens of one group of decoding requests: bounds the rows that are unpacked and scored at once.
_MAX_GROUP_TOKENS = 1 << 17


class _LayerPages(NamedTuple):
    """One layer's part of every block, views of the cache's bytes.

    Attributes:
        rows: [blocks, tokens per page, bytes of a row].
        exact: [blocks, K, bytes of an exact token].
        dtype: of the latents.
        identity: of the splice when the pages were made.
    """

    rows: torch.Tensor
    exact: torch.Tensor
    dtype: torch.dtype
    geometry: RowGeometry
    splice: LearnedKVSplice
    identity: str


class _Group(NamedTuple):
    """Requests that attend together: one with any number of new tokens, or several with one each.

    Attributes:
        queries: index of the new tokens in the packed batch, [B, T].
        blocks, offsets: where the stored tokens are, [B, S].
        visible: [B, 1, T, S].
    """

    queries: torch.Tensor
    blocks: torch.Tensor
    offsets: torch.Tensor
    visible: torch.Tensor


class _Batch(NamedTuple):
    """What all layers of one forward pass share.

    Attributes:
        source: the list of read indices of the pass; transformers makes a new one for each pass.
        blocks, offsets: where the new tokens go, [Q].
        early: index among the new tokens of those that are stored exactly as well, [E].
    """

    source: Any
    blocks: torch.Tensor
    offsets: torch.Tensor
    early: torch.Tensor
    groups: list[_Group]


class _NewTurns(NamedTuple):
    """How the keys of the new tokens of a pass are rotated, and those of all tokens of its groups.

    Attributes:
        seen: the tensor by which the embeddings of the pass are known again.
        of_new: uint8 [1, 1, Q, F].
        of_groups: of the tokens of each group.
    """

    seen: torch.Tensor
    of_new: torch.Tensor
    of_groups: list[Turns]


class PagedLatent:
    """What `PagedRows.update` returns in place of the latent and the rotated key. It is read by `attend`."""

    def __init__(self, pages: _LayerPages, batch: _Batch, turns: list[Turns] | None) -> None:
        self._pages = pages
        self._batch = batch
        self._turns = turns

    def attend(self, module: Any, query: torch.Tensor, attend: Callable[..., Any]) -> tuple[torch.Tensor, None]:
        """Attention of the packed batch, request by request.

        Args:
            module: the attention module.
            query: [1, H, Q, N + P].
            attend: the attention function, called with module, query, key, value and an additive mask [B, 1, T, S].

        Returns:
            [1, Q, H, V], and no attention weights.
        """
        output = query.new_empty(query.shape[2], query.shape[1], module.v_head_dim)
        for index, group in enumerate(self._batch.groups):
            latent = self._latent(group, None if self._turns is None else self._turns[index])
            # Not the class's method: the one of the patch, which decodes the rows or passes them on.
            key, value = module.expand_kv(latent, latent)
            mask = query.new_zeros(group.visible.shape).masked_fill_(~group.visible, torch.finfo(query.dtype).min)
            attended, _ = attend(module, query[0][:, group.queries].transpose(0, 1), key, value, mask)
            output[group.queries] = attended
        return output[None], None

    def _latent(self, group: _Group, turns: Turns | None) -> CompressedLatent:
        pages, exact = self._pages, None
        rows = pages.rows[group.blocks, group.offsets].view(pages.geometry.row_dtype(pages.dtype))
        if pages.geometry.sink_tokens:
            # Slots behind the end of a short request need no care: the mask hides their places.
            latents = pages.exact[group.blocks[:, 0]].view(pages.dtype)
            positions = torch.arange(latents.shape[1], dtype=torch.int64, device=latents.device).expand(
                latents.shape[0], -1
            )
            exact = ExactTokens(latents, positions)
        new_tokens = group.queries.shape[1]
        first = rows.shape[1] - new_tokens
        return CompressedLatent(rows[:, None], pages.splice, exact, new_tokens, first, pages.dtype, turns=turns)


class PagedRows:
    """The spliced rows of all layers in one paged cache. Stands in for the cache in the attention modules.

    Args:
        cache: transformers' `PagedAttentionCache`, with blocks of at least `batching.block_bytes`.
        sites: the patched layers, as `patched_sites` gives them.
    """

    def __init__(self, cache: Any, sites: Sequence[tuple[Any, Any]]) -> None:
        allocator = cache.cache_allocators[upstream.FULL_ATTENTION]
        blocks = cache.cache_tensor.view(-1, allocator.bytes_per_block)
        self._index, self._tokens = allocator.index, allocator.tokens_per_page
        self._stride = allocator.block_physical_stride  # between blocks, in the units of transformers' indices
        self._sinks = sites[0][1].geometry.sink_tokens
        self._batch: _Batch | None = None
        self._layers: dict[int, _LayerPages] = {}
        start = 0
        for site, state in sites:
            row, exact = token_bytes(state.geometry, site.dtype)
            middle, end = start + row * self._tokens, start + row * self._tokens + exact * self._sinks
            self._layers[site.layer_idx] = _LayerPages(
                blocks[:, start:middle].unflatten(1, (self._tokens, row)),
                blocks[:, middle:end].unflatten(1, (self._sinks, exact)),
                site.dtype,
                state.geometry,
                state.splice,
                state.splice.identity,
            )
            start = end
        turned = turn_bytes(sites)
        # How the tokens of each block were rotated, bytes [blocks, tokens per page, bytes of a token].
        self._turn_pages = blocks[:, start : start + turned * self._tokens].unflatten(1, (self._tokens, turned))
        self._turns: _NewTurns | None = None

    def see_turns(self, embeddings: Any, splice: LearnedKVSplice) -> None:
        """Keep how the keys of the new tokens are rotated, once per pass; before their rows.

        Args:
            embeddings: as the attention module got them.
            splice: of the layer, which codes keys before their rotation.

        Raises:
            UpstreamChangedError: nothing says how.
            UnsupportedError: layers rotate keys in different ways.
        """
        if embeddings is None or splice.keys is None:
            raise upstream.changed(
                "continuous batching",
                f"an attention module got no `{upstream.POSITION_EMBEDDINGS}` that say how its keys are rotated.",
            )
        if self._turns is not None and self._turns.seen is embedding_tensor(embeddings):
            return
        turns = splice.keys.turns_of(embeddings)
        if self._turns is not None:
            if turns.shape == self._turns.of_new[:, 0].shape and torch.equal(turns, self._turns.of_new[:, 0]):
                return
            raise UnsupportedError(
                "Continuous batching (generate_batch) keeps how a token is rotated once for all layers, and layers of "
                "this model differ in it. Use model.generate with a padded batch, or patch with "
                'KVSpliceConfig(keys="rotated").'
            )
        batch = self._batch
        assert batch is not None
        self._turn_pages[batch.blocks, batch.offsets] = turns[0]
        groups = [self._turns_of(group) for group in batch.groups]
        self._turns = _NewTurns(embedding_tensor(embeddings), turns[:, None], groups)

    def _turns_of(self, group: _Group) -> Turns:
        turns = self._turn_pages[group.blocks, group.offsets]  # [B, S, F]
        batch, tokens, _ = turns.shape
        slots = torch.arange(batch * tokens, dtype=SLOT_DTYPE, device=turns.device).view(batch, tokens)
        return Turns(turns.flatten(0, 1).T.contiguous(), slots)

    def bound(self, kwargs: dict[str, Any]) -> "PagedRows":
        """These rows, ready for one forward pass, given the keyword arguments of an attention module in it."""
        # The read indices may hold the same numbers in two passes, but not be the same list while this one is kept.
        if self._batch is None or self._batch.source is not kwargs["read_index"]:
            self._require_same_splices()
            self._batch, self._turns = self._read(kwargs), None
        return self

    def _require_same_splices(self) -> None:
        changed = [index for index, pages in self._layers.items() if pages.splice.identity != pages.identity]
        if changed:
            raise CacheMismatchError(
                f"The splice of layers {changed} has been changed since this manager of continuous batching was made: "
                "its pages hold rows of the old one. Stop the manager and make a new one."
            )

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[PagedLatent, PagedLatent]:
        """Encode and store the new tokens: latents [1, 1, Q, R] and rotated keys [1, 1, Q, P]."""
        upstream.check_update_arguments(args, kwargs)
        pages, batch = self._layers[layer_idx], self._batch
        assert batch is not None
        turns = self._turns if pages.geometry.coded_keys else None
        rows = encode(pages.splice, key_states, value_states, None if turns is None else turns.of_new)[0, 0]
        pages.rows[batch.blocks, batch.offsets] = rows.contiguous().view(torch.uint8)
        if batch.early.numel():
            exact = key_states[0, 0, batch.early]
            if pages.splice.codec is not None:  # as in `SplicedLayerMixin.update`
                exact = torch.cat([exact, value_states[0, 0, batch.early]], dim=-1)
            # The first block of a request begins with its first token, so the offset is the position.
            where = batch.blocks[batch.early], batch.offsets[batch.early]
            pages.exact[where] = exact.contiguous().view(torch.uint8)
        latent = PagedLatent(pages, batch, None if turns is None else turns.of_groups)
        return latent, latent

    def _read(self, kwargs: dict[str, Any]) -> _Batch:
        if kwargs.get("block_table") is not None:
            raise CacheMismatchError("Spliced pages are read by index; the block table of flash attention is not read.")
        write, read = kwargs["write_index"][self._index], kwargs["read_index"][self._index]
        # Without read indices no request has a past: what is read is what is written.
        read = read if read.numel() else write
        blocks, offsets = read // self._stride, read % self._stride
        early: list[int] = []
        groups: list[_Group] = []
        # The one transfer to the host per forward pass; the shapes of all that follows depend on it.
        for requests in _grouped(
            kwargs["cu_seq_lens_q"].tolist(), kwargs["cu_seq_lens_k"][upstream.FULL_ATTENTION].tolist()
        ):
            groups.append(_make_group(requests, blocks, offsets))
            for request in requests:
                past = request.keys - request.queries
                early += range(request.first_query, request.first_query + min(request.queries, self._sinks - past))
        indices = torch.tensor(early, dtype=torch.long, device=write.device)
        return _Batch(kwargs["read_index"], write // self._stride, write % self._stride, indices, groups)


class _Request(NamedTuple):
    """Where one request is in the packed batch: its new tokens, and its stored tokens with the new ones."""

    first_query: int
    queries: int
    first_key: int
    keys: int


def _grouped(query_bounds: list[int], key_bounds: list[int]) -> Iterator[list[_Request]]:
    """The requests of a packed batch, those with one new token by similar length: padded to at most twice their own."""
    decoding: dict[int, list[_Request]] = defaultdict(list)
    for index, (query, key) in enumerate(zip(query_bounds[:-1], key_bounds[:-1], strict=True)):
        request = _Request(query, query_bounds[index + 1] - query, key, key_bounds[index + 1] - key)
        if request.queries == 1:
            decoding[request.keys.bit_length()].append(request)
        elif request.queries > 1:
            yield [request]
    for bits, requests in decoding.items():
        count = max(1, _MAX_GROUP_TOKENS >> bits)
        for start in range(0, len(requests), count):
            yield requests[start : start + count]


def _make_group(requests: list[_Request], blocks: torch.Tensor, offsets: torch.Tensor) -> _Group:
    """Requests with equally many new tokens; `blocks` and `offsets` of all stored tokens of the batch, [all keys]."""
    device = blocks.device
    first_query, _, first_key, keys = torch.tensor(requests, dtype=torch.int64, device=device).unbind(-1)
    queries, longest = requests[0].queries, max(request.keys for request in requests)
    column = torch.arange(longest, dtype=torch.int64, device=device)
    # Past its end a shorter request repeats its last token, which is masked there.
    places = first_key[:, None] + column.minimum(keys[:, None] - 1)
    new = torch.arange(queries, dtype=torch.int64, device=device)
    position = keys[:, None] - queries + new  # [B, T]
    return _Group(
        queries=first_query[:, None] + new,
        blocks=blocks[places],
        offsets=offsets[places],
        visible=(column <= position[..., None])[:, None],
    )


def paged_rows(kwargs: dict[str, Any]) -> PagedRows | None:
    """What an attention module is to get as its cache: spliced pages in continuous batching, else None.

    Args:
        kwargs: the keyword arguments of the attention module.
    """
    if "read_index" not in kwargs:  # as in each call but those of continuous batching
        return None
    found = (vars(value).get(ROWS_ATTRIBUTE) for value in kwargs.values() if hasattr(value, "__dict__"))
    rows = next((rows for rows in found if rows is not None), None)
    return None if rows is None else rows.bound(kwargs)


def turn_bytes(sites: Sequence[tuple[Any, Any]]) -> int:
    """Bytes that say how one token was rotated, for all layers together; 0 where rows hold rotated keys."""
    return max((site.qk_rope_head_dim // 2 for site, state in sites if state.geometry.coded_keys), default=0)


def token_bytes(geometry: RowGeometry, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of a row, and of an exact token."""
    return geometry.nbytes(dtype), geometry.exact_dim * dtype.itemsize
