#!/usr/bin/env python
"""Where a decode step spends its time, operator by operator, patched beside unpatched.

The model has the geometry of a known one, few layers, and random weights, so nothing is downloaded. The last line of
stdout is one JSON object.

    python scripts/measure/profile_step.py --recipes stock "rank R/2" "packed 4x" --contexts 4096 --operators 22
"""

from dataclasses import dataclass, field

import torch
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from kvsplice_hf.bench.command_line import ProgramParser, readable_errors, results_folder
from kvsplice_hf.bench.filled_caches import Filled, fill_all, step
from kvsplice_hf.bench.grid import Row, ShapeArguments, by_setting, finish_grid, measured, new_rows
from kvsplice_hf.bench.grid_tables import draw, show
from kvsplice_hf.bench.recipes import patched_models
from kvsplice_hf.bench.rounds import synchronise


@dataclass
class Arguments(ShapeArguments):
    """Where a decode step spends its time, operator by operator."""

    contexts: list[int] = field(
        default_factory=lambda: [4096],
        metadata={"help": "tokens in the cache before the decode steps", "aliases": ["--context"]},
    )
    steps: int = field(default=3, metadata={"help": "decode steps, of which the mean counts"})
    operators: int = field(default=15, metadata={"help": "how many operators the table shows"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "steps")
        self.require_at_least(1, "operators")


@torch.no_grad()
def profile_step(model: PreTrainedModel, filled: Filled, args: Arguments) -> dict[str, float]:
    """Milliseconds of a decode step by operator, its own time without that of the operators it calls."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if args.is_on_gpu else [])]
    with profile(activities=activities) as profiled:
        for _ in range(args.steps):
            step(model, filled)
        synchronise(args.device)
    own = "self_device_time_total" if args.is_on_gpu else "self_cpu_time_total"
    # On a GPU the kernels are listed as well as the operators that started them, with the same time.
    events = [event for event in profiled.key_averages() if event.device_type == torch.autograd.DeviceType.CPU]
    return {event.key: getattr(event, own) / args.steps / 1e3 for event in events if getattr(event, own) > 0}


def run(args: Arguments) -> Row:
    """All rows."""
    models = patched_models(args.build(), args.recipes)
    rows: list[Row] = []
    for batch, length in args.settings:
        caches, skipped = fill_all(models, batch, length, args.steps + 1, args.padded)
        group = new_rows(list(models), batch, length, skipped)
        for name, filled in caches.items():
            group[name]["operators_ms"] = profile_step(models[name], filled, args)
            group[name]["total_ms"] = sum(group[name]["operators_ms"].values())
        rows += group.values()
    return {"rows": rows}


def tables_of(rows: list[Row], operators: int) -> list[Table]:
    """Per setting the operators that take the most time in any recipe, with the recipes beside each other."""
    return [_table_of(*setting, group, operators) for setting, group in by_setting(rows)]


def _table_of(batch: int, length: int, rows: list[Row], operators: int) -> Table:
    shown = measured(rows)
    notes = [f"{row['recipe']}: skipped. {row['skipped']}" for row in rows if "skipped" in row]
    title = f"own time of operators in a decode step (ms), batch {batch}, context {length}"
    table = Table("operator", *(row["recipe"] for row in shown), title=title, caption="\n".join(notes) or None)
    names = {name for row in shown for name in row["operators_ms"]}
    top = sorted(names, key=lambda name: -max(row["operators_ms"].get(name, 0.0) for row in shown))[:operators]
    for name in top:
        times = (row["operators_ms"].get(name) for row in shown)
        table.add_row(name, *("not called" if time is None else f"{time:.2f}" for time in times))
    if shown:
        rest = (row["total_ms"] - sum(row["operators_ms"].get(name, 0.0) for name in top) for row in shown)
        table.add_row("all others", *(f"{milliseconds:.2f}" for milliseconds in rest))
        table.add_row("sum", *(f"{row['total_ms']:.2f}" for row in shown))
    return table


def main() -> None:
    with readable_errors():
        (args,) = ProgramParser(Arguments).parse_args_into_dataclasses()
        report = run(args)
    rows, folder = report["rows"], results_folder(args.output, "profile_step")
    show(*tables_of(rows, args.operators))
    draw(rows, lambda row: row["total_ms"], "own time of all operators (ms)", folder / "profile.png")
    finish_grid(report, args, folder)


if __name__ == "__main__":
    main()
