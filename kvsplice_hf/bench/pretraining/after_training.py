"""Arms that start from a trained one: a splice fitted to it, perhaps tuned, or a GPT-2 turned into MLA."""

import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed

from kvsplice_hf import ConfigError, KVSpliceCalibrator, KVSpliceConfig, patch_model_with_kvsplice, save_kvsplice
from kvsplice_hf.bench.pretraining.data import Blocks
from kvsplice_hf.bench.pretraining.training import BudgetArguments, collate, measurements
from kvsplice_hf.gpt2_mla import GPT2MLAForCausalLM
from kvsplice_hf.training import KVSpliceTrainer, KVSpliceTrainingArguments, freeze_all_but_kvsplice


_TUNING_DEFAULTS: dict[str, Any] = {
    "max_steps": 100,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "logging_steps": 0.1,
    "save_strategy": "no",
    "report_to": "none",
    "label_names": ["labels"],
}


@dataclass(frozen=True)
class AfterTraining:
    """What is done to a trained model.

    Args:
        after: name of the arm that trains it.
        convert: arguments of `GPT2MLAForCausalLM.from_gpt2`; None leaves the model as it is.
        kvsplice: fields of `KVSpliceConfig`; None for no splice.
        calibration_tokens: of the training text, to fit the splice and the conversion to.
        tune: fields of `KVSpliceTrainingArguments`, to tune the splice on the training text; None for no tuning.

    Raises:
        ConfigError: nothing would be done, or a field is unknown or out of its range.
    """

    after: str
    convert: dict[str, Any] | None = None
    kvsplice: dict[str, Any] | None = None
    calibration_tokens: int = 65_536
    tune: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.convert is None and self.kvsplice is None:
            raise ConfigError("An arm with `after` needs `kvsplice`, or `convert`, or both.")
        for name in ("convert", "kvsplice", "tune"):
            if not isinstance(getattr(self, name), (dict, type(None))):
                raise ConfigError(f"`{name}` is {getattr(self, name)!r}; it must be a mapping.")
        if self.kvsplice is not None:
            KVSpliceConfig.from_dict(self.kvsplice)
        if self.tune is not None and self.kvsplice is None:
            raise ConfigError("`tune` tunes a splice: give `kvsplice` too.")
        known = {"tune": {item.name for item in fields(KVSpliceTrainingArguments)}, "convert": {"kv_lora_rank"}}
        for name, allowed in known.items():
            unknown = sorted(set(getattr(self, name) or {}) - allowed)
            if unknown:
                raise ConfigError(f"`{name}` has {', '.join(unknown)}, which it does not take.")


def run_after(plan: AfterTraining, parent: Path, blocks: Blocks, training: BudgetArguments) -> dict[str, Any]:
    """Take the model of a finished run, change it as planned, save what is new, and measure it.

    Args:
        plan: what is done.
        parent: folder of the trained model.
        blocks: its text.
        training: what it was trained with. The seed chooses the text that is calibrated on and the order of that which
            is tuned on; `output_dir` is where the result goes.
    """
    set_seed(training.seed)
    started = time.perf_counter()
    model: Any = AutoModelForCausalLM.from_pretrained(parent)
    model.to(training.device)
    block_size = model.config.n_positions
    tokens = _calibration_tokens(blocks, plan.calibration_tokens // block_size, training.seed)
    if plan.convert is not None:
        model = GPT2MLAForCausalLM.from_gpt2(model, calibration=list(tokens[:, None]), **plan.convert)
        if training.should_save:
            model.save_pretrained(training.folder)
    tuned_on = 0
    if plan.kvsplice is not None:
        _splice(model, plan.kvsplice, tokens)
        if plan.tune is not None:
            tuned_on = _tune(model, plan.tune, blocks, training) * block_size
        if training.should_save:
            save_kvsplice(model, training.folder)
    return {
        **measurements(model, blocks, block_size),
        "seconds": time.perf_counter() - started,
        "calibration_tokens": tokens.numel(),
        "tuning_tokens": tuned_on,
    }


def _calibration_tokens(blocks: Blocks, count: int, seed: int) -> torch.Tensor:
    """[count, T] of the training text."""
    seeded = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(blocks.train), generator=seeded, dtype=torch.int64, device="cpu")
    chosen = order[: max(1, count)]
    return blocks.train[chosen.tolist()]["input_ids"].long()


def _splice(model: PreTrainedModel, settings: dict[str, Any], tokens: torch.Tensor) -> None:
    calibrator = KVSpliceCalibrator(model)
    calibrator.collect(list(tokens[:, None]), max_tokens=tokens.numel(), progress=False)
    patch_model_with_kvsplice(model, KVSpliceConfig.from_dict(settings), calibration=calibrator)


def _tune(model: Any, settings: dict[str, Any], blocks: Blocks, training: BudgetArguments) -> int:
    """Tune the splice; how many blocks it saw."""
    freeze_all_but_kvsplice(model)
    inherited = {name: getattr(training, name) for name in ("bf16", "data_seed", "output_dir", "seed", "use_cpu")}
    arguments = KVSpliceTrainingArguments(**_TUNING_DEFAULTS | inherited | settings)
    trainer = KVSpliceTrainer(model, arguments, train_dataset=blocks.train, data_collator=collate)
    trainer.train()
    sequences = arguments.train_batch_size * arguments.world_size * arguments.gradient_accumulation_steps
    return trainer.state.global_step * sequences
