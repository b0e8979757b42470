"""The plain form of a converted model: what every engine that serves DeepSeek takes.

The form of `target` has biases (a constant channel holds its norm still) and any list of frequencies, and its output
matrix may be that of its embeddings. Engines read none of that, and without an error compute something else. The plain
form has no bias, an output matrix of its own, and the default RoPE: each of its frequencies once, in order. Its norm is
held still by channels that nobody reads (`narrow`): a hidden state behind its norm has always the same length, so the
more of it the latent holds, the less the latent's own norm varies. With a latent as wide as the hidden states it does
not vary at all.

Legend: see the package and `target`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import DeepseekV3ForCausalLM

from kvsplice_hf.convert.lowrank import LatentStatistics
from kvsplice_hf.convert.narrow import Narrowing, narrow
from kvsplice_hf.convert.rotation import Slot
from kvsplice_hf.convert.source import SourceModel, has_bias, split_heads
from kvsplice_hf.convert.target import LayerWeights, assemble, config_of
from kvsplice_hf.errors import ConfigError, UnsupportedError


def require_plain(source: SourceModel, rope_dim: int | str, rank: int | None) -> None:
    """Check that a model can have the plain form.

    Raises:
        UnsupportedError: it has biases, another RoPE than the default one, or a channel without gain.
        ConfigError: P does not divide the head size, or R is more than the hidden size.
    """
    obstacles = list(_obstacles(source))
    if obstacles:
        raise UnsupportedError(
            "This model has no plain form, which engines that serve DeepSeek need:\n"
            + "\n".join(f"- {obstacle}" for obstacle in obstacles)
            + "\nConvert it without plain=True, and run it in transformers."
        )
    size = source.head_dim
    if not isinstance(rope_dim, int) or isinstance(rope_dim, bool) or rope_dim < 2 or size % rope_dim or rope_dim % 2:
        raise ConfigError(
            f"`rope_dim` is {rope_dim!r}; in the plain form it must be an even divisor of the head size {size}, for "
            "the default RoPE to have frequencies of the model. Engines are made for 64."
        )
    hidden = source.config.hidden_size
    if rank is not None and not (isinstance(rank, int) and not isinstance(rank, bool) and 2 <= rank <= hidden):
        raise ConfigError(
            f"`kv_lora_rank` is {rank!r}; in the plain form it must be between 2 and the hidden size {hidden}, where "
            "the norm of the latent is exact. Engines are made for 512, some for 256."
        )


def _obstacles(source: SourceModel) -> Iterator[str]:
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    biased = [name for name in names if any(has_bias(getattr(layer.self_attn, name)) for layer in source.layers)]
    if biased:
        yield f"biases of {', '.join(biased)}, for which the plain form has no place"
    kind = source.config.rope_parameters.get("rope_type", "default")
    if kind != "default":
        yield f"RoPE of type {kind!r}, of which DeepSeek has no kind of its own with the same frequencies"
    if any((layer.input_layernorm.weight == 0).any() for layer in source.layers):
        yield "a norm before the attention with gains of 0, behind which hidden states have no fixed length"


def plain_slots(source: SourceModel, rope_dim: int) -> list[Slot]:
    """The pairs that go on rotating: the first virtual head at each frequency of the default RoPE for P numbers."""
    return [(frequency, 0) for frequency in range(0, len(source.inv_freq), source.head_dim // rope_dim)]


def narrowing_of(
    source: SourceModel,
    layer: Any,
    hidden: Sequence[torch.Tensor],
    weights: LayerWeights,
    statistics: LatentStatistics,
    rank: int,
) -> Narrowing:
    """The latent of a layer, in the place of its hidden states without the gains of the norm before it.

    Args:
        source: the model.
        layer: of it.
        hidden: what its attention module was given, [T, D] each.
        weights: with the full latent.
        statistics: of the full latent.
        rank: R.
    """
    gains = _gains(layer)
    vectors = torch.cat([part.cpu().double() for part in hidden]) / gains
    rows = weights.latent * gains
    metric = rows.T @ statistics.readers @ rows
    return narrow(vectors, statistics.share, metric, rank)


def build_plain_model(
    source: SourceModel, layers: Sequence[LayerWeights], narrowings: Sequence[Narrowing], slots: Sequence[Slot]
) -> DeepseekV3ForCausalLM:
    """The new model, in the dtype and on the device of the source; it shares no memory with it."""
    states = [_attention_state(source, *parts) for parts in zip(source.layers, layers, narrowings, strict=True)]
    parameters = source.config.rope_parameters
    settings = {
        "q_lora_rank": None,
        "kv_lora_rank": len(narrowings[0].encode),
        "attention_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": parameters["rope_theta"]},
        "rope_interleave": True,
        "tie_word_embeddings": False,
    }
    return assemble(source, config_of(source, layers[0], 2 * len(slots), settings), states)


def _attention_state(
    source: SourceModel, layer: Any, weights: LayerWeights, narrowing: Narrowing
) -> dict[str, torch.Tensor]:
    """The parameters of a stock attention module, most of them in float64."""
    gains = _gains(layer)
    rotating = len(weights.key_rot)
    pairs = torch.arange(rotating, dtype=torch.int64, device="cpu").view(2, -1).T.flatten()  # as pairs of neighbours
    still = weights.query.shape[1] - rotating
    query = torch.cat([weights.query[:, :still], weights.query[:, still:][:, pairs]], 1)
    expand = torch.cat([weights.expand_key, weights.expand_value], 1).flatten(0, 1) @ (weights.latent * gains)
    projection, _ = split_heads(layer.self_attn.q_proj, source.head_dim)
    return {
        "q_proj.weight": torch.einsum("hnd,hdx->hnx", query, projection).flatten(0, 1),
        "kv_a_proj_with_mqa.weight": torch.cat([narrowing.projection / gains, weights.key_rot[pairs]]),
        "kv_a_layernorm.weight": narrowing.gains,
        "kv_b_proj.weight": narrowing.reading(expand),
        "o_proj.weight": layer.self_attn.o_proj.weight.detach().clone(),
    }


def _gains(layer: Any) -> torch.Tensor:
    """Of the norm before the attention, float64 [D]."""
    return layer.input_layernorm.weight.detach().cpu().double()


def untie_(model: Any) -> None:
    """Give a model an output matrix of its own, where it has that of its embeddings.

    Engines that serve DeepSeek do not read `tie_word_embeddings`: vLLM 0.32.0 computes logits with a matrix that
    nothing was loaded into, without an error.
    """
    if not getattr(model.config, "tie_word_embeddings", False):
        return
    head: Any = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
