#!/usr/bin/env python
"""What does a prompt cost on disk, and how long does it take to save, to load, and to compute anew?

One line for the cache of the stock model, and one for that of the spliced one in each form of `--compress`. All forms
are lossless: what loads are the rows that were saved, bit for bit, which is checked. With `--stress_seconds`, several
processes write and read one store for so long, and compare what they find; with `--kills`, writers are killed. The last
line of stdout is one JSON object.

    python scripts/measure/caches_at_rest.py --model smollm2 --tokens 4096 --bytes_per_token 193
    python scripts/measure/caches_at_rest.py --tokens 0 --stress_seconds 60 --kills 50
"""

import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import DynamicCache

from kvsplice_hf import describe_cache, get_kv_cache_size, load_cache, save_cache
from kvsplice_hf.bench.command_line import (
    DEMO,
    BudgetOrSplice,
    ProgramParser,
    console,
    environment,
    finish,
    load_model,
    readable_errors,
    require_known,
    results_folder,
    splice,
)
from kvsplice_hf.bench.store_stress import killed, side_by_side
from kvsplice_hf.bench.texts import spread_windows
from kvsplice_hf.errors import ConfigError, KVSpliceError
from kvsplice_hf.rest.compression import COMPRESSIONS
from kvsplice_hf.upstream import cache_argument


@dataclass
class Arguments(BudgetOrSplice):
    """Bytes and times of a prompt that is kept on disk."""

    model: str = field(default=DEMO, metadata={"help": 'folder, hub name, "demo" (SmolLM2 as MLA) or "smollm2"'})
    text: str = field(default="pydoc", metadata={"help": "where the prompt comes from"})
    tokens: int = field(default=4096, metadata={"help": "of the prompt; 0: no prompt is measured"})
    compress: str = field(
        default="none,entropy", metadata={"help": 'forms of packed rows, with commas between them; "none": as they are'}
    )
    repeats: int = field(default=5, metadata={"help": "of saving and loading, of which the median counts"})
    stress_seconds: float = field(default=0, metadata={"help": "how long two processes write and read one store"})
    kills: int = field(default=0, metadata={"help": "how many writers are killed"})
    dtype: str = field(default="float32", metadata={"help": "dtype of the model"})
    output: str = field(default="results", metadata={"help": "folder for the results"})


def check(args: Arguments) -> None:
    """Raises ConfigError for settings that nothing could be measured with."""
    for name, least in (("tokens", 0), ("repeats", 1), ("stress_seconds", 0), ("kills", 0)):
        if getattr(args, name) < least:
            raise ConfigError(f"--{name} is {getattr(args, name)}; it must be at least {least}.")
    require_known("compress", forms_of(args), ["none", *COMPRESSIONS])


def forms_of(args: Arguments) -> list[str]:
    """The forms of packed rows."""
    return [name.strip() for name in args.compress.split(",")]


def seconds_of(call: Callable[[], Any], repeats: int = 1) -> tuple[float, Any]:
    """The median time of a call, and what the last one gave."""
    times, found = [], None
    for _ in range(repeats):
        start = time.perf_counter()
        found = call()
        times.append(time.perf_counter() - start)
    return statistics.median(times), found


@torch.no_grad()
def measure(
    name: str, model: Any, ids: torch.Tensor, forms: list[str], repeats: int, folder: Path
) -> list[dict[str, Any]]:
    """One line of the table for each form."""
    path = folder / "cache.safetensors"

    def computed() -> DynamicCache:
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        model(input_ids=ids, use_cache=True, logits_to_keep=1, **cache_argument(cache))
        return cache

    compute_s, cache = seconds_of(computed)
    # What is asked of a model once, and remembered while it lives: who it is.
    identity_s, _ = seconds_of(lambda: save_cache(cache, path, model, input_ids=ids))
    lines = []
    for form in forms:
        compress = None if form == "none" else form
        saves = functools.partial(save_cache, cache, path, model, input_ids=ids, compress=compress)
        save_s, nbytes = seconds_of(saves, repeats)
        load_s, loaded = seconds_of(lambda: load_cache(model, path), repeats)
        unverified_s, _ = seconds_of(lambda: load_cache(model, path, verify=False), repeats)
        require_same(cache, loaded, form)
        layers = len(describe_cache(path).spliced) or model.config.get_text_config().num_hidden_layers
        lines.append(
            {
                "cache": name if form == "none" else f"{name}, {form}",
                "file_bytes": nbytes,
                "bytes_per_token_and_layer": nbytes / ids.shape[1] / layers,
                "compute_s": compute_s,
                "first_save_s": identity_s,
                "save_s": save_s,
                "load_s": load_s,
                "load_unverified_s": unverified_s,
            }
        )
    return lines


def require_same(saved: DynamicCache, loaded: Any, form: str) -> None:
    """Raises KVSpliceError where a cache did not come back as it was."""
    pairs = zip(saved.layers, loaded.layers, strict=True)
    if not all(torch.equal(getattr(a, name), getattr(b, name)) for a, b in pairs for name in ("keys", "values")):
        raise KVSpliceError(f"A cache came back from its file in the form {form!r} as another one.")


def measure_prompt(args: Arguments) -> dict[str, Any]:
    model, tokenizer = load_model(args.model, args.dtype)
    ids = spread_windows(tokenizer, args.text, "evaluation", args.tokens, args.tokens)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(f"stock, {args.dtype}", model, ids, ["none"], args.repeats, Path(folder))
        stock = get_kv_cache_size(model, seq_len=args.tokens).original_bytes
        splice(model, tokenizer, args)
        rows += measure("spliced", model, ids, forms_of(args), args.repeats, Path(folder))
    bf16 = stock * torch.bfloat16.itemsize // getattr(torch, args.dtype).itemsize
    for row in rows:
        row["of_stock_in_bf16"] = row["file_bytes"] / bf16
    return {"results": rows, "stock_bf16_bytes": bf16}


def table_of(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        "cache", "file (MB)", "B per token and layer", "of stock in bf16", "compute", "save", "load", "unverified"
    )
    for row in rows:
        times = [f"{row[name] * 1000:,.1f} ms" for name in ("compute_s", "save_s", "load_s", "load_unverified_s")]
        sizes = [f"{row['file_bytes'] / 1e6:.1f}", f"{row['bytes_per_token_and_layer']:.1f}"]
        table.add_row(row["cache"], *sizes, f"{row['of_stock_in_bf16']:.3f}x", *times)
    return table


def run(args: Arguments) -> dict[str, Any]:
    check(args)
    report: dict[str, Any] = measure_prompt(args) if args.tokens else {"results": []}
    with tempfile.TemporaryDirectory() as folder:
        if args.stress_seconds:
            report["side_by_side"] = side_by_side(Path(folder) / "shared", 2, args.stress_seconds)
        if args.kills:
            report["killed"] = killed(Path(folder) / "killed", args.kills)
    return report


def main() -> None:
    (args,) = ProgramParser(Arguments).parse_args_into_dataclasses()
    with readable_errors():
        report = run(args)
    folder = results_folder(args.output, "caches_at_rest")
    console().print(table_of(report["results"]))
    finish(report | environment(args), folder)


if __name__ == "__main__":
    main()
