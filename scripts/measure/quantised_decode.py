#!/usr/bin/env python
"""How much of the speed-up of decode steps is left on quantised weights, and in which part of a step it goes.

A step is divided into linear layers, attention on the cache, and the rest. A splice changes attention alone, and takes
the same splice on all weights here, so that codes are the same. The last line of stdout is one JSON object.

    python scripts/measure/quantised_decode.py --methods none torchao-int8 bitsandbytes-4bit --dtype bfloat16
"""

import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.table import Table
from tqdm import tqdm
from transformers import PreTrainedModel

from kvsplice_hf import load_kvsplice, save_kvsplice
from kvsplice_hf.bench.command_line import (
    DEMO,
    ProgramParser,
    console,
    environment,
    finish,
    load_model,
    readable_errors,
    require_folder,
    require_known,
    results_folder,
)
from kvsplice_hf.bench.filled_caches import Filled, fill_all, rewind, step
from kvsplice_hf.bench.quantisation import METHODS, UNQUANTISED, quantise
from kvsplice_hf.bench.recipes import RECIPES, STOCK, apply_recipe, shared_copy
from kvsplice_hf.bench.rounds import interleaved
from kvsplice_hf.bench.step_parts import ATTENTION, PARTS, parts_of_step
from kvsplice_hf.errors import ConfigError
from kvsplice_hf.patch.sites import find_sites


PACKED = "packed 4x"
_WHOLE = "step"


@dataclass
class Arguments:
    """Decode steps on quantised weights, part by part."""

    model: str = field(default=DEMO, metadata={"help": 'folder, hub name, "demo" (SmolLM2 as MLA) or "smollm2"'})
    methods: list[str] = field(
        default_factory=lambda: [UNQUANTISED, "torchao-int8", "bitsandbytes-4bit"],
        metadata={"help": f"any of {', '.join((UNQUANTISED, *METHODS))}; none is always among them"},
    )
    context: int = field(default=4096, metadata={"help": "tokens in the cache before a step"})
    repeats: int = field(default=5, metadata={"help": "steps, in turns of stock and packed; medians count"})
    splice: str | None = field(
        default=None, metadata={"help": "folder of a saved splice; none: packed rows of a quarter are calibrated"}
    )
    dtype: str = field(default="bfloat16", metadata={"help": "dtype of the model"})
    output: str = field(default="results", metadata={"help": "folder for the results"})

    def __post_init__(self) -> None:
        require_known("methods", self.methods, [UNQUANTISED, *METHODS])
        self.methods = list(dict.fromkeys([UNQUANTISED, *self.methods]))
        for name in ("context", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} is {getattr(self, name)}; it must be at least 1.")
        if self.splice is not None:
            require_folder("splice", self.splice)


@contextmanager
def saved_splice(model: PreTrainedModel, folder: str | None) -> Iterator[str]:
    """A folder with the splice, made here where none is given."""
    if folder is not None:
        yield folder
        return
    with tempfile.TemporaryDirectory() as made:
        save_kvsplice(apply_recipe(shared_copy(model), RECIPES[PACKED]), made)
        yield made


def one_step(model: PreTrainedModel, filled: Filled) -> dict[str, float]:
    """Seconds of the parts of a step, and of all of it; the step is taken back."""
    sites = [site.module for site in find_sites(model)]
    parts = parts_of_step(model, sites, lambda: step(model, filled), model.device)
    rewind(filled, 1)
    return parts | {_WHOLE: sum(parts.values())}


@torch.no_grad()
def measure(model: PreTrainedModel, splice: str, args: Arguments) -> dict[str, dict[str, float]]:
    """Medians in seconds of stock and packed steps on these weights, by part.

    Raises:
        ConfigError: the cache does not fit into memory.
    """
    models = {STOCK: model, PACKED: load_kvsplice(shared_copy(model), splice)}
    caches, skipped = fill_all(models, 1, args.context, 2, False)
    if skipped:
        raise ConfigError(f"--context {args.context}: {'; '.join(skipped.values())}")
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    for name, counts in interleaved(list(models), args.repeats):
        parts = one_step(models[name], caches[name])
        if counts:
            taken[name].append(parts)
    return {
        name: {part: statistics.median(one[part] for one in steps) for part in (*PARTS, _WHOLE)}
        for name, steps in taken.items()
    }


def ratios_of(rows: list[dict[str, Any]]) -> None:
    """Add to each row its speed-ups, and what share of those without quantisation they are."""
    for row in rows:
        for part in (_WHOLE, ATTENTION):
            row[f"{part}: speed-up"] = row[STOCK][part] / row[PACKED][part]
            row[f"{part}: share"] = row[f"{part}: speed-up"] / rows[0][f"{part}: speed-up"]


def table_of(rows: list[dict[str, Any]]) -> Table:
    """Two lines per method: milliseconds by part, and speed-ups of the step and of its attention."""
    table = Table("weights", "cache", *(f"{part} (ms)" for part in (*PARTS, _WHOLE)), "step", "attention")
    for row in rows:
        for name in (STOCK, PACKED):
            ratios = [
                f"{row[f'{part}: speed-up']:.2f}x ({row[f'{part}: share']:.0%})" if name == PACKED else ""
                for part in (_WHOLE, ATTENTION)
            ]
            cells = [f"{1e3 * row[name][part]:.1f}" for part in (*PARTS, _WHOLE)]
            table.add_row(row["quantisation"], name, *cells, *ratios, end_section=name == PACKED)
    return table


def run(args: Arguments) -> list[dict[str, Any]]:
    """A row per method."""
    base = load_model(args.model, args.dtype).model
    rows: list[dict[str, Any]] = []
    with saved_splice(base, args.splice) as splice:
        for method in tqdm(args.methods, desc="methods", file=sys.stderr):
            found = measure(quantise(base, method), splice, args)
            rows.append({"quantisation": method, **found})
            console().print(rows[-1])  # the next one may take long
    ratios_of(rows)
    return rows


def main() -> None:
    with readable_errors():
        (args,) = ProgramParser(Arguments).parse_args_into_dataclasses()
        rows = run(args)
    console().print(table_of(rows))
    finish({"rows": rows, **environment(args)}, results_folder(args.output, "quantised_decode"))


if __name__ == "__main__":
    main()
