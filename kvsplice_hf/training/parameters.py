"""Which parameters are trained, and in which groups: those of the splice, and of adapters if they are wanted.

Three groups of the splice, because they live on different scales: the projections (`compress`, `expand`, LayerNorm),
the transform (`transform_scale`, `transform_shift`), and the steps of packed rows (the codec's `scales` and `centres`).
Adapters (LoRA) are a group of their own.
"""

import logging
from typing import Any, TypeVar

import torch
from torch import nn

from kvsplice_hf.code.heads import PartKey
from kvsplice_hf.code.projection import LearnedKVSplice
from kvsplice_hf.errors import TrainingError
from kvsplice_hf.patch.state import splice_parts_of
from kvsplice_hf.weights.adapters import adapter_parameters


logger = logging.getLogger(__name__)

ModelT = TypeVar("ModelT", bound=nn.Module)
GROUPS = ("projection", "transform", "steps")
ADAPTERS = "adapters"


def splices_of(model: nn.Module) -> dict[PartKey, LearnedKVSplice]:
    """The projections of a patched model, by cache layer index, or by layer and key head.

    Raises:
        PatchStateError: the model is not patched.
    """
    return splice_parts_of(model)


def freeze_all_but_kvsplice(model: ModelT, *, train_steps: bool = True, train_adapters: bool = False) -> ModelT:
    """Leave gradients to the parameters of the splice, in float32 whatever the dtype of the model.

    (In half precision the updates of a fine-tuning are smaller than the spacing of the numbers. Latents are cast on
    the way in and codes on the way out, so the cache stays as it was.)

    Args:
        model: a patched model.
        train_steps: whether the level scales and centres of packed rows are trained as well.
        train_adapters: whether the active adapters (LoRA, put on with peft before or after the patch) are as well.

    Returns:
        `model` itself.

    Raises:
        PatchStateError: the model is not patched.
        TrainingError: adapters are to be trained, and none is active.
    """
    splices = splices_of(model)
    adapters = adapter_parameters(model, active=True) if train_adapters else []
    if train_adapters and not adapters:
        raise TrainingError("`train_adapters` is True, but no adapter is active. Put one on with peft.get_peft_model.")
    model.requires_grad_(False)
    for parameter in adapters:
        parameter.requires_grad_(True)
    for splice in splices.values():
        if splice.codec is not None:
            splice.codec.train_steps(train_steps)
        splice.float().requires_grad_(True)
    return model


def splice_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The trainable parameters of the splice, by group.

    Raises:
        PatchStateError: the model is not patched.
    """
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in GROUPS}
    for splice in splices_of(model).values():
        for name, parameter in splice.named_parameters():
            if parameter.requires_grad:
                groups[_group_of(name)].append(parameter)
    return groups


def require_only_splice(model: nn.Module) -> None:
    """Check what an optimiser would change: the splice, and adapters that are trainable.

    Raises:
        PatchStateError: the model is not patched.
        TrainingError: parameters of the base model are trainable, or none of the splice.
    """
    ours = {id(parameter) for group in splice_parameters(model).values() for parameter in group}
    adapters = {id(parameter) for parameter in adapter_parameters(model)}
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in ours | adapters]
    if others:
        raise TrainingError(
            f"{len(others)} parameters of the base model are trainable, {others[0]} among them. Call "
            "freeze_all_but_kvsplice(model) first."
        )
    if not ours:
        raise TrainingError("No parameter of the splice is trainable. Call freeze_all_but_kvsplice(model) first.")


def parameter_groups(model: nn.Module, learning_rates: dict[str, float], weight_decay: float) -> list[dict[str, Any]]:
    """Groups for an optimiser of torch; weight decay acts on matrices alone.

    Args:
        model: a patched model.
        learning_rates: by group name.
        weight_decay: of the projections and of adapters.
    """
    groups = splice_parameters(model)
    groups[ADAPTERS] = [parameter for parameter in adapter_parameters(model) if parameter.requires_grad]
    return [
        {
            "params": parameters,
            "lr": learning_rates[name],
            "weight_decay": weight_decay if name in ("projection", ADAPTERS) else 0.0,
            "name": name,
        }
        for name, parameters in groups.items()
        if parameters
    ]


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Trainable parameters, and all of them."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def print_trainable_parameters(model: nn.Module) -> None:
    """One line: how many parameters are trainable, of how many."""
    trained, total = count_parameters(model)
    print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}")


def _group_of(name: str) -> str:
    if name.startswith("codec."):
        return "steps"
    return "transform" if name.startswith("transform_") else "projection"


def statistics_of(values: torch.Tensor) -> dict[str, float]:
    """Mean, standard deviation, least and largest."""
    values = values.detach().float()
    return {
        "mean": values.mean().item(),
        "std": values.std(correction=0).item(),
        "min": values.min().item(),
        "max": values.max().item(),
    }
