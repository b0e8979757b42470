"""A model that reads its latents or values through geometries, without a trace on it afterwards."""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from kvsplice_hf.bench.rivals.expansion import replaced_expand_kv
from kvsplice_hf.bench.rivals.statistics import EXACT_TOKENS
from kvsplice_hf.code.heads import HeadKey, PartKey
from kvsplice_hf.geometry import SplinePCA
from kvsplice_hf.patch.families import AttentionSite
from kvsplice_hf.patch.sites import find_sites
from kvsplice_hf.patch.tap import Attended, tapped


@contextlib.contextmanager
def through_geometries(model: nn.Module, geometries: Mapping[PartKey, SplinePCA]) -> Iterator[None]:
    """Inside, a model that runs without a cache reads what geometries leave of latents (MLA), or of values.

    Rotated keys, the keys of ordinary attention, and the first 4 tokens of each sequence are exact.

    Args:
        model: unpatched.
        geometries: of each layer of latents; of ordinary attention of each key head, or of all values of each layer.

    Raises:
        PatchStateError: the model is patched.
        UnsupportedError: the attention function of the model cannot be stood in for.
    """
    sites = find_sites(model)
    if any(site.kv_heads for site in sites):
        with tapped([site for site in sites if site.kv_heads], functools.partial(_read_values, geometries)):
            yield
        return
    with replaced_expand_kv(model, lambda site: functools.partial(_expand, site, geometries)):
        yield


def _left(geometry: SplinePCA, states: torch.Tensor) -> torch.Tensor:
    """States [..., T, n] after both ways, the first tokens exact."""
    rest = geometry(states[..., EXACT_TOKENS:, :]).to(states.dtype)
    return torch.cat([states[..., :EXACT_TOKENS, :], rest], dim=-2)


def _read_values(geometries: Mapping[PartKey, SplinePCA], site: AttentionSite, seen: Attended) -> Attended:
    if site.layer_idx in geometries:  # all heads side by side
        values = seen.value.transpose(1, 2)  # [B, T, K, v]
        left = _left(geometries[site.layer_idx], values.flatten(2)).unflatten(2, values.shape[2:])
        return seen._replace(value=left.transpose(1, 2))
    heads = [_left(geometries[HeadKey(site.layer_idx, head)], seen.value[:, head]) for head in range(site.kv_heads)]
    return seen._replace(value=torch.stack(heads, dim=1))


def _expand(site: AttentionSite, geometries: Mapping[PartKey, SplinePCA], latent: torch.Tensor, k_rot: Any) -> Any:
    left = _left(geometries[(site.source or site).layer_idx], latent)
    return type(site.module).expand_kv(site.module, left, k_rot)
