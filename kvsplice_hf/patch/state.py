"""What of a model is patched, and how it runs in this thread. Changes nothing.

The patch belongs to the layers: everything here looks for patched layers in what it is given, be it the model that was
patched, something around it, or a part of it.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from kvsplice_hf.call import Listener, SpliceState, current_state, states_of_thread
from kvsplice_hf.code.heads import HeadSplices, PartKey
from kvsplice_hf.code.projection import LearnedKVSplice
from kvsplice_hf.config import KVSpliceConfig
from kvsplice_hf.errors import PatchStateError
from kvsplice_hf.patch.families import AttentionSite
from kvsplice_hf.patch.site_patch import PATCH_ATTRIBUTE, SitePatch
from kvsplice_hf.patch.sites import sites_of


@dataclass(eq=False)
class ModelPatch:
    """What the patched layers of one model have in common. Each of them refers to it, and it refers to none.

    So a patch belongs to the layers, whoever wraps or unwraps the model that has them. A copied or pickled model has a
    patch of its own.

    Attributes:
        config: the settings in force.
        known_base: what the fingerprint of the base model was made of, and what it was (`patch.base`).
    """

    config: KVSpliceConfig
    known_base: tuple[Any, str] = (None, "")


@contextlib.contextmanager
def splice_disabled(model: nn.Module) -> Iterator[None]:
    """Within this context the patched model computes exactly what the unpatched one would, on the same weights.

    For comparing the two without a second copy in memory. It holds for the thread that enters it and not for others,
    which may run the spliced model at the same time; a thread that is started inside runs the spliced model as well. A
    cache belongs to one of the two: a spliced one cannot be continued inside the context, nor a stock one outside.

    Raises:
        PatchStateError: the model is not patched.

    Examples:
        >>> with splice_disabled(model):
        ...     original = model(input_ids, use_cache=False).logits
    """
    with states_of_thread((patch, replace(current_state(patch), enabled=False)) for patch in _patches(model)):
        yield


@contextlib.contextmanager
def told_of_round_trips(model: nn.Module, listener: Listener) -> Iterator[None]:
    """Within this context, in this thread, `listener` is told of each round trip: module, latent, decoded latent.

    Raises:
        PatchStateError: the model is not patched.
    """
    with states_of_thread((patch, SpliceState(on_round_trip=listener)) for patch in _patches(model)):
        yield


def is_patched(model: nn.Module) -> bool:
    """Whether `model`, or a part of it, is patched."""
    return any(PATCH_ATTRIBUTE in vars(module) for module in model.modules())


def find_patch(model: nn.Module) -> tuple[Any, ModelPatch]:
    """The outermost model of transformers in `model` that has patched layers (or `model`, without one), and its patch.

    Raises:
        PatchStateError: the model is not patched.
    """
    patch = _patches(model)[0]
    return next(iter(models_around(model)), model), patch


def _patches(model: nn.Module) -> list[ModelPatch]:
    """All patches of layers in `model`: one, unless several models were patched apart and put together.

    Raises:
        PatchStateError: the model is not patched.
    """
    found = {id(state.patch): state.patch for _, state in patched_modules(model)}
    if not found:
        raise PatchStateError(
            f"This {type(model).__name__} is not patched with KVSplice, so there is nothing to save, read or undo. "
            "patch_model_with_kvsplice(model) patches it."
        )
    return list(found.values())


def patched_modules(model: nn.Module) -> Iterator[tuple[tuple[str, nn.Module], SitePatch]]:
    for name, module in model.named_modules():
        if PATCH_ATTRIBUTE in vars(module):
            yield (name, module), vars(module)[PATCH_ATTRIBUTE]


def patched_sites(model: nn.Module) -> list[tuple[AttentionSite, SitePatch]]:
    """The patched MLA layers of a patched model that store a latent, by ascending `layer_idx`.

    Raises:
        PatchStateError: the model is not patched.
    """
    return [(site, state) for site, state in all_patched_sites(model) if site.stores_latent]


def splice_parts_of(model: nn.Module) -> dict[PartKey, LearnedKVSplice]:
    """The splices of the layers that store a latent, and of the key heads of those with ordinary attention.

    Raises:
        PatchStateError: the model is not patched.
    """
    return {
        part: splice
        for site, patched in patched_sites(model)
        for part, splice in zip(
            site.parts, patched.splice if isinstance(patched.splice, HeadSplices) else [patched.splice], strict=True
        )
    }


def all_patched_sites(model: nn.Module) -> list[tuple[AttentionSite, SitePatch]]:
    """`patched_sites`, and the layers that read the latent of another one.

    Raises:
        PatchStateError: the model is not patched.
    """
    patch = _patches(model)[0]
    modules = [named for named, state in patched_modules(model) if state.patch is patch]
    return [(site, vars(site.module)[PATCH_ATTRIBUTE]) for site in sites_of(modules)]


def models_around(model: nn.Module) -> list[Any]:
    """The models of transformers in `model` (itself, perhaps) that patched layers are in, the outermost first."""
    patched = [f"{name}." for (name, _), _ in patched_modules(model)]
    return [
        module
        for path, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and any(name.startswith(f"{path}.") or not path for name in patched)
    ]
