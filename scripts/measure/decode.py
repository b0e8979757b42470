#!/usr/bin/env python
"""Decode steps of a patched model against the same model unpatched, side by side in one process.

The model has the geometry of a known one, few layers, and random weights, so nothing is downloaded. Repeats of the
recipes are interleaved, so that a slow moment of the machine hits all of them. Beside each step stand the bytes that it
has to read, and how many times longer it takes than moving them at the speed at which this machine copies memory. The
last line of stdout is one JSON object. `--model` takes the weights of a real model instead, and `--quantisation`
measures the recipes on quantised weights.

    python scripts/measure/decode.py --context 4096
    python scripts/measure/decode.py --recipes all --contexts 512 4096 16384 --batch_sizes 1 8 --padded
    python scripts/measure/decode.py --context 4096 --adapter_rank 16
    python scripts/measure/decode.py --model demo --quantisation none torchao-int8 --recipes stock "packed 4x"
"""

import statistics
from dataclasses import dataclass, field

import torch
from rich.table import Table
from transformers import PreTrainedModel

from kvsplice_hf import ConfigError, cache_nbytes, materialised_nbytes
from kvsplice_hf.bench.bandwidth import copy_bandwidth, weight_bytes
from kvsplice_hf.bench.command_line import (
    ProgramParser,
    console,
    load_model,
    readable_errors,
    require_known,
    results_folder,
)
from kvsplice_hf.bench.filled_caches import Filled, fill_all, rewind, step
from kvsplice_hf.bench.grid import Row, ShapeArguments, add_decode_ratios, finish_grid, measured, new_rows, stock_of
from kvsplice_hf.bench.grid_tables import draw, new_table, setting_cells, show, spread
from kvsplice_hf.bench.quantisation import METHODS, UNQUANTISED, quantise
from kvsplice_hf.bench.recipes import patched_models
from kvsplice_hf.bench.rounds import interleaved, timed
from kvsplice_hf.bench.tables import ratio
from kvsplice_hf.patch.state import is_patched


