"""What a spliced cache layer stores of a token, and what it hands to the attention module.

One token of one layer is one row `[code | k_rot]`, or `[code | key code]` where keys are coded before their rotation.

Legend: `B` batch, `T` new tokens, `S` stored tokens, `K` exact tokens, `R` kv_lora_rank, `r` spliced rank,
`P` qk_rope_head_dim, `p` numbers of a key in a row: P, or those of its code.
"""

from dataclasses import dataclass
from typing import Any

import torch

from kvsplice_hf import upstream
from kvsplice_hf.attend.backend import CodedKeys
from kvsplice_hf.cache.exact import ExactTokens, overlay_exact
from kvsplice_hf.cache.turns import Turns
from kvsplice_hf.code.projection import LearnedKVSplice


@dataclass(frozen=True)
class RowGeometry:
    """Sizes of one layer's rows: R, r, P, K, and the bytes of a row where rows are packed.

    `coded_keys` where these hold keys before their rotation. `heads`: key heads of ordinary attention, whose values and
    keys together have R and P numbers; 0 where the layer stores a latent.
    """

    kv_lora_rank: int
    rank: int
    qk_rope_head_dim: int
    sink_tokens: int
    packed_bytes: int | None = None
    coded_keys: bool = False
    heads: int = 0

    @property
    def row_dim(self) -> int:
        """Width of a stored row: r + P numbers, or bytes where rows are packed."""
        return self.rank + self.qk_rope_head_dim if self.packed_bytes is None else self.packed_bytes

    @property
    def exact_dim(self) -> int:
        """Numbers per exact token: the latent, and k_rot where the rows do not hold it exactly."""
        return self.kv_lora_rank + (0 if self.packed_bytes is None else self.qk_rope_head_dim)

    def row_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Of stored rows, in a model whose latents have `dtype`."""
        return dtype if self.packed_bytes is None else torch.uint8

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of a stored row, in a model whose latents have `dtype`."""
        return self.row_dim * self.row_dtype(dtype).itemsize


