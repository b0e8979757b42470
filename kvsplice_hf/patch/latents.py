"""The attention function of patched MLA modules: absorbed on codes, the stock one on expanded keys and values."""

from typing import Any

import torch
from torch import nn

from kvsplice_hf.cache.pages import PagedStates
from kvsplice_hf.cache.rows import CompressedLatent
from kvsplice_hf.errors import FoldingError
from kvsplice_hf.patch.absorbed import absorbed_attention
from kvsplice_hf.patch.attention import attend_expanded
from kvsplice_hf.weights.offload import read_parameter
from kvsplice_hf.weights.sharding import part_of_process


def foldable_weight(module: Any) -> torch.Tensor | None:
    """The weight of a plain linear layer, or None where it is not what the layer multiplies by.

    Packed (bitsandbytes, fp8) and adapted (LoRA) layers have a forward of their own, sharded ones a tensor type of
    their own. Of one that tensor parallelism has divided it is the part for the heads of this process.
    """
    weight: Any = getattr(module, "weight", None)
    plain = type(module).forward is nn.Linear.forward and type(weight) in (nn.Parameter, torch.Tensor)
    if plain and weight.is_floating_point():
        return read_parameter(module, "weight")
    return part_of_process(module) if type(module).forward is nn.Linear.forward else None


def unfoldable_message(kv_b_proj: nn.Module) -> str:
    """Why `kv_b_proj` cannot be folded, and what to do."""
    return (
        f'attention="absorbed" folds the weight of kv_b_proj, but it is a {type(kv_b_proj).__name__} (packed, adapted '
        'or sharded), not a plain linear layer. Use attention="auto" or "expanded", merge the adapter, or leave '
        "kv_b_proj out of the quantisation."
    )


def attend_latents(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor | CompressedLatent | PagedStates,
    value: torch.Tensor | CompressedLatent | PagedStates,
    attention_mask: torch.Tensor | None,
    *,
    base: str,
    scaling: float,
    dropout: float = 0.0,
    indices: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Absorbed attention on codes, the attention function `base` on keys and values.

    Sparse-attention modules hand over the indices of the selected rows instead of a mask when the name of the attention
    function is not one they know.
    """
    if isinstance(key, PagedStates):
        settings = {name: kwargs[name] for name in ("s_aux",) if name in kwargs}

        def attend(query: torch.Tensor, rows: CompressedLatent, mask: torch.Tensor) -> torch.Tensor:
            # Not the class's method: the one of the patch, which decodes the rows or passes them on.
            key, value = module.expand_kv(rows, rows)
            output, _ = attend_latents(
                module, query, key, value, mask, base=base, scaling=scaling, dropout=dropout, **settings
            )
            return output

        return key.attend(query, module.v_head_dim, attend), None
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
