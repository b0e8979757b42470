#!/usr/bin/env python
"""Peak memory of decode steps on a filled cache, patched against unpatched, one process per recipe.

The model has the geometry of a known one, few layers, and random weights, so nothing is downloaded. What the loaded
model takes is not counted; beside the cache stands what the steps add to it. The last line of stdout is one JSON
object.

    python scripts/measure/step_memory.py --recipes stock "rank R/2" "packed 4x" --contexts 16384
"""

import functools
from dataclasses import dataclass, field

from kvsplice_hf import cache_nbytes
from kvsplice_hf.bench.command_line import ProgramParser, readable_errors, results_folder
from kvsplice_hf.bench.filled_caches import fill, step
from kvsplice_hf.bench.grid import Row, finish_grid
from kvsplice_hf.bench.grid_tables import draw, show
from kvsplice_hf.bench.memory_limits import too_large
from kvsplice_hf.bench.peak_memory import PeakArguments, measured_apart, memory_table, read_peak, reset_peak
from kvsplice_hf.bench.recipes import RECIPES, apply_recipe
from kvsplice_hf.errors import ConfigError


_COLUMNS = {
    "cache_bytes": "cache (MB)",
    "cache_allocated_bytes": "allocated (MB)",
    "first_step_bytes": "first step (MB)",
    "temporary_bytes": "later steps (MB)",
    "total_bytes": "allocated + later (MB)",
}


@dataclass
class Arguments(PeakArguments):
    """Peak memory of decode steps on a filled cache, patched against unpatched."""

    contexts: list[int] = field(
        default_factory=lambda: [4096],
        metadata={"help": "tokens in the cache before the decode steps", "aliases": ["--context"]},
    )


def peak_of(args: Arguments, name: str, batch: int, length: int) -> Row:
    """Peak bytes of decode steps of one recipe, above what they find: model and filled cache.

    The first step is kept apart. It holds what happens once: buffers of libraries, and where ours are concerned the
    larger buffer that a cache filled in one go moves to.

    Raises:
        ConfigError: they would not fit into memory.
    """
    recipe = RECIPES[name]
    model = apply_recipe(args.build(), recipe)
    reason = too_large(model, [name], batch, length + args.memory_steps).get(name)
    if reason is not None:
        raise ConfigError(reason)
    filled = fill(model, recipe, batch, length, args.memory_steps + 1, args.padded)
    before = reset_peak(args.device)
    step(model, filled)
    first = read_peak(args.device) - before
    before = reset_peak(args.device)
    for _ in range(args.memory_steps):
        step(model, filled)
    temporary = read_peak(args.device) - before
    allocated = cache_nbytes(filled.cache, allocated=True)
    return {
        "first_step_bytes": first,
        "temporary_bytes": temporary,
        "cache_bytes": cache_nbytes(filled.cache),
        "cache_allocated_bytes": allocated,
        "total_bytes": allocated + temporary,
    }


def main() -> None:
    with readable_errors():
        (args,) = ProgramParser(Arguments).parse_args_into_dataclasses()
        rows = measured_apart(args, functools.partial(peak_of, args))
    if rows is None:
        return
    folder = results_folder(args.output, "step_memory")
    show(memory_table(rows, _COLUMNS, "total_bytes"))
    draw(rows, lambda row: row["total_bytes"] / 1e6, "cache and temporaries (MB)", folder / "decode_memory.png")
    finish_grid({"rows": rows}, args, folder)


if __name__ == "__main__":
    main()
