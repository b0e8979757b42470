"""Continuous batching (`generate_batch`) on codes: spliced rows in the pages of transformers' paged cache.

Stock transformers cannot run Multi-head Latent Attention there: its paged cache is sized by `head_dim`, which MLA
configs set to P, and is written with expanded keys and values. What is reused here, whole, is its bookkeeping: which
block of memory holds which token, prefix sharing, forking, offloading, scheduling. Those treat a block as bytes, so the
bytes can be laid out differently:

    block = for each layer: [ row 0 | row 1 | ... | row of the last token of the page ] [ exact latents of K tokens ]

with rows as in `rows.py`, of the width that each layer has. The exact latents belong to the first K tokens of a
request, all of which lie in its first block; the room for them in other blocks stays unused. Since they lie inside the
block, a shared prefix, a fork and an offloaded request bring them along.

The packed batch holds the new tokens of many requests in one row. Attention takes it apart again and runs each request
as `generate` would, absorbed or expanded; requests with one new token (decoding) run together, by similar length.

Legend: `Q` new tokens of all requests, `B` requests in a group, `T` new tokens per request of the group, `S` stored
tokens of the longest of them, `H` heads, `K` exact tokens, `R` kv_lora_rank, `P` qk_rope_head_dim, `V` v_head_dim.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from math import ceil
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig

from kvsplice_hf import upstream
from kvsplice_hf.attend.choice import encode
from kvsplice_hf.cache.exact import ExactTokens
from kvsplice_hf.cache.rows import CompressedLatent, RowGeometry
from kvsplice_hf.call import current_state
from kvsplice_hf.code.projection import LearnedKVSplice
from kvsplice_hf.errors import CacheMismatchError, UnsupportedError
from kvsplice_hf.upstream import MIN_TRANSFORMERS_PAGED


_ROWS_ATTRIBUTE = "_kvsplice_rows"
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


class PagedLatent:
    """What `PagedRows.update` returns in place of the latent and the rotated key. It is read by `attend`."""

    def __init__(self, pages: _LayerPages, batch: _Batch) -> None:
        self._pages = pages
        self._batch = batch

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
        for group in self._batch.groups:
            latent = self._latent(group)
            # Not the class's method: the one of the patch, which decodes the rows or passes them on.
            key, value = module.expand_kv(latent, latent)
            mask = query.new_zeros(group.visible.shape).masked_fill_(~group.visible, torch.finfo(query.dtype).min)
            attended, _ = attend(module, query[0][:, group.queries].transpose(0, 1), key, value, mask)
            output[group.queries] = attended
        return output[None], None

    def _latent(self, group: _Group) -> CompressedLatent:
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
        return CompressedLatent(rows[:, None], pages.splice, exact, new_tokens, rows.shape[1] - new_tokens, pages.dtype)


class PagedRows:
    """The spliced rows of all layers in one paged cache. Stands in for the cache in the attention modules.

    Args:
        cache: transformers' `PagedAttentionCache`, with blocks of at least `_block_bytes`.
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
            row, exact = _token_bytes(state.geometry, site.dtype)
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

    def bound(self, kwargs: dict[str, Any]) -> "PagedRows":
        """These rows, ready for one forward pass, given the keyword arguments of an attention module in it."""
        # The read indices may hold the same numbers in two passes, but not be the same list while this one is kept.
        if self._batch is None or self._batch.source is not kwargs["read_index"]:
            self._require_same_splices()
            self._batch = self._read(kwargs)
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
        rows = encode(pages.splice, key_states, value_states)[0, 0]
        pages.rows[batch.blocks, batch.offsets] = rows.contiguous().view(torch.uint8)
        if batch.early.numel():
            exact = key_states[0, 0, batch.early]
            if pages.splice.codec is not None:  # as in `SplicedLayerMixin.update`
                exact = torch.cat([exact, value_states[0, 0, batch.early]], dim=-1)
            # The first block of a request begins with its first token, so the offset is the position.
            where = batch.blocks[batch.early], batch.offsets[batch.early]
            pages.exact[where] = exact.contiguous().view(torch.uint8)
        latent = PagedLatent(pages, batch)
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
    found = (vars(value).get(_ROWS_ATTRIBUTE) for value in kwargs.values() if hasattr(value, "__dict__"))
    rows = next((rows for rows in found if rows is not None), None)
    return None if rows is None else rows.bound(kwargs)


def init_continuous_batching(
    model: Any,
    sites: Sequence[tuple[Any, Any]],
    generation_config: GenerationConfig | None = None,
    continuous_batching_config: Any = None,
    workload_hints: Any = None,
) -> Any:
    """Stands in for `model.init_continuous_batching`, through which `generate_batch` and the context manager go too.

    Args:
        model: the patched model.
        sites: its patched layers, as `patched_sites` gives them.
        generation_config, continuous_batching_config, workload_hints: as in transformers.

    Returns:
        The manager: a `ContinuousBatchingManager` of transformers.

    Raises:
        UnsupportedError: the model, the patch or the settings do not allow it.
    """
    _require_supported(model, sites)
    persistent = upstream.persistent_manager(model)
    if isinstance(persistent, SplicedBatchingManager):
        if persistent.identities == _identities(sites):
            return persistent
        upstream.drop_persistent_manager(model)  # its pages hold prefixes coded by another splice
    generation_config = copy.deepcopy(generation_config or model.generation_config)
    if generation_config.eos_token_id is None:
        generation_config.eos_token_id = -1  # how the manager spells "none"
    return SplicedBatchingManager(model, sites, generation_config, continuous_batching_config, workload_hints)


