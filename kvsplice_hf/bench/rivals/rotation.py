"""A random rotation, after which any row looks Gaussian and one set of levels serves all."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch

from kvsplice_hf.bench.rivals.base import Rival, set_by_fit
from kvsplice_hf.bench.rivals.rounding import not_zero, to_bf16
from kvsplice_hf.bench.rivals.statistics import LayerStatistics


@dataclass(kw_only=True)
class RotatedLloydMax(Rival):
    """A random rotation, then the best levels for a Gaussian, with one bf16 norm per token (as TurboQuant does)."""

    bits: int = 4
    _rotation: Any = set_by_fit(None)

    @property
    def label(self) -> str:
        return f"rotated-lloyd{self.bits}"

    def latent_bytes(self, latent_dim: int) -> float:
        return math.ceil(latent_dim * self.bits / 8) + 2

    def learn(self, statistics: LayerStatistics) -> None:
        self._rotation = random_rotation(len(statistics.mean)).to(statistics.mean)

    def code(self, latent: torch.Tensor) -> torch.Tensor:
        levels = lloyd_max_levels(self.bits).to(latent)
        norm = to_bf16(latent.norm(dim=-1, keepdim=True)) / math.sqrt(latent.shape[-1])
        turned = latent @ self._rotation / not_zero(norm)
        nearest = levels[torch.bucketize(turned, (levels[1:] + levels[:-1]) / 2)]
        return (nearest * norm) @ self._rotation.T


@functools.cache
def lloyd_max_levels(bits: int) -> torch.Tensor:
    """The 2**bits levels with the least squared error for a unit Gaussian, ascending, fp32."""
    levels = torch.linspace(-2.5, 2.5, 2**bits, dtype=torch.float64, device="cpu")
    outside = torch.tensor([torch.inf], dtype=torch.float64, device="cpu")
    for _ in range(3000):
        edges = torch.cat([-outside, (levels[1:] + levels[:-1]) / 2, outside])
        density, below = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi), torch.special.ndtr(edges)
        levels = (density[:-1] - density[1:]) / (below[1:] - below[:-1])
    return levels.float()


@functools.cache
def random_rotation(size: int) -> torch.Tensor:
    """An orthogonal matrix, the same at every call, [size, size]."""
    gaussian = torch.randn(size, size, dtype=torch.float64, device="cpu", generator=torch.Generator().manual_seed(0))
    return torch.linalg.qr(gaussian).Q.float()
