"""Puts splices on a model, and takes them off again: everything that changes a model.

What can fail on account of the caller is checked first (`sites_to_patch`), so that a model is changed wholly or not at
all.
"""

import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import nn

from kvsplice_hf import upstream
from kvsplice_hf.code.codecs import codec_class
from kvsplice_hf.config import KVSpliceConfig
from kvsplice_hf.errors import ConfigError, PatchStateError, UnsupportedError
from kvsplice_hf.patch.alone import computes_alone
from kvsplice_hf.patch.attention import register_attention
from kvsplice_hf.patch.families import AttentionSite
from kvsplice_hf.patch.folding import require_foldable
from kvsplice_hf.patch.hooks import enter_attention, leave_attention
from kvsplice_hf.patch.names import WRAPPED_ATTENTION, wrapped_name
from kvsplice_hf.patch.site_patch import PATCH_ATTRIBUTE, SitePatch
from kvsplice_hf.patch.sites import find_sites, require_family
from kvsplice_hf.patch.state import ModelPatch, find_patch, is_patched
from kvsplice_hf.patch.surroundings import change_surroundings, restore_surroundings
from kvsplice_hf.weights.packed import decompress


logger = logging.getLogger(__name__)

ModelT = TypeVar("ModelT", bound=nn.Module)


def sites_to_patch(model: nn.Module, config: KVSpliceConfig) -> list[AttentionSite]:
    """The layers that the settings choose, after all checks that need no splice.

    Raises:
        NotMLAError: no layer that can be patched was found, or `layer_pattern` names none.
        TransformersTooOldError: the installed transformers does not cache latents for this model.
        UpstreamChangedError: the installed transformers runs this model in a way that this package does not know.
        PatchStateError: the model is already patched.
        ConfigError: a setting does not fit the model.
        FoldingError: `attention="absorbed"` and a `kv_b_proj` that cannot be folded.
        UnsupportedError: an attention function that cannot be stood in for, with `attention="absorbed"` or ordinary
            attention.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"`model` is a {type(model).__name__}; it must be a loaded model.")
    if is_patched(model):
        raise PatchStateError(
            "The model is already patched with KVSplice. For other settings, call unpatch_model(model) first."
        )
    upstream.warn_if_newer_than_tested()
    decompress(model)
    sites = _select_sites(find_sites(model, config.layer_pattern), config)
    _require_packed(sites, config)
    for site in sites:
        _read_forward(site, config)
    _check_attention(sites, config)
    return sites


def _require_packed(sites: list[AttentionSite], config: KVSpliceConfig) -> None:
    ordinary = next((site for site in sites if site.kv_heads), None)
    if ordinary is not None and not config.is_packed and config.transform != "spline":
        raise ConfigError(
            f"`compression_ratio` and `rank` are for layers that store a latent, and {ordinary.name} "
            f"({type(ordinary.module).__name__}) has ordinary attention. Give `bytes_per_token`, `bits` or "
            "`compression`, or no budget for a quarter of the stock bytes."
        )
    latent = next((site for site in sites if not site.kv_heads), None)
    if latent is not None and config.values != "coded":
        raise ConfigError(
            f"`values` is {config.values!r}; {latent.name} ({type(latent.module).__name__}) stores a latent, from "
            'which both keys and values are made. Leave `values` out; `keys="exact"` keeps its rotated keys.'
        )
    if ordinary is not None and not codec_class(config.row_codec).fitted_together:
        raise ConfigError(
            f"`codec` is {config.codec!r}; {ordinary.name} ({type(ordinary.module).__name__}) has ordinary attention, "
            "whose rows are packed by the codecs of this package."
        )


def _read_forward(site: AttentionSite, config: KVSpliceConfig) -> upstream.ForwardArguments:
    by_name = (config.attention != "expanded" or site.kv_heads > 0) and not computes_alone(type(site.module))
    return upstream.read_forward(site.name, site.module, by_name, expands=not site.kv_heads)


def _select_sites(sites: list[AttentionSite], config: KVSpliceConfig) -> list[AttentionSite]:
    """The sites to patch: those chosen by `layers`, and those that expand a chosen one's latent."""
    chosen = config.select_layers(tuple(site.layer_idx for site in sites if site.stores_latent))
    return [site for site in sites if (site.source or site).layer_idx in chosen]


