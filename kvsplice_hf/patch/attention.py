"""What a patched attention module does: the hook before its forward, its `expand_kv`, and the attention function.

Three places in the forward of an MLA module can be reached without rewriting it: just before it (a hook, where the
cache and the mask are seen), `expand_kv` (an attribute of the instance), and the attention function (looked up by
name). A fourth, just after it, only checks that the second was reached. All functions here are module-level, so that
patched models can be copied and pickled, and what belongs to a call is not kept on a module (`call`).
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache

from kvsplice_hf import upstream
from kvsplice_hf.cache.exact import exact_in_full_sequence
from kvsplice_hf.cache.layers import CompressedLatent, RowGeometry, SplicedLayerMixin, splice_cache_layer
from kvsplice_hf.cache.pages import PagedLatent, paged_rows
from kvsplice_hf.call import (
    STATE_ARGUMENT,
    Call,
    current_state,
    enter_call,
    leave_call,
    note_expansion,
    running_call,
)
from kvsplice_hf.code.projection import LearnedKVSplice
from kvsplice_hf.errors import CacheMismatchError, FoldingError, UnsupportedError
from kvsplice_hf.patch.absorbed import absorbed_attention
from kvsplice_hf.weights.offload import read_parameter


# Attention functions that the absorbed one can stand in for; others (flash, flex) keep the expanded path.
WRAPPED_ATTENTION = ("eager", "sdpa")
_NAME_PREFIX = "kvsplice_"
SITE_ATTRIBUTE = "_kvsplice_site"


class AttentionName(str):
    """Our name for the attention function `base`, as the settings of a patched model hold it.

    Settings are copied to where nobody has made our name known: for another model, or pickled for another process. What
    arrives there is the name of the function that ours stands in for. With the model itself our name is copied as well:
    `PatchedSite` sees to that.
    """

    base: str

    def __new__(cls, base: str) -> "AttentionName":
        name = super().__new__(cls, _NAME_PREFIX + base)
        name.base = base
        return name

    def __reduce__(self) -> tuple[type[str], tuple[str]]:  # for `pickle` and `copy`
        return str, (self.base,)


class PatchedSite:
    """What the patch knows of one attention module, kept on it as a plain attribute. Nothing of it belongs to a call.

    Args:
        name: path of the module in the model that was patched, for messages.
        patch: the patch that it belongs to, a `ModelPatch`; the same one for all modules of a model.
        owner: the attention module whose latent this one reads: itself, unless it reuses an earlier layer's.
        stores_latent: whether the module writes to the cache.
        geometry: sizes of the rows.
        num_heads: H.
        mode: "auto", "absorbed" or "expanded".
        arguments: how its forward takes its arguments.
        attention_before: name of the attention function that the patch has put another one in the place of, or None.
        settings: those of the module, where the name in them is ours, or None.
    """

    def __init__(
        self,
        name: str,
        patch: Any,
        owner: Any,
        stores_latent: bool,
        geometry: RowGeometry,
        num_heads: int,
        mode: str,
        arguments: upstream.ForwardArguments,
        attention_before: str | None,
        settings: Any,
    ) -> None:
        self.name = name
        self.patch = patch
        self.owner = owner
        self.stores_latent = stores_latent
        self.geometry = geometry
        self.num_heads = num_heads
        self.mode = mode
        self.arguments = arguments
        self.attention_before = attention_before
        self.settings = settings
        self.hooks: list[RemovableHandle] = []

    @property
    def splice(self) -> LearnedKVSplice:
        return self.owner.kvsplice

    def __getstate__(self) -> dict[str, Any]:
        name = None if self.settings is None else self.settings._attn_implementation
        return {**vars(self), "named": name.base if isinstance(name, AttentionName) else None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A model that was pickled whole may come back in a process that has never patched one.
        register_attention()
        named = state.pop("named", None)
        vars(self).update(state)
        if named is not None:  # copied settings do not know what they were copied with
            self.settings._attn_implementation_internal = AttentionName(named)


def register_attention() -> None:
    """Make our attention functions, and the masks they need, known to transformers under names of ours."""
    for base in WRAPPED_ATTENTION:
        function = functools.partial(_kvsplice_attention, base=base)
        upstream.register_attention_function(_NAME_PREFIX + base, function, base)


def wrapped_name(base: str) -> AttentionName | None:
    """Our name for the attention function `base`, or None where we have none."""
    if isinstance(base, AttentionName):  # the settings are shared with a model that is patched
        return base
    base = base.removeprefix(_NAME_PREFIX)
    return AttentionName(base) if base in WRAPPED_ATTENTION else None


_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def carry_state(patch: Any, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of a decoder with patched layers: hand them its state where gradient checkpointing is on."""
    if not decoder.training or not torch.is_grad_enabled() or STATE_ARGUMENT in kwargs:
        return None
    if not any(getattr(module, "gradient_checkpointing", False) for module in decoder.modules()):
        return None
    return args, {**kwargs, STATE_ARGUMENT: current_state(patch)}


