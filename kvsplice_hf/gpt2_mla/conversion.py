"""The weights of a GPT-2 as those of a GPT-2 with Multi-head Latent Attention, in closed form.

With W = [W_K; W_V] of a layer and the covariance S of its hidden states x, the factors of rank R that lose least of
W x are U and U^T W, with the top R eigenvectors U of W S W^T. W has rank D at most, so that R = D is exact.

What is constant needs no room in the latent: softmax ignores what all keys have in common, and what all values have in
common is a bias of the output. So S is taken around the mean, the biases of keys vanish, and those of values, together
with what the factors lose of the mean, go to the output.

Legend: `B` batch, `T` tokens, `D` n_embd, `H` heads, `d` head size, `R` kv_lora_rank.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from kvsplice_hf.calibration.data import as_batches
from kvsplice_hf.errors import ConfigError
from kvsplice_hf.gpt2_mla.configuration import GPT2MLAConfig


CALIBRATION_TOKENS = 65_536
_KEPT_SETTINGS = (
    "activation_function",
    "attn_pdrop",
    "bos_token_id",
    "embd_pdrop",
    "eos_token_id",
    "initializer_range",
    "layer_norm_epsilon",
    "n_embd",
    "n_head",
    "n_inner",
    "n_layer",
    "n_positions",
    "pad_token_id",
    "resid_pdrop",
    "tie_word_embeddings",
    "vocab_size",
)
# Of the mean variance: directions that calibration never saw still count for something, so that full rank is exact.
_FLOOR = 1e-6


class Moments(NamedTuple):
    """Of the hidden states that an attention gets, float64 on the CPU: mean [D] and covariance [D, D]."""

    mean: torch.Tensor
    covariance: torch.Tensor


@torch.no_grad()
def convert_gpt2(
    source: GPT2LMHeadModel, kv_lora_rank: int, calibration: Any = None
) -> tuple[GPT2MLAConfig, dict[str, torch.Tensor]]:
    """Settings and weights of a `GPT2MLAForCausalLM` that computes what `source` does, but for the rank of the latent.

    Args:
        source: the trained model; it is left as it was.
        kv_lora_rank: R, from 1 to D; D is exact.
        calibration: token ids [B, T], or a list of such, whose hidden states weigh what the latent keeps. None takes
            what the norm before the attention alone says of them.

    Raises:
        ConfigError: `source` is no GPT-2 or has cross-attention, or the rank is out of its range.
        CalibrationError: the calibration tokens cannot be used.
    """
    _require_convertible(source, kv_lora_rank)
    settings: dict[str, Any] = {name: getattr(source.config, name) for name in _KEPT_SETTINGS}
    settings |= {"dtype": source.dtype, "attn_implementation": source.config._attn_implementation}
    config = GPT2MLAConfig(kv_lora_rank=kv_lora_rank, **settings)
    state = {name: tensor.clone() for name, tensor in source.state_dict().items() if ".attn." not in name}
    moments = _moments_of_norms(source) if calibration is None else _moments_of_tokens(source, calibration)
    for index, block in enumerate(source.transformer.h):
        weights = _attention_weights(block.attn, moments[index], config)
        state |= {f"transformer.h.{index}.attn.{name}": tensor.float() for name, tensor in weights.items()}
    return config, state


def _require_convertible(source: Any, kv_lora_rank: Any) -> None:
    if not isinstance(source, GPT2LMHeadModel):
        raise ConfigError(f"`model` is a {type(source).__name__}; it must be a GPT2LMHeadModel.")
    if source.config.add_cross_attention:
        raise ConfigError("`model` has cross-attention (add_cross_attention), which has no counterpart here.")
    for block in source.transformer.h:
        for name in ("c_attn", "c_proj"):
            _require_plain(name, getattr(block.attn, name))
    if not isinstance(kv_lora_rank, int) or not 1 <= kv_lora_rank <= source.config.n_embd:
        raise ConfigError(
            f"`kv_lora_rank` is {kv_lora_rank!r}; it must be from 1 to n_embd ({source.config.n_embd}), at which the "
            "conversion is exact."
        )


def _require_plain(name: str, layer: Any) -> None:
    """Refuse a layer whose weight is not what it multiplies by."""
    if type(layer) is not Conv1D or type(layer.weight) is not nn.Parameter or not layer.weight.is_floating_point():
        raise ConfigError(
            f"`model` has a {name} that is a {type(layer).__name__} (packed or adapted), whose weight cannot be copied "
            "into plain layers. Merge adapters (merge_and_unload) and load the weights unquantised."
        )


def _attention_weights(attention: Any, moments: Moments, config: GPT2MLAConfig) -> dict[str, torch.Tensor]:
    """The parameters of a `GPT2MLAAttention`, float64 on the CPU."""
    D, H = config.n_embd, config.n_head
    weight = attention.c_attn.weight.detach().cpu().double().T  # [3 D, D], as nn.Linear has it
    query_bias, _, value_bias = attention.c_attn.bias.detach().cpu().double().split(D)
    # By head: d rows of keys, then d rows of values.
    by_head = weight[D:].view(2, H, D // H, D).transpose(0, 1).reshape(2 * D, D)
    down, up = _factorise(by_head, moments.covariance, config.kv_lora_rank)
    lost = ((by_head - up @ down) @ moments.mean).view(H, 2, D // H)[:, 1].flatten()
    output = attention.c_proj.weight.detach().cpu().double().T
    # Sources may scale scores in other ways than by the root of the head size.
    scale = attention.scaling * config.qk_nope_head_dim**0.5
    return {
        "q_proj.weight": weight[:D] * scale,
        "q_proj.bias": query_bias * scale,
        "kv_a_proj.weight": down,
        "kv_b_proj.weight": up,
        "o_proj.weight": output,
        "o_proj.bias": attention.c_proj.bias.detach().cpu().double() + output @ (value_bias + lost),
    }


def _factorise(weight: torch.Tensor, covariance: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`(A [R, D], B [2 D, R])` such that B A x is closest to `weight` x for x of this covariance."""
    floor = _FLOOR * covariance.diagonal().mean()
    covariance = covariance + floor * torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    basis = torch.linalg.eigh(weight @ covariance @ weight.T).eigenvectors.flip(-1)[:, :rank]
    return basis.T @ weight, basis


