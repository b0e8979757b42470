"""Fewer coordinates in bf16: PCA, singular vectors of the weights, singular vectors of the prompt."""

from dataclasses import dataclass
from typing import Any

import torch

from kvsplice_hf.bench.rivals.base import Rival, set_by_fit
from kvsplice_hf.bench.rivals.rounding import to_bf16
from kvsplice_hf.bench.rivals.statistics import LayerStatistics


@dataclass(kw_only=True)
class Truncation(Rival):
    """The r strongest coordinates in bf16, in a basis that is the same for all tokens.

    Attributes:
        share: r / R.
    """

    share: float = 0.5
    _basis: Any = set_by_fit(None)
    _mean: torch.Tensor | float = set_by_fit(0.0)

    def rank(self, latent_dim: int) -> int:
        return max(1, round(self.share * latent_dim))

    def latent_bytes(self, latent_dim: int) -> float:
        return 2 * self.rank(latent_dim)

    def code(self, latent: torch.Tensor) -> torch.Tensor:
        return to_bf16((latent - self._mean) @ self._basis) @ self._basis.T + self._mean


@dataclass(kw_only=True)
class PcaTruncation(Truncation):
    """The coordinates in which the latents vary most."""

    @property
    def label(self) -> str:
        return f"pca-{self.share:g}"

    def learn(self, statistics: LayerStatistics) -> None:
        self._mean = statistics.mean
        self._basis = _top_eigenvectors(statistics.covariance, self.rank(len(statistics.mean)))


@dataclass(kw_only=True)
class WeightTruncation(Truncation):
    """The right singular vectors of `kv_b_proj` with the largest values: no data needed."""

    @property
    def label(self) -> str:
        return f"weight-svd-{self.share:g}"

    def learn(self, statistics: LayerStatistics) -> None:
        # The right singular vectors of W are the eigenvectors of W^T W, which is as small as the latent.
        weight = statistics.kv_b_weight.double()
        self._basis = _top_eigenvectors(weight.T @ weight, self.rank(weight.shape[1])).float()


@dataclass(kw_only=True)
class PromptTruncation(Truncation):
    """The strongest directions of the sequence itself, stored with it in bf16 (as xKV does, one layer at a time)."""

    @property
    def label(self) -> str:
        return f"prompt-svd-{self.share:g}"

    def latent_bytes(self, latent_dim: int) -> float:
        rank = self.rank(latent_dim)
        return 2 * rank + 2 * rank * latent_dim / self.tokens

    def code(self, latent: torch.Tensor) -> torch.Tensor:
        rows = latent.double()
        basis = _top_eigenvectors(rows.transpose(-1, -2) @ rows, self.rank(latent.shape[-1])).float()
        return to_bf16(latent @ basis) @ to_bf16(basis).transpose(-1, -2)


def _top_eigenvectors(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """Eigenvectors [..., R, r] of symmetric matrices [..., R, R], those of the largest values."""
    vectors = torch.linalg.eigh(matrix.double()).eigenvectors
    return vectors[..., -rank:].flip(-1).to(matrix.dtype)
