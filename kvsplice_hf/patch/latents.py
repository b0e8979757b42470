"""The attention function of patched MLA modules: absorbed on codes, the stock one on expanded keys and values."""

from typing import Any

import torch

from kvsplice_hf.cache.pages import PagedStates
from kvsplice_hf.cache.rows import CompressedLatent
from kvsplice_hf.patch.absorbed import absorbed_attention
from kvsplice_hf.patch.attention import attend_expanded


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
        assert key.weight is not None  # `expand_kv` has asked for it, for this call
        return absorbed_attention(
            query,
            key,
            key.weight,
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
