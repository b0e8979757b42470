"""`expand_kv` of a patched attention module: rows are decoded, or handed on to attention on codes.

Legend: `B` batch, `T` new tokens, `S` stored tokens, `H` heads, `R` kv_lora_rank, `r` spliced rank,
`P` qk_rope_head_dim, `N` qk_nope_head_dim, `V` v_head_dim.
"""

from typing import Any

import torch

from kvsplice_hf import upstream
from kvsplice_hf.cache.pages import PagedStates
from kvsplice_hf.cache.rows import CompressedLatent
from kvsplice_hf.call import Call, note_expansion, running_call
from kvsplice_hf.errors import FoldingError, UnsupportedError
from kvsplice_hf.patch.folding import unfoldable_message, weight_to_fold
from kvsplice_hf.patch.names import WRAPPED_ATTENTION, is_ours
from kvsplice_hf.patch.sequences import round_trip_of_sequences
from kvsplice_hf.patch.site_patch import PATCH_ATTRIBUTE, SPLINE_REFUSAL, SitePatch, title_of
from kvsplice_hf.weights.sharding import HeadShare, gradient_as_part, gradient_of_all, head_share


def expand_spliced_kv(self: Any, kv_nope: torch.Tensor | CompressedLatent | PagedStates, k_rot: Any) -> tuple[Any, Any]:
    """`expand_kv` of a patched attention module.

    Given rows from a cache, decode them, or pass them on for absorbed attention. Given a plain latent (no cache:
    training, perplexity), encode and decode it, so that the numbers are the same with and without a cache.

    Raises:
        UpstreamChangedError: a plain latent came where rows should have come, or past the hook before the forward.
    """
    patched: SitePatch = getattr(self, PATCH_ATTRIBUTE)
    note_expansion()
    if isinstance(kv_nope, PagedStates):  # taken apart in the attention function, which comes back here
        return kv_nope, kv_nope
    if isinstance(kv_nope, CompressedLatent):
        if kv_nope.new_tokens > 1 and not torch.compiler.is_compiling():
            # A prompt: all numbers of the layer are looked at, which takes little beside it.
            patched.materialised.verify(self.kv_b_proj)
        if not _needs_round_trip(self, kv_nope) and _attend_absorbed(self, patched, kv_nope):
            return kv_nope, kv_nope
        latent, k_rot = _decoded(self, patched, kv_nope)
    else:
        call = _call_without_cache(self, kv_nope)
        latent = kv_nope
        if call.state.enabled:
            share = _reading_share(self)
            latent, k_rot = round_trip_of_sequences(self, patched, call, kv_nope, gradient_as_part(k_rot, share))
            k_rot = gradient_of_all(k_rot, share)
    return type(self).expand_kv(self, latent, k_rot)


def _call_without_cache(module: Any, latent: torch.Tensor) -> Call:
    """The running call, which has handed a plain latent [B, 1, T, R] to `expand_kv`, and may do so."""
    call = running_call(module)
    if call is None:
        raise upstream.changed(
            title_of(module),
            "`expand_kv` was reached past the hook before the forward of the module, which sees the cache. Call the "
            "module itself, not its `forward`.",
        )
    if not call.state.enabled:
        return call
    if call.reads_cache:
        raise upstream.changed(
            title_of(module), "it got a cache with codes, but handed a plain latent to `expand_kv` instead of them."
        )
    if call.new_tokens is not None and latent.shape[2] != call.new_tokens:
        raise upstream.changed(
            title_of(module),
            f"{latent.shape[2]} plain latents reached `expand_kv` in a call with {call.new_tokens} new tokens and no "
            "cache among its arguments: the past lies in a cache that the patch did not see.",
        )
    return call


def _reading_share(module: Any) -> HeadShare | None:
    """Which part of the heads reads the rotated keys of the module in this process, where gradients are wanted.

    Through `kv_b_proj` the gradient of all heads comes back to each process. That of the rotated key is of the heads
    there alone, and transformers adds it up where the key is made ("mla_kv_a_proj"): too late for a splice.
    """
    return head_share(module.kv_b_proj) if torch.is_grad_enabled() else None