def _identities(sites: Sequence[tuple[Any, Any]]) -> list[str]:
    return [state.splice.identity for _, state in sites]


def _require_supported(model: Any, sites: Sequence[tuple[Any, Any]]) -> None:
    problem = None
    count = model.config.get_text_config().num_hidden_layers
    others = sorted(set(range(count)) - {site.layer_idx for site, _ in sites})
    if upstream.ContinuousBatchingManager is None:
        problem = f"it needs transformers>={MIN_TRANSFORMERS_PAGED}"
    elif others:
        problem = f"layers {others} are not patched MLA layers that store a latent of their own"
    elif any(site.indexer_head_dim or site.sliding_window is not None for site, _ in sites):
        problem = "the paged cache has no room for the keys of a sparse-attention indexer, and no spliced window"
    elif not all(current_state(state.patch).enabled for _, state in sites):
        problem = "the splice is disabled (splice_disabled), and stock MLA models do not run there"
    elif not all(str(site.module.config._attn_implementation).startswith("kvsplice_") for site, _ in sites):
        problem = (
            'it needs attention="auto" or "absorbed", and a model loaded with attn_implementation "sdpa" or "eager"'
        )
    if problem is not None:
        raise UnsupportedError(
            f"Continuous batching (generate_batch) cannot run on this patched model: {problem}. Use model.generate "
            "with a padded batch instead."
        )


def _token_bytes(geometry: RowGeometry, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of a row, and of an exact token."""
    return geometry.nbytes(dtype), geometry.exact_dim * dtype.itemsize


def _block_bytes(sites: Sequence[tuple[Any, Any]], tokens: int) -> int:
    """Bytes of a block of `tokens` tokens of all layers."""
    sizes = [(*_token_bytes(state.geometry, site.dtype), state.geometry.sink_tokens) for site, state in sites]
    return sum(tokens * row + sinks * exact for row, exact, sinks in sizes)


class _Overlay:
    """`base` with some attributes replaced. Unlike a changed copy of a config, it is not validated."""

    def __init__(self, base: Any, **replaced: Any) -> None:
        vars(self).update(replaced, _base=base)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)


class SplicedBatchingManager(upstream.ContinuousBatchingManager or object):  # type: ignore[misc]
    """The manager of transformers, with a cache whose blocks have the size of spliced rows.

    Args:
        model: the patched model.
        sites: its patched layers.
        generation_config, continuous_batching_config, workload_hints: as in transformers.

    Raises:
        UnsupportedError: tensor parallelism, CUDA graphs or compilation were asked for.
    """

    def __init__(
        self,
        model: Any,
        sites: Sequence[tuple[Any, Any]],
        generation_config: GenerationConfig,
        continuous_batching_config: Any,
        workload_hints: Any,
    ) -> None:
        self.model: Any = model
        self._sites = sites
        self.identities = _identities(sites)
        super().__init__(
            model, generation_config, continuous_batching_config or upstream.ContinuousBatchingConfig(), workload_hints
        )
        settings = self.continuous_batching_config
        compiled = settings.varlen_compile_config is not None or settings.decode_compile_config is not None
        if compiled or any(settings.cuda_graph_booleans) or self.distributed_helper.tp_size > 1:
            raise UnsupportedError(
                "Continuous batching on a patched model splits each batch by request, which no CUDA graph can record "
                "and which is not sharded: leave use_cuda_graph, the padding intervals, compilation and tensor "
                "parallelism off."
            )
        sinks, page_size = sites[0][1].geometry.sink_tokens, settings.page_size
        if sinks > page_size:
            raise UnsupportedError(f"page_size ({page_size}) must not be smaller than sink_tokens ({sinks}).")

    def switch_to_cb_friendly_attn(self, model: Any, auto_switch_to_flash: bool = True) -> None:
        """Nothing to switch: the attention function of the patch reads the pages."""

    def _create_batch_processor(self) -> Any:
        model, text_config = self.model, self.model.config.get_text_config()
        tokens = self.continuous_batching_config.page_size
        # The stock cache gives a block `2 * heads * head_dim` numbers per token and layer: one head, and a head_dim to
        # match the mean size of our rows.
        numbers = 2 * len(self._sites) * tokens * model.dtype.itemsize
        config = _Overlay(
            text_config,
            num_key_value_heads=1,
            head_dim=ceil(_block_bytes(self._sites, tokens) / numbers),
            layer_types=None,
            sliding_window=None,
            # Only its name is read, to plan memory: like flash attention, ours needs no mask over all requests, and
            # repeats no heads.
            _attn_implementation="kvsplice_flash",
        )
        self.model = _Overlay(model, config=_Overlay(model.config, get_text_config=lambda: config))
        try:
            processor = super()._create_batch_processor()
        finally:
            self.model = model
        if not hasattr(processor.cache, _ROWS_ATTRIBUTE):  # a persistent manager hands out the same one again
            setattr(processor.cache, _ROWS_ATTRIBUTE, PagedRows(processor.cache, self._sites))
        return processor
