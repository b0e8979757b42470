#!/usr/bin/env python
"""Prefill of a patched model against the same model unpatched, side by side in one process.

The model has the geometry of a known one, few layers, and random weights, so nothing is downloaded. Repeats of the
recipes are interleaved, so that a slow moment of the machine hits all of them. The last line of stdout is one JSON
object.

    python scripts/measure/prefill.py --contexts 2048
    python scripts/measure/prefill.py --recipes all --contexts 512 2048 --batch_sizes 1 4 --padded
"""

import statistics
from dataclasses import dataclass, field

import torch
from rich.table import Table
from transformers import PreTrainedModel

from kvsplice_hf.bench.command_line import ProgramParser, console, readable_errors, results_folder
from kvsplice_hf.bench.filled_caches import Filled, padding_of, step
from kvsplice_hf.bench.grid import Row, ShapeArguments, add_prefill_ratios, finish_grid, measured, new_rows
from kvsplice_hf.bench.grid_tables import draw, new_table, setting_cells, show, spread
from kvsplice_hf.bench.memory_limits import prefill_too_large, reason_to_skip
from kvsplice_hf.bench.recipes import RECIPES, Recipe, patched_models, random_tokens, text_config
from kvsplice_hf.bench.rounds import interleaved, timed


@dataclass
class Arguments(ShapeArguments):
    """Prefill of a patched model against the same model unpatched."""

    contexts: list[int] = field(
        default_factory=lambda: [2048], metadata={"help": "tokens of the prompt", "aliases": ["--context"]}
    )
    repeats: int = field(default=5, metadata={"help": "repeats, interleaved over the recipes"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "repeats")


@torch.no_grad()
def run_prefill(model: PreTrainedModel, recipe: Recipe, prompt: torch.Tensor, padded: bool) -> None:
    """One forward pass of a prompt [B, T] into an empty cache."""
    batch, length = prompt.shape
    padding = padding_of(batch, length, model.device) if padded else None
    filled = Filled(recipe.make_cache(text_config(model), length), length, padding, prompt[:, :1])
    step(model, filled, prompt, grow=0)


def measure(models: dict[str, PreTrainedModel], batch: int, length: int, args: Arguments) -> list[Row]:
    """A row per recipe: seconds of the prefill in each repeat."""
    names = list(models)
    reason = prefill_too_large(models[names[0]], batch, length)
    if reason is not None:
        return list(new_rows(names, batch, length, dict.fromkeys(names, reason)).values())
    rows = new_rows(names, batch, length)
    for row in rows.values():
        row["prefill_s"] = []
    prompt = random_tokens(models[names[0]], batch, length)
    for name, counts in interleaved(names, args.repeats):
        if "skipped" in rows[name]:
            continue
        try:
            run = lambda name=name: run_prefill(models[name], RECIPES[name], prompt, args.padded)  # noqa: E731
            seconds = timed(run, args.device)
        except Exception as error:
            rows[name] = new_rows([name], batch, length, {name: reason_to_skip(name, error)})[name]
            continue
        if counts:
            rows[name]["prefill_s"].append(seconds)
    return list(rows.values())


def run(args: Arguments) -> Row:
    """All rows."""
    models = patched_models(args.build(), args.recipes)
    rows = []
    for batch, length in args.settings:
        console().print(f"batch {batch}, prompt {length}")
        group = measure(models, batch, length, args)
        add_prefill_ratios(group)
        rows += group
    return {"rows": rows}


def table_of(rows: list[Row]) -> Table:
    """Medians and ranges of times and of their ratios to stock."""
    table = new_table(rows, "prefill (s)", "this / stock")
    for row in measured(rows):
        table.add_row(*setting_cells(row), spread(row["prefill_s"]), spread(row.get("prefill_this_over_stock"), "x"))
    return table


def main() -> None:
    with readable_errors():
        (args,) = ProgramParser(Arguments).parse_args_into_dataclasses()
        report = run(args)
    rows, folder = report["rows"], results_folder(args.output, "prefill")
    show(table_of(rows))
    draw(rows, lambda row: statistics.median(row["prefill_s"]), "prefill (s)", folder / "prefill_time.png")
    finish_grid(report, args, folder)


if __name__ == "__main__":
    main()
