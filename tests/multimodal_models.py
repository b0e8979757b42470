"""Tiny random models of images and text with Multi-head Latent Attention, and prompts with images for them.

Those with ordinary attention are in `ordinary_models`.
"""

import inspect
from typing import Any

import pytest
import torch
import transformers
from ordinary_models import IMAGE_TOKEN, MULTIMODAL_MODELS, build_multimodal
from ordinary_models import with_image as with_ordinary_image
from tiny_models import TINY_MODELS, build, sharpen
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageTextToText, PreTrainedModel


_TEXT = {**TINY_MODELS["deepseek_v3"].kwargs, "model_type": "deepseek_v3", "first_k_dense_replace": 2}
_PIXTRAL = TINY_MODELS["mistral_large4"].kwargs["vision_config"]
# Models of which the vision tower is one and the text part another, and what they are built with.
_COMPOSED: dict[str, dict[str, Any]] = {
    "kimi_k25": {
        "text_config": _TEXT,
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "patch_size": 4,
            "pos_emb_height": 4,
            "pos_emb_width": 4,
        },
        "projection_hidden_size": 16,
        "image_token_id": 1,
        "video_token_id": 2,
        "vision_start_token_id": 3,
        "vision_end_token_id": 4,
        "tie_word_embeddings": False,
    },
    # Of Mistral Small 4.
    "mistral3": {
        "text_config": {**TINY_MODELS["mistral4"].kwargs, "model_type": "mistral4"},
        "vision_config": {**_PIXTRAL, "patch_size": 4, "image_size": 8, "head_dim": 8},
        "spatial_merge_size": 1,
        "image_token_id": 1,
    },
    "llava": {
        "text_config": _TEXT,
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
            "projection_dim": 16,
        },
        "image_seq_length": 4,
        "image_token_id": 1,
    },
    "mistral_large4": {
        **TINY_MODELS["mistral_large4"].kwargs,
        "vision_config": {**_PIXTRAL, "patch_size": 7},  # an image of one part breaks in stock transformers
    },
    "dots3_note": {
        "text_config": TINY_MODELS["dots3_note"].kwargs,
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "patch_size": 4,
            "mlp_layer_types": ["dense"],
            "adapter_in_dim": 16,
            "adapter_out_dim": 64,
        },
        "audio_config": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "downsample_hidden_size": 8,
            "adapter_input_size": 16,
            "adapter_out_dim": 64,
        },
        "image_token_id": 1,
        "video_token_id": 2,
        "audio_token_id": 3,
    },
}
# Of the table of models with latent attention, those that see images.
_OF_THE_TABLE = ("glm5_next", "hy_v4_vl")
# By the name under which tests know them.
LATENT_MODELS = {**{name: name for name in _OF_THE_TABLE}, **{f"{name} on latents": name for name in _COMPOSED}}
ALL_MODELS = [*MULTIMODAL_MODELS, *LATENT_MODELS]


def build_with_images(name: str) -> PreTrainedModel:
    """A model of `ALL_MODELS`, always with the same weights."""
    if name in MULTIMODAL_MODELS:
        return build_multimodal(name)
    kind = LATENT_MODELS[name]
    if kind in _OF_THE_TABLE:
        return build(kind)
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **_COMPOSED[kind]))
    with torch.no_grad():
        for parameter in model.parameters():  # some are left empty where nothing is loaded
            torch.nn.init.normal_(parameter, std=0.1) if parameter.dim() > 1 else None
    sharpen(model)
    return model.float().eval()


def placeholder_of(name: str) -> int:
    """The token that stands for a part of an image."""
    return IMAGE_TOKEN if name in MULTIMODAL_MODELS else 1


def with_image(name: str, model: PreTrainedModel, ids: torch.Tensor, start: int = 2) -> dict[str, Any]:
    """A prompt [B, T] with an image in each sequence, from place `start` on, as the model takes it.

    Args:
        name: of `ALL_MODELS`.
        model: what `build_with_images` gave for it, patched or not.
        ids: token ids; at least 6 from `start` on.
        start: the first place of the image.
    """
    if name in MULTIMODAL_MODELS:
        return with_ordinary_image(model, ids, start)
    ids, count, noise = ids.clone(), len(ids), torch.Generator().manual_seed(3)
    kind = LATENT_MODELS[name]
    # Parts of an image in the prompt, and its shape: patches side by side with their grid, or pixels.
    length, shape, grid = {
        "glm5_next": (1, (4 * count, 3 * 2 * 14 * 14), (1, 2, 2)),
        "hy_v4_vl": (2, (4 * count, 3 * 16 * 16), (1, 2, 2)),  # a row of parts ends in one more
        "kimi_k25": (1, (4 * count, 3, 4, 4), (1, 2, 2)),
        "llava": (4, (count, 3, 8, 8), None),
        "mistral3": (4, (count, 3, 8, 8), None),
        "mistral_large4": (4, (count, 3, 28, 28), None),
        "dots3_note": (1, (4 * count, 3 * 4 * 4), (1, 2, 2)),
    }[kind]
    ids[:, start : start + length] = placeholder_of(name)
    inputs: dict[str, Any] = {"input_ids": ids, "pixel_values": torch.randn(*shape, generator=noise)}
    if grid is not None:
        inputs["image_grid_thw"] = torch.tensor([grid] * count)
    known = inspect.signature(type(model).forward).parameters
    may_need = {
        "image_sizes": torch.tensor([list(shape[-2:])] * count),
        "mm_token_type_ids": (ids == placeholder_of(name)).int(),
    }
    wanted = {"llava": [], "mistral3": ["image_sizes"], "mistral_large4": ["image_sizes"]}
    return inputs | {key: may_need[key] for key in wanted.get(kind, ["mm_token_type_ids"]) if key in known}
