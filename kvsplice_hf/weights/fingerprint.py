"""A digest of all weights of a model, to know it again: of the decoder around an attention module, and of the rest.

A part of the weights will not do: a model that was fine-tuned differs from its base anywhere.
"""

import copy
import hashlib
import json
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from kvsplice_hf.weights.changes import plain_parts
from kvsplice_hf.weights.offload import persistent_names, read_parameter
from kvsplice_hf.weights.sharding import is_distributed_tensor, whole


# Seconds before a bar is shown: all weights of a large model take long, and those of most models do not.
_PATIENCE = 2.0


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
    accelerate offloads are read. What takes longer than two seconds has a progress bar.

    Args:
        model: whose weights.
        left_out: modules whose own weights do not count.
        needs_all: give nothing where weights are nowhere (meta device); otherwise their sizes count.
        gathers: count all of a weight that is spread over processes, for which every process has to call this;
            otherwise give nothing where there is one.
    """
    without, content, seen = {id(module) for module in left_out}, hashlib.sha256(), False
    named = [(module, name) for _, module, name in persistent_names(model) if id(module) not in without]
    for module, name in tqdm(named, desc="fingerprint of the weights", delay=_PATIENCE, leave=False, file=sys.stderr):
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
    tensor = whole(tensor) if is_distributed_tensor(tensor) else _as_saved(module, name, tensor)
    sizes = json.dumps([name, list(tensor.shape)]).encode()
    return sizes + b"".join(_bytes_of(part) for part in plain_parts(tensor))


def _as_saved(module: nn.Module, name: str, tensor: Any) -> Any:
    """A tensor in the form in which its module saves it.

    Libraries of quantisation may hold weights in another one, and change it as they run: bitsandbytes rearranges those
    of 4 bits at the first step on some processors. A stand-in is asked, because saving would put them back.
    """
    as_ever = type(module)._save_to_state_dict is nn.Module._save_to_state_dict
    if as_ever or tensor is not module._parameters.get(name) or hasattr(tensor, "__tensor_flatten__"):
        return tensor
    stand_in: Any = object.__new__(type(module))
    vars(stand_in).update(vars(module), _parameters={name: copy.deepcopy(tensor)})
    for other, parameter in module._parameters.items():
        stand_in._parameters.setdefault(other, parameter)
    saved: dict[str, Any] = {}
    stand_in._save_to_state_dict(saved, "", False)
    return saved.get(name, tensor)


def _bytes_of(tensor: torch.Tensor) -> bytes:
    values = tensor.detach()
    values = values.bfloat16() if values.is_floating_point() else values
    return hashlib.sha256(values.cpu().contiguous().flatten().view(torch.uint8).numpy().data).digest()
