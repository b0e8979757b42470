"""Ordinary attention that is computed by the module itself, and by no function that could be stood in for (Falcon).

The only place that can be reached is `update` of the cache. So for the time of a call something stands in for the cache
there, and gives the module plain keys and values: what its rows decode to.

Legend: `B` batch, `T` new tokens, `K` key heads, `d`, `v` sizes of a key and of a value.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache

from kvsplice_hf import upstream
from kvsplice_hf.cache.heads import CompressedHeads
from kvsplice_hf.call import note_expansion
from kvsplice_hf.patch.heads import without_cache
from kvsplice_hf.patch.site_patch import SitePatch, title_of


def computes_alone(cls: type) -> bool:
    """Whether a class caches keys and values like others, but looks no attention function up by its name.

    It has to be told of masks and rotations as those are: what others make of their masks is not known.
    """
    used, parameters = upstream.names_used(cls), upstream.forward_parameters_of(cls)
    told = {"hidden_states", "attention_mask", upstream.POSITION_EMBEDDINGS} <= set(parameters)
    return told and "update" in used and not {"ALL_ATTENTION_FUNCTIONS", "expand_kv"} & set(used)


class StandIn:
    """Stands in for the cache of one call of a module, or for none.

    Args:
        cache: the cache, which everything but `update` is asked of; or None.
        read: in the place of `update`.
    """

    def __init__(self, cache: Cache | None, read: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._cache = cache
        self.update = read

    def __getattr__(self, name: str) -> Any:
        if self._cache is None:
            raise upstream.changed(
                "an attention module", f"`{name}` of its cache was asked for in a call without a cache."
            )
        return getattr(self._cache, name)


def decoding_cache(module: Any, patched: SitePatch, cache: Cache | None) -> StandIn:
    """Gives a patched module keys [B, K, T, d] and values [B, K, T, v] after their round trip, or all those stored."""

    def read(key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        note_expansion()
        if cache is None:
            return without_cache(module, patched, key, value)
        found, _ = cache.update(key, value, *args, **kwargs)
        if not isinstance(found, CompressedHeads):
            raise upstream.changed(title_of(module), "its cache has stored keys and values that are not compressed.")
        return found.keys_and_values()

    return StandIn(cache, read)