def _needs_round_trip(module: Any, rows: CompressedLatent) -> bool:
    """Whether the new tokens have to be decoded: packed rows have no gradients, and somebody may want to see them.

    Absorbed attention would leave each process the gradients of its own heads.
    """
    call = running_call(module)
    listened = call is not None and call.state.on_round_trip is not None
    return rows.fresh is not None and (rows.is_packed or listened or _reading_share(module) is not None)


def _decoded(module: Any, patched: SitePatch, rows: CompressedLatent) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents [B, 1, S, R] and rotated keys [B, 1, S, P] of all rows.

    Where gradients are wanted, those of the new tokens go through the same round trip as without a cache: rows that are
    packed have none.
    """
    if rows.fresh is None:
        return rows.latent(), rows.k_rot
    call, share = running_call(module), _reading_share(module)
    came, k_rot = rows.fresh
    latent, k_rot = patched.splice.round_trip(came, gradient_as_part(k_rot, share), rows.new_turns)
    fresh = latent, gradient_of_all(k_rot, share)
    if call is not None and call.state.on_round_trip is not None:
        call.state.on_round_trip(module, came, latent)
    return rows.with_new(*fresh)


def _attend_absorbed(module: Any, patched: SitePatch, latent: CompressedLatent) -> bool:
    """Whether this call runs on the codes.

    Raises:
        FoldingError: absorbed attention was asked for and `kv_b_proj` cannot be folded.
        UnsupportedError: it was asked for, and the attention function was changed after patching.
    """
    weight, refused = absorbed_weight(module, patched, latent.new_tokens, latent.rows.shape[2], latent.dtype)
    if weight is None and patched.mode == "absorbed":
        if not is_ours(module):
            raise UnsupportedError(
                f'attention="absorbed" needs the attention function set by the patch, but it is now '
                f"{module.config._attn_implementation!r}. Unpatch, set it to one of {WRAPPED_ATTENTION}, and patch "
                "again."
            )
        raise FoldingError(f"{title_of(module)}: {unfoldable_message(refused)}")
    latent.weight = weight
    return weight is not None


def absorbed_weight(
    module: Any, patched: SitePatch, new_tokens: int, stored: int, dtype: torch.dtype
) -> tuple[torch.Tensor | None, str]:
    """What a call of T new tokens on S stored ones folds, [H * (N + V), R]; or None, and why it does not run on codes.

    Args:
        module: the attention module.
        patched: what the patch knows of it.
        new_tokens, stored: T and S.
        dtype: of the latents.
    """
    if patched.mode == "expanded":
        return None, 'attention="expanded" was asked for'
    if not patched.splice.is_affine:
        return None, SPLINE_REFUSAL
    if not is_ours(module):
        return None, (
            f"the attention function is {module.config._attn_implementation!r}, which reads keys and values only: load "
            'the model with attn_implementation="sdpa"'
        )
    sizes = patched.geometry.kv_lora_rank, patched.geometry.rank, patched.num_heads
    head_dims = module.qk_nope_head_dim, module.qk_rope_head_dim, module.v_head_dim
    if patched.mode == "auto" and not absorbed_is_cheaper(*sizes, head_dims, new_tokens, stored):
        return None, f"for {new_tokens} new tokens on {stored} expanding takes fewer products"
    return weight_to_fold(module, patched, dtype)


def absorbed_is_cheaper(
    latent_dim: int, rank: int, heads: int, head_dims: tuple[int, int, int], new_tokens: int, stored: int
) -> bool:
    """Compare multiplications of the two ways for T queries over S rows.

    Expanded: decode S latents, expand them, attend with head sizes N + P and V. Absorbed: take T queries and outputs
    through the latent, attend with head sizes r + P and r, shared by all heads.

    Args:
        latent_dim, rank, heads: R, r and H.
        head_dims: N, P and V.
        new_tokens, stored: T and S.
    """
    R, r, H, T, S = latent_dim, rank, heads, new_tokens, stored
    N, P, V = head_dims
    expanded = S * R * (r + H * (N + V)) + T * S * H * (N + P + V)
    absorbed = T * H * R * (N + V + 2 * r) + T * S * H * (2 * r + P)
    return absorbed < expanded
