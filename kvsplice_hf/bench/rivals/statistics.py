"""What is known about the rows of each layer before any are coded.

The sums are in fp64 and exact to the last digit that the rivals see. Those of `kvsplice_hf.calibration` take products
in fp32, which is good enough to fit to; here another last digit of a spread is another realisation of all rounding.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kvsplice_hf.bench.rivals.expansion import replaced_expand_kv
from kvsplice_hf.errors import ConfigError
from kvsplice_hf.patch.families import AttentionSite
from kvsplice_hf.patch.mla import effective_weight
from kvsplice_hf.patch.sites import find_sites


# Tokens at the start of every sequence that no rival touches, and that calibration leaves out: attention sinks.
EXACT_TOKENS = 4

# Below this share of the widest channel, or of the channel's own mean, a spread is rounding noise. Dividing by it would
# blow that noise up to the size of the other channels, whose scales it shares.
SMALLEST_SPREAD = 1e-4
_SMALLEST_SPREAD_OF_MEAN = 1e-5


@dataclass
class LayerStatistics:
    """What calibration knows about the rows of one layer; all fp32.

    Attributes:
        mean: of the latent, [R].
        covariance: of the latent, [R, R].
        rot_scale: root mean square of each number of the rotated key, [P].
        kv_b_weight: the matrix that `kv_b_proj` multiplies by, which reads the latent, [H * (N + V), R].
    """

    mean: torch.Tensor
    covariance: torch.Tensor
    rot_scale: torch.Tensor
    kv_b_weight: torch.Tensor

    @property
    def spread(self) -> torch.Tensor:
        """Standard deviations [R], none of them so small that dividing by it amplifies rounding."""
        spread = self.covariance.diagonal().clamp_min(0).sqrt()
        smallest = torch.maximum(SMALLEST_SPREAD * spread.max(), _SMALLEST_SPREAD_OF_MEAN * self.mean.abs())
        return torch.where(spread > smallest, spread, smallest).clamp_min(torch.finfo(torch.float32).tiny)

    def standardised(self) -> "LayerStatistics":
        """Those of the latent with mean 0 and spread 1 in every channel."""
        spread = self.spread
        return LayerStatistics(
            torch.zeros_like(self.mean),
            self.covariance / spread / spread[:, None],
            torch.ones_like(self.rot_scale),
            self.kv_b_weight * spread,
        )


class Moments:
    """Running sums over the rows of one layer. fp64: differences of large sums follow."""

    def __init__(self) -> None:
        self.count = 0
        self.first: Any = 0.0
        self.second: Any = 0.0
        self.rot_second: Any = 0.0

    def add(self, latent: torch.Tensor, k_rot: torch.Tensor) -> None:
        rows, rot = latent.double().flatten(0, -2), k_rot.double().flatten(0, -2)
        self.count += len(rows)
        self.first = self.first + rows.sum(0)
        self.second = self.second + rows.T @ rows
        self.rot_second = self.rot_second + rot.square().sum(0)

    def statistics(self, kv_b_weight: torch.Tensor) -> LayerStatistics:
        mean = self.first / self.count
        covariance = self.second / self.count - torch.outer(mean, mean)
        rot_scale = (self.rot_second / self.count).sqrt()
        return LayerStatistics(mean.float(), covariance.float(), rot_scale.float(), kv_b_weight.detach().float())


def _expand_and_add(
    module: Any, moments: Moments, latent: torch.Tensor, k_rot: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    moments.add(latent[..., EXACT_TOKENS:, :], k_rot[..., EXACT_TOKENS:, :])
    return type(module).expand_kv(module, latent, k_rot)


@torch.no_grad()
def collect_statistics(model: nn.Module, batches: Iterable[torch.Tensor]) -> dict[int, LayerStatistics]:
    """Statistics of every layer that caches a latent, by `layer_idx`, without the first tokens of every sequence.

    Args:
        model: an unpatched model.
        batches: token ids [B, T], run one after the other without a cache; nothing but sums is kept.

    Raises:
        ConfigError: no sequence is longer than the tokens that are left out.
        PatchStateError: the model is patched.
    """
    sites = [site for site in find_sites(model) if site.stores_latent]
    moments = {site.layer_idx: Moments() for site in sites}

    def make(site: AttentionSite) -> Callable[..., Any]:
        # A layer that expands the latent of another one adds nothing to what is known about it.
        mine = moments[site.layer_idx] if site.stores_latent else Moments()
        return functools.partial(_expand_and_add, site.module, mine)

    device = next(model.parameters()).device
    with replaced_expand_kv(model, make):
        for batch in batches:
            model(batch.to(device), use_cache=False)
    require_counted(moments.values())
    return {site.layer_idx: moments[site.layer_idx].statistics(effective_weight(site)) for site in sites}


def require_counted(moments: Iterable[Moments]) -> None:
    """Refuse sums over nothing.

    Raises:
        ConfigError: no sequence was longer than the tokens that are left out.
    """
    if not all(layer.count for layer in moments):
        raise ConfigError(f"Calibration needs sequences of more than {EXACT_TOKENS} tokens.")
