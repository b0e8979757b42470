"""Models trained from scratch: their settings, the `Trainer` that keeps to a budget, and how the result is measured.

The clock counts training alone: evaluation, samples and checkpoints stop it. A budget of time ends the learning rate
schedule too, so that a model that had less time is not cut off in the middle of it.
"""

import copy
import json
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME

from kvsplice_hf import ConfigError, cache_nbytes
from kvsplice_hf.bench.cache_size import filled_cache
from kvsplice_hf.bench.pretraining.callbacks import Clock, SampleCallback
from kvsplice_hf.bench.pretraining.data import Blocks
from kvsplice_hf.gpt2_mla import GPT2MLAConfig, GPT2MLAForCausalLM
from kvsplice_hf.training.spam import AdamWSPAM


logger = logging.getLogger(__name__)

ARCHITECTURES = ("gpt2", "gpt2-mla")
OPTIMIZERS = ("adamw", "adamw_spam")
# Settings that came later. Left out where they are not used, so that runs from before can be resumed and are found.
RECIPROCAL = {
    "queries_from_latent": False,
    "reciprocal_layers": None,
    "reciprocal_heads": None,
    "reciprocal_weight": None,
    "reciprocal_mlp": 0.0,
}
_OF_MLA = {
    "kv_lora_rank": None,
    "qk_rope_head_dim": 0,
    "latent_norm": False,
    "kv_latents": "shared",
    "mlp_latent_dim": None,
    "kvsplice": None,
    "kvsplice_layers": "all",
    **RECIPROCAL,
}
# The vocabulary is rounded up to a multiple of this, which matrix products are faster with.
_VOCABULARY_STEP = 64


@dataclass
class ModelArguments:
    """The model that is trained."""

    architecture: str = field(default="gpt2-mla", metadata={"help": f"one of {', '.join(ARCHITECTURES)}"})
    n_layer: int = field(default=4, metadata={"help": "layers"})
    n_embd: int = field(default=128, metadata={"help": "width"})
    n_head: int = field(default=4, metadata={"help": "heads"})
    n_positions: int = field(default=256, metadata={"help": "tokens of a block"})
    dropout: float = field(default=0.0, metadata={"help": "of embeddings, attention and residuals"})
    kv_lora_rank: int | None = field(default=None, metadata={"help": "MLA: numbers of the latent; a third of n_embd"})
    qk_rope_head_dim: int = field(default=0, metadata={"help": "MLA: rotated dimensions; 0: learned positions"})
    latent_norm: bool = field(default=False, metadata={"help": "MLA: RMSNorm on the latent"})
    kv_latents: str = field(default="shared", metadata={"help": "MLA: shared, separate, separate_mlp"})
    mlp_latent_dim: int | None = field(default=None, metadata={"help": "MLA: the MLP of each block works in so many"})
    queries_from_latent: bool = field(default=False, metadata={"help": "MLA: queries are made from the latent too"})
    reciprocal_layers: str | None = field(
        default=None, metadata={"help": 'MLA: layers with reciprocal attention: "all" or "last:n"'}
    )
    reciprocal_heads: int | None = field(default=None, metadata={"help": "MLA: heads of it; all"})
    reciprocal_weight: float | None = field(default=None, metadata={"help": "MLA: its fixed weight; learned"})
    reciprocal_mlp: float = field(default=0.0, metadata={"help": "MLA: share of the MLP that the attention feeds"})
    kvsplice: str | None = field(
        default=None, metadata={"help": 'MLA: a splice trained with the model, as JSON: {"compression_ratio": 0.5}'}
    )
    kvsplice_layers: str = field(default="all", metadata={"help": 'MLA: which layers have it: "all" or "last:n"'})

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise ConfigError(f"--architecture is {self.architecture!r}; it takes {', '.join(ARCHITECTURES)}.")
        if isinstance(self.kvsplice, str):
            try:
                self.kvsplice = json.loads(self.kvsplice)
            except ValueError as error:
                raise ConfigError(f"--kvsplice {self.kvsplice} is no JSON: {error}") from error
        given = sorted(name for name, default in _OF_MLA.items() if getattr(self, name) != default)
        if self.architecture == "gpt2" and given:
            raise ConfigError(f"{', '.join(given)} belong to MLA, but --architecture is gpt2.")