def _check_attention(sites: list[AttentionSite], config: KVSpliceConfig) -> None:
    for site in sites:
        base = site.module.config._attn_implementation
        absorbable = wrapped_name(base) is not None
        if computes_alone(type(site.module)):
            if config.attention == "absorbed":
                raise UnsupportedError(
                    f'attention="absorbed" needs an attention function that can be stood in for, and {site.name} '
                    f'({type(site.module).__name__}) computes attention by itself. Use attention="auto".'
                )
            continue
        if site.kv_heads and not absorbable:
            raise UnsupportedError(
                f"{site.name} uses the attention function {base!r}, which the patch cannot stand in for. Load the "
                f"model with attn_implementation set to one of {WRAPPED_ATTENTION}."
            )
        if config.attention == "absorbed" and not absorbable:
            raise UnsupportedError(
                f'attention="absorbed" cannot stand in for the attention function {base!r} of {site.name}. Load the '
                f'model with attn_implementation set to one of {WRAPPED_ATTENTION}, or use attention="expanded".'
            )
        if config.attention == "absorbed" and not site.kv_heads:
            require_foldable(site.name, site.module, config, site.num_heads, site.kv_lora_rank, site.dtype)
    base = sites[0].module.config._attn_implementation
    alone = computes_alone(type(sites[0].module))
    if config.attention == "auto" and wrapped_name(base) is None and not alone:
        logger.warning(
            "The model uses the attention function %r, which only the expanded path can feed: the cache is compressed, "
            'but every step decodes all of it. Load the model with attn_implementation="sdpa" to decode on the codes.',
            base,
        )


def apply_splices(
    model: nn.Module, sites: list[AttentionSite], splices: dict[int, Any], config: KVSpliceConfig
) -> None:
    """Change the model.

    Args:
        model: the model.
        sites: its layers to patch, from `sites_to_patch`.
        splices: by cache layer index, one for each layer that stores a latent.
        config: the settings.
    """
    register_attention()
    restore_surroundings(model)  # of a patch whose layers were unpatched without the models around them
    patch = ModelPatch(config)
    for site in sites:
        owner, module, family = site.source or site, site.module, require_family(site.module)
        if site.stores_latent:
            module.kvsplice = splices[site.layer_idx]
        base = module.config._attn_implementation
        unnamed = (config.attention == "expanded" and not site.kv_heads) or computes_alone(type(module))
        name = None if unnamed else wrapped_name(base)
        state = SitePatch(
            site.name,
            patch,
            owner.module,
            site.stores_latent,
            family.geometry(owner, owner.module.kvsplice, config.sink_tokens),
            site.num_heads,
            family.attend,
            config.attention,
            _read_forward(site, config),
            base if name not in (None, base) else None,
            module.config if name is not None else None,
            tuple(family.methods),
        )
        state.hooks.append(module.register_forward_pre_hook(enter_attention, with_kwargs=True))
        state.hooks.append(module.register_forward_hook(leave_attention))
        setattr(module, PATCH_ATTRIBUTE, state)
        # Partials, not bound methods: pickle would look a method up by name on the module, and find the stock one.
        for method, function in family.methods.items():
            setattr(module, method, functools.partial(function, module))
        if name is not None:
            module.config._attn_implementation_internal = name
    change_surroundings(model, sites, patch)


def unpatch_model(model: ModelT) -> ModelT:
    """Undo `patch_model_with_kvsplice`. The model's own tensors were never touched; its logits are bit-identical again.

    Returns:
        `model` itself.

    Raises:
        PatchStateError: the model is not patched.

    Examples:
        >>> model = unpatch_model(model)
    """
    find_patch(model)
    for module in model.modules():
        if PATCH_ATTRIBUTE in vars(module):
            _restore_module(module)
    restore_surroundings(model)
    return model


@contextlib.contextmanager
def patched_for_a_moment(
    model: nn.Module, sites: list[AttentionSite], splices: dict[int, Any], config: KVSpliceConfig
) -> Iterator[None]:
    """Within this context the model is patched; afterwards it is as it was. Arguments as in `apply_splices`."""
    apply_splices(model, sites, splices, config)
    try:
        yield
    finally:
        unpatch_model(model)


def _restore_module(module: Any) -> None:
    state: SitePatch = vars(module).pop(PATCH_ATTRIBUTE)
    for hook in state.hooks:
        hook.remove()
    before = state.attention_before
    # A function that was chosen after the patch stays chosen.
    if before is not None and module.config._attn_implementation == wrapped_name(before):
        module.config._attn_implementation_internal = before
    for method in state.methods:
        delattr(module, method)
    if "kvsplice" in module._modules:
        del module.kvsplice
