"""Weights and configuration of the new model, a stock `DeepseekV3ForCausalLM`.

MLA normalises its latent, and that of the queries where they have one. The source normalises neither, so the norm is
made a constant: one more channel of the latent is always `CONSTANT` (a bias; its weights are zero) and outweighs all
others in the mean square.

Legend: `L` = width of the latent without the constant channel; see the package for the rest.
"""

import copy
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

from kvsplice_hf.convert.rotation import LayerRotation, Slot
from kvsplice_hf.convert.source import SourceModel, has_bias, split_heads, to_complex


# The constant is up to twice this: below the largest fp16 number, and a hundred times the latents seen.
CONSTANT = 2.0**15

_KEPT_SETTINGS = (
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "pad_token_id",
    "rms_norm_eps",
    "tie_word_embeddings",
    "vocab_size",
)


@dataclass
class LayerWeights:
    """Attention weights of one layer, float64 on the CPU, the norm of the latent not yet made up for.

    Attributes:
        query: [H, N + P, d], applied to the source's queries.
        key_rot, key_rot_bias: [P, D] and [P]; first members of all pairs, then second members.
        latent, latent_bias: [L, D] and [L].
        expand_key, expand_value: [H, N, L] and [H, V, L], what `kv_b_proj` does.
        output_bias: [D].
    """

    query: torch.Tensor
    key_rot: torch.Tensor
    key_rot_bias: torch.Tensor
    latent: torch.Tensor
    latent_bias: torch.Tensor
    expand_key: torch.Tensor
    expand_value: torch.Tensor
    output_bias: torch.Tensor


def layer_weights(source: SourceModel, layer: Any, rotation: LayerRotation, slots: Sequence[Slot]) -> LayerWeights:
    """Attention weights of one layer with the full latent: all keys that do not rotate, then all values."""
    attention = layer.self_attn
    key, key_bias = split_heads(attention.k_proj, source.head_dim)
    value, value_bias = split_heads(attention.v_proj, source.head_dim)
    # With the bias as one more column, keys are a linear function of (hidden states, 1).
    keys = to_complex(torch.cat([key, key_bias[..., None]], -1), dim=1)  # [G, F, D + 1]
    virtual = torch.einsum("fvg,gfd->fvd", rotation.mix, keys)
    rest = [pair for pair in _pairs(source) if pair not in set(slots)]
    rotating, still = (_rows([virtual[pair] for pair in chosen], keys.shape[-1]) for chosen in (slots, rest))
    latent = torch.cat([still, torch.cat([value, value_bias[..., None]], -1).flatten(0, 1)])
    query, expand_key = _reading(source, rotation.read, slots, rest, len(latent))
    expand_value = torch.zeros(source.num_heads, source.head_dim, len(latent), dtype=torch.float64, device="cpu")
    for head in range(source.num_heads):
        first = len(still) + head // source.heads_per_key * source.head_dim
        expand_value[head, :, first : first + source.head_dim] = torch.eye(
            source.head_dim, dtype=torch.float64, device="cpu"
        )
    bias = attention.o_proj.bias
    hidden = attention.o_proj.out_features
    output_bias = (
        torch.zeros(hidden, dtype=torch.float64, device="cpu") if bias is None else bias.detach().cpu().double()
    )
    return LayerWeights(
        query, rotating[:, :-1], rotating[:, -1], latent[:, :-1], latent[:, -1], expand_key, expand_value, output_bias
    )


def _pairs(source: SourceModel) -> list[Slot]:
    return [(f, g) for f in range(len(source.inv_freq)) for g in range(source.num_key_heads)]


def _rows(pairs: list[torch.Tensor], width: int) -> torch.Tensor:
    """Complex rows as real ones: all real parts, then all imaginary parts, [2 * pairs, width]."""
    rows = torch.stack(pairs) if pairs else torch.zeros(0, width, dtype=torch.complex128, device="cpu")
    return torch.cat([rows.real, rows.imag])


