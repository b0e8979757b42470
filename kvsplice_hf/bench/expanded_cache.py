"""MLA modules that cache the keys and values of their heads, as ordinary attention does, without a trace afterwards.

For models whose latent has as many numbers as keys and values together: what they compute stays the same, and what is
measured of ordinary attention can be measured of them.

Legend: `B` batch, `T` tokens, `H` heads, `d`, `V` sizes of a key and of a value.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from kvsplice_hf import upstream
from kvsplice_hf.patch.alone import StandIn
from kvsplice_hf.patch.families import AttentionSite
from kvsplice_hf.patch.sites import find_sites


def sites_of_heads(model: nn.Module) -> list[AttentionSite]:
    """The sites of a model; those of MLA as if each head had a key and a value of its own."""
    return [site if site.kv_heads else _with_heads(site) for site in find_sites(model)]


def _with_heads(site: AttentionSite) -> AttentionSite:
    key = site.qk_nope_head_dim + site.qk_rope_head_dim
    return replace(
        site, kv_heads=site.num_heads, kv_lora_rank=site.v_head_dim, qk_rope_head_dim=key, qk_nope_head_dim=0
    )


@contextlib.contextmanager
def caching_heads(sites: Sequence[AttentionSite]) -> Iterator[None]:
    """Within this context the MLA modules among these sites expand first and cache afterwards."""
    modules = [site.module for site in sites if callable(getattr(site.module, "expand_kv", None))]
    try:
        for module in modules:
            module.forward = functools.partial(_forward, module)
            module.expand_kv = _as_they_are
        yield
    finally:
        for module in modules:
            for name in ("forward", "expand_kv"):
                vars(module).pop(name, None)


def _as_they_are(key: Any, value: Any) -> tuple[Any, Any]:
    return key, value


def _forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    cache = upstream.find_cache(args, kwargs)

    def update(latent: torch.Tensor, k_rot: torch.Tensor, *rest: Any, **more: Any) -> tuple[Any, Any]:
        key, value = type(module).expand_kv(module, latent, k_rot)
        return (key, value) if cache is None else cache.update(key, value, *rest, **more)

    arguments = upstream.read_forward(type(module).__name__, module)
    args, kwargs = upstream.with_cache(arguments, StandIn(cache, update), args, kwargs)
    return type(module).forward(module, *args, **kwargs)
