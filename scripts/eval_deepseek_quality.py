#!/usr/bin/env python
"""Perplexity of a model with and without the splice, through the cache, with KL divergence and top-1 agreement.

Both come from one process and one set of weights. Every token but the first of a window is predicted once; windows do
not overlap. Of a text only the evaluation half is scored: of a file what is behind its middle, of a folder every other
file. The other half is left for calibration. A second run without a cache checks that it measures the same. The last
line of stdout is one JSON object.

    python scripts/eval_deepseek_quality.py                 # SmolLM2-135M as MLA
    python scripts/eval_deepseek_quality.py --model deepseek-ai/DeepSeek-V2-Lite --bytes-per-token 288 192
    python scripts/eval_deepseek_quality.py --compression-ratio 1.0 0.75 0.5 --calibration none
"""

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.table import Table
from transformers import PreTrainedModel

from kvsplice_hf import (
    KVSpliceConfig,
    get_kv_cache_size,
    patch_model_with_kvsplice,
    unpatch_model,
)
from kvsplice_hf.bench.command_line import (
    DEMO,
    Calibration,
    ProgramParser,
    calibrate,
    console,
    environment,
    finish,
    load_model,
    readable_errors,
    results_folder,
)
from kvsplice_hf.bench.tables import NOT_MEASURED, with_error
from kvsplice_hf.evaluation import score_windows
from kvsplice_hf.patch.state import patched_sites
from kvsplice_hf.text import load_texts, token_windows


# Relative difference of the perplexities with and without a cache above which the measurement is called broken. The
# two sum in another order, and bf16 rounds.
CACHE_TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 1e-2}
# Of packed rows: a number between two levels falls to one or the other for its last digit, and what follows from it
# makes others fall, so that the two runs differ by a part of what the codes lose, in either direction.
PACKED_TOLERANCE = 1e-2


@dataclass
class Arguments(Calibration):
    """Perplexity of a model with and without the splice, through the cache."""

    model: str = field(default=DEMO, metadata={"help": 'folder, hub name, "demo" (SmolLM2 as MLA) or "smollm2"'})
    compression_ratio: list[float] = field(default_factory=list, metadata={"help": "r / R, none, one or several"})
    bytes_per_token: list[float] = field(
        default_factory=list, metadata={"help": "bytes per token and layer of packed codes, none, one or several"}
    )
    init: str = field(default="svd", metadata={"help": "start of the splice: svd, orthogonal, identity"})
    dataset: str = field(
        default="pydoc",
        metadata={
            "help": "pydoc, wikitext, fineweb-edu, tinystories, c4, file, folder; only its evaluation half is scored "
            "(the second half of a file, every other file of a folder), the other is left for calibration"
        },
    )
    samples: int = field(default=8, metadata={"help": "windows to score"})
    window: int = field(default=512, metadata={"help": "tokens per window"})
    batch_size: int = field(default=1, metadata={"help": "windows per forward"})
    chunk: int = field(default=128, metadata={"help": "tokens per forward through the cache"})
    check_samples: int = field(default=1, metadata={"help": "windows of the check without a cache"})
    dtype: str = field(default="float32", metadata={"help": "dtype of the model"})
    output: str = field(default="results", metadata={"help": "folder for the results"})


def budgets(args: Arguments) -> list[dict[str, float]]:
    """The settings to measure; a quarter of the stock bytes where none are given."""
    ratios = [{"compression_ratio": ratio} for ratio in args.compression_ratio]
    return ratios + [{"bytes_per_token": size} for size in args.bytes_per_token] or [{}]


