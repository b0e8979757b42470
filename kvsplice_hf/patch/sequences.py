"""Calls without a cache: latents or values, and keys, go through the same round trip as through a cache.

Legend: `B` batch, `T` tokens, `R` kv_lora_rank, `P` qk_rope_head_dim, `K` key heads, `d`, `v` numbers of a key and of a
value, `F` pairs of numbers of a key.
"""

from typing import Any

import torch

from kvsplice_hf import upstream
from kvsplice_hf.cache.exact import exact_in_full_sequence
from kvsplice_hf.cache.heads import round_trip
from kvsplice_hf.call import Call
from kvsplice_hf.patch.site_patch import SitePatch, title_of


def round_trip_of_sequences(
    module: Any, patched: SitePatch, call: Call, latent: torch.Tensor, k_rot: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the cache would give back of whole sequences, the first tokens exact.

    Args:
        module: the attention module.
        patched: what the patch keeps of it.
        call: the running one.
        latent: latents [B, 1, T, R], or values [B, K, T, v].
        k_rot: rotated keys [B, 1, T, P], or [B, K, T, d].

    Raises:
        UpstreamChangedError: nothing says how the keys are rotated, and they are coded before that.
    """
    decoded, rotated = round_trip(patched.splice, latent, k_rot, _turns_without_cache(module, patched, call))
    if call.state.on_round_trip is not None:
        call.state.on_round_trip(module, latent, decoded)
    if patched.geometry.sink_tokens == 0:
        return decoded, rotated
    count, tokens = patched.geometry.sink_tokens, latent.shape[2]
    exact = exact_in_full_sequence(call.mask, tokens, count, latent.device)[:, None, :, None]
    return torch.where(exact, latent, decoded), torch.where(exact.to(k_rot.device), k_rot, rotated)


def _turns_without_cache(module: Any, patched: SitePatch, call: Call) -> torch.Tensor | None:
    """How the keys of the call are rotated, uint8 [B or 1, 1, T, F], where they are coded before that.

    Raises:
        UpstreamChangedError: nothing says how.
    """
    if patched.splice.keys is None:
        return None
    patched.splice.require_codec_here()
    if call.embeddings is None:
        raise upstream.changed(
            title_of(module),
            f"it got no `{upstream.POSITION_EMBEDDINGS}` that say how its keys are rotated, and its splice codes keys "
            "before their rotation.",
        )
    return patched.splice.keys.turns_of(call.embeddings)[:, None]
