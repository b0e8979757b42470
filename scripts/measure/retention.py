#!/usr/bin/env python
"""What does it cost to keep the rows of some tokens alone in the cache, beside packed rows of all tokens?

A prompt fills the cache, and rows are dropped behind it: all but the first and last ones ("window"), or all but the
first, the recent and those that attention has read most ("attention"), of rows as they are and of packed rows. The
tokens behind the prompt are scored on what is left, beside the full model; passkeys are asked for; a step is timed
(`--rounds`). Packed rows of all tokens that take as many bytes are measured beside. The last line of stdout is one JSON
object.

    python scripts/measure/retention.py --statistics demo.safetensors
    python scripts/measure/retention.py --model smollm2 --statistics smollm2.safetensors --windows 3
    python scripts/measure/retention.py --model smollm2 --loss false --retrieval false --rounds 4
"""

from dataclasses import dataclass, field
from typing import Any

from kvsplice_hf.bench.command_line import (
    DEMO,
    ProgramParser,
    calibrate,
    console,
    environment,
    finish,
    load_model,
    readable_errors,
    require_known,
    results_folder,
)
from kvsplice_hf.bench.comparison import Row
from kvsplice_hf.bench.retained import FULL, Arm, RetentionTrial, table_of
from kvsplice_hf.config import DEFAULT_CODEC
from kvsplice_hf.errors import ConfigError
from kvsplice_hf.retention.plan import POLICIES


@dataclass
class Arguments:
    """What does it cost to keep the rows of some tokens alone, beside packed rows of all tokens?"""

    model: str = field(default=DEMO, metadata={"help": 'folder, hub name, "demo" (SmolLM2 as MLA) or "smollm2"'})
    prompt: int = field(default=1024, metadata={"help": "tokens that fill the cache in one call"})
    continuation: int = field(default=256, metadata={"help": "tokens behind them, which are scored"})
    chunk: int = field(default=32, metadata={"help": "tokens of a call behind the prompt"})
    shares: list[float] = field(default_factory=lambda: [0.5, 0.25], metadata={"help": "of the prompt that stay"})
    policies: list[str] = field(default_factory=lambda: list(POLICIES), metadata={"help": "which rows stay"})
    first: int = field(default=4, metadata={"help": "first tokens that stay"})
    recent: int = field(default=32, metadata={"help": "recent tokens that stay whatever attention says"})
    interval: int = field(default=1, metadata={"help": "rows that gather before any are dropped"})
    packed: bool = field(default=True, metadata={"help": "packed rows as well"})
    packed_bytes: list[float] = field(
        default_factory=lambda: [193.0], metadata={"help": "bytes of packed rows that are dropped as well"}
    )
    codec: str = field(default=DEFAULT_CODEC, metadata={"help": 'of packed rows; "rows" is fitted faster'})
    calibration: str = field(default="varied", metadata={"help": "text that packed rows are calibrated on"})
    calibration_tokens: int = field(default=16384, metadata={"help": "tokens of it"})
    statistics: str | None = field(
        default=None, metadata={"help": "of calibration: read if it is there, otherwise written"}
    )
    evaluation: list[str] = field(
        default_factory=lambda: ["pydoc"], metadata={"help": "texts whose second half is measured on"}
    )
    windows: int = field(default=4, metadata={"help": "windows of each text"})
    loss: bool = field(default=True, metadata={"help": "score the continuations"})
    retrieval: bool = field(default=True, metadata={"help": "ask for passkeys in prompts as long"})
    retrieval_chunk: int = field(
        default=4096, metadata={"help": "tokens of a call in them; 4096: the question sees all of the prompt"}
    )
    depths: list[float] = field(
        default_factory=lambda: [0.1, 0.3, 0.5, 0.7, 0.9], metadata={"help": "share of the prose ahead of the key"}
    )
    samples: int = field(default=4, metadata={"help": "prompts per depth"})
    rounds: int = field(default=0, metadata={"help": "of the measurement of time per step; 0: none"})
    dtype: str = field(default="bfloat16", metadata={"help": "dtype of the model"})
    output: str = field(default="results", metadata={"help": "folder for the results"})

    def __post_init__(self) -> None:
        names = ("prompt", "chunk", "windows", "samples", "retrieval_chunk")
        wrong = {name: getattr(self, name) for name in names if getattr(self, name) < 1}
        if wrong or self.continuation < 2:
            raise ConfigError(
                f"{wrong or {'continuation': self.continuation}}: each takes 1 or more, --continuation 2 or more."
            )
        if not self.shares or min(self.shares) <= 0 or max(self.shares) > 1:
            raise ConfigError(f"--shares is {self.shares}; it takes numbers above 0, and 1 at most.")
        if not self.evaluation or not self.policies:
            raise ConfigError("--evaluation and --policies each take a name or more.")
        require_known("policies", self.policies, POLICIES)


def measured(trial: RetentionTrial, arms: list[Arm], args: Arguments) -> list[Row]:
    """The rows of all arms, and of the full model ahead of them."""
    rows = trial.rows(arms)
    same = trial.arms_of_same_bytes(rows)
    everything = [Arm(FULL), *arms, *same]
    rows = [*trial.rows([Arm(FULL)]), *rows, *trial.rows(same)]
    losses = trial.losses([*arms, *same]) if args.loss else {}
    keys: dict[str, Any] = trial.retrieval(everything) if args.retrieval else {}
    seconds = trial.step_times(everything, args.rounds) if args.rounds else {}
    return [
        row | {"texts": losses.get(row["name"], {})} | {"retrieval": keys.get(row["name"])} | _step(row, seconds)
        for row in rows
    ]


def _step(row: Row, seconds: dict[str, float]) -> Row:
    return {"step_s": seconds.get(row["name"])}


def run(args: Arguments) -> list[Row]:
    """Load, calibrate, measure and print."""
    model, tokenizer = load_model(args.model, args.dtype)
    calibrator = calibrate(model, tokenizer, args) if args.packed else None  # type: ignore[arg-type]
    trial = RetentionTrial(model, tokenizer, args, calibrator)
    rows = measured(trial, trial.arms(), args)
    console().print(f"[bold]{args.model}[/bold]", table_of(rows, args.evaluation))
    return rows


def main() -> None:
    with readable_errors():
        (args,) = ProgramParser(Arguments).parse_args_into_dataclasses()
        folder = results_folder(args.output, "retention")
        finish({"rows": run(args), **environment(args)}, folder)


if __name__ == "__main__":
    main()
