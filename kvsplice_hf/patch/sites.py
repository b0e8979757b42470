"""Finds the attention layers of a model that can be patched, of all families."""

from typing import Any

from torch import nn

from kvsplice_hf.errors import NotMLAError, TransformersTooOldError
from kvsplice_hf.patch.families import AttentionSite, Family
from kvsplice_hf.patch.mla import MLA
from kvsplice_hf.patch.ordinary import ORDINARY
from kvsplice_hf.upstream import INSTALLED, MIN_TRANSFORMERS, MIN_TRANSFORMERS_DSA, names_used
from kvsplice_hf.weights.sharding import require_known_sharding


# In the order in which they are asked. To add a family is to add it here.
FAMILIES: list[Family] = [MLA, ORDINARY]


def family_of(module: nn.Module) -> Family | None:
    """The family of an attention module, or None for any other module."""
    return next((family for family in FAMILIES if family.recognises(module)), None)


def require_family(module: nn.Module) -> Family:
    """The family of an attention module that is known to have one."""
    family = family_of(module)
    assert family is not None
    return family


def find_sites(model: nn.Module, layer_pattern: str | None = None) -> list[AttentionSite]:
    """All sites of `model`, by ascending `layer_idx`.

    Args:
        model: any module; usually a `PreTrainedModel`.
        layer_pattern: dotted path of the list of layers to search ("transformer.h"); by default the whole model.

    Raises:
        NotMLAError: there is no site (the message lists the attention classes seen), the pattern names no module, two
            sites claim one cache layer, or the model runs on remote code.
        TransformersTooOldError: the module caches expanded keys and values in the installed release.
        UnsupportedError: the model is divided among processes in a way that leaves a process without what it needs.
    """
    require_known_sharding(model.modules())
    prefix, root = _resolve_root(model, layer_pattern)
    found: list[tuple[str, Any]] = [
        (f"{prefix}{name}", module) for name, module in root.named_modules() if family_of(module) is not None
    ]
    if not found:
        _raise_not_mla(model, root, layer_pattern)
    for name, module in found:
        require_family(module).check(name, module)
    indices = [module.layer_idx for _, module in found]
    duplicates = sorted({index for index in indices if indices.count(index) > 1})
    if duplicates:
        raise NotMLAError(
            f"Cache layers {duplicates} belong to several attention modules "
            f"({', '.join(name for name, module in found if module.layer_idx in duplicates)}): the model has more than "
            'one decoder. Name the one to patch with `layer_pattern`, for example "model.layers".'
        )
    return sites_of(found)


def sites_of(modules: list[tuple[str, Any]]) -> list[AttentionSite]:
    """The sites of attention modules, given with their paths, by ascending `layer_idx`.

    Raises:
        NotMLAError: one of them reuses a latent that none of them stores.
    """
    sites: list[AttentionSite] = []
    for name, module in sorted(modules, key=lambda item: item[1].layer_idx):
        sites.append(require_family(module).describe(name, module, sites))
    return sites


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
    alone = sorted({type(m).__name__ for m in attentions if _computes_alone(type(m))})
    reason = f" {', '.join(alone)}: keys and values go to a cache, but its forward computes attention by itself."
    raise NotMLAError(
        f"{type(model).__name__} has no attention layer that can be patched{where}: neither Multi-head Latent "
        "Attention (a module with `expand_kv`, `kv_b_proj` and `kv_lora_rank`), nor ordinary attention whose forward "
        "hands keys and values to `update` of the cache and then looks the attention function up by its name in the "
        f"config. Attention classes seen: {', '.join(classes) or 'none'}.{reason if alone else ''}"
    )


def _computes_alone(cls: type) -> bool:
    """Whether a class caches keys and values, but looks no attention function up that could be stood in for."""
    used = names_used(cls)
    return "update" in used and "ALL_ATTENTION_FUNCTIONS" not in used
