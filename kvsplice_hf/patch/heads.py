"""The attention function of patched modules with ordinary attention.

Legend: `B` batch, `T` queries, `S` stored tokens, `H` query heads, `K` key heads, `G` = H / K, `d`, `v` sizes of a key
and of a value.
"""

import functools
from typing import Any

import torch

from kvsplice_hf import upstream
from kvsplice_hf.cache.heads import CompressedHeads
from kvsplice_hf.call import note_expansion, running_call
from kvsplice_hf.patch.absorbed import absorbed_attention
from kvsplice_hf.patch.attention import attend_expanded
from kvsplice_hf.patch.sequences import round_trip_of_sequences
from kvsplice_hf.patch.site_patch import PATCH_ATTRIBUTE, SitePatch, title_of


# Arguments that change scores, and that attention on rows does as well.
_DONE_ON_ROWS = frozenset({"sliding_window", "s_aux"})


def attend_heads(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor | CompressedHeads,
    value: torch.Tensor | CompressedHeads,
    attention_mask: torch.Tensor | None,
    *,
    base: str,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of queries [B, H, T, d] over compressed heads, or over keys and values after their round trip.

    A single new token attends to rows as they are stored. Several (a prompt) have them decoded, for the attention
    function `base`, as does whatever is asked of it that attention on rows does not do (soft caps, biases by position).
    """
    note_expansion()
    patched: SitePatch = getattr(module, PATCH_ATTRIBUTE)

    def stock(key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return attend_expanded(
            module, query, key, value, attention_mask, base=base, scaling=scaling, dropout=dropout, **kwargs
        )

    if not isinstance(key, CompressedHeads):
        assert isinstance(value, torch.Tensor)
        return stock(*without_cache(module, patched, key, value))
    refused = decoding_refusal(module, patched) or upstream.further_arguments(kwargs, _DONE_ON_ROWS)
    if query.shape[2] > 1 or key.fresh is not None or refused:
        return stock(*key.keys_and_values())
    sinks = kwargs.get("s_aux")
    heads = zip(
        query.chunk(len(key.heads), dim=1),
        key.heads,
        [None] * len(key.heads) if sinks is None else sinks.chunk(len(key.heads)),
        strict=True,
    )
    found = [
        absorbed_attention(
            part,
            latent,
            _values_as_they_are(part.shape[1], latent.splice.latent_dim, part.dtype, part.device),
            latent.splice.latent_dim,
            attention_mask,
            scaling,
            dropout=dropout,
            sliding_window=kwargs.get("sliding_window"),
            learned_sinks=own_sinks,
            return_weights=base == "eager",
        )
        for part, latent, own_sinks in heads
    ]
    weights = [weight for _, weight in found if weight is not None]
    return torch.cat([output for output, _ in found], dim=2), torch.cat(weights, dim=1) if weights else None


def decoding_refusal(module: Any, patched: SitePatch) -> str | None:
    """Why a step of one token does not attend to rows as they are stored, or None where it does."""
    if patched.by_itself:
        return "the module computes attention by itself, on plain keys and values"
    if patched.mode == "expanded":
        return 'attention="expanded" was asked for'
    if getattr(module, "attn_logit_softcapping", None) is not None:
        return "the model caps its scores (soft cap), which attention on rows does not do"
    return None


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)  # kept beyond the call, which may be in it
def _values_as_they_are(queries: int, value_dim: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What MLA would expand latents by: nothing of them meets a query, and values are latents, [G v, v]."""
    return torch.eye(value_dim, dtype=dtype, device=device).repeat(queries, 1)


def without_cache(
    module: Any, patched: SitePatch, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of whole sequences after their round trip, the first ones exact."""
    call = running_call(module)
    if call is None:
        raise upstream.changed(
            title_of(module),
            "the attention function was reached past the hook before the forward of the module, which sees the cache. "
            "Call the module itself, not its `forward`.",
        )
    if not call.state.enabled:
        return key, value
    if call.reads_cache:
        raise upstream.changed(
            title_of(module), "it got a spliced cache, but handed plain keys to the attention function."
        )
    if key.shape[1] != patched.geometry.heads:
        raise upstream.changed(
            title_of(module),
            f"it handed {key.shape[1]} key heads to the attention function, where its cache gets "
            f"{patched.geometry.heads}: it does something with keys in between.",
        )
    values, keys = round_trip_of_sequences(module, patched, call, value, key)
    return keys, values
