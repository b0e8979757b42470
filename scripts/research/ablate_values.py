#!/usr/bin/env python
"""What does it cost to drop the values of most tokens, to compress those that are left, and both? Beside packed rows.

V19 of the research keeps the values of 391 of 1024 tokens, V20 keeps 16 of 64 numbers of those as well, V21 does so in
a model with a reciprocal MLP. A prompt fills the cache; the tokens behind it are scored, in calls of a few tokens, on
what is left. Several models (seeds of one training) are measured one by one. The last line of stdout is one JSON
object.

    python scripts/research/ablate_values.py --models smollm2 --statistics smollm2.safetensors
    python scripts/research/ablate.py configs/ablations/values_nano.yaml
    python scripts/research/ablate_values.py --models results/ablation-values-nano/tokens/GPT-2/seed-0 \
        --prompt 192 --continuation 64 --chunk 8 --keep 73 --recent 6 --components 8 --packed false
"""

from dataclasses import dataclass, field
from typing import Any

from kvsplice_hf import KVSpliceCalibrator
from kvsplice_hf.bench.command_line import (
    ORDINARY_DEMO,
    ProgramParser,
    calibrate,
    console,
    environment,
    finish,
    load_model,
    readable_errors,
    results_folder,
)
from kvsplice_hf.bench.comparison import Row
from kvsplice_hf.bench.value_trial import FULL, V19, V20, Arm, Trial, means_of, table_of
from kvsplice_hf.config import DEFAULT_CODEC
from kvsplice_hf.errors import ConfigError


@dataclass
class Arguments:
    """What does it cost to drop the values of most tokens, to compress those that are left, and both?"""

    models: list[str] = field(
        default_factory=lambda: [ORDINARY_DEMO],
        metadata={"help": 'folders, hub names or "smollm2"; several are seeds of one training'},
    )
    prompt: int = field(default=1024, metadata={"help": "tokens that fill the cache in one call"})
    continuation: int = field(default=256, metadata={"help": "tokens behind them, which are scored"})
    chunk: int = field(default=32, metadata={"help": "tokens of a call behind the prompt"})
    keep: int = field(default=391, metadata={"help": "tokens that keep their values"})
    first: int = field(default=4, metadata={"help": "of them the first of a sequence"})
    recent: int = field(default=32, metadata={"help": "and the last ones"})
    components: int = field(default=16, metadata={"help": "numbers that are left of a value"})
    epochs: int = field(default=8, metadata={"help": "of the splines; 0: without them"})
    calibration: list[str] = field(
        default_factory=lambda: ["pydoc"], metadata={"help": "texts whose first half geometries are fitted to"}
    )
    calibration_windows: int = field(default=8, metadata={"help": "prompts to fit them to, of all texts together"})
    evaluation: list[str] = field(
        default_factory=lambda: ["pydoc"], metadata={"help": "texts whose second half is measured on"}
    )
    windows: int = field(default=8, metadata={"help": "windows of each text"})
    pruned: bool = field(default=True, metadata={"help": "pruned and compressed values"})
    packed: bool = field(default=True, metadata={"help": "packed rows as well"})
    packed_bytes: list[float] = field(
        default_factory=list, metadata={"help": "bytes of packed rows; none: those of V19 and V20"}
    )
    packed_codec: str = field(default=DEFAULT_CODEC, metadata={"help": 'codec of packed rows; "rows" is fitted faster'})
    statistics: str | None = field(
        default=None, metadata={"help": "of calibration for packed rows: read if it is there, otherwise written"}
    )
    loss: bool = field(default=True, metadata={"help": "score the continuations"})
    rounds: int = field(default=0, metadata={"help": "of the measurement of time per step; 0: none"})
    dtype: str = field(default="float32", metadata={"help": "dtype of the models"})
    output: str = field(default="results", metadata={"help": "folder for the results"})

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in ("prompt", "chunk", "windows", "components")}
        wrong = {name: value for name, value in counts.items() if value < 1}
        if wrong or self.continuation < 2:
            raise ConfigError(
                f"{wrong or {'continuation': self.continuation}}: each takes 1 or more, --continuation 2 or more."
            )
        if not self.pruned and not (self.packed and self.packed_bytes):
            raise ConfigError(
                "Without --pruned it takes --packed_bytes: there is nothing whose bytes could be matched."
            )
        if not self.models or not self.evaluation or not self.calibration:
            raise ConfigError("--models, --evaluation and --calibration each take a name or more.")


@dataclass
class _Calibration:
    """What `calibrate` is told."""

    calibration: str
    calibration_tokens: int
    statistics: str | None


def calibrator_of(model: Any, tokenizer: Any, args: Arguments) -> KVSpliceCalibrator | None:
    """Statistics for packed rows, where they were asked for."""
    if not args.packed:
        return None
    return calibrate(model, tokenizer, _Calibration("varied", 16384, args.statistics))  # type: ignore[arg-type]


def rows_of(name: str, args: Arguments) -> list[Row]:
    """All rows of one model."""
    model, tokenizer = load_model(name, args.dtype)
    trial = Trial(model, tokenizer, args, calibrator_of(model, tokenizer, args))
    arms = trial.arms() if args.pruned else []
    sizes = trial.sizes(arms)
    if args.packed:
        budgets = args.packed_bytes or [sizes[name]["bytes"] for name in (V19, V20)]
        packed = trial.packed_arms(budgets, args.packed_codec)
        sizes |= trial.packed_sizes(packed)
        arms += packed
    rows = trial.scores(arms) if args.loss else [{"name": arm.name, "texts": {}} for arm in arms]
    rows.insert(0, {"name": FULL, "texts": {}})
    timed = [Arm(FULL), *arms] if args.rounds else []
    seconds = trial.step_times(timed, args.rounds) if timed else {}
    return [row | sizes[row["name"]] | {"step_s": seconds.get(row["name"])} for row in rows]


def run(args: Arguments) -> list[Row]:
    """The rows of all models, and their means over models where there are several."""
    found = []
    for name in args.models:
        rows = rows_of(name, args)
        console().print(f"[bold]{name}[/bold]", table_of(rows, args.evaluation))
        found.append({"model": name, "rows": rows})
    if len(found) > 1:
        console().print(means_of([each["rows"] for each in found], args.evaluation))
    return found


def main() -> None:
    with readable_errors():
        (args,) = ProgramParser(Arguments).parse_args_into_dataclasses()
        folder = results_folder(args.output, "ablate_values")
        finish({"models": run(args), **environment(args)}, folder)


if __name__ == "__main__":
    main()
