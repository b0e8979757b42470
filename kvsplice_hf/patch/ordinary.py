"""Ordinary attention (multi-head, grouped-query, multi-query): what its modules look like in transformers.

The convention decides, not the class name: a module belongs here when its forward hands keys and values to `update` of
the cache, looks the attention function up by its name in the config, and is no MLA module. Sizes are read from its
projections, and held against what comes to the cache.

Legend: `H` query heads, `K` key heads, `d` numbers of a key, `v` of a value.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicSlidingWindowLayer

from kvsplice_hf.cache.layers import can_be_spliced
from kvsplice_hf.cache.rows import RowGeometry
from kvsplice_hf.errors import NotMLAError
from kvsplice_hf.patch.alone import computes_alone
from kvsplice_hf.patch.families import AttentionSite, Family
from kvsplice_hf.patch.heads import attend_heads
from kvsplice_hf.upstream import caches_keys_and_values, forward_parameters
from kvsplice_hf.weights.offload import execution_device
from kvsplice_hf.weights.sharding import head_share


# What attention modules call another sequence whose keys and values they read: that of an image, say. Modules that may
# read one (`key_value_states`) belong to encoder-decoder models, which are refused by name.
_OTHER_SEQUENCES = ("context", "cross_attention_states", "encoder_hidden_states")


def _looks_ordinary(module: nn.Module) -> bool:
    return (
        isinstance(getattr(module, "layer_idx", None), int)
        and not callable(getattr(module, "expand_kv", None))
        and not hasattr(module, "kv_b_proj")  # latents in a release or code that does not cache them
        and not _is_cross_attention(module)
        and _head_size(module) > 0
        and (caches_keys_and_values(type(module)) or computes_alone(type(module)))
    )


def _is_cross_attention(module: Any) -> bool:
    """Whether a module attends to another sequence: it says so, or its forward takes one and it does not deny it."""
    said = getattr(module, "is_cross_attention", None)
    return any(name in _OTHER_SEQUENCES for name in forward_parameters(module)) if said is None else bool(said)


def _check(name: str, module: Any) -> None:
    if getattr(module.config, "is_encoder_decoder", False):
        raise NotMLAError(
            f"{name} ({type(module).__name__}) is part of an encoder-decoder model, which is not supported."
        )
    layer = None if getattr(module, "is_kv_shared_layer", False) else _cache_layer(module)
    if layer is not None and not can_be_spliced(layer):
        raise NotMLAError(
            f"{name} ({type(module).__name__}) shares its cache layer, a {type(layer).__name__}, with what is no "
            "attention, so that its keys and values cannot be replaced by rows."
        )


def _describe(name: str, module: Any, earlier: Sequence[AttentionSite]) -> AttentionSite:
    config, width = module.config, _head_size(module)
    source = _source(name, module, earlier) if getattr(module, "is_kv_shared_layer", False) else None
    if source is not None:
        return replace(source, name=name, module=module, layer_idx=module.layer_idx, source=source)
    heads = config.num_attention_heads
    key_width, value_width = (_out_features(getattr(module, part, None)) for part in ("k_proj", "v_proj"))
    kv_heads = key_width // width if key_width else _heads_handed_over(module, heads)
    value_dim = value_width // kv_heads if value_width else width
    share = head_share(_projection(module))
    if share is not None:
        heads, kv_heads = share.of(heads, "query heads", name), share.of(kv_heads, "key heads", name)
    return AttentionSite(
        name=name,
        module=module,
        layer_idx=module.layer_idx,
        kv_lora_rank=value_dim,
        qk_rope_head_dim=width,
        qk_nope_head_dim=0,
        v_head_dim=value_dim,
        num_heads=heads,
        sliding_window=_window(module),
        indexer_head_dim=0,
        dtype=_dtype(module),
        kv_heads=kv_heads,
        chunked=_is_chunked(module),
        device=execution_device(_projection(module)),
        share=share,
    )


def _dtype(module: Any) -> torch.dtype:
    """Of keys and values: that of the weights, or where all are packed what the model was loaded as."""
    held = (parameter.dtype for parameter in module.parameters())
    found = next((dtype for dtype in held if dtype.is_floating_point and dtype.itemsize > 1), None)
    return found or getattr(module.config, "dtype", None) or torch.float32


def _heads_handed_over(module: Any, heads: int) -> int:
    """K, where no projection tells."""
    if computes_alone(type(module)):
        # Falcon of the newer kind hands each key over once for each query that reads it.
        return heads if getattr(module, "new_decoder_architecture", False) else getattr(module, "num_kv_heads", heads)
    return getattr(module.config, "num_key_value_heads", None) or heads


def _source(name: str, module: Any, earlier: Sequence[AttentionSite]) -> AttentionSite:
    """The site whose keys and values a layer reads that has none of its own.

    Raises:
        NotMLAError: no earlier layer of its kind hands its keys on.
    """
    kind = _kind(module)
    for site in reversed(earlier):
        if getattr(site.module, "store_full_length_kv", False) and _kind(site.module) == kind:
            return site
    raise NotMLAError(
        f"{name} ({type(module).__name__}) reads keys and values of another layer, but no earlier one of the kind "
        f"{kind!r} hands them on. Patch the whole decoder, not a part of it."
    )


def _head_size(module: Any) -> int:
    """d, under the names that models have for it."""
    sizes = (getattr(module, name, None) for name in ("head_dim", "head_size"))
    return next((size for size in sizes if isinstance(size, int)), 0)


def _cache_layer(module: Any) -> CacheLayerMixin | None:
    """The one that transformers gives the module in a cache that grows; None where it gives layers as they come."""
    layers = DynamicCache(config=module.config).layers
    return layers[module.layer_idx] if module.layer_idx < len(layers) else None


def _window(module: Any) -> int | None:
    """Tokens that the cache layer keeps room for, where transformers gives the module one that slides."""
    layer = _cache_layer(module)
    return layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None


def _is_chunked(module: Any) -> bool:
    """Whether a query sees the tokens of its own chunk of the text only."""
    return _kind(module) == "chunked_attention"


def _kind(module: Any) -> str | None:
    """What the settings call a layer's attention, if they do."""
    kinds = getattr(module.config, "layer_types", None) or []
    return kinds[module.layer_idx] if module.layer_idx < len(kinds) else None


def _projection(module: Any) -> nn.Module:
    """What makes the keys, where it has one of the names in use."""
    names = ("k_proj", "qkv_proj", "query_key_value", "c_attn")
    return next((part for name in names if isinstance(part := getattr(module, name, None), nn.Module)), module)


def _out_features(projection: Any) -> int:
    return int(getattr(projection, "out_features", 0) or 0)


def _geometry(site: AttentionSite, splice: Any, exact_tokens: int) -> RowGeometry:
    if site.chunked:
        # How many keys a query sees does not tell its rank in the sequence, so that first tokens could not be found.
        exact_tokens = 0
    if site.sliding_window is not None:
        exact_tokens = min(exact_tokens, max(site.sliding_window - 1, 0))
    K = site.kv_heads
    return RowGeometry(
        K * site.kv_lora_rank,
        sum(head.rank for head in splice),
        K * site.qk_rope_head_dim,
        exact_tokens,
        sum(splice.row_bytes),
        coded_keys=splice.keys is not None,
        heads=K,
    )


ORDINARY = Family(
    name="ordinary attention",
    recognises=_looks_ordinary,
    check=_check,
    describe=_describe,
    geometry=_geometry,
    methods={},
    attend=attend_heads,
)
