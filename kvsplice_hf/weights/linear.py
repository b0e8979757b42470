"""What a linear layer multiplies by, whatever its weight is stored as."""

import torch
from torch import nn

from kvsplice_hf.weights.offload import execution_device


@torch.no_grad()
def linear_map(module: nn.Module, size: int, dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
    """What a linear layer multiplies by, [out, size], by asking it: packed, adapted and offloaded ones answer as well.

    Args:
        module: the layer.
        size: numbers that it takes.
        dtype: of its input in the model.
        device: where it computes, if that is known.
    """
    device = execution_device(module) if device is None else device
    # In the dtype of the weight, not of the input: they differ where norms are kept in float32 and autocast does the
    # rest. Packed weights (integers, float8) take what the input is.
    held = getattr(module, "weight", None)
    if isinstance(held, torch.Tensor) and held.dtype.is_floating_point and held.dtype.itemsize > 1:
        dtype = held.dtype
    units = torch.eye(size, dtype=dtype, device=device)
    with torch.autocast(device.type, enabled=False):  # it would round the weight
        return (module(units) - module(torch.zeros_like(units[:1]))).T
