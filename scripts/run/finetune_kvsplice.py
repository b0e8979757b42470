#!/usr/bin/env python
"""Fine-tune the splice alone, and measure it through the cache before and after.

Settings come from a YAML file, from the command line, or from both (the command line wins). Interrupted runs go on with
`--resume_from_checkpoint OUTPUT/checkpoint-N`. The last line of stdout is one JSON object.

    python scripts/run/finetune_kvsplice.py --config configs/finetune_demo.yaml
    python scripts/run/finetune_kvsplice.py --config configs/finetune_demo.yaml --bytes_per_token 128 --max_steps 50
    accelerate launch --num_processes 2 scripts/run/finetune_kvsplice.py --config configs/finetune_deepseek_v2_lite.yaml
"""

import contextlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from matplotlib.figure import Figure
from rich.table import Table
from transformers import EarlyStoppingCallback, PreTrainedModel, default_data_collator, set_seed

from kvsplice_hf import ConfigError, cache_nbytes, load_kvsplice
from kvsplice_hf.bench.cache_size import filled_cache
from kvsplice_hf.bench.command_line import (
    DEMO,
    Budget,
    console,
    environment,
    finish,
    load_model,
    parse_with_config,
    readable_errors,
    splice,
)
from kvsplice_hf.evaluation import score_windows
from kvsplice_hf.text import load_texts, spread_evenly, token_windows
from kvsplice_hf.training import (
    KVSpliceTrainer,
    KVSpliceTrainingArguments,
    freeze_all_but_kvsplice,
    print_trainable_parameters,
)


@dataclass
class Arguments(Budget):
    """What is tuned, on what, and how it is measured."""

    model: str = field(default=DEMO, metadata={"help": 'folder, hub name, "demo" (SmolLM2 as MLA) or "smollm2"'})
    dtype: str = field(default="float32", metadata={"help": "dtype of the model; the splice trains in float32"})
    use_layernorm: bool = field(default=False, metadata={"help": "LayerNorm on the code (codes as numbers only)"})
    splice: str | None = field(default=None, metadata={"help": "a saved splice to start from, instead of calibration"})
    dataset: list[str] = field(
        default_factory=lambda: ["pydoc"],
        metadata={"help": "texts to tune on: names (pydoc, varied, c4), files, folders"},
    )
    text_column: str = field(default="text", metadata={"help": "column of data sets that are saved on disk"})
    train_windows: int = field(default=1024, metadata={"help": "at most so many windows of each text"})
    block_size: int = field(default=512, metadata={"help": "tokens per window, packed without padding"})
    evaluation: list[str] = field(
        default_factory=lambda: ["pydoc"], metadata={"help": "texts to measure on before and after; none: no measuring"}
    )
    evaluation_windows: int = field(default=8, metadata={"help": "windows of each"})
    evaluation_window: int = field(default=1024, metadata={"help": "tokens per window of the measurement"})
    validation_windows: int = field(default=8, metadata={"help": "windows kept from tuning, for eval_strategy"})
    train_steps_of_codes: bool = field(default=True, metadata={"help": "train the level scales of packed rows too"})
    calibrated_steps: bool = field(
        default=False, metadata={"help": "take steps in the coordinates of calibration (--statistics; docs/finetuning)"}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "stop after so many evaluations without a better loss"}
    )


def parse(argv: list[str]) -> tuple[Arguments, KVSpliceTrainingArguments]:
    """Arguments from the command line over those of the YAML file of `--config`.

    Raises:
        ConfigError: the file cannot be read, or holds a setting that nobody takes.
    """
    return parse_with_config(
        (Arguments, KVSpliceTrainingArguments),
        argv,
        output_dir="results/finetune",
        report_to="none",
        label_names=["labels"],
    )


def texts_of(source: str, column: str, split: str) -> list[str]:
    """Documents of a named source, a file, a folder of texts, or a data set saved by `datasets`.

    Raises:
        ConfigError: there is no such source, or the data set has no such column.
    """
    if not (Path(source) / "dataset_info.json").is_file():
        return load_texts(source, split)
    saved = datasets.load_from_disk(source)
    if column not in saved.column_names:
        raise ConfigError(f"The data set {source} has the columns {saved.column_names}; --text_column is {column!r}.")
    return list(saved[column])


def training_windows(tokenizer: Any, args: Arguments) -> tuple[datasets.Dataset, datasets.Dataset]:
    """What is tuned on, and what is kept from it to watch the loss on."""
    parts = [
        spread_evenly(
            token_windows(tokenizer, texts_of(source, args.text_column, "calibration"), args.block_size),
            args.train_windows,
        )
        for source in args.dataset
    ]
    windows = torch.cat(parts)
    if len(windows) <= args.validation_windows:
        raise ConfigError(
            f"The texts give {len(windows)} windows of {args.block_size} tokens, and {args.validation_windows} are "
            "kept for validation. Give more text, or lower --block_size or --validation_windows."
        )
    windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))]
    kept, used = windows[: args.validation_windows], windows[args.validation_windows :]
    return _as_dataset(used), _as_dataset(kept)


