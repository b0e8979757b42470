"""Gradients with respect to the inputs of packed layers, whether their library has them or not.

Calibration by "fisher" needs gradients of activations, none of weights. Most libraries have them. Where a kernel is
for inference only (bitsandbytes in 4 bits on a CPU with AVX512-BF16, once it has rearranged the weights), the layer is
still a matrix, so its gradient is known: it is asked for the matrix, in the backward pass, one layer at a time.
"""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from kvsplice_hf.weights.linear import input_dtype, linear_map
from kvsplice_hf.weights.offload import execution_device
from kvsplice_hf.weights.packed import packed_layers


logger = logging.getLogger(__name__)


class _AsMatrix(torch.autograd.Function):
    """What a layer gave, [..., out], for its inputs, [..., in], with the gradient of a matrix."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, output: torch.Tensor, layer: nn.Module) -> torch.Tensor:
        ctx.layer, ctx.dtype = layer, inputs.dtype
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = gradients
        weight = linear_map(ctx.layer, ctx.layer.in_features, ctx.dtype)
        return (gradient.to(weight.dtype) @ weight).to(ctx.dtype), None, None


@contextlib.contextmanager
def gradients_of_packed(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Within this context, gradients pass those packed layers of a model that have none of their own.

    Args:
        model: in evaluation mode: some libraries run other kernels in training.
        dtype: of its activations.
    """
    with contextlib.ExitStack() as stack:
        for layer in packed_layers(model):
            if not _has_gradient(layer, dtype):
                stack.enter_context(_with_gradient(layer))
        yield


@contextlib.contextmanager
def _with_gradient(layer: nn.Module) -> Iterator[None]:
    """Within this context, a layer runs without gradients of its own, which may fail, and has that of its matrix."""
    before, forward = vars(layer).get("forward"), layer.forward

    def as_matrix(inputs: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or not inputs.requires_grad:
            return forward(inputs, *args, **kwargs)
        with torch.no_grad():
            output = forward(inputs.detach(), *args, **kwargs)
        return _AsMatrix.apply(inputs, output, layer)

    layer.forward = as_matrix
    try:
        yield
    finally:
        if before is None:
            del layer.forward
        else:  # accelerate keeps one of its own there
            layer.forward = before


@torch.enable_grad()
def _has_gradient(layer: Any, dtype: torch.dtype) -> bool:
    """Whether gradients pass a layer, tried on one token."""
    device = execution_device(layer)
    if device.type == "meta":
        return True  # not loaded, which is said elsewhere
    inputs = torch.ones(1, layer.in_features, dtype=input_dtype(layer, dtype), device=device, requires_grad=True)
    try:
        (gradient,) = torch.autograd.grad(layer(inputs).sum(), inputs)
    except (RuntimeError, NotImplementedError, TypeError, AttributeError, AssertionError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        logger.debug("No gradients pass a %s: %s", type(layer).__name__, error)
        return False
    return bool(gradient.any())
