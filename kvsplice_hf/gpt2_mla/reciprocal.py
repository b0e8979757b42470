"""Reciprocal attention: heads that attend a second time, with the roles of queries and keys exchanged.

A head scores token `s` for token `t` by q_t . k_s. Exchanged, it scores by k_t . q_s, causally as before, and mixes the
same values. So it needs the queries of past tokens. Where queries are made from the latent that is cached, as keys are,
they are at hand: one latent serves, and the cache does not grow.

To attention, such a head is one more head: its query is the key of the new token, and its keys are rows of `kv_b_proj`
that make queries. So caches, splices and absorbed attention need to know nothing of it. A bias of queries is the same
for all `s` where roles are exchanged, and softmax ignores it. Rotated numbers keep their roles: they say where tokens
are, not what they hold.

Legend: `B` batch, `T` new tokens, `H` heads, `E` heads that also attend with roles exchanged, `R` kv_lora_rank,
`N` qk_nope_head_dim, `P` qk_rope_head_dim, `V` v_head_dim.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from kvsplice_hf.gpt2_mla.configuration import GPT2MLAConfig


class ReciprocalExpansion(nn.Module):
    """The `kv_b_proj` of a layer with reciprocal attention: H heads of keys and values, then E of queries and values.

    To its callers it is a plain linear layer without bias. Its weight [(H + E) * (N + V), R] is put together when it is
    read, so that the E heads share their parameters with the first E of the H.

    Args:
        expansion: what makes keys and values of H heads from the latent.
        config: the settings.
        exchanged: E.
    """

    forward = nn.Linear.forward

    def __init__(self, expansion: nn.Module, config: GPT2MLAConfig, exchanged: int) -> None:
        super().__init__()
        self.num_heads, self.exchanged, self.key_dim = config.n_head, exchanged, config.qk_nope_head_dim
        self.expansion = expansion
        query_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
        self.queries = nn.Linear(config.kv_lora_rank, config.n_head * query_dim)
        head_dim = config.qk_nope_head_dim + config.v_head_dim
        self.in_features, self.out_features = config.kv_lora_rank, (config.n_head + exchanged) * head_dim
        self.register_parameter("bias", None)

    def _by_head(self, layer: Any) -> torch.Tensor:
        weight: torch.Tensor = layer.weight
        return weight.view(self.num_heads, -1, self.in_features)

    @property
    def weight(self) -> torch.Tensor:
        own = self._by_head(self.expansion)
        queries = self._by_head(self.queries)[: self.exchanged, : self.key_dim]
        exchanged = torch.cat([queries, own[: self.exchanged, self.key_dim :]], dim=1)
        return torch.cat([own, exchanged]).flatten(0, 1)

    def keys_in_place_of_queries(self, latent: torch.Tensor) -> torch.Tensor:
        """What the E heads ask with: keys [B, E, T, N] of the latents [B, 1, T, R] of the new tokens."""
        weight = self._by_head(self.expansion)[: self.exchanged, : self.key_dim].flatten(0, 1)
        return F.linear(latent[:, 0], weight).unflatten(-1, (self.exchanged, self.key_dim)).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, exchanged={self.exchanged}"


class ReciprocalMix(nn.Module):
    """Adds what E heads give with roles exchanged to what they give without.

    Without fixed weights the branch is brought to unit size and mixed in by the tanh of a parameter that starts at
    zero, so that training starts from plain attention. With a fixed weight w it is (1 - w) and w.

    Parameters: `gate` [E], where there is no fixed weight.
    """

    def __init__(self, config: GPT2MLAConfig, exchanged: int) -> None:
        super().__init__()
        self.num_heads, self.exchanged = config.n_head, exchanged
        self.fixed, self.eps = config.reciprocal_weight, config.layer_norm_epsilon
        self.gate: nn.Parameter | None = None
        if self.fixed is None:
            self.gate = nn.Parameter(torch.zeros(exchanged))

    def forward(self, mixed: torch.Tensor) -> torch.Tensor:
        """Outputs [B, T, H, V] of those of all heads, [B, T, H + E, V]."""
        own, branch = mixed.split([self.num_heads, self.exchanged], dim=2)
        both, alone = own.split([self.exchanged, self.num_heads - self.exchanged], dim=2)
        if self.fixed is not None:
            both = torch.lerp(both, branch, self.fixed)
        elif self.gate is not None:
            both = both + self.gate.tanh()[:, None] * F.rms_norm(branch, branch.shape[-1:], eps=self.eps)
        return torch.cat([both, alone], dim=2)
