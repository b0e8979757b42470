"""Layers with ordinary attention in a spliced cache: rows of all key heads side by side.

Legend: `B` batch, `T` new tokens, `S` stored tokens, `K` key heads, `d` numbers of a key, `v` of a value.
"""

from collections.abc import Sequence
from typing import Any

import torch

from kvsplice_hf import upstream
from kvsplice_hf.attend.choice import encode
from kvsplice_hf.cache.exact import ExactTokens
from kvsplice_hf.cache.rows import CompressedLatent
from kvsplice_hf.cache.turns import Turns
from kvsplice_hf.code.heads import HeadSplices, turns_for


def encode_heads(
    splice: HeadSplices, values: torch.Tensor, keys: torch.Tensor, turns: torch.Tensor | None
) -> torch.Tensor:
    """Rows [B, 1, T, bytes] of values [B, K, T, v] and keys [B, K, T, d]."""
    parts = zip(splice, splice.split(values, keys), strict=True)
    return torch.cat([encode(head, *part, turns_for(head, turns)) for head, part in parts], dim=-1)


def exact_heads(values: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """What is kept of exact tokens, [B, 1, T, K (v + d)], each head's value and key side by side."""
    return torch.cat([values, keys], dim=-1).transpose(1, 2).flatten(2)[:, None]


class CompressedHeads:
    """What a spliced cache layer's `update` returns in place of keys and values of ordinary attention.

    Attributes:
        heads: the rows of each key head, as `CompressedLatent` of values and keys.
    """

    def __init__(self, heads: Sequence[CompressedLatent]) -> None:
        self.heads = list(heads)

    @classmethod
    def of_rows(
        cls,
        rows: torch.Tensor,
        splice: HeadSplices,
        exact: ExactTokens | None,
        new_tokens: int,
        first_row: int | torch.Tensor,
        dtype: torch.dtype,
        fresh: tuple[torch.Tensor, torch.Tensor] | None,
        turns: Turns | None,
    ) -> "CompressedHeads":
        """Arguments as of `CompressedLatent`, of all heads."""
        sizes, count = splice.row_bytes, len(splice.heads)
        kept = [None] * count if exact is None else exact.latents.chunk(count, dim=-1)
        new = [None] * count if fresh is None else splice.split(*fresh)
        made = []
        for head, part, latents, states in zip(splice, rows.split(sizes, dim=-1), kept, new, strict=True):
            own = None if exact is None or latents is None else ExactTokens(latents, exact.positions)
            of_keys = None if head.keys is None else turns
            made.append(CompressedLatent(part, head, own, new_tokens, first_row, dtype, states, of_keys))
        return cls(made)

    @property
    def fresh(self) -> Any:
        return self.heads[0].fresh

    @property
    def shape(self) -> torch.Size:
        """[B, K, S, v + d]: models read the number of keys from it."""
        first = self.heads[0]
        width = first.splice.latent_dim
        return torch.Size((first.rows.shape[0], len(self.heads), first.rows.shape[2], width))

    def keys_and_values(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys [B, K, S, d] and values [B, K, S, v], decoded, the exact ones in their places."""
        read = [_read(head) for head in self.heads]
        return torch.cat([key for _, key in read], dim=1), torch.cat([value for value, _ in read], dim=1)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "CompressedHeads":
        """The same on another device: of a layer that reads keys of another one, which may be elsewhere."""
        return CompressedHeads([head.to(device, non_blocking) for head in self.heads])

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


def _read(head: CompressedLatent) -> tuple[torch.Tensor, torch.Tensor]:
    """All values and keys of a head; where gradients are wanted, those of new tokens after the round trip."""
    if head.fresh is None:
        return head.latent(), head.k_rot
    return head.with_new(*head.splice.round_trip(*head.fresh, head.new_turns))