@dataclass
class Arguments(ShapeArguments):
    """Decode steps of a patched model against the same model unpatched."""

    contexts: list[int] = field(
        default_factory=lambda: [4096],
        metadata={"help": "tokens in the cache before the timed decode steps", "aliases": ["--context"]},
    )
    repeats: int = field(default=5, metadata={"help": "repeats, interleaved over the recipes"})
    steps: int = field(default=3, metadata={"help": "decode steps per repeat, of which the median counts"})
    adapter_rank: int = field(
        default=0,
        metadata={"help": "rank of LoRA adapters on kv_b_proj (needs peft), of the stock model as well; 0 for none"},
    )
    model: str | None = field(
        default=None, metadata={"help": 'weights of this folder or hub name; "demo" and "smollm2" come in a package'}
    )
    quantisation: list[str] = field(
        default_factory=lambda: [UNQUANTISED],
        metadata={"help": f"any of {', '.join((UNQUANTISED, *METHODS))}: weights are quantised in this way"},
    )
    bandwidth_mb: int = field(default=512, metadata={"help": "size of the tensor whose copying gives the bandwidth"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("repeats", "steps", "bandwidth_mb"):
            self.require_at_least(1, name)
        self.require_at_least(0, "adapter_rank")
        require_known("quantisation", self.quantisation, [UNQUANTISED, *METHODS])
        self.quantisation = list(dict.fromkeys(self.quantisation))
        if self.adapter_rank and self.quantisation != [UNQUANTISED]:
            raise ConfigError("--adapter_rank is measured on weights as they are. Leave --quantisation out.")

    def build(self) -> PreTrainedModel:
        """The model that is measured."""
        return super().build() if self.model is None else load_model(self.model, self.dtype).model.to(self.device)


def with_adapters(model: PreTrainedModel, rank: int) -> PreTrainedModel:
    """The model with random adapters of this rank on `kv_b_proj`, or as it is."""
    if not rank:
        return model
    try:
        import peft
    except ImportError as error:
        raise ConfigError(f"--adapter_rank needs peft: {error}. Install it, or leave the option out.") from error
    settings = peft.LoraConfig(target_modules=["kv_b_proj"], r=rank, init_lora_weights=False)
    peft.inject_adapter_in_model(settings, model)
    return model.requires_grad_(False).eval()


def sizes_of(model: PreTrainedModel, filled: Filled) -> Row:
    """Bytes of the cache, and of what a step on it reads."""
    sizes = {
        "cache_bytes": cache_nbytes(filled.cache),
        "cache_allocated_bytes": cache_nbytes(filled.cache, allocated=True),
        "weight_bytes": weight_bytes(model, lambda: step(model, filled)),
    }
    sizes["materialised_bytes"] = materialised_nbytes(model) if is_patched(model) else 0  # by that step
    rewind(filled, 1)
    return sizes | {"moved_bytes": sizes["cache_bytes"] + sizes["weight_bytes"]}


def step_seconds(model: PreTrainedModel, filled: Filled, args: Arguments) -> float:
    """Median of some steps after one that is not timed; then they are taken back."""
    step(model, filled)
    seconds = statistics.median(timed(lambda: step(model, filled), args.device) for _ in range(args.steps))
    rewind(filled, args.steps + 1)
    return seconds


@torch.no_grad()
def measure(models: dict[str, PreTrainedModel], batch: int, length: int, args: Arguments) -> list[Row]:
    """A row per recipe: seconds of the step in each repeat, bytes of the cache and of what a step reads."""
    caches, skipped = fill_all(models, batch, length, args.steps + 1, args.padded)
    rows = new_rows(list(models), batch, length, skipped)
    for name, filled in caches.items():
        rows[name] |= sizes_of(models[name], filled) | {"decode_s": []}
    for name, counts in interleaved(list(caches), args.repeats):
        seconds = step_seconds(models[name], caches[name], args)
        if counts:
            rows[name]["decode_s"].append(seconds)
    return list(rows.values())


def add_ratios(rows: list[Row], bandwidth: float) -> None:
    """Compare the rows of one setting with stock and with the bandwidth."""
    add_decode_ratios(rows)
    stock = stock_of(rows)
    for row in measured(rows):
        row["bound_s"] = row["moved_bytes"] / bandwidth
        row["times_bound"] = [seconds / row["bound_s"] for seconds in row["decode_s"]]
        if stock is not None:
            row["cache_ratio"] = row["cache_bytes"] / stock["cache_bytes"]


def run(args: Arguments) -> Row:
    """All rows, and the bandwidth."""
    before, model = copy_bandwidth(args.bandwidth_mb, args.device), args.build()
    groups: list[tuple[str, list[Row]]] = []
    for method in args.quantisation:
        models = patched_models(with_adapters(quantise(model, method), args.adapter_rank), args.recipes)
        for batch, length in args.settings:
            console().print(f"batch {batch}, context {length}, quantisation {method}")
            groups.append((method, measure(models, batch, length, args)))
    # At both ends: a busy moment of the machine must not pass for its bandwidth.
    bandwidth = max(before, copy_bandwidth(args.bandwidth_mb, args.device))
    for method, rows in groups:
        add_ratios(rows, bandwidth)
        for row in rows:
            row["quantisation"] = method
            if method != UNQUANTISED:
                row["recipe"] = f"{row['recipe']}, {method}"
    return {"rows": [row for _, rows in groups for row in rows], "bandwidth_gb_s": bandwidth / 1e9}


def table_of(rows: list[Row]) -> Table:
    """Medians and ranges of times and of their ratios to stock, and bytes."""
    columns = ["decode step (ms)", "stock / this", "x of bound", "moved (MB)", "cache bytes", "of stock"]
    table = new_table(rows, *columns)
    for row in measured(rows):
        table.add_row(
            *setting_cells(row),
            spread(row["decode_s"], scale=1e3, digits=1),
            spread(row.get("decode_stock_over_this"), "x"),
            f"{statistics.median(row['times_bound']):.2f}",
            f"{row['moved_bytes'] / 1e6:.0f}",
            f"{row['cache_bytes']:,}",
            ratio(row.get("cache_ratio"), 1.0, ".3f"),
        )
    return table


def main() -> None:
    with readable_errors():
        (args,) = ProgramParser(Arguments).parse_args_into_dataclasses()
        report = run(args)
    rows, folder = report["rows"], results_folder(args.output, "decode")
    show(table_of(rows), f"copying {args.bandwidth_mb} MB: {report['bandwidth_gb_s']:.1f} GB/s, read and written")
    draw(rows, lambda row: 1e3 * statistics.median(row["decode_s"]), "decode step (ms)", folder / "step_time.png")
    finish_grid(report, args, folder)


if __name__ == "__main__":
    main()
