#!/usr/bin/env python
"""Write an MLA model with a smaller latent, a stock checkpoint for engines without the plug-in; say what it costs.

Perplexity and divergence are measured on text that neither calibration nor healing sees: of the closed form, and after
tuning what was changed. The last line of stdout is one JSON object.

    python scripts/run/convert_to_mla.py --model demo --output smollm2-plain --plain --kv-lora-rank 512
    python scripts/run/reduce_rank.py --model smollm2-plain --rank 256 --heal_steps 200 --output smollm2-256
    python scripts/run/reduce_rank.py --model my-deepseek --rank 256 --calibration notes.txt --output my-deepseek-256
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import PreTrainedModel

from kvsplice_hf import KVSpliceCalibrator
from kvsplice_hf.bench.command_line import (
    DEMO,
    LoadedModel,
    ProgramParser,
    console,
    environment,
    load_model,
    readable_errors,
)
from kvsplice_hf.bench.conversion import compare
from kvsplice_hf.bench.tables import with_error
from kvsplice_hf.bench.texts import spread_windows
from kvsplice_hf.convert import ReducedLayer, reduce_rank
from kvsplice_hf.training import heal


@dataclass
class Arguments:
    """Write an MLA model with a smaller latent, and report what it costs."""

    output: str = field(metadata={"help": "folder for the result; must not exist, or be empty"})
    model: str = field(default=DEMO, metadata={"help": 'folder or hub name of an MLA model; "demo": SmolLM2 as MLA'})
    rank: int = field(default=256, metadata={"help": "the new kv_lora_rank; engines are made for 512, some for 256"})
    dtype: str = field(default="float32", metadata={"help": "dtype to load, tune and save in"})
    calibration: str = field(default="varied", metadata={"help": "text to calibrate on, or a file or folder"})
    calibration_tokens: int = field(default=16384, metadata={"help": "how many tokens of it"})
    calibration_window: int = field(default=1024, metadata={"help": "tokens per calibration sequence"})
    statistics: str | None = field(default=None, metadata={"help": "statistics of the model, kept or to be kept"})
    heal_steps: int = field(default=0, metadata={"help": "steps of tuning what was changed; 0: none"})
    heal_text: list[str] = field(default_factory=lambda: ["varied", "pydoc"], metadata={"help": "texts to tune on"})
    heal_windows: int = field(default=512, metadata={"help": "at most so many windows of each"})
    heal_window: int = field(default=512, metadata={"help": "tokens per window"})
    batch_size: int = field(default=4, metadata={"help": "windows of a step"})
    learning_rate: float = field(default=1e-3, metadata={"help": "in units of the root mean square of a weight"})
    evaluation: list[str] = field(default_factory=lambda: ["varied", "pydoc"], metadata={"help": "texts to measure on"})
    evaluation_tokens: int = field(default=4096, metadata={"help": "how many tokens of each; 0: none"})
    window: int = field(default=1024, metadata={"help": "tokens per evaluated sequence"})


def statistics_of(loaded: LoadedModel, tokens: torch.Tensor, path: str | None) -> KVSpliceCalibrator:
    """Statistics of the model, read from a file if it is there, and written to it otherwise.

    Raises:
        CalibrationError: the file is damaged, or of another model.
    """
    if path is not None and Path(path).exists():
        return KVSpliceCalibrator.load(path, loaded.model)
    calibrator = KVSpliceCalibrator(loaded.model)
    calibrator.collect(tokens, max_tokens=tokens.numel(), window=tokens.shape[1])
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        calibrator.save(path)
    return calibrator


def measure(original: PreTrainedModel, other: PreTrainedModel, tokenizer: Any, args: Arguments) -> dict[str, Any]:
    """Perplexity and divergence on each text."""
    if not args.evaluation_tokens:
        return {}
    windows = {
        text: spread_windows(tokenizer, text, "evaluation", args.window, args.evaluation_tokens)
        for text in args.evaluation
    }
    return {text: compare(original, other, rows) for text, rows in windows.items()}


def layers_of(layers: list[ReducedLayer]) -> list[dict[str, Any]]:
    return [vars(layer) for layer in layers]


def run(args: Arguments) -> dict[str, Any]:
    """Load, reduce, measure, tune, measure, save.

    Raises:
        KVSpliceError: the model or a setting cannot be used.
    """
    loaded = load_model(args.model, args.dtype)
    model, tokenizer = loaded
    tokens = spread_windows(
        tokenizer, args.calibration, "calibration", args.calibration_window, args.calibration_tokens
    )
    statistics = statistics_of(loaded, tokens, args.statistics)
    start = time.perf_counter()
    smaller, layers = reduce_rank(model, args.rank, tokens=tokens, calibration=statistics)
    report: dict[str, Any] = {
        "reduction_s": time.perf_counter() - start,
        "rank_before": model.config.kv_lora_rank,
        "rank_after": smaller.config.kv_lora_rank,
        "row_numbers_before": model.config.kv_lora_rank + model.config.qk_rope_head_dim,
        "row_numbers_after": smaller.config.kv_lora_rank + model.config.qk_rope_head_dim,
        "calibration_tokens": tokens.numel(),
        "layers": layers_of(layers),
        "closed_form": measure(model, smaller, tokenizer, args),
    }
    if args.heal_steps:
        parts = [
            spread_windows(tokenizer, text, "calibration", args.heal_window, args.heal_windows * args.heal_window)
            for text in args.heal_text
        ]
        start = time.perf_counter()
        divergences = heal(
            smaller,
            model,
            torch.cat(parts),
            steps=args.heal_steps,
            learning_rate=args.learning_rate,
            batch_size=args.batch_size,
        )
        report |= {"healing_s": time.perf_counter() - start, "divergences": divergences}
        report["healed"] = measure(model, smaller, tokenizer, args)
    smaller.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    return report


def summary(report: dict[str, Any]) -> Table:
    table = Table("text", "model", "perplexity", "change", "divergence (nats)")
    for text, closed in report["closed_form"].items():
        table.add_row(text, f"R = {report['rank_before']}", f"{closed['perplexity_before']:.3f}", "", "")
        for name in ("closed_form", "healed"):
            if name in report:
                row = report[name][text]
                change = with_error(row["perplexity_change_percent"], row["perplexity_change_stderr_percent"])
                label = f"R = {report['rank_after']}, {name.replace('_', ' ')}"
                table.add_row(text, label, f"{row['perplexity_after']:.3f}", change, f"{row['kl_nats']:.4f}")
    return table


def main() -> None:
    (args,) = ProgramParser(Arguments).parse_args_into_dataclasses()
    output = Path(args.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise SystemExit(
            f"--output {output} exists and is not an empty folder. Name another one; nothing is overwritten."
        )
    with readable_errors():
        report = run(args)
    console().print(summary(report))
    print(json.dumps(report | environment(args)))


if __name__ == "__main__":
    main()
