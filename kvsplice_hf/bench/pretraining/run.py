"""One training from scratch: its settings, its folder, and the way from its last checkpoint to measured figures."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import set_seed

from kvsplice_hf import ConfigError
from kvsplice_hf.bench.command_line import parse_with_config
from kvsplice_hf.bench.pretraining.data import Blocks, DataArguments, load_blocks
from kvsplice_hf.bench.pretraining.geometry import (
    GEOMETRY_OPTIONS,
    GeometryArguments,
    fit_after_training,
    require_geometry,
)
from kvsplice_hf.bench.pretraining.training import (
    RECIPROCAL,
    BudgetArguments,
    ModelArguments,
    PretrainingTrainer,
    build_model,
    measurements,
)


@dataclass
class Arguments(ModelArguments, DataArguments, GeometryArguments):
    """The model and the text, and the geometry that is fitted to it afterwards."""

    def __post_init__(self) -> None:
        ModelArguments.__post_init__(self)
        DataArguments.__post_init__(self)
        require_geometry(self)


KINDS = (Arguments, BudgetArguments)
DEFAULTS: dict[str, Any] = {
    "output_dir": "results/gpt2-mla",
    "report_to": "none",
    "label_names": ["labels"],
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 16,
    "prediction_loss_only": True,
    "dataloader_drop_last": True,
    "include_num_input_tokens_seen": True,
    "logging_steps": 0.02,
    "eval_strategy": "steps",
    "eval_steps": 0.1,
    "save_strategy": "steps",
    "save_steps": 0.1,
    "save_total_limit": 2,
}
# Settings that have no say in what is learned.
_WITHOUT_CONSEQUENCE = {"cache", "output_dir", *GEOMETRY_OPTIONS}
_OF_TRAINING = (
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "bf16",
    "data_seed",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_kwargs",
    "lr_scheduler_type",
    "max_grad_norm",
    "max_hours",
    "max_steps",
    "max_tokens",
    "num_train_epochs",
    "optimizer",
    "per_device_train_batch_size",
    "seed",
    "spam_reset_every",
    "spam_threshold",
    "spam_warmup",
    "warmup_steps",
    "weight_decay",
)


def parse(argv: list[str], **settings: Any) -> tuple[Arguments, BudgetArguments]:
    """Arguments from the command line over those of `--config` over `settings`.

    Raises:
        ConfigError: a file cannot be read, or a setting is unknown or out of its range.
    """
    try:
        return parse_with_config(KINDS, argv, **DEFAULTS | settings)
    except ValueError as error:  # of the checks of transformers
        raise error if isinstance(error, ConfigError) else ConfigError(str(error)) from error


def settings_of(args: Arguments, training: BudgetArguments) -> dict[str, Any]:
    """What decides what is learned; a run can be resumed, and found finished, under the same settings only."""
    unused = {name for name, default in RECIPROCAL.items() if getattr(args, name) == default}
    own = {name: value for name, value in asdict(args).items() if name not in _WITHOUT_CONSEQUENCE | unused}
    values = own | {name: getattr(training, name) for name in _OF_TRAINING}
    return json.loads(json.dumps(dict(sorted(values.items())), default=str))


def last_whole_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end; its state is written last."""
    found = []
    for path in folder.glob("checkpoint-*/trainer_state.json"):
        try:
            found.append((json.loads(path.read_text(encoding="utf-8"))["global_step"], path.parent))
        except (OSError, ValueError, KeyError):
            continue
    return os.fspath(max(found)[1]) if found else None


def prepare_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Make the folder of a run, or take up the one of a run with the same settings that was cut off.

    Raises:
        ConfigError: it holds a finished run, or one with other settings.
    """
    if (folder / "report.json").exists():
        raise ConfigError(f"{folder} holds a finished run. Choose another --output_dir.")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.json"
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        changed = sorted(name for name in {*found, *settings} if found.get(name) != settings.get(name))
        if changed:
            raise ConfigError(
                f"{folder} holds a run with other settings ({', '.join(changed)}). Choose another --output_dir, or "
                "give the settings that it was started with."
            )
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def set_steps(training: BudgetArguments, block_size: int, blocks: int) -> None:
    """Turn the budget of tokens into steps.

    Raises:
        ConfigError: a batch is larger than the text, or the budget smaller than a batch.
    """
    sequences = training.train_batch_size * training.world_size
    if blocks < sequences:
        raise ConfigError(
            f"The text gives {blocks} blocks of {block_size} tokens, less than one batch of {sequences}. Give more "
            "text, or lower --n_positions or --per_device_train_batch_size."
        )
    if training.max_tokens is None:
        return
    tokens = sequences * training.gradient_accumulation_steps * block_size
    if training.max_tokens < tokens:
        raise ConfigError(f"--max_tokens is {training.max_tokens}, less than one step of {tokens}.")
    training.max_steps = training.max_tokens // tokens


def history_of(rows: list[dict[str, float]], end: dict[str, float]) -> list[dict[str, float]]:
    """Losses against steps, tokens and seconds, with the final validation as the last row."""
    names = {"step": "step", "num_input_tokens_seen": "tokens", "train_seconds": "seconds"}
    names |= {"loss": "loss", "eval_loss": "validation_loss", "learning_rate": "learning_rate"}
    kept = [row for row in rows if "loss" in row or "eval_loss" in row and row["step"] < end["step"]]
    return [{new: row[old] for old, new in names.items() if old in row} for row in kept] + [end]


def train(args: Arguments, training: BudgetArguments, blocks: Blocks | None = None) -> dict[str, Any]:
    """Train a model, from its last checkpoint if there is one; it is saved in `training.output_dir`.

    Args:
        args: model and text.
        training: budget, optimiser, folder.
        blocks: the text, where it is loaded already.

    Raises:
        ConfigError: the settings cannot be used, or the folder belongs to another run.
    """
    folder = training.folder
    settings = settings_of(args, training)
    if training.should_save:
        prepare_folder(folder, settings)
    with training.main_process_first():
        blocks = blocks or load_blocks(args, args.n_positions)
    set_steps(training, args.n_positions, len(blocks.train))
    set_seed(training.seed)
    trainer = PretrainingTrainer(build_model(args, blocks.tokenizer), training, blocks)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint or last_whole_checkpoint(folder))
    trainer.save_model()
    if training.should_save:
        blocks.tokenizer.save_pretrained(folder)
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    measured = measurements(model, blocks, args.n_positions)
    done = {
        "step": trainer.state.global_step,
        "tokens": trainer.state.num_input_tokens_seen,
        "seconds": trainer.clock.seconds,
    }
    end = done | {"validation_loss": measured["validation_loss"]}
    if args.kvsplice_enable and training.should_save:
        measured |= fit_after_training(model, blocks, args, training.per_device_train_batch_size, folder)
    return {
        **measured,
        **done,
        "tokens_per_second": done["tokens"] / done["seconds"],
        "history": history_of(trainer.state.log_history, end),
        "settings": settings,
    }
