"""The attention function of patched modules with ordinary attention.

Legend: `B` batch, `T` queries, `S` stored tokens, `H` query heads, `K` key heads, `G` = H / K, `d`, `v` sizes of a key
and of a value.
"""

from typing import Any

import torch

from kvsplice_hf import upstream
from kvsplice_hf.attend.backend import HeadsStep
from kvsplice_hf.attend.heads import decode_heads
from kvsplice_hf.cache.heads import CompressedHeads
from kvsplice_hf.cache.pages import PagedStates
from kvsplice_hf.call import note_expansion, running_call
from kvsplice_hf.errors import UnsupportedError
from kvsplice_hf.patch.attention import attend_expanded
from kvsplice_hf.patch.head_attention import attention_on_heads
from kvsplice_hf.patch.sequences import round_trip_of_sequences
from kvsplice_hf.patch.shares import as_bias, four_dimensional
from kvsplice_hf.patch.site_patch import PATCH_ATTRIBUTE, SPLINE_REFUSAL, SitePatch, title_of


# Arguments that change scores, and that attention on rows does as well.
_DONE_ON_ROWS = frozenset({"sliding_window", "s_aux"})
# Those that are the same for each request of a packed batch (continuous batching).
_SAME_FOR_ALL = ("s_aux", "softcap")


def attend_heads(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor | CompressedHeads | PagedStates,
    value: torch.Tensor | CompressedHeads | PagedStates,
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

    if isinstance(key, PagedStates):
        return _attend_pages(module, query, key, base=base, scaling=scaling, dropout=dropout, **kwargs), None
    if not isinstance(key, CompressedHeads):
        assert isinstance(value, torch.Tensor)
        return stock(*without_cache(module, patched, key, value))
    refused = decoding_refusal(module, patched) or upstream.further_arguments(kwargs, _DONE_ON_ROWS)
    if query.shape[2] > 1 or key.fresh is not None or refused:
        return stock(*key.keys_and_values())
    sinks, wants_weights = kwargs.get("s_aux"), base == "eager"
    mask = four_dimensional(attention_mask, key, 1, kwargs.get("sliding_window"))

    if dropout or wants_weights or query.device.type != "cpu":
        return attention_on_heads(
            query, key.heads, mask, scaling, dropout=dropout, learned_sinks=sinks, return_weights=wants_weights
        )
    return attention_of_step(query, key, mask, scaling, sinks), None


def attention_of_step(
    query: torch.Tensor,
    rows: CompressedHeads,
    mask: torch.Tensor | None,
    scaling: float,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention [B, 1, H, v] of one new token of each sequence on rows, by whichever backend serves it.

    Args:
        query: [B, H, 1, d].
        rows: what is stored, the new tokens included.
        mask: boolean or added to scores, [B or 1, 1, 1, S]; None where all is seen.
        scaling: factor on the scores.
        sinks: learned, of each query head, [H].
    """

    def in_torch() -> torch.Tensor:
        return attention_on_heads(query, rows.heads, mask, scaling, learned_sinks=sinks)[0]

    return decode_heads(step_of_heads(query, rows, mask, scaling, sinks), in_torch)


def step_of_heads(
    query: torch.Tensor, key: CompressedHeads, mask: torch.Tensor | None, scaling: float, sinks: torch.Tensor | None
) -> HeadsStep:
    """A decode step, arguments as of `attention_of_step`."""
    return HeadsStep(
        query=query,
        rows=key.rows,
        splices=key.splice,
        identity=key.identity,
        turns=key.turns,
        exact=None if key.exact is None else key.exact.latents,
        positions=None if key.exact is None else key.exact.positions,
        bias=None if mask is None else as_bias(mask)[:, 0],
        sinks=sinks,
        scaling=scaling,
    )


def _attend_pages(module: Any, query: torch.Tensor, pages: PagedStates, **kwargs: Any) -> torch.Tensor:
    """Attention of a packed batch, queries [1, H, Q, d], request by request; [1, Q, H, v].

    Raises:
        UnsupportedError: the module hands over what cannot be taken apart by request.
    """
    patched: SitePatch = getattr(module, PATCH_ATTRIBUTE)
    own = ("base", "scaling", "dropout", *_SAME_FOR_ALL)
    known = frozenset((*own, "sliding_window")) | upstream.PAGED_ARGUMENTS
    further = upstream.further_arguments(kwargs, known)
    if kwargs.get("sliding_window") not in (None, pages.window):
        further.append("sliding_window")
    if further:
        raise UnsupportedError(
            f"Continuous batching (generate_batch) does not know what {', '.join(f'`{name}`' for name in further)} of "
            f"{title_of(module)} means for a single request. Use model.generate with a padded batch."
        )
    settings = {name: value for name, value in kwargs.items() if name in own}

    def attend(query: torch.Tensor, rows: CompressedHeads, mask: torch.Tensor) -> torch.Tensor:
        output, _ = attend_heads(module, query, rows, rows, mask, **settings)
        return output

    return pages.attend(query, patched.geometry.kv_lora_rank // patched.geometry.heads, attend)


def decoding_refusal(module: Any, patched: SitePatch) -> str | None:
    """Why a step of one token does not attend to rows as they are stored, or None where it does."""
    if patched.by_itself:
        return "the module computes attention by itself, on plain keys and values"
    if patched.mode == "expanded":
        return 'attention="expanded" was asked for'
    if not patched.splice.is_affine:
        return SPLINE_REFUSAL
    if getattr(module, "attn_logit_softcapping", None) is not None:
        return "the model caps its scores (soft cap), which attention on rows does not do"
    return None


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
