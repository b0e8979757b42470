#!/usr/bin/env python
"""Decode and prefill of a patched model against the same model unpatched, side by side in one process.

The model has the geometry of a known one, few layers, and random weights, so nothing is downloaded. Repeats of the
recipes are interleaved, so that a slow moment of the machine hits all of them. Beside each step stand the bytes that it
has to read, and how many times longer it takes than moving them at the speed at which this machine copies memory. The
last line of stdout is one JSON object.

    python scripts/measure/decode.py --context 4096 --prefill 2048
    python scripts/measure/decode.py --recipes all --contexts 512 4096 16384 --batch_sizes 1 8 --padded --prefill 0
    python scripts/measure/decode.py --memory         # peak memory of prefill + decode, one process per recipe
    python scripts/measure/decode.py --memory_decode  # the same of decode steps alone
    python scripts/measure/decode.py --profile        # where a decode step spends its time
    python scripts/measure/decode.py --generate 64    # the decode part of `generate`, SmolLM2-135M
"""

import contextlib
import copy
import ctypes
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import psutil
import torch
from rich.table import Table
from tqdm import tqdm
from transformers import (
    DynamicCache,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedModel,
    QuantizedCache,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import Cache, StaticLayer

from kvsplice_hf import KVSpliceCalibrator, KVSpliceConfig, cache_nbytes, patch_model_with_kvsplice
from kvsplice_hf.bench.command_line import (
    DEMO,
    console,
    environment,
    finish,
    load_model,
    parse_dtype,
    readable_errors,
    results_folder,
)
from kvsplice_hf.bench.geometries import GEOMETRIES, weight_bytes
from kvsplice_hf.demo import load_original_demo_model
from kvsplice_hf.errors import ConfigError
from kvsplice_hf.upstream import cache_argument


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


Row = dict[str, Any]

# The recipe that all others are compared with.
_STOCK = "stock"
_PACKED_SHARE = 0.25
_ORIGINAL = "original GQA"
_CALIBRATION_WINDOW = 512
# What the calibrator asks for, per dimension of the latent.
_CALIBRATION_TOKENS_PER_DIMENSION = 4
# Tokens of a cache that are filled by a real forward pass.
_REAL_TOKENS = 16
_FILL_CHUNK = 2048
# Of the memory that is free when a setting starts, how much it may take.
_MEMORY_SHARE = 0.9
# glibc raises its threshold for giving memory back to the system whenever a large block is freed, and keeps what lies
# below it: a peak then disappears in memory that was resident already. A fixed threshold switches that off, so that a
# tensor of 64 KB or more enters the resident set when it is made and leaves it when it is freed. One arena, because
# what lies free in another thread's arena is resident as well.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def _static_cache(config: PreTrainedConfig, length: int) -> Cache:
    return StaticCache(config=config, max_cache_len=length)


def _fp8_cache(config: PreTrainedConfig, length: int) -> Cache:
    return QuantizedCache("fp8", config)


def _dynamic_cache(config: PreTrainedConfig, length: int) -> Cache:
    return DynamicCache(config=config)


@dataclass(frozen=True)
class Recipe:
    """What is done to the model, and the cache it is given.

    Args:
        config: of the splice.
        is_packed: packed codes of a quarter of the stock bytes in bf16; they need calibration.
        make_cache: from the model's config and the greatest length; each cache layer is spliced when it is used.
    """

    config: KVSpliceConfig | None = None
    is_packed: bool = False
    make_cache: Callable[[PreTrainedConfig, int], Cache] = _dynamic_cache

    @property
    def is_spliced(self) -> bool:
        return self.is_packed or self.config is not None


RECIPES: Mapping[str, Recipe] = {
    _STOCK: Recipe(),
    "stock static": Recipe(make_cache=_static_cache),
    "stock fp8": Recipe(make_cache=_fp8_cache),
    "full rank": Recipe(KVSpliceConfig(compression_ratio=1.0, init="identity")),
    "rank R/2": Recipe(KVSpliceConfig(compression_ratio=0.5, init="orthogonal")),
    "packed 4x": Recipe(is_packed=True),
}
_DEFAULT_RECIPES = [_STOCK, "full rank", "rank R/2"]
_GENERATE_RECIPES = [_STOCK, "rank R/2", "packed 4x"]


@dataclass
class Arguments:
    """Decode and prefill of a patched model against the same model unpatched."""

    geometry: str = field(default="v2-lite", metadata={"help": "model shape: " + ", ".join(GEOMETRIES)})
    layers: int = field(default=4, metadata={"help": "number of layers"})
    whole_vocabulary: bool = field(default=False, metadata={"help": "do not cut the vocabulary with the layers"})
    contexts: list[int] = field(
        default_factory=lambda: [4096],
        metadata={"help": "tokens in the cache before the timed decode steps", "aliases": ["--context"]},
    )
    batch_sizes: list[int] = field(
        default_factory=lambda: [1],
        metadata={"help": "sequences per batch", "aliases": ["--batch_size", "--batch-size"]},
    )
    padded: bool = field(
        default=False, metadata={"help": "sequences of different lengths, padded on the left, with their mask"}
    )
    recipes: list[str] = field(
        default_factory=list,
        metadata={
            "help": f'any of {", ".join(RECIPES)}, or "all"; none: {", ".join(_DEFAULT_RECIPES)} '
            f"(with --generate: {', '.join(_GENERATE_RECIPES)})"
        },
    )
    prefill: int = field(
        default=2048, metadata={"help": "prompt length of the timed prefill, once per batch size; 0 to skip it"}
    )
    repeats: int = field(default=5, metadata={"help": "repeats, interleaved over the recipes"})
    steps: int = field(default=3, metadata={"help": "decode steps per repeat, of which the median counts"})
    dtype: str = field(default="float32", metadata={"help": "dtype of weights and cache"})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda"})
    bandwidth_mb: int = field(default=512, metadata={"help": "size of the tensor whose copying gives the bandwidth"})
    memory: bool = field(default=False, metadata={"help": "measure peak memory of prefill and decode instead of time"})
    memory_decode: bool = field(
        default=False, metadata={"help": "measure peak memory of decode steps on a filled cache instead of time"}
    )
    memory_steps: int = field(default=64, metadata={"help": "decode steps when measuring memory"})
    profile: bool = field(default=False, metadata={"help": "time of one decode step by operator instead"})
    operators: int = field(default=15, metadata={"help": "how many operators the profile shows"})
    generate: int = field(
        default=0, metadata={"help": "time so many tokens of `generate` of --model after a prompt of each context"}
    )
    model: str = field(
        default=DEMO, metadata={"help": 'for --generate: folder or hub name; "demo": SmolLM2-135M as MLA'}
    )
    output: str = field(default="results", metadata={"help": "folder for the results"})
    only: str | None = field(default=None, metadata={"help": "one recipe, for the memory measurement's own processes"})

    @property
    def settings(self) -> list[tuple[int, int]]:
        """Pairs of batch size and context."""
        return list(itertools.product(self.batch_sizes, self.contexts))


# Models


def build(args: Arguments) -> PreTrainedModel:
    """A model of the geometry with random weights."""
    geometry = GEOMETRIES[args.geometry]
    config = geometry.config(args.layers, args.whole_vocabulary)
    return geometry.build(config, parse_dtype(args.dtype), args.device)


def shared_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Another model on the same parameters: patching one leaves the other as it is, and costs the splice alone."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    return model.config.get_text_config(decoder=True)


def random_tokens(model: PreTrainedModel, *shape: int) -> torch.Tensor:
    return torch.randint(text_config(model).vocab_size, shape, device=model.device)


def apply(model: PreTrainedModel, recipe: Recipe) -> PreTrainedModel:
    """Patch the model by a recipe.

    Packed codes take their widths from calibration: on random tokens, as few as the calibrator accepts, and by the size
    of the latents alone. What the codes lose does not matter here; how many of them there are, of which widths, does.
    """
    if recipe.config is not None:
        patch_model_with_kvsplice(model, recipe.config)
    if recipe.is_packed:
        config = text_config(model)
        bytes_per_token = _PACKED_SHARE * 2 * (config.kv_lora_rank + config.qk_rope_head_dim)
        calibrator = KVSpliceCalibrator(model, metric="pca")
        # The first tokens of each window are exact and not counted.
        tokens = _CALIBRATION_TOKENS_PER_DIMENSION * config.kv_lora_rank
        count = -(-tokens // (_CALIBRATION_WINDOW - KVSpliceConfig(bytes_per_token=bytes_per_token).sink_tokens))
        windows = random_tokens(model, count, _CALIBRATION_WINDOW)
        calibrator.collect(list(windows.split(1)), max_tokens=windows.numel(), progress=False)
        splice = KVSpliceConfig(bytes_per_token=bytes_per_token, allocation="layer")
        patch_model_with_kvsplice(model, splice, calibration=calibrator)
    return model


def patched_models(model: PreTrainedModel, names: list[str]) -> dict[str, PreTrainedModel]:
    """A model per recipe, all on the same weights."""
    progress = tqdm(names, desc="patching", file=sys.stderr)
    return {name: apply(shared_copy(model), RECIPES[name]) for name in progress}


# Filled caches and steps on them


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
        if self.padding is None:
            return None
        return (torch.arange(length, device=self.padding.device) >= self.padding[:, None]).long()


def padding_of(batch: int, length: int, device: torch.device) -> torch.Tensor:
    """Left padding that differs within the batch, from none up to half of the length, [B]."""
    return torch.linspace(0, length // 2, batch, device=device).long()


@torch.no_grad()
def fill(model: PreTrainedModel, recipe: Recipe, batch: int, length: int, spare: int, padded: bool) -> Filled:
    """A cache of `length` tokens with room for `spare` more.

    A few tokens run through the model, which settles the kind of every layer. The rest are random latents, which each
    layer stores by its own `update` as it would those of the model. What a step costs does not depend on the numbers,
    only on how many there are and how they are stored, which is the same. And 16384 tokens of real prefill would take
    minutes for every recipe.
    """
    padding = padding_of(batch, length, model.device) if padded else None
    cache = recipe.make_cache(text_config(model), length + spare)
    filled = Filled(cache, min(length, _REAL_TOKENS), padding, random_tokens(model, batch, 1))
    step(model, filled, random_tokens(model, batch, filled.length), grow=0)
    config = text_config(model)
    sizes = (config.kv_lora_rank, config.qk_rope_head_dim)
    for start in range(filled.length, length, _FILL_CHUNK):
        end = min(start + _FILL_CHUNK, length)
        for layer in cache.layers:
            if padding is not None and hasattr(layer, "attention_mask"):
                layer.attention_mask = filled.mask(end)  # what the hook of a patched model tells its cache layer
            rows = (torch.randn(batch, 1, end - start, n, dtype=model.dtype, device=model.device) for n in sizes)
            layer.update(*rows)
    filled.length = length
    return filled


@torch.no_grad()
def step(model: PreTrainedModel, filled: Filled, tokens: torch.Tensor | None = None, grow: int = 1) -> None:
    """One forward pass of the next token, or of the first `tokens`, after which the cache is longer by `grow`."""
    tokens = filled.token if tokens is None else tokens
    mask = filled.mask(filled.length + grow)
    padding = {} if mask is None else {"attention_mask": mask}
    if mask is not None and filled.padding is not None:
        positions = torch.arange(mask.shape[1] - tokens.shape[1], mask.shape[1], device=mask.device)
        padding["position_ids"] = (positions - filled.padding[:, None]).clamp_min(0)
    model(tokens, **cache_argument(filled.cache), use_cache=True, logits_to_keep=1, **padding)
    filled.length += grow


def rewind(filled: Filled, count: int) -> None:
    """Take back the last tokens, so that every repeat reads the same number of them.

    `Cache.crop` alone will not do: in transformers 5.23 it fails on fp8 layers, whose `keys` stay empty, and static
    layers have none.
    """
    for layer in filled.cache.layers:
        if isinstance(layer, StaticLayer):
            layer.cumulative_length.sub_(count)
        elif getattr(layer, "_quantized_keys", None) is not None:
            for name in ("_quantized_keys", "_quantized_values"):
                rows, scale = getattr(layer, name)
                setattr(layer, name, (rows[..., :-count, :], scale))
            layer.cumulative_length -= count
        else:
            layer.crop(-count)
    filled.length -= count


# Time


def synchronise(device: str | torch.device) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def timed(run: Callable[[], object], device: str | torch.device) -> float:
    """Seconds of one call."""
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start


def copy_bandwidth(megabytes: int, device: str, attempts: int = 5) -> float:
    """Bytes per second at which a large tensor is copied, reads and writes counted, best of several.

    A decode step hardly writes, and memory may be read faster than it is copied (a processor that fetches a line before
    it writes one moves three bytes per byte copied, of which two are counted). So a step can come below this bound, the
    more so where its weights fit into the cache of the processor.
    """
    source = torch.ones(megabytes * 10**6 // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)  # the first one also takes the memory from the system
    seconds = min(timed(lambda: target.copy_(source), device) for _ in range(attempts))
    return 2 * source.nbytes / seconds


def cache_estimate(config: PreTrainedConfig, itemsize: int, batch: int, length: int) -> int:
    """About the bytes of a stock cache."""
    return batch * length * config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim) * itemsize


def step_estimate(config: PreTrainedConfig, itemsize: int, batch: int, length: int) -> int:
    """About the bytes that a stock step takes for a moment: keys and values of all heads, of one layer."""
    expanded = config.qk_nope_head_dim + config.v_head_dim  # what kv_b_proj gives
    keys = config.qk_nope_head_dim + config.qk_rope_head_dim  # put together in a new tensor, and scaled into another
    return batch * length * config.num_attention_heads * (expanded + 2 * keys) * itemsize


def prefill_estimate(config: PreTrainedConfig, itemsize: int, batch: int, length: int, device: str) -> int:
    """About the bytes that a prefill takes for a moment, spliced or not."""
    estimate = step_estimate(config, itemsize, batch, length)
    if torch.device(device).type == "cpu":
        # The fused attention of torch on a CPU wants keys and values of one head size, which MLA does not have. Without
        # it a layer holds all pairs of tokens: their products, and what softmax makes of them.
        estimate += 3 * batch * config.num_attention_heads * length**2 * itemsize
    return estimate


def free_memory(device: str) -> int:
    if torch.device(device).type == "cuda":
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + unused
    return psutil.virtual_memory().available


def too_large(model: PreTrainedModel, names: list[str], batch: int, length: int, device: str) -> dict[str, str]:
    """Why recipes cannot run in this setting: on a CPU the system kills what takes too much, without an error."""
    config, itemsize = text_config(model), model.dtype.itemsize
    caches = len(names) * cache_estimate(config, itemsize, batch, length)
    in_step, free = step_estimate(config, itemsize, batch, length), _MEMORY_SHARE * free_memory(device)
    if caches > free:
        return dict.fromkeys(names, f"the caches take {caches / 1e9:.1f} GB and {free / 1e9:.1f} GB are free")
    if caches + in_step <= free:
        return {}
    reason = f"a step takes {in_step / 1e9:.1f} GB beside {caches / 1e9:.1f} GB of caches, {free / 1e9:.1f} GB are free"
    return {name: reason for name in names if not RECIPES[name].is_spliced}


def prefill_too_large(model: PreTrainedModel, batch: int, length: int, device: str) -> str | None:
    """Why no prompt of this length can run, or None."""
    needed = prefill_estimate(text_config(model), model.dtype.itemsize, batch, length, device)
    free = _MEMORY_SHARE * free_memory(device)
    return None if needed <= free else f"a prefill takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.cuda.OutOfMemoryError) or "allocate memory" in str(error).lower()


def fill_all(
    models: dict[str, PreTrainedModel], batch: int, length: int, args: Arguments
) -> tuple[dict[str, Filled], dict[str, str]]:
    """A cache per recipe after one step on it, and why there is none for the others."""
    names = list(models)
    skipped = too_large(models[names[0]], names, batch, length, args.device)
    caches: dict[str, Filled] = {}
    for name in tqdm([name for name in names if name not in skipped], desc="filling caches", file=sys.stderr):
        try:
            torch.manual_seed(0)
            caches[name] = fill(models[name], RECIPES[name], batch, length, args.steps + 1, args.padded)
            step(models[name], caches[name])
            rewind(caches[name], 1)
        except Exception as error:
            # Whether the other caches of transformers work with MLA depends on its release; ours have to.
            if (name == _STOCK or RECIPES[name].is_spliced) and not is_out_of_memory(error):
                raise
            caches.pop(name, None)
            skipped[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return caches, skipped


@torch.no_grad()
def measure(models: dict[str, PreTrainedModel], batch: int, length: int, prefill: int, args: Arguments) -> list[Row]:
    """A row per recipe: seconds of each repeat of decode step and prefill, bytes of the cache and of what a step reads.

    Args:
        models: by recipe.
        batch, length: the setting.
        prefill: length of the timed prompt, or 0.
        args: of the script.
    """
    caches, skipped = fill_all(models, batch, length, args)
    rows: dict[str, Row] = {name: {"recipe": name, "batch_size": batch, "context": length} for name in models}
    for name, reason in skipped.items():
        rows[name]["skipped"] = reason
    for name, filled in caches.items():
        allocated = cache_nbytes(filled.cache, allocated=True)
        rows[name] |= {"cache_bytes": cache_nbytes(filled.cache), "cache_allocated_bytes": allocated}
        rows[name]["weight_bytes"] = weight_bytes(models[name], lambda name=name: step(models[name], caches[name]))
        rows[name]["moved_bytes"] = rows[name]["cache_bytes"] + rows[name]["weight_bytes"]
        rows[name] |= {"decode_s": [], "prefill_s": []}
        rewind(filled, 1)
    names = list(caches)
    any_model = next(iter(models.values()))
    reason = prefill_too_large(any_model, batch, prefill, args.device) if prefill else None
    if reason is not None:
        prefill = 0
        for row in rows.values():
            row["prefill_skipped"] = reason
    prompt = random_tokens(any_model, batch, max(prefill, 1))
    for repeat in tqdm(range(args.repeats + 1), desc="repeats", file=sys.stderr):  # the first one warms up
        turn = repeat % max(len(names), 1)  # each recipe comes first, second and last in turn
        for name in names[turn:] + names[:turn]:
            model, filled = models[name], caches[name]
            run = lambda model=model, filled=filled: step(model, filled)  # noqa: E731
            run()
            seconds = statistics.median(timed(run, args.device) for _ in range(args.steps))
            rewind(filled, args.steps + 1)
            if repeat:
                rows[name]["decode_s"].append(seconds)
            if prefill:
                seconds = timed(lambda name=name: run_prefill(models[name], RECIPES[name], prompt, args), args.device)
                if repeat:
                    rows[name]["prefill_s"].append(seconds)
    return list(rows.values())


@torch.no_grad()
def run_prefill(model: PreTrainedModel, recipe: Recipe, prompt: torch.Tensor, args: Arguments) -> None:
    batch, length = prompt.shape
    padding = padding_of(batch, length, model.device) if args.padded else None
    filled = Filled(recipe.make_cache(text_config(model), length), length, padding, prompt[:, :1])
    step(model, filled, prompt, grow=0)


def add_ratios(rows: list[Row], bandwidth: float | None = None) -> None:
    """Compare the rows of one setting with stock and with the bandwidth, repeat by repeat."""
    stock = next((row for row in rows if row["recipe"] == _STOCK and "skipped" not in row), None)
    for row in rows:
        if "skipped" in row:
            continue
        if bandwidth is not None:
            row["bound_s"] = row["moved_bytes"] / bandwidth
            row["times_bound"] = [seconds / row["bound_s"] for seconds in row["decode_s"]]
        if stock is not None:
            # Paired within each repeat: the machine's speed drifts from one to the next.
            row["decode_stock_over_this"] = _ratios(stock["decode_s"], row["decode_s"])
            row["prefill_this_over_stock"] = _ratios(row["prefill_s"], stock["prefill_s"])
            if "cache_bytes" in row:
                row["cache_ratio"] = row["cache_bytes"] / stock["cache_bytes"]


def _ratios(one: list[float], other: list[float]) -> list[float]:
    return [a / b for a, b in zip(one, other, strict=True)]


def time_all(args: Arguments) -> Row:
    models = patched_models(build(args), args.recipes)
    before = copy_bandwidth(args.bandwidth_mb, args.device)
    groups = []
    for batch, length in args.settings:
        console().print(f"batch {batch}, context {length}")
        prefill = args.prefill if length == args.contexts[0] else 0  # its time does not depend on the context
        groups.append(measure(models, batch, length, prefill, args))
    # At both ends: a busy moment of the machine must not pass for its bandwidth.
    bandwidth = max(before, copy_bandwidth(args.bandwidth_mb, args.device))
    for rows in groups:
        add_ratios(rows, bandwidth)
    return {"rows": [row for rows in groups for row in rows], "bandwidth_gb_s": bandwidth / 1e9}


# Memory


def release() -> None:
    """Give freed memory back to the system, so that taking it again can be seen."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def reset_peak(device: str) -> int:
    """Forget the peak memory so far; bytes in use now."""
    release()
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return psutil.Process().memory_info().rss


def read_peak(device: str) -> int:
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024


def peak_memory(args: Arguments) -> Row:
    """Peak bytes of prefill and decode, above what the loaded model takes. For one recipe."""
    recipe, batch, length = RECIPES[args.only or _STOCK], args.batch_sizes[0], args.contexts[0]
    model = apply(build(args), recipe)
    reason = prefill_too_large(model, batch, length + args.memory_steps, args.device)
    if reason is not None:
        raise ConfigError(reason)
    prompt = random_tokens(model, batch, length)
    padding = padding_of(batch, length, model.device) if args.padded else torch.zeros(batch, device=model.device)
    mask = (torch.arange(length, device=model.device) >= padding[:, None]).long()
    before = reset_peak(args.device)
    run_generate(model, recipe, prompt, mask, args.memory_steps)
    return {"peak_bytes": read_peak(args.device) - before}


def decode_memory(args: Arguments) -> Row:
    """Peak bytes of decode steps, above what they find: model and filled cache. For one recipe.

    The first step is kept apart. It holds what happens once: buffers of libraries, and where ours are concerned the
    larger buffer that a cache filled in one go moves to.
    """
    recipe, batch, length = RECIPES[args.only or _STOCK], args.batch_sizes[0], args.contexts[0]
    model = apply(build(args), recipe)
    name = args.only or _STOCK
    reason = too_large(model, [name], batch, length + args.memory_steps, args.device).get(name)
    if reason is not None:
        raise ConfigError(reason)
    filled = fill(model, recipe, batch, length, args.memory_steps + 1, args.padded)
    before = reset_peak(args.device)
    step(model, filled)
    first = read_peak(args.device) - before
    before = reset_peak(args.device)
    for _ in range(args.memory_steps):
        step(model, filled)
    temporary = read_peak(args.device) - before
    allocated = cache_nbytes(filled.cache, allocated=True)
    return {
        "first_step_bytes": first,
        "temporary_bytes": temporary,
        "cache_bytes": cache_nbytes(filled.cache),
        "cache_allocated_bytes": allocated,
        "total_bytes": allocated + temporary,
    }


def run_generate(
    model: PreTrainedModel,
    recipe: Recipe,
    prompt: torch.Tensor,
    mask: torch.Tensor,
    new_tokens: int,
    clock: StoppingCriteria | None = None,
) -> None:
    """Greedy `generate` of exactly so many tokens."""
    cache: Row = {}
    if recipe.make_cache is not _dynamic_cache:  # which is what `generate` makes by itself
        # Compiled, the static cache would be another benchmark.
        made = recipe.make_cache(text_config(model), prompt.shape[1] + new_tokens)
        cache = {"disable_compile": True, **cache_argument(made)}
    model.generate(
        prompt,
        attention_mask=mask,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([] if clock is None else [clock]),
        **cache,
    )


def memory_all(args: Arguments) -> Row:
    """A row per setting and recipe, each from a process of its own."""
    rows = []
    jobs = [(*setting, name) for setting in args.settings for name in args.recipes]
    for batch, length, name in tqdm(jobs, desc="peak memory", file=sys.stderr):
        one = ["--only", name, "--batch_sizes", str(batch), "--contexts", str(length)]
        process = subprocess.run(
            [sys.executable, *sys.argv, *one], capture_output=True, text=True, env={**os.environ, **_MALLOC}
        )
        row = {"recipe": name, "batch_size": batch, "context": length}
        if process.returncode == 0:
            row |= json.loads(process.stdout.splitlines()[-1])
        else:
            killed = "killed, perhaps for its memory" if process.returncode < 0 else ""
            row["skipped"] = killed or (process.stderr.strip().splitlines() or ["no message"])[-1]
        rows.append(row)
    return {"rows": rows}


# Profile


@torch.no_grad()
def profile_step(model: PreTrainedModel, filled: Filled, args: Arguments) -> dict[str, float]:
    """Milliseconds of a decode step by operator, its own time without that of the operators it calls."""
    on_gpu = torch.device(args.device).type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(args.steps):
            step(model, filled)
        synchronise(args.device)
    own = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    # On a GPU the kernels are listed as well as the operators that started them, with the same time.
    events = [event for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CPU]
    return {event.key: getattr(event, own) / args.steps / 1e3 for event in events if getattr(event, own) > 0}


def profile_all(args: Arguments) -> Row:
    models = patched_models(build(args), args.recipes)
    rows = []
    for batch, length in args.settings:
        caches, skipped = fill_all(models, batch, length, args)
        for name in models:
            row: Row = {"recipe": name, "batch_size": batch, "context": length}
            if name in skipped:
                row["skipped"] = skipped[name]
            else:
                row["operators_ms"] = profile_step(models[name], caches[name], args)
                row["total_ms"] = sum(row["operators_ms"].values())
            rows.append(row)
    return {"rows": rows}


# generate


class TokenClock(StoppingCriteria):
    """Notes when each token is there, and stops nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        synchronise(self.device)
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@torch.no_grad()
def generate_all(args: Arguments) -> Row:
    """Seconds of the tokens of `generate` after the first, which ends the prefill."""
    model, _ = load_model(args.model, args.dtype)
    model = model.to(args.device)
    last = max(args.contexts) + args.generate
    positions = text_config(model).max_position_embeddings
    if last > positions:
        raise ConfigError(f"--contexts and --generate come to {last} tokens; {args.model} has {positions} positions.")
    models = patched_models(model, args.recipes)
    recipes = {name: RECIPES[name] for name in models}
    if args.model == DEMO:  # what it was converted from
        original, _ = load_original_demo_model(parse_dtype(args.dtype))
        models[_ORIGINAL], recipes[_ORIGINAL] = original.to(args.device), Recipe()
    rows = [row for setting in args.settings for row in _generate_rows(models, recipes, *setting, args)]
    return {"rows": rows}


def _generate_rows(
    models: dict[str, PreTrainedModel], recipes: dict[str, Recipe], batch: int, length: int, args: Arguments
) -> list[Row]:
    names = list(models)
    prompt = random_tokens(models[names[0]], batch, length)
    mask = torch.ones_like(prompt)
    if args.padded:
        mask = (torch.arange(length, device=prompt.device) >= padding_of(batch, length, prompt.device)[:, None]).long()
    rows = {name: {"recipe": name, "batch_size": batch, "context": length} for name in names}
    for row in rows.values():
        row |= {"decode_s": [], "prefill_s": []}
    for repeat in tqdm(range(args.repeats + 1), desc="repeats", file=sys.stderr):  # the first one warms up
        turn = repeat % len(names)
        for name in names[turn:] + names[:turn]:
            clock = TokenClock(prompt.device)
            synchronise(prompt.device)
            start = time.perf_counter()
            # The first repeat needs no more tokens than warm up.
            run_generate(models[name], recipes[name], prompt, mask, args.generate if repeat else 2, clock)
            if repeat:
                rows[name]["prefill_s"].append(clock.times[0] - start)
                rows[name]["decode_s"].append((clock.times[-1] - clock.times[0]) / (len(clock.times) - 1))
    add_ratios(list(rows.values()))
    return list(rows.values())


# What comes out


def spread(values: list[float] | None, unit: str = "", scale: float = 1.0, digits: int = 2) -> str:
    """Median and range."""
    if not values:
        return "-"
    low, middle, high = (scale * value for value in (min(values), statistics.median(values), max(values)))
    return f"{middle:.{digits}f}{unit} ({low:.{digits}f}-{high:.{digits}f})"


def setting_cells(row: Row) -> list[str]:
    return [str(row["batch_size"]), str(row["context"]), row["recipe"]]


def new_table(rows: list[Row], *columns: str) -> Table:
    """With the rows that were skipped named below."""
    notes = [f"{' / '.join(setting_cells(row))}: skipped. {row['skipped']}" for row in rows if "skipped" in row]
    prefills = {f"batch {row['batch_size']}: {row['prefill_skipped']}" for row in rows if "prefill_skipped" in row}
    notes += sorted(prefills)
    return Table("batch", "context", "recipe", *columns, caption="\n".join(notes) or None, caption_justify="left")


def time_table(rows: list[Row]) -> Table:
    """Medians and ranges of times and of their ratios to stock, and bytes."""
    with_bytes = any("cache_bytes" in row for row in rows)
    columns = ["decode step (ms)", "stock / this"]
    if with_bytes:
        columns += ["x of bound", "moved (MB)", "cache bytes", "of stock"]
    columns += ["prefill (s)", "this / stock"]
    table = new_table(rows, *columns)
    for row in (row for row in rows if "skipped" not in row):
        cells = [*setting_cells(row), spread(row["decode_s"], scale=1e3, digits=1)]
        cells.append(spread(row.get("decode_stock_over_this"), "x"))
        if with_bytes:
            cells += [f"{statistics.median(row['times_bound']):.2f}", f"{row['moved_bytes'] / 1e6:.0f}"]
            cells += [f"{row['cache_bytes']:,}", f"{row['cache_ratio']:.3f}x" if "cache_ratio" in row else "-"]
        table.add_row(*cells, spread(row["prefill_s"]), spread(row.get("prefill_this_over_stock"), "x"))
    return table


def memory_table(rows: list[Row], columns: Mapping[str, str], compared: str) -> Table:
    """Megabytes, and how the figure `compared` relates to that of stock in the same setting."""
    table = new_table(rows, *columns.values(), "this / stock")
    measured = [row for row in rows if "skipped" not in row]
    stock = {(row["batch_size"], row["context"]): row[compared] for row in measured if row["recipe"] == _STOCK}
    for row in measured:
        base = stock.get((row["batch_size"], row["context"]))
        ratio = "-" if not base else f"{row[compared] / base:.3f}x"
        table.add_row(*setting_cells(row), *(f"{row[key] / 1e6:.1f}" for key in columns), ratio)
    return table


def profile_tables(rows: list[Row], operators: int) -> list[Table]:
    """Per setting the operators that take the most time in any recipe, with the recipes beside each other."""
    tables = []
    for setting, group in itertools.groupby(rows, lambda row: (row["batch_size"], row["context"])):
        every = list(group)
        measured = [row for row in every if "skipped" not in row]
        notes = [f"{row['recipe']}: skipped. {row['skipped']}" for row in every if "skipped" in row]
        names = {name for row in measured for name in row["operators_ms"]}
        top = sorted(names, key=lambda name: -max(row["operators_ms"].get(name, 0.0) for row in measured))[:operators]
        title = "own time of operators in a decode step (ms), batch {}, context {}".format(*setting)
        table = Table("operator", *(row["recipe"] for row in measured), title=title, caption="\n".join(notes) or None)
        for name in top:
            table.add_row(name, *(f"{row['operators_ms'].get(name, 0.0):.2f}" for row in measured))
        rest = (row["total_ms"] - sum(row["operators_ms"].get(name, 0.0) for name in top) for row in measured)
        table.add_row("all others", *(f"{milliseconds:.2f}" for milliseconds in rest))
        table.add_row("sum", *(f"{row['total_ms']:.2f}" for row in measured))
        tables.append(table)
    return tables


def draw(rows: list[Row], of: Callable[[Row], float], label: str, path: Path) -> None:
    """A figure of each row against the context, a panel per batch size and a line per recipe."""
    measured = [row for row in rows if "skipped" not in row]
    batches = sorted({row["batch_size"] for row in measured}) or [1]
    figure, panels = plt.subplots(
        1, len(batches), figsize=(5.5 * len(batches), 4.2), squeeze=False, constrained_layout=True
    )
    for axes, batch in zip(panels[0], batches, strict=True):
        for name in dict.fromkeys(row["recipe"] for row in measured):
            mine = sorted(
                (row["context"], of(row)) for row in measured if (row["recipe"], row["batch_size"]) == (name, batch)
            )
            axes.plot([length for length, _ in mine], [value for _, value in mine], marker="o", label=name)
        axes.set(xlabel="context (tokens)", ylabel=label, title=f"batch {batch}", xscale="log", yscale="log")
        ticks = sorted({row["context"] for row in measured})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xticks([], minor=True)
    panels[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def show(report: Row, args: Arguments, folder: Path) -> None:
    """Tables on stderr and a figure in the folder."""
    rows, terminal = report["rows"], console()
    if not terminal.is_terminal:
        terminal.width = 170
    if args.memory:
        terminal.print(memory_table(rows, {"peak_bytes": "peak above the model (MB)"}, "peak_bytes"))
        draw(rows, lambda row: row["peak_bytes"] / 1e6, "peak above the model (MB)", folder / "peak_memory.png")
    elif args.memory_decode:
        columns = {
            "cache_bytes": "cache (MB)",
            "cache_allocated_bytes": "allocated (MB)",
            "first_step_bytes": "first step (MB)",
            "temporary_bytes": "later steps (MB)",
            "total_bytes": "allocated + later (MB)",
        }
        terminal.print(memory_table(rows, columns, "total_bytes"))
        draw(rows, lambda row: row["total_bytes"] / 1e6, "cache and temporaries (MB)", folder / "decode_memory.png")
    elif args.profile:
        for table in profile_tables(rows, args.operators):
            terminal.print(table)
        draw(rows, lambda row: row["total_ms"], "own time of all operators (ms)", folder / "profile.png")
    else:
        terminal.print(time_table(rows))
        if "bandwidth_gb_s" in report:
            terminal.print(f"copying {args.bandwidth_mb} MB: {report['bandwidth_gb_s']:.1f} GB/s, read and written")
        draw(rows, lambda row: 1e3 * statistics.median(row["decode_s"]), "decode step (ms)", folder / "step_time.png")


def check(args: Arguments) -> None:
    """Say what is wrong before a model is built, and fill in which recipes run.

    Raises:
        ConfigError: a name is unknown, a number is too small, or something is not there.
    """
    if args.geometry not in GEOMETRIES:
        raise ConfigError(f"--geometry is {args.geometry!r}; it must be one of {', '.join(GEOMETRIES)}.")
    unknown = sorted({*args.recipes, *([] if args.only is None else [args.only])} - {*RECIPES, "all"})
    if unknown:
        raise ConfigError(f"--recipes has {', '.join(map(repr, unknown))}; it takes {', '.join(RECIPES)}, all.")
    default = _GENERATE_RECIPES if args.generate else _DEFAULT_RECIPES
    args.recipes = list(RECIPES) if "all" in args.recipes else list(dict.fromkeys(args.recipes)) or list(default)
    parse_dtype(args.dtype)
    smallest = {"layers": 1, "repeats": 1, "steps": 1, "memory_steps": 1, "bandwidth_mb": 1, "operators": 1}
    for name, least in smallest.items():
        if getattr(args, name) < least:
            raise ConfigError(f"--{name} is {getattr(args, name)}; it must be at least {least}.")
    for name in ("contexts", "batch_sizes"):
        if min(getattr(args, name)) < 1:
            raise ConfigError(f"--{name} has {min(getattr(args, name))}; it takes numbers of at least 1.")
    if args.generate == 1 or args.generate < 0:
        raise ConfigError(f"--generate is {args.generate}; it takes 2 or more tokens, of which the first is not timed.")
    modes = [name for name in ("memory", "memory_decode", "profile", "generate") if getattr(args, name)]
    if args.only is not None and not (args.memory or args.memory_decode):
        raise ConfigError("--only belongs to the processes that --memory and --memory_decode start; see --recipes.")
    if len(modes) > 1:
        raise ConfigError(f"{' and '.join(f'--{name}' for name in modes)} are measured one at a time.")
    if args.device.partition(":")[0] not in ("cpu", "cuda"):
        raise ConfigError(f"--device is {args.device!r}; it must be cpu or cuda.")
    on_gpu = torch.device(args.device).type == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise ConfigError(f"--device is {args.device!r}, but torch {torch.__version__} finds no GPU here.")
    if (args.memory or args.memory_decode) and not on_gpu and not Path("/proc/self/clear_refs").exists():
        raise ConfigError("Peak memory of a CPU is read from /proc, which is not there: this takes Linux, or a GPU.")


def run_mode(args: Arguments) -> Row:
    if args.memory or args.memory_decode:
        return memory_all(args)
    if args.profile:
        return profile_all(args)
    return generate_all(args) if args.generate else time_all(args)


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    with readable_errors():
        check(args)
        if args.only is not None:  # a process that `memory_all` started
            print(json.dumps(peak_memory(args) if args.memory else decode_memory(args)))
            return
        report = run_mode(args)
    folder = results_folder(args.output, "decode")
    show(report, args, folder)
    if len(args.settings) == 1:  # by recipe, where that names a row
        report["results"] = {row["recipe"]: row for row in report["rows"]}
    where = environment(args)
    finish({**report, **where, **where["versions"], "device": args.device}, folder)


if __name__ == "__main__":
    main()
