#!/usr/bin/env python
"""Decode and prefill of a patched model against the same model unpatched, side by side in one process.

The model has the geometry of a known one, few layers, and random weights, so nothing is downloaded. Repeats of the
recipes are interleaved, so that a slow moment of the machine hits all of them. The last line of stdout is one JSON
object.

    python scripts/benchmark_decode.py --context 4096 --prefill 2048
    python scripts/benchmark_decode.py --memory  # peak memory of prefill + decode, one process per recipe
"""

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
import transformers
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, HfArgumentParser, PreTrainedModel
from transformers.cache_utils import Cache

from kvsplice_hf import KVSpliceConfig, cache_nbytes, patch_model_with_kvsplice, unpatch_model


# Published geometries, with two changes that keep the share of attention in a step what it is in the whole model. Six
# routed experts run per token whatever their number, so eight cost the same time as 64 and a fraction of the memory.
# And the vocabulary is cut in proportion to the layers, or the output head would outweigh the few layers before it.
GEOMETRIES = {
    "v2-lite": {
        "published_layers": 27,
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "vocab_size": 102400,
    },
}
# For trying things out: the attention of V2-Lite on narrow layers.
GEOMETRIES["mini"] = GEOMETRIES["v2-lite"] | {
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "vocab_size": 8192,
}
RECIPES = {
    "stock": None,
    "full rank": KVSpliceConfig(compression_ratio=1.0, init="identity"),
    "rank R/2": KVSpliceConfig(compression_ratio=0.5, init="orthogonal"),
}


@dataclass
class Arguments:
    """Decode and prefill of a patched model against the same model unpatched."""

    geometry: str = field(default="v2-lite", metadata={"help": "model shape: " + ", ".join(GEOMETRIES)})
    layers: int = field(default=4, metadata={"help": "number of layers"})
    whole_vocabulary: bool = field(default=False, metadata={"help": "do not cut the vocabulary with the layers"})
    context: int = field(default=4096, metadata={"help": "tokens in the cache before the timed decode steps"})
    prefill: int = field(default=2048, metadata={"help": "prompt length of the timed prefill, 0 to skip it"})
    batch_size: int = field(default=1, metadata={"help": "sequences per batch"})
    repeats: int = field(default=5, metadata={"help": "repeats, interleaved over the recipes"})
    dtype: str = field(default="float32", metadata={"help": "dtype of weights and cache"})
    memory: bool = field(default=False, metadata={"help": "measure peak memory instead of time"})
    memory_steps: int = field(default=64, metadata={"help": "decode steps after the prefill when measuring memory"})
    only: str | None = field(default=None, metadata={"help": "one recipe, for the memory measurement's own processes"})


def build(args: Arguments) -> PreTrainedModel:
    """A model of the geometry with random weights."""
    torch.manual_seed(0)
    sizes = dict(GEOMETRIES[args.geometry])
    published_layers = sizes.pop("published_layers")
    if not args.whole_vocabulary:
        sizes["vocab_size"] = sizes["vocab_size"] * args.layers // published_layers
    config = DeepseekV2Config(num_hidden_layers=args.layers, max_position_embeddings=1 << 17, **sizes)
    return DeepseekV2ForCausalLM(config).to(getattr(torch, args.dtype)).eval()


def apply(model: PreTrainedModel, recipe: str) -> None:
    """Patch the model by a recipe."""
    if RECIPES[recipe] is not None:
        patch_model_with_kvsplice(model, RECIPES[recipe])