def enter_attention(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Arguments | None:
    """Forward pre-hook of a patched attention module: splice its cache layer, and note what belongs to the call.

    Returns:
        Other arguments for the forward where that is necessary: in continuous batching, and under gradient
        checkpointing.

    Raises:
        CacheMismatchError: the cache cannot hold spliced rows.
    """
    site: PatchedSite = getattr(module, SITE_ATTRIBUTE)
    carried = STATE_ARGUMENT in kwargs
    state = kwargs[STATE_ARGUMENT] if carried else current_state(site.patch)
    if carried:
        kwargs = {name: value for name, value in kwargs.items() if name != STATE_ARGUMENT}
    mask = site.arguments.get("attention_mask", args, kwargs)
    hidden_states = site.arguments.get("hidden_states", args, kwargs)
    new_tokens = None if hidden_states is None else hidden_states.shape[1]
    rows = paged_rows(kwargs) if state.enabled else None
    if rows is not None:
        enter_call(Call(module, state, None, new_tokens, reads_cache=True))
        return upstream.with_cache(site.arguments, rows, args, kwargs)
    cache = upstream.find_cache(args, kwargs)
    if cache is None:
        _require_no_other_cache(site, upstream.other_cache(site.arguments, args, kwargs))
    elif not state.enabled:
        _require_stock_layer(cache, module.layer_idx)
    elif site.stores_latent:
        layer = splice_cache_layer(cache, module.layer_idx, site.geometry, site.splice)
        layer.attention_mask = mask
    enter_call(Call(module, state, mask, new_tokens, reads_cache=cache is not None))
    return (args, kwargs) if carried else None


def leave_attention(module: Any, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook of a patched attention module: codes that were stored must have been read.

    Raises:
        UpstreamChangedError: the forward did without `expand_kv`.
    """
    if not leave_call(module):
        raise upstream.changed(_title(module), "its forward ended without a call of `expand_kv`.")


def _title(module: Any) -> str:
    return f"{getattr(module, SITE_ATTRIBUTE).name} ({type(module).__name__})"


def _require_no_other_cache(site: PatchedSite, cache: Any) -> None:
    if cache is not None:
        raise CacheMismatchError(
            f"The patched module {site.name} got a cache of type {type(cache).__name__}; it needs a transformers "
            "`Cache`: pass nothing, a DynamicCache, a StaticCache, or KVSpliceCache(model)."
        )


def _require_stock_layer(cache: Cache, layer_idx: int) -> None:
    if layer_idx < len(cache.layers) and isinstance(cache.layers[layer_idx], SplicedLayerMixin):
        raise CacheMismatchError(
            f"Cache layer {layer_idx} is spliced, but the model runs with the splice disabled. Give it a cache of "
            "its own: pass nothing, or DynamicCache(config=model.config)."
        )


def expand_spliced_kv(self: Any, kv_nope: torch.Tensor | CompressedLatent | PagedLatent, k_rot: Any) -> tuple[Any, Any]:
    """`expand_kv` of a patched attention module.

    Given rows from a cache, decode them, or pass them on for absorbed attention. Given a plain latent (no cache:
    training, perplexity), encode and decode it, so that the numbers are the same with and without a cache.

    Raises:
        UpstreamChangedError: a plain latent came where rows should have come, or past the hook before the forward.
    """
    site: PatchedSite = getattr(self, SITE_ATTRIBUTE)
    note_expansion()
    if isinstance(kv_nope, PagedLatent):  # taken apart in the attention function, which comes back here
        return kv_nope, kv_nope
    if isinstance(kv_nope, CompressedLatent):
        if not _needs_round_trip(self, kv_nope) and _attend_absorbed(self, site, kv_nope):
            return kv_nope, kv_nope
        latent, k_rot = _decoded(self, site, kv_nope)
    else:
        call = _call_without_cache(self, kv_nope)
        latent = kv_nope
        if call.state.enabled:
            latent, k_rot = _round_trip(self, site, call, kv_nope, k_rot)
    return type(self).expand_kv(self, latent, k_rot)


def _call_without_cache(module: Any, latent: torch.Tensor) -> Call:
    """The running call, which has handed a plain latent [B, 1, T, R] to `expand_kv`, and may do so."""
    call = running_call(module)
    if call is None:
        raise upstream.changed(
            _title(module),
            "`expand_kv` was reached past the hook before the forward of the module, which sees the cache. Call the "
            "module itself, not its `forward`.",
        )
    if not call.state.enabled:
        return call
    if call.reads_cache:
        raise upstream.changed(
            _title(module), "it got a cache with codes, but handed a plain latent to `expand_kv` instead of them."
        )
    if call.new_tokens is not None and latent.shape[2] != call.new_tokens:
        raise upstream.changed(
            _title(module),
            f"{latent.shape[2]} plain latents reached `expand_kv` in a call with {call.new_tokens} new tokens and no "
            "cache among its arguments: the past lies in a cache that the patch did not see.",
        )
    return call


def _needs_round_trip(module: Any, rows: CompressedLatent) -> bool:
    """Whether the new tokens have to be decoded: packed rows have no gradients, and somebody may want to see them."""
    call = running_call(module)
    listened = call is not None and call.state.on_round_trip is not None
    return rows.fresh is not None and (rows.is_packed or listened)


def _decoded(module: Any, site: PatchedSite, rows: CompressedLatent) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents [B, 1, S, R] and rotated keys [B, 1, S, P] of all rows.

    Where gradients are wanted, those of the new tokens go through the same round trip as without a cache: rows that are
    packed have none.
    """
    if rows.fresh is None:
        return rows.latent(), rows.k_rot
    call = running_call(module)
    fresh = site.splice.round_trip(*rows.fresh)
    if call is not None and call.state.on_round_trip is not None:
        call.state.on_round_trip(module, rows.fresh[0], fresh[0])
    return rows.with_new(*fresh)


def _round_trip(
    module: Any, site: PatchedSite, call: Call, latent: torch.Tensor, k_rot: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    decoded, rotated = site.splice.round_trip(latent, k_rot)
    if call.state.on_round_trip is not None:
        call.state.on_round_trip(module, latent, decoded)
    if site.geometry.sink_tokens == 0:
        return decoded, rotated
    count, tokens = site.geometry.sink_tokens, latent.shape[2]
    exact = exact_in_full_sequence(call.mask, tokens, count, latent.device)[:, None, :, None]
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
    refused = absorbed_refusal(module, site, latent.new_tokens, latent.rows.shape[2])
    if refused is not None and site.mode == "absorbed":
        if not _is_ours(module):
            raise UnsupportedError(
                f'attention="absorbed" needs the attention function set by the patch, but it is now '
                f"{module.config._attn_implementation!r}. Unpatch, set it to one of {WRAPPED_ATTENTION}, and patch "
                "again."
            )
        raise FoldingError(unfoldable_message(module.kv_b_proj))
    return refused is None


def absorbed_refusal(module: Any, site: PatchedSite, new_tokens: int, stored: int) -> str | None:
    """Why a call of T new tokens on S stored ones does not run on the codes, or None where it does."""
    if site.mode == "expanded":
        return 'attention="expanded" was asked for'
    if not _is_ours(module):
        return (
            f"the attention function is {module.config._attn_implementation!r}, which reads keys and values only: load "
            'the model with attn_implementation="sdpa"'
        )
    if site.mode == "auto" and not _absorbed_is_cheaper(module, site, new_tokens, stored):
        return f"for {new_tokens} new tokens on {stored} expanding takes fewer products"
    if foldable_weight(module.kv_b_proj) is None:
        kind = type(module.kv_b_proj).__name__
        return f"kv_b_proj is a {kind} (packed, adapted or sharded), which cannot be folded"
    return None


def _is_ours(module: Any) -> bool:
    return (module.config._attn_implementation or "").startswith(_NAME_PREFIX)


def unfoldable_message(kv_b_proj: nn.Module) -> str:
    """Why `kv_b_proj` cannot be folded, and what to do."""
    return (
        f'attention="absorbed" folds the weight of kv_b_proj, but it is a {type(kv_b_proj).__name__} (packed, adapted '
        'or sharded), not a plain linear layer. Use attention="auto" or "expanded", merge the adapter, or leave '
        "kv_b_proj out of the quantisation."
    )


def _absorbed_is_cheaper(module: Any, site: PatchedSite, new_tokens: int, stored: int) -> bool:
    """Compare multiplications of the two ways for T queries over S rows.

    Expanded: decode S latents, expand them, attend with head sizes N + P and V. Absorbed: take T queries and outputs
    through the latent, attend with head sizes r + P and r, shared by all heads.
    """
    R, r = site.geometry.kv_lora_rank, site.geometry.rank
    N, P, V = module.qk_nope_head_dim, module.qk_rope_head_dim, module.v_head_dim
    H, T, S = site.num_heads, new_tokens, stored
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
    attend, value_dim = upstream.attention_function("sdpa"), value.shape[-1]
    missing = key.shape[-1] - value_dim
    call = running_call(module)
    as_stock = call is None or not call.state.enabled  # to the last bit
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
