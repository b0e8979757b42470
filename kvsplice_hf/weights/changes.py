"""Tells whether a layer still multiplies by what it multiplied by: weights, adapters, devices and settings.

There is no one place to look. Optimizers and `load_state_dict` write into tensors, which PyTorch counts (`_version`).
Moving, casting and loading anew put other tensors or other memory in their place. Libraries of adapters keep which one
is active, how it is scaled, and whether it is switched off or merged in plain attributes. Writes through `.data`, and
those in inference mode, are counted nowhere: only numbers tell.
"""

import copy
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn


# Of each tensor so many numbers are compared at each look. A sum over all of them is compared where it costs nothing
# beside what else is done.
SAMPLE_SIZE = 256
_COLUMNS = 64
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# What PyTorch itself keeps on a module. Parameters, buffers and modules are looked at by themselves; of hooks, which
# there are. (`training` is a setting like others: dropout depends on it.)
_OF_PYTORCH = frozenset(vars(nn.Module())) - {"training"}
_SIMPLE = (str, int, float, bool, type(None), torch.dtype, torch.device)
_PLAIN_TENSORS = (torch.Tensor, nn.Parameter)


def plain_parts(tensor: Any) -> Iterator[torch.Tensor]:
    """A tensor, or what a quantised or sharded one is made of."""
    if hasattr(tensor, "to_local"):
        yield tensor.to_local()
    elif hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from plain_parts(getattr(tensor, name))
    else:
        yield tensor


class _SeenModule(NamedTuple):
    """A module as it was: what is in its `vars`, as far as it may change what the module computes.

    Attributes:
        held: its `vars`, as they are now.
        size: how many there were.
        parts: the modules in it.
        hooks: the numbers of its forward hooks, which are given once in a process.
        names, values: settings that can be compared, and copies of them.
        others: settings that are or contain something else, and a form of them that does not change.
        tensors: its parameters and buffers, and those in `others`.
    """

    held: dict[str, Any]
    size: int
    parts: dict[str, Any]
    hooks: tuple[int, ...]
    names: tuple[str, ...]
    values: tuple[Any, ...]
    others: tuple[tuple[str, Any], ...]
    tensors: tuple["_SeenTensor", ...]

    def holds(self) -> bool:
        held = self.held
        if len(held) != self.size or held["_modules"] != self.parts or _hooks(held) != self.hooks:
            return False
        try:
            if tuple(map(held.get, self.names)) != self.values:
                return False
        except (RuntimeError, ValueError):  # there is a tensor now where there was none
            return False
        tensors = [*held["_parameters"].values(), *held["_buffers"].values()]
        if any(_frozen(held.get(name), tensors) != form for name, form in self.others):
            return False
        tensors = [tensor for tensor in tensors if tensor is not None]
        if len(tensors) != len(self.tensors):
            return False
        return all(seen.holds(tensor) for seen, tensor in zip(self.tensors, tensors, strict=True))


class _SeenTensor(NamedTuple):
    """A tensor as it was.

    Attributes:
        tensor: itself, held weakly: at the address of one that is gone there may be another by now.
        stamps: of each part that it is made of, device, address, and how often it was written to (-1: not counted).
        samples: of each part whose numbers are compared: a view of some of them, and a copy.
    """

    tensor: Any
    stamps: list[tuple[Any, ...]]
    samples: list[tuple[torch.Tensor, torch.Tensor]]

    def holds(self, tensor: Any) -> bool:
        if self.tensor() is not tensor or _stamps_of(tensor) != self.stamps:
            return False
        return all(torch.equal(view, copied) for view, copied in self.samples)


class LayerState:
    """What a layer was like when it was looked at.

    Args:
        module: the layer, with all that is inside it.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._seen = [_see_module(part) for part in module.modules()]
        self._sums = self._sum()

    def holds(self, module: nn.Module, *, thorough: bool = False) -> bool:
        """Whether the layer is still like that.

        Of tensors on a CPU, and of those to which writes are not counted, a sample of the numbers is compared. On
        other devices that would wait for all that was asked of them.

        Args:
            module: the layer.
            thorough: compare a sum over all numbers too.
        """
        if module is not self._module or not all(seen.holds() for seen in self._seen):
            return False
        return not thorough or self._sum() == self._sums

    @torch.no_grad()
    def _sum(self) -> list[list[int]]:
        tensors = [seen.tensor() for module in self._seen for seen in module.tensors]
        return [_sum(part.detach()) for tensor in tensors for part in plain_parts(tensor) if not part.is_meta]


def _see_module(module: nn.Module) -> _SeenModule:
    held = vars(module)
    names = [name for name in held if name not in _OF_PYTORCH]
    comparable = tuple([name for name in names if _is_comparable(held[name])])
    tensors = [*held["_parameters"].values(), *held["_buffers"].values()]
    others = tuple([(name, _frozen(held[name], tensors)) for name in names if name not in comparable])
    return _SeenModule(
        held=held,
        size=len(held),
        parts=dict(held["_modules"]),
        hooks=_hooks(held),
        names=comparable,
        values=tuple([copy.deepcopy(held[name]) for name in comparable]),
        others=others,
        tensors=tuple([_see_tensor(tensor) for tensor in tensors if tensor is not None]),
    )


def _hooks(held: dict[str, Any]) -> tuple[int, ...]:
    return (*held["_forward_hooks"], *held["_forward_pre_hooks"])


def _is_comparable(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_comparable, value.values()))
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_comparable, value))
    return type(value) in _SIMPLE


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
    return id(value)


@torch.no_grad()
def _see_tensor(tensor: Any) -> _SeenTensor:
    stamps = _stamps_of(tensor)
    parts = zip(plain_parts(tensor), stamps, strict=True)
    views = [_sample(part) for part, stamp in parts if part.is_cpu or stamp[-1] < 0]
    return _SeenTensor(weakref.ref(tensor), stamps, [(view, view.clone()) for view in views])


def _stamps_of(tensor: Any) -> list[tuple[Any, ...]]:
    parts = (tensor,) if type(tensor) in _PLAIN_TENSORS else plain_parts(tensor)
    return [(t.device, t.dtype, t.data_ptr(), -1 if t.is_inference() else t._version) for t in parts]


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """A view of numbers spread over a tensor, as integers, which are equal where they are the same."""
    tensor = tensor.detach()
    if not tensor.is_contiguous() or tensor.itemsize not in _INTEGERS:
        return tensor
    flat = tensor.view(-1).view(_INTEGERS[tensor.itemsize])
    return flat[:: max(1, flat.numel() // SAMPLE_SIZE)]


def _sum(tensor: torch.Tensor) -> list[int]:
    """Sums of the numbers in every 64th place, as integers."""
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    words = flat.view(torch.int64) if flat.numel() % 8 == 0 and flat.storage_offset() % 8 == 0 else flat
    columns = next(size for size in (_COLUMNS, 8, 1) if words.numel() % size == 0)
    sums: list[int] = words.view(-1, columns).sum(0, dtype=torch.int64).tolist()
    return sums