def fill_cache(model: PreTrainedModel, tokens: torch.Tensor, chunk: int = 2048) -> Cache:
    """A cache holding `tokens`, filled in chunks."""
    cache = None
    for start in range(0, tokens.shape[1], chunk):
        output = model(tokens[:, start : start + chunk], past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
    return cache


def timed(run: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(model: PreTrainedModel, args: Arguments) -> dict[str, dict[str, list[float] | int]]:
    """Seconds of each repeat of decode step and prefill, and cache bytes, by recipe."""
    vocabulary = model.config.vocab_size
    prompt = torch.randint(vocabulary, (args.batch_size, args.context))
    short = torch.randint(vocabulary, (args.batch_size, max(args.prefill, 1)))
    token = prompt[:, :1]
    results: dict[str, dict] = {name: {"decode_s": [], "prefill_s": []} for name in RECIPES}
    caches = {}
    for name in tqdm(RECIPES, desc="filling caches", file=sys.stderr):
        apply(model, name)
        caches[name] = fill_cache(model, prompt)
        results[name]["cache_bytes"] = cache_nbytes(caches[name])
        if name != "stock":
            unpatch_model(model)
    names = list(RECIPES)
    for repeat in tqdm(range(args.repeats + 1), desc="repeats", file=sys.stderr):  # the first one warms up
        turn = repeat % len(names)  # each recipe comes first, second and last in turn
        for name in names[turn:] + names[:turn]:
            apply(model, name)
            step = lambda name=name: model(token, past_key_values=caches[name], use_cache=True)  # noqa: E731
            step()
            results[name]["decode_s"].append(statistics.median(timed(step) for _ in range(3)))
            if args.prefill:
                results[name]["prefill_s"].append(timed(lambda: model(short, use_cache=True, logits_to_keep=1)))
            caches[name].crop(-4)  # so that every repeat reads the same number of tokens
            if name != "stock":
                unpatch_model(model)
    return {n: {k: v[1:] if isinstance(v, list) else v for k, v in r.items()} for n, r in results.items()}


def peak_memory(args: Arguments) -> dict[str, int]:
    """Peak resident bytes of prefill and decode, above what the loaded model takes. For one recipe, on Linux."""
    model = build(args)
    apply(model, args.only or "stock")
    prompt = torch.randint(model.config.vocab_size, (args.batch_size, args.context))
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of building the model
    before = psutil.Process().memory_info().rss
    model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=args.memory_steps, do_sample=False)
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024
    return {"peak_bytes": peak - before}


def summary(results: dict[str, dict], stock: dict) -> Table:
    """The results as a table: medians and ranges of times, and of their ratios to stock."""
    table = Table("recipe", "decode step (ms)", "stock / this", "prefill (ms)", "this / stock", "cache bytes")
    for name, row in results.items():
        cells = [name]
        for key, stock_over in (("decode_s", True), ("prefill_s", False)):
            if not row[key]:
                cells += ["-", "-"]
                continue
            cells.append(
                f"{statistics.median(row[key]) * 1e3:.1f} ({min(row[key]) * 1e3:.1f}-{max(row[key]) * 1e3:.1f})"
            )
            # Paired within each repeat: the machine's speed drifts from one to the next.
            ratios = [a / b if stock_over else b / a for a, b in zip(stock[key], row[key], strict=True)]
            cells.append(f"{statistics.median(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f})")
        table.add_row(*cells, f"{row['cache_bytes']:,}")
    return table


def environment(args: Arguments) -> dict[str, object]:
    """Where the figures come from."""
    return {
        "command": " ".join(sys.argv),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "arguments": vars(args),
    }


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    console = Console(stderr=True, width=160)
    with torch.no_grad():
        if args.memory and args.only is not None:
            print(json.dumps(peak_memory(args)))
            return
        if args.memory:
            results = {}
            for name in tqdm(RECIPES, desc="peak memory", file=sys.stderr):
                command = [sys.executable, *sys.argv, "--only", name]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                results[name] = json.loads(output.splitlines()[-1])
            table = Table("recipe", "peak MB above the model", "this / stock")
            for name, row in results.items():
                ratio = row["peak_bytes"] / results["stock"]["peak_bytes"]
                table.add_row(name, f"{row['peak_bytes'] / 1e6:.0f}", f"{ratio:.3f}x")
        else:
            results = measure(build(args), args)
            table = summary(results, results["stock"])
    console.print(table)
    print(json.dumps({"results": results, **environment(args)}))


if __name__ == "__main__":
    main()
