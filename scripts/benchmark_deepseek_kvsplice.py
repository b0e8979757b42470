#!/usr/bin/env python
"""Throughput and memory of a model with and without the splice: prefill and decode apart, over batch sizes.

Original and spliced run in one process on the same weights, interleaved trial by trial. Peak memory is measured on a
GPU only: on a CPU, freed memory is used again, so that one process cannot tell. A setting that runs out of memory is
noted and the next one goes on. The last line of stdout is one JSON object.

    python scripts/benchmark_deepseek_kvsplice.py           # SmolLM2-135M as MLA
    python scripts/benchmark_deepseek_kvsplice.py --model deepseek-ai/DeepSeek-V2-Lite --batch-sizes 1,4 --trials 3
"""

import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.table import Table
from tqdm import tqdm
from transformers import PreTrainedModel

from kvsplice_hf import ConfigError, cache_nbytes, splice_disabled
from kvsplice_hf.bench.command_line import (
    DEMO,
    Budget,
    ProgramParser,
    console,
    environment,
    finish,
    load_model,
    readable_errors,
    results_folder,
    splice,
)
from kvsplice_hf.bench.memory_limits import is_out_of_memory
from kvsplice_hf.bench.tables import ratio
from kvsplice_hf.upstream import cache_argument, cache_of


@dataclass
class Arguments(Budget):
    """Throughput and memory of a model with and without the splice."""

    model: str = field(default=DEMO, metadata={"help": 'folder or hub name; "demo": SmolLM2-135M as MLA'})
    batch_sizes: str = field(default="1,4,8,16", metadata={"help": "batch sizes, comma-separated"})
    seq_len: str = field(default="512", metadata={"help": "prompt lengths, comma-separated"})
    new_tokens: int = field(default=16, metadata={"help": "decode steps per trial"})
    trials: int = field(default=3, metadata={"help": "repeats per setting"})
    dtype: str = field(default="float32", metadata={"help": "dtype of the model"})
    output: str = field(default="results", metadata={"help": "folder for the results"})


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@torch.no_grad()
def trial(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int) -> dict[str, float]:
    """One prefill and `new_tokens` greedy steps: seconds, cache bytes, and on a GPU peak bytes above those before."""
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    synchronise()
    start = time.perf_counter()
    output = model(prompt, use_cache=True, logits_to_keep=1)
    synchronise()
    prefilled = time.perf_counter()
    for _ in range(new_tokens):
        token = output.logits[:, -1:].argmax(-1)
        output = model(token, **cache_argument(cache_of(output)), use_cache=True)
    synchronise()
    end = time.perf_counter()
    measured = {
        "prefill_s": prefilled - start,
        "decode_s": (end - prefilled) / new_tokens,
        "cache_bytes": cache_nbytes(cache_of(output)),
    }
    return measured | ({"peak_bytes": torch.cuda.max_memory_allocated() - before} if has_gpu else {})


def measure(model: PreTrainedModel, batch_size: int, length: int, args: Arguments) -> dict[str, Any]:
    """Medians and spreads of one setting, original and spliced."""
    prompt = torch.randint(model.config.get_text_config().vocab_size, (batch_size, length), device=model.device)
    trials: dict[str, list[dict[str, float]]] = {"original": [], "spliced": []}
    for _ in range(args.trials + 1):  # the first one warms up
        with splice_disabled(model):
            trials["original"].append(trial(model, prompt, args.new_tokens))
        trials["spliced"].append(trial(model, prompt, args.new_tokens))
    row: dict[str, Any] = {"batch_size": batch_size, "seq_len": length}
    for name, runs in trials.items():
        measured = {key: [run[key] for run in runs[1:]] for key in runs[0]}
        row[name] = {key: statistics.median(values) for key, values in measured.items()}
        row[name] |= {f"{key}_spread": [min(values), max(values)] for key, values in measured.items()}
        row[name]["prefill_tokens_per_s"] = batch_size * length / row[name]["prefill_s"]
        row[name]["decode_tokens_per_s"] = batch_size / row[name]["decode_s"]
    return row


def settings_of(args: Arguments) -> list[tuple[int, int]]:
    """Batch sizes and lengths to measure.

    Raises:
        ConfigError: an argument is no number above 0.
    """
    given = {name: getattr(args, name) for name in ("batch_sizes", "seq_len", "trials", "new_tokens")}
    for name, values in given.items():
        if not all(value.strip().isdecimal() and int(value) for value in str(values).split(",")):
            raise ConfigError(f"--{name} is {values!r}; it takes numbers above 0.")
    batches, lengths = ([int(value) for value in given[name].split(",")] for name in ("batch_sizes", "seq_len"))
    return [(batch, length) for length in lengths for batch in batches]


def run_all(model: PreTrainedModel, args: Arguments, settings: list[tuple[int, int]]) -> list[dict[str, Any]]:
    rows = []
    for batch_size, length in tqdm(settings, desc="settings", file=sys.stderr):
        try:
            rows.append(measure(model, batch_size, length, args))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            rows.append({"batch_size": batch_size, "seq_len": length, "error": "out of memory"})
    return rows


def table_of(rows: list[dict[str, Any]]) -> Table:
    headers = (
        "batch",
        "prompt",
        "prefill tok/s",
        "ratio",
        "decode tok/s",
        "ratio",
        "cache bytes",
        "ratio",
        "peak ratio",
    )
    table = Table(*headers)
    for row in rows:
        cells = [str(row["batch_size"]), str(row["seq_len"])]
        if "error" in row:
            table.add_row(*cells, row["error"])
            continue
        original, spliced = row["original"], row["spliced"]
        for key in ("prefill_tokens_per_s", "decode_tokens_per_s"):
            cells += [f"{original[key]:.1f} -> {spliced[key]:.1f}", ratio(spliced[key], original[key])]
        cells.append(f"{original['cache_bytes']:,.0f} -> {spliced['cache_bytes']:,.0f}")
        cells.append(ratio(spliced["cache_bytes"], original["cache_bytes"], ".3f"))
        cells.append(ratio(spliced.get("peak_bytes"), original.get("peak_bytes")))
        table.add_row(*cells)
    return table


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Decode speed against context, one pair of lines per batch size."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    measured = [row for row in rows if "error" not in row]
    for batch_size in sorted({row["batch_size"] for row in measured}):
        mine = [row for row in measured if row["batch_size"] == batch_size]
        for name, style in (("original", "--"), ("spliced", "-")):
            speeds = [row[name]["decode_tokens_per_s"] for row in mine]
            axes.plot([r["seq_len"] for r in mine], speeds, style, marker="o", label=f"{name}, batch {batch_size}")
    axes.set(xlabel="context (tokens)", ylabel="decode (tokens/s)", title="Decode speed against context")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    (args,) = ProgramParser(Arguments).parse_args_into_dataclasses()
    with readable_errors():
        settings = settings_of(args)
        model, tokenizer = load_model(args.model, args.dtype)
        splice(model, tokenizer, args)
        rows = run_all(model, args, settings)
    folder = results_folder(args.output, "benchmark")
    draw(rows, folder / "speed_against_context.png")
    console().print(table_of(rows))
    finish({"results": rows, **environment(args)}, folder)


if __name__ == "__main__":
    main()
