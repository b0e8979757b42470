"""Tiny random models with ordinary attention, one per architecture, by the name of its `model_type`."""

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel


VOCABULARY, POSITIONS, WINDOW = 128, 64, 8
WEIGHT_STD = 0.25  # the stock 0.02 makes attention uniform and logits deaf to it
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": True,
}
_MULTI_HEAD = {"num_key_value_heads": None}
_MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
# What differs from the sizes above; None: the setting is left out.
ORDINARY_MODELS: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "bitnet": {},
    "cohere2": _MIXED,
    "ernie4_5": {},
    "exaone4": _MIXED,
    "gemma": {},
    "gemma2": {"sliding_window": WINDOW, "query_pre_attn_scalar": 8},
    "gemma3_text": {**_MIXED, "query_pre_attn_scalar": 8},
    "glm4": {"partial_rotary_factor": 0.5},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS, **_MULTI_HEAD},
    "gpt_neox": {"rotary_pct": 0.5, **_MULTI_HEAD},
    "gpt_oss": {**_EXPERTS, "sliding_window": WINDOW},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, **_MULTI_HEAD},
    "granite": {},
    "helium": {},
    "hunyuan_v1_dense": {},
    "llama": {},
    "llama4_text": {
        "num_local_experts": 2,
        "intermediate_size_mlp": 48,
        "attention_chunk_size": 16,
        "no_rope_layers": [1, 0],
        "layer_types": ["chunked_attention", "full_attention"],
    },
    "ministral": {"sliding_window": WINDOW},
    "mistral": {"sliding_window": WINDOW},
    "mixtral": {**_EXPERTS, "sliding_window": None},
    "nemotron": {"partial_rotary_factor": 0.5},
    "olmo2": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, **_MULTI_HEAD},
    "persimmon": {"partial_rotary_factor": 0.5, **_MULTI_HEAD},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "seed_oss": {},
    "smollm3": {"no_rope_layers": [1, 0], "no_rope_layer_interval": 2},
    "stablelm": {"partial_rotary_factor": 0.5},
    "starcoder2": {"sliding_window": None},
}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "partial_rotary_factor": 0.5,
}
_STATE_SPACE = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
# Whose first layer is no attention but a state space, linear attention or a convolution, and keeps its stock cache.
HYBRID_MODELS: dict[str, dict[str, Any]] = {
    "granitemoehybrid": {
        **_STATE_SPACE,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "shared_intermediate_size": 16,
        "layer_types": ["mamba", "attention"],
    },
    "jamba": {
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "nemotron_h": {
        "hybrid_override_pattern": "M*",
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 1,
    },
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_text": _LINEAR,
    "qwen3_next": {
        **_LINEAR,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
}
# Whose layers are attention and a state space at once.
MERGED_MODELS: dict[str, dict[str, Any]] = {
    "falcon_h1": {**_STATE_SPACE, "mamba_n_heads": 4, "mamba_d_ssm": 32},
    "zamba2": {
        "mamba_d_state": 8,
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "hybrid_layer_ids": [1],
        "layers_block_type": ["mamba", "hybrid"],
    },
}
# Whose attention computes by itself, and what else they are built with.
REFUSED_MODELS: dict[str, dict[str, Any]] = {
    "bloom": {"n_layer": 2, "n_head": 4, **_MULTI_HEAD},
    "falcon": {"head_dim": None, "ffn_hidden_size": 48, "new_decoder_architecture": True, "num_kv_heads": 2},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, **_MULTI_HEAD},
}


# Releases in which an architecture began to look its attention function up by name.
SINCE = {"gptj": "5.24.0"}


def build_ordinary(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A model of the tables, always with the same weights."""
    if Version(transformers.__version__) < Version(SINCE.get(name, "0")):
        pytest.skip(f"{name} computes attention by itself before transformers {SINCE[name]}")
    if name not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    settings = {**_SIZES, **(ORDINARY_MODELS | HYBRID_MODELS | MERGED_MODELS | REFUSED_MODELS)[name], **changes}
    settings = {key: value for key, value in settings.items() if value is not None or key == "sliding_window"}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **settings), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=WEIGHT_STD)
    return model.to(dtype).eval()
