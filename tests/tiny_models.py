"""Tiny random models for every transformers module with Multi-head Latent Attention.

One table, `TINY_MODELS`; `build` makes a model from it and `tiny_batch` a left-padded batch for that model. Every kind
of layer occurs, the rank and the three head sizes (nope, rope, value) all differ, and a forward pass takes
milliseconds on one CPU core.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import PreTrainedModel


FIRST_ORDINARY_TOKEN = 8  # ids below are left to padding and to image, video and audio placeholders
PAD_TOKEN = 0
WEIGHT_STD = 0.25  # the stock 0.02 makes attention uniform and logits deaf to it

_PLACEHOLDERS = {
    "image_token_id": 1,
    "video_token_id": 2,
    "image_start_token_id": 3,
    "image_end_token_id": 4,
    "video_start_token_id": 5,
    "video_end_token_id": 6,
}
_BASE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "max_position_embeddings": 512,
    "pad_token_id": PAD_TOKEN,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
_MOE = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
}
_FIRST_DENSE = {"first_k_dense_replace": 1}  # layer 0 has a dense MLP, the others have experts
# With few indexer heads many scores are exactly 0 (ReLU), and which of several equals the top-k takes depends on the
# number of keys: a stock model then disagrees with itself with and without a cache. Eight heads leave no such ties.
_DSA = {"index_topk": 8, "index_n_heads": 8, "index_head_dim": 16}
_LINEAR = ["linear_attention", "full_attention", "linear_attention", "full_attention"]


def _without(kwargs: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name not in names}


@dataclass(frozen=True)
class TinyModel:
    """How to build one tiny model, and which of its layers keep a latent.

    `mla_layers` are the cache indices (`layer_idx`) of modules that store a latent, `reuse_layers` those of modules
    that expand another layer's latent. `is_dsa`: some layer has a sparse-attention indexer. `is_hybrid`: some layer is
    linear attention. `is_sliding`: some layer has a sliding window.
    """

    name: str
    causal_lm: str
    config_class: str
    kwargs: dict[str, Any] = field(repr=False, hash=False)
    mla_layers: tuple[int, ...] = (0, 1)
    reuse_layers: tuple[int, ...] = ()
    is_dsa: bool = False
    is_hybrid: bool = False
    is_sliding: bool = False
    supports_sdpa: bool = True

    @property
    def available(self) -> bool:
        """Whether the installed transformers has this model."""
        return hasattr(transformers, self.causal_lm) and hasattr(transformers, self.config_class)

    @property
    def caches_latents(self) -> bool:
        """Whether the installed transformers caches latents for it: with an indexer, only from 5.18 on."""
        return not self.is_dsa or Version(transformers.__version__) >= Version("5.18.0")


_MODELS = (
    TinyModel("axk1", "AXK1ForCausalLM", "AXK1Config", _BASE | _MOE | _FIRST_DENSE),
    TinyModel("axk2", "AXK2ForCausalLM", "AXK2Config", _BASE | _MOE | _DSA | _FIRST_DENSE, is_dsa=True),
    TinyModel(
        "bailing_hybrid",
        "BailingHybridForCausalLM",
        "BailingHybridConfig",
        _without(_BASE, "q_lora_rank")
        | _without(_MOE, "n_routed_experts")
        | _FIRST_DENSE
        | {"num_hidden_layers": 4, "num_local_experts": 4, "head_dim": 16, "layer_types": _LINEAR},
        mla_layers=(1, 3),
        is_hybrid=True,
    ),
    TinyModel(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        "DeepseekV2Config",
        _BASE | _MOE | _FIRST_DENSE | {"n_group": None, "topk_group": None},
    ),
    TinyModel(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        _BASE | _MOE | _FIRST_DENSE | {"q_lora_rank": None},
    ),
    TinyModel(
        "deepseek_v32", "DeepseekV32ForCausalLM", "DeepseekV32Config", _BASE | _MOE | _DSA | _FIRST_DENSE, is_dsa=True
    ),
    TinyModel(
        "dots3_note",
        "Dots3NoteForCausalLM",
        "Dots3NoteTextConfig",
        _BASE
        | _MOE
        | _DSA
        | _FIRST_DENSE
        | {
            "num_hidden_layers": 4,
            "layer_types": ["indexed_attention", "sliding_attention", "full_attention", "sliding_attention"],
            "use_dsa": None,  # otherwise "full_attention" is rewritten
            "sliding_window": 6,
            "shared_experts_intermediate_size": 32,
            "head_dim": 24,
            "swa_num_attention_heads": 2,
            "swa_num_key_value_heads": 2,
            "swa_q_lora_rank": 20,
            "swa_kv_lora_rank": 48,
            "swa_head_dim": 32,
            "swa_qk_nope_head_dim": 20,
            "swa_v_head_dim": 16,
        },
        mla_layers=(0, 1, 2, 3),
        is_dsa=True,
        is_sliding=True,
    ),
    TinyModel(
        "glm4_moe_lite",
        "Glm4MoeLiteForCausalLM",
        "Glm4MoeLiteConfig",
        _BASE | _MOE | {"v_head_dim": 20, "mlp_layer_types": ["dense", "sparse"]},
    ),
    TinyModel(
        "glm5_next",
        "Glm5NextForConditionalGeneration",
        "Glm5NextConfig",
        {
            "text_config": _BASE
            | _MOE
            | _DSA
            | {
                "num_hidden_layers": 4,
                "qk_rope_head_dim": 0,
                "index_kpool": 2,
                "linear_head_dim": 16,
                "linear_num_heads": 2,
                "hc_mult": 2,
                "layer_types": ["linear_attention", "indexed_attention", "indexed_attention", "linear_attention"],
                "indexer_types": ["full", "full", "shared", "full"],  # a shared layer must follow a full one directly
                "mlp_layer_types": ["dense", "sparse", "dense", "sparse"],
            },
            "vision_config": {
                "depth": 1,
                "hidden_size": 16,
                "num_heads": 2,
                "intermediate_size": 16,
                "out_hidden_size": 64,
                "projection_intermediate_size": 16,
                "image_size": 28,
            },
        }
        | _PLACEHOLDERS,
        mla_layers=(1, 2),
        is_dsa=True,
        is_hybrid=True,
    ),
    TinyModel(
        "glm_moe_dsa",
        "GlmMoeDsaForCausalLM",
        "GlmMoeDsaConfig",
        _BASE
        | _MOE
        | _DSA
        | _FIRST_DENSE
        | {"num_hidden_layers": 3, "v_head_dim": 20, "indexer_types": ["full", "shared", "full"]},
        mla_layers=(0, 1, 2),
        is_dsa=True,
    ),
    TinyModel(
        "hy_v4",
        "HYV4ForCausalLM",
        "HYV4Config",
        _BASE
        | _MOE
        | _DSA
        | {
            "num_hidden_layers": 3,
            "hc_mult": 2,
            "indexer_types": ["full", "shared", "full"],
            "mlp_layer_types": ["dense", "sparse", "dense"],
        },
        mla_layers=(0, 1, 2),
        is_dsa=True,
        supports_sdpa=False,
    ),
    TinyModel(
        "hy_v4_vl",
        "HYV4VLForConditionalGeneration",
        "HYV4VLConfig",
        {
            "text_config": _BASE
            | _MOE
            | _DSA
            | {
                "num_hidden_layers": 3,
                "hc_mult": 2,
                "indexer_types": ["full", "shared", "full"],
                "mlp_layer_types": ["dense", "sparse", "dense"],
                # Time, height and width share the rotated pairs.
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
            },
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "out_hidden_size": 64,
                "max_image_size": 32,
            },
            "image_token_id": _PLACEHOLDERS["image_token_id"],
            "video_token_id": _PLACEHOLDERS["video_token_id"],
        },
        mla_layers=(0, 1, 2),
        is_dsa=True,
        supports_sdpa=False,
    ),
    TinyModel(
        "kimi_linear",
        "KimiLinearForCausalLM",
        "KimiLinearConfig",
        _BASE
        | _without(_MOE, "n_routed_experts")
        | {
            "num_hidden_layers": 4,
            "num_local_experts": 4,
            "q_lora_rank": None,
            "linear_head_dim": 16,
            "linear_num_heads": 2,
            "layer_types": _LINEAR,
            "mlp_layer_types": ["dense", "sparse", "dense", "sparse"],
        },
        mla_layers=(1, 3),
        is_hybrid=True,
    ),
    TinyModel(
        "longcat_flash",
        "LongcatFlashForCausalLM",
        "LongcatFlashConfig",
        _without(_BASE, "num_hidden_layers", "intermediate_size")
        | {
            "num_layers": 2,  # two attentions each
            "ffn_hidden_size": 96,
            "expert_ffn_hidden_size": 32,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
            "moe_topk": 2,
            "head_dim": 8,
        },
        mla_layers=(0, 1, 2, 3),
    ),
    TinyModel("minicpm3", "MiniCPM3ForCausalLM", "MiniCPM3Config", _BASE | {"dim_model_base": None}),
    TinyModel(
        "mistral4",
        "Mistral4ForCausalLM",
        "Mistral4Config",
        _BASE
        | _MOE
        | _FIRST_DENSE
        | {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 64.0,
                "original_max_position_embeddings": 8,  # queries are rescaled from position 8 on
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            }
        },
    ),
    TinyModel(
        "mistral_large4",
        "MistralLarge4ForConditionalGeneration",
        "MistralLarge4Config",
        {
            "text_config": _without(_BASE, "q_lora_rank")
            | _MOE
            | _DSA
            | _FIRST_DENSE
            | {
                "num_hidden_layers": 4,
                "no_rope_layers": [1, 0, 1, 0],  # 1 means: with RoPE
                "kv_source_layers": [0, 1, 0, 1],
                "indexer_types": ["full", "shared", "shared", "full"],
            },
            "vision_config": {
                "model_type": "pixtral",
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "patch_size": 14,
                "image_size": 28,
            },
            "image_token_index": _PLACEHOLDERS["image_token_id"],
        },
        mla_layers=(0, 1),
        reuse_layers=(2, 3),
        is_dsa=True,
    ),
    TinyModel("youtu", "YoutuForCausalLM", "YoutuConfig", _BASE),
)

TINY_MODELS: dict[str, TinyModel] = {model.name: model for model in sorted(_MODELS, key=lambda model: model.name)}


@torch.no_grad()
def sharpen(model: PreTrainedModel) -> None:
    """Redraw the attention weights (and those that carry their effect to the logits) so that attention is selective.

    Attention sinks and position-dependent query scales start at values that do nothing; they are redrawn as well.
    """
    for name, parameter in model.named_parameters():
        is_attention_matrix = ".self_attn." in name and parameter.ndim == 2
        if is_attention_matrix or name.endswith(("lm_head.weight", "sinks")):
            nn.init.normal_(parameter, std=WEIGHT_STD)
        elif name.endswith("softmax_scaling.scale"):
            nn.init.uniform_(parameter, 0.0, 0.1)


def build(
    name: str, dtype: torch.dtype = torch.float32, seed: int = 0, needs_latent_cache: bool = True
) -> PreTrainedModel:
    """The tiny model `name` with random weights, in eval mode on the CPU. The global random state is left alone.

    Skips the calling test where the installed transformers lacks the model, or does not cache its latents.
    """
    spec = TINY_MODELS[name]
    if not spec.available:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    if needs_latent_cache and not spec.caches_latents:
        pytest.skip(f"transformers {transformers.__version__} caches no latents for {name}")
    config = getattr(transformers, spec.config_class)(**copy.deepcopy(spec.kwargs))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, spec.causal_lm)(config)
        sharpen(model)
    return model.to(dtype).eval()


def tiny_batch(
    model_or_name: PreTrainedModel | str, batch: int = 2, length: int = 12, seed: int = 0, pad: int = 3
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(input_ids, attention_mask)`, both int64 `[batch, length]`; the second row begins with `pad` masked positions.

    The ids need no processor: none of them is a padding or placeholder id, except at masked positions.
    """
    if isinstance(model_or_name, str):
        kwargs = TINY_MODELS[model_or_name].kwargs
        vocab_size = kwargs.get("text_config", kwargs)["vocab_size"]
    else:
        vocab_size = model_or_name.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(FIRST_ORDINARY_TOKEN, vocab_size, (batch, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    input_ids[1:2, :pad] = PAD_TOKEN
    attention_mask[1:2, :pad] = 0
    return input_ids, attention_mask
