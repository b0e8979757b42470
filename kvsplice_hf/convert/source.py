"""Reads the model to convert. The only room that knows what a Llama, Mistral or Qwen2 layer looks like."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kvsplice_hf.errors import UnsupportedError


# Model types whose layers were read line by line and found to be nothing but RMSNorm, RoPE attention and a gated MLP.
SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2")
# These change the frequencies only, yarn the size of the logits as well: a list of frequencies carries them exactly.
SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")

_NORM_NAMES = ("q_norm", "k_norm", "q_layernorm", "k_layernorm")
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
_ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP_LINEARS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, eq=False)
class SourceModel:
    """A model that can be converted.

    Attributes:
        model: the causal language model; it is only read.
        layers: its decoder layers.
        num_heads, num_key_heads, head_dim: H, G, d.
        inv_freq: the frequencies in use, radians per token, float32 [F] on the CPU.
        logit_scale: what attention multiplies `q . k` by, RoPE's own factor included.
    """

    model: PreTrainedModel
    layers: list[Any]
    num_heads: int
    num_key_heads: int
    head_dim: int
    inv_freq: torch.Tensor
    logit_scale: float

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def heads_per_key(self) -> int:
        return self.num_heads // self.num_key_heads


def read_source(model: Any) -> SourceModel:
    """Check that `model` can be converted, and read its sizes.

    Raises:
        UnsupportedError: it cannot; the message names every obstacle that was found.
    """
    obstacles = list(_obstacles(model))
    if obstacles:
        raise UnsupportedError(
            f"This {type(model).__name__} cannot be converted to MLA:\n"
            + "\n".join(f"- {obstacle}" for obstacle in obstacles)
            + f"\nSupported are models of type {', '.join(SUPPORTED_MODEL_TYPES)} without these features."
        )
    decoder: Any = model.get_decoder()
    layers = list(decoder.layers)
    config, attention, rotary = model.config, layers[0].self_attn, decoder.rotary_emb
    return SourceModel(
        model=model,
        layers=layers,
        num_heads=config.num_attention_heads,
        num_key_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        inv_freq=rotary.inv_freq.detach().float().cpu(),
        # RoPE scales queries and keys alike.
        logit_scale=attention.scaling * rotary.attention_scaling**2,
    )


def split_heads(linear: nn.Linear, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight [heads, d, D] and bias [heads, d] (zeros if there is none) of a projection, float64 on the CPU."""
    weight = linear.weight.detach().cpu().double().view(-1, head_dim, linear.in_features)
    if linear.bias is None:
        return weight, weight.new_zeros(weight.shape[:2])
    return weight, linear.bias.detach().cpu().double().view(-1, head_dim)


def has_bias(linear: nn.Linear) -> bool:
    """Whether the projection adds anything but zeros."""
    bias = getattr(linear, "bias", None)
    return bias is not None and bias.device.type != "meta" and bool(bias.detach().any())


def to_complex(pairs: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """[..., d, ...], the members of a pair d/2 apart as `rotate_half` has them, to complex [..., F, ...]."""
    first, second = pairs.chunk(2, dim)
    return torch.complex(first, second)


def _obstacles(model: Any) -> Iterator[str]:
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        yield "it is no causal language model of transformers. Load it with AutoModelForCausalLM"
        return
    if any(hasattr(module, "kv_b_proj") for module in model.modules()):
        yield "it has Multi-head Latent Attention already. Use patch_model_with_kvsplice(model) directly"
        return
    config = model.config.get_text_config(decoder=True)
    yield from _config_obstacles(config)
    layers = getattr(model.get_decoder(), "layers", [])
    for index, layer in enumerate(layers):
        found = list(_layer_obstacles(layer))
        yield from (f"layer {index}: {obstacle}" for obstacle in found)
        if found:  # the other layers will have the same
            return
    if config.model_type in SUPPORTED_MODEL_TYPES:
        yield from _rope_obstacles(model, config)
        yield from _placement_obstacles(model)
    else:
        yield f"its type is {config.model_type!r}, and nobody has checked that such layers do nothing else"


def _config_obstacles(config: Any) -> Iterator[str]:
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    slides = "sliding_attention" in layer_types if layer_types else window is not None
    if slides and window < config.max_position_embeddings:
        yield (
            f"a sliding window of {window} tokens, less than the context of {config.max_position_embeddings}; stock "
            "MLA has none. If you never exceed it, load the model with sliding_window=None (Qwen2: "
            "use_sliding_window=False)"
        )
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name, None) is not None:
            yield f"{name} = {getattr(config, name)}; stock MLA has no softcapping"
    for name in _EXPERT_COUNTS:
        if getattr(config, name, None):
            yield f"a mixture of experts ({name} = {getattr(config, name)})"


def _layer_obstacles(layer: Any) -> Iterator[str]:
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    for name in _NORM_NAMES:
        if getattr(attention, name, None) is not None:
            yield (
                f"a norm on queries or keys ({name}) is not linear, so that keys are no linear function of a latent, "
                "which stock MLA needs"
            )
    for owner, names in ((attention, _ATTENTION_LINEARS), (mlp, _MLP_LINEARS)):
        missing = [name for name in names if not hasattr(owner, name)]
        if missing:
            yield f"{type(owner).__name__} has no {', '.join(missing)}"
            continue
        for name in names:
            yield from _linear_obstacles(name, getattr(owner, name))
    biased = [name for name in _MLP_LINEARS if hasattr(mlp, name) and has_bias(getattr(mlp, name))]
    if biased:
        yield f"the MLP has biases ({', '.join(biased)}), which stock MLA models do not have (mlp_bias)"


def _linear_obstacles(name: str, module: Any) -> Iterator[str]:
    if type(module) is not nn.Linear:
        yield (
            f"{name} is a {type(module).__name__}, not a plain nn.Linear. Merge adapters (merge_and_unload) and load "
            "the weights unquantised"
        )
    elif module.weight.device.type == "meta":
        yield f"the weight of {name} is not loaded (meta device)"
    elif type(module.weight) is not nn.Parameter:
        kind = type(module.weight).__name__
        yield f"the weight of {name} is a {kind} (packed or sharded). Load the model unquantised, on one device"
    elif not module.weight.is_floating_point():
        yield f"the weight of {name} is quantised ({module.weight.dtype}). Load the model unquantised"


def _rope_obstacles(model: Any, config: Any) -> Iterator[str]:
    parameters, rotary = config.rope_parameters, model.get_decoder().rotary_emb
    rope_type = parameters.get("rope_type", "default")
    if rope_type not in SUPPORTED_ROPE_TYPES:
        yield (
            f"RoPE of type {rope_type!r}, whose frequencies depend on the length of the sequence or are laid out in "
            f"another way; supported: {', '.join(SUPPORTED_ROPE_TYPES)}"
        )
    head_dim = model.get_decoder().layers[0].self_attn.head_dim
    factor = parameters.get("partial_rotary_factor", 1.0)
    if factor != 1.0 or 2 * rotary.inv_freq.numel() != head_dim:
        yield f"partial RoPE ({2 * rotary.inv_freq.numel()} of {head_dim} dimensions, partial_rotary_factor = {factor})"


def _placement_obstacles(model: PreTrainedModel) -> Iterator[str]:
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1:
        yield f"its weights are spread over {', '.join(devices)}. Load it on one device"
    if model.get_output_embeddings().bias is not None:
        yield "the output layer has a bias"
