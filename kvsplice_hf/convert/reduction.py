"""`reduce_rank`: a stock MLA model with a smaller kv_lora_rank, for engines without the plug-in of this package.

What a splice of a rank does behind the norm of the latent is folded into the weights around it: fewer rows of
`kv_a_proj_with_mqa`, a norm of fewer channels, fewer columns of `kv_b_proj`. The norm is what cannot be folded exactly:
it divides by the size of the latent, and the narrow latent has another one, which varies from token to token. How it
is made to vary little, and what is lost, is the work of `narrow`.

Legend: `R` kv_lora_rank before, `n` latents behind the norm without its gains; else as in the package.
"""

import copy
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from kvsplice_hf.calibration.calibrator import KVSpliceCalibrator
from kvsplice_hf.calibration.solve import latent_metric
from kvsplice_hf.convert.narrow import Narrowing, narrow
from kvsplice_hf.convert.plain import untie_
from kvsplice_hf.errors import CalibrationError, ConfigError, PatchStateError, UnsupportedError
from kvsplice_hf.patch.families import AttentionSite
from kvsplice_hf.patch.sites import find_sites
from kvsplice_hf.patch.state import is_patched
from kvsplice_hf.weights.offload import input_device


# Model types whose attention was read line by line: the latent is split off by `kv_lora_rank`, normed and expanded.
REDUCIBLE_MODEL_TYPES = ("deepseek_v2", "deepseek_v3")
# What `reduce_rank` changes of an attention module, and what is to be tuned after it.
REDUCED_MODULES = ("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj")
# Tokens whose latents are kept to fit to, spread over what is given.
_SAMPLED_TOKENS = 8192
# The least tokens per channel of the new latent.
_TOKENS_PER_CHANNEL = 4


@dataclass(frozen=True)
class ReducedLayer:
    """What became of one layer.

    Attributes:
        name: path of its attention module.
        read: channels of its latent that bring back the old one; the others keep the norm steady.
        cost: what of the latent is lost on the sample, by what predictions depend on; a share of all.
        unsteadiness: relative standard deviation of what the norm divides by and should not.
    """

    name: str
    read: int
    cost: float
    unsteadiness: float


@torch.no_grad()
def reduce_rank(
    model: PreTrainedModel, rank: int, *, tokens: torch.Tensor, calibration: KVSpliceCalibrator | None = None
) -> tuple[PreTrainedModel, list[ReducedLayer]]:
    """A copy of an MLA model with a smaller latent: a stock model that needs nothing of this package.

    An approximation, and one that loses more than a splice of the same rank: tune what it has changed, which is
    `REDUCED_MODULES` of each layer (`scripts/run/reduce_rank.py` does).

    Args:
        model: a loaded causal language model of type DeepSeek-V2 or DeepSeek-V3, not patched. It is left as it is.
        rank: the new kv_lora_rank, less than the old one. Engines are made for 512, some for 256.
        tokens: token ids without padding, [B, T], to fit to: several thousand, in sequences as long as those that
            matter.
        calibration: statistics of the model, which say what predictions depend on; by default they are collected on
            `tokens`.

    Returns:
        The new model, in the dtype, on the device and in the mode of `model`, with an output matrix of its own (engines
        read no tied one); and what became of each layer.

    Raises:
        UnsupportedError: the model is of another type, or has weights that are packed, adapted or divided.
        PatchStateError: the model is patched.
        ConfigError: the rank is out of its range.
        CalibrationError: `tokens` cannot be used or are too few, or `calibration` is of another model.

    Examples:
        >>> tokens = tokenizer(text, return_tensors="pt")["input_ids"][:, :4096].view(8, -1)
        >>> smaller, layers = reduce_rank(model, 32, tokens=tokens)
        >>> smaller.save_pretrained("my-model-of-rank-32")
    """
    sites = _require_reducible(model)
    _require_rank(sites, rank)
    _require_tokens(tokens, rank, model.config.vocab_size)
    if calibration is None:
        with torch.enable_grad():
            calibration = KVSpliceCalibrator(model).collect(tokens, max_tokens=tokens.numel(), window=tokens.shape[1])
    calibration.require_model(sites, model)
    samples = _normed_latents(model, sites, tokens)
    smaller: Any = copy.deepcopy(model)
    layers = []
    for site, sample in zip(tqdm(sites, desc="reducing layers", file=sys.stderr), samples, strict=True):
        gains = site.module.kv_a_layernorm.weight.detach().cpu().double()
        metric = latent_metric(calibration.statistics[site.layer_idx], calibration.metric)
        share = torch.full((len(sample),), 1 / len(sample), dtype=torch.float64, device="cpu")
        found = narrow(sample.double(), share, gains[:, None] * metric * gains, rank)
        _replace(smaller.get_submodule(site.name), found, gains)
        layers.append(ReducedLayer(site.name, found.read, found.cost, found.unsteadiness))
    smaller.config.kv_lora_rank = rank
    untie_(smaller)
    return smaller, layers


