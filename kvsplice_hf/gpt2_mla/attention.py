"""The attention of GPT-2 with Multi-head Latent Attention.

It follows the convention of the MLA modules of transformers, which `kvsplice_hf.patch.mla` looks for: the cache gets
the latent and the rotated key, `expand_kv` makes keys and values of them. So `patch_model_with_kvsplice` needs to know
nothing of this model. Eager attention is that of transformers' GPT-2.

Legend: `B` batch, `T` new tokens, `S` cached tokens, `D` n_embd, `H` heads, `E` heads that also attend with the roles
of queries and keys exchanged (`reciprocal`), `R` kv_lora_rank, `P` qk_rope_head_dim, `N` qk_nope_head_dim,
`V` v_head_dim.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2.modeling_gpt2 import eager_attention_forward
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kvsplice_hf.gpt2_mla.configuration import GPT2MLAConfig
from kvsplice_hf.gpt2_mla.reciprocal import ReciprocalExpansion, ReciprocalMix
from kvsplice_hf.upstream import given_cache


Angles = tuple[torch.Tensor, torch.Tensor]


def rotary_angles(position_ids: torch.Tensor, dim: int, theta: float, dtype: torch.dtype) -> Angles:
    """Cosines and sines [B, T, P] of the angles at `position_ids` [B, T]; the second half repeats the first."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=position_ids.device) / dim
    angles = (position_ids[..., None].float() * theta**-exponents).repeat(1, 1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


class SeparateExpansion(nn.Module):
    """The `kv_b_proj` of separate latents: keys from the first half of the latent, values from the second.

    To its callers it is a plain linear layer without bias. Its weight [H * (N + V), R] is put together from the two
    halves when it is read, so that absorbed attention folds it like any other.

    Parameters: `key_weight` [H, N, R / 2] and `value_weight` [H, V, R / 2].
    """

    forward = nn.Linear.forward

    def __init__(self, latent_dim: int, num_heads: int, key_dim: int, value_dim: int) -> None:
        super().__init__()
        self.in_features, self.out_features = latent_dim, num_heads * (key_dim + value_dim)
        self.key_weight = nn.Parameter(torch.empty(num_heads, key_dim, latent_dim // 2))
        self.value_weight = nn.Parameter(torch.empty(num_heads, value_dim, latent_dim // 2))
        self.register_parameter("bias", None)

    @property
    def weight(self) -> torch.Tensor:
        half = self.key_weight.shape[-1]
        return torch.cat([F.pad(self.key_weight, (0, half)), F.pad(self.value_weight, (half, 0))], dim=1).flatten(0, 1)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class GPT2MLAAttention(nn.Module):
    """Multi-head Latent Attention. What is cached per token is the latent (R numbers) and the rotated key (P numbers).

    There are no biases on the way to keys and values: softmax ignores one on the keys, and one on the values is a bias
    of the output.
    """

    def __init__(self, config: GPT2MLAConfig, layer_idx: int) -> None:
        super().__init__()
        exchanged = config.reciprocal_heads_of(layer_idx)
        # To everything that asks, those that attend twice are two heads.
        self.config, self.layer_idx, self.num_heads = config, layer_idx, config.n_head + exchanged
        self.kv_lora_rank, self.q_lora_rank = config.kv_lora_rank, config.q_lora_rank
        self.qk_rope_head_dim, self.qk_nope_head_dim = config.qk_rope_head_dim, config.qk_nope_head_dim
        self.v_head_dim, self.is_causal = config.v_head_dim, True
        self.qk_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        self.scaling = self.qk_head_dim**-0.5
        self.attn_pdrop = config.attn_pdrop
        self._add_query_path(config, exchanged)
        self._add_latent_path(config, exchanged)
        self.reciprocal = ReciprocalMix(config, exchanged) if exchanged else None
        self.o_proj = nn.Linear(config.n_head * self.v_head_dim, config.n_embd)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def _add_query_path(self, config: GPT2MLAConfig, exchanged: int) -> None:
        size = config.n_head * self.qk_head_dim
        if exchanged:  # `kv_b_proj` makes queries as well
            return
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(config.kv_lora_rank if config.queries_from_latent else config.n_embd, size)
            return
        self.q_a_proj = nn.Linear(config.n_embd, config.q_lora_rank, bias=False)
        self.q_a_layernorm = _latent_norm(config, config.q_lora_rank)
        self.q_b_proj = nn.Linear(config.q_lora_rank, size)

    def _add_latent_path(self, config: GPT2MLAConfig, exchanged: int) -> None:
        R, N, V = self.kv_lora_rank, self.qk_nope_head_dim, self.v_head_dim
        self.kv_a_mlp: nn.Module | None = None
        if config.kv_latents == "separate_mlp":
            self.kv_a_mlp = nn.Sequential(nn.Linear(config.n_embd, config.n_embd), ACT2FN[config.activation_function])
        self.kv_a_proj = nn.Linear(config.n_embd, R + self.qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = _latent_norm(config, R)
        self.kv_b_proj: nn.Module
        if config.kv_latents == "shared":
            self.kv_b_proj = nn.Linear(R, config.n_head * (N + V), bias=False)
        else:
            self.kv_b_proj = SeparateExpansion(R, config.n_head, N, V)
        if exchanged:
            self.kv_b_proj = ReciprocalExpansion(self.kv_b_proj, config, exchanged)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        position_embeddings: Angles | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of hidden states [B, T, D] over themselves and what is cached.

        The cache comes as `cache`, or as `past_key_values` with transformers up to 5.23.

        Returns:
            [B, T, D], and the attention weights [B, H + E, T, S] where the attention function gives them.
        """
        batch, tokens = hidden_states.shape[:2]
        latent, k_rot = self._latents(hidden_states)
        query = self._queries(latent[:, 0] if self.config.queries_from_latent else hidden_states)
        if position_embeddings is not None:
            q_nope, q_rot = query.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
            q_rot, k_rot = apply_rotary_pos_emb(q_rot, k_rot, *position_embeddings)
            query = torch.cat([q_nope, q_rot], dim=-1)
        if self.reciprocal is not None:
            query = self._with_exchanged(query, latent)
        cache = given_cache(cache, past_key_values)
        if cache is not None:
            latent, k_rot = cache.update(latent, k_rot, self.layer_idx)
        key, value = self.expand_kv(latent, k_rot)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attn_pdrop if self.training else 0.0
        mixed, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        if self.reciprocal is not None:
            mixed = self.reciprocal(mixed)
        output = self.o_proj(mixed.reshape(batch, tokens, -1))
        return self.resid_dropout(output), weights

    def expand_kv(self, kv_nope: torch.Tensor, k_rot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [B, H + E, S, N + P] and values [B, H + E, S, V] of latents [B, 1, S, R], rotated keys [B, 1, S, P]."""
        batch, _, length, _ = kv_nope.shape
        sizes = [self.qk_nope_head_dim, self.v_head_dim]
        expanded = self.kv_b_proj(kv_nope).view(batch, length, self.num_heads, sum(sizes)).transpose(1, 2)
        key, value = expanded.split(sizes, dim=-1)
        if self.qk_rope_head_dim:
            key = torch.cat([key, k_rot.expand(-1, self.num_heads, -1, -1)], dim=-1)
        return key, value

    def _queries(self, states: torch.Tensor) -> torch.Tensor:
        """[B, H, T, N + P], not rotated, of hidden states [B, T, D], or of the latents [B, T, R] that make queries."""
        if self.reciprocal is not None:
            query = self.kv_b_proj.queries(states)  # type: ignore[operator]
        elif self.q_lora_rank is None:
            query = self.q_proj(states)
        else:
            query = self.q_a_proj(states)
            query = self.q_b_proj(query if self.q_a_layernorm is None else self.q_a_layernorm(query))
        return query.view(*states.shape[:2], -1, self.qk_head_dim).transpose(1, 2)

    def _with_exchanged(self, query: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        """Queries [B, H + E, T, N + P]: behind those of H heads, keys where E of them ask with roles exchanged."""
        expansion: Any = self.kv_b_proj
        keys = expansion.keys_in_place_of_queries(latent)
        rotated = query[:, : expansion.exchanged, :, self.qk_nope_head_dim :]
        return torch.cat([query, torch.cat([keys, rotated], dim=-1)], dim=1)

    def _latents(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents [B, 1, T, R], and keys that are not rotated yet [B, 1, T, P]."""
        if self.kv_a_mlp is not None:
            hidden_states = self.kv_a_mlp(hidden_states)
        latent, k_rot = self.kv_a_proj(hidden_states).split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        if self.kv_a_layernorm is not None:
            latent = self.kv_a_layernorm(latent)
        return latent.unsqueeze(1), k_rot.unsqueeze(1)  # one head, as cache layers expect


def _latent_norm(config: GPT2MLAConfig, size: int) -> nn.Module | None:
    return nn.RMSNorm(size, eps=config.layer_norm_epsilon) if config.latent_norm else None