def _as_dataset(windows: torch.Tensor) -> datasets.Dataset:
    rows = windows.tolist()
    return datasets.Dataset.from_dict({"input_ids": rows, "labels": rows})


def measure(model: PreTrainedModel, tokenizer: Any, args: Arguments) -> dict[str, Any]:
    """Perplexity through the cache against the model without the splice, on each text."""
    was_training = model.training
    model.eval()
    results = {}
    for source in args.evaluation:
        texts = texts_of(source, args.text_column, "evaluation")
        windows = spread_evenly(token_windows(tokenizer, texts, args.evaluation_window), args.evaluation_windows)
        results[source] = score_windows(model, windows).summary()
    model.train(was_training)
    return results


def bytes_per_token(model: PreTrainedModel, tokens: int) -> float:
    """Bytes of a real cache over its tokens and layers."""
    cache = filled_cache(model, tokens)
    return cache_nbytes(cache) / tokens / len(cache.layers)


def draw(history: list[dict[str, float]], folder: Path) -> None:
    """The loss, and scale and shift, against the step."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, transforms = figure.subplots(1, 2)
    for name in ("loss", "eval_loss"):
        points = [(row["step"], row[name]) for row in history if name in row]
        if points:
            losses.plot(*zip(*points, strict=True), marker=".", label=name)
    losses.set(xlabel="step", ylabel="nats per token", title="Loss", yscale="log")
    for name in ("scale", "shift"):
        points = [
            (row["step"], row[f"kvsplice/{name}_mean"], row[f"kvsplice/{name}_std"])
            for row in history
            if f"kvsplice/{name}_mean" in row
        ]
        if points:
            steps, means, stds = (torch.tensor(values) for values in zip(*points, strict=True))
            transforms.plot(steps, means, marker=".", label=f"{name}, mean")
            transforms.fill_between(steps, means - stds, means + stds, alpha=0.2)
    transforms.set(xlabel="step", title="Scale and shift, mean and standard deviation")
    for axes in (losses, transforms):
        if axes.has_data():
            axes.legend()
    figure.savefig(folder / "training.png", dpi=120)


def table_of(before: dict[str, Any], after: dict[str, Any]) -> Table:
    table = Table("text", "original", "loss before", "loss after", "KL before", "KL after")
    for text, first in before.items():
        then = after[text]
        table.add_row(
            text,
            f"{first['original_perplexity']:.3f}",
            f"{first['loss_percent']:+.2f} %",
            f"{then['loss_percent']:+.2f} %",
            f"{first['kl']:.5f}",
            f"{then['kl']:.5f}",
        )
    return table


def check(args: Arguments) -> None:
    """Raises ConfigError for settings that do not go together."""
    if args.calibrated_steps and args.statistics is None:
        raise ConfigError(
            "--calibrated_steps needs --statistics: a file that calibration is kept in, or a name for one."
        )


def run(args: Arguments, training: KVSpliceTrainingArguments) -> None:
    check(args)
    set_seed(training.seed)
    model, tokenizer = load_model(args.model, args.dtype)
    if args.splice is not None:
        load_kvsplice(model, args.splice)
    else:
        splice(model, tokenizer, args)
    freeze_all_but_kvsplice(model, train_steps=args.train_steps_of_codes)
    main_process = training.process_index == 0
    if main_process:
        console().print(f"bytes per token and layer: {bytes_per_token(model, args.evaluation_window):.1f}")
    used, kept = training_windows(tokenizer, args)
    before = measure(model, tokenizer, args) if main_process else {}
    stop = args.early_stopping_patience
    trainer = KVSpliceTrainer(
        model,
        training,
        train_dataset=used,
        eval_dataset=kept,
        data_collator=default_data_collator,
        callbacks=[EarlyStoppingCallback(stop)] if stop is not None else None,
        calibration=args.statistics if args.calibrated_steps else None,
    )
    result = trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model()
    # A model that is spread over processes runs in all of them or in none.
    after = measure(model, tokenizer, args) if main_process or trainer.is_fsdp_enabled else {}
    if not main_process:
        return
    with contextlib.redirect_stdout(sys.stderr):
        print_trainable_parameters(model)
    folder = Path(training.output_dir)
    draw(trainer.state.log_history, folder)
    if before:
        console().print(table_of(before, after))
    report = {"before": before, "after": after, "train": result.metrics, "history": trainer.state.log_history}
    finish({**report, **environment(args)}, folder)


def main() -> None:
    with readable_errors():
        run(*parse(sys.argv[1:]))


if __name__ == "__main__":
    main()
