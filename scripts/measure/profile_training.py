#!/usr/bin/env python
"""Training steps of GPT-2, MLA, MLA with a splice built in and reciprocal MLA, side by side, and where their time goes.

Models of one size with random weights take turns, so that a machine that slows down slows all of them; medians count.
The last line of stdout is one JSON object.

    python scripts/measure/profile_training.py                                    # the nano size
    python scripts/measure/profile_training.py --config configs/gpt2_mla/124m.yaml --batch_size 1 --vocab_size 50257
"""

import statistics
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from kvsplice_hf import ConfigError
from kvsplice_hf.bench.command_line import (
    ProgramParser,
    console,
    environment,
    finish,
    read_settings,
    readable_errors,
    results_folder,
)
from kvsplice_hf.bench.pretraining.run import KINDS
from kvsplice_hf.bench.pretraining.training import ModelArguments, build_model
from kvsplice_hf.bench.tables import ratio


# What is compared, as changes of the settings; ranks are shares of the config's own.
ARMS: dict[str, dict[str, Any]] = {
    "GPT-2": {"architecture": "gpt2", "kv_lora_rank": None},
    "MLA": {},
    "MLA of half the rank": {"rank_share": 0.5},
    "MLA with a splice of half the rank": {"kvsplice": {"compression_ratio": 0.5, "sink_tokens": 0}},
    "MLA, queries from the latent": {"queries_from_latent": True},
    "MLA with reciprocal attention": {"queries_from_latent": True, "reciprocal_layers": "all"},
    "MLA with a reciprocal MLP": {"reciprocal_mlp": 0.25},
}
# Operators by the beginning of their names; the first that fits counts.
GROUPS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "mkldnn"),
    "attention": ("aten::_scaled_dot_product", "aten::_flash", "aten::_efficient"),
    "loss": ("aten::_log_softmax", "aten::nll_loss", "aten::cross_entropy"),
    "optimiser": ("aten::_foreach", "aten::_fused", "Optimizer"),
}
_REST = "rest (copies, activations, norms, additions)"
# Steps that do not count: memory is allocated in them.
_WARM_UP = 2


@dataclass
class Arguments:
    """Training speed of MLA beside GPT-2."""

    config: str = field(default="configs/gpt2_mla/nano.yaml", metadata={"help": "YAML file of train_gpt2_mla.py"})
    batch_size: int = field(default=8, metadata={"help": "blocks per step"})
    vocab_size: int = field(default=2048, metadata={"help": "size of the vocabulary"})
    steps: int = field(default=12, metadata={"help": f"steps of each model; the first {_WARM_UP} do not count"})
    bf16: bool = field(default=False, metadata={"help": "matrix products in bf16"})
    output: str = field(default="results", metadata={"help": "folder for the results"})


class Runner:
    """One model with its optimiser."""

    def __init__(self, name: str, settings: dict[str, Any], args: Arguments) -> None:
        torch.manual_seed(0)
        self.name, self.bf16 = name, args.bf16
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model: PreTrainedModel = build_model(ModelArguments(**settings), _Sized(args.vocab_size))
        self.model = model.to(self.device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        shape = (args.batch_size, settings["n_positions"])
        self.ids = torch.randint(0, args.vocab_size, shape, device=self.device)
        self.seconds: list[dict[str, float]] = []

    def step(self) -> dict[str, float]:
        """Seconds of the three parts of a step."""
        marks = [self._now()]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.model(self.ids, labels=self.ids, use_cache=False).loss
        marks.append(self._now())
        loss.backward()
        marks.append(self._now())
        self.optimizer.step()
        self.optimizer.zero_grad()
        marks.append(self._now())
        parts = ("forward", "backward", "optimiser")
        return dict(zip(parts, (after - before for before, after in pairwise(marks)), strict=True))

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def by_group(self, steps: int = 3) -> dict[str, float]:
        """Milliseconds per step by group of operators."""
        cuda = self.device.type == "cuda"
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
        with profile(activities=activities) as profiler:
            for _ in range(steps):
                self.step()
        totals: dict[str, float] = defaultdict(float)
        for event in profiler.key_averages():
            own = event.self_device_time_total if cuda else event.self_cpu_time_total
            totals[_group_of(event.key)] += own / 1000 / steps
        return {name: totals[name] for name in (*GROUPS, _REST)}

    def result(self) -> dict[str, Any]:
        kept = self.seconds[_WARM_UP:]
        parts = {part: statistics.median(row[part] for row in kept) for part in kept[0]}
        with FlopCounterMode(display=False) as counter:
            self.model(self.ids, use_cache=False)
        return {
            "name": self.name,
            "parameters": self.model.num_parameters(),
            "tokens_per_second": self.ids.numel() / statistics.median(sum(row.values()) for row in kept),
            "milliseconds": {part: 1000 * seconds for part, seconds in parts.items()},
            "forward_gflop": counter.get_total_flops() / 1e9,
            "milliseconds_by_operator": self.by_group(),
        }


class _Sized:
    """What `build_model` asks of a tokenizer."""

    eos_token_id = 0

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size


def _group_of(operator: str) -> str:
    return next((name for name, starts in GROUPS.items() if operator.startswith(starts)), _REST)


def settings_of_arms(args: Arguments) -> dict[str, dict[str, Any]]:
    """The model settings of each arm: those of the file, changed."""
    known = set(ModelArguments.__dataclass_fields__)
    base = {name: value for name, value in read_settings(Path(args.config), KINDS).items() if name in known}
    base = {name: getattr(ModelArguments(**base), name) for name in known}
    rank = base["kv_lora_rank"] or base["n_embd"] // 3
    arms = {}
    for name, changes in ARMS.items():
        changes = dict(changes)
        share = changes.pop("rank_share", 1.0)
        arms[name] = base | {"kv_lora_rank": round(rank * share)} | changes
    return arms


def table_of(rows: list[dict[str, Any]]) -> Table:
    operators = list(rows[0]["milliseconds_by_operator"])
    table = Table("model", "parameters", "tokens/s", "of GPT-2", "fwd GFLOP", "fwd, bwd, opt ms", *operators)
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['parameters']:,d}",
            f"{row['tokens_per_second']:,.0f}",
            ratio(row["tokens_per_second"], rows[0]["tokens_per_second"]),
            f"{row['forward_gflop']:.2f}",
            ", ".join(f"{value:.1f}" for value in row["milliseconds"].values()),
            *(f"{value:.1f}" for value in row["milliseconds_by_operator"].values()),
        )
    return table


def main() -> None:
    (args,) = ProgramParser(Arguments, description=__doc__.split("\n")[0]).parse_args_into_dataclasses()
    with readable_errors():
        if args.steps <= _WARM_UP:
            raise ConfigError(f"--steps is {args.steps}; the first {_WARM_UP} do not count, so it must be above that.")
        runners = [Runner(name, settings, args) for name, settings in settings_of_arms(args).items()]
    for step in range(args.steps):
        for runner in runners:
            runner.seconds.append(runner.step())
        print(f"\rstep {step + 1} of {args.steps}", end="", file=sys.stderr)
    print(file=sys.stderr)
    rows = [runner.result() for runner in runners]
    console().print(table_of(rows))
    finish({"results": rows, **environment(args)}, results_folder(args.output, "training-speed"))


if __name__ == "__main__":
    main()
