"""Finds the Multi-head Latent Attention layers of a model. The only room that knows what such a layer looks like.

The convention, not the class name, decides: a module is an MLA site when it has `expand_kv` (latent to keys and values)
together with `kv_b_proj` and the sizes in `_SIZE_ATTRIBUTES`. All MLA modules of transformers follow it, and so can
modules outside it. Sizes are read from the module, because configs may hold several (two ranks in one model, RoPE
dropped on some layers).

Legend: `R` kv_lora_rank, `P` qk_rope_head_dim, `N` qk_nope_head_dim, `V` v_head_dim, `H` heads.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kvsplice_hf.errors import ConfigError, NotMLAError, TransformersTooOldError
from kvsplice_hf.upstream import INSTALLED, MIN_TRANSFORMERS, MIN_TRANSFORMERS_DSA, require_latent_cache
from kvsplice_hf.weights.offload import execution_device


_SIZE_ATTRIBUTES = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "layer_idx")


@dataclass(frozen=True, eq=False)
class MLASite:
    """One MLA attention module and its sizes.

    Attributes:
        name: path of the module in the model ("model.layers.0.self_attn").
        module: the attention module.
        layer_idx: index of its layer in the cache.
        kv_lora_rank, qk_rope_head_dim, qk_nope_head_dim, v_head_dim, num_heads: R, P, N, V, H.
        sliding_window: tokens visible to a query, or None.
        indexer_head_dim: width of the sparse-attention indexer's key (0 without an indexer). It is cached beside the
            latent and not compressed.
        dtype: of the latent, and so of the cache.
        source: the site whose latent this one expands; itself, unless the layer reuses the cache of an earlier one.
    """

    name: str
    module: Any
    layer_idx: int
    kv_lora_rank: int
    qk_rope_head_dim: int
    qk_nope_head_dim: int
    v_head_dim: int
    num_heads: int
    sliding_window: int | None
    indexer_head_dim: int
    dtype: torch.dtype
    source: "MLASite | None" = None

    @property
    def stores_latent(self) -> bool:
        """Whether this site writes a latent to the cache (False for layers that reuse another layer's)."""
        return self.source is None


def find_mla_sites(model: nn.Module, layer_pattern: str | None = None) -> list[MLASite]:
    """All MLA sites of `model`, by ascending `layer_idx`.

    Args:
        model: any module; usually a `PreTrainedModel`.
        layer_pattern: dotted path of the list of layers to search ("transformer.h"); by default the whole model.

    Raises:
        NotMLAError: there is no site (the message lists the attention classes seen), the pattern names no module, two
            sites claim one cache layer, or the model runs on remote code.
        TransformersTooOldError: the module caches expanded keys and values in the installed release.
    """
    prefix, root = _resolve_root(model, layer_pattern)
    found: list[tuple[str, Any]] = [
        (f"{prefix}{name}", module) for name, module in root.named_modules() if _looks_like_mla(module)
    ]
    if not found:
        _raise_not_mla(model, root, layer_pattern)
    for name, module in found:
        require_latent_cache(name, module)
    indices = [module.layer_idx for _, module in found]
    duplicates = sorted({index for index in indices if indices.count(index) > 1})
    if duplicates:
        raise NotMLAError(
            f"Cache layers {duplicates} belong to several attention modules "
            f"({', '.join(name for name, module in found if module.layer_idx in duplicates)}): the model has more than "
            'one decoder. Name the one to patch with `layer_pattern`, for example "model.layers".'
        )
    return sites_of(found)


def sites_of(modules: list[tuple[str, Any]]) -> list[MLASite]:
    """The sites of MLA modules, given with their paths, by ascending `layer_idx`.

    Raises:
        NotMLAError: one of them reuses a latent that none of them stores.
    """
    sites: list[MLASite] = []
    for name, module in sorted(modules, key=lambda item: item[1].layer_idx):
        sites.append(_make_site(name, module, sites))
    return sites


@torch.no_grad()
def effective_weight(site: MLASite, device: torch.device | None = None) -> torch.Tensor:
    """What `kv_b_proj` multiplies by, [H * (N + V), R], whether packed, adapted, offloaded or plain.

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


@torch.no_grad()
def linear_map(module: nn.Module, size: int, dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
    """What a linear layer multiplies by, [out, size], by asking it: packed, adapted and offloaded ones answer as well.

    Args:
        module: the layer.
        size: numbers that it takes.
        dtype: of its input in the model.
        device: where it computes, if that is known.
    """
    device = execution_device(module) if device is None else device
    # In the dtype of the weight, not of the input: they differ where norms are kept in float32 and autocast does the
    # rest. Packed weights (integers, float8) take what the input is.
    held = getattr(module, "weight", None)
    if isinstance(held, torch.Tensor) and held.dtype.is_floating_point and held.dtype.itemsize > 1:
        dtype = held.dtype
    units = torch.eye(size, dtype=dtype, device=device)
    with torch.autocast(device.type, enabled=False):  # it would round the weight
        return (module(units) - module(torch.zeros_like(units[:1]))).T


def _resolve_root(model: nn.Module, layer_pattern: str | None) -> tuple[str, nn.Module]:
    if layer_pattern is None:
        return "", model
    modules = dict(model.named_modules())
    # A pattern may come from a causal LM and be used on its bare model, or the other way round.
    for path in (layer_pattern, f"model.{layer_pattern}", layer_pattern.removeprefix("model.")):
        if path in modules:
            return f"{path}.", modules[path]
    inside = [path for path in modules if path.endswith(f".{layer_pattern}")]
    if len(inside) == 1:  # of a model that something is wrapped around
        return f"{inside[0]}.", modules[inside[0]]
    lists = sorted(name for name, module in modules.items() if isinstance(module, nn.ModuleList))
    raise NotMLAError(
        f"`layer_pattern` {layer_pattern!r} is not a module of {type(model).__name__}. "
        f"Lists of layers in this model: {lists or 'none'}."
    )


def _looks_like_mla(module: nn.Module) -> bool:
    return (
        callable(getattr(module, "expand_kv", None))
        and isinstance(getattr(module, "kv_b_proj", None), nn.Module)
        and all(isinstance(getattr(module, name, None), int) for name in _SIZE_ATTRIBUTES)
    )


def _raise_not_mla(model: nn.Module, root: nn.Module, layer_pattern: str | None) -> None:
    attentions = [m for m in root.modules() if "attention" in type(m).__name__.lower() or hasattr(m, "kv_b_proj")]
    classes = sorted({f"{type(m).__module__}.{type(m).__name__}" for m in attentions})
    latent = [m for m in attentions if hasattr(m, "kv_b_proj") and hasattr(m, "kv_lora_rank")]
    if any(type(m).__module__.startswith("transformers_modules") for m in latent):
        raise NotMLAError(
            f"{type(model).__name__} runs on remote code ({', '.join(classes)}), which caches expanded keys and values "
            "and does not follow the current cache API. Load the class that ships with transformers instead: "
            "`AutoModelForCausalLM.from_pretrained(..., trust_remote_code=False)`."
        )
    if latent:
        raise TransformersTooOldError(
            f"{', '.join(classes)} has latents but no `expand_kv`: transformers {INSTALLED} caches "
            f"expanded keys and values here. Install transformers>={MIN_TRANSFORMERS} "
            f"(>={MIN_TRANSFORMERS_DSA} for models with a sparse-attention indexer)."
        )
    where = f" under {layer_pattern!r}" if layer_pattern is not None else ""
    raise NotMLAError(
        f"{type(model).__name__} has no Multi-head Latent Attention layer{where} (a module with `expand_kv`, "
        f"`kv_b_proj` and `kv_lora_rank`). Attention classes seen: {', '.join(classes) or 'none'}. Ordinary multi-head "
        "or grouped-query models store no latent and cannot be patched."
    )


def _make_site(name: str, module: Any, earlier: list[MLASite]) -> MLASite:
    rope_dim, nope_dim, v_dim = module.qk_rope_head_dim, module.qk_nope_head_dim, module.v_head_dim
    indexer = getattr(module, "indexer", None)
    stores = getattr(module, "kv_a_proj_with_mqa", True) is not None
    return MLASite(
        name=name,
        module=module,
        layer_idx=module.layer_idx,
        kv_lora_rank=module.kv_lora_rank,
        qk_rope_head_dim=rope_dim,
        qk_nope_head_dim=nope_dim,
        v_head_dim=v_dim,
        num_heads=getattr(module, "num_heads", None) or module.config.num_attention_heads,
        sliding_window=getattr(module, "sliding_window", None),
        indexer_head_dim=int(getattr(indexer, "head_dim", 0)),
        dtype=_latent_dtype(module),
        source=None if stores else _latent_source(name, module, earlier),
    )


def _latent_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of the norm that makes the latent: unlike `kv_b_proj`, it is never packed."""
    norm = getattr(module, "kv_a_layernorm", None)
    parameters = [*(norm.parameters() if norm is not None else ()), *module.parameters()]
    return next((p.dtype for p in parameters if p.is_floating_point()), torch.float32)


def _latent_source(name: str, module: Any, earlier: list[MLASite]) -> MLASite:
    """The site whose latent a reuse layer expands: the last one before it that shares its latent and its RoPE kind."""
    for site in reversed(earlier):
        shares = site.stores_latent and getattr(site.module, "store_full_length_kv", False)
        if shares and site.qk_rope_head_dim == module.qk_rope_head_dim:
            return site
    raise NotMLAError(
        f"{name} ({type(module).__name__}) expands a latent that another layer stores, but no earlier layer with "
        f"qk_rope_head_dim {module.qk_rope_head_dim} shares its latent. Patch the whole decoder, not a part of it."
    )
