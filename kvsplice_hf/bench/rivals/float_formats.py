"""Floating-point numbers: bf16 as it comes, and 8 or 4 bits with a scale per group."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from kvsplice_hf.bench.rivals.base import Rival, set_by_fit
from kvsplice_hf.bench.rivals.rounding import in_groups, not_zero, to_bf16
from kvsplice_hf.bench.rivals.statistics import LayerStatistics


_E4M3_MAX = 448.0
_E2M1_MAX = 6.0


@dataclass(kw_only=True)
class Stock(Rival):
    """bf16, as it comes."""

    has_standardised_variant: ClassVar[bool] = False
    label: ClassVar[str] = "bf16"

    def latent_bytes(self, latent_dim: int) -> float:
        return 2 * latent_dim

    def code(self, latent: torch.Tensor) -> torch.Tensor:
        return to_bf16(latent)


@dataclass(kw_only=True)
class Fp8Rows(Rival):
    """e4m3 numbers with one fp32 scale per group: the FP8 rows of serving engines (656 B at R = 512, P = 64)."""

    group: int = 128

    @property
    def label(self) -> str:
        return f"fp8-g{self.group}"

    def latent_bytes(self, latent_dim: int) -> float:
        return latent_dim + 4 * math.ceil(latent_dim / self.group)

    def code(self, latent: torch.Tensor) -> torch.Tensor:
        return in_groups(latent, self.group, _fp8_group)


@dataclass(kw_only=True)
class NvFp4(Rival):
    """e2m1 numbers in blocks of 16 with an e4m3 scale each, and one fp32 scale per layer."""

    block: int = 16
    label: ClassVar[str] = "nvfp4"
    _outer: torch.Tensor | float = set_by_fit(1.0)

    def latent_bytes(self, latent_dim: int) -> float:
        return math.ceil(latent_dim / 2) + math.ceil(latent_dim / self.block)

    def learn(self, statistics: LayerStatistics) -> None:
        # The largest block scale stands for a number 16 deviations out. Being generous costs nothing: e4m3 is as fine
        # at a small scale as at a large one.
        largest = (statistics.mean.abs() + 16 * statistics.covariance.diagonal().clamp_min(0).sqrt()).max()
        self._outer = (largest / (_E4M3_MAX * _E2M1_MAX)).clamp_min(1e-30)

    def code(self, latent: torch.Tensor) -> torch.Tensor:
        return in_groups(latent / self._outer, self.block, _nvfp4_block) * self._outer


def round_to_e2m1(numbers: torch.Tensor) -> torch.Tensor:
    """The nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 with either sign, ties to the even code, saturating."""
    size = numbers.abs().clamp_max(_E2M1_MAX)
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return (size / step).round() * step * numbers.sign()


def round_to_e4m3(numbers: torch.Tensor) -> torch.Tensor:
    """The nearest e4m3 number, saturating."""
    # Clamped first: whether the cast itself saturates or gives NaN depends on the release of torch.
    return numbers.clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn).float()


def _fp8_group(numbers: torch.Tensor) -> torch.Tensor:
    scale = not_zero(numbers.abs().amax(-1, keepdim=True) / _E4M3_MAX)
    return round_to_e4m3(numbers / scale) * scale


def _nvfp4_block(numbers: torch.Tensor) -> torch.Tensor:
    scale = round_to_e4m3(numbers.abs().amax(-1, keepdim=True) / _E2M1_MAX)
    return round_to_e2m1(numbers / not_zero(scale)) * scale
