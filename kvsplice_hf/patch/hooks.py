"""What runs around the forward of a patched attention module: the cache is spliced before, and checked after.

Three places in the forward of an MLA module can be reached without rewriting it: just before it (a hook, where the
cache and the mask are seen), `expand_kv` (an attribute of the instance, `expansion`), and the attention function
(looked up by name, `attention`). A fourth, just after it, only checks that the second was reached. All functions are
module-level, so that patched models can be copied and pickled, and what belongs to a call is not kept on a module
(`kvsplice_hf.call`).
"""

from typing import Any

import torch
from transformers.cache_utils import Cache

from kvsplice_hf import upstream
from kvsplice_hf.cache.layers import see_turns, splice_cache_layer
from kvsplice_hf.cache.pages import ROWS_ATTRIBUTE, paged_rows
from kvsplice_hf.cache.splicing import SplicedLayerMixin
from kvsplice_hf.call import (
    STATE_ARGUMENT,
    Call,
    current_state,
    enter_call,
    leave_call,
    note_batch,
    note_expansion,
    runs_batch,
)
from kvsplice_hf.code.keys import one_rotation
from kvsplice_hf.errors import CacheMismatchError, UnsupportedError
from kvsplice_hf.patch.alone import decoding_cache
from kvsplice_hf.patch.site_patch import PATCH_ATTRIBUTE, SitePatch, title_of


_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def carry_state(patch: Any, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of a decoder with patched layers: hand them its state where gradient checkpointing is on."""
    if not decoder.training or not torch.is_grad_enabled() or STATE_ARGUMENT in kwargs:
        return None
    if not any(getattr(module, "gradient_checkpointing", False) for module in decoder.modules()):
        return None
    return args, {**kwargs, STATE_ARGUMENT: current_state(patch)}


def see_batch(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the outermost model: whether its attention modules have to get pages."""
    note_batch("read_index" in kwargs)


def enter_attention(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Arguments | None:
    """Forward pre-hook of a patched attention module: splice its cache layer, and note what belongs to the call.

    Returns:
        Other arguments for the forward where that is necessary: in continuous batching, and under gradient
        checkpointing.

    Raises:
        CacheMismatchError: the cache cannot hold spliced rows.
        UnsupportedError: pages came without a word on which tokens are whose.
    """
    patched: SitePatch = getattr(module, PATCH_ATTRIBUTE)
    carried = STATE_ARGUMENT in kwargs
    state = kwargs[STATE_ARGUMENT] if carried else current_state(patched.patch)
    if carried:
        kwargs = {name: value for name, value in kwargs.items() if name != STATE_ARGUMENT}
    mask = patched.arguments.get("attention_mask", args, kwargs)
    hidden_states = patched.arguments.get("hidden_states", args, kwargs)
    new_tokens = None if hidden_states is None else hidden_states.shape[1]
    embeddings = one_rotation(patched.arguments.get(upstream.POSITION_EMBEDDINGS, args, kwargs))
    rows = paged_rows(args, kwargs) if state.enabled else None
    if rows is not None:
        if patched.stores_latent and patched.geometry.coded_keys:
            rows.see_turns(embeddings, module.layer_idx)
        enter_call(Call(module, state, None, new_tokens, reads_cache=True))
        return upstream.with_cache(patched.arguments, rows, args, kwargs)
    cache = upstream.find_cache(args, kwargs)
    if cache is None:
        _require_no_other_cache(patched, upstream.other_cache(patched.arguments, args, kwargs))
    elif not state.enabled:
        _require_stock_layer(cache, module.layer_idx)
    elif patched.stores_latent:
        layer = splice_cache_layer(cache, module.layer_idx, patched.geometry, patched.splice)
        layer.announced, layer.attention_mask = True, mask
        if patched.geometry.coded_keys:
            position_ids = patched.arguments.get(upstream.POSITION_IDS, args, kwargs)
            see_turns(cache, layer, embeddings, position_ids)
    enter_call(Call(module, state, mask, new_tokens, reads_cache=cache is not None, embeddings=embeddings))
    if patched.by_itself:
        if state.enabled:
            return upstream.with_cache(patched.arguments, decoding_cache(module, patched, cache), args, kwargs)
        note_expansion()  # nothing is to be seen of the call
    return (args, kwargs) if carried else None


def leave_attention(module: Any, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook of a patched attention module: codes that were stored must have been read.

    Raises:
        UpstreamChangedError: the forward did without `expand_kv`, or of ordinary attention without our function.
    """
    if not leave_call(module):
        patched: SitePatch = getattr(module, PATCH_ATTRIBUTE)
        missing = "the attention function under its name in the config" if patched.geometry.heads else "`expand_kv`"
        if patched.by_itself:
            missing = "`update` of the cache"
        raise upstream.changed(title_of(module), f"its forward ended without a call of {missing}.")


def _require_no_other_cache(patched: SitePatch, cache: Any) -> None:
    if hasattr(cache, ROWS_ATTRIBUTE) or runs_batch():
        raise UnsupportedError(
            f"Continuous batching (generate_batch) cannot run on this model: {patched.name} did not get the pages and "
            "which tokens belong to which request (`read_index`), because the layers around it do not hand both on. "
            "Use model.generate with a padded batch instead."
        )
    if cache is not None:
        raise CacheMismatchError(
            f"The patched module {patched.name} got a cache of type {type(cache).__name__}; it needs a transformers "
            "`Cache`: pass nothing, a DynamicCache, a StaticCache, or KVSpliceCache(model)."
        )


def _require_stock_layer(cache: Cache, layer_idx: int) -> None:
    if layer_idx < len(cache.layers) and isinstance(cache.layers[layer_idx], SplicedLayerMixin):
        raise CacheMismatchError(
            f"Cache layer {layer_idx} is spliced, but the model runs with the splice disabled. Give it a cache of "
            "its own: pass nothing, or DynamicCache(config=model.config)."
        )
