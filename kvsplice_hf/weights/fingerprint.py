"""A digest of all weights of a model, to know it again: of the decoder around an attention module, and of the rest.

A part of the weights will not do: a model that was fine-tuned differs from its base anywhere.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kvsplice_hf.weights.offload import persistent_names, read_parameter
from kvsplice_hf.weights.sharding import is_distributed_tensor, whole


def decoder_around(model: nn.Module, module: nn.Module) -> nn.Module:
    """The innermost model of transformers around an attention module, or `model`."""
    inside = model
    for candidate in model.modules():  # outer ones come first
        if isinstance(candidate, PreTrainedModel) and any(part is module for part in candidate.modules()):
            inside = candidate
    return inside


def modules_of_splices(model: nn.Module) -> list[nn.Module]:
    """All modules of the splices that are on modules of a model (as `kvsplice`); none where it is not patched."""
    splices: list[Any] = [module._modules["kvsplice"] for module in model.modules() if "kvsplice" in module._modules]
    return [part for splice in splices for part in splice.modules()]


def digest(
    model: nn.Module, left_out: Iterable[nn.Module] = (), *, needs_all: bool = False, gathers: bool = True
) -> str:
    """Of the weights of all modules but those left out, of numbers rounded to bf16; empty where there are none.

    The dtype in which a model was loaded makes no difference then, but for float16 and packed weights. Weights that
    accelerate offloads are read.

    Args:
        model: whose weights.
        left_out: modules whose own weights do not count.
        needs_all: give nothing where weights are nowhere (meta device); otherwise their sizes count.
        gathers: count all of a weight that is spread over processes, for which every process has to call this;
            otherwise give nothing where there is one.
    """
    without, content, seen = {id(module) for module in left_out}, hashlib.sha256(), False
    for _, module, name in persistent_names(model):
        if id(module) in without:
            continue
        part = _content(module, name, needs_all, gathers)
        if part is None:
            return ""
        content.update(part)
        seen = True
    return content.hexdigest() if seen else ""


@torch.no_grad()
def _content(module: nn.Module, name: str, needs_all: bool, gathers: bool) -> bytes | None:
    held: Any = module._parameters.get(name)
    held = module._buffers[name] if held is None else held
    if not gathers and is_distributed_tensor(held):
        return None
    sizes = json.dumps([name, list(held.shape)]).encode()
    try:
        tensor: Any = read_parameter(module, name)
    except ValueError:  # a `ConfigError`: it is nowhere
        return None if needs_all else sizes
    return sizes + b"".join(_bytes_of(part) for part in _plain_parts(tensor))


def _plain_parts(tensor: Any) -> Iterator[torch.Tensor]:
    """A tensor, or what a quantised or sharded one is made of."""
    if is_distributed_tensor(tensor):
        yield whole(tensor)
    elif hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain_parts(getattr(tensor, name))
    else:
        yield tensor


def _bytes_of(tensor: torch.Tensor) -> bytes:
    values = tensor.detach()
    values = values.bfloat16() if values.is_floating_point() else values
    return hashlib.sha256(values.cpu().contiguous().flatten().view(torch.uint8).numpy().data).digest()
