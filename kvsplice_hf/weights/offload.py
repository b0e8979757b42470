"""Where weights are, and the one way to read and write them: on a device, moved away by accelerate, or not there.

Accelerate (`device_map="auto"` with CPU or disk offload) leaves an empty tensor on the meta device in a module and
brings the weight only for the forward of the module that owns it. Code that folds a weight into something else, saves
it or loads it does not run that forward. It would see the empty tensor, or write into it and change nothing.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from torch import nn

from kvsplice_hf.errors import ConfigError


def read_parameter(module: nn.Module, name: str) -> torch.Tensor:
    """The parameter or buffer `name` of `module` itself, on the device where the module computes.

    Raises:
        ConfigError: its values are nowhere: never loaded, or held by other processes.
    """
    # Past the lookup of attributes in modules, which is slow, and slowest for what they do not have: this runs at each
    # step of a model, several times per layer.
    held = module._parameters.get(name)
    if held is None:
        held = getattr(module, name)
    if not held.is_meta and held.numel():
        return held
    hook = _offloading_hook(module)
    if hook is not None and held.is_meta:
        # Not through the module, which another thread may be running.
        return hook.weights_map[name].to(_device_of(hook), held.dtype)
    _require_values(module, name, held)
    return held


def _require_values(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    if tensor.is_meta:
        raise ConfigError(
            f"`{name}` of a {type(module).__name__} has no values (meta device). Load the model before using it; where "
            "accelerate offloads it as a part of a larger block, call this inside the forward of that block."
        )
    if hasattr(tensor, "ds_id"):
        raise ConfigError(
            f"`{name}` of a {type(module).__name__} is spread over processes by DeepSpeed ZeRO-3, and none of it is "
            "here. Call this inside `deepspeed.zero.GatheredParameters(model.parameters())`, or use FSDP."
        )


@torch.no_grad()
def write_parameter(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Set the parameter or buffer `name` of `module` itself, in place, wherever its values are.

    Raises:
        ConfigError: as `read_parameter`; or the sizes differ.
    """
    held = getattr(module, name)
    if held.shape != value.shape:
        raise ConfigError(f"`{name}` has shape {tuple(held.shape)}; it cannot be set to {tuple(value.shape)}.")
    hook = _offloading_hook(module)
    if hook is None or not held.is_meta:
        if held.is_meta or not held.numel():
            _require_values(module, name, held)
        held.copy_(value)
        return
    value = value.detach().to("cpu", held.dtype)
    weights, key = hook.weights_map, name
    while not isinstance(weights, dict):  # accelerate looks a name up under the path of its module, perhaps on a disk
        key = f"{getattr(weights, 'prefix', '')}{key}"
        weights = weights.dataset if hasattr(weights, "dataset") else weights.state_dict
    kept = weights.get(key)
    if isinstance(kept, torch.Tensor) and kept.dtype is value.dtype:
        kept.copy_(value)  # tied weights are one tensor
    else:
        weights[key] = value.clone()


def read_all(module: nn.Module) -> dict[str, torch.Tensor]:
    """As `module.state_dict()`, with the values of what is offloaded.

    Raises:
        ConfigError: as `read_parameter`.
    """
    return {name: read_parameter(owner, own_name) for name, owner, own_name in persistent_names(module)}


def write_all(module: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Set all that `read_all` gives, by its names.

    Raises:
        ConfigError: as `write_parameter`; or values are missing.
    """
    names = list(persistent_names(module))
    missing = sorted({name for name, _, _ in names} - set(values))
    if missing:
        raise ConfigError(f"There are no values for {missing} of a {type(module).__name__}.")
    for name, owner, own_name in names:
        write_parameter(owner, own_name, values[name])


def persistent_names(module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Name, owner and name within the owner of each parameter and saved buffer."""
    for path, owner in module.named_modules():
        unsaved = owner._non_persistent_buffers_set
        own: dict[str, Any] = {**owner._parameters, **owner._buffers}
        for name, tensor in own.items():
            if tensor is not None and name not in unsaved:
                yield (f"{path}.{name}" if path else name), owner, name


def _offloading_hook(module: nn.Module) -> Any:
    """The hook of accelerate that brings the weights of `module`, or None."""
    hook = vars(module).get("_hf_hook")
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return next((one for one in hooks if isinstance(one, AlignDevicesHook) and one.offload), None)


def _device_of(hook: Any) -> torch.device:
    return torch.device("cpu" if hook.execution_device is None else hook.execution_device)


def execution_device(module: nn.Module) -> torch.device:
    """The device on which `module` computes: its accelerate hook's, or that of its first parameter or buffer.

    Where that is offloaded, as of the layers inside one with adapters, the hook's of what is inside. The meta device
    where nothing is loaded; the CPU where there is neither a parameter nor a buffer.
    """
    device = _device_of_hook(module)
    if device is not None:
        return device
    held = next((tensor for tensors in (module.parameters(), module.buffers()) for tensor in tensors), None)
    if held is not None and held.is_meta:
        inside = (_device_of_hook(part) for part in module.modules())
        return next((device for device in inside if device is not None), held.device)
    return torch.device("cpu") if held is None else held.device


def _device_of_hook(module: nn.Module) -> torch.device | None:
    hook = vars(module).get("_hf_hook")
    devices = (getattr(one, "execution_device", None) for one in getattr(hook, "hooks", (hook,)))
    return next((torch.device(device) for device in devices if device is not None), None)


def input_device(model: Any) -> torch.device:
    """The device on which a model wants its token ids: that of its embeddings."""
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    return execution_device(model if embeddings is None else embeddings)
