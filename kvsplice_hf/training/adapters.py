"""Adapters that are trained together with the splice: what of them is saved and read again."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from kvsplice_hf.errors import CheckpointError, TrainingError
from kvsplice_hf.weights.adapters import adapter_parameters


_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_OF_ITSELF = "default"  # peft writes this one into the folder, and others into folders in it


def trained_adapters(model: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters of adapters."""
    return [parameter for parameter in adapter_parameters(model) if parameter.requires_grad]


def require_saveable(model: Any, *, is_spread: bool) -> None:
    """Check that adapters which are trained can be saved and read again.

    Args:
        model: a patched model.
        is_spread: whether parameters are spread over processes.

    Raises:
        TrainingError: they cannot.
    """
    if not trained_adapters(model):
        return
    if isinstance(model, PreTrainedModel) or not hasattr(model, "peft_config"):
        raise TrainingError(
            f"Adapters are trainable, but the {type(model).__name__} around them cannot save them and read them again. "
            "Put them on with peft.get_peft_model, and hand over what it returns."
        )
    if is_spread:
        raise TrainingError(
            "Adapters are trainable, and FSDP spreads parameters over processes: this trainer would not gather them. "
            "Train adapters in one process per whole model, or freeze them."
        )


def save_adapters(model: Any, folder: Path) -> None:
    """Write the adapters beside the splice, in the files of peft; nothing where none is trained."""
    if trained_adapters(model):
        model.save_pretrained(str(folder))


def load_adapters(model: Any, folder: Path) -> None:
    """Read the adapters that are active and trained; nothing where there are none.

    Raises:
        CheckpointError: the folder holds none of that name.
    """
    if not trained_adapters(model):
        return
    for name in model.active_adapters:
        where = folder if name == _OF_ITSELF else folder / name
        if not any((where / file).exists() for file in _FILES):
            raise CheckpointError(
                f"There is no adapter {name!r} in {where}, but the model trains one. Resume from a checkpoint of this "
                "training, or freeze the adapter."
            )
        model.load_adapter(str(where), name, is_trainable=True)
