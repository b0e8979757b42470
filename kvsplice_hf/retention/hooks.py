"""What runs around the forward of an attention module whose rows are dropped.

Before it, and before the patch sees the call: the cache gets a layer of ours, rows of an earlier call are dropped if
that was left to this one, and the module gets the part of the mask that is about the rows that are left. After it: rows
are dropped.
"""

import copy
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from kvsplice_hf import upstream
from kvsplice_hf.cache.dynamic import SplicedDynamicLayer
from kvsplice_hf.cache.layers import splice_cache_layer
from kvsplice_hf.cache.splicing import SplicedLayerMixin
from kvsplice_hf.cache.turns import TurnTable
from kvsplice_hf.call import current_state
from kvsplice_hf.errors import CacheMismatchError, UnsupportedError
from kvsplice_hf.patch.families import AttentionSite
from kvsplice_hf.patch.site_patch import PATCH_ATTRIBUTE
from kvsplice_hf.retention.layer import MOST_TAKEN_BACK, RetainedLayer, RetainedLayerMixin, RetainedSplicedLayer
from kvsplice_hf.retention.plan import LayerPlan
from kvsplice_hf.retention.recording import Recorder, record, recorded
from kvsplice_hf.retention.scores import real_tokens


# Exact types: what a subclass stores is not known.
_RETAINED: dict[type, type[RetainedLayerMixin]] = {
    DynamicLayer: RetainedLayer,
    SplicedDynamicLayer: RetainedSplicedLayer,
}


def enter(
    site: AttentionSite,
    plan: LayerPlan,
    arguments: upstream.ForwardArguments,
    module: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of an attention module, which has to run before that of the patch.

    Raises:
        CacheMismatchError: the cache holds what cannot be gone on with.
        UnsupportedError: a call in which no rows can be dropped.
    """
    _require_inference(site, module)
    cache = upstream.find_cache(args, kwargs)
    if cache is None:
        found = upstream.other_cache(arguments, args, kwargs)
        what = "no cache" if found is None else f"a {type(found).__name__}"
        raise UnsupportedError(
            f"Retention got {what} at {site.name}; rows are dropped from a `DynamicCache` only. Call the model with "
            "use_cache=True, or model.generate; generate_batch (continuous batching) cannot drop rows."
        )
    if arguments.get("alibi", args, kwargs) is not None:
        raise UnsupportedError(
            f"Retention cannot run on {site.name}: it gets biases by position for all tokens (ALiBi), which would meet "
            "the wrong rows."
        )
    layer = _layer_of(cache, site, plan, module)
    layer.settle(plan)
    hidden, mask = (arguments.get(name, args, kwargs) for name in ("hidden_states", "attention_mask"))
    if mask is not None and not isinstance(mask, torch.Tensor):
        raise UnsupportedError(
            f"Retention got an attention mask of type {type(mask).__name__} at {site.name}; it takes one as a tensor. "
            'Load the model with attn_implementation="sdpa".'
        )
    count = hidden.shape[1]
    real = real_tokens(mask, layer.seen + count)
    layer.plan, layer.real = plan, real
    if plan.scored:
        record(Recorder(module, None if real is None else real[:, layer.seen :], count <= MOST_TAKEN_BACK))
    rows = layer.mask_of_rows(mask, count, hidden.dtype)
    return (args, kwargs) if rows is mask else arguments.replaced("attention_mask", rows, args, kwargs)


def leave(
    site: AttentionSite,
    plan: LayerPlan,
    is_last: bool,
    module: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
) -> None:
    """Forward hook of an attention module: drop rows.

    Raises:
        UpstreamChangedError: the forward did not do what is relied on.
    """
    cache = upstream.find_cache(args, kwargs)
    assert cache is not None
    layer: Any = cache.layers[site.layer_idx]
    received = recorded(module) if plan.scored else None
    if not layer.is_running or (plan.scored and (received is None or received.shape[-1] != layer.row_count)):
        missing = " and of the attention function under its name in the config" if plan.scored else ""
        raise upstream.changed(
            f"{site.name} ({type(module).__name__})",
            f"its forward ended without a call of `update` of the cache{missing}.",
        )
    layer.plan = None
    layer.finish(plan, received)
    if is_last:
        _forget_turns(cache)


def _require_inference(site: AttentionSite, module: Any) -> None:
    if module.training:
        raise UnsupportedError("Retention is for inference, and the model is in training. Call model.eval().")
    if torch.compiler.is_compiling():
        raise UnsupportedError(
            f"Retention cannot run inside torch.compile ({site.name}): how many rows there are changes from call to "
            "call. Give it the model that is not compiled."
        )


def _layer_of(cache: Cache, site: AttentionSite, plan: LayerPlan, module: Any) -> RetainedLayerMixin:
    """The layer of a cache from which rows are dropped, put there in the place of another one if need be."""
    index = site.layer_idx
    while len(cache.layers) <= index and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    before: Any = cache.layers[index] if len(cache.layers) > index else None
    if isinstance(before, RetainedLayerMixin):
        if before.is_running:
            raise CacheMismatchError(
                "An earlier call on this cache ended with an error before rows could be dropped. Start from an empty "
                "cache."
            )
        if before.seen and before.retention != plan.identity:
            raise CacheMismatchError(
                f"Cache layer {index} holds rows that were kept by other settings ({before.retention}; now "
                f"{plan.identity}). Start from an empty cache."
            )
        return before
    patched = vars(module).get(PATCH_ATTRIBUTE)
    if type(before) is DynamicLayer and patched is not None and current_state(patched.patch).enabled:
        before = splice_cache_layer(cache, index, patched.geometry, patched.splice)
    if type(before) not in _RETAINED:
        raise UnsupportedError(
            f"Retention cannot drop rows from cache layer {index}, a {type(before).__name__} of "
            f"{type(cache).__name__}: it needs one that grows. Pass a DynamicCache, or nothing."
        )
    if plan.scored and before.get_seq_length():
        raise CacheMismatchError(
            f"Cache layer {index} holds {before.get_seq_length()} tokens already, and what has attended to them is not "
            'known. Begin with an empty cache inside the context of retention, or use policy="window".'
        )
    layer: RetainedLayerMixin = object.__new__(_RETAINED[type(before)])
    for name, value in vars(copy.copy(before)).items():
        setattr(layer, name, value)
    layer.begin_retention()
    layer.retention = plan.identity
    cache.layers[index] = layer
    return layer


def _forget_turns(cache: Cache) -> None:
    """Let the tables of how keys were rotated forget the tokens of which no layer has a row."""
    layers: list[Any] = [layer for layer in cache.layers if isinstance(layer, SplicedLayerMixin)]
    tables = {id(layer.table): layer.table for layer in layers if isinstance(layer.table, TurnTable)}
    for table in tables.values():
        own = [layer for layer in layers if layer.table is table and layer.is_initialized]
        slots = {id(layer.values): layer.values for layer in own}
        now = table.compacted(list(slots.values()))
        if now is None:
            continue
        moved = {key: now.to(held.device)[held.long()] for key, held in slots.items()}
        for layer in own:
            layer.replace_slots(moved[id(layer.values)])
