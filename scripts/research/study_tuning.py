#!/usr/bin/env python
"""What tuning a calibrated splice can gain: a learning curve over the text that it is tuned on and the steps taken.

The loss is the divergence from the original model. Each run starts from the same splice and takes the same number of
steps, with a rate that falls to 0; runs differ in how many windows they go over (again and again where these are few)
and in the coordinates in which steps are taken. After every share of the steps the divergence is measured, without a
cache, on windows that are tuned on and on windows of other texts. What is lost on the first is what the codes cannot
say; what is lost beyond that on the others is what the tuned text did not teach. The last line of stdout is one JSON
object.

    python scripts/research/study_tuning.py --bytes_per_token 128 --dataset varied book.txt --evaluation speeches.txt
    python scripts/research/study_tuning.py --coordinates calibrated plain --learning_rates 3e-7 5e-5
"""

import functools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import torch
from datasets import Dataset
from rich.table import Table
from transformers import PreTrainedModel, TrainerCallback, set_seed

from kvsplice_hf import load_kvsplice, patch_model_with_kvsplice, save_kvsplice, unpatch_model
from kvsplice_hf.bench.command_line import (
    DEMO,
    Budget,
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
from kvsplice_hf.errors import ConfigError
from kvsplice_hf.evaluation.reference import score_against, score_reference
from kvsplice_hf.text import load_texts, spread_evenly, token_windows
from kvsplice_hf.training import KVSpliceTrainer, KVSpliceTrainingArguments, freeze_all_but_kvsplice


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


COORDINATES = ("calibrated", "plain")
TUNED_ON = "tuned on"


@dataclass
class Arguments(Budget):
    """What tuning a calibrated splice can gain."""

    model: str = field(default=DEMO, metadata={"help": 'folder or hub name; "demo": SmolLM2-135M as MLA'})
    dtype: str = field(default="float32", metadata={"help": "dtype of the model"})
    dataset: list[str] = field(default_factory=lambda: ["varied"], metadata={"help": "texts to tune on"})
    evaluation: list[str] = field(default_factory=lambda: ["pydoc"], metadata={"help": "texts to measure on"})
    block_size: int = field(default=512, metadata={"help": "tokens per window, in tuning and measuring"})
    evaluation_windows: int = field(default=4, metadata={"help": "windows to measure on, of each text"})
    windows: list[int] = field(default_factory=lambda: [4, 16, 64], metadata={"help": "windows to tune on, a run each"})
    steps: int = field(default=60, metadata={"help": "steps of each run, of one window"})
    looks: int = field(default=3, metadata={"help": "how often each run is measured"})
    coordinates: list[str] = field(
        default_factory=lambda: ["calibrated"], metadata={"help": "calibrated, plain: those of the parameters"}
    )
    learning_rates: list[float] = field(
        default_factory=lambda: [3e-7], metadata={"help": "one for each of the coordinates"}
    )
    output: str = field(default="results", metadata={"help": "folder for the results"})


def check(args: Arguments) -> None:
    """Raises ConfigError for settings that cannot be used."""
    require_known("coordinates", args.coordinates, COORDINATES)
    if len(args.learning_rates) != len(args.coordinates):
        raise ConfigError(
            f"--learning_rates holds {len(args.learning_rates)} rates, --coordinates {len(args.coordinates)} names; "
            "there must be one rate for each."
        )
    for name in ("steps", "looks"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} is {getattr(args, name)}; it must be at least 1.")
    if args.calibration in ("none", "auto"):
        raise ConfigError(f"--calibration is {args.calibration!r}; name a text, or give a file of --statistics.")
    if min(args.windows) < args.evaluation_windows:
        raise ConfigError(
            f"--windows holds {min(args.windows)}, and --evaluation_windows is {args.evaluation_windows}: a run cannot "
            "be measured on more windows than it is tuned on."
        )


class Study:
    """One model, the texts, and what its original says of them.

    Attributes:
        tuned_on: token ids in the order in which they are taken, [W, T].
        references: scores of the original on held-out texts, and on windows that every run is tuned on.
        calibration: what the splice is fitted to.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, args: Arguments) -> None:
        self.model, self.args = model, args
        size = args.block_size
        parts = [token_windows(tokenizer, load_texts(name, "calibration"), size) for name in args.dataset]
        windows = torch.cat([spread_evenly(part, max(args.windows)) for part in parts])
        if len(windows) < max(args.windows):
            raise ConfigError(
                f"--dataset gives {len(windows)} windows of {size} tokens, and --windows asks for {max(args.windows)}. "
                "Give more text, or fewer windows."
            )
        self.tuned_on = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))]
        texts = {name: token_windows(tokenizer, load_texts(name, "evaluation"), size) for name in args.evaluation}
        texts = {name: spread_evenly(text, args.evaluation_windows) for name, text in texts.items()}
        texts[TUNED_ON] = self.tuned_on[: args.evaluation_windows]
        self.references = {name: score_reference(self.logits, text, f"stock: {name}") for name, text in texts.items()}
        self.calibration = calibrate(model, tokenizer, args)

    def logits(self, window: torch.Tensor) -> torch.Tensor:
        """[T, vocabulary] of a window [T], without a cache."""
        return self.model(window[None].to(self.model.device), use_cache=False).logits[0]

    def measured(self, label: str) -> dict[str, Any]:
        """Scores on all texts."""
        was_training = self.model.training
        self.model.eval()
        score = functools.partial(score_against, self.logits)
        found = {name: score(reference, f"{label}: {name}") for name, reference in self.references.items()}
        self.model.train(was_training)
        return found

    def runs(self) -> Iterator[dict[str, Any]]:
        """A row for each look of each run."""
        with tempfile.TemporaryDirectory() as folder:
            patch_model_with_kvsplice(
                self.model, bytes_per_token=self.args.bytes_per_token, calibration=self.calibration
            )
            save_kvsplice(self.model, folder)
            before = self.measured("before")
            for coordinates, rate in zip(self.args.coordinates, self.args.learning_rates, strict=True):
                for windows in self.args.windows:
                    run = {"coordinates": coordinates, "learning_rate": rate, "windows": windows}
                    yield {**run, "step": 0, "texts": before}
                    yield from ({**run, **row} for row in self.run(coordinates, rate, windows, folder))
        unpatch_model(self.model)

    def run(self, coordinates: str, rate: float, windows: int, start: str) -> list[dict[str, Any]]:
        """One run from the splice in the folder `start`."""
        load_kvsplice(unpatch_model(self.model), start)
        used = self.tuned_on[:windows].tolist()
        looks = Looks(self, f"{coordinates}, {windows} windows")
        with tempfile.TemporaryDirectory() as folder:
            KVSpliceTrainer(
                freeze_all_but_kvsplice(self.model),
                KVSpliceTrainingArguments(
                    folder,
                    max_steps=self.args.steps,
                    per_device_train_batch_size=1,
                    learning_rate=rate,
                    lr_scheduler_type="cosine",
                    warmup_steps=min(4, self.args.steps // 4),
                    adam_beta2=0.95,
                    max_grad_norm=0.0,
                    save_strategy="no",
                    report_to="none",
                ),
                train_dataset=Dataset.from_dict({"input_ids": used, "labels": used}),
                callbacks=[looks],
                calibration=self.calibration if coordinates == "calibrated" else None,
            ).train()
        return looks.rows


class Looks(TrainerCallback):
    """Measures a run after every share of its steps.

    Attributes:
        rows: what was found, by step.
    """

    def __init__(self, study: Study, label: str) -> None:
        self.study, self.label = study, label
        self.rows: list[dict[str, Any]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        steps, looks = self.study.args.steps, self.study.args.looks
        if state.global_step in {round(steps * look / looks) for look in range(1, looks + 1)}:
            label = f"{self.label}, step {state.global_step}"
            self.rows.append({"step": state.global_step, "texts": self.study.measured(label)})


def table_of(rows: list[dict[str, Any]]) -> Table:
    texts = list(rows[0]["texts"])
    table = Table("coordinates", "windows", "step", *(f"{text}: KL" for text in texts), title="nats per token")
    for row in rows:
        cells = [f"{row['texts'][text]['kl_nats']:.5f}" for text in texts]
        table.add_row(row["coordinates"], str(row["windows"]), str(row["step"]), *cells)
    return table


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Divergence against the step: windows that are tuned on dashed, the mean of the others in full."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    names = dict.fromkeys((row["coordinates"], row["windows"]) for row in rows)
    for index, (coordinates, windows) in enumerate(names):
        points = [row for row in rows if (row["coordinates"], row["windows"]) == (coordinates, windows)]
        steps = [row["step"] for row in points]
        held = [[row["texts"][text]["kl_nats"] for text in row["texts"] if text != TUNED_ON] for row in points]
        label = f"{coordinates}, {windows} windows"
        axes.plot(steps, [sum(values) / len(values) for values in held], marker=".", color=f"C{index}", label=label)
        tuned = [row["texts"][TUNED_ON]["kl_nats"] for row in points]
        axes.plot(steps, tuned, linestyle="--", marker=".", color=f"C{index}")
    axes.set(xlabel="step", ylabel="divergence, nats per token", title="Held-out texts; dashed: tuned on")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    (args,) = ProgramParser(Arguments).parse_args_into_dataclasses()
    with readable_errors():
        check(args)
        set_seed(0)
        rows = list(Study(*load_model(args.model, args.dtype), args).runs())
    console().print(table_of(rows))
    folder = results_folder(args.output, "tuning")
    draw(rows, folder / "learning.png")
    finish({"results": rows, **environment(args)}, folder)


if __name__ == "__main__":
    main()
