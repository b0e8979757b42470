#!/usr/bin/env python
"""Do errors add up in a long generation? Divergence to the original, step by step, under the original's own tokens.

The original continues prompts greedily; the spliced model is given the same tokens one by one through its cache. One
line per block of steps: were errors to add up, later blocks would diverge more. The last line of stdout is one JSON
object.

    python scripts/measure/drift.py --bytes_per_token 154                 # SmolLM2-135M as MLA, 512 tokens
    python scripts/measure/drift.py --prompts 8 --steps 1024 --bytes_per_token 193 --calibration auto
"""

import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.table import Table

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
from kvsplice_hf.bench.texts import spread_windows
from kvsplice_hf.errors import ConfigError
from kvsplice_hf.evaluation.drift import Drift, measure_drift


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


@dataclass
class Arguments(Budget):
    """Divergence of a spliced model in a long generation, step by step."""

    model: str = field(default=DEMO, metadata={"help": 'folder, hub name, "demo" (SmolLM2 as MLA) or "smollm2"'})
    texts: list[str] = field(default_factory=lambda: ["pydoc"], metadata={"help": "where prompts come from"})
    prompts: int = field(default=4, metadata={"help": "prompts per text; all are read as one batch"})
    prompt_tokens: int = field(default=64, metadata={"help": "tokens of each"})
    steps: int = field(default=512, metadata={"help": "tokens to write"})
    block: int = field(default=64, metadata={"help": "steps per line of the table"})
    dtype: str = field(default="float32", metadata={"help": "dtype of the model"})
    output: str = field(default="results", metadata={"help": "folder for the results"})


def check(args: Arguments, positions: int | None = None) -> None:
    """Raises ConfigError for settings that no model, or not this one, could run with."""
    for name in ("prompts", "steps", "block"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} is {getattr(args, name)}; it must be at least 1.")
    if args.prompt_tokens < 2:
        raise ConfigError(f"--prompt_tokens is {args.prompt_tokens}; a prompt needs two tokens at least.")
    last = args.prompt_tokens + args.steps
    if positions is not None and last > positions:
        raise ConfigError(f"--prompt_tokens and --steps come to {last} tokens; {args.model} has {positions} positions.")


def blocks_of(drift: Drift, size: int) -> list[dict[str, Any]]:
    """Mean divergence and agreement of each block of steps; standard errors over prompts."""
    rows = []
    for index, part in enumerate(drift.divergence.split(size, dim=1)):
        per_prompt = part.mean(1).tolist()
        agrees = drift.agrees[:, index * size :][:, :size]
        error = statistics.stdev(per_prompt) / math.sqrt(len(per_prompt)) if len(per_prompt) > 1 else None
        rows.append(
            {
                "first_step": index * size + 1,
                "last_step": index * size + part.shape[1],
                "kl_nats": statistics.fmean(per_prompt),
                "kl_stderr": error,
                "top1_agreement": agrees.double().mean().item(),
            }
        )
    return rows


def table_of(rows: list[dict[str, Any]]) -> Table:
    table = Table("steps", "KL (nats)", "same top token")
    for row in rows:
        error = "" if row["kl_stderr"] is None else f" ± {row['kl_stderr']:.5f}"
        steps = f"{row['first_step']} - {row['last_step']}"
        table.add_row(steps, f"{row['kl_nats']:.5f}{error}", f"{row['top1_agreement']:.1%}")
    return table


def draw(drift: Drift, rows: list[dict[str, Any]], path: Path) -> None:
    """Mean over prompts of each step, and of each block."""
    figure, axes = plt.subplots(figsize=(8, 4), constrained_layout=True)
    axes.plot(range(1, drift.divergence.shape[1] + 1), drift.divergence.mean(0), color="tab:grey", linewidth=0.5)
    for row in rows:
        axes.plot([row["first_step"], row["last_step"]], [row["kl_nats"]] * 2, color="tab:red", linewidth=2)
    axes.set(xlabel="step", ylabel="KL to the original (nats)")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def run(args: Arguments) -> tuple[Drift, dict[str, Any]]:
    check(args)
    model, tokenizer = load_model(args.model, args.dtype)
    check(args, getattr(model.config.get_text_config(), "max_position_embeddings", None))
    length = args.prompt_tokens
    windows = [spread_windows(tokenizer, text, "evaluation", length, args.prompts * length) for text in args.texts]
    splice(model, tokenizer, args)
    drift = measure_drift(model, torch.cat(windows).to(model.device), args.steps)
    drift = Drift(drift.tokens.cpu(), drift.divergence.cpu(), drift.agrees.cpu())
    rows = blocks_of(drift, args.block)
    return drift, {"results": rows, "prompts": len(drift.tokens), "kl_nats": drift.divergence.mean().item()}


def main() -> None:
    (args,) = ProgramParser(Arguments).parse_args_into_dataclasses()
    with readable_errors():
        drift, report = run(args)
    folder = results_folder(args.output, "drift")
    draw(drift, report["results"], folder / "divergence.png")
    console().print(table_of(report["results"]))
    finish(report | environment(args), folder)


if __name__ == "__main__":
    main()
