"""Which model statistics are of: a digest of all its weights, and of the tokenizer that made its text.

Statistics of one model fit another one badly, and nothing shows it. So they carry a fingerprint of the model that they
were made on. A part of the weights will not do: a model that was fine-tuned differs from its base anywhere.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kvsplice_hf.patch.families import AttentionSite
from kvsplice_hf.weights.offload import persistent_names, read_parameter


_PREFIX = "all-weights"


def model_fingerprint(model: nn.Module, sites: Sequence[AttentionSite]) -> str:
    """A digest of the decoder around the sites, and one of everything else in `model` (the output layer, say).

    Both are of numbers rounded to bf16, so that the dtype in which a model was loaded makes no difference. Weights that
    accelerate offloads are read; of what is nowhere (meta device) only the sizes count.

    Returns:
        "all-weights:DECODER:REST".
    """
    inside = _decoder_of(model, sites[0].module)
    decoder = {id(module) for module in inside.modules()}
    parts = [_digest(inside, set()), _digest(model, decoder)]
    return ":".join([_PREFIX, *parts])


def same_model(one: str, other: str) -> bool:
    """Whether two fingerprints may be of one model: what both know of it agrees.

    A model without its output layer is the same one. Fingerprints of releases before 0.2 knew a part of the weights
    only, and agree with none.
    """
    left, right = one.split(":"), other.split(":")
    if len(left) != 3 or len(right) != 3:
        return one == other
    agree = left[1] == right[1]
    return agree and (left[2] == right[2] or not left[2] or not right[2])


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A digest of what a tokenizer makes of text; empty without one."""
    if tokenizer is None:
        return ""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = backend.to_str()
    else:
        vocabulary = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
        content = json.dumps([type(tokenizer).__name__, sorted(vocabulary.items())])
    return hashlib.sha256(content.encode()).hexdigest()


def _decoder_of(model: nn.Module, module: nn.Module) -> nn.Module:
    """The innermost model of transformers around an attention module, or `model`."""
    inside = model
    for candidate in model.modules():  # outer ones come first
        if isinstance(candidate, PreTrainedModel) and any(part is module for part in candidate.modules()):
            inside = candidate
    return inside


def _digest(model: nn.Module, left_out: set[int]) -> str:
    """Of the weights of all modules but those left out; empty where there are none."""
    digest, seen = hashlib.sha256(), False
    for _, module, name in persistent_names(model):
        if id(module) not in left_out:
            digest.update(_content(module, name))
            seen = True
    return digest.hexdigest() if seen else ""


@torch.no_grad()
def _content(module: nn.Module, name: str) -> bytes:
    held: Any = module._parameters.get(name)
    held = module._buffers[name] if held is None else held
    sizes = json.dumps([name, list(held.shape)]).encode()
    try:
        tensor: Any = read_parameter(module, name)
    except ValueError:  # a `ConfigError`: it is nowhere
        return sizes
    return sizes + b"".join(_bytes_of(part) for part in _plain_parts(tensor))


def _plain_parts(tensor: Any) -> Iterator[torch.Tensor]:
    """A tensor, or what a quantised or sharded one is made of."""
    if hasattr(tensor, "to_local"):
        yield tensor.to_local()
    elif hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain_parts(getattr(tensor, name))
    else:
        yield tensor


def _bytes_of(tensor: torch.Tensor) -> bytes:
    values = tensor.detach()
    values = values.bfloat16() if values.is_floating_point() else values
    return hashlib.sha256(values.cpu().contiguous().flatten().view(torch.uint8).numpy().data).digest()
