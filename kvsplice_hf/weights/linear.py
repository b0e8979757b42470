"""What a linear layer multiplies by, whatever its weight is stored as."""

import torch
from torch import nn

from kvsplice_hf.weights.offload import execution_device
from kvsplice_hf.weights.processes import gathered
from kvsplice_hf.weights.sharding import head_share, is_distributed_tensor, whole


@torch.no_grad()
def linear_map(module: nn.Module, size: int, dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
    """What a linear layer multiplies by, [out, size], by asking it: packed, adapted and offloaded ones answer as well.

    Of a layer that is divided among processes, all of it: all of them have to call this.

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
    if type(module).forward is nn.Linear.forward and held is not None and is_distributed_tensor(held):
        return whole(held).to(device)
    if isinstance(held, torch.Tensor) and held.dtype.is_floating_point and held.dtype.itemsize > 1:
        dtype = held.dtype
    units = torch.eye(size, dtype=dtype, device=device)
    with torch.autocast(device.type, enabled=False):  # it would round the weight
        answer = (module(units) - module(torch.zeros_like(units[:1]))).T
    share = head_share(module)
    return answer if share is None else torch.cat(gathered(answer, share.mesh.get_group()))
