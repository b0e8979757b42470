"""A check of the cleverer choice on text that nothing was fitted to."""

from collections.abc import Sequence
from typing import Any

import torch

from kvsplice_hf.calibration.collect import Batch
from kvsplice_hf.calibration.media import Media
from kvsplice_hf.errors import CalibrationError
from kvsplice_hf.weights.offload import input_device


# Of at least so many calibration sequences, so many are held out, unless another number is asked for.
MIN_SEQUENCES = 24
HELD_OUT = 2


def split_holdout(batches: Sequence[Batch], count: int | None = None) -> tuple[list[Batch], list[Batch]]:
    """Batches to fit to, and some to check on, spread over the text.

    Args:
        batches: all of them.
        count: how many to hold out; None: two, or none where there are few.

    Raises:
        CalibrationError: nothing would be left to fit to.
    """
    if count is None:
        count = HELD_OUT if len(batches) >= MIN_SEQUENCES else 0
    if not 0 <= count < len(batches):
        raise CalibrationError(
            f"`holdout` is {count}, of {len(batches)} calibration sequences; it must leave at least one to fit to."
        )
    chosen = {len(batches) * (2 * index + 1) // (2 * count) for index in range(count)}
    rest = [batch for index, batch in enumerate(batches) if index not in chosen]
    return rest, [batches[index] for index in sorted(chosen)]


@torch.no_grad()
def log_probabilities(model: Any, batches: Sequence[Batch]) -> list[torch.Tensor]:
    """Of the next token at every real place of each batch, float32 [tokens, vocabulary] on the CPU.

    Places where a part of an image follows are left out: nobody asks for what the model would write there.
    """
    training = model.training
    model.eval()
    try:
        return [_of_batch(model, batch) for batch in batches]
    finally:
        model.train(training)


def _of_batch(model: Any, batch: Batch) -> torch.Tensor:
    device = input_device(model)
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    predicted = mask.bool() & Media.of(model).predicted(batch["input_ids"])
    return model(**batch, use_cache=False).logits[predicted].float().log_softmax(-1).cpu()


def divergence(stock: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    """Mean KL divergence of the second from the first, nats per token."""
    pairs = [(p.exp() * (p - q)).sum(-1) for p, q in zip(stock, other, strict=True)]
    return torch.cat(pairs).mean().item()
