"""A splice that belongs to the model: built in by its constructor, trained and saved with it.

The model is patched as any other MLA model, so that caches, absorbed attention, calibration and fine-tuning need no
second way. What differs is that the parameters of the splice are the model's own: `save_pretrained` writes them.
"""

from torch import nn

from kvsplice_hf.config import KVSpliceConfig
from kvsplice_hf.patch.apply import unpatch_model
from kvsplice_hf.patch.state import is_patched, models_around
from kvsplice_hf.patch.surroundings import save_splice_with_model
from kvsplice_hf.patching import patch_model_with_kvsplice


def build_in_splice(model: nn.Module, config: KVSpliceConfig) -> None:
    """Patch a model from within its constructor, and let `save_pretrained` write the splice.

    Args:
        model: a `PreTrainedModel`, all its layers there. One inside it that has its splice built in already hands it
            over: a patch belongs on the outermost model, which is the one that generates.
        config: the settings; `compression_ratio` or `rank`, not "svd".
    """
    if is_patched(model):
        unpatch_model(model)
    patch_model_with_kvsplice(model, config)
    for around in models_around(model):
        save_splice_with_model(around)


def has_built_in_splice(model: nn.Module) -> bool:
    """Whether the splice of `model` is its own: not removed by `unpatch_model`, nor replaced by another one."""
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    return is_patched(model) and not any(".kvsplice." in key for key in ignored)
