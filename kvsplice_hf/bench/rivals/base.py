"""What every rival has: bytes of a row, and rows read back, plain or standardised."""

import math
from abc import ABC, abstractmethod
from copy import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch

from kvsplice_hf.bench.rivals.rounding import symmetric, to_bf16
from kvsplice_hf.bench.rivals.statistics import SMALLEST_SPREAD, LayerStatistics


def set_by_fit(default: Any) -> Any:
    """A field that `Rival.fit` sets."""
    return field(default=default, init=False, repr=False, compare=False)


@dataclass(kw_only=True)
class Rival(ABC):
    """A codec for rows. `fit` gives a copy that knows a layer; that one codes.

    Attributes:
        rot_bits: 16 keeps the rotated key in bf16; 8 stores integers with one bf16 scale per token.
        is_standardised: take mean and spread of each channel out first.
        tokens: coded tokens of a sequence, over which bytes that belong to the sequence are spread.
        first, recent: so many tokens at the start of a sequence, and the last ones before each query, are kept in bf16
            beside the coded ones. Of ordinary attention only.
    """

    rot_bits: int = 16
    is_standardised: bool = False
    tokens: int = 1024
    first: int = 0
    recent: int = 0

    # Whether a standardised variant makes sense at all.
    has_standardised_variant: ClassVar[bool] = True
    _centre: torch.Tensor | float = set_by_fit(0.0)
    _spread: torch.Tensor | float = set_by_fit(1.0)
    _rot_spread: torch.Tensor | float = set_by_fit(1.0)

    @property
    def name(self) -> str:
        window = f"-s{self.first}-w{self.recent}" if self.first or self.recent else ""
        return self.label + window + ("" if self.rot_bits == 16 else f"-k{self.rot_bits}")

    @property
    def for_values(self) -> "Rival":
        """What codes the values of ordinary attention where this one codes the keys."""
        return self

    @property
    @abstractmethod
    def label(self) -> str:
        """Name without what is said about the rotated key."""

    @abstractmethod
    def latent_bytes(self, latent_dim: int) -> float:
        """Bytes of the latent, per token and layer."""

    @abstractmethod
    def code(self, latent: torch.Tensor) -> torch.Tensor:
        """What is read back of latents [..., T, R], fp32."""

    def learn(self, statistics: LayerStatistics) -> None:  # noqa: B027  most rivals need nothing
        """Take from the statistics what `code` needs. They are standardised where the latents will be."""

    def bytes_per_token(self, latent_dim: int, rope_dim: int) -> float:
        """Bytes of a row, packed, with its scales and its rotated key, per token and layer."""
        rot = 2 * rope_dim if self.rot_bits == 16 or rope_dim == 0 else math.ceil(rope_dim * self.rot_bits / 8) + 2
        return self.latent_bytes(latent_dim) + rot

    def heads_bytes(self, heads: int, key_dim: int, value_dim: int) -> float:
        """Bytes of the keys and values of all heads, packed, with their scales, per token and layer.

        Tokens kept in bf16 count as such, in a sequence of `tokens`.
        """
        exact = min(self.first + self.recent, self.tokens)
        coded = self.latent_bytes(key_dim) + self.for_values.latent_bytes(value_dim)
        whole = 2 * (key_dim + value_dim)
        return heads * (exact * whole + (self.tokens - exact) * coded) / self.tokens

    def fit(self, statistics: LayerStatistics) -> Self:
        """A copy for the layer that has these statistics."""
        fitted = copy(self)
        if self.is_standardised:
            fitted._centre, fitted._spread = statistics.mean, statistics.spread
            widest = statistics.rot_scale.max() if len(statistics.rot_scale) else 0.0
            fitted._rot_spread = statistics.rot_scale.clamp_min(max(float(widest) * SMALLEST_SPREAD, 1e-30))
            statistics = statistics.standardised()
        fitted.learn(statistics)
        return fitted

    def round_trip(self, latent: torch.Tensor, k_rot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows as they would be read back: latents [..., T, R] and rotated keys [..., T, P], same shapes and dtypes."""
        return self.read_back(latent), self._code_rot(k_rot.float()).to(k_rot.dtype)

    def read_back(self, latent: torch.Tensor) -> torch.Tensor:
        """Latents, or keys or values of one head [..., T, n], as they would be read back, same shape and dtype."""
        decoded = self.code((latent.float() - self._centre) / self._spread) * self._spread + self._centre
        return decoded.to(latent.dtype)

    def _code_rot(self, k_rot: torch.Tensor) -> torch.Tensor:
        if self.rot_bits == 16 or k_rot.shape[-1] == 0:
            return to_bf16(k_rot)
        return symmetric(k_rot / self._rot_spread, self.rot_bits) * self._rot_spread
