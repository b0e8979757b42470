#!/usr/bin/env python
"""How many requests does a server keep running in the same memory, with a splice and without, and how fast are they?

vLLM's OpenAI-compatible server is started on this machine without the splice and with it, with the same bytes for its
cache. `vllm bench serve` then sends all requests at once, and the server is asked meanwhile how many run. Without
--model it is a small random DeepSeek-V3 in bfloat16 with a splice of a quarter of the bytes. The last line of stdout is
one JSON object.

It runs where vLLM is installed (`make test-vllm` makes such an environment):

    python scripts/measure/serving_load.py
    python scripts/measure/serving_load.py --model my-deepseek --splice my-splice
"""

import json
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table
from tqdm import tqdm

from kvsplice_hf import ConfigError, UnsupportedError
from kvsplice_hf.bench.api_server import Watch, api_server, environment_of, metrics, slowed_by, vllm_command
from kvsplice_hf.bench.command_line import (
    ProgramParser,
    console,
    environment,
    finish,
    readable_errors,
    require_folder,
    results_folder,
)
from kvsplice_hf.bench.small_model import STOCK_ROW_BYTES, save_small_model, save_small_splice
from kvsplice_hf.bench.tables import number, ratio
from kvsplice_hf.vllm.plugin import NO_OWN_ROTATION


STOCK, SPLICED = "stock", "spliced"
# Of `vllm bench serve`, and what they are called here: milliseconds.
TIMES = {
    "first_token_median_ms": "median_ttft_ms",
    "first_token_p99_ms": "p99_ttft_ms",
    "token_median_ms": "median_tpot_ms",
    "token_p99_ms": "p99_tpot_ms",
}
# What it says nothing to divide.
_NO_RATIO = ("page", "cache_used_most", "preemptions")
# vLLM's rotation on CPUs is wrong for plain RoPE (docs/serving.md); both servers leave it out.
_COMPILATION = json.dumps({"custom_ops": [NO_OWN_ROTATION]})


@dataclass
class Arguments:
    """Requests at once, throughput and latency of a server with a splice, beside one without."""

    model: str | None = field(
        default=None, metadata={"help": "folder of a DeepSeek-V2 or V3; none: a small random one"}
    )
    splice: str | None = field(default=None, metadata={"help": "folder of save_kvsplice for that model"})
    layers: int = field(default=3, metadata={"help": "of the small random model"})
    bytes_per_token: float = field(default=STOCK_ROW_BYTES / 4, metadata={"help": "of its splice, per layer"})
    sink_tokens: int = field(default=4, metadata={"help": "exact first tokens of its splice"})
    requests: int = field(default=96, metadata={"help": "how many are sent, all at once"})
    input_tokens: int = field(default=768, metadata={"help": "of a request, in the mean"})
    output_tokens: int = field(default=96, metadata={"help": "of a request, in the mean"})
    spread: float = field(default=0.25, metadata={"help": "how far lengths lie from the mean, as a part of it"})
    cache_mb: int = field(default=24, metadata={"help": "memory of the cache, MiB"})
    block_size: int = field(default=0, metadata={"help": "tokens of a page with the splice; 0: as the plug-in chooses"})
    engine: str = field(
        default="--dtype bfloat16 --enforce-eager", metadata={"help": "options of both servers, in one string"}
    )
    seed: int = field(default=0, metadata={"help": "of lengths and tokens of requests"})
    output: str = field(default="results", metadata={"help": "folder for the results and the logs of the servers"})


def check(args: Arguments) -> None:
    """Refuse what no server could do.

    Raises:
        ConfigError: one of model and splice without the other, or numbers out of their range.
    """
    if (args.model is None) != (args.splice is None):
        raise ConfigError("--model and --splice go together: give both, or none for a small random model.")
    for option in ("model", "splice"):
        if getattr(args, option) is not None:
            require_folder(option, getattr(args, option))
    for option in ("layers", "requests", "input_tokens", "output_tokens", "cache_mb"):
        if getattr(args, option) < 1:
            raise ConfigError(f"--{option} is {getattr(args, option)}; it must be at least 1.")
    if not 0 <= args.spread < 1:
        raise ConfigError(f"--spread is {args.spread}; it must be at least 0 and below 1.")


def longest(args: Arguments) -> int:
    """Tokens of the longest sequence; a few more than are asked for, which the client may add."""
    return int((args.input_tokens + args.output_tokens) * (1 + args.spread)) + 16


