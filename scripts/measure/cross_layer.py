#!/usr/bin/env python
"""What would be saved while running, if layers were stored in groups and predicted from the earlier ones of the group?

Loss is measured in a simulation without a cache (`kvsplice_hf.bench.cross_layer`), for each size of groups at several
budgets; between these the bytes of equal divergence are interpolated. Time is that of attention on rows as long as a
layer of the group has to read, in C++, all lengths in turn. Recipes share one rule that gives bits to numbers, also
groups of one layer, which is that of ordinary rows. The last line of stdout is one JSON object.

    python scripts/measure/cross_layer.py --model demo --statistics demo.safetensors
    python scripts/measure/cross_layer.py --model smollm2 --statistics smollm2.safetensors --budgets 193 160
    python scripts/measure/cross_layer.py --model smollm2 --budgets 0            # time alone
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from rich.table import Table

from kvsplice_hf import KVSpliceConfig, load_kvsplice, patch_model_with_kvsplice
from kvsplice_hf.attend.backend import CodedKeys
from kvsplice_hf.attend.choice import attend
from kvsplice_hf.bench.command_line import (
    DEMO,
    Calibration,
    ProgramParser,
    calibrate,
    console,
    environment,
    finish,
    load_model,
    readable_errors,
    results_folder,
)
from kvsplice_hf.bench.cross_layer import Groups, in_groups, sampled
from kvsplice_hf.bench.kernels.shapes import TRELLIS_KEYS, RowShape, coded_keys, packed_codec
from kvsplice_hf.bench.rounds import interleaved, timed
from kvsplice_hf.bench.texts import spread_windows
from kvsplice_hf.errors import ConfigError
from kvsplice_hf.evaluation.reference import score_against, score_reference
from kvsplice_hf.patch.sites import find_sites
from kvsplice_hf.patch.state import splice_parts_of


@dataclass
class Arguments(Calibration):
    """Bytes, loss and time of layers in groups."""

    model: str = field(default=DEMO, metadata={"help": 'folder, hub name, "demo" (SmolLM2 as MLA) or "smollm2"'})
    splice: str | None = field(default=None, metadata={"help": "folder of a saved splice, in place of calibration"})
    groups: list[int] = field(default_factory=lambda: [1, 2, 3, 4], metadata={"help": "layers of a group"})
    budgets: list[float] = field(
        default_factory=lambda: [193.0, 174.0, 154.0], metadata={"help": "bytes per token and layer; 0: time alone"}
    )
    sample: str = field(default="varied", metadata={"help": "text that predictions are fitted to"})
    sample_tokens: int = field(default=16384, metadata={"help": "tokens of it"})
    evaluation: str = field(default="pydoc", metadata={"help": "text to measure loss on"})
    evaluation_tokens: int = field(default=4096, metadata={"help": "tokens of it"})
    window: int = field(default=1024, metadata={"help": "tokens of a sequence"})
    context: int = field(default=16384, metadata={"help": "rows that attention reads"})
    repeats: int = field(default=9, metadata={"help": "rounds of times, of which the median counts; 0: no times"})
    dtype: str = field(default="float32", metadata={"help": "dtype of the model"})
    output: str = field(default="results", metadata={"help": "folder for the results"})


def check(args: Arguments) -> None:
    """Raises ConfigError for settings that nothing could be measured with."""
    if not args.groups or min(args.groups) < 1 or args.groups[0] != 1:
        raise ConfigError(f"--groups is {args.groups}; the first must be 1, which the others are compared with.")
    for name, least in (("repeats", 0), ("context", 1), ("window", 8)):
        if getattr(args, name) < least:
            raise ConfigError(f"--{name} is {getattr(args, name)}; it must be at least {least}.")


def patched(args: Arguments) -> tuple[Any, Any, Any]:
    """The model, its tokenizer, and the stock model's scores."""
    model, tokenizer = load_model(args.model, args.dtype)
    windows = spread_windows(tokenizer, args.evaluation, "evaluation", args.window, args.evaluation_tokens)
    stock = score_reference(lambda window: forward(model, window), windows, "stock")
    if args.splice is not None:
        load_kvsplice(model, args.splice)
    else:
        config = KVSpliceConfig(bytes_per_token=args.budgets[0])
        patch_model_with_kvsplice(model, config, calibration=calibrate(model, tokenizer, args), tokenizer=tokenizer)
    return model, tokenizer, stock


@torch.no_grad()
def forward(model: Any, window: torch.Tensor) -> torch.Tensor:
    """Logits of a window [T] without a cache."""
    logits: torch.Tensor = model(window[None].to(model.device), use_cache=False).logits[0]
    return logits


def measure_loss(args: Arguments) -> list[dict[str, Any]]:
    """One row for the splice as it is, and one for each size of groups and budget."""
    model, tokenizer, stock = patched(args)
    codecs: dict[Any, Any] = {part: splice.codec for part, splice in splice_parts_of(model).items()}
    layers = len({site.layer_idx for site in find_sites(model)})
    own = sum(codec.row_bytes for codec in codecs.values()) / layers
    rows = [{"name": "as calibrated", "group": 1, "bytes": own, **score_against(_of(model), stock, "as calibrated")}]
    windows = spread_windows(tokenizer, args.sample, "calibration", args.window, args.sample_tokens)
    sample, ordinary = sampled(model, windows), None
    for size in args.groups:
        groups = Groups(size, sample, codecs)
        ordinary = groups if ordinary is None else ordinary
        for budget in args.budgets:
            simulated, nbytes = groups.with_budget(budget)
            with in_groups(model, simulated):
                scores = score_against(_of(model), stock, f"groups of {size}, {nbytes:.0f} bytes")
            saved = groups.bits_saved(ordinary)
            rows.append({"name": f"groups of {size}", "group": size, "bytes": nbytes, "bits_saved": saved, **scores})
    return rows


