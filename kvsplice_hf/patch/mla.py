"""Multi-head Latent Attention: what its modules look like in transformers.

The convention, not the class name, decides: a module is an MLA site when it has `expand_kv` (latent to keys and values)
together with `kv_b_proj` and the sizes in `_SIZE_ATTRIBUTES`. All MLA modules of transformers follow it, and so can
modules outside it. Sizes are read from the module, because configs may hold several (two ranks in one model, RoPE
dropped on some layers).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from kvsplice_hf.cache.rows import RowGeometry
from kvsplice_hf.code.projection import LearnedKVSplice
from kvsplice_hf.errors import ConfigError, NotMLAError
from kvsplice_hf.patch.expansion import expand_spliced_kv
from kvsplice_hf.patch.families import AttentionSite, Family
from kvsplice_hf.patch.latents import attend_latents
from kvsplice_hf.upstream import require_latent_cache
from kvsplice_hf.weights.linear import linear_map
from kvsplice_hf.weights.offload import execution_device
from kvsplice_hf.weights.sharding import head_share


_SIZE_ATTRIBUTES = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "layer_idx")


def _looks_like_mla(module: nn.Module) -> bool:
    return (
        callable(getattr(module, "expand_kv", None))
        and isinstance(getattr(module, "kv_b_proj", None), nn.Module)
        and all(isinstance(getattr(module, name, None), int) for name in _SIZE_ATTRIBUTES)
    )


def _describe(name: str, module: Any, earlier: Sequence[AttentionSite]) -> AttentionSite:
    rope_dim, nope_dim, v_dim = module.qk_rope_head_dim, module.qk_nope_head_dim, module.v_head_dim
    indexer = getattr(module, "indexer", None)
    stores = getattr(module, "kv_a_proj_with_mqa", True) is not None
    heads = getattr(module, "num_heads", None) or module.config.num_attention_heads
    share = head_share(module.kv_b_proj)
    return AttentionSite(
        name=name,
        module=module,
        layer_idx=module.layer_idx,
        kv_lora_rank=module.kv_lora_rank,
        qk_rope_head_dim=rope_dim,
        qk_nope_head_dim=nope_dim,
        v_head_dim=v_dim,
        num_heads=heads if share is None else share.of(heads, "heads", name),
        sliding_window=getattr(module, "sliding_window", None),
        indexer_head_dim=int(getattr(indexer, "head_dim", 0)),
        dtype=_latent_dtype(module),
        device=execution_device(module.kv_b_proj),
        share=share,
        source=None if stores else _latent_source(name, module, earlier),
    )


def _latent_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of the norm that makes the latent: unlike `kv_b_proj`, it is never packed."""
    norm = getattr(module, "kv_a_layernorm", None)
    parameters = [*(norm.parameters() if norm is not None else ()), *module.parameters()]
    return next((p.dtype for p in parameters if p.is_floating_point()), torch.float32)


def _latent_source(name: str, module: Any, earlier: Sequence[AttentionSite]) -> AttentionSite:
    """The site whose latent a reuse layer expands: the last one before it that shares its latent and its RoPE kind."""
    for site in reversed(earlier):
        shares = site.stores_latent and getattr(site.module, "store_full_length_kv", False)
        if shares and site.qk_rope_head_dim == module.qk_rope_head_dim:
            return site
    raise NotMLAError(
        f"{name} ({type(module).__name__}) expands a latent that another layer stores, but no earlier layer with "
        f"qk_rope_head_dim {module.qk_rope_head_dim} shares its latent. Patch the whole decoder, not a part of it."
    )


def _geometry(site: AttentionSite, splice: LearnedKVSplice, exact_tokens: int) -> RowGeometry:
    if site.sliding_window is not None:
        # Within the window, how many keys a query sees tells its rank in the sequence only up to the window's size.
        exact_tokens = min(exact_tokens, max(site.sliding_window - 1, 0))
    packed = splice.codec.row_bytes if splice.codec is not None else None
    return RowGeometry(
        site.kv_lora_rank, splice.rank, site.qk_rope_head_dim, exact_tokens, packed, coded_keys=splice.keys is not None
    )


@torch.no_grad()
def effective_weight(site: AttentionSite, device: torch.device | None = None) -> torch.Tensor:
    """What `kv_b_proj` multiplies by, [H * (N + V), R], whether packed, adapted, offloaded or plain.

    Of a layer that is divided among processes, that of all heads: all of them have to call this.

    Raises:
        ConfigError: the weights are not loaded or not finite.
    """
    device = execution_device(site.module.kv_b_proj) if device is None else device
    if device.type == "meta":
        raise ConfigError(
            f"The weights of {site.name} are not loaded (meta device). Load the model before patching it."
        )
    weight = linear_map(site.module.kv_b_proj, site.kv_lora_rank, site.dtype, device)
    if not torch.isfinite(weight).all():
        raise ConfigError(f"kv_b_proj of {site.name} holds values that are not finite; the model is damaged.")
    return weight


MLA = Family(
    name="Multi-head Latent Attention",
    recognises=_looks_like_mla,
    check=require_latent_cache,
    describe=_describe,
    geometry=_geometry,
    methods={"expand_kv": expand_spliced_kv},
    attend=attend_latents,
)
