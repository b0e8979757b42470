"""`merge_kvsplice` and `unmerge_kvsplice`: the transform folded into the projections, for inference.

A splice works on `softplus(scale) * c + shift`. While it is trained, that is applied at every step, and the matrix that
attention reads codes with is divided by the scale at every step, R x r numbers. Merged, both are done once.

Legend: `R` kv_lora_rank, `r` spliced rank.
"""

from typing import TypeVar

from torch import nn

from kvsplice_hf.errors import FoldingError, PatchStateError
from kvsplice_hf.patch.state import patched_sites


ModelT = TypeVar("ModelT", bound=nn.Module)


def merge_kvsplice(model: ModelT) -> ModelT:
    """Fold the transform of every splice into its two projections, in place.

    The model computes the same but for rounding, with fewer operations per step. It cannot be trained until
    `unmerge_kvsplice`. Parameters stay as they are, so that saving, loading and unpatching work as before; loading
    other parameters unmerges.

    Returns:
        `model` itself.

    Raises:
        PatchStateError: the model is not patched, or a layer is merged already.
        FoldingError: folded weights are not finite in the dtype of the splice. The model is as it was.

    Examples:
        >>> merge_kvsplice(load_kvsplice(model, "my-splice")).generate(**inputs)
    """
    splices = {site.layer_idx: patched.splice for site, patched in patched_sites(model)}
    merged = [layer_idx for layer_idx, splice in splices.items() if splice.is_merged]
    if merged:
        raise PatchStateError(f"The splices of layers {merged} are already merged. Call unmerge_kvsplice(model) first.")
    for layer_idx, splice in splices.items():
        try:
            splice.merge()
        except FoldingError as error:
            for other in splices.values():
                if other.is_merged:
                    other.unmerge()
            raise FoldingError(f"Layer {layer_idx}: {error}") from error
    return model


def unmerge_kvsplice(model: ModelT) -> ModelT:
    """Undo `merge_kvsplice`, bit-exactly.

    Returns:
        `model` itself.

    Raises:
        PatchStateError: the model is not patched, or no layer is merged.
    """
    merged = [patched.splice for _, patched in patched_sites(model) if patched.splice.is_merged]
    if not merged:
        raise PatchStateError("The model is not merged. Call merge_kvsplice(model) first.")
    for splice in merged:
        splice.unmerge()
    return model
