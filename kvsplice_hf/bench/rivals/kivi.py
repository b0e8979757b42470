"""Integers with a scale and a zero per group of tokens, channel by channel."""

import functools
import math
from dataclasses import dataclass

import torch

from kvsplice_hf.bench.rivals.base import Rival
from kvsplice_hf.bench.rivals.integers import IntegerPerToken
from kvsplice_hf.bench.rivals.rounding import affine, in_groups, to_bf16


@dataclass(kw_only=True)
class IntegerPerChannel(Rival):
    """Integers with a bf16 scale and zero per channel and group of tokens, as KIVI codes keys.

    Tokens that do not fill a group stay in bf16. KIVI also keeps the last tokens before each query exact; here, as for
    all others, a query reads every token as it is stored in the end.
    """

    bits: int = 4
    group: int = 32

    @property
    def label(self) -> str:
        return f"kivi{self.bits}-t{self.group}"

    @property
    def for_values(self) -> Rival:
        return IntegerPerToken(bits=self.bits, group=self.group)

    def latent_bytes(self, latent_dim: int) -> float:
        whole = self.tokens // self.group * self.group
        row = math.ceil(latent_dim * self.bits / 8) + 4 * latent_dim / self.group
        return (whole * row + (self.tokens - whole) * 2 * latent_dim) / self.tokens

    def code(self, latent: torch.Tensor) -> torch.Tensor:
        whole = latent.shape[-2] // self.group * self.group
        channels = latent[..., :whole, :].transpose(-1, -2)
        coded = in_groups(channels, self.group, functools.partial(affine, bits=self.bits)).transpose(-1, -2)
        return torch.cat([coded, to_bf16(latent[..., whole:, :])], dim=-2)
