"""Caches as they are before a decode step, and steps on them."""

import itertools
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, QuantizedLayer, StaticLayer

from kvsplice_hf.bench.memory_limits import reason_to_skip, too_large
from kvsplice_hf.bench.recipes import RECIPES, Recipe, random_tokens, state_shapes, text_config
from kvsplice_hf.upstream import cache_argument


# Tokens of a cache that are filled by a real forward pass.
_REAL_TOKENS = 16
_FILL_CHUNK = 2048


@dataclass
class Filled:
    """A cache before a decode step.

    Attributes:
        cache: of `length` tokens per sequence.
        length: of the tokens in the cache, padding included.
        padding: of each sequence, [B], or None where no mask is given.
        token: the next one, [B, 1].
    """

    cache: Cache
    length: int
    padding: torch.Tensor | None
    token: torch.Tensor

    def mask(self, length: int) -> torch.Tensor | None:
        """The attention mask of so many tokens, [B, length]."""
        return None if self.padding is None else mask_of(self.padding, length)


def padding_of(batch: int, length: int, device: torch.device) -> torch.Tensor:
    """Left padding that differs within the batch, from none up to half of the length, [B]."""
    return torch.linspace(0, length // 2, batch, dtype=torch.float32, device=device).long()


def prompt_mask(batch: int, length: int, padded: bool, device: torch.device) -> torch.Tensor:
    """The attention mask of prompts, int64 [B, length]: all of it real, or padded on the left by `padding_of`."""
    if padded:
        return mask_of(padding_of(batch, length, device), length)
    return torch.ones(batch, length, dtype=torch.int64, device=device)


def mask_of(padding: torch.Tensor, length: int) -> torch.Tensor:
    """The attention mask of sequences with this left padding [B], int64 [B, length]."""
    return (torch.arange(length, dtype=torch.int64, device=padding.device) >= padding[:, None]).long()


@torch.no_grad()
def fill(
    model: PreTrainedModel, recipe: Recipe, batch: int, length: int, spare: int, padded: bool, processes: int = 1
) -> Filled:
    """A cache of `length` tokens with room for `spare` more.

    A few tokens run through the model, which settles the kind of every layer. The rest are random latents, which each
    layer stores by its own `update` as it would those of the model. What a step costs does not depend on the numbers,
    only on how many there are and how they are stored, which is the same. And 16384 tokens of real prefill would take
    minutes for every recipe.

    Of key heads that are divided among `processes`, a cache gets those of one.
    """
    padding = padding_of(batch, length, model.device) if padded else None
    cache = recipe.make_cache(text_config(model), length + spare)
    filled = Filled(cache, min(length, _REAL_TOKENS), padding, random_tokens(model, batch, 1))
    step(model, filled, random_tokens(model, batch, filled.length), grow=0)
    shapes = [(max(heads // processes, 1), width) for heads, width in state_shapes(text_config(model))]
    layer: Any
    for start, end in _chunks(filled.length, length):
        positions = torch.arange(start, end, dtype=torch.int64, device=model.device)[None]
        embeddings = _rotations(model, positions)
        for layer in cache.layers:
            if hasattr(layer, "embeddings"):  # as `attention_mask`
                layer.embeddings, layer.position_ids, layer.announced = embeddings, positions, True
            if padding is not None and hasattr(layer, "attention_mask"):
                layer.attention_mask = filled.mask(end)  # what the hook of a patched model tells its cache layer
            states = (
                torch.randn(batch, heads, end - start, width, dtype=model.dtype, device=model.device)
                for heads, width in shapes
            )
            layer.update(*states)
    filled.length = length
    return filled


def _chunks(first: int, last: int) -> list[tuple[int, int]]:
    """Tokens that are stored at a time. The last one by itself, because caches with a window of tokens as they came
    quantise what is in the window when more come: so the window is not full before the first step.
    """
    edges = [*range(first, last - 1, _FILL_CHUNK), *([last - 1] if last - 1 > first else []), last]
    return [(start, end) for start, end in itertools.pairwise(edges) if end > start]


def _rotations(model: PreTrainedModel, positions: torch.Tensor) -> Any:
    """What the model hands to its attention modules at these positions [1, T]; None without a rotary embedding."""
    found = (module for name, module in model.named_modules() if name.endswith("rotary_emb"))
    rotary = next(found, None)
    return None if rotary is None else rotary(torch.empty(0, dtype=model.dtype, device=model.device), positions)


@torch.no_grad()
def step(model: PreTrainedModel, filled: Filled, tokens: torch.Tensor | None = None, grow: int = 1) -> None:
    """One forward pass of the next token, or of the first `tokens`, after which the cache is longer by `grow`."""
    tokens = filled.token if tokens is None else tokens
    mask = filled.mask(filled.length + grow)
    padding = {} if mask is None else {"attention_mask": mask}
    if mask is not None and filled.padding is not None:
        positions = torch.arange(mask.shape[1] - tokens.shape[1], mask.shape[1], dtype=torch.int64, device=mask.device)
        padding["position_ids"] = (positions - filled.padding[:, None]).clamp_min(0)
    model(tokens, **cache_argument(filled.cache), use_cache=True, logits_to_keep=1, **padding)
    filled.length += grow


def rewind(filled: Filled, count: int) -> None:
    """Take back the last tokens, so that every repeat reads the same number of them.

    `Cache.crop` alone will not do: in transformers 5.23 it fails on fp8 layers, whose `keys` stay empty, and static
    layers have none.
    """
    layer: Any
    for layer in filled.cache.layers:
        if isinstance(layer, StaticLayer):
            layer.cumulative_length.sub_(count)
        elif isinstance(getattr(layer, "_quantized_keys", None), tuple):
            for name in ("_quantized_keys", "_quantized_values"):
                rows, scale = getattr(layer, name)
                setattr(layer, name, (rows[..., :-count, :], scale))
            layer.cumulative_length -= count
        elif isinstance(layer, QuantizedLayer):  # the last tokens are in its window
            for name in ("keys", "values"):
                setattr(layer, name, getattr(layer, name)[..., :-count, :])
            layer.cumulative_length -= count
        else:
            layer.crop(-count)
    filled.length -= count


def fill_all(
    models: Mapping[str, PreTrainedModel], batch: int, length: int, spare: int, padded: bool
) -> tuple[dict[str, Filled], dict[str, str]]:
    """A cache per recipe, on which one step has run and was taken back, and why there is none for the others."""
    names = list(models)
    skipped = too_large(models[names[0]], names, batch, length)
    caches: dict[str, Filled] = {}
    for name in tqdm([name for name in names if name not in skipped], desc="filling caches", file=sys.stderr):
        try:
            torch.manual_seed(0)
            caches[name] = fill(models[name], RECIPES[name], batch, length, spare, padded)
            step(models[name], caches[name])
            rewind(caches[name], 1)
        except Exception as error:
            caches.pop(name, None)
            skipped[name] = reason_to_skip(name, error)
    return caches, skipped
