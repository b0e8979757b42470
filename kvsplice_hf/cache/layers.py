"""Puts spliced cache layers in the place of stock ones: which for which, and when that is refused."""

from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticIndexedLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from kvsplice_hf import upstream
from kvsplice_hf.cache.dynamic import SplicedDynamicLayer, SplicedIndexedLayer, SplicedSlidingWindowLayer
from kvsplice_hf.cache.rows import RowGeometry
from kvsplice_hf.cache.splicing import SplicedLayerMixin
from kvsplice_hf.cache.static import (
    SplicedStaticIndexedLayer,
    SplicedStaticLayer,
    SplicedStaticSlidingWindowLayer,
)
from kvsplice_hf.cache.turns import TurnTable
from kvsplice_hf.code.projection import LearnedKVSplice
from kvsplice_hf.errors import CacheMismatchError


# Exact types, not subclasses: a quantised layer is a `DynamicLayer` too, but its storage cannot hold our rows.
_SPLICED_TYPES: dict[type, type[SplicedLayerMixin]] = {
    DynamicLayer: SplicedDynamicLayer,
    DynamicIndexedLayer: SplicedIndexedLayer,
    DynamicSlidingWindowLayer: SplicedSlidingWindowLayer,
    StaticLayer: SplicedStaticLayer,
    StaticIndexedLayer: SplicedStaticIndexedLayer,
    StaticSlidingWindowLayer: SplicedStaticSlidingWindowLayer,
}


def splice_cache_layer(
    cache: Cache, layer_idx: int, geometry: RowGeometry, splice: LearnedKVSplice
) -> SplicedLayerMixin:
    """The spliced layer at `layer_idx` of `cache`, put there in place of an empty stock layer if need be.

    In place, because a substitute cache object would leave the caller's own one empty: a second turn would forget the
    first.

    Raises:
        CacheMismatchError: the layer already holds tokens of an unpatched model, or rows of other sizes, or is of a
            kind (quantised, say) that cannot hold spliced rows.
    """
    while len(cache.layers) <= layer_idx and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    if len(cache.layers) <= layer_idx:
        raise CacheMismatchError(
            f"The cache has {len(cache.layers)} layers, but the model stores a latent in layer {layer_idx}. It was "
            "made for another model: make it with this model's config, or start from KVSpliceCache(model)."
        )
    stock: Any = cache.layers[layer_idx]
    if isinstance(stock, SplicedLayerMixin) and (stock.geometry == geometry or not _is_empty(stock)):
        _require_same_splice(stock, layer_idx, geometry, splice)
        stock.splice = splice
        return stock
    if not isinstance(stock, SplicedLayerMixin):
        _require_replaceable(stock, layer_idx)
    layer = _spliced_like(stock, geometry, splice)
    cache.layers[layer_idx] = layer
    return layer


def see_turns(cache: Cache, layer: SplicedLayerMixin, embeddings: Any, position_ids: Any) -> None:
    """Tell a layer how its new keys are rotated, and find or make the table that it shares with others.

    Args:
        cache: the cache of the layer.
        layer: whose rows hold keys before their rotation.
        embeddings, position_ids: as its attention module got them.
    """
    layer.embeddings, layer.position_ids = embeddings, position_ids
    if layer.table is not None or embeddings is None or layer.splice.keys is None:
        return
    for other in cache.layers:
        table = other.table if isinstance(other, SplicedLayerMixin) else None
        # Inside `torch.compile`, which cannot compare embeddings nor columns, each layer has a table of its own.
        if table is None or torch.compiler.is_compiling() or not table.is_of(embeddings):
            continue
        alike = isinstance(layer, StaticLayer) == isinstance(other, StaticLayer)
        if alike and torch.equal(table.columns, layer.splice.keys.pairs[2]):
            layer.table = table
            return
    if not isinstance(layer, StaticLayer):  # whose table has a size that shows when it is filled
        layer.table = TurnTable(layer.splice.keys.pairs[2])


def _require_same_splice(stock: Any, layer_idx: int, geometry: RowGeometry, splice: LearnedKVSplice) -> None:
    """Refuse to go on with rows that another splice has made: decoded by this one they would be other latents."""
    if stock.geometry != geometry:
        raise CacheMismatchError(
            f"Cache layer {layer_idx} holds rows of {stock.geometry}; the model has {geometry}. The cache was "
            "filled by a model with another splice. Start from an empty cache, or from KVSpliceCache(model)."
        )
    if torch.compiler.is_compiling() or stock.identity == splice.identity:
        return
    if stock.identity and not _is_empty(stock):
        raise CacheMismatchError(
            f"Cache layer {layer_idx} holds {int(stock.get_seq_length())} tokens coded by another splice (its "
            f"parameters had the digest {stock.identity[:12]}, now it is {splice.identity[:12]}): another one was "
            "loaded, or it was trained. Start from an empty cache, or from KVSpliceCache(model)."
        )
    stock.identity = splice.identity


def can_be_spliced(stock: CacheLayerMixin) -> bool:
    """Whether a spliced layer can take the place of such a layer of a cache."""
    return type(stock) in _SPLICED_TYPES


def stock_type_of(layer: Any) -> type:
    """The class of a layer of a cache; of a spliced one that of the stock layer whose place it took."""
    return next((stock for stock, spliced in _SPLICED_TYPES.items() if type(layer) is spliced), type(layer))


def _is_empty(layer: CacheLayerMixin) -> bool:
    return not layer.is_initialized or int(layer.get_seq_length()) == 0


def _require_replaceable(stock: Any, layer_idx: int) -> None:
    if not can_be_spliced(stock):
        raise CacheMismatchError(
            f"Cache layer {layer_idx} is a {type(stock).__name__}, which cannot hold spliced rows (the splice is the "
            'compression). Use a dynamic or static cache: leave `cache_implementation` unset, or set it to "static" or '
            '"offloaded"; or call unpatch_model(model) first.'
        )
    if not _is_empty(stock):
        raise CacheMismatchError(
            f"Cache layer {layer_idx} already holds {int(stock.get_seq_length())} tokens stored without the splice. "
            "Start from an empty cache, or from KVSpliceCache(model)."
        )


def _spliced_like(stock: Any, geometry: RowGeometry, splice: LearnedKVSplice) -> SplicedLayerMixin:
    kind = stock_type_of(stock)
    arguments: dict[str, Any] = {}
    if isinstance(stock, StaticLayer):
        arguments["max_cache_len"] = stock.max_cache_len
    if isinstance(stock, StaticSlidingWindowLayer):
        arguments["sliding_window"] = stock.max_cache_len
    if isinstance(stock, DynamicSlidingWindowLayer):
        arguments["sliding_window"] = stock.sliding_window
    layer = _SPLICED_TYPES[kind](geometry, splice, **arguments)
    upstream.carry_layer_settings(stock, layer)
    return layer
