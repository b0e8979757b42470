"""Reads weights that accelerate may have moved away (`device_map="auto"` with CPU or disk offload)."""

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import nn


def read_parameter(module: nn.Module, name: str) -> torch.Tensor:
    """The parameter `name` of `module`, fetched to the execution device if accelerate offloads it.

    Accelerate loads offloaded weights only inside the forward of the module that owns them. Code that folds a weight
    into something else does not call that forward, so it would see an empty tensor on the meta device.
    """
    # Past the lookup of attributes in modules, which is slow, and slowest for what they do not have: this runs at each
    # step of a model, several times per layer.
    if "_hf_hook" not in vars(module) or not has_offloaded_params(module):
        parameter = module._parameters.get(name)
        return getattr(module, name) if parameter is None else parameter
    with align_module_device(module):
        return getattr(module, name)


def execution_device(module: nn.Module) -> torch.device:
    """The device on which `module` computes: its accelerate hook's, or that of its first parameter."""
    hook_device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return torch.device(hook_device) if hook_device is not None else next(module.parameters()).device