def _norms(source: GPT2LMHeadModel) -> list[Any]:
    """The norms before the attentions, layer by layer."""
    blocks: Any = source.transformer.h
    return [block.ln_1 for block in blocks]


def _moments_of_norms(source: GPT2LMHeadModel) -> list[Moments]:
    """What is known without data: before its gains, the entries of a norm's output have mean square 1."""
    norms = _norms(source)
    return [Moments(norm.bias.cpu().double(), norm.weight.cpu().double().square().diag()) for norm in norms]


class _Sums:
    """Running sums over the tokens of a layer, float64 on the CPU."""

    def __init__(self, size: int) -> None:
        self.count = 0
        self.total = torch.zeros(size, dtype=torch.float64, device="cpu")
        self.outer = torch.zeros(size, size, dtype=torch.float64, device="cpu")

    def add(self, rows: torch.Tensor) -> None:
        """Count rows [tokens, D]."""
        rows = rows.cpu().double()
        self.count += len(rows)
        self.total += rows.sum(0)
        self.outer += rows.T @ rows

    def moments(self) -> Moments:
        mean = self.total / self.count
        return Moments(mean, self.outer / self.count - torch.outer(mean, mean))


def _moments_of_tokens(source: GPT2LMHeadModel, calibration: Any) -> list[Moments]:
    """Moments of the hidden states over calibration tokens, padding left out."""
    norms = _norms(source)
    sums = [_Sums(source.config.n_embd) for _ in norms]
    real: list[torch.Tensor] = []

    def count(layer: _Sums, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        layer.add(output[real[-1]])

    hooks = [
        norm.register_forward_hook(functools.partial(count, layer)) for norm, layer in zip(norms, sums, strict=True)
    ]
    training = source.training
    source.eval()
    try:
        for batch in as_batches(calibration, None, CALIBRATION_TOKENS):
            batch = {name: tensor.to(source.device) for name, tensor in batch.items()}
            real.append(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool())
            source.transformer(**batch, use_cache=False)
    finally:
        source.train(training)
        for hook in hooks:
            hook.remove()
    return [layer.moments() for layer in sums]
