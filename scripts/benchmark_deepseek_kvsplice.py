#!/usr/bin/env python
"""Throughput and memory of a model with and without the splice: prefill and decode apart, over batch sizes.

Original and spliced run in one process on the same weights, interleaved trial by trial. A setting that runs out of
memory is noted and the next one goes on. The last line of stdout is one JSON object.

    python scripts/benchmark_deepseek_kvsplice.py           # SmolLM2-135M as MLA
    python scripts/benchmark_deepseek_kvsplice.py --model deepseek-ai/DeepSeek-V2-Lite --batch-sizes 1,4 --trials 3
"""

import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import psutil
import torch
from rich.table import Table
from tqdm import tqdm
from transformers import HfArgumentParser, PreTrainedModel

from kvsplice_hf import cache_nbytes, splice_disabled
from kvsplice_hf.bench.command_line import (
    DEMO,
    Budget,
    console,
    environment,
    finish,
    load_model,
    readable_errors,
    results_folder,
    splice,
)
from kvsplice_hf.upstream import cache_argument, cache_of


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


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


def reset_peak() -> int:
    """Forget the peak memory so far; bytes in use now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")
    return psutil.Process().memory_info().rss


def read_peak() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if not status.exists():
        return psutil.Process().memory_info().rss
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024


@torch.no_grad()
def trial(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int) -> dict[str, float]:
    """One prefill and `new_tokens` greedy steps: seconds, cache bytes, peak bytes above what was in use before."""
    before = reset_peak()
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
    cache_bytes = cache_nbytes(cache_of(output))
    return {
        "prefill_s": prefilled - start,
        "decode_s": (end - prefilled) / new_tokens,
        "cache_bytes": cache_bytes,
        "peak_bytes": read_peak() - before,
    }


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


def is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.cuda.OutOfMemoryError) or "allocate memory" in str(error).lower()


def run_all(model: PreTrainedModel, args: Arguments) -> list[dict[str, Any]]:
    lengths = [int(value) for value in args.seq_len.split(",")]
    settings = [(int(batch), length) for length in lengths for batch in args.batch_sizes.split(",")]
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
            cells += [f"{original[key]:.1f} -> {spliced[key]:.1f}", f"{spliced[key] / original[key]:.2f}x"]
        cells.append(f"{original['cache_bytes']:,.0f} -> {spliced['cache_bytes']:,.0f}")
        cells.append(f"{spliced['cache_bytes'] / original['cache_bytes']:.3f}x")
        cells.append(f"{spliced['peak_bytes'] / max(original['peak_bytes'], 1):.2f}x")
        table.add_row(*cells)
    return table


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Decode speed against context, one pair of lines per batch size."""
    figure, axes = plt.subplots(figsize=(6, 4), constrained_layout=True)
    measured = [row for row in rows if "error" not in row]
    for batch_size in sorted({row["batch_size"] for row in measured}):
        mine = [row for row in measured if row["batch_size"] == batch_size]
        for name, style in (("original", "--"), ("spliced", "-")):
            speeds = [row[name]["decode_tokens_per_s"] for row in mine]
            axes.plot([r["seq_len"] for r in mine], speeds, style, marker="o", label=f"{name}, batch {batch_size}")
    axes.set(xlabel="context (tokens)", ylabel="decode (tokens/s)", title="Decode speed against context")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    with readable_errors():
        model, tokenizer = load_model(args.model, args.dtype)
        splice(model, tokenizer, args)
        rows = run_all(model, args)
    folder = results_folder(args.output, "benchmark")
    draw(rows, folder / "speed_against_context.png")
    console().print(table_of(rows))
    finish({"results": rows, **environment(args)}, folder)


if __name__ == "__main__":
    main()