class CompressedLatent:
    """What a spliced cache layer's `update` returns in place of the latent.

    It carries the projection that made the codes, because some models expand a latent that another layer stored.

    Attributes:
        rows: [B, 1, S, r + P], or packed [B, 1, S, bytes]; a view of the cache.
        splice: the projection of the layer that stored the rows.
        exact: the exact first tokens, or None.
        new_tokens: T, how many of the rows belong to the current call.
        first_row: row of the first new token, an integer, or a tensor in a static cache.
        dtype: of the latents; by default that of the rows, which are then not packed.
        fresh: the new tokens' latents and rotated keys as they came, where gradients of them are wanted; else None.
        turns: how the keys of the rows were rotated, where they were coded before; else None.
        weight: what `kv_b_proj` of the module that attends to the rows multiplies by, [H * (N + V), R]; None before it
            was asked for.
    """

    def __init__(
        self,
        rows: torch.Tensor,
        splice: LearnedKVSplice,
        exact: ExactTokens | None,
        new_tokens: int,
        first_row: int | torch.Tensor,
        dtype: torch.dtype | None = None,
        fresh: tuple[torch.Tensor, torch.Tensor] | None = None,
        turns: Turns | None = None,
    ) -> None:
        self.dtype = rows.dtype if dtype is None else dtype
        self._numbers: tuple[torch.Tensor, torch.Tensor] | None = None
        self.rows = rows
        self.splice = splice
        self.exact = exact
        self.new_tokens = new_tokens
        self.first_row = first_row
        self.fresh = fresh
        self.turns = turns
        self.weight: torch.Tensor | None = None

    def _read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What latents are decoded from, [B, 1, S, r + q], and rotated keys [B, 1, S, P]; rows are unpacked once."""
        if self._numbers is None:
            turns = None if self.turns is None else self.turns.by_token()[:, None]
            self._numbers = self.splice.read(self.rows, self.dtype, turns)
        return self._numbers

    @property
    def new_turns(self) -> torch.Tensor | None:
        """How the keys of the new tokens were rotated, uint8 [B, 1, T, F]."""
        count = self.rows.shape[2]
        return None if self.turns is None else self.turns.by_token(slice(count - self.new_tokens, count))[:, None]

    @property
    def coded_keys(self) -> CodedKeys | None:
        """How to read the keys, where they were coded before their rotation."""
        if self.turns is None or self.splice.keys is None:
            return None
        weights = self.splice.keys.weights()
        return CodedKeys(weights.expand, weights.mean, weights.pairs, *self.turns)

    @property
    def is_packed(self) -> bool:
        return self.splice.codec is not None

    @property
    def codes(self) -> torch.Tensor:
        """[B, 1, S, r]."""
        return self._read()[0][..., : self.splice.rank]

    @property
    def k_rot(self) -> torch.Tensor:
        """[B, 1, S, P], the exact ones in their places."""
        k_rot = self._read()[1]
        if self.exact is None or not self.is_packed:
            return k_rot
        return overlay_exact(k_rot.clone(), self._exact_part(slice(self.splice.latent_dim, None)))

    @property
    def shape(self) -> torch.Size:
        """Shape of the codes: the models read the number of keys from what `expand_kv` returned."""
        return torch.Size((*self.rows.shape[:-1], self.splice.rank))

    def latent(self) -> torch.Tensor:
        """Decoded latents [B, 1, S, R], the exact ones in their places."""
        latent = self.splice.decode(self._read()[0])
        if self.exact is None:
            return latent
        return overlay_exact(latent, self._exact_part(slice(self.splice.latent_dim)))

    def with_new(self, latent: torch.Tensor, k_rot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All latents [B, 1, S, R] and rotated keys [B, 1, S, P], those of the new tokens as given.

        Args:
            latent, k_rot: of the new tokens, after their round trip: [B, 1, T, R] and [B, 1, T, P].
        """
        past = slice(self.rows.shape[2] - self.new_tokens)
        values, keys = self._read()
        latent = torch.cat([self.splice.decode(values[:, :, past]), latent], dim=2)
        k_rot = torch.cat([keys[:, :, past], k_rot], dim=2)
        if self.exact is None:
            return latent, k_rot
        latent = overlay_exact(latent, self._exact_part(slice(self.splice.latent_dim)))
        if self.is_packed:
            k_rot = overlay_exact(k_rot, self._exact_part(slice(self.splice.latent_dim, None)))
        return latent, k_rot

    def _exact_part(self, columns: slice) -> ExactTokens:
        assert self.exact is not None
        return ExactTokens(self.exact.latents[..., columns], self.exact.positions)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "CompressedLatent":
        """The same on another device (accelerate moves shared latents between layer groups)."""
        exact = None if self.exact is None else self.exact.to(device, non_blocking)
        rows = self.rows.to(device, non_blocking=non_blocking)
        fresh = self.fresh
        if fresh is not None:
            fresh = fresh[0].to(device, non_blocking=non_blocking), fresh[1].to(device, non_blocking=non_blocking)
        turns = None if self.turns is None else self.turns.to(device, non_blocking)
        return CompressedLatent(rows, self.splice, exact, self.new_tokens, self.first_row, self.dtype, fresh, turns)

    def __getitem__(self, index: Any) -> Any:
        return self.__getattr__("[...]")

    def __getattr__(self, name: str) -> Any:
        # Nothing of a tensor but what is above: code that goes on as if it had keys has not asked for them.
        raise upstream.changed(
            "an attention module", f"`{name}` of compressed codes was asked for, as if they were a tensor."
        )

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise upstream.changed(
            "an attention module",
            f"compressed codes came to {getattr(function, '__name__', function)}, and not to the attention function "
            "registered under the name in the config.",
        )

    def __repr__(self) -> str:
        return f"CompressedLatent(rows={tuple(self.rows.shape)}, rank={self.splice.rank})"
