"""`KVSpliceTrainer`: the `Trainer` of transformers for the splice, and for adapters that are trained with it.

Checkpoints hold the splice (and adapters) instead of the model; the rest (data, schedules, accumulation, several
processes, resuming, reporting) is the `Trainer`'s.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import save_fsdp_optimizer
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import SCHEDULER_NAME

from kvsplice_hf import folders
from kvsplice_hf.calibration.calibrator import KVSpliceCalibrator
from kvsplice_hf.code.files import CONFIG_NAME, WEIGHTS_NAME
from kvsplice_hf.errors import ConfigError, TrainingError, UnsupportedError
from kvsplice_hf.manage.loading import load_kvsplice
from kvsplice_hf.patch.saving import save_kvsplice
from kvsplice_hf.patch.state import find_patch, patched_sites, splice_disabled
from kvsplice_hf.training.adapters import load_adapters, require_saveable, save_adapters
from kvsplice_hf.training.calibrated_steps import CalibratedSteps
from kvsplice_hf.training.monitor import HistogramCallback, splice_metrics
from kvsplice_hf.training.objectives import (
    cross_entropy,
    divergence_from,
    reconstruction_error,
    recorded_round_trips,
)
from kvsplice_hf.training.parameters import ADAPTERS, parameter_groups, require_only_splice


ARGUMENTS_NAME = "training_args.json"
_NOT_PREDICTED = -100


@dataclass
class KVSpliceTrainingArguments(TrainingArguments):
    """Arguments of `Trainer`, and what is minimised.

    The loss is the sum of three terms with the weights given here; a weight of 0 leaves its term out.

    Args:
        kl_weight: of the divergence from the original model (the same weights without the splice), nats per token.
        lm_weight: of the cross entropy of the labels, nats per token.
        reconstruction_weight: of the relative squared error of the latents as `kv_b_proj` reads them.
        temperature: of the divergence.
        learning_rate: of the projections. With a `calibration` (see `KVSpliceTrainer`) it is the square root of twice
            what a step of one number costs, in nats per token.
        transform_learning_rate: of the transform's scale and shift; by default `learning_rate`.
        steps_learning_rate: of the level scales and centres of packed rows; by default `learning_rate`.
        adapter_learning_rate: of adapters that are trained as well; by default `learning_rate`.

    Raises:
        ConfigError: a weight is negative, or all are 0.
    """

    learning_rate: float = field(default=5e-4, metadata={"help": "learning rate of the projections"})
    kl_weight: float = field(default=1.0, metadata={"help": "weight of the divergence from the original model"})
    lm_weight: float = field(default=0.0, metadata={"help": "weight of the cross entropy of the labels"})
    reconstruction_weight: float = field(default=0.0, metadata={"help": "weight of the error of the latents"})
    temperature: float = field(default=1.0, metadata={"help": "temperature of the divergence"})
    transform_learning_rate: float | None = field(
        default=None, metadata={"help": "learning rate of the transform; default: learning_rate"}
    )
    steps_learning_rate: float | None = field(
        default=None, metadata={"help": "learning rate of the steps of packed rows; default: learning_rate"}
    )
    adapter_learning_rate: float | None = field(
        default=None, metadata={"help": "learning rate of adapters; default: learning_rate"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        weights = {name: getattr(self, name) for name in ("kl_weight", "lm_weight", "reconstruction_weight")}
        if any(not math.isfinite(weight) or weight < 0 for weight in weights.values()) or not any(weights.values()):
            raise ConfigError(f"The weights of the loss are {weights}; none may be negative, and one must be above 0.")
        if not self.temperature > 0:
            raise ConfigError(f"`temperature` is {self.temperature!r}; it must be above 0.")

    @property
    def learning_rates(self) -> dict[str, float]:
        """By group of `parameters`."""
        own = {"transform": self.transform_learning_rate, "steps": self.steps_learning_rate}
        own[ADAPTERS] = self.adapter_learning_rate
        return {"projection": self.learning_rate} | {
            name: self.learning_rate if rate is None else rate for name, rate in own.items()
        }


class KVSpliceTrainer(Trainer):
    """Trains the splice of a patched model, and the adapters of peft on it that are trainable, and nothing else.

    Takes what `Trainer` takes; `args` must be `KVSpliceTrainingArguments`. Batches need `input_ids`; where there are
    `labels`, positions with -100 are not counted. `save_model` and checkpoints write what `save_kvsplice` writes, and
    beside it the adapters in the files of peft. (The original model that `kl_weight` compares with has the adapters as
    they are: to teach them something, give `lm_weight` too.)

    Args:
        model: a patched model, of whose parameters those of the splice are trainable.
        args: `KVSpliceTrainingArguments`.
        rest, kwargs: as of `Trainer`.
        calibration: statistics of the model (a calibrator, or a file of `KVSpliceCalibrator.save`). If given, steps are
            taken in the coordinates of calibration, where each number costs alike (`CalibratedSteps`).

    Raises:
        PatchStateError: the model is not patched.
        CalibrationError: `calibration` cannot be read, or is of another model.
        UnsupportedError: tensor, context or sequence parallelism.
        TrainingError: parameters of the base model are trainable, or none of the splice; adapters are trainable and
            could not be saved; `calibration` is given for a splice that it does not fit; while training: a loss that is
            not finite, or a batch without `input_ids`.

    Examples:
        >>> freeze_all_but_kvsplice(patch_model_with_kvsplice(model, bytes_per_token=128, tokenizer=tokenizer))
        >>> KVSpliceTrainer(model, KVSpliceTrainingArguments("out"), train_dataset=dataset).train()
    """

    args: KVSpliceTrainingArguments

    def __init__(
        self,
        model: PreTrainedModel,
        args: KVSpliceTrainingArguments | None = None,
        *rest: Any,
        calibration: KVSpliceCalibrator | str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        args = KVSpliceTrainingArguments() if args is None else args
        if not isinstance(args, KVSpliceTrainingArguments):
            raise ConfigError(f"`args` is a {type(args).__name__}; it must be KVSpliceTrainingArguments.")
        config = find_patch(model)[1].config
        require_only_splice(model)
        require_saveable(model, is_spread=bool(args.fsdp))
        _require_no_tensor_parallelism(model)
        self._calibrated = None if calibration is None else CalibratedSteps(model, _read(calibration, model), config)
        super().__init__(model, args, *rest, **kwargs)
        require_whole_sequences(self.accelerator)
        # The loss is a mean over each batch, so that accumulation has to divide it.
        self.loss_is_scaled_for_ga = False
        self.add_callback(HistogramCallback(self.callback_handler.callbacks))
        self._pushed = _PushedCheckpoint()
        self.add_callback(self._pushed)
        self._terms: dict[str, list[torch.Tensor]] = {}

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
            groups = parameter_groups(model, self.args.learning_rates, self.args.weight_decay)
            self.optimizer = optimizer_class(groups, **settings)
            if self._calibrated is not None:
                self._calibrated.attach(self.optimizer)
        return self.optimizer

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The weighted sum of the terms asked for, averaged over the batch."""
        if "input_ids" not in inputs:
            raise TrainingError(
                f"The batch holds {sorted(inputs)}, not `input_ids`. Tokenize the data set first, into columns that "
                "the model takes (input_ids, attention_mask, labels)."
            )
        labels = _labels(inputs)
        inputs = {name: value for name, value in inputs.items() if name != "labels"} | {"use_cache": False}
        terms: dict[str, torch.Tensor] = {}
        teacher = self._teacher_logits(model, inputs) if self.args.kl_weight else None
        if self.args.reconstruction_weight:
            with recorded_round_trips(model) as records:
                outputs = model(**inputs)
            terms["reconstruction"] = reconstruction_error(records)
        else:
            outputs = model(**inputs)
        if teacher is not None:
            counted = torch.zeros_like(labels, dtype=torch.bool)
            counted[:, :-1] = labels[:, 1:] != _NOT_PREDICTED
            terms["kl"] = divergence_from(teacher, outputs.logits, counted, self.args.temperature)
        if self.args.lm_weight:
            terms["lm"] = cross_entropy(outputs.logits, labels)
        device = outputs.logits.device  # a model may be spread over several
        loss = torch.stack(
            [getattr(self.args, f"{name}_weight") * term.to(device) for name, term in terms.items()]
        ).sum()
        self._note(terms, loss, model.training)
        return (loss, outputs) if return_outputs else loss

    def _teacher_logits(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """Logits of the original model: the same weights, splice bypassed, no dropout."""
        training = model.training
        model.eval()
        try:
            with splice_disabled(model), torch.no_grad():
                return model(**inputs).logits
        finally:
            model.train(training)

    def _note(self, terms: dict[str, torch.Tensor], loss: torch.Tensor, training: bool) -> None:
        if not torch.isfinite(loss):
            found = {name: term.item() for name, term in terms.items()}
            raise TrainingError(
                f"The loss is {loss.item()} at step {self.state.global_step} (terms: {found}). Lower the learning "
                f"rates {self.args.learning_rates}, or look for damaged latents with scripts/run/inspect_kvsplice.py."
            )
        if training:
            for name, term in terms.items():
                self._terms.setdefault(name, []).append(term.detach())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms of the loss since the last report, and the state of the transform."""
        if "loss" in logs:
            for name, values in self._terms.items():
                logs[f"kvsplice/{name}"] = torch.stack(values).mean().item()
            self._terms.clear()
            logs |= splice_metrics(self.accelerator.unwrap_model(self.model))
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the splice and the arguments. Every process has to call this, one of them writes."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir)  # what is spread over processes is gathered by all of them
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As the `Trainer` does, but under FSDP without the base model, which it would write as well."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_fsdp_optimizer(
            self.accelerator.state.fsdp_plugin, self.accelerator, self.optimizer, self.model, output_dir
        )
        if self.args.should_save and self.lr_scheduler is not None:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir or ".")
        save_kvsplice(self.accelerator.unwrap_model(self.model), folder, is_main_process=self.args.should_save)
        if not self.args.should_save:
            return
        save_adapters(self.accelerator.unwrap_model(self.model), folder)
        (folder / ARGUMENTS_NAME).write_text(json.dumps(self.args.to_dict(), indent=2, default=str) + "\n", "utf-8")

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As the `Trainer` does, which knows the names of the files to push; ours are handed over as it begins."""
        self._pushed.folder = Path(checkpoint_folder)
        try:
            super()._push_from_checkpoint(checkpoint_folder)
        finally:
            self._pushed.folder = None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._load(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._load(self.model, str(self.state.best_model_checkpoint))

    def _load(self, model: Any, folder: str) -> None:
        load_adapters(self.accelerator.unwrap_model(model), Path(folder))
        load_kvsplice(self.accelerator.unwrap_model(model), folder)


class _PushedCheckpoint(TrainerCallback):
    """Copies the splice of a checkpoint to where the `Trainer` uploads from, when it is about to.

    It decides itself whether this checkpoint is pushed, or an upload is running that must not be disturbed.

    Attributes:
        folder: the checkpoint to be pushed, or None outside of that.
    """

    folder: Path | None = None

    def on_push_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.folder is None:
            return
        for name in (WEIGHTS_NAME, CONFIG_NAME, ARGUMENTS_NAME):
            folders.write_bytes(Path(args.output_dir) / name, (self.folder / name).read_bytes())


def _require_no_tensor_parallelism(model: nn.Module) -> None:
    shared = next((site.name for site, _ in patched_sites(model) if site.share is not None), None)
    if shared is not None:
        raise UnsupportedError(
            f"The heads of {shared} are divided among processes by tensor parallelism, of which the Trainer gives each "
            "its own batches and saves one. Train with FSDP or in one process per whole model, or in a loop of your "
            "own that gives all processes the same batches."
        )


def require_whole_sequences(accelerator: Any) -> None:
    """Refuse that each process gets a part of each sequence.

    Args:
        accelerator: of the `Trainer`.

    Raises:
        UnsupportedError: context or sequence parallelism.
    """
    settings = getattr(accelerator, "parallelism_config", None)
    if settings is not None and (getattr(settings, "cp_enabled", False) or getattr(settings, "sp_enabled", False)):
        raise UnsupportedError(
            "Context and sequence parallelism (cp_size, sp_size) give each process a part of each sequence, and a "
            "patched model has to see where a sequence begins, whose first tokens it keeps exactly. Leave both off."
        )


def _read(calibration: KVSpliceCalibrator | str | Path, model: PreTrainedModel) -> KVSpliceCalibrator:
    if not isinstance(calibration, KVSpliceCalibrator):
        calibration = KVSpliceCalibrator.load(calibration)
    calibration.require_model([site for site, _ in patched_sites(model)], model)
    return calibration


def _labels(inputs: dict[str, Any]) -> torch.Tensor:
    """[B, T], -100 where nothing is to be predicted: as given, or the tokens that are not padding."""
    labels = inputs.get("labels")
    if labels is not None:
        return labels
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    return ids if mask is None else ids.masked_fill(mask == 0, _NOT_PREDICTED)