def _of(model: Any) -> Any:
    return lambda window: forward(model, window)


def bytes_at_equal_loss(rows: Sequence[dict[str, Any]], size: int) -> float | None:
    """Bytes at which groups lose as much as those of one layer at the first budget, between or a little beyond budgets.

    The logarithm of the divergence falls about linearly with bytes.
    """
    of_size = [row for row in rows if row["name"] == f"groups of {size}"]
    target = next(row for row in rows if row["name"] == "groups of 1")
    if len(of_size) < 2 or not all(row["kl_nats"] for row in of_size):
        return None
    slope, start = np.polyfit([row["bytes"] for row in of_size], np.log([row["kl_nats"] for row in of_size]), 1)
    return float((np.log(target["kl_nats"]) - start) / slope)


def shape_of(model_name: str, dtype: str) -> tuple[RowShape, int]:
    """Queries of one row, and the numbers of a latent (or value) and of a key; and the rows of a layer.

    A layer of ordinary attention has a row for each key head, and each of them is predicted from all of earlier layers.
    """
    site = find_sites(load_model(model_name, dtype).model)[0]
    heads = max(site.kv_heads, 1)
    return RowShape(site.num_heads // heads, site.kv_lora_rank, site.qk_rope_head_dim), heads


@torch.no_grad()
def measure_time(args: Arguments) -> dict[int, float]:
    """Seconds of attention of one token on rows of one layer, two layers and so on, by number of layers."""
    (shape, of_layer), calls = shape_of(args.model, args.dtype), {}
    for layers in range(1, max(args.groups) + 1):
        rows_read = 1 + (layers - 1) * of_layer
        longer = RowShape(shape.heads, shape.latent_dim * rows_read, shape.rope_dim * rows_read)
        codec, keys = packed_codec(longer, TRELLIS_KEYS), coded_keys(shape, args.context, "cpu")
        wide = keys.expand.repeat(1, rows_read) / rows_read
        read = CodedKeys(wide, keys.mean, keys.pairs, keys.table, keys.slots)
        generator = torch.Generator("cpu").manual_seed(0)
        numbers = torch.randn(1, args.context, longer.row_dim, generator=generator, dtype=torch.float32, device="cpu")
        query = torch.randn(
            1, shape.heads, longer.latent_dim + shape.rope_dim, generator=generator, dtype=torch.float32, device="cpu"
        )
        calls[layers] = (query, codec.pack(numbers), codec, longer.latent_dim, read)
    times: dict[int, list[float]] = {layers: [] for layers in calls}
    for turn in interleaved(list(calls), args.repeats):
        query, rows, codec, value_dim, read = calls[turn.name]
        seconds = timed(lambda: attend(query, rows, codec, value_dim, None, scaling=0.1, keys=read), "cpu")  # noqa: B023
        if turn.counts:
            times[turn.name].append(seconds)
    return {layers: statistics.median(found) for layers, found in times.items()}


def of_groups(times: dict[int, float], groups: Sequence[int]) -> dict[int, float]:
    """Time of attention over that of ordinary rows, by size of groups: its first layer reads one row, and so on."""
    return {size: statistics.fmean(times[layer] for layer in range(1, size + 1)) / times[1] for size in groups}


def tables(report: dict[str, Any]) -> list[Table]:
    loss = Table("recipe", "bytes", "bits saved per number", "perplexity", "divergence (nats)")
    for row in report["results"]:
        error = row["loss_stderr_percent"] or 0.0
        change = "not finite" if row["loss_percent"] is None else f"{row['loss_percent']:+.2f} ± {error:.2f} %"
        loss.add_row(
            row["name"], f"{row['bytes']:.1f}", f"{row.get('bits_saved', 0):.2f}", change, f"{row['kl_nats']:.5f}"
        )
    whole = Table("layers of a group", "bytes at equal divergence", "saved", "time of attention")
    for size in report["arguments"]["groups"]:
        nbytes, first = (report["bytes_at_equal_loss"].get(key) for key in (size, 1))
        time = report["time_ratio"].get(size)
        saved = "not measured" if nbytes is None or first is None else f"{100 * (1 - nbytes / first):.1f} %"
        shown = "not measured" if nbytes is None else f"{nbytes:.1f}"
        whole.add_row(str(size), shown, saved, "not measured" if time is None else f"{time:.2f}x")
    return [loss, whole]


def run(args: Arguments) -> dict[str, Any]:
    check(args)
    rows = [] if args.budgets[0] == 0 else measure_loss(args)
    times = measure_time(args) if args.repeats else {}
    return {
        "results": rows,
        "bytes_at_equal_loss": {size: bytes_at_equal_loss(rows, size) for size in args.groups if rows},
        "seconds_by_layers_read": times,
        "time_ratio": of_groups(times, args.groups) if times else {},
    }


def main() -> None:
    (args,) = ProgramParser(Arguments).parse_args_into_dataclasses()
    with readable_errors():
        report = run(args) | environment(args)
    folder = results_folder(args.output, "cross_layer")
    for table in tables(report):
        console().print(table)
    finish(report, folder)


if __name__ == "__main__":
    main()
