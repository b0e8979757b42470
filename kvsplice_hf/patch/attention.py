"""The attention function of patched modules, and the names under which transformers finds it."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from kvsplice_hf import upstream
from kvsplice_hf.cache.pages import PagedLatent
from kvsplice_hf.cache.rows import CompressedLatent
from kvsplice_hf.call import running_call
from kvsplice_hf.errors import FoldingError, UnsupportedError
from kvsplice_hf.patch.absorbed import absorbed_attention
from kvsplice_hf.weights.offload import read_parameter


# Attention functions that the absorbed one can stand in for; others (flash, flex) keep the expanded path.
WRAPPED_ATTENTION = ("eager", "sdpa")
_NAME_PREFIX = "kvsplice_"


class AttentionName(str):
    """Our name for the attention function `base`, as the settings of a patched model hold it.

    Settings are copied to where nobody has made our name known: for another model, or pickled for another process. What
    arrives there is the name of the function that ours stands in for. With the model itself our name is copied as well:
    `SitePatch` sees to that.
    """

    base: str

    def __new__(cls, base: str) -> "AttentionName":
        name = super().__new__(cls, _NAME_PREFIX + base)
        name.base = base
        return name

    def __reduce__(self) -> tuple[type[str], tuple[str]]:  # for `pickle` and `copy`
        return str, (self.base,)


def register_attention() -> None:
    """Make our attention functions, and the masks they need, known to transformers under names of ours."""
    for base in WRAPPED_ATTENTION:
        function = functools.partial(_kvsplice_attention, base=base)
        upstream.register_attention_function(_NAME_PREFIX + base, function, base)


def wrapped_name(base: str) -> AttentionName | None:
    """Our name for the attention function `base`, or None where we have none."""
    if isinstance(base, AttentionName):  # the settings are shared with a model that is patched
        return base
    base = base.removeprefix(_NAME_PREFIX)
    return AttentionName(base) if base in WRAPPED_ATTENTION else None


def is_ours(module: Any) -> bool:
    """Whether a module looks up an attention function of ours."""
    return (module.config._attn_implementation or "").startswith(_NAME_PREFIX)


def foldable_weight(module: Any) -> torch.Tensor | None:
    """The weight of a plain linear layer, or None where it is not what the layer multiplies by.

    Packed (bitsandbytes, fp8) and adapted (LoRA) layers have a forward of their own, sharded ones a tensor type of
    their own.
    """
    weight: Any = getattr(module, "weight", None)
    plain = type(module).forward is nn.Linear.forward and type(weight) in (nn.Parameter, torch.Tensor)
    return read_parameter(module, "weight") if plain and weight.is_floating_point() else None


def unfoldable_message(kv_b_proj: nn.Module) -> str:
    """Why `kv_b_proj` cannot be folded, and what to do."""
    return (
        f'attention="absorbed" folds the weight of kv_b_proj, but it is a {type(kv_b_proj).__name__} (packed, adapted '
        'or sharded), not a plain linear layer. Use attention="auto" or "expanded", merge the adapter, or leave '
        "kv_b_proj out of the quantisation."
    )


def _kvsplice_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor | CompressedLatent | PagedLatent,
    value: torch.Tensor | CompressedLatent | PagedLatent,
    attention_mask: torch.Tensor | None,
    *,
    base: str,
    scaling: float,
    dropout: float = 0.0,
    indices: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention function registered under our names: absorbed on codes, `base` on keys and values.

    Sparse-attention modules hand over the indices of the selected rows instead of a mask when the name of the attention
    function is not one they know.
    """
    if isinstance(key, PagedLatent):
        settings = {name: kwargs[name] for name in ("s_aux",) if name in kwargs}
        attend = functools.partial(_kvsplice_attention, base=base, scaling=scaling, dropout=dropout, **settings)
        return key.attend(module, query, attend)
    if isinstance(key, CompressedLatent):
        weight = foldable_weight(module.kv_b_proj)
        if weight is None:
            raise FoldingError(unfoldable_message(module.kv_b_proj))
        return absorbed_attention(
            query,
            key,
            weight,
            module.v_head_dim,
            attention_mask,
            scaling,
            dropout=dropout,
            sliding_window=kwargs.get("sliding_window"),
            indices=indices,
            learned_sinks=kwargs.get("s_aux"),
            return_weights=base == "eager",
        )
    assert isinstance(value, torch.Tensor)
    return attend_expanded(
        module,
        query,
        key,
        value,
        attention_mask,
        base=base,
        scaling=scaling,
        dropout=dropout,
        indices=indices,
        **kwargs,
    )


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
