"""What a patched attention module does: the hook before its forward, its `expand_kv`, and the attention function.

Three places in the forward of an MLA module can be reached without rewriting it: just before it (a hook, where the
cache and the mask are seen), `expand_kv` (an attribute of the instance), and the attention function (looked up by
name). All functions here are module-level, so that patched models can be copied and pickled.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvsplice_hf.absorbed import absorbed_attention
from kvsplice_hf.cache import CompressedLatent, RowGeometry, SplicedLayerMixin, splice_cache_layer
from kvsplice_hf.errors import CacheMismatchError, FoldingError, UnsupportedError
from kvsplice_hf.offload import read_parameter
from kvsplice_hf.paged import PagedLatent, paged_rows
from kvsplice_hf.projection import LearnedKVSplice
from kvsplice_hf.sinks import exact_in_full_sequence


# Attention functions that the absorbed one can stand in for; others (flash, flex) keep the expanded path.
WRAPPED_ATTENTION = ("eager", "sdpa")
_NAME_PREFIX = "kvsplice_"
SITE_ATTRIBUTE = "_kvsplice_site"


class PatchedSite:
    """State of one patched attention module, kept on it as a plain attribute.

    Args:
        owner: the attention module whose latent this one reads: itself, unless it reuses an earlier layer's.
        stores_latent: whether the module writes to the cache.
        geometry: sizes of the rows.
        num_heads: H.
        mode: "auto", "absorbed" or "expanded".
    """

    def __init__(self, owner: Any, stores_latent: bool, geometry: RowGeometry, num_heads: int, mode: str) -> None:
        self.owner = owner
        self.stores_latent = stores_latent
        self.geometry = geometry
        self.num_heads = num_heads
        self.mode = mode
        self.hook: RemovableHandle | None = None
        # Told of each round trip without a cache, latent and decoded latent, while somebody listens.
        self.on_round_trip: Callable[[torch.Tensor, torch.Tensor], None] | None = None
        # False while `splice_disabled` lets the model run as if it were not patched.
        self.enabled = True
        # Mask of the call that is running. The module's hook sets it right before the forward that reads it, also when
        # gradient checkpointing runs the forward again, so it cannot be another call's.
        self.attention_mask: torch.Tensor | None = None

    @property
    def splice(self) -> LearnedKVSplice:
        return self.owner.kvsplice

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "attention_mask": None, "on_round_trip": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        # A model that was pickled whole may come back in a process that has never patched one.
        register_attention()


def register_attention() -> None:
    """Make our attention functions, and the masks they need, known to transformers under names of ours."""
    for base in WRAPPED_ATTENTION:
        name = _NAME_PREFIX + base
        if name in ALL_ATTENTION_FUNCTIONS:
            continue
        AttentionInterface.register(name, functools.partial(_kvsplice_attention, base=base))
        # Without a mask of the same name a module gets no mask at all, and no error.
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])


def wrapped_name(base: str) -> str | None:
    """Our name for the attention function `base`, or None where we have none."""
    if base.startswith(_NAME_PREFIX):  # the settings come from a model that is patched
        return base
    return _NAME_PREFIX + base if base in WRAPPED_ATTENTION else None


def bind_cache_and_mask(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook of a patched attention module: splice its cache layer, and note the mask.

    Returns:
        Other arguments for the forward in continuous batching, where the cache does not come as `past_key_values`.

    Raises:
        CacheMismatchError: the cache cannot hold spliced rows.
    """
    site: PatchedSite = getattr(module, SITE_ATTRIBUTE)
    site.attention_mask = kwargs.get("attention_mask")
    rows = paged_rows(kwargs) if site.enabled else None
    if rows is not None:
        return args, {**kwargs, "past_key_values": rows}
    cache = kwargs.get("past_key_values")
    if cache is None or not site.stores_latent:
        return None
    if not site.enabled:
        _require_stock_layer(cache, module.layer_idx)
        return None
    if _is_training(site, cache, module.layer_idx):
        return args, {**kwargs, "past_key_values": None}
    if not isinstance(cache, Cache):
        raise CacheMismatchError(
            f"The patched model got a cache of type {type(cache).__name__}; it needs a transformers `Cache`: pass "
            "nothing, a DynamicCache, a StaticCache, or KVSpliceCache(model)."
        )
    layer = splice_cache_layer(cache, module.layer_idx, site.geometry, site.splice)
    layer.attention_mask = site.attention_mask
    return None


