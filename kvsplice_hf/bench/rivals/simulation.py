"""A model that reads back what a rival has stored, without a trace on it afterwards."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from kvsplice_hf.bench.rivals.base import Rival
from kvsplice_hf.bench.rivals.expansion import replaced_expand_kv
from kvsplice_hf.bench.rivals.statistics import EXACT_TOKENS, LayerStatistics
from kvsplice_hf.patch.families import AttentionSite


def _expand_read_back(
    module: Any, rival: Rival, latent: torch.Tensor, k_rot: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    # The first tokens are kept from the rival altogether, so that they spoil no group of tokens and no basis.
    coded = rival.round_trip(latent[..., EXACT_TOKENS:, :], k_rot[..., EXACT_TOKENS:, :])
    latent, k_rot = (
        torch.cat([exact[..., :EXACT_TOKENS, :], rest], dim=-2)
        for exact, rest in zip((latent, k_rot), coded, strict=True)
    )
    return type(module).expand_kv(module, latent, k_rot)


@contextmanager
def simulated(model: nn.Module, rival: Rival, statistics: Mapping[int, LayerStatistics]) -> Iterator[None]:
    """Inside, a model that runs without a cache reads all rows but those of the first tokens as `rival` stores them.

    Raises:
        PatchStateError: the model is patched.
    """
    fitted = {layer_idx: rival.fit(layer) for layer_idx, layer in statistics.items()}

    def make(site: AttentionSite) -> Callable[..., Any]:
        return functools.partial(_expand_read_back, site.module, fitted[(site.source or site).layer_idx])

    with replaced_expand_kv(model, make):
        yield
