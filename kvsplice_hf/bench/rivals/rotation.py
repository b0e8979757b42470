"""A rotation, random or of Hadamard, after which any row looks Gaussian and one set of levels serves all."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch

from kvsplice_hf.bench.rivals.base import Rival, set_by_fit
from kvsplice_hf.bench.rivals.rounding import in_groups, not_zero, signed, to_bf16
from kvsplice_hf.bench.rivals.statistics import LayerStatistics


_GROUP = 32  # channels that share a scale


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
        self._rotation = self.rotation(len(statistics.mean)).to(statistics.mean)

    def rotation(self, size: int) -> torch.Tensor:
        """Orthogonal, [size, size]."""
        return random_rotation(size)

    def code(self, latent: torch.Tensor) -> torch.Tensor:
        levels = lloyd_max_levels(self.bits).to(latent)
        norm = to_bf16(latent.norm(dim=-1, keepdim=True)) / math.sqrt(latent.shape[-1])
        turned = latent @ self._rotation / not_zero(norm)
        nearest = levels[torch.bucketize(turned, (levels[1:] + levels[:-1]) / 2)]
        return (nearest * norm) @ self._rotation.T


@dataclass(kw_only=True)
class HadamardLloydMax(RotatedLloydMax):
    """The same with Hadamard transforms of random signs: 386 and 322 bytes at R = 512, P = 64 and 4 and 3 bits."""

    @property
    def label(self) -> str:
        return f"hadamard-lloyd{self.bits}"

    def rotation(self, size: int) -> torch.Tensor:
        signs = (
            torch.randint(0, 2, (size,), dtype=torch.int64, device="cpu", generator=torch.Generator().manual_seed(0))
            * 2.0
            - 1
        )
        return signs[:, None] * hadamard_blocks(size, size)


@dataclass(kw_only=True)
class HadamardIntegers(Rival):
    """A Hadamard transform in blocks of channels, then integers in groups of 32 with a bf16 scale (llama.cpp, q4_0)."""

    bits: int = 4
    block: int = 64
    _rotation: Any = set_by_fit(None)

    @property
    def label(self) -> str:
        return f"hadamard{self.block}-int{self.bits}"

    def latent_bytes(self, latent_dim: int) -> float:
        return math.ceil(latent_dim * self.bits / 8) + 2 * math.ceil(latent_dim / _GROUP)

    def learn(self, statistics: LayerStatistics) -> None:
        self._rotation = hadamard_blocks(len(statistics.mean), self.block).to(statistics.mean)

    def code(self, latent: torch.Tensor) -> torch.Tensor:
        return in_groups(latent @ self._rotation, _GROUP, functools.partial(signed, bits=self.bits)) @ self._rotation.T


def hadamard_blocks(size: int, largest: int) -> torch.Tensor:
    """Hadamard matrices along the diagonal, each as large as fits and at most `largest`: orthogonal, [size, size]."""
    blocks = []
    while size:
        block = 2 ** (min(size, largest).bit_length() - 1)
        blocks.append(_hadamard(block))
        size -= block
    return torch.block_diag(*blocks)


def _hadamard(size: int) -> torch.Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float32, device="cpu")
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float32, device="cpu") / math.sqrt(2)
    while len(matrix) < size:
        matrix = torch.kron(matrix, pair)
    return matrix


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