def _is_training(site: PatchedSite, cache: Any, layer_idx: int) -> bool:
    """Whether an empty cache has been made for nothing: stored rows have no gradient, and training reads none again."""
    if not torch.is_grad_enabled() or not isinstance(cache, Cache) or cache.get_seq_length(layer_idx):
        return False
    return site.owner.training and any(parameter.requires_grad for parameter in site.splice.parameters())


def _require_stock_layer(cache: Any, layer_idx: int) -> None:
    layers = cache.layers if isinstance(cache, Cache) else []
    if layer_idx < len(layers) and isinstance(layers[layer_idx], SplicedLayerMixin):
        raise CacheMismatchError(
            f"Cache layer {layer_idx} is spliced, but the model runs with the splice disabled. Give it a cache of "
            "its own: pass nothing, or DynamicCache(config=model.config)."
        )


def expand_spliced_kv(self: Any, kv_nope: torch.Tensor | CompressedLatent | PagedLatent, k_rot: Any) -> tuple[Any, Any]:
    """`expand_kv` of a patched attention module.

    Given rows from a cache, decode them, or pass them on for absorbed attention. Given a plain latent (no cache:
    training, perplexity), encode and decode it, so that the numbers are the same with and without a cache.
    """
    site: PatchedSite = getattr(self, SITE_ATTRIBUTE)
    if isinstance(kv_nope, PagedLatent):  # taken apart in the attention function, which comes back here
        return kv_nope, kv_nope
    if not site.enabled:
        latent = kv_nope
    elif isinstance(kv_nope, CompressedLatent):
        if _attend_absorbed(self, site, kv_nope):
            return kv_nope, kv_nope
        latent, k_rot = kv_nope.latent(), kv_nope.k_rot
    else:
        latent, k_rot = _round_trip(site, kv_nope, k_rot)
    return type(self).expand_kv(self, latent, k_rot)


