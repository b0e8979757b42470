#!/usr/bin/env python
"""`generate` of a real model end to end, patched against unpatched, side by side in one process.

The first token ends the prefill; the tokens after it are the decode part. Repeats of the recipes are interleaved, so
that a slow moment of the machine hits all of them. The default model was converted from one with grouped-query
attention, which runs beside it. The last line of stdout is one JSON object.

    python scripts/measure/generation.py --contexts 4096 --generate 64    # SmolLM2-135M as MLA
    python scripts/measure/generation.py --model deepseek-ai/DeepSeek-V2-Lite --dtype bfloat16
"""

import statistics
import time
from dataclasses import dataclass, field

import torch
from rich.table import Table
from transformers import PreTrainedModel

from kvsplice_hf.bench.command_line import DEMO, ProgramParser, load_model, parse_dtype, readable_errors, results_folder
from kvsplice_hf.bench.filled_caches import prompt_mask
from kvsplice_hf.bench.generating import TokenClock, run_generate
from kvsplice_hf.bench.grid import (
    GridArguments,
    Row,
    add_decode_ratios,
    add_prefill_ratios,
    finish_grid,
    measured,
    new_rows,
)
from kvsplice_hf.bench.grid_tables import draw, new_table, setting_cells, show, spread
from kvsplice_hf.bench.recipes import RECIPES, STOCK, Recipe, patched_models, random_tokens, text_config
from kvsplice_hf.bench.rounds import interleaved, synchronise
from kvsplice_hf.demo import load_original_demo_model
from kvsplice_hf.errors import ConfigError


_ORIGINAL = "original GQA"
# What the round that warms up generates; more would not warm up more.
_WARM_UP_TOKENS = 2


@dataclass
class Arguments(GridArguments):
    """`generate` of a real model, patched against unpatched."""

    contexts: list[int] = field(
        default_factory=lambda: [4096], metadata={"help": "tokens of the prompt", "aliases": ["--context"]}
    )
    recipes: list[str] = field(
        default_factory=lambda: [STOCK, "rank R/2", "packed 4x"],
        metadata={"help": f'any of {", ".join(RECIPES)}, or "all"'},
    )
    model: str = field(default=DEMO, metadata={"help": 'folder or hub name; "demo": SmolLM2-135M as MLA'})
    generate: int = field(default=64, metadata={"help": "new tokens, of which the first ends the prefill"})
    repeats: int = field(default=5, metadata={"help": "repeats, interleaved over the recipes"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(2, "generate")
        self.require_at_least(1, "repeats")


def load_models(args: Arguments) -> tuple[dict[str, PreTrainedModel], dict[str, Recipe]]:
    """Models and recipes by name: those asked for, and what the default model was converted from.

    Raises:
        ConfigError: the model has fewer positions than prompt and new tokens take.
    """
    model, _ = load_model(args.model, args.dtype)
    model = model.to(args.device)
    last = max(args.contexts) + args.generate
    positions = text_config(model).max_position_embeddings
    if last > positions:
        raise ConfigError(f"--contexts and --generate come to {last} tokens; {args.model} has {positions} positions.")
    models = patched_models(model, args.recipes)
    recipes = {name: RECIPES[name] for name in models}
    if args.model == DEMO:
        original, _ = load_original_demo_model(parse_dtype(args.dtype))
        models[_ORIGINAL], recipes[_ORIGINAL] = original.to(args.device), Recipe()
    return models, recipes


@torch.no_grad()
def measure(
    models: dict[str, PreTrainedModel], recipes: dict[str, Recipe], batch: int, length: int, args: Arguments
) -> list[Row]:
    """A row per recipe: seconds of the prefill and of one token after it, in each repeat."""
    names = list(models)
    prompt = random_tokens(models[names[0]], batch, length)
    mask = prompt_mask(batch, length, args.padded, prompt.device)
    rows = new_rows(names, batch, length)
    for row in rows.values():
        row |= {"decode_s": [], "prefill_s": []}
    for name, counts in interleaved(names, args.repeats):
        clock = TokenClock(prompt.device)
        synchronise(prompt.device)
        start = time.perf_counter()
        run_generate(models[name], recipes[name], prompt, mask, args.generate if counts else _WARM_UP_TOKENS, clock)
        if counts:
            rows[name]["prefill_s"].append(clock.times[0] - start)
            rows[name]["decode_s"].append((clock.times[-1] - clock.times[0]) / (len(clock.times) - 1))
    group = list(rows.values())
    add_decode_ratios(group)
    add_prefill_ratios(group)
    return group


def run(args: Arguments) -> Row:
    """All rows."""
    models, recipes = load_models(args)
    return {"rows": [row for setting in args.settings for row in measure(models, recipes, *setting, args)]}


def table_of(rows: list[Row]) -> Table:
    """Medians and ranges of times and of their ratios to stock."""
    table = new_table(rows, "decode step (ms)", "stock / this", "prefill (s)", "this / stock")
    for row in measured(rows):
        table.add_row(
            *setting_cells(row),
            spread(row["decode_s"], scale=1e3, digits=1),
            spread(row.get("decode_stock_over_this"), "x"),
            spread(row["prefill_s"]),
            spread(row.get("prefill_this_over_stock"), "x"),
        )
    return table


def main() -> None:
    with readable_errors():
        (args,) = ProgramParser(Arguments).parse_args_into_dataclasses()
        report = run(args)
    rows, folder = report["rows"], results_folder(args.output, "generation")
    show(table_of(rows))
    draw(rows, lambda row: 1e3 * statistics.median(row["decode_s"]), "decode step (ms)", folder / "step_time.png")
    finish_grid(report, args, folder)


if __name__ == "__main__":
    main()
