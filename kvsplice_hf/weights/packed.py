"""Linear layers that a quantisation library has packed: which they are, and what it has put off.

No library is named but where it must be: a packed layer is known by what it is not, a plain linear layer.
"""

from typing import Any

import torch
from torch import nn


def is_plain(module: nn.Module) -> bool:
    """Whether a layer multiplies by its `weight`, as `nn.Linear` does, be it spread over processes or not."""
    weight: Any = module._parameters.get("weight")
    held = type(weight) in (nn.Parameter, torch.Tensor) or hasattr(weight, "to_local")
    return type(module).forward is nn.Linear.forward and held and weight.is_floating_point()


def packed_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a model that are linear by their sizes (`in_features`, `out_features`), but not plain."""
    return [
        module
        for module in model.modules()
        if all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features"))
        and not any(True for _ in module.children())
        and not is_plain(module)
    ]


def decompress(model: nn.Module) -> None:
    """Unpack now what compressed-tensors would unpack at the first forward of the model.

    Until then its layers have no weights and cannot be asked for what they multiply by, and after it the model has
    other tensors than before.
    """
    for module in model.modules():
        handle = vars(module).get("ct_decompress_hook")
        hook: Any = None if handle is None else module._forward_pre_hooks.get(handle.id)
        if hook is not None:
            hook(module, ())