def _round_trip(site: PatchedSite, latent: torch.Tensor, k_rot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    decoded, rotated = site.splice.round_trip(latent, k_rot)
    if site.on_round_trip is not None:
        site.on_round_trip(latent, decoded)
    if site.geometry.sink_tokens == 0:
        return decoded, rotated
    count, tokens = site.geometry.sink_tokens, latent.shape[2]
    exact = exact_in_full_sequence(site.attention_mask, tokens, count, latent.device)[:, None, :, None]
    return torch.where(exact, latent, decoded), torch.where(exact.to(k_rot.device), k_rot, rotated)


def foldable_weight(module: Any) -> torch.Tensor | None:
    """The weight of a plain linear layer, or None where it is not what the layer multiplies by.

    Packed (bitsandbytes, fp8) and adapted (LoRA) layers have a forward of their own, sharded ones a tensor type of
    their own.
    """
    weight: Any = getattr(module, "weight", None)
    plain = type(module).forward is nn.Linear.forward and type(weight) in (nn.Parameter, torch.Tensor)
    return read_parameter(module, "weight") if plain and weight.is_floating_point() else None


def _attend_absorbed(module: Any, site: PatchedSite, latent: CompressedLatent) -> bool:
    """Whether this call runs on the codes.

    Raises:
        FoldingError: absorbed attention was asked for and `kv_b_proj` cannot be folded.
        UnsupportedError: it was asked for, and the attention function was changed after patching.
    """
    ours = (module.config._attn_implementation or "").startswith(_NAME_PREFIX)
    if site.mode == "expanded" or (site.mode == "auto" and not (ours and _absorbed_is_cheaper(module, site, latent))):
        return False
    foldable = foldable_weight(module.kv_b_proj) is not None
    if site.mode == "absorbed" and not ours:
        raise UnsupportedError(
            f'attention="absorbed" needs the attention function set by the patch, but it is now '
            f"{module.config._attn_implementation!r}. Unpatch, set it to one of {WRAPPED_ATTENTION}, and patch again."
        )
    if site.mode == "absorbed" and not foldable:
        raise FoldingError(unfoldable_message(module.kv_b_proj))
    return foldable


def unfoldable_message(kv_b_proj: nn.Module) -> str:
    """Why `kv_b_proj` cannot be folded, and what to do."""
    return (
        f'attention="absorbed" folds the weight of kv_b_proj, but it is a {type(kv_b_proj).__name__} (packed, adapted '
        'or sharded), not a plain linear layer. Use attention="auto" or "expanded", merge the adapter, or leave '
        "kv_b_proj out of the quantisation."
    )


def _absorbed_is_cheaper(module: Any, site: PatchedSite, latent: CompressedLatent) -> bool:
    """Compare multiplications of the two ways for T queries over S rows.

    Expanded: decode S latents, expand them, attend with head sizes N + P and V. Absorbed: take T queries and outputs
    through the latent, attend with head sizes r + P and r, shared by all heads.
    """
    R, r = latent.splice.latent_dim, latent.splice.rank
    N, P, V = module.qk_nope_head_dim, module.qk_rope_head_dim, module.v_head_dim
    H, T, S = site.num_heads, latent.new_tokens, latent.rows.shape[2]
    expanded = S * R * (r + H * (N + V)) + T * S * H * (N + P + V)
    absorbed = T * H * R * (N + V + 2 * r) + T * S * H * (2 * r + P)
    return absorbed < expanded


def _kvsplice_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor | CompressedLatent | PagedLatent,
    value: torch.Tensor | CompressedLatent | PagedLatent,
    attention_mask: torch.Tensor | None,
    *,
    base: str,
    scaling: float,
    dropout: float = 0.0,
    indices: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention function registered under our names: absorbed on codes, `base` on keys and values.

    Sparse-attention modules hand over the indices of the selected rows instead of a mask when the name of the attention
    function is not one they know.
    """
    if isinstance(key, PagedLatent):
        settings = {name: kwargs[name] for name in ("s_aux",) if name in kwargs}
        attend = functools.partial(_kvsplice_attention, base=base, scaling=scaling, dropout=dropout, **settings)
        return key.attend(module, query, attend)
    if isinstance(key, CompressedLatent):
        weight = foldable_weight(module.kv_b_proj)
        if weight is None:
            raise FoldingError(unfoldable_message(module.kv_b_proj))
        return absorbed_attention(
            query,
            key,
            weight,
            module.v_head_dim,
            attention_mask,
            scaling,
            dropout=dropout,
            sliding_window=kwargs.get("sliding_window"),
            indices=indices,
            learned_sinks=kwargs.get("s_aux"),
            return_weights=base == "eager",
        )
    assert isinstance(value, torch.Tensor)
    return attend_expanded(
        module,
        query,
        key,
        value,
        attention_mask,
        base=base,
        scaling=scaling,
        dropout=dropout,
        indices=indices,
        **kwargs,
    )


def attend_expanded(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    base: str,
    scaling: float,
    dropout: float = 0.0,
    indices: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention function `base` of transformers, under a name that the module does not know."""
    if indices is not None:
        attention_mask = _mask_unselected(attention_mask, indices, key.shape[2], query.dtype)
    attend = _sdpa if base == "sdpa" else _eager_of(module.__class__)
    return attend(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def _sdpa(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """SDPA of transformers, on a CPU with heads of one size.

    PyTorch's fused attention for CPUs wants keys and values of the same size, which those of MLA are not. What it does
    instead holds the scores of all pairs of tokens, and takes several times as long. Zeros behind the shorter ones
    change nothing: they add nothing to a score, and what they make of the output is cut off.
    """
    attend, value_dim = ALL_ATTENTION_FUNCTIONS["sdpa"], value.shape[-1]
    missing = key.shape[-1] - value_dim
    site: PatchedSite | None = getattr(module, SITE_ATTRIBUTE, None)
    as_stock = site is None or not site.enabled  # to the last bit
    if as_stock or missing == 0 or query.device.type != "cpu" or query.shape[2] == 1:
        return attend(module, query, key, value, mask, **kwargs)
    query, key = (F.pad(states, (0, max(-missing, 0))) for states in (query, key))
    output, _ = attend(module, query, key, F.pad(value, (0, max(missing, 0))), mask, **kwargs)
    return output[..., :value_dim], None


def _mask_unselected(mask: torch.Tensor | None, indices: torch.Tensor, keys: int, dtype: torch.dtype) -> torch.Tensor:
    """Fold the indices [B, T, k] of selected rows into the mask [B, 1, T, S], as eager and SDPA modules do."""
    selected = torch.zeros(*indices.shape[:2], keys, dtype=torch.bool, device=indices.device)
    selected = selected.scatter_(-1, indices.long(), True)[:, None]
    if mask is None:
        return selected
    if mask.dtype == torch.bool:
        return mask & selected
    return mask.masked_fill(~selected, torch.finfo(dtype).min)


@functools.cache
def _eager_of(attention_class: Any) -> Callable[..., Any]:
    """The eager attention function of the file that defines the module: there is one "eager" per file."""
    for parent in attention_class.__mro__:
        function = getattr(sys.modules[parent.__module__], "eager_attention_forward", None)
        if function is not None:
            return function
    raise UnsupportedError(
        f"{attention_class.__module__} defines no `eager_attention_forward`. Load the model with "
        'attn_implementation="sdpa" before patching.'
    )