def _reading(
    source: SourceModel, read: torch.Tensor, slots: Sequence[Slot], rest: Sequence[Slot], latent_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`query` [H, N + P, d] and `expand_key` [H, N, L] of a layer.

    What a head reads without rotation is one key of d numbers (a pair per frequency), whatever the number of virtual
    heads it is put together from. So the queries pass as they are, and `expand_key` does the reading.
    """
    still = sorted({frequency for frequency, _ in rest})
    count, half = len(still), source.head_dim // 2
    sizes = source.num_heads, 2 * (count + len(slots)), source.head_dim
    query = torch.zeros(sizes, dtype=torch.float64, device="cpu")
    expand = torch.zeros(source.num_heads, 2 * count, latent_dim, dtype=torch.float64, device="cpu")
    for row, frequency in enumerate(still):
        query[:, row, frequency] = 1
        query[:, count + row, half + frequency] = 1
    for column, (frequency, group) in enumerate(rest):
        row = still.index(frequency)
        for a in range(2):
            for b in range(2):
                expand[:, a * count + row, b * len(rest) + column] = read[:, frequency, group, a, b]
    for slot, (frequency, group) in enumerate(slots):
        for a in range(2):
            for b in range(2):
                row = 2 * count + b * len(slots) + slot
                query[:, row, a * half + frequency] = read[:, frequency, group, a, b]
    # Stock MLA divides by the root of its own head size.
    return query * (source.logit_scale * math.sqrt(query.shape[1])), expand


def build_model(source: SourceModel, layers: Sequence[LayerWeights], slots: Sequence[Slot]) -> DeepseekV3ForCausalLM:
    """The new model, in the dtype and on the device of the source; it shares no memory with it."""
    with_query_bias = any(has_bias(layer.self_attn.q_proj) for layer in source.layers)
    config = _config(source, layers[0], slots, with_query_bias)
    states = [
        _attention_state(source, layer, weights, with_query_bias)
        for layer, weights in zip(source.layers, layers, strict=True)
    ]
    return assemble(source, config, states)


def assemble(
    source: SourceModel, config: DeepseekV3Config, attentions: Sequence[dict[str, torch.Tensor]]
) -> DeepseekV3ForCausalLM:
    """The model of a configuration, with the parameters of its attention modules; all else is of the source."""
    state = _kept_state(source)
    for index, (layer, attention) in enumerate(zip(source.layers, attentions, strict=True)):
        like = layer.self_attn.q_proj.weight
        for name, tensor in attention.items():
            state[f"model.layers.{index}.self_attn.{name}"] = tensor.to(like.device, like.dtype)
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(config)
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = DeepseekV3RotaryEmbedding(config).to(source.model.device)
    model.tie_weights()
    model.requires_grad_(True)
    model.generation_config = copy.deepcopy(source.model.generation_config)
    return model.train(source.model.training)


def _kept_state(source: SourceModel) -> dict[str, torch.Tensor]:
    """Copies of everything but the attention: the names are the same."""
    names = ("input_layernorm", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    decoder: Any = source.model.get_decoder()
    modules = {"model.embed_tokens": decoder.embed_tokens, "model.norm": decoder.norm}
    modules["lm_head"] = source.model.get_output_embeddings()
    for index, layer in enumerate(source.layers):
        modules |= {f"model.layers.{index}.{name}": layer.get_submodule(name) for name in names}
    return {f"{name}.weight": module.weight.detach().clone() for name, module in modules.items()}


def _attention_state(
    source: SourceModel, layer: Any, weights: LayerWeights, with_query_bias: bool
) -> dict[str, torch.Tensor]:
    """The parameters of a stock attention module, most of them in float64."""
    attention = layer.self_attn
    # The hidden states come from a norm: before its gains, their entries have mean square 1.
    power = layer.input_layernorm.weight.detach().cpu().double().square()
    gain, size = _constant_norm(weights.latent, weights.latent_bias, power)
    expand = torch.cat([weights.expand_key, weights.expand_value], 1).flatten(0, 1) / size
    state = {
        "kv_a_proj_with_mqa.weight": torch.cat([_with_zero_row(weights.latent), weights.key_rot]),
        "kv_a_proj_with_mqa.bias": torch.cat([_with_constant(weights.latent_bias), weights.key_rot_bias]),
        "kv_a_layernorm.weight": gain,
        "kv_b_proj.weight": torch.cat([expand, expand.new_zeros(len(expand), 1)], 1),
        "o_proj.weight": attention.o_proj.weight.detach().clone(),
        "o_proj.bias": weights.output_bias,
    }
    query, query_bias = split_heads(attention.q_proj, source.head_dim)
    if not with_query_bias:
        return state | {"q_proj.weight": torch.einsum("hnd,hdx->hnx", weights.query, query).flatten(0, 1)}
    # Only the first of MLA's two query projections has a bias: it takes the source's queries as they are.
    query, query_bias = query.flatten(0, 1), query_bias.flatten()
    gain, size = _constant_norm(query, query_bias, power)
    expand = torch.block_diag(*weights.query) / size
    return state | {
        "q_a_proj.weight": _with_zero_row(query),
        "q_a_proj.bias": _with_constant(query_bias),
        "q_a_layernorm.weight": gain,
        "q_b_proj.weight": torch.cat([expand, expand.new_zeros(len(expand), 1)], 1),
    }


def _with_zero_row(weight: torch.Tensor) -> torch.Tensor:
    return torch.cat([weight, weight.new_zeros(1, weight.shape[1])])


def _with_constant(bias: torch.Tensor) -> torch.Tensor:
    constant, _ = _constant_and_gain(len(bias) + 1)
    return torch.cat([bias, bias.new_tensor([constant])])


@functools.cache
def _constant_and_gain(width: int) -> tuple[float, float]:
    """The constant for a latent of `width` channels, and the gain that undoes the norm: gain * sqrt(width) = constant.

    Of all numbers that bf16 and fp16 hold exactly, the two that come closest: about 1e-5. Other choices would leave up
    to 0.4 % to the next projection, and rounding that to bf16 would scale all logits.
    """
    mantissas = torch.arange(128, 256, dtype=torch.float64, device="cpu") / 128  # bf16 has 8 bits
    ratio = CONSTANT / math.sqrt(width)
    exponent = math.floor(math.log2(ratio))
    gains = torch.cat([mantissas * 2.0**exponent, mantissas * 2.0 ** (exponent + 1)])
    error = (torch.outer(mantissas * ratio, 1 / gains) - 1).abs()
    constant, gain = divmod(int(error.argmin()), len(gains))
    return CONSTANT * mantissas[constant].item(), gains[gain].item()


def _constant_norm(weight: torch.Tensor, bias: torch.Tensor, power: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Gains [L + 1] of a norm that does nothing, and what it multiplies by all the same: a number very close to 1.

    The constant channel gets gain 0: nothing reads it, and a cached 0 is easy to compress.

    Args:
        weight, bias: of the projection before the norm, [L, D] and [L].
        power: mean square of the hidden states, [D].
    """
    width = len(bias) + 1
    constant, gain = _constant_and_gain(width)
    other_channels = bias.square().sum() + (weight.square() @ power).sum()
    mean_square = (constant**2 + other_channels.item()) / width
    gains = torch.full((width,), gain, dtype=torch.float64, device="cpu")
    gains[-1] = 0
    return gains, gain / math.sqrt(mean_square)


def _config(
    source: SourceModel, weights: LayerWeights, slots: Sequence[Slot], with_query_bias: bool
) -> DeepseekV3Config:
    settings = {
        "q_lora_rank": source.num_heads * source.head_dim + 1 if with_query_bias else None,
        "kv_lora_rank": len(weights.latent) + 1,
        "attention_bias": True,
        "rope_parameters": _rope_parameters(source, slots),
        "rope_interleave": False,
    }
    return config_of(source, weights, 2 * len(slots), settings)


def config_of(source: SourceModel, weights: LayerWeights, rotating: int, settings: dict[str, Any]) -> DeepseekV3Config:
    """The configuration of a model without experts; `settings` are those that its form decides."""
    config = source.config
    kept = {name: getattr(config, name) for name in _KEPT_SETTINGS}
    sizes = {
        "num_key_value_heads": source.num_heads,
        "qk_rope_head_dim": rotating,
        "qk_nope_head_dim": weights.query.shape[1] - rotating,
        "v_head_dim": source.head_dim,
        "dtype": source.model.dtype,
        "attn_implementation": config._attn_implementation,
        "first_k_dense_replace": config.num_hidden_layers,
        # No layer has experts; their sizes are of no effect, and small so that nobody counts them.
        "n_routed_experts": 1,
        "num_experts_per_tok": 1,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": config.intermediate_size,
        "num_nextn_predict_layers": 0,
    }
    return DeepseekV3Config(**(kept | sizes | settings))


def _rope_parameters(source: SourceModel, slots: Sequence[Slot]) -> dict[str, Any]:
    """A stock RoPE with any list of frequencies: "longrope" divides `theta ** 0 = 1` by one factor per frequency."""
    periods = [_reciprocal(frequency) for frequency in source.inv_freq[[f for f, _ in slots]]]
    return {
        "rope_type": "longrope",
        "rope_theta": 1.0,
        "short_factor": periods,
        "long_factor": periods,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": source.config.max_position_embeddings,
    }


def _reciprocal(frequency: torch.Tensor) -> float:
    """The float32 number whose float32 reciprocal is (closest to) `frequency`.

    Half a unit in the last place is a milliradian at position 8192. Stock frequencies are reciprocals themselves, so
    they are met exactly.
    """
    period = 1 / frequency
    up, down = torch.nextafter(period, period + 1), torch.nextafter(period, period * 0)
    candidates = torch.stack([period, up, down])
    return candidates[(1 / candidates - frequency).abs().argmin()].item()
