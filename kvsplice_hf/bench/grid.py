"""Programs that measure recipes at every batch size and context: their settings, their rows and their report.

What they measure is a list of rows, one per batch size, context and recipe: `{"recipe", "batch_size", "context"}` with
the figures, or with "skipped" and the reason.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from kvsplice_hf.bench.command_line import (
    environment,
    finish,
    parse_dtype,
    require_known,
)
from kvsplice_hf.bench.geometries import GEOMETRIES
from kvsplice_hf.bench.recipes import RECIPES, STOCK, runnable_recipes
from kvsplice_hf.bench.rounds import paired_ratios
from kvsplice_hf.errors import ConfigError


Row = dict[str, Any]

_ALL = "all"


@dataclass
class GridArguments:
    """Batch sizes, contexts and recipes.

    Raises:
        ConfigError: a name is unknown, a number is too small, or there is no such device here.
    """

    contexts: list[int] = field(
        default_factory=lambda: [4096], metadata={"help": "tokens per sequence", "aliases": ["--context"]}
    )
    batch_sizes: list[int] = field(
        default_factory=lambda: [1],
        metadata={"help": "sequences per batch", "aliases": ["--batch_size", "--batch-size"]},
    )
    padded: bool = field(
        default=False, metadata={"help": "sequences of different lengths, padded on the left, with their mask"}
    )
    recipes: list[str] = field(
        default_factory=lambda: [STOCK, "full rank", "rank R/2"],
        metadata={"help": f'any of {", ".join(RECIPES)}, or "{_ALL}"'},
    )
    dtype: str = field(default="float32", metadata={"help": "dtype of weights and cache"})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda"})
    output: str = field(default="results", metadata={"help": "folder for the results"})

    def __post_init__(self) -> None:
        require_known("recipes", self.recipes, [*RECIPES, _ALL])
        self.recipes = runnable_recipes() if _ALL in self.recipes else list(dict.fromkeys(self.recipes))
        parse_dtype(self.dtype)
        for name in ("contexts", "batch_sizes"):
            self.require_at_least(1, name, min(getattr(self, name)))
        if self.device.partition(":")[0] not in ("cpu", "cuda"):
            raise ConfigError(f"--device is {self.device!r}; it must be cpu or cuda.")
        if self.is_on_gpu and not torch.cuda.is_available():
            raise ConfigError(f"--device is {self.device!r}, but torch {torch.__version__} finds no GPU here.")

    def require_at_least(self, least: int, option: str, value: int | None = None) -> None:
        """Refuse an option that is too small.

        Raises:
            ConfigError: `value`, by default that of the option, is below `least`.
        """
        value = getattr(self, option) if value is None else value
        if value < least:
            raise ConfigError(f"--{option} is {value}; it must be at least {least}.")

    @property
    def is_on_gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"

    @property
    def settings(self) -> list[tuple[int, int]]:
        """Pairs of batch size and context."""
        return list(itertools.product(self.batch_sizes, self.contexts))


@dataclass
class ShapeArguments(GridArguments):
    """The same, of a model with a published shape and random weights.

    Raises:
        ConfigError: also if the shape is unknown, or has no layer.
    """

    geometry: str = field(default="v2-lite", metadata={"help": "model shape: " + ", ".join(GEOMETRIES)})
    layers: int = field(default=4, metadata={"help": "number of layers"})
    whole_vocabulary: bool = field(default=False, metadata={"help": "do not cut the vocabulary with the layers"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.geometry not in GEOMETRIES:
            raise ConfigError(f"--geometry is {self.geometry!r}; it must be one of {', '.join(GEOMETRIES)}.")
        self.require_at_least(1, "layers")

    def build(self) -> PreTrainedModel:
        """A model of the shape, always with the same random weights."""
        geometry = GEOMETRIES[self.geometry]
        config = geometry.config(self.layers, self.whole_vocabulary)
        return geometry.build(config, parse_dtype(self.dtype), self.device)


def new_rows(names: Sequence[str], batch: int, length: int, skipped: Mapping[str, str] | None = None) -> dict[str, Row]:
    """A row per recipe of one setting, with the reasons of those that are skipped."""
    rows: dict[str, Row] = {name: {"recipe": name, "batch_size": batch, "context": length} for name in names}
    for name, reason in (skipped or {}).items():
        rows[name]["skipped"] = reason
    return rows


def measured(rows: Sequence[Row]) -> list[Row]:
    """Those that were not skipped."""
    return [row for row in rows if "skipped" not in row]


def stock_of(rows: Sequence[Row]) -> Row | None:
    """The row of stock in one setting, where it was measured."""
    return next((row for row in measured(rows) if row["recipe"] == STOCK), None)


def by_setting(rows: Sequence[Row]) -> list[tuple[tuple[int, int], list[Row]]]:
    """Batch size and context, with their rows."""
    groups = itertools.groupby(rows, lambda row: (row["batch_size"], row["context"]))
    return [(setting, list(group)) for setting, group in groups]


def add_decode_ratios(rows: Sequence[Row]) -> None:
    """Speed of decode steps over that of stock, round by round, for the rows of one setting."""
    stock = stock_of(rows)
    if stock is not None:
        for row in measured(rows):
            row["decode_stock_over_this"] = paired_ratios(stock["decode_s"], row["decode_s"])


def add_prefill_ratios(rows: Sequence[Row]) -> None:
    """Time of the prefill over that of stock, round by round, for the rows of one setting."""
    stock = stock_of(rows)
    if stock is not None:
        for row in measured(rows):
            row["prefill_this_over_stock"] = paired_ratios(row["prefill_s"], stock["prefill_s"])


def finish_grid(report: Row, args: GridArguments, folder: Path) -> None:
    """Write the report, whose "rows" are the rows, and print it as the last line of stdout."""
    if len(args.settings) == 1:  # by recipe, where that names a row
        report["results"] = {row["recipe"]: row for row in report["rows"]}
    where = environment(args)
    finish({**report, **where, **where["versions"], "device": args.device}, folder)
