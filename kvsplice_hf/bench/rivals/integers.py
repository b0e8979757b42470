"""Integers with a scale and a zero per group of neighbouring channels, token by token."""

import functools
import math
from dataclasses import dataclass

import torch

from kvsplice_hf.bench.rivals.base import Rival
from kvsplice_hf.bench.rivals.rounding import affine, in_groups


@dataclass(kw_only=True)
class IntegerPerToken(Rival):
    """Integers in groups of neighbouring channels of a token, with a bf16 scale and zero per group."""

    bits: int = 4
    group: int = 32

    @property
    def label(self) -> str:
        return f"int{self.bits}-g{self.group}"

    def latent_bytes(self, latent_dim: int) -> float:
        return math.ceil(latent_dim * self.bits / 8) + 4 * math.ceil(latent_dim / self.group)

    def code(self, latent: torch.Tensor) -> torch.Tensor:
        return in_groups(latent, self.group, functools.partial(affine, bits=self.bits))
