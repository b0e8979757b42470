"""Parameters that FSDP (`torch.distributed.fsdp.fully_shard`) has spread over processes: made whole, and spread again.

Making one whole is a collective operation: every process has to take part, whoever needs the result.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, detached: gathered from the processes that hold a part of it each, or as it is."""
    if dist.is_available():
        from torch.distributed.tensor import DTensor

        if isinstance(tensor, DTensor):
            return tensor.full_tensor().detach()
    return tensor.detach()


def spread_like(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A whole tensor, the same in all processes, spread over them as `other` is."""
    if dist.is_available():
        from torch.distributed.tensor import DTensor, distribute_tensor

        if isinstance(other, DTensor):
            return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements)
    return tensor


def local_rows(module: nn.Module, weight: Any) -> torch.Tensor | None:
    """The rows that this process has of the weight of a linear layer that tensor parallelism has spread; or None.

    None where the layer is spread in another way: FSDP brings the whole weight for the forward.
    """
    if not dist.is_available():
        return None
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, Replicate, Shard

    if not isinstance(weight, DTensor) or isinstance(module, FSDPModule):
        return None
    by_rows = all(placement in (Shard(0), Replicate()) for placement in weight.placements)
    return weight.to_local() if by_rows and weight.is_floating_point() else None
