"""Parameters that are spread over processes: by FSDP (`torch.distributed.fsdp.fully_shard`), and by tensor parallelism.

FSDP gives each process a part of every parameter and makes the whole again before a layer runs. Tensor parallelism
(`tp_plan="auto"`) gives each process some heads, and it runs on those alone. Either way a parameter is a `DTensor`, and
making it whole is a collective operation: every process has to take part, whoever needs the result.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from kvsplice_hf.errors import UnsupportedError


# What transformers calls the dimension of its mesh along which tensor parallelism divides weights.
_TENSOR_DIM = "tp"


class HeadShare(NamedTuple):
    """The part of the heads of an attention module that tensor parallelism leaves to this process.

    Attributes:
        mesh: of the processes that hold a part each, of one dimension.
        rank: of this process among them.
        size: how many they are.
    """

    mesh: Any
    rank: int
    size: int

    def of(self, count: int, what: str, name: str) -> int:
        """How many of `count` heads are here.

        Raises:
            UnsupportedError: they cannot be divided evenly.
        """
        if count % self.size:
            raise UnsupportedError(
                f"{name} has {count} {what}, which {self.size} processes of tensor parallelism cannot divide evenly. "
                f"Use a number of processes that divides {count}, or load the model without `tp_plan`."
            )
        return count // self.size


def is_distributed_tensor(tensor: object) -> bool:
    """Whether a tensor is spread over processes."""
    if not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, detached: gathered from the processes that hold a part of it each, or as it is."""
    held: Any = tensor
    return held.full_tensor().detach() if is_distributed_tensor(held) else held.detach()


def spread_like(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A whole tensor, the same in all processes, spread over them as `other` is."""
    held: Any = other
    if not is_distributed_tensor(held):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(held.device), held.device_mesh, held.placements)


def is_spread(modules: Iterable[nn.Module]) -> bool:
    """Whether parameters of a model are spread over processes, so that all of them have to run it together.

    Args:
        modules: all of the model.
    """
    return any(_is_spread(module) for module in modules)


def _is_spread(module: nn.Module) -> bool:
    # With no weight divided, processes that transformers has told of tensor parallelism may still run in step.
    in_step = int(getattr(module, "_tp_size", None) or 1) > 1
    return in_step or any(map(is_distributed_tensor, module._parameters.values()))


def require_known_sharding(modules: Iterable[nn.Module]) -> None:
    """Refuse a model that is divided in a way in which its layers or their weights cannot be found.

    Args:
        modules: all of the model.

    Raises:
        UnsupportedError: pipeline parallelism; tensor parallelism of a release that keeps no `DTensor`.
    """
    for module in modules:
        mesh: Any = getattr(module, "_device_mesh", None)
        names = getattr(mesh, "mesh_dim_names", None) or ()
        if "pp" in names and mesh["pp"].size() > 1:
            raise UnsupportedError(
                "The layers of the model are divided among processes by pipeline parallelism (pp_size), and a splice "
                "needs all of them in each process. Use tensor parallelism (tp_plan) or FSDP instead."
            )
        if getattr(module, "_hf_device_mesh", None) is not None:
            raise UnsupportedError(
                "The installed transformers divides weights by tensor parallelism without saying how on the weight "
                "(no DTensor). Install transformers>=5.23, or load the model without `tp_plan`."
            )


def head_share(projection: Any) -> HeadShare | None:
    """Which part of the output of a linear layer tensor parallelism computes in this process; None where it is all.

    Args:
        projection: the layer, or an adapter around it.
    """
    linear = getattr(projection, "base_layer", projection)
    weight: Any = linear._parameters.get("weight")
    mesh = tensor_mesh(weight)
    if mesh is None or mesh.size() == 1:
        return None
    place = weight.placements[_tensor_dim(weight.device_mesh)]
    if not place.is_shard(0) or _gathers_output(linear):
        return None
    return HeadShare(mesh, mesh.get_local_rank(), mesh.size())


def tensor_mesh(tensor: Any) -> Any:
    """The mesh, of one dimension, along which tensor parallelism has spread a tensor; None where it has not."""
    if not is_distributed_tensor(tensor) or _TENSOR_DIM not in (tensor.device_mesh.mesh_dim_names or ()):
        return None
    return tensor.device_mesh if tensor.device_mesh.ndim == 1 else tensor.device_mesh[_TENSOR_DIM]


def _tensor_dim(mesh: Any) -> int:
    return int(mesh.mesh_dim_names.index(_TENSOR_DIM))


def _gathers_output(linear: nn.Module) -> bool:
    """Whether a divided layer gives its whole output to each process ("colwise_gather_output").

    Its weight looks the same. What differs is the style, which transformers keeps in the forward that it has put on the
    layer.
    """
    forward = vars(linear).get("forward")
    names = getattr(getattr(forward, "__code__", None), "co_freevars", ())
    kept = dict(zip(names, getattr(forward, "__closure__", None) or (), strict=False))
    layout = getattr(kept["self"].cell_contents, "output_layouts", None) if "self" in kept else None
    return layout is not None and layout.is_replicate()


def part_of_process(linear: nn.Module) -> torch.Tensor | None:
    """What a linear layer multiplies by in this process where tensor parallelism has divided its output, [out / n, in].

    None where nothing is divided, or where FSDP has divided it as well and the layer is not running.
    """
    weight: Any = linear._parameters.get("weight")
    if not is_distributed_tensor(weight) or weight.device_mesh.ndim > 1 or head_share(linear) is None:
        return None
    return weight.to_local()


def gradient_of_all(tensor: torch.Tensor, share: HeadShare | None) -> torch.Tensor:
    """A tensor that each process reads with its own heads; its gradient is the sum of theirs."""
    return tensor if share is None else _SummedGradient.apply(tensor, share)


def gradient_as_part(tensor: torch.Tensor, share: HeadShare | None) -> torch.Tensor:
    """A tensor whose gradient is the whole one here, and is added up over the processes further back."""
    return tensor if share is None else _DividedGradient.apply(tensor, share.size)


class _SummedGradient(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, tensor: torch.Tensor, share: HeadShare) -> torch.Tensor:
        context.share = share
        return tensor.view_as(tensor)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> Any:
        return sum_of_processes(gradient, context.share), None


class _DividedGradient(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, tensor: torch.Tensor, size: int) -> torch.Tensor:
        context.size = size
        return tensor.view_as(tensor)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> Any:
        return gradient / context.size, None


def sum_of_processes(tensor: torch.Tensor, share: HeadShare | None) -> torch.Tensor:
    """The sum of a tensor over the processes that hold a part of the heads each; itself where none is divided."""
    if share is None:
        return tensor
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=share.mesh.get_group())
    return total