def load(url: str, model: str, args: Arguments, folder: Path) -> dict[str, Any]:
    """What `vllm bench serve` finds, with all requests sent at once."""
    lengths = ("--random-input-len", str(args.input_tokens), "--random-output-len", str(args.output_tokens))
    command = vllm_command(
        *("bench", "serve", "--backend", "openai", "--base-url", url, "--model", model),
        *("--dataset-name", "random", *lengths, "--random-range-ratio", str(args.spread), "--ignore-eos"),
        *("--num-prompts", str(args.requests), "--num-warmups", "2", "--seed", str(args.seed)),
        *("--temperature", "0", "--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,99"),
        *("--save-result", "--result-dir", str(folder), "--result-filename", "load.json"),
    )
    ended = subprocess.run(command, env=environment_of(None), stdout=sys.stderr, check=False)
    if ended.returncode:
        raise UnsupportedError(f"`vllm bench serve` ended with {ended.returncode}; what it said stands above.")
    found: dict[str, Any] = json.loads((folder / "load.json").read_text(encoding="utf-8"))
    if found["completed"] != args.requests:
        raise UnsupportedError(
            f"The server completed {found['completed']} of {args.requests} requests. Its log is in {folder}."
        )
    return found


def measure(args: Arguments, model: str, splice: Path | None, folder: Path) -> dict[str, Any]:
    """One server, from its start to its end."""
    folder.mkdir()
    options = ["--kv-cache-memory-bytes", str(args.cache_mb << 20), "--max-num-seqs", str(args.requests)]
    options += ["--max-model-len", str(longest(args)), "--compilation-config", _COMPILATION, *shlex.split(args.engine)]
    if splice is not None and args.block_size:
        options += ["--block-size", str(args.block_size)]
    with api_server(model, splice, options, folder / "server.log") as url:
        before = metrics(url)
        with Watch(url) as watch:
            found = load(url, model, args, folder)
        after = metrics(url)
    preempted = after["vllm:num_preemptions_total"] - before["vllm:num_preemptions_total"]
    row: dict[str, Any] = {
        "page": int(after["block_size"]),
        "tokens": int(after["tokens"]),
        "running_most": int(max(watch.running, default=0)),
        "running_mean": sum(watch.running) / len(watch.running) if watch.running else None,
        "cache_used_most": watch.usage,
        "preemptions": int(preempted),
        "seconds": found["duration"],
        "output_tokens_per_s": found["output_throughput"],
        "tokens_per_s": found["total_token_throughput"],
    }
    row["slowed_by"] = slowed_by(folder / "server.log")
    return row | {ours: found[theirs] for ours, theirs in TIMES.items()}


def table_of(rows: dict[str, dict[str, Any]]) -> Table:
    """Servers side by side, and the second over the first."""
    stock, spliced = rows[STOCK], rows[SPLICED]
    table = Table("", STOCK, SPLICED, "spliced over stock")
    for label, key, form in (
        ("tokens of a page", "page", ",d"),
        ("tokens that the cache holds", "tokens", ",d"),
        ("requests running at once, most", "running_most", "d"),
        ("requests running at once, mean", "running_mean", ".1f"),
        ("part of the cache in use, most", "cache_used_most", ".2f"),
        ("preemptions", "preemptions", "d"),
        ("seconds for all requests", "seconds", ".1f"),
        ("tokens written per second", "output_tokens_per_s", ".1f"),
        ("tokens read and written per second", "tokens_per_s", ".1f"),
        ("first token, median, ms", "first_token_median_ms", ".0f"),
        ("first token, p99, ms", "first_token_p99_ms", ".0f"),
        ("each further token, median, ms", "token_median_ms", ".1f"),
        ("each further token, p99, ms", "token_p99_ms", ".1f"),
    ):
        times = "" if key in _NO_RATIO else ratio(spliced[key], stock[key], ".3f")
        table.add_row(label, number(stock[key], form), number(spliced[key], form), times)
    return table


def run(args: Arguments, folder: Path) -> dict[str, Any]:
    import vllm

    check(args)
    with tempfile.TemporaryDirectory() as name:
        report: dict[str, Any] = {"vllm": vllm.__version__}
        model, splice = args.model, args.splice
        if model is None or splice is None:
            model, splice = f"{name}/model", f"{name}/splice"
            save_small_model(Path(model), args.layers, longest(args))
            row = save_small_splice(Path(model), Path(splice), args.bytes_per_token, args.sink_tokens)
            report |= {"row_bytes": row, "stock_row_bytes": STOCK_ROW_BYTES}
        servers = {STOCK: None, SPLICED: Path(splice)}
        bar = tqdm(servers.items(), desc="Servers", unit="server")
        report["servers"] = {arm: measure(args, model, found, folder / arm) for arm, found in bar}
    return report


def main() -> None:
    (args,) = ProgramParser(Arguments).parse_args_into_dataclasses()
    folder = results_folder(args.output, "serving_load")
    with readable_errors():
        report = run(args, folder)
    console().print(table_of(report["servers"]))
    for arm, row in report["servers"].items():
        for line in row["slowed_by"]:
            console().print(f"{arm}: {line}", style="yellow")
    finish(report | environment(args), folder)


if __name__ == "__main__":
    main()
