#!/usr/bin/env python
"""Cache bytes and time of a decode step in each process of tensor parallelism, patched against unpatched.

Two models with random weights, one of latents (the attention of DeepSeek-V2-Lite) and one of key heads (that of Llama
3.1 8B), both on narrow layers, so that a step is mostly attention. Run it alone for one process, and under torchrun for
several. The first process writes; the last line of its stdout is one JSON object.

    torchrun --nproc-per-node 2 scripts/measure/processes.py --context 4096
"""

import functools
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel

from kvsplice_hf import cache_nbytes
from kvsplice_hf.bench.command_line import (
    ProgramParser,
    console,
    environment,
    finish,
    readable_errors,
    results_folder,
)
from kvsplice_hf.bench.filled_caches import Filled, fill, step
from kvsplice_hf.bench.geometries import GEOMETRIES, Geometry
from kvsplice_hf.bench.recipes import RECIPES, apply_recipe
from kvsplice_hf.bench.rounds import interleaved, timed
from kvsplice_hf.weights.processes import gathered, of_first, process_count, process_rank


MODELS = {
    "latents": GEOMETRIES["mini"],
    "key heads": Geometry(
        "Llama",
        {
            "hidden_size": 256,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 512,
            "vocab_size": 8192,
            "max_position_embeddings": 1 << 17,
        },
        published_layers=32,
    ),
}
NAMES = ["stock", "packed 4x"]


@dataclass
class Arguments:
    """Cache bytes and step time per process."""

    context: int = field(default=4096, metadata={"help": "tokens in the cache before the steps"})
    layers: int = field(default=2, metadata={"help": "of each model"})
    steps: int = field(default=8, metadata={"help": "decode steps in a turn, the median of which counts"})
    repeats: int = field(default=5, metadata={"help": "turns of each recipe"})
    output: str = field(default="results", metadata={"help": "folder for the report"})


def loaded(folder: str) -> PreTrainedModel:
    """The model of a folder, divided among the processes."""
    plan = {"tp_plan": "auto"} if process_count() > 1 else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **plan).eval()


def filled_of(model: PreTrainedModel, name: str, args: Arguments) -> Filled:
    """A cache with the key heads of this process."""
    spare = (args.repeats + 2) * args.steps
    return fill(model, RECIPES[name], 1, args.context, spare, padded=False, processes=process_count())


def measure(folder: str, args: Arguments) -> dict[str, list[dict[str, Any]]]:
    """By recipe, what each process holds and how long its steps take."""
    torch.manual_seed(0)  # the same tokens in all processes
    models = {name: apply_recipe(loaded(folder), RECIPES[name]) for name in NAMES}
    caches = {name: filled_of(model, name, args) for name, model in models.items()}
    sizes = {name: cache_nbytes(filled.cache) for name, filled in caches.items()}
    times: dict[str, list[float]] = {name: [] for name in NAMES}
    for turn in interleaved(NAMES, args.repeats):
        run = functools.partial(step, models[turn.name], caches[turn.name])
        seconds = [timed(run, "cpu") for _ in range(args.steps)]
        if turn.counts:
            times[turn.name].append(median(seconds))
    own = {name: {"cache_bytes": sizes[name], "step_s": times[name]} for name in NAMES}
    return {name: [of_rank[name] for of_rank in gathered(own)] for name in NAMES}


def show(results: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    """The table, a line per model, recipe and process."""
    table = Table(title="Decode steps in each process")
    for column in ("model", "recipe", "process", "cache (MB)", "step (ms)"):
        table.add_column(column)
    for model, recipes in results.items():
        for recipe, ranks in recipes.items():
            for rank, found in enumerate(ranks):
                cells = f"{found['cache_bytes'] / 1e6:.3f}", f"{1e3 * median(found['step_s']):.2f}"
                table.add_row(model, recipe, f"{rank} of {len(ranks)}", *cells)
    console().print(table)


def main() -> None:
    (args,) = ProgramParser(Arguments).parse_args_into_dataclasses()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")
    try:
        with tempfile.TemporaryDirectory() as own:
            shared, results = of_first(own), {}
            for name, geometry in MODELS.items():
                folder = str(Path(shared) / name.replace(" ", "_"))
                if process_rank() == 0:
                    geometry.build(geometry.config(args.layers), torch.float32, "cpu").save_pretrained(folder)
                gathered(folder)  # once it is written
                results[name] = measure(folder, args)
        if process_rank() == 0:
            show(results)
            report = {"processes": process_count(), "results": results} | environment(args)
            finish(report, results_folder(args.output, "processes"))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    with readable_errors():
        main()
