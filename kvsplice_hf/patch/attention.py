"""The attention function of patched modules: what a family does on compressed states, or the stock one."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from kvsplice_hf import upstream
from kvsplice_hf.call import running_call
from kvsplice_hf.errors import UnsupportedError
from kvsplice_hf.patch.names import NAME_PREFIX, PATCH_ATTRIBUTE, WRAPPED_ATTENTION


def register_attention() -> None:
    """Make our attention functions, and the masks they need, known to transformers under names of ours."""
    for base in WRAPPED_ATTENTION:
        upstream.register_attention_function(NAME_PREFIX + base, functools.partial(_attend, base=base), base)


def _attend(module: Any, *args: Any, base: str, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention function registered under our names: that of the module's family, or the stock one.

    (Modules that are not patched may share their settings with modules that are.)
    """
    patched = getattr(module, PATCH_ATTRIBUTE, None)
    return (attend_expanded if patched is None else patched.attend)(module, *args, base=base, **kwargs)


def attend_expanded(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    base: str,
    scaling: float,
    dropout: float = 0.0,
    indices: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention function `base` of transformers, under a name that the module does not know."""
    if indices is not None:
        attention_mask = _mask_unselected(attention_mask, indices, key.shape[2], query.dtype)
    attend = _sdpa if base == "sdpa" else _eager_of(module.__class__)
    return attend(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def _sdpa(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """SDPA of transformers, on a CPU with heads of one size.

    PyTorch's fused attention for CPUs wants keys and values of the same size, which those of MLA are not. What it does
    instead holds the scores of all pairs of tokens, and takes several times as long. Zeros behind the shorter ones
    change nothing: they add nothing to a score, and what they make of the output is cut off.
    """
    attend, value_dim = upstream.attention_function("sdpa"), value.shape[-1]
    missing = key.shape[-1] - value_dim
    call = running_call(module)
    as_stock = call is None or not call.state.enabled  # to the last bit
    if as_stock or missing == 0 or query.device.type != "cpu" or query.shape[2] == 1:
        return attend(module, query, key, value, mask, **kwargs)
    query, key = (F.pad(states, (0, max(-missing, 0))) for states in (query, key))
    output, _ = attend(module, query, key, F.pad(value, (0, max(missing, 0))), mask, **kwargs)
    return output[..., :value_dim], None


def _mask_unselected(mask: torch.Tensor | None, indices: torch.Tensor, keys: int, dtype: torch.dtype) -> torch.Tensor:
    """Fold the indices [B, T, k] of selected rows into the mask [B, 1, T, S], as eager and SDPA modules do."""
    selected = torch.zeros(*indices.shape[:2], keys, dtype=torch.bool, device=indices.device)
    selected = selected.scatter_(-1, indices.long(), True)[:, None]
    if mask is None:
        return selected
    if mask.dtype == torch.bool:
        return mask & selected
    return mask.masked_fill(~selected, torch.finfo(dtype).min)


@functools.cache
def _eager_of(attention_class: Any) -> Callable[..., Any]:
    """The eager attention function of the file that defines the module: there is one "eager" per file."""
    for parent in attention_class.__mro__:
        function = getattr(sys.modules[parent.__module__], "eager_attention_forward", None)
        if function is not None:
            return function
    raise UnsupportedError(
        f"{attention_class.__module__} defines no `eager_attention_forward`. Load the model with "
        'attn_implementation="sdpa" before patching.'
    )
