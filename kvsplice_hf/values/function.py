"""The attention function of modules whose values are pruned.

Legend: `B` batch, `T` queries, `S` stored tokens, `H` query heads, `K` key heads, `F` first tokens, `M` slots, `d`, `v`
sizes of a key and of a value.
"""

from typing import Any

import torch

from kvsplice_hf import upstream
from kvsplice_hf.errors import UnsupportedError
from kvsplice_hf.patch.attention import attend_expanded
from kvsplice_hf.patch.names import WRAPPED_ATTENTION
from kvsplice_hf.retention.scores import real_tokens
from kvsplice_hf.retention.selection import Extent
from kvsplice_hf.values.attention import attend, bias_of
from kvsplice_hf.values.layer import LayerPlan, SomeValues


NAME_PREFIX = "kvsplice_values_"
# What else attention functions are told, and this one does.
_KNOWN = frozenset({"s_aux", "softcap", "sliding_window", "is_causal"})


def register() -> None:
    """Make our attention functions, and the masks they need, known to transformers under names of ours."""
    for base in WRAPPED_ATTENTION:
        upstream.register_attention_function(NAME_PREFIX + base, _attend, base)


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor | SomeValues,
    mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    base = module.config._attn_implementation.removeprefix(NAME_PREFIX)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not isinstance(value, SomeValues):  # a layer with a window, which is left as it is
        return attend_expanded(module, query, key, value, mask, base=base, scaling=scaling, dropout=dropout, **kwargs)
    further = upstream.further_arguments(kwargs, _KNOWN)
    further += ["dropout"] if dropout else []
    further += ["sliding_window"] if kwargs.get("sliding_window") is not None else []
    if further:
        raise UnsupportedError(
            f"Value pruning does not know what {', '.join(f'`{name}`' for name in further)} of "
            f"{type(module).__name__} does to attention. Run this model without it."
        )
    return _on_some_values(
        query, key, value, mask, scaling, kwargs.get("softcap"), kwargs.get("s_aux"), return_weights=base == "eager"
    )


def _on_some_values(
    query: torch.Tensor,
    key: torch.Tensor,
    value: SomeValues,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
    *,
    return_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of queries [B, H, T, d] over first tokens, tokens in slots and new ones; then the choice among them."""
    layer, plan, new, length, count = value.layer, value.plan, value.new, key.shape[2], query.shape[2]
    assert layer.positions is not None
    assert layer.first_positions is not None
    assert layer.first_values is not None
    extent = Extent(length, real_tokens(mask, length))
    codes, read = new, new
    if plan.geometry is not None:
        codes = plan.geometry.encode(new)
        read = _as_read(new, plan, codes, extent)
    heads = new.shape[1]
    first = layer.first_positions[:, None].expand(-1, heads, -1)
    own = extent.positions(count, key.device)[:, None].expand(len(key), heads, -1)
    positions = torch.cat([first, layer.positions, own], dim=-1)
    old = positions[..., :-count].clamp_min(0).long()[..., None].expand(-1, -1, -1, key.shape[-1])
    keys = torch.cat([key.gather(2, old), key[:, :, length - count :]], dim=2)
    sizes = [first.shape[-1], layer.positions.shape[-1], count]

    def mix(shares: torch.Tensor) -> torch.Tensor:
        of_first, of_slots, of_new = shares.split(sizes, dim=-1)
        mixed = of_new @ read
        if first.shape[-1]:
            mixed = mixed + of_first @ layer.first_values
        if not sizes[1]:
            return mixed
        if plan.geometry is None:
            return mixed + of_slots @ layer.values
        return mixed + plan.geometry.mix(of_slots, layer.values)

    def bias(start: int, end: int) -> torch.Tensor:
        part = None if mask is None else mask[:, :, start:end]
        return bias_of(part, positions, length - count + start, end - start)

    counted = None if extent.real is None else extent.real[:, length - count :]
    scored = attend(
        query, keys, mix, bias, counted, scaling=scaling, softcap=softcap, sinks=sinks, return_weights=return_weights
    )
    layer.keep_first(new, extent)
    layer.keep(plan, codes, scored.received[..., sizes[0] :], extent)
    return scored.output, None if scored.weights is None else _spread(scored.weights, positions, length)


def _as_read(new: torch.Tensor, plan: LayerPlan, codes: torch.Tensor, extent: Extent) -> torch.Tensor:
    """New values [B, K, T, v] as the call that brings them reads them."""
    if plan.geometry is None or not plan.compresses_first:
        return new
    is_first = extent.ranks(new.shape[2], new.device) < plan.budget.first
    return torch.where(is_first[:, None, :, None], new, plan.geometry.decode(codes))


def _spread(weights: torch.Tensor, positions: torch.Tensor, length: int) -> torch.Tensor:
    """Weights [B, H, T, N] of tokens at positions [B, K, N] at their places among all, [B, H, T, S]."""
    places = positions.clamp_min(0).long().repeat_interleave(weights.shape[1] // positions.shape[1], dim=1)
    spread = weights.new_zeros(*weights.shape[:3], length)
    return spread.scatter_add(-1, places[:, :, None].expand_as(weights), weights)
