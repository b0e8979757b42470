"""Tiny random models with ordinary attention, one per architecture, by the name of its `model_type`."""

import inspect
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel


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
# The last two of four layers read keys and values of the first two.
_SHARED = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "sliding_window": WINDOW,
    "layer_types": 2 * ["sliding_attention", "full_attention"],
}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
# What differs from the sizes above; None: the setting is left out.
ORDINARY_MODELS: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "bitnet": {},
    "cohere2": _MIXED,
    "ernie4_5": {},
    "exaone4": _MIXED,
    "falcon": {"head_dim": None, "ffn_hidden_size": 48, "multi_query": True, **_MULTI_HEAD},
    "gemma": {},
    "gemma2": {"sliding_window": WINDOW, "query_pre_attn_scalar": 8},
    "gemma3_text": {**_MIXED, "query_pre_attn_scalar": 8},
    "gemma3n_text": {
        **_SHARED,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": None,
    },
    "gemma4_text": {
        **_SHARED,
        "global_head_dim": 16,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
    },
    "glm4": {"partial_rotary_factor": 0.5},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS, **_MULTI_HEAD},
    "gpt_bigcode": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS, **_MULTI_HEAD},
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
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, **_MULTI_HEAD},
}


IMAGE_TOKEN = 3  # stands for a part of an image in a prompt
_VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
_VISION |= {"image_size": 8, "patch_size": 4}
_QWEN_VISION = {"depth": 1, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
# Positions along three axes: time, height and width.
_THREE_AXES = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}}
_QWEN = {"video_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6}
# Models of images and text: their vision tower, what differs in their text part, and what else they are built with.
MULTIMODAL_MODELS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {**_MIXED, "query_pre_attn_scalar": 8},
        "vision_config": {"model_type": "siglip_vision_model", **_VISION},
        "mm_tokens_per_image": 4,
        "boi_token_index": 4,
        "eoi_token_index": 5,
    },
    "llava": {
        "text_config": {"model_type": "llama"},
        "vision_config": {"model_type": "clip_vision_model", **_VISION, "projection_dim": 16},
        "image_seq_length": 4,
    },
    "mistral3": {
        "text_config": {"model_type": "mistral", "sliding_window": None},
        "vision_config": {"model_type": "pixtral", **_VISION, "head_dim": 8},
        "spatial_merge_size": 1,
    },
    "qwen2_5_vl": {
        "text_config": _THREE_AXES,
        "vision_config": {
            **_QWEN_VISION,
            "hidden_size": 16,
            "intermediate_size": 24,
            "out_hidden_size": 32,
            "window_size": 16,
            "fullatt_block_indexes": [0],
        },
        **_QWEN,
    },
    "qwen2_vl": {
        "text_config": _THREE_AXES,
        "vision_config": {**_QWEN_VISION, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
        **_QWEN,
    },
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
    return _random(AutoModelForCausalLM, AutoConfig.for_model(name, **settings), dtype)


def build_multimodal(name: str) -> PreTrainedModel:
    """A model of images and text, always with the same weights."""
    settings = {"image_token_id": IMAGE_TOKEN, **MULTIMODAL_MODELS[name]}
    settings["text_config"] = {**_SIZES, **settings["text_config"]}
    return _random(AutoModelForImageTextToText, AutoConfig.for_model(name, **settings), torch.float32)


def with_image(model: PreTrainedModel, ids: torch.Tensor, start: int = 2) -> dict[str, Any]:
    """A prompt [B, T] with an image in each sequence, from place `start` on, as the model takes it."""
    ids, count, noise = ids.clone(), len(ids), torch.Generator().manual_seed(3)
    kind = model.config.model_type
    if kind.startswith("qwen"):  # patches side by side, of two times, four of which make one token
        ids[:, start], ids[:, start + 1], ids[:, start + 2] = 5, IMAGE_TOKEN, 6
        inputs = {"pixel_values": torch.randn(4 * count, 2 * 3 * 16, generator=noise)}
        inputs["image_grid_thw"] = torch.tensor([[1, 2, 2]] * count)
    else:
        ids[:, start : start + 4] = IMAGE_TOKEN
        inputs = {"pixel_values": torch.randn(count, 3, 8, 8, generator=noise)}
    places = (ids == IMAGE_TOKEN).int()
    known = inspect.signature(type(model).forward).parameters
    may_need = {"image_sizes": torch.tensor([[8, 8]] * count), "token_type_ids": places, "mm_token_type_ids": places}
    wanted = {"mistral3": ["image_sizes"], "gemma3": ["token_type_ids"]}.get(kind, ["mm_token_type_ids"])
    return {"input_ids": ids, **inputs, **{key: may_need[key] for key in wanted if key in known}}


def _random(kind: Any, config: Any, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    model = kind.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=WEIGHT_STD)
    return model.to(dtype).eval()