@dataclass
class BudgetArguments(TrainingArguments):
    """The arguments of `Trainer`, and how much training there is."""

    max_tokens: int | None = field(default=None, metadata={"help": "tokens to train on; sets max_steps"})
    max_hours: float | None = field(default=None, metadata={"help": "hours of training; whichever budget ends first"})
    optimizer: str = field(default="adamw", metadata={"help": "adamw, or adamw_spam (arXiv 2501.06842)"})
    spam_threshold: float = field(default=5000.0, metadata={"help": "adamw_spam: theta"})
    spam_reset_every: int = field(default=500, metadata={"help": "adamw_spam: steps between resets"})
    spam_warmup: int = field(default=150, metadata={"help": "adamw_spam: steps of warm-up after a reset"})
    samples: int = field(default=1, metadata={"help": "texts that the model writes at each evaluation"})
    sample_tokens: int = field(default=48, metadata={"help": "tokens of each"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optimizer not in OPTIMIZERS:
            raise ConfigError(f"--optimizer is {self.optimizer!r}; it takes {', '.join(OPTIMIZERS)}.")
        for name in ("max_tokens", "max_hours"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"--{name} is {value}; it must be above 0.")

    @property
    def folder(self) -> Path:
        """Where the run is kept; `TrainingArguments` has put a name in the place of None."""
        return Path(str(self.output_dir))


def build_model(args: ModelArguments, tokenizer: Any) -> PreTrainedModel:
    """A model with random weights, for the vocabulary of the tokenizer.

    Raises:
        ConfigError: the settings do not fit together.
    """
    settings: dict[str, Any] = {name: getattr(args, name) for name in ("n_layer", "n_embd", "n_head", "n_positions")}
    settings |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), args.dropout)
    settings |= {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    settings["vocab_size"] = -(-len(tokenizer) // _VOCABULARY_STEP) * _VOCABULARY_STEP
    if args.architecture == "gpt2":
        if args.n_embd % args.n_head:
            raise ConfigError(f"--n_embd {args.n_embd} is not divisible by --n_head {args.n_head}.")
        return GPT2LMHeadModel(GPT2Config(**settings))
    settings |= {name: getattr(args, name) for name in _OF_MLA}
    settings["kv_lora_rank"] = args.kv_lora_rank or args.n_embd // 3
    return GPT2MLAForCausalLM(GPT2MLAConfig(**settings))


class PretrainingTrainer(Trainer):
    """`Trainer` with a clock, a schedule that ends with the time, and the optimisers of `BudgetArguments`."""

    args: BudgetArguments

    def __init__(self, model: PreTrainedModel, args: BudgetArguments, blocks: Blocks) -> None:
        self.clock = Clock(None if args.max_hours is None else 3600 * args.max_hours)
        super().__init__(
            model,
            args,
            train_dataset=blocks.train,
            eval_dataset=blocks.validation,
            data_collator=collate,
            callbacks=[self.clock],
            optimizer_cls_and_kwargs=_spam_settings(args) if args.optimizer == "adamw_spam" else None,
        )
        count = min(args.samples, len(blocks.validation))
        if count and args.sample_tokens:
            prompts = blocks.validation[:count]["input_ids"][:, :16].long()
            others = self.callback_handler.callbacks
            self.add_callback(SampleCallback(blocks.tokenizer, prompts, args.sample_tokens, others))

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule that was asked for, run through as fast as the sooner of steps and time is used up."""
        schedule = super().create_scheduler(num_training_steps, optimizer)
        if self.clock.limit is not None:
            self._follow_the_clock(schedule, num_training_steps)
        return schedule

    def _follow_the_clock(self, schedule: Any, steps: int) -> None:
        plain = getattr(schedule, "lr_lambdas", None)
        if plain is None:
            raise ConfigError(f"--lr_scheduler_type {self.args.lr_scheduler_type} cannot end with --max_hours.")

        def timed(factor: Any) -> Any:
            return lambda step: factor(max(step, int(self.clock.share * steps)))

        schedule.lr_lambdas = [timed(factor) for factor in plain]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """On all blocks: the last batch is dropped in training only."""
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = False
        try:
            with self.clock.paused():
                return super().evaluate(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self.clock.paused():
            super()._save_checkpoint(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The model without the `Trainer`'s pickled arguments: the folder of a run holds its settings as JSON."""
        super()._save(output_dir, state_dict)
        (Path(output_dir or str(self.args.output_dir)) / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the seconds of training; tokens are there already."""
        super().log(logs | {"train_seconds": self.clock.seconds}, start_time)


def _spam_settings(args: BudgetArguments) -> tuple[type, dict[str, Any]]:
    return AdamWSPAM, {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "threshold": args.spam_threshold,
        "reset_every": args.spam_reset_every,
        "warmup": args.spam_warmup,
    }


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch of blocks; every token but the first of a block is predicted."""
    ids = torch.stack([row["input_ids"] for row in rows]).long()
    return {"input_ids": ids, "labels": ids}


@torch.no_grad()
def validation_loss(model: Any, blocks: datasets.Dataset, batch_size: int = 16) -> float:
    """Mean negative log-likelihood over the predicted tokens of the blocks, nats; no cache, in the model's dtype.

    Trained and spliced models are all measured by this.
    """
    training = model.training
    model.eval()
    total, count = 0.0, 0
    for batch in DataLoader(blocks, batch_size, collate_fn=collate):
        ids = batch["input_ids"].to(model.device)
        log_p = model(ids, use_cache=False).logits[:, :-1].float().flatten(0, 1)
        total += nn.functional.cross_entropy(log_p, ids[:, 1:].flatten(), reduction="sum").item()
        count += ids[:, 1:].numel()
    model.train(training)
    return total / count


def cache_bytes_per_token(model: Any, tokens: int) -> float:
    """Bytes of a real cache of all layers, of a copy of the model in bf16, over its tokens."""
    copied = copy.deepcopy(model).to(torch.bfloat16).eval()
    return cache_nbytes(filled_cache(copied, tokens)) / tokens


def measurements(model: Any, blocks: Blocks, block_size: int) -> dict[str, Any]:
    """What is known of a model at the end."""
    loss = validation_loss(model, blocks.validation)
    return {
        "validation_loss": loss,
        "validation_perplexity": math.exp(loss),
        "validation_tokens": len(blocks.validation) * (block_size - 1),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "cache_bytes_per_token": cache_bytes_per_token(model, block_size),
        "data": blocks.key,
    }
