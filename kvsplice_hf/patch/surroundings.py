"""What the patch changes on the models of transformers around patched layers, and how that is undone."""

import functools
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from kvsplice_hf import upstream
from kvsplice_hf.cache.batching import init_continuous_batching
from kvsplice_hf.patch.families import AttentionSite
from kvsplice_hf.patch.hooks import carry_state, see_batch
from kvsplice_hf.patch.saving import save_splice_of
from kvsplice_hf.patch.state import ModelPatch, is_patched, models_around, patched_modules, patched_sites
from kvsplice_hf.weights.offload import persistent_names


logger = logging.getLogger(__name__)

# On the decoders and models around the patched layers: what the patch changed there.
_SURROUNDINGS_ATTRIBUTE = "_kvsplice_surroundings"
_SAVE_METHOD = "save_pretrained"
# Arguments of `save_pretrained` that are for the upload.
_HUB_ARGUMENTS = ("commit_message", "create_pr", "max_shard_size", "private", "revision", "token")


@dataclass
class _Surroundings:
    """What the patch changed on a model of transformers around patched layers, kept there.

    Attributes:
        hooks: of the outermost model and of the decoder that runs the layers: before their forward, and before weights
            are loaded into the latter.
        keys_to_ignore_on_save: `_keys_to_ignore_on_save` before the patch, where it was changed.
    """

    hooks: list[RemovableHandle] = field(default_factory=list)
    keys_to_ignore_on_save: tuple[Any] | None = None


def change_surroundings(model: nn.Module, sites: list[AttentionSite], patch: ModelPatch) -> None:
    """On the models of transformers around the layers: state for checkpointed layers, saving, continuous batching."""
    decoders = {id(decoder) for decoder in _decoders(model, sites)}
    for index, around in enumerate(models_around(model)):
        changed = _Surroundings()
        if index == 0:
            changed.hooks.append(around.register_forward_pre_hook(see_batch, with_kwargs=True))
        if id(around) in decoders:
            hook = functools.partial(carry_state, patch)
            changed.hooks.append(around.register_forward_pre_hook(hook, with_kwargs=True))
            changed.hooks.append(around.register_load_state_dict_pre_hook(_warn_without_splice))
        # Not from `state_dict`: bitsandbytes rearranges the weights of its layers when it is asked for one.
        keys = {key for key, _, _ in persistent_names(around) if ".kvsplice." in key}
        if keys:  # the base model's folder stays loadable by stock transformers
            changed.keys_to_ignore_on_save = (around._keys_to_ignore_on_save,)
            around._keys_to_ignore_on_save = set(around._keys_to_ignore_on_save or ()) | keys
            setattr(around, _SAVE_METHOD, functools.partial(_save_pretrained, around))
        if hasattr(around, upstream.BATCHING_METHOD):
            setattr(around, upstream.BATCHING_METHOD, functools.partial(_init_continuous_batching, around))
        setattr(around, _SURROUNDINGS_ATTRIBUTE, changed)


def restore_surroundings(model: nn.Module) -> None:
    around: Any
    for around in model.modules():
        changed: _Surroundings | None = vars(around).pop(_SURROUNDINGS_ATTRIBUTE, None)
        if changed is None:
            continue
        for hook in changed.hooks:
            hook.remove()
        save_splice_with_model(around, changed)
        vars(around).pop(upstream.BATCHING_METHOD, None)
        upstream.drop_persistent_manager(around)  # it has pages of our rows


def save_splice_with_model(around: Any, changed: _Surroundings | None = None) -> None:
    """Let `save_pretrained` of a model around patched layers write the splice like any other part of it."""
    changed = vars(around)[_SURROUNDINGS_ATTRIBUTE] if changed is None else changed
    if changed.keys_to_ignore_on_save is not None:
        (around._keys_to_ignore_on_save,) = changed.keys_to_ignore_on_save
        changed.keys_to_ignore_on_save = None
        vars(around).pop(_SAVE_METHOD, None)


def _save_pretrained(
    around: Any,
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: dict[str, torch.Tensor] | None = None,
    push_to_hub: bool = False,
    *rest: Any,
    **kwargs: Any,
) -> None:
    """`save_pretrained` around patched layers: the base model, as stock transformers loads it, and the splice.

    The splice is written beside it, in the files of `save_kvsplice`. A folder with the name that the `Trainer` gives
    its checkpoints gets the splice among the weights as well: those are all that it resumes from.
    """
    # Of a file in the place of the folder, and of a model whose layers were unpatched alone, transformers sees to it.
    spliced = is_patched(around) and not Path(save_directory).is_file()
    if spliced:
        save_splice_of(around, save_directory, state_dict, is_main_process=is_main_process)
    before = around._keys_to_ignore_on_save
    if spliced and Path(save_directory).name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"):
        (around._keys_to_ignore_on_save,) = vars(around)[_SURROUNDINGS_ATTRIBUTE].keys_to_ignore_on_save
    try:
        type(around).save_pretrained(
            around, save_directory, is_main_process, state_dict, push_to_hub and not spliced, *rest, **kwargs
        )
    finally:
        around._keys_to_ignore_on_save = before
    if push_to_hub and spliced and is_main_process:  # all of a folder, and not only what transformers wrote itself
        hub = {name: value for name, value in kwargs.items() if name in _HUB_ARGUMENTS}
        around.push_to_hub(kwargs.get("repo_id", Path(save_directory).name), **hub)


def _warn_without_splice(decoder: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Before weights are loaded into a decoder with patched layers: say so if they are the base model's alone."""
    paths = [name for (name, _), _ in patched_modules(decoder)]
    loaded = [name for name in paths if f"{prefix}{name}.kv_b_proj.weight" in state_dict]
    if loaded and not any(".kvsplice." in key for key in state_dict):
        logger.warning(
            "Weights that hold no splice are loaded into a patched model (%s and %d more layers): the splice in memory "
            "stays as it is, trained or not. If one was saved with them, load it as well: load_kvsplice(model, "
            "folder).",
            loaded[0],
            len(loaded) - 1,
        )


def _decoders(model: nn.Module, sites: list[AttentionSite]) -> list[nn.Module]:
    """The innermost models of transformers around the sites: what runs their layers one after the other."""
    modules = [(path, module) for path, module in model.named_modules() if isinstance(module, PreTrainedModel)]
    found = {}
    for site in sites:
        around = [(len(path), module) for path, module in modules if not path or site.name.startswith(f"{path}.")]
        if around:
            decoder = max(around, key=lambda item: item[0])[1]
            found[id(decoder)] = decoder
    return list(found.values())


def _init_continuous_batching(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return init_continuous_batching(model, patched_sites(model), *args, **kwargs)
