"""Adapters (LoRA and kin) on layers of a model, found by the convention of peft, without it.

A layer with adapters names in `adapter_layer_names` what it holds of them: containers, by name of the adapter.
"""

import json
from collections.abc import Iterator
from typing import Any

from torch import nn


def modules_of_adapters(model: nn.Module) -> list[nn.Module]:
    """All modules that belong to adapters, active or not; none where there are no adapters."""
    return [part for _, container in _containers(model) for part in container.modules()]


def adapter_parameters(model: nn.Module, *, active: bool = False) -> list[nn.Parameter]:
    """The parameters of all adapters, or of those that are active."""
    found: dict[int, nn.Parameter] = {}
    for layer, container in _containers(model):
        for path, parameter in container.named_parameters():
            if not active or path.partition(".")[0] in _active(layer):
                found[id(parameter)] = parameter
    return list(found.values())


def adapter_states(model: nn.Module) -> list[str]:
    """Which adapters are in force, in words: active, merged and switched off ones; empty without adapters."""
    layers: list[Any] = [layer for layer, _ in _containers(model)]
    states = [
        [_active(layer), list(getattr(layer, "merged_adapters", ())), bool(getattr(layer, "disable_adapters", False))]
        for layer in layers
    ]
    return sorted({json.dumps(state) for state in states})


def _containers(model: nn.Module) -> Iterator[tuple[Any, nn.Module]]:
    """Each layer with adapters, and each of its containers."""
    layer: Any
    for layer in model.modules():
        for name in getattr(layer, "adapter_layer_names", ()):
            container = getattr(layer, name, None)
            if isinstance(container, nn.Module):
                yield layer, container


def _active(layer: Any) -> list[str]:
    active: Any = getattr(layer, "active_adapters", [])
    return list(active)
