"""Continuous batching (`generate_batch`) on codes: spliced rows in the pages of transformers' paged cache.

Stock transformers cannot run Multi-head Latent Attention there: its paged cache is sized by `head_dim`, which MLA
configs set to P, and is written with expanded keys and values. Ordinary attention runs, on keys and values as they are.
What is reused here, whole, is the bookkeeping: which block of memory holds which token, prefix sharing, forking,
offloading, scheduling. Those treat a block as bytes, so the bytes can be laid out differently:

    block = for each layer: [ row 0 | row 1 | ... | row of the last token of the page ] [ what K exact tokens have ],
            and where keys are coded before their rotation, once for each kind of rotation:
            [ how each token of the page was rotated ]

with rows as in `rows.py` or `heads.py`, of the width that each layer has. What is exact belongs to the first K tokens
of a request, all of which lie in its first block; the room for them in other blocks stays unused. Since they lie inside
the block, a shared prefix, a fork and an offloaded request bring them along.

The packed batch holds the new tokens of many requests in one row. Attention takes it apart again and runs each request
as `generate` would, on rows or on what they decode to; requests with one new token (decoding) run together, by similar
length. All tokens of a request are kept, in layers with a sliding window as well, where a mask hides what has left it.

Legend: `Q` new tokens of all requests, `B` requests in a group, `T` new tokens per request of the group, `S` stored
tokens of the longest of them, `H` heads, `K` exact tokens, `R` kv_lora_rank, `P` qk_rope_head_dim, `V` v_head_dim, `F`
angles of a token.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch

from kvsplice_hf import upstream
from kvsplice_hf.cache.exact import ExactTokens
from kvsplice_hf.cache.heads import CompressedHeads, compressed_states, encode_states, exact_states, latents_and_keys
from kvsplice_hf.cache.rows import CompressedLatent, RowGeometry
from kvsplice_hf.cache.turns import SLOT_DTYPE, Turns, embedding_tensor
from kvsplice_hf.code.heads import HeadSplices
from kvsplice_hf.code.projection import LearnedKVSplice
from kvsplice_hf.errors import CacheMismatchError, UnsupportedError


ROWS_ATTRIBUTE = "_kvsplice_rows"
# Stored tokens of one group of decoding requests: bounds the rows that are unpacked and scored at once.
_MAX_GROUP_TOKENS = 1 << 17
# Layers that are told apart in how they rotate a token: their window, and which of the model's angles turn their keys.
_TurnKind: TypeAlias = tuple[int | None, tuple[int, ...]]


class _LayerPages(NamedTuple):
    """One layer's part of every block, views of the cache's bytes.

    Attributes:
        rows: [blocks, tokens per page, bytes of a row].
        exact: [blocks, K, bytes of an exact token].
        dtype: of the latents, or of keys and values.
        identity: of the splice when the pages were made.
        window: tokens that a query sees, itself included; None for all of them.
        turned: how its keys are rotated, where they are coded before that; else None.
    """

    rows: torch.Tensor
    exact: torch.Tensor
    dtype: torch.dtype
    geometry: RowGeometry
    splice: LearnedKVSplice | HeadSplices
    identity: str
    window: int | None
    turned: _TurnKind | None


class _Group(NamedTuple):
    """Requests that attend together: one with any number of new tokens, or several with one each.

    Attributes:
        queries: index of the new tokens in the packed batch, [B, T].
        blocks, offsets: where the stored tokens are, [B, S].
        positions: of the new tokens among the stored ones, [B, T].
    """

    queries: torch.Tensor
    blocks: torch.Tensor
    offsets: torch.Tensor
    positions: torch.Tensor

    def mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """What is added to the scores, [B, 1, T, S]: 0 where a query may look."""
        column = torch.arange(self.blocks.shape[1], dtype=torch.int64, device=self.blocks.device)
        position = self.positions[..., None]
        hidden = column > position
        if window is not None:
            hidden |= column <= position - window
        nothing = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        return nothing.masked_fill_(hidden, torch.finfo(dtype).min)[:, None]


class _Batch(NamedTuple):
    """What all layers of one forward pass share.

    Attributes:
        source: the list of read indices of the pass; transformers makes a new one for each pass.
        blocks, offsets: where the new tokens go, [Q].
        early: index among the new tokens of those that are stored exactly as well, [E], by K.
    """

    source: Any
    blocks: torch.Tensor
    offsets: torch.Tensor
    early: dict[int, torch.Tensor]
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


class PagedStates:
    """What `PagedRows.update` returns in place of keys and values. It is read by `attend`."""

    def __init__(self, pages: _LayerPages, batch: _Batch, turns: list[Turns] | None) -> None:
        self._pages = pages
        self._batch = batch
        self._turns = turns

    @property
    def window(self) -> int | None:
        """Tokens that a query sees, itself included; None for all of them."""
        return self._pages.window

    def attend(
        self, query: torch.Tensor, value_dim: int, attend: Callable[[torch.Tensor, Any, torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Attention of the packed batch, request by request.

        Args:
            query: [1, H, Q, N + P].
            value_dim: V.
            attend: called for each group with its queries [B, H, T, N + P], its rows (`CompressedLatent` or
                `CompressedHeads`) and an additive mask [B, 1, T, S]; gives [B, T, H, V].

        Returns:
            [1, Q, H, V].
        """
        output = query.new_empty(query.shape[2], query.shape[1], value_dim)
        for index, group in enumerate(self._batch.groups):
            states = self._states(group, None if self._turns is None else self._turns[index])
            mask = group.mask(self._pages.window, query.dtype)
            output[group.queries] = attend(query[0][:, group.queries].transpose(0, 1), states, mask)
        return output[None]

    def _states(self, group: _Group, turns: Turns | None) -> CompressedLatent | CompressedHeads:
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
        return compressed_states(rows[:, None], pages.splice, exact, new_tokens, first, pages.dtype, turns=turns)


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
        self._sinks = {state.geometry.sink_tokens for _, state in sites}
        self._batch: _Batch | None = None
        self._layers: dict[int, _LayerPages] = {}
        start = 0
        for site, state in sites:
            row, exact = token_bytes(state.geometry, site.dtype)
            middle = start + row * self._tokens
            end = middle + exact * state.geometry.sink_tokens
            self._layers[site.layer_idx] = _LayerPages(
                blocks[:, start:middle].unflatten(1, (self._tokens, row)),
                blocks[:, middle:end].unflatten(1, (state.geometry.sink_tokens, exact)),
                site.dtype,
                state.geometry,
                state.splice,
                state.splice.identity,
                site.sliding_window,
                _turn_kind(site, state),
            )
            start = end
        # How the tokens of each block were rotated, bytes [blocks, tokens per page, bytes of a token].
        self._turn_pages: dict[_TurnKind, torch.Tensor] = {}
        for kind in _turn_kinds(sites):
            end = start + len(kind[1]) * self._tokens
            self._turn_pages[kind] = blocks[:, start:end].unflatten(1, (self._tokens, len(kind[1])))
            start = end
        self._turns: dict[_TurnKind, _NewTurns] = {}

    def see_turns(self, embeddings: Any, layer_idx: int) -> None:
        """Keep how the keys of the new tokens are rotated, once per pass and kind; before their rows.

        Args:
            embeddings: as the attention module got them.
            layer_idx: of a layer that codes keys before their rotation.

        Raises:
            UpstreamChangedError: nothing says how.
            UnsupportedError: layers of one kind rotate keys in different ways.
        """
        pages, batch = self._layers[layer_idx], self._batch
        if embeddings is None or pages.splice.keys is None:
            raise upstream.changed(
                "continuous batching",
                f"an attention module got no `{upstream.POSITION_EMBEDDINGS}` that say how its keys are rotated.",
            )
        assert batch is not None
        assert pages.turned is not None
        known = self._turns.get(pages.turned)
        if known is not None and known.seen is embedding_tensor(embeddings):
            return
        turns = pages.splice.keys.turns_of(embeddings)
        if known is not None:
            if turns.shape == known.of_new[:, 0].shape and torch.equal(turns, known.of_new[:, 0]):
                return
            raise UnsupportedError(
                "Continuous batching (generate_batch) keeps how a token is rotated once for all layers with one "
                "attention window, and layers of this model differ in it. Use model.generate with a padded batch, or "
                'patch with KVSpliceConfig(keys="rotated").'
            )
        kept = self._turn_pages[pages.turned]
        kept[batch.blocks, batch.offsets] = turns[0]
        groups = [self._turns_of(group, kept) for group in batch.groups]
        self._turns[pages.turned] = _NewTurns(embedding_tensor(embeddings), turns[:, None], groups)

    def _turns_of(self, group: _Group, kept: torch.Tensor) -> Turns:
        turns = kept[group.blocks, group.offsets]  # [B, S, F]
        batch, tokens, _ = turns.shape
        slots = torch.arange(batch * tokens, dtype=SLOT_DTYPE, device=turns.device).view(batch, tokens)
        return Turns(turns.flatten(0, 1).T.contiguous(), slots)

    def bound(self, kwargs: dict[str, Any]) -> "PagedRows":
        """These rows, ready for one forward pass, given the keyword arguments of an attention module in it."""
        # The read indices may hold the same numbers in two passes, but not be the same list while this one is kept.
        if self._batch is None or self._batch.source is not kwargs["read_index"]:
            self._require_same_splices()
            self._batch, self._turns = self._read(kwargs), {}
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
    ) -> tuple[PagedStates, PagedStates]:
        """Encode and store the new tokens.

        Args:
            key_states, value_states: latents [1, 1, Q, R] and rotated keys [1, 1, Q, P]; or of ordinary attention keys
                and values of all key heads.
            layer_idx: of the layer.
        """
        upstream.check_update_arguments(args, kwargs)
        pages, batch = self._layers[layer_idx], self._batch
        assert batch is not None
        turns = None if pages.turned is None else self._turns[pages.turned]
        latents, k_rot = latents_and_keys(pages.splice, key_states, value_states)
        rows = encode_states(pages.splice, latents, k_rot, None if turns is None else turns.of_new)
        pages.rows[batch.blocks, batch.offsets] = rows[0, 0].contiguous().view(torch.uint8)
        early = batch.early[pages.geometry.sink_tokens]
        if early.numel():
            # The first block of a request begins with its first token, so the offset is the position.
            where = batch.blocks[early], batch.offsets[early]
            exact = exact_states(pages.splice, latents, k_rot)
            pages.exact[where] = exact[0, 0, early].contiguous().view(torch.uint8)
        states = PagedStates(pages, batch, None if turns is None else turns.of_groups)
        return states, states

    def _read(self, kwargs: dict[str, Any]) -> _Batch:
        if kwargs.get("block_table") is not None:
            raise CacheMismatchError("Spliced pages are read by index; the block table of flash attention is not read.")
        write, read = kwargs["write_index"][self._index], kwargs["read_index"][self._index]
        # Without read indices no request has a past: what is read is what is written.
        read = read if read.numel() else write
        blocks, offsets = read // self._stride, read % self._stride
        early: dict[int, list[int]] = {sinks: [] for sinks in self._sinks}
        groups: list[_Group] = []
        # The one transfer to the host per forward pass; the shapes of all that follows depend on it.
        for requests in grouped(
            kwargs["cu_seq_lens_q"].tolist(), kwargs["cu_seq_lens_k"][upstream.FULL_ATTENTION].tolist()
        ):
            groups.append(_make_group(requests, blocks, offsets))
            for request in requests:
                past, first = request.keys - request.queries, request.first_query
                for sinks, indices in early.items():
                    indices += range(first, first + min(request.queries, sinks - past))
        exact = {
            sinks: torch.tensor(indices, dtype=torch.long, device=write.device) for sinks, indices in early.items()
        }
        return _Batch(kwargs["read_index"], write // self._stride, write % self._stride, exact, groups)


class Request(NamedTuple):
    """Where one request is in the packed batch: its new tokens, and its stored tokens with the new ones."""

    first_query: int
    queries: int
    first_key: int
    keys: int


def grouped(query_bounds: list[int], key_bounds: list[int]) -> Iterator[list[Request]]:
    """The requests of a packed batch, those with one new token by similar length: padded to at most twice their own."""
    decoding: dict[int, list[Request]] = defaultdict(list)
    for index, (query, key) in enumerate(zip(query_bounds[:-1], key_bounds[:-1], strict=True)):
        request = Request(query, query_bounds[index + 1] - query, key, key_bounds[index + 1] - key)
        if request.queries == 1:
            decoding[request.keys.bit_length()].append(request)
        elif request.queries > 1:
            yield [request]
    for bits, requests in decoding.items():
        count = max(1, _MAX_GROUP_TOKENS >> bits)
        for start in range(0, len(requests), count):
            yield requests[start : start + count]


def _make_group(requests: list[Request], blocks: torch.Tensor, offsets: torch.Tensor) -> _Group:
    """Requests with equally many new tokens; `blocks` and `offsets` of all stored tokens of the batch, [all keys]."""
    device = blocks.device
    first_query, _, first_key, keys = torch.tensor(requests, dtype=torch.int64, device=device).unbind(-1)
    queries, longest = requests[0].queries, max(request.keys for request in requests)
    column = torch.arange(longest, dtype=torch.int64, device=device)
    # Past its end a shorter request repeats its last token, which is masked there.
    places = first_key[:, None] + column.minimum(keys[:, None] - 1)
    new = torch.arange(queries, dtype=torch.int64, device=device)
    return _Group(
        queries=first_query[:, None] + new,
        blocks=blocks[places],
        offsets=offsets[places],
        positions=keys[:, None] - queries + new,
    )


def paged_rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> PagedRows | None:
    """What an attention module is to get as its cache: spliced pages in continuous batching, else None.

    Args:
        args, kwargs: the arguments of the attention module.
    """
    if "read_index" not in kwargs:  # as in each call but those of continuous batching
        return None
    given = (*args, *kwargs.values())
    found = (vars(value).get(ROWS_ATTRIBUTE) for value in given if hasattr(value, "__dict__"))
    rows = next((rows for rows in found if rows is not None), None)
    return None if rows is None else rows.bound(kwargs)


def turn_bytes(sites: Sequence[tuple[Any, Any]]) -> int:
    """Bytes that say how one token was rotated, for all layers together; 0 where rows hold rotated keys."""
    return sum(len(columns) for _, columns in _turn_kinds(sites))


def _turn_kinds(sites: Sequence[tuple[Any, Any]]) -> list[_TurnKind]:
    """How layers rotate keys that they code before that, each kind once."""
    found = (_turn_kind(site, state) for site, state in sites)
    return list(dict.fromkeys(kind for kind in found if kind is not None))


def _turn_kind(site: Any, state: Any) -> _TurnKind | None:
    if not state.geometry.coded_keys:
        return None
    return site.sliding_window, tuple(state.splice.keys.pairs[2].tolist())


def token_bytes(geometry: RowGeometry, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of a row, and of an exact token."""
    return geometry.nbytes(dtype), geometry.exact_dim * dtype.itemsize