def evaluate_budget(
    model: PreTrainedModel, windows: torch.Tensor, budget: dict[str, float], calibration: Any, args: Arguments
) -> dict[str, Any]:
    """Patch, score with and without a cache, unpatch."""
    config = KVSpliceConfig(**budget, init=args.init)
    # Full rank is exact as it is; calibrated, it would be exact but for rounding.
    patch_model_with_kvsplice(model, config, calibration=None if config.compression_ratio == 1.0 else calibration)
    try:
        size = get_kv_cache_size(model, seq_len=args.window)
        patched = patched_sites(model)
        summary: dict[str, Any] = score_windows(model, windows, batch_size=args.batch_size, chunk=args.chunk).summary()
        difference = no_cache_difference(model, windows[: args.check_samples], args.chunk)
    finally:
        unpatch_model(model)
    summary["budget"] = budget or {"bytes_per_token": "a quarter of stock in bf16"}
    summary["bytes_per_token_and_layer"] = size.compressed_bytes / args.window / len(patched)
    summary["bytes_ratio"] = size.compressed_bytes / size.original_bytes
    summary["no_cache_difference"] = difference
    tolerance = max(CACHE_TOLERANCE[args.dtype], PACKED_TOLERANCE if config.is_packed else 0.0)
    if difference is None:
        summary["cache_check"] = NOT_MEASURED
    else:
        summary["cache_check"] = "passed" if difference <= tolerance else "FAILED"
    return summary


def no_cache_difference(model: PreTrainedModel, windows: torch.Tensor, chunk: int) -> float | None:
    """Relative difference of the perplexities with and without a cache; None without windows."""
    if not len(windows):
        return None
    cached = score_windows(model, windows, chunk=chunk, progress=False).summary()["perplexity"]
    plain = score_windows(model, windows, chunk=None, progress=False).summary()["perplexity"]
    return abs(plain / cached - 1)


def scored_text(source: str, windows: torch.Tensor) -> str:
    """Which part of a text the figures are of."""
    half = "the evaluation half"
    if Path(source).is_dir():
        half = "the evaluation half (every other file)"
    elif Path(source).is_file():
        half = "the evaluation half (what is behind the middle of the file)"
    count, window = windows.shape
    return f"{count} windows of {window} tokens from {half} of {source}; the other half is left for calibration"


def table_of(rows: list[dict[str, Any]]) -> Table:
    table = Table("budget", "cache bytes", "perplexity", "original", "loss", "KL (nats)", "top-1", "no-cache check")
    for row in rows:
        table.add_row(
            ", ".join(f"{name} {value}" for name, value in row["budget"].items()),
            f"{row['bytes_ratio']:.3f}x",
            with_error(row["perplexity"], row["perplexity_stderr"]),
            with_error(row["original_perplexity"], row["original_perplexity_stderr"]),
            f"{row['loss_percent']:+.2f} %",
            f"{row['kl']:.4f}",
            f"{row['top1_agreement']:.1%}",
            row["cache_check"] + ("" if row["cache_check"] == NOT_MEASURED else f" ({row['no_cache_difference']:.1e})"),
        )
    return table


def draw(rows: list[dict[str, Any]], path: Any) -> None:
    """Quality against bytes."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    rows = sorted(rows, key=lambda row: row["bytes_ratio"])
    errors = [math.nan if row["perplexity_stderr"] is None else row["perplexity_stderr"] for row in rows]
    axes.errorbar(
        [r["bytes_ratio"] for r in rows], [r["perplexity"] for r in rows], errors, marker="o", label="spliced"
    )
    axes.axhline(rows[0]["original_perplexity"], linestyle="--", color="grey", label="original")
    axes.set(xlabel="cache bytes over stock", ylabel="perplexity", title="Quality against cache bytes", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    (args,) = ProgramParser(Arguments).parse_args_into_dataclasses()
    with readable_errors():
        model, tokenizer = load_model(args.model, args.dtype)
        texts = load_texts(args.dataset, "evaluation")
        windows = token_windows(tokenizer, texts, args.window, args.samples)
        calibration = calibrate(model, tokenizer, args)
        rows = [evaluate_budget(model, windows, budget, calibration, args) for budget in budgets(args)]
    folder = results_folder(args.output, "quality")
    draw(rows, folder / "quality_against_bytes.png")
    text = scored_text(args.dataset, windows)
    console().print(table_of(rows))
    console().print(f"Scored: {text}.", highlight=False, soft_wrap=True)
    finish({"results": rows, "scored_text": text, **environment(args)}, folder)
    if any(row["cache_check"] == "FAILED" for row in rows):
        sys.exit("The perplexity through the cache differs from the one without: do not trust these figures.")


if __name__ == "__main__":
    main()