def _require_reducible(model: Any) -> list[AttentionSite]:
    """The attention layers of a model whose latent can be made smaller."""
    if is_patched(model):
        raise PatchStateError(
            "The model is patched, and its rank is to be reduced. Call unpatch_model(model) first; the reduced model "
            "can be patched like any other."
        )
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in REDUCIBLE_MODEL_TYPES:
        raise UnsupportedError(
            f"The rank of a model of type {kind!r} cannot be reduced: nobody has checked that its attention does "
            f"nothing else with a latent. Supported: {', '.join(REDUCIBLE_MODEL_TYPES)}. A splice "
            "(patch_model_with_kvsplice) needs no such check."
        )
    sites = find_sites(model)
    for site in sites:
        for name in ("kv_a_proj_with_mqa", "kv_b_proj"):
            module = getattr(site.module, name)
            weight = getattr(module, "weight", None)
            plain = type(module) is nn.Linear and type(weight) is nn.Parameter and weight.is_floating_point()
            if weight is None or not plain or weight.device.type == "meta":
                raise UnsupportedError(
                    f"{site.name}.{name} is a {type(module).__name__} whose weight is packed, adapted, divided or not "
                    "loaded, and the rank is reduced in plain weights. Merge adapters, and load the model unquantised "
                    "and whole."
                )
    return sites


def _require_rank(sites: list[AttentionSite], rank: int) -> None:
    full = sites[0].kv_lora_rank
    if not isinstance(rank, int) or isinstance(rank, bool) or not 2 <= rank < full:
        raise ConfigError(
            f"`rank` is {rank!r}; a smaller kv_lora_rank must be from 2 to {full - 1}, less than the {full} of this "
            "model."
        )


def _require_tokens(tokens: Any, rank: int, vocabulary: int) -> None:
    if not isinstance(tokens, torch.Tensor) or tokens.dim() != 2 or tokens.dtype not in (torch.int32, torch.int64):
        found = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, torch.Tensor) else type(tokens).__name__
        raise CalibrationError(f"`tokens` are {found}; a rank is reduced on token ids, int64 [B, T].")
    if tokens.numel() < _TOKENS_PER_CHANNEL * rank:
        raise CalibrationError(
            f"`tokens` are {tokens.numel()}, and a latent of {rank} channels is fitted to {_TOKENS_PER_CHANNEL * rank} "
            "tokens at least. Give more text."
        )
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
        raise CalibrationError(
            f"`tokens` are from {int(tokens.min())} to {int(tokens.max())}, outside the vocabulary of {vocabulary}. "
            "Use the tokenizer of this model, and leave padding out."
        )


def _normed_latents(model: Any, sites: list[AttentionSite], tokens: torch.Tensor) -> list[torch.Tensor]:
    """Latents of each layer behind their norm, without its gains, float32 [sampled tokens, R] on the CPU."""
    step = max(1, tokens.numel() // _SAMPLED_TOKENS)
    keepers = [_Keeper(step) for _ in sites]
    hooks = [
        site.module.kv_a_layernorm.register_forward_pre_hook(keeper)
        for site, keeper in zip(sites, keepers, strict=True)
    ]
    training = model.training
    model.eval()
    try:
        for row in tqdm(tokens, desc="reading latents", file=sys.stderr):
            model.get_decoder()(row[None].to(input_device(model)), use_cache=False)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return [torch.cat(keeper.kept) for keeper in keepers]


class _Keeper:
    """A forward-pre-hook of a norm: keeps every so manieth vector, divided by what the norm divides by."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.kept: list[torch.Tensor] = []

    def __call__(self, module: Any, args: tuple[Any, ...]) -> None:
        vectors = args[0].flatten(0, -2)[:: self.step].float()
        size = (vectors.square().mean(-1, keepdim=True) + module.variance_epsilon).sqrt()
        self.kept.append((vectors / size).cpu())


def _replace(module: Any, found: Narrowing, gains: torch.Tensor) -> None:
    """Put the narrow latent into an attention module."""
    old, expand, norm = module.kv_a_proj_with_mqa, module.kv_b_proj, module.kv_a_layernorm
    wide = len(gains)
    weight = old.weight.detach().cpu().double()
    projection = found.projection
    _set(old, "weight", torch.cat([projection @ weight[:wide], weight[wide:]]))
    if old.bias is not None:
        bias = old.bias.detach().cpu().double()
        _set(old, "bias", torch.cat([projection @ bias[:wide], bias[wide:]]))
    _set(norm, "weight", found.gains)
    _set(expand, "weight", found.reading(expand.weight.detach().cpu().double() * gains))
    old.out_features, expand.in_features = len(old.weight), len(projection)
    module.kv_lora_rank = len(projection)


def _set(module: Any, name: str, value: torch.Tensor) -> None:
    """Another parameter in the place of one, of its dtype, device and kind."""
    old = getattr(module, name)
    setattr(module, name, nn.Parameter(value.to(old.device, old.dtype), requires_grad=old.requires_grad))
