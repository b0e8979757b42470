"""Tells whether a layer still multiplies by what it multiplied by: weights, adapters, devices and settings.

There is no one place to look. Optimizers and `load_state_dict` write into tensors, which PyTorch counts (`_version`).
Moving, casting and loading anew put other tensors or other memory in their place. Libraries of adapters keep which one
is active, how it is scaled, and whether it is switched off or merged in plain attributes. Writes through `.data`, and
those in inference mode, are counted nowhere: only numbers tell.
"""

import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn


# Of each tensor so many numbers are compared at each look. A sum over all of them is compared where it costs nothing
# beside what else is done.
SAMPLE_SIZE = 1024
_COLUMNS = 64
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# What PyTorch itself keeps on a module. Parameters, buffers and modules are looked at by themselves; of hooks, which
# there are. (`training` is a setting like others: dropout depends on it.)
_OF_PYTORCH = frozenset(vars(nn.Module())) - {"training"}
_SIMPLE = (str, int, float, bool, type(None), torch.dtype, torch.device)


def plain_parts(tensor: Any) -> Iterator[torch.Tensor]:
    """A tensor, or what a quantised or sharded one is made of."""
    if hasattr(tensor, "to_local"):
        yield tensor.to_local()
    elif hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from plain_parts(getattr(tensor, name))
    else:
        yield tensor


class _Seen(NamedTuple):
    """A tensor as it was.

    Attributes:
        tensor: itself, held weakly: at the address of one that is gone there may be another by now.
        stamps: of each part that it is made of, device, address, and how often it was written to (-1: not counted).
        samples: of each part whose numbers are compared: a view of some of them, and a copy.
    """

    tensor: Any
    stamps: tuple[tuple[Any, ...], ...]
    samples: tuple[tuple[torch.Tensor, torch.Tensor], ...]


class LayerState:
    """What a layer was like when it was looked at.

    Args:
        module: the layer, with all that is inside it.
    """

    def __init__(self, module: nn.Module) -> None:
        settings, tensors = _look(module)
        self._settings = settings
        self._tensors = [_see(tensor) for tensor in tensors]
        self._sums = [_sums(tensor) for tensor in tensors]

    @torch.no_grad()
    def holds(self, module: nn.Module, *, thorough: bool = False) -> bool:
        """Whether the layer is still like that.

        Of tensors on a CPU, and of those to which writes are not counted, a sample of the numbers is compared. On
        other devices that would wait for all that was asked of them.

        Args:
            module: the layer.
            thorough: compare a sum over all numbers too.
        """
        settings, tensors = _look(module)
        if settings != self._settings or len(tensors) != len(self._tensors):
            return False
        if not all(_is_as_seen(tensor, seen) for tensor, seen in zip(tensors, self._tensors, strict=True)):
            return False
        return not thorough or [_sums(tensor) for tensor in tensors] == self._sums


def _look(module: nn.Module) -> tuple[list[Any], list[Any]]:
    """The settings of a layer and of all modules inside it, and their tensors."""
    settings: list[Any] = []
    tensors: list[Any] = []
    _look_into(module, settings, tensors)
    return settings, tensors


def _look_into(module: nn.Module, settings: list[Any], tensors: list[Any]) -> None:
    held = vars(module)
    settings.append(id(module))
    for name, value in held.items():
        if name not in _OF_PYTORCH:
            settings.append((name, value if type(value) in _SIMPLE else _frozen(value, tensors)))
    # The numbers of hooks are given once in a process.
    for name in ("_forward_hooks", "_forward_pre_hooks"):
        if held[name]:
            settings.append(tuple(held[name]))
    for name in ("_parameters", "_buffers"):
        tensors.extend(tensor for tensor in held[name].values() if tensor is not None)
    for name, part in held["_modules"].items():
        settings.append(name)
        if part is not None:
            _look_into(part, settings, tensors)


def _frozen(value: Any, tensors: list[Any]) -> Any:
    """A setting in a form that does not change with it; tensors in it are put to the others."""
    if type(value) in _SIMPLE:
        return value
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return None
    if isinstance(value, dict):
        return tuple([(key, _frozen(item, tensors)) for key, item in value.items()])
    if isinstance(value, (list, tuple)):
        return tuple([_frozen(item, tensors) for item in value])
    if isinstance(value, (set, frozenset)):
        return frozenset(map(repr, value))
    return id(value)


def _stamp_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    version = -1 if tensor.is_inference() else tensor._version
    return tensor.device, tensor.dtype, tensor.data_ptr(), version


def _see(tensor: Any) -> _Seen:
    parts = list(plain_parts(tensor))
    stamps = tuple([_stamp_of(part) for part in parts])
    compared = [part for part, stamp in zip(parts, stamps, strict=True) if part.is_cpu or stamp[-1] < 0]
    return _Seen(weakref.ref(tensor), stamps, tuple([(view, view.clone()) for view in map(_sample, compared)]))


def _is_as_seen(tensor: Any, seen: _Seen) -> bool:
    if seen.tensor() is not tensor:
        return False
    stamps = tuple([_stamp_of(part) for part in plain_parts(tensor)])
    return stamps == seen.stamps and all(torch.equal(view, copy) for view, copy in seen.samples)


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """A view of numbers spread over a tensor, as integers, which are equal where they are the same."""
    tensor = tensor.detach()
    if not tensor.is_contiguous() or tensor.itemsize not in _INTEGERS:
        return tensor
    flat = tensor.view(-1).view(_INTEGERS[tensor.itemsize])
    return flat[:: max(1, flat.numel() // SAMPLE_SIZE)]


@torch.no_grad()
def _sums(tensor: Any) -> list[list[int]]:
    return [_sum(part.detach()) for part in plain_parts(tensor) if not part.is_meta]


def _sum(tensor: torch.Tensor) -> list[int]:
    """Sums of the numbers in every 64th place, as integers."""
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    words = flat.view(torch.int64) if flat.numel() % 8 == 0 and flat.storage_offset() % 8 == 0 else flat
    columns = next(size for size in (_COLUMNS, 8, 1) if words.numel() % size == 0)
    sums: list[int] = words.view(-1, columns).sum(0, dtype=torch.int64).tolist()
    return sums
