"""Which base model a splice is on: a saved one says so, and warns where it comes upon another.

A splice is fitted to the latents of one model. On another one of the same shape it loads, and loses much.
"""

import logging
from collections.abc import Iterable
from typing import Any

from torch import nn

from kvsplice_hf.patch.state import find_patch, is_patched
from kvsplice_hf.weights.adapters import modules_of_adapters
from kvsplice_hf.weights.fingerprint import decoder_around, digest, modules_of_splices
from kvsplice_hf.weights.offload import persistent_names
from kvsplice_hf.weights.packed import decompress
from kvsplice_hf.weights.sharding import is_spread


logger = logging.getLogger(__name__)

BASE_KEY = "base_fingerprint"


def base_fingerprint(model: nn.Module, module: nn.Module, *, gathers: bool = False) -> str:
    """A digest of the decoder around an attention module, without splices; empty where weights are not all here.

    Adapters are left out too: they are saved by themselves, and come and go.

    All weights are read. On a patched model that is done again only after one was written to, replaced or moved.

    Args:
        model: patched or not.
        module: one of its attention modules.
        gathers: read weights that are spread over processes as well, for which all of them have to call this.
    """
    decompress(model)
    decoder = decoder_around(model, module)
    others = [*modules_of_splices(model), *modules_of_adapters(model)]
    if not is_patched(model) or gathers:  # what one process remembers the others may not
        return digest(decoder, others, needs_all=True, gathers=gathers)
    patch, stamp = find_patch(model)[1], stamp_of_weights(decoder, others)
    if patch.known_base[0] != stamp:
        patch.known_base = stamp, digest(decoder, others, needs_all=True, gathers=False)
    return patch.known_base[1]


def warn_of_other_base(model: nn.Module, module: nn.Module, saved: str, directory: object) -> None:
    """Say so where the splice in `directory` was saved on other weights than those of `model`.

    Where those are spread over processes, all of them have to call this.

    Args:
        model: patched or not.
        module: one of its attention modules.
        saved: the fingerprint in the folder; empty where it has none (earlier releases).
        directory: in the message.
    """
    found = base_fingerprint(model, module, gathers=is_spread(model.modules())) if saved else ""
    if found and found != saved:
        logger.warning(
            "The splice in %s was saved on a model of the same shape with other weights, and may lose much on this "
            "one. Calibrate this model, unless one was tuned from the other, or is the other in another precision "
            "(float16, quantised).",
            directory,
        )


def stamp_of_weights(decoder: nn.Module, others: Iterable[nn.Module]) -> list[tuple[int, int, int]]:
    """Another one after a weight was written to, replaced or moved."""
    left_out, stamp = {id(part) for part in others}, []
    for _, owner, name in persistent_names(decoder):
        if id(owner) not in left_out:
            held: Any = owner._parameters.get(name)
            stamp.append(_stamp_of(owner._buffers[name] if held is None else held))
    return stamp


def _stamp_of(tensor: Any) -> tuple[int, int, int]:
    try:
        return id(tensor), tensor.data_ptr(), tensor._version
    except RuntimeError:  # made of several tensors, or in inference mode, where no versions are counted
        return id(tensor), 0, -1
