"""Parameters that FSDP (`torch.distributed.fsdp.fully_shard`) has spread over processes: made whole, and spread again.

Making one whole is a collective operation: every process has to take part, whoever needs the result.
"""

import torch
import torch.distributed as dist


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
