"""What a linear layer multiplies by, whatever its weight is stored as."""

from typing import Any, NamedTuple

import torch
from torch import nn

from kvsplice_hf.weights.offload import execution_device
from kvsplice_hf.weights.processes import gathered
from kvsplice_hf.weights.sharding import head_share, is_distributed_tensor, whole


class Probed(NamedTuple):
    """What a layer answered.

    Attributes:
        weight: what it multiplies by, [out, size].
        offset: what it adds, [out].
        dtype: of the unit vectors that it was asked.
    """

    weight: torch.Tensor
    offset: torch.Tensor
    dtype: torch.dtype


def probe(module: nn.Module, size: int, dtype: torch.dtype, device: torch.device | None = None) -> Probed:
    """Ask a linear layer what it multiplies by: packed, adapted, offloaded and sharded ones answer as well.

    With gradients, where they are on. Of a layer that is spread over processes, it is the part of this one.

    Args:
        module: the layer.
        size: numbers that it takes.
        dtype: of its input in the model.
        device: where it computes, if that is known.
    """
    device = execution_device(module) if device is None else device
    dtype = input_dtype(module, dtype)
    units = torch.eye(size, dtype=dtype, device=device)
    with torch.autocast(device.type, enabled=False):  # it would round the weight
        offset, rows = _local(module(torch.zeros_like(units[:1]))), _local(module(units))
    return Probed((rows - offset).T, offset[0], dtype)


@torch.no_grad()
def linear_map(module: nn.Module, size: int, dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
    """What a linear layer multiplies by, [out, size], by asking it; arguments as of `probe`.

    Of a layer that is divided among processes, all of it: all of them have to call this.
    """
    held = getattr(module, "weight", None)
    if type(module).forward is nn.Linear.forward and held is not None and is_distributed_tensor(held):
        return whole(held).to(execution_device(module) if device is None else device)
    answer, share = probe(module, size, dtype, device).weight, head_share(module)
    return answer if share is None else torch.cat(gathered(answer, share.mesh.get_group()))


def input_dtype(module: nn.Module, dtype: torch.dtype) -> torch.dtype:
    """In which dtype to ask a layer.

    In that of its weight, not of its input in the model (`dtype`): they differ where norms are kept in float32 and
    autocast does the rest. Packed weights (integers, float8) take what the input is.
    """
    held = getattr(module, "weight", None)
    if isinstance(held, torch.Tensor) and held.dtype.is_floating_point and held.dtype.itemsize > 1:
        return held.dtype
    return dtype


def _local(tensor: Any) -> torch.Tensor:
    local: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local
