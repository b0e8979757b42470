"""What fine-tuning minimises: cross entropy, divergence from the original model, error of the latents.

The original model is the same weights with the splice bypassed, so that there is no second copy in memory. The error of
a latent is measured behind `kv_b_proj`, where it is read: an error that no head sees costs nothing.

Legend: `B` batch, `T` tokens, `V` vocabulary, `R` kv_lora_rank.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from kvsplice_hf.patch.state import told_of_round_trips


# An attention module, a latent of it, and what its code decodes to.
RoundTrip = tuple[Any, torch.Tensor, torch.Tensor]
# Logits are taken through the softmax in pieces of so many tokens: a vocabulary is large.
_AT_ONCE = 512


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean over predicted tokens, nats.

    Args:
        logits: [B, T, V].
        labels: [B, T], -100 at tokens not to be predicted; not shifted.
    """
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def divergence_from(
    teacher: torch.Tensor, student: torch.Tensor, counted: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """Mean over counted tokens of KL(teacher || student), nats (Hinton et al., arXiv 1503.02531).

    Args:
        teacher, student: logits [B, T, V].
        counted: bool [B, T]; which positions take part.
        temperature: logits are divided by it; the result is multiplied by its square, so that gradients keep their
            size.
    """
    pairs = zip(teacher[counted].split(_AT_ONCE), student[counted].split(_AT_ONCE), strict=True)
    total = student.new_zeros((), dtype=torch.float32)
    for expected, found in pairs:
        log_expected = torch.log_softmax(expected.float() / temperature, dim=-1)
        log_found = torch.log_softmax(found.float() / temperature, dim=-1)
        total = total + F.kl_div(log_found, log_expected, reduction="sum", log_target=True)
    return total * temperature**2 / counted.sum().clamp(min=1)


@contextlib.contextmanager
def recorded_round_trips(model: nn.Module) -> Iterator[list[RoundTrip]]:
    """Within this context, what goes in and comes out of each splice: (attention module, latent, decoded latent)."""
    records: list[RoundTrip] = []
    with told_of_round_trips(model, lambda *round_trip: records.append(round_trip)):
        yield records


def reconstruction_error(records: list[RoundTrip]) -> torch.Tensor:
    """Squared error behind `kv_b_proj` over what is there, mean over layers."""
    errors = []
    for module, latent, decoded in records:
        with torch.no_grad():
            size = module.kv_b_proj(latent).float().square().sum().clamp(min=1e-30)
        error = module.kv_b_proj(decoded - latent.detach()).float()
        errors.append(error.square().sum() / size)
    return torch.stack([error.to(errors[0].device) for error in errors]).mean()
