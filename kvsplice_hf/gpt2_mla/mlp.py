"""The MLPs of GPT-2 with Multi-head Latent Attention: GPT-2's own, one in a smaller space, and a reciprocal one.

Legend: `B` batch, `T` new tokens, `D` n_embd, `I` hidden width, `A` hidden units that the attention feeds.
"""

from types import SimpleNamespace

import torch
from torch import nn
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.pytorch_utils import Conv1D

from kvsplice_hf.gpt2_mla.configuration import GPT2MLAConfig


class GPT2MLAReciprocalMLP(GPT2MLP):
    """GPT-2's MLP, a share of whose hidden units read the attention output of the block, not the hidden state.

    It is as wide as GPT-2's and has as many parameters. (Experimental; the reciprocal MLP of the research.)
    """

    def __init__(self, intermediate_size: int, fed_by_attention: int, config: GPT2MLAConfig | SimpleNamespace) -> None:
        super().__init__(intermediate_size, config)
        self.c_fc = Conv1D(intermediate_size - fed_by_attention, config.hidden_size)
        self.c_attention = Conv1D(fed_by_attention, config.hidden_size)

    def forward(  # type: ignore[override]  # it reads two things
        self, hidden_states: torch.Tensor, attention_output: torch.Tensor
    ) -> torch.Tensor:
        """[B, T, D] of normalised hidden states and attention outputs, both [B, T, D]."""
        hidden = torch.cat([self.c_fc(hidden_states), self.c_attention(attention_output)], dim=-1)
        return self.dropout(self.c_proj(self.act(hidden)))


class GPT2MLALatentMLP(nn.Module):
    """GPT-2's MLP in a smaller space: one projection leads into it, and its transpose out again."""

    def __init__(self, config: GPT2MLAConfig) -> None:
        super().__init__()
        width = config.mlp_latent_dim
        assert width is not None
        self.latent_proj = nn.Linear(config.n_embd, width, bias=False)
        inner = SimpleNamespace(
            hidden_size=width, activation_function=config.activation_function, resid_pdrop=config.resid_pdrop
        )
        self.mlp = _of_width(config, inner)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """[B, T, D] of what the MLP inside takes, [B, T, D] each."""
        return self.mlp(*(self.latent_proj(states) for states in inputs)) @ self.latent_proj.weight


def mlp_of(config: GPT2MLAConfig) -> nn.Module:
    """The MLP of a block; with `reciprocal_mlp` it takes the normalised attention output as a second argument."""
    return _of_width(config, config) if config.mlp_latent_dim is None else GPT2MLALatentMLP(config)


def _of_width(config: GPT2MLAConfig, inner: GPT2MLAConfig | SimpleNamespace) -> GPT2MLP:
    fed = config.fed_by_attention()
    if fed:
        return GPT2MLAReciprocalMLP(config.mlp_width(), fed, inner)
    return GPT2MLP(config.mlp_width(), inner)
