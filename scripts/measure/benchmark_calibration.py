#!/usr/bin/env python
"""What calibration costs: collecting statistics over plain forward passes on the same tokens, and the solve after it.

Round by round the model runs forward over all windows as it is and once for each metric, in turn, so that a slow moment
of the machine hits all of them. The last line of stdout is one JSON object.

    python scripts/measure/benchmark_calibration.py                    # SmolLM2-135M as MLA, pydoc
    python scripts/measure/benchmark_calibration.py --windows 32 --metrics fisher
"""

import functools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.table import Table
from tqdm import tqdm

from kvsplice_hf import ConfigError, KVSpliceCalibrator, KVSpliceConfig
from kvsplice_hf.bench.command_line import (
    DEMO,
    ProgramParser,
    console,
    environment,
    finish,
    load_model,
    readable_errors,
    require_known,
    results_folder,
)
from kvsplice_hf.bench.texts import spread_windows
from kvsplice_hf.calibration.collect import METRICS


@dataclass
class Arguments:
    """What calibration costs."""

    model: str = field(default=DEMO, metadata={"help": 'folder or hub name; "demo": SmolLM2-135M as MLA'})
    metrics: list[str] = field(default_factory=lambda: list(METRICS), metadata={"help": "any of " + ", ".join(METRICS)})
    text: str = field(default="pydoc", metadata={"help": "text to calibrate on"})
    windows: int = field(default=8, metadata={"help": "sequences per round"})
    rounds: int = field(default=3, metadata={"help": "how often to go over them"})
    window: int = field(default=512, metadata={"help": "tokens per sequence"})
    bytes_per_token: float = field(default=193.0, metadata={"help": "budget of the solve"})
    dtype: str = field(default="float32", metadata={"help": "dtype of the model"})
    output: str = field(default="results", metadata={"help": "folder for the results"})


def seconds(run: Callable[[], Any]) -> float:
    """Of one call, with all that it starts on a GPU."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(model: Any, windows: torch.Tensor, args: Arguments) -> dict[str, Any]:
    """Seconds per round of the plain forward and of each metric, and of each solve."""
    calibrators = {metric: KVSpliceCalibrator(model, metric=metric) for metric in args.metrics}
    times: dict[str, list[float]] = {"forward": [], **{metric: [] for metric in args.metrics}}

    @torch.no_grad()
    def forward(ids: torch.Tensor) -> None:
        model(ids.to(model.device), use_cache=False)

    forward(windows[:1])  # the first one loads code and warms caches
    for _ in tqdm(range(args.rounds), desc="rounds", file=sys.stderr):
        times["forward"].append(seconds(lambda: [forward(ids[None]) for ids in windows]))
        for metric, calibrator in calibrators.items():
            collect = functools.partial(calibrator.collect, list(windows), holdout=0, progress=False)
            times[metric].append(seconds(collect))
    budget = KVSpliceConfig(bytes_per_token=args.bytes_per_token, allocation="layer")
    solves = {metric: seconds(lambda of=calibrator: of.fit(budget)) for metric, calibrator in calibrators.items()}
    return {"seconds": times, "solve_s": solves, "layers": len(next(iter(calibrators.values())).statistics)}


def table_of(report: dict[str, Any]) -> Table:
    times = report["seconds"]
    table = Table("", "per round (s)", "over a forward pass", f"solve, {report['layers']} layers (s)")
    for name, row in times.items():
        ratios = [own / plain for own, plain in zip(row, times["forward"], strict=True)]
        span = f"{statistics.median(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f})"
        solve = f"{report['solve_s'][name]:.1f}" if name in report["solve_s"] else ""
        table.add_row(name, f"{statistics.median(row):.2f}", span, solve)
    return table


def main() -> None:
    (args,) = ProgramParser(Arguments).parse_args_into_dataclasses()
    with readable_errors():
        require_known("metrics", args.metrics, METRICS)
        if args.rounds < 1:
            raise ConfigError(f"--rounds is {args.rounds}; it must be 1 at least.")
        model, tokenizer = load_model(args.model, args.dtype)
        windows = spread_windows(tokenizer, args.text, "calibration", args.window, args.windows * args.window)
        report = measure(model, windows, args)
    console().print(table_of(report))
    finish(report | environment(args), results_folder(args.output, "calibration-cost"))


if __name__ == "__main__":
    main()
