"""`heal`: tuning what `reduce_rank` has changed, until a model with a smaller latent predicts what the whole one does.

Nothing but the projections around the latent and its norm is trained, by the divergence from the original model. Their
numbers are of very different size, so the steps of each are measured by its own root mean square.

Legend: `W` windows, `T` tokens, `P` qk_rope_head_dim.
"""

import tempfile
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments, default_data_collator

from kvsplice_hf.convert.reduction import REDUCED_MODULES
from kvsplice_hf.errors import TrainingError
from kvsplice_hf.patch.sites import find_sites
from kvsplice_hf.training.objectives import divergence_from


# Steps in which the learning rate rises, of all.
_WARMUP = 0.1


def heal(
    model: PreTrainedModel,
    original: PreTrainedModel,
    windows: torch.Tensor,
    *,
    steps: int,
    learning_rate: float = 1e-3,
    batch_size: int = 4,
    seed: int = 0,
) -> list[float]:
    """Tune the latent of a model of `reduce_rank`, in place.

    Args:
        model: with the smaller latent.
        original: the model that it was made of, on the same device.
        windows: token ids to tune on, int64 [W, T], taken in a random order, again and again.
        steps: how many.
        learning_rate: of AdamW, in units of the root mean square of each weight; it rises, then falls as a cosine.
        batch_size: windows of a step.
        seed: of the order.

    Returns:
        The divergence from the original at each step, nats per token.

    Raises:
        TrainingError: no window, no step, a vocabulary that is not that of the original, or a divergence that is not
            finite.
    """
    if windows.dim() != 2 or not len(windows) or steps < 1:
        raise TrainingError(
            f"Healing was given windows {list(windows.shape)} and {steps} steps; it needs token ids [W, T], and one "
            "step at least."
        )
    if model.config.vocab_size != original.config.vocab_size:
        raise TrainingError(
            f"Healing compares a model with a vocabulary of {model.config.vocab_size} with one of "
            f"{original.config.vocab_size}. Give the model that `reduce_rank` was given."
        )
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    trained = _trained(model)
    training = model.training
    hooks = [_without_keys(site) for site in find_sites(model)]
    try:
        model.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        with tempfile.TemporaryDirectory() as folder:
            trainer = _HealingTrainer(
                model,
                TrainingArguments(
                    folder,
                    max_steps=steps,
                    learning_rate=learning_rate,
                    per_device_train_batch_size=batch_size,
                    lr_scheduler_type="cosine",
                    warmup_steps=max(1, round(_WARMUP * steps)),
                    save_strategy="no",
                    report_to="none",
                    logging_steps=10,
                    dataloader_pin_memory=torch.cuda.is_available(),
                    seed=seed,
                ),
                train_dataset=[{"input_ids": window} for window in windows],
                data_collator=default_data_collator,
            )
            trainer.original = original
            trainer.train()
            return trainer.divergences
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)
        model.train(training)
        model.zero_grad(set_to_none=True)


def _trained(model: PreTrainedModel) -> list[nn.Parameter]:
    modules = [getattr(site.module, name) for site in find_sites(model) for name in REDUCED_MODULES]
    return [parameter for module in modules for parameter in module.parameters()]


def _without_keys(site: Any) -> Any:
    """A hook that keeps the rows of rotated keys, the last P of `kv_a_proj_with_mqa`, as they are."""
    count = site.qk_rope_head_dim

    def drop(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient[len(gradient) - count :] = 0
        return gradient

    return site.module.kv_a_proj_with_mqa.weight.register_hook(drop)


class _HealingTrainer(Trainer):
    """Minimises the divergence from another model."""

    original: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.divergences: list[float] = []
        # The loss is a mean over each batch, so that accumulation has to divide it.
        self.loss_is_scaled_for_ga = False

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            groups = [
                {"params": [parameter], "lr": self.args.learning_rate * _size(parameter)}
                for parameter in model.parameters()
                if parameter.requires_grad
            ]
            self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
        return self.optimizer

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        ids = inputs["input_ids"]
        training = self.original.training
        self.original.eval()
        try:
            with torch.no_grad():
                expected = self.original(input_ids=ids, use_cache=False).logits
        finally:
            self.original.train(training)
        outputs = model(input_ids=ids, use_cache=False)
        loss = divergence_from(expected, outputs.logits, torch.ones_like(ids, dtype=torch.bool))
        if not torch.isfinite(loss):
            raise TrainingError(
                f"The divergence is {loss.item()} at step {self.state.global_step} of healing. Lower the learning "
                f"rate ({self.args.learning_rate}), or tune in float32."
            )
        self.divergences.append(loss.item())
        return (loss, outputs) if return_outputs else loss


def _size(parameter: torch.Tensor) -> float:
    """Root mean square."""
    return max(parameter.detach().float().square().mean().sqrt().item(), 1e-8)
