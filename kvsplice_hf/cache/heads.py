"""Layers with ordinary attention in a spliced cache: rows of all key heads side by side.

Legend: `B` batch, `T` new tokens, `S` stored tokens, `K` key heads, `d` numbers of a key, `v` of a value.
"""

from typing import Any

import torch

from kvsplice_hf import upstream
from kvsplice_hf.attend.choice import encode
from kvsplice_hf.attend.heads import encode_heads, read_heads, rounds_trips
from kvsplice_hf.cache.exact import ExactTokens, overlay_exact
from kvsplice_hf.cache.rows import CompressedLatent
from kvsplice_hf.cache.turns import SLOT_DTYPE, Turns
from kvsplice_hf.code.heads import HeadSplices
from kvsplice_hf.code.projection import LearnedKVSplice


def latents_and_keys(
    splice: LearnedKVSplice | HeadSplices, key_states: torch.Tensor, value_states: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a module hands to `update`, as latents (or values) and rotated keys: MLA modules hand latents as keys."""
    return (value_states, key_states) if isinstance(splice, HeadSplices) else (key_states, value_states)


def encode_states(
    splice: LearnedKVSplice | HeadSplices,
    latents: torch.Tensor,
    k_rot: torch.Tensor,
    turns: torch.Tensor | None,
    identity: str = "",
) -> torch.Tensor:
    """Rows [B, 1, T, w] of new tokens.

    Args:
        splice: of the layer.
        latents, k_rot: latents [B, 1, T, R] and rotated keys [B, 1, T, P]; or values [B, K, T, v] and keys
            [B, K, T, d].
        turns: how the keys were rotated, where they are coded before that.
        identity: of the splice, as in `attend.backend.HeadsStep`.
    """
    if isinstance(splice, HeadSplices):
        return encode_heads(splice, latents, k_rot, turns, identity)
    return encode(splice, latents, k_rot, turns)


def round_trip(
    splice: LearnedKVSplice | HeadSplices, latents: torch.Tensor, k_rot: torch.Tensor, turns: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the cache would give back of latents (or values) and keys, without a cache; arguments as `encode_states`.

    Where nothing wants gradients, by the same code as with a cache.
    """
    wants_gradients = torch.is_grad_enabled() and (latents.requires_grad or k_rot.requires_grad)
    if wants_gradients or not isinstance(splice, HeadSplices) or not rounds_trips(splice, latents, k_rot):
        return splice.round_trip(latents, k_rot, turns)
    splice.require_codec_here()
    rows = encode_heads(splice, latents, k_rot, turns)
    slots = None if turns is None else _each_in_a_slot(turns, rows.shape[0])
    keys, values = CompressedHeads(rows, splice, None, rows.shape[2], 0, latents.dtype, None, slots).keys_and_values()
    return values, keys


def _each_in_a_slot(turns: torch.Tensor, batch: int) -> Turns:
    """Angles [B or 1, 1, T, F] with a slot for each token."""
    count = turns.shape[0] * turns.shape[2]
    slots = torch.arange(count, dtype=SLOT_DTYPE, device=turns.device).view(turns.shape[0], -1)
    return Turns(turns.flatten(0, 2).T.contiguous(), slots.expand(batch, -1))


def exact_states(splice: LearnedKVSplice | HeadSplices, latents: torch.Tensor, k_rot: torch.Tensor) -> torch.Tensor:
    """What is kept of the same tokens where they are exact, [B, 1, T, numbers of an exact token]."""
    if isinstance(splice, HeadSplices):
        return exact_heads(latents, k_rot)
    return latents if splice.codec is None else torch.cat([latents, k_rot], dim=-1)


def exact_heads(values: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """What is kept of exact tokens, [B, 1, T, K (v + d)], each head's value and key side by side."""
    return torch.cat([values, keys], dim=-1).transpose(1, 2).flatten(2)[:, None]


class CompressedHeads:
    """What a spliced cache layer's `update` returns in place of keys and values of ordinary attention.

    Attributes as of `CompressedLatent`, of all heads: rows [B, 1, S, bytes] of the heads side by side. `identity` is
    that of the splices, where it was looked up in this call already, and otherwise empty.
    """

    def __init__(
        self,
        rows: torch.Tensor,
        splice: HeadSplices,
        exact: ExactTokens | None,
        new_tokens: int,
        first_row: int | torch.Tensor,
        dtype: torch.dtype,
        fresh: tuple[torch.Tensor, torch.Tensor] | None,
        turns: Turns | None,
        identity: str = "",
    ) -> None:
        self.rows = rows
        self.splice = splice
        self.exact = exact
        self.new_tokens = new_tokens
        self.first_row = first_row
        self.dtype = dtype
        self.fresh = fresh
        self.turns = turns
        self.identity = identity
        self._heads: list[CompressedLatent] | None = None

    @property
    def heads(self) -> list[CompressedLatent]:
        """Of each key head the rows, as values and keys that are read like a latent and its key."""
        if self._heads is None:  # `cached_property` takes a lock, which dynamo does not know
            self._heads = self._by_head(self.exact)
        return self._heads

    def _by_head(self, exact: ExactTokens | None) -> list[CompressedLatent]:
        splice = self.splice
        sizes, count = splice.row_bytes, len(splice.heads)
        kept = [None] * count if exact is None else exact.latents.chunk(count, dim=-1)
        new = [None] * count if self.fresh is None else splice.split(*self.fresh)
        made = []
        for head, part, latents, states in zip(splice, self.rows.split(sizes, dim=-1), kept, new, strict=True):
            own = None if exact is None or latents is None else ExactTokens(latents, exact.positions)
            of_keys = None if head.keys is None else self.turns
            of_call = (self.new_tokens, self.first_row, self.dtype, states, of_keys)
            made.append(CompressedLatent(part, head, own, *of_call))
        return made

    @property
    def shape(self) -> torch.Size:
        """[B, K, S, v + d]: models read the number of keys from it."""
        width = next(iter(self.splice)).latent_dim
        return torch.Size((self.rows.shape[0], len(self.splice.heads), self.rows.shape[2], width))

    def keys_and_values(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys [B, K, S, d] and values [B, K, S, v], decoded, the exact ones in their places."""
        if self.fresh is not None:
            read = [_read(head) for head in self.heads]
            return torch.cat([key for _, key in read], dim=1), torch.cat([value for value, _ in read], dim=1)
        keys, values = read_heads(self.splice, self.rows, self.turns, self.dtype, self._as_coded, self.identity)
        if self.exact is None:
            return keys, values
        exact, count = self.exact, keys.shape[1]
        kept = exact.latents.unflatten(-1, (count, -1)).transpose(1, 2).flatten(0, 1)  # [B K, E, v + d]
        positions = exact.positions.repeat_interleave(count, dim=0)
        of_values, of_keys = kept.split([values.shape[-1], keys.shape[-1]], dim=-1)
        return _overlaid(keys, ExactTokens(of_keys, positions)), _overlaid(values, ExactTokens(of_values, positions))

    def _as_coded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values as their codes say."""
        parts = self._by_head(None)
        return torch.cat([part.k_rot for part in parts], dim=1), torch.cat([part.latent() for part in parts], dim=1)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "CompressedHeads":
        """The same on another device: of a layer that reads keys of another one, which may be elsewhere."""
        fresh, turns = self.fresh, self.turns
        if fresh is not None:
            fresh = fresh[0].to(device, non_blocking=non_blocking), fresh[1].to(device, non_blocking=non_blocking)
        return CompressedHeads(
            self.rows.to(device, non_blocking=non_blocking),
            self.splice,
            None if self.exact is None else self.exact.to(device, non_blocking),
            self.new_tokens,
            self.first_row,
            self.dtype,
            fresh,
            None if turns is None else turns.to(device, non_blocking),
            self.identity,
        )

    def __getitem__(self, index: Any) -> Any:
        return self.__getattr__("[...]")

    def __getattr__(self, name: str) -> Any:
        raise upstream.changed(
            "an attention module", f"`{name}` of compressed keys and values was asked for, as if they were a tensor."
        )

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise upstream.changed(
            "an attention module",
            f"compressed keys and values came to {getattr(function, '__name__', function)}, and not to the attention "
            "function registered under the name in the config.",
        )

    def __repr__(self) -> str:
        return f"CompressedHeads(shape={tuple(self.shape)})"


def _overlaid(states: torch.Tensor, exact: ExactTokens) -> torch.Tensor:
    """Keys or values [B, K, S, n] with the exact ones of each head, [B K, E, n], in their places."""
    return overlay_exact(states.flatten(0, 1)[:, None], exact).view(states.shape)


def _read(head: CompressedLatent) -> tuple[torch.Tensor, torch.Tensor]:
    """All values and keys of a head; where gradients are wanted, those of new tokens after the round trip."""
    if head.fresh is None:
        return head.latent(), head.k_rot
    return head.with_new(*head.splice.round_trip(*head.fresh, head.new_turns))


def compressed_states(
    rows: torch.Tensor,
    splice: LearnedKVSplice | HeadSplices,
    exact: ExactTokens | None,
    new_tokens: int,
    first_row: int | torch.Tensor,
    dtype: torch.dtype,
    fresh: tuple[torch.Tensor, torch.Tensor] | None = None,
    turns: Turns | None = None,
    identity: str = "",
) -> CompressedLatent | CompressedHeads:
    """Rows of a layer as its attention gets them. Arguments as of `CompressedLatent`, and `CompressedHeads`."""
    of_call = (exact, new_tokens, first_row, dtype, fresh, turns)
    if isinstance(splice, HeadSplices):
        return CompressedHeads(rows, splice, *of_call, identity)
    return CompressedLatent(rows, splice, *of_call)
