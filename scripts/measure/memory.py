#!/usr/bin/env python
"""Peak memory of prefill and decode of a patched model against the same model unpatched, one process per recipe.

The model has the geometry of a known one, few layers, and random weights, so nothing is downloaded. What the loaded
model takes is not counted. The last line of stdout is one JSON object.

    python scripts/measure/memory.py --recipes stock "full rank" "rank R/2" "packed 4x"
"""

import functools
from dataclasses import dataclass, field

from kvsplice_hf.bench.command_line import ProgramParser, readable_errors, results_folder
from kvsplice_hf.bench.filled_caches import prompt_mask
from kvsplice_hf.bench.generating import run_generate
from kvsplice_hf.bench.grid import Row, finish_grid
from kvsplice_hf.bench.grid_tables import draw, show
from kvsplice_hf.bench.memory_limits import prefill_too_large
from kvsplice_hf.bench.peak_memory import PeakArguments, measured_apart, memory_table, read_peak, reset_peak
from kvsplice_hf.bench.recipes import RECIPES, apply_recipe, random_tokens
from kvsplice_hf.errors import ConfigError


_COLUMN = "peak above the model (MB)"


@dataclass
class Arguments(PeakArguments):
    """Peak memory of prefill and decode of a patched model against the same model unpatched."""

    contexts: list[int] = field(
        default_factory=lambda: [4096], metadata={"help": "tokens of the prompt", "aliases": ["--context"]}
    )


def peak_of(args: Arguments, name: str, batch: int, length: int) -> Row:
    """Peak bytes of prefill and decode of one recipe, above what the loaded model takes.

    Raises:
        ConfigError: they would not fit into memory.
    """
    recipe = RECIPES[name]
    model = apply_recipe(args.build(), recipe)
    reason = prefill_too_large(model, batch, length + args.memory_steps)
    if reason is not None:
        raise ConfigError(reason)
    prompt = random_tokens(model, batch, length)
    mask = prompt_mask(batch, length, args.padded, model.device)
    before = reset_peak(args.device)
    run_generate(model, recipe, prompt, mask, args.memory_steps)
    return {"peak_bytes": read_peak(args.device) - before}


def main() -> None:
    with readable_errors():
        (args,) = ProgramParser(Arguments).parse_args_into_dataclasses()
        rows = measured_apart(args, functools.partial(peak_of, args))
    if rows is None:
        return
    folder = results_folder(args.output, "memory")
    show(memory_table(rows, {"peak_bytes": _COLUMN}, "peak_bytes"))
    draw(rows, lambda row: row["peak_bytes"] / 1e6, _COLUMN, folder / "peak_memory.png")
    finish_grid({"rows": rows}, args, folder)


if __name__ == "__main__":
    main()
