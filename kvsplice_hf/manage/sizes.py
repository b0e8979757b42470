"""Caches of patched models, and how many bytes they hold.

Legend: `B` batch, `S` tokens, `K` exact tokens, `R` kv_lora_rank, `r` spliced rank, `P` qk_rope_head_dim.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import Cache, StaticLayer
from transformers.utils import ModelOutput

from kvsplice_hf.cache.layers import splice_cache_layer
from kvsplice_hf.cache.turns import SLOT_DTYPE, FixedTurns, TurnTable
from kvsplice_hf.errors import ConfigError
from kvsplice_hf.patch.families import AttentionSite
from kvsplice_hf.patch.site_patch import PATCH_ATTRIBUTE
from kvsplice_hf.patch.sites import find_sites
from kvsplice_hf.patch.state import all_patched_sites, find_patch, is_patched, patched_sites
from kvsplice_hf.retention.plan import plan_of
from kvsplice_hf.upstream import cache_of


class KVSpliceCache(DynamicCache):
    """A `DynamicCache` whose patched layers are spliced from the start.

    `generate` needs none: it makes a cache of its own, which a patched model splices in place. This one is for callers
    who hold the cache themselves, over several turns say.

    Args:
        model: a patched model.
        kwargs: further arguments of `DynamicCache` (`offloading`, `offload_only_non_sliding`).

    Raises:
        PatchStateError: the model is not patched.
    """

    def __init__(self, model: nn.Module, **kwargs: Any) -> None:
        sites = patched_sites(model)
        super().__init__(config=sites[0][0].module.config.get_text_config(decoder=True), **kwargs)
        for site, patched in sites:
            splice_cache_layer(self, site.layer_idx, patched.geometry, patched.splice)


class KVCacheSize(NamedTuple):
    """Bytes of a cache without and with the splice."""

    original_bytes: int
    compressed_bytes: int


def get_kv_cache_size(model: nn.Module, seq_len: int = 2048, batch_size: int = 1) -> KVCacheSize:
    """Bytes that the cache of patched kinds of layers holds for sequences of `seq_len` tokens, by formula.

    Per token: R + P numbers unspliced (of ordinary attention those of all keys and values), r + P spliced (or the bytes
    of a packed row), and the indexer's key on sparse-attention layers, in the dtype of the model. Per sequence and
    spliced layer: K exact latents of R numbers (R + P where rows are packed) and their positions (8 bytes each). Where
    keys are coded before their rotation, per token a slot (4 bytes), and once for all sequences and layers how tokens
    at each position were rotated (P / 2 bytes). A sliding window keeps `window - 1` tokens. Linear-attention layers are
    not counted; on an unpatched model both figures are the same, outside of `Retention`. Inside of it the second counts
    the rows that are left of a prompt of `seq_len` tokens, and what lies beside them: a position (4 bytes), a slot of
    its own and perhaps a score (4 bytes each). How tokens were rotated may be held of some more tokens than have rows.
    `cache_nbytes` measures the same quantity on a cache.

    Raises:
        NotMLAError: the model has no layer that can be patched.

    Examples:
        >>> size = get_kv_cache_size(model, seq_len=4096)
        >>> size.compressed_bytes < size.original_bytes
        True
    """
    pattern = find_patch(model)[1].config.layer_pattern if is_patched(model) else None
    sites = find_sites(model, pattern)
    original = sum(_stock_bytes(site, seq_len) for site in sites)
    compressed = sum(_site_bytes(site, seq_len, spliced=PATCH_ATTRIBUTE in vars(site.module)) for site in sites)
    turned = [site for site in sites if site.stores_latent and _codes_keys(site)]
    slots, tables = _turn_bytes(turned, seq_len)
    return KVCacheSize(batch_size * original, batch_size * (compressed + slots) + tables)


def _codes_keys(site: AttentionSite) -> bool:
    patched = vars(site.module).get(PATCH_ATTRIBUTE)
    return patched is not None and patched.geometry.coded_keys


def _turn_bytes(sites: list[AttentionSite], seq_len: int) -> tuple[int, int]:
    """Bytes of the slots of one sequence, and of the tables of how its tokens were rotated.

    Layers of full attention with the same rotary embedding share their slots, a window has its own.
    """
    windows = [site.sliding_window for site in sites if site.sliding_window is not None]
    retained = [site for site in sites if _kept(site, seq_len) < seq_len]  # each of which has slots of its own
    full = {_rotary_kind(site) for site in sites if site.sliding_window is None and site not in retained}
    tokens = sum(min(seq_len, window - 1) for window in windows) + seq_len * len(full)
    tokens += sum(_kept(site, seq_len) for site in retained)
    sizes = {_rotary_kind(site): site.qk_rope_head_dim // 2 for site in sites}
    lines = {kind: _lines([site for site in sites if _rotary_kind(site) == kind], seq_len) for kind in sizes}
    return tokens * SLOT_DTYPE.itemsize, sum(lines[kind] * size for kind, size in sizes.items())


def _kept(site: AttentionSite, seq_len: int) -> int:
    """Rows that a layer of full attention keeps of so many tokens."""
    plan = plan_of(site.module)
    return seq_len if plan is None else plan.limit(seq_len, seq_len)


def _lines(sites: list[AttentionSite], seq_len: int) -> int:
    """Tokens of which some of these layers has a row, at most."""
    plans = [plan_of(site.module) for site in sites]
    kept = [_kept(site, seq_len) for site in sites]
    # Those of a window are the same in all layers.
    return min(seq_len, sum(kept) if any(plan is not None and plan.scored for plan in plans) else max(kept))


def _rotary_kind(site: AttentionSite) -> tuple[str, tuple[int, ...]]:
    """How the keys of a layer are rotated: by which rotary embedding of its model, and by which of its angles."""
    config = site.module.config
    kinds, types = getattr(config, "rope_parameters", None) or {}, getattr(config, "layer_types", None) or []
    kind = types[site.layer_idx] if site.layer_idx < len(types) else ""
    columns = vars(site.module)[PATCH_ATTRIBUTE].splice.keys.pairs[2]
    return kind if kind in kinds else "", tuple(columns.tolist())


def _stock_bytes(site: AttentionSite, seq_len: int) -> int:
    """Of a layer without splice and retention."""
    window = seq_len if site.sliding_window is None else min(seq_len, site.sliding_window - 1)
    rows = window * site.row_dim if site.stores_latent else 0
    return site.dtype.itemsize * (rows + seq_len * site.indexer_head_dim)


def _site_bytes(site: AttentionSite, seq_len: int, spliced: bool) -> int:
    itemsize = site.dtype.itemsize
    rows = _kept(site, seq_len) if site.sliding_window is None else min(seq_len, site.sliding_window - 1)
    indexer = seq_len * site.indexer_head_dim
    if not site.stores_latent:  # a layer that reuses another one's latent may still have an indexer of its own
        return itemsize * indexer
    beside = _beside(site, rows, seq_len)
    if not spliced:
        return itemsize * (rows * site.row_dim + indexer) + beside
    geometry = vars(site.module)[PATCH_ATTRIBUTE].geometry
    exact = geometry.sink_tokens * (geometry.exact_dim * itemsize + torch.long.itemsize)
    return rows * geometry.nbytes(site.dtype) + itemsize * indexer + exact + beside


def _beside(site: AttentionSite, rows: int, seq_len: int) -> int:
    """Bytes that retention keeps beside rows: positions and how many are gone, and scores."""
    plan = plan_of(site.module)
    if plan is None:
        return 0
    positions = rows * torch.int32.itemsize + torch.int64.itemsize if rows < seq_len else 0
    return positions + (rows * torch.float32.itemsize if plan.scored else 0)


def cache_nbytes(cache: Cache | ModelOutput, allocated: bool = False) -> int:
    """Bytes of all tensors of a cache, measured; stock caches of any kind as well as spliced ones.

    Args:
        cache: the cache to measure, or the output of a model or of `generate` that holds it.
        allocated: count all memory held (spare capacity of growing buffers, unfilled rows of static ones) instead of
            what the stored tokens occupy.

    Raises:
        ConfigError: there is no cache in what was given.

    Examples:
        >>> output = model.generate(**inputs, max_new_tokens=8, return_dict_in_generate=True)
        >>> cache_nbytes(output) <= cache_nbytes(output, allocated=True)
        True
    """
    found = cache if isinstance(cache, Cache) else cache_of(cache)
    if not isinstance(found, Cache):
        raise ConfigError(
            f"There is no cache in this {type(cache).__name__}. Give a `Cache`, or the output of a model called with "
            "`use_cache=True` or of `generate(..., return_dict_in_generate=True)`."
        )
    cache = found
    if allocated:
        storages = {storage.data_ptr(): storage.nbytes() for storage in _storages(cache)}
        return sum(storages.values())
    shared: set[int] = set()
    return sum(_occupied(layer, shared) for layer in cache.layers)


def materialised_nbytes(model: nn.Module) -> int:
    """Bytes of the dense weights that are kept of packed, adapted or sharded `kv_b_proj`, beside the cache.

    They are made at the first step that attends on codes, and counted from then on.

    Args:
        model: a patched model.

    Raises:
        PatchStateError: the model is not patched.

    Examples:
        >>> materialised_nbytes(model)  # nothing is packed or adapted
        0
    """
    return sum(state.materialised.nbytes for _, state in all_patched_sites(model))


def _occupied(layer: Any, shared: set[int]) -> int:
    """Bytes of what the tokens of a layer occupy, without what is among `shared`, which layers have in common."""
    total = 0
    for name, value in vars(layer).items():
        if name in ("_buffer", "_own_keys", "_own_values"):  # `keys` is a view of the first, and is the second
            continue
        if isinstance(value, (TurnTable, FixedTurns)):
            total += 0 if id(value) in shared else value.nbytes
            shared.add(id(value))
            continue
        if name == "values" and isinstance(value, torch.Tensor) and value.numel():
            if value.data_ptr() in shared:
                continue
            shared.add(value.data_ptr())
        nbytes = sum(tensor.nbytes for tensor in _tensors(value))
        if isinstance(layer, StaticLayer) and name in ("keys", "values", "indexer_keys"):
            filled = min(int(layer.get_seq_length()), layer.max_cache_len)
            nbytes = nbytes * filled // layer.max_cache_len
        total += nbytes
    return total


def _storages(cache: Cache) -> Iterator[torch.UntypedStorage]:
    for layer in cache.layers:
        for value in vars(layer).values():
            for tensor in _tensors(value):
                yield tensor.untyped_storage()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in `value`, inside containers and quantised tensors too. Counters (no dimensions) are left out."""
    if isinstance(value, torch.Tensor):
        if hasattr(value, "__tensor_flatten__"):
            yield from _tensors([getattr(value, name) for name in value.__tensor_flatten__()[0]])
        elif value.dim() > 0:
            yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (TurnTable, FixedTurns)):
        yield from _tensors(list(vars(value).values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
