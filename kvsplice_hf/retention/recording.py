"""The attention function of modules whose rows are kept by attention: the one they had, and a note of who got how much.

Nothing of the output changes: probabilities are computed once more, beside it.

Legend: `B` batch, `T` queries, `N` rows, `H` query heads, `K` key heads, `R` kv_lora_rank, `P` size of a rotated key.
"""

import functools
import threading
from typing import Any

import torch

from kvsplice_hf import upstream
from kvsplice_hf.cache.heads import CompressedHeads
from kvsplice_hf.cache.rows import CompressedLatent
from kvsplice_hf.errors import UnsupportedError
from kvsplice_hf.patch.absorbed import split_weight
from kvsplice_hf.patch.attention import attend_expanded
from kvsplice_hf.patch.names import NAME_PREFIX, WRAPPED_ATTENTION
from kvsplice_hf.retention.scores import received_by


# Begins like the names of the patch, by which modules of patched models know that they may hand rows over.
RECORDING_PREFIX = NAME_PREFIX + "retention_"
RECORDED = (*WRAPPED_ATTENTION, *(NAME_PREFIX + base for base in WRAPPED_ATTENTION))
# What else attention functions are told, and the note takes into account.
_KNOWN = frozenset({"s_aux", "softcap", "sliding_window", "is_causal"})


class Recorder:
    """What is noted of one call of a module.

    Args:
        module: the attention module.
        counted: which of its tokens are no padding, bool [B, T]; None: all.
        by_query: keep queries apart.

    Attributes:
        received: float32 [B, T or 1, N], once the attention function was called.
    """

    def __init__(self, module: Any, counted: torch.Tensor | None, by_query: bool) -> None:
        self.module, self.counted, self.by_query = module, counted, by_query
        self.received: torch.Tensor | None = None


class _Thread(threading.local):
    """Of the call that runs in this thread."""

    recorder: Recorder | None = None


_thread = _Thread()


def record(recorder: Recorder | None) -> None:
    """Say what is to be noted of the call that is about to run in this thread."""
    _thread.recorder = recorder


def recorded(module: Any) -> torch.Tensor | None:
    """What was noted of the call of `module`, which is over; None where its attention function was not called."""
    recorder, _thread.recorder = _thread.recorder, None
    return None if recorder is None or recorder.module is not module else recorder.received


def register_recording() -> None:
    """Make our attention functions, and the masks they need, known to transformers under names of ours."""
    for base in RECORDED:
        if base in WRAPPED_ATTENTION:  # the others are there once a model is patched
            function = functools.partial(_attend, inner=functools.partial(attend_expanded, base=base))
        else:
            function = functools.partial(_attend_patched, name=base)
        upstream.register_attention_function(RECORDING_PREFIX + base, function, base.removeprefix(NAME_PREFIX))


def _attend_patched(module: Any, *args: Any, name: str, **kwargs: Any) -> Any:
    return _attend(module, *args, inner=upstream.attention_function(name), **kwargs)


def _attend(
    module: Any,
    query: torch.Tensor,
    key: Any,
    value: Any,
    mask: torch.Tensor | None,
    *args: Any,
    inner: Any,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    output: tuple[torch.Tensor, torch.Tensor | None] = inner(
        module, query, key, value, mask, *args, scaling=scaling, **kwargs
    )
    recorder = _thread.recorder
    if recorder is not None and recorder.module is module:
        _require_known(module, kwargs)
        queries, keys = _as_scored(module, query, key)
        recorder.received = received_by(
            queries,
            keys,
            mask,
            recorder.counted,
            scaling=scaling,
            softcap=kwargs.get("softcap"),
            sinks=kwargs.get("s_aux"),
            by_query=recorder.by_query,
        )
    return output


def _require_known(module: Any, kwargs: dict[str, Any]) -> None:
    further = upstream.further_arguments(kwargs, _KNOWN | {"dropout"})
    further += ["sliding_window"] if kwargs.get("sliding_window") is not None else []
    if further:
        raise UnsupportedError(
            f"Retention does not know what {', '.join(f'`{name}`' for name in further)} of {type(module).__name__} "
            'does to attention, by which it is to choose tokens. Use policy="window", which does not look at it.'
        )


def _as_scored(module: Any, query: torch.Tensor, key: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries [B, H, T, d] and keys [B, K, N, d] whose products are the scores, whatever the rows hold."""
    if isinstance(key, CompressedHeads):
        return query, torch.cat([head.k_rot for head in key.heads], dim=1)
    if not isinstance(key, CompressedLatent):
        return query, key
    assert key.weight is not None
    weights = split_weight(key.weight, module.qk_nope_head_dim, module.v_head_dim)
    q_nope, q_rot = query.split([module.qk_nope_head_dim, module.qk_rope_head_dim], dim=-1)
    q_latent = torch.einsum("bhtn,hnr->bhtr", q_nope, weights.key)
    return torch.cat([q_latent, q_rot], dim=-1), torch.cat([key.latent(), key.k_rot], dim=-1)
