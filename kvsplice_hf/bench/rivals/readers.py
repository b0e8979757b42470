"""A rotation by what reads the rows, then integers: the strongest directions share their error with the others."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch

from kvsplice_hf.bench.rivals.base import Rival, set_by_fit
from kvsplice_hf.bench.rivals.rotation import hadamard_blocks
from kvsplice_hf.bench.rivals.rounding import affine
from kvsplice_hf.bench.rivals.statistics import LayerStatistics


# Shares of the range between the smallest and the largest number of a token that its levels may cover.
_CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)


@dataclass(kw_only=True)
class ReaderRotatedIntegers(Rival):
    """Eigenvectors of what reads a row, a Hadamard transform, then integers per token with a bf16 scale and zero.

    Follows OSCAR (arXiv 2605.17757). It fits one threshold per head at which numbers are clipped; here each token has
    the one with the least squared error, which is at least as good and takes no bytes more. All numbers of a head are
    one group, so that its permutation changes nothing.
    """

    bits: int = 2
    _rotation: Any = set_by_fit(None)

    @property
    def label(self) -> str:
        return f"oscar{self.bits}"

    def latent_bytes(self, latent_dim: int) -> float:
        return math.ceil(latent_dim * self.bits / 8) + 4

    def learn(self, statistics: LayerStatistics) -> None:
        weight = statistics.kv_b_weight.double()
        vectors = torch.linalg.eigh(weight.T @ weight).eigenvectors.flip(-1).to(statistics.mean)
        size = len(statistics.mean)
        self._rotation = vectors @ hadamard_blocks(size, size).to(statistics.mean)

    def code(self, latent: torch.Tensor) -> torch.Tensor:
        turned = latent @ self._rotation
        quantise = functools.partial(affine, bits=self.bits)
        tried = torch.stack([quantise(_clipped(turned, share)) for share in _CLIPS])
        best = (tried - turned).square().sum(-1, keepdim=True).argmin(0, keepdim=True)
        return tried.gather(0, best.expand(1, *turned.shape))[0] @ self._rotation.T


def _clipped(numbers: torch.Tensor, share: float) -> torch.Tensor:
    """With the ends of the range of each token drawn in, about its middle."""
    low, high = numbers.amin(-1, keepdim=True), numbers.amax(-1, keepdim=True)
    middle, half = (low + high) / 2, (high - low) / 2 * share
    return numbers.clamp(middle - half, middle + half)
