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
from kvsplice_hf.bench.rounds import interleaved, paired_ratios
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
def measure(base: PreTrainedModel, splice: str, args: Arguments) -> list[dict[str, Any]]:
    """A row per method: seconds of stock and packed steps, by part and round.

    All models are there at once and take turns. One after the other would not do: how long a step takes whose
    temporaries are large depends on what the process has allocated before it, by up to a half.

    Raises:
        ConfigError: the caches do not fit into memory.
    """
    models: dict[tuple[str, str], PreTrainedModel] = {}
    caches: dict[tuple[str, str], Filled] = {}
    for method in tqdm(args.methods, desc="methods", file=sys.stderr):
        model = quantise(base, method)
        own = {STOCK: model, PACKED: load_kvsplice(shared_copy(model), splice)}
        filled, skipped = fill_all(own, 1, args.context, 2, False)
        if skipped:
            raise ConfigError(f"--context {args.context}: {'; '.join(skipped.values())}")
        models |= {(method, name): own[name] for name in own}
        caches |= {(method, name): filled[name] for name in own}
    taken: dict[tuple[str, str], list[dict[str, float]]] = {key: [] for key in models}
    for key, counts in interleaved(list(models), args.repeats):
        parts = one_step(models[key], caches[key])
        if counts:
            taken[key].append(parts)
    return [
        {"quantisation": method} | {name: _by_part(taken[method, name]) for name in (STOCK, PACKED)}
        for method in args.methods
    ]


def _by_part(steps: list[dict[str, float]]) -> dict[str, list[float]]:
    return {part: [one[part] for one in steps] for part in (*PARTS, _WHOLE)}


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Add to each row its speed-ups, and what share of those without quantisation they are, round by round."""
    for row in rows:
        for part in (_WHOLE, ATTENTION):
            row[f"{part}: speed-up"] = paired_ratios(row[STOCK][part], row[PACKED][part])
            row[f"{part}: share"] = paired_ratios(row[f"{part}: speed-up"], rows[0][f"{part}: speed-up"])


def table_of(rows: list[dict[str, Any]]) -> Table:
    """Two lines per method: milliseconds by part, and speed-ups of the step and of its attention."""
    caption = "Medians. Speed-ups of the step and of its attention; in brackets the share of that without quantisation."
    columns = (*(f"{part} (ms)" for part in (*PARTS, _WHOLE)), _WHOLE, "attention")
    table = Table("weights", "cache", *columns, caption=caption, caption_justify="left")
    for row in rows:
        for name in (STOCK, PACKED):
            ratios = [_ratio(row, part) if name == PACKED else "" for part in (_WHOLE, ATTENTION)]
            cells = [f"{1e3 * statistics.median(row[name][part]):.1f}" for part in (*PARTS, _WHOLE)]
            table.add_row(row["quantisation"], name, *cells, *ratios, end_section=name == PACKED)
    return table


def _ratio(row: dict[str, Any], part: str) -> str:
    shares = row[f"{part}: share"]
    middle = f"{statistics.median(row[f'{part}: speed-up']):.2f}x"
    return f"{middle} ({statistics.median(shares):.0%}, {min(shares):.0%} to {max(shares):.0%})"


def run(args: Arguments) -> list[dict[str, Any]]:
    """A row per method."""
    base = load_model(args.model, args.dtype).model
    with saved_splice(base, args.splice) as splice:
        rows = measure(base, splice, args)
    add_ratios(rows)
    return rows


def main() -> None:
    with readable_errors():
        (args,) = ProgramParser(Arguments).parse_args_into_dataclasses()
        rows = run(args)
    console().print(table_of(rows))
    finish({"rows": rows, **environment(args)}, results_folder(args.output, "quantised_decode"))


if __name__ == "__main__":
    main()
