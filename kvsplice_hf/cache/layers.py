"""Cache layers that keep codes instead of latents, and what they hand to the attention module.

One token of one layer is one row `[code | k_rot]`. The stock cache layers of transformers are reused whole: a spliced
layer gives them the rows as their `keys` and nothing (width 0) as their `values`, so that cropping, beam reordering,
sliding windows, static buffers, offloading and the indexer's keys work as upstream wrote them. What is added here:
encoding on the way in, buffers that grow ahead of need, and the exact first tokens.

Legend: `B` batch, `T` new tokens, `S` stored tokens, `K` exact tokens, `R` kv_lora_rank, `r` spliced rank,
`P` qk_rope_head_dim.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticIndexedLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from kvsplice_hf import upstream
from kvsplice_hf.cache.exact import ExactTokens, empty_exact_tokens, fill_exact_tokens, overlay_exact, relocated
from kvsplice_hf.code.projection import LearnedKVSplice
from kvsplice_hf.errors import CacheMismatchError


@dataclass(frozen=True)
class RowGeometry:
    """Sizes of one layer's rows: R, r, P, K, and the bytes of a row where rows are packed."""

    kv_lora_rank: int
    rank: int
    qk_rope_head_dim: int
    sink_tokens: int
    packed_bytes: int | None = None

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
    ) -> None:
        self.dtype = rows.dtype if dtype is None else dtype
        self._numbers: torch.Tensor | None = None
        self.rows = rows
        self.splice = splice
        self.exact = exact
        self.new_tokens = new_tokens
        self.first_row = first_row
        self.fresh = fresh

    @property
    def numbers(self) -> torch.Tensor:
        """`[code | k_rot]`, [B, 1, S, r + P]; unpacked once where rows are packed."""
        if self._numbers is None:
            self._numbers = self.splice.numbers(self.rows, self.dtype)
        return self._numbers

    @property
    def is_packed(self) -> bool:
        return self.splice.codec is not None

    @property
    def codes(self) -> torch.Tensor:
        """[B, 1, S, r]."""
        return self.numbers[..., : self.splice.rank]

    @property
    def k_rot(self) -> torch.Tensor:
        """[B, 1, S, P], the exact ones in their places."""
        k_rot = self.numbers[..., self.splice.rank :]
        if self.exact is None or not self.is_packed:
            return k_rot
        return overlay_exact(k_rot.clone(), self._exact_part(slice(self.splice.latent_dim, None)))

    @property
    def shape(self) -> torch.Size:
        """Shape of the codes: the models read the number of keys from what `expand_kv` returned."""
        return torch.Size((*self.rows.shape[:-1], self.splice.rank))

    def latent(self) -> torch.Tensor:
        """Decoded latents [B, 1, S, R], the exact ones in their places."""
        latent = self.splice.decode(self.codes)
        if self.exact is None:
            return latent
        return overlay_exact(latent, self._exact_part(slice(self.splice.latent_dim)))

    def with_new(self, latent: torch.Tensor, k_rot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All latents [B, 1, S, R] and rotated keys [B, 1, S, P], those of the new tokens as given.

        Args:
            latent, k_rot: of the new tokens, after their round trip: [B, 1, T, R] and [B, 1, T, P].
        """
        past = slice(self.rows.shape[2] - self.new_tokens)
        latent = torch.cat([self.splice.decode(self.codes[:, :, past]), latent], dim=2)
        k_rot = torch.cat([self.numbers[:, :, past, self.splice.rank :], k_rot], dim=2)
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
        return CompressedLatent(rows, self.splice, exact, self.new_tokens, self.first_row, self.dtype, fresh)

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


def grown_capacity(needed: int) -> int:
    """Rows to allocate for `needed` rows: double while small, an eighth more from 8192 rows on.

    Doubling all the way would leave up to half of a long cache unused. With an eighth, a row is copied about nine times
    over the life of the cache, against once per generated token when every step concatenates.
    """
    return needed + min(needed, max(1024, needed // 8))


# The stock layer that a mixin below is combined with. Typed loosely: its `update` returns tensors, ours does not.
_StockLayer: Any = CacheLayerMixin


class SplicedLayerMixin(_StockLayer):
    """Encodes on the way into a stock cache layer. Combined below with each kind of layer.

    Args:
        geometry: sizes of the rows.
        splice: the projection to encode with. The attention module's hook sets it again at each call.
        stock_kwargs: arguments of the stock layer.
    """

    def __init__(self, geometry: RowGeometry, splice: LearnedKVSplice, **stock_kwargs: Any) -> None:
        super().__init__(**stock_kwargs)
        self.geometry = geometry
        self.splice = splice
        # Of the splice that the stored rows were made with; see `LearnedKVSplice.identity`. Empty: not known, because
        # the layer was made inside `torch.compile`, which cannot look into parameters.
        self.identity = "" if torch.compiler.is_compiling() else splice.identity
        self.exact: ExactTokens | None = None
        # Set by the attention module's hook just before its forward: `update` does not get to see the mask.
        self.attention_mask: torch.Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "SplicedLayerMixin":
        clone = object.__new__(type(self))
        memo[id(self)] = clone
        for name, value in vars(self).items():
            # A copied cache (prompt reuse) goes on with the same model: its projection is referred to, not copied.
            known = memo.get(id(value), value) if name == "splice" else copy.deepcopy(value, memo)
            setattr(clone, name, known)
        return clone

    def __getstate__(self) -> dict[str, Any]:
        # A pickled cache must not carry the model's weights along; the hook hands the projection over again.
        return {**vars(self), "splice": None, "attention_mask": None}

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate for the batch, dtype and device of `key_states`; widths come from the geometry.

        `early_initialization` calls this with the head size of the expanded keys, which does not matter here.
        """
        row_dtype = self.geometry.row_dtype(key_states.dtype)
        rows = key_states.new_empty(key_states.shape[0], 1, 0, self.geometry.row_dim, dtype=row_dtype)
        super().lazy_initialization(rows, rows[..., :0])
        self._allocate_exact(key_states)

    def _allocate_exact(self, key_states: torch.Tensor) -> None:
        if self.geometry.sink_tokens > 0:
            sizes = (key_states.shape[0], self.geometry.sink_tokens, self.geometry.exact_dim)
            self.exact = empty_exact_tokens(*sizes, dtype=key_states.dtype, device=key_states.device)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[CompressedLatent, torch.Tensor | CompressedLatent]:
        """Encode and store new tokens.

        Args:
            key_states: latents [B, 1, T, R].
            value_states: rotated keys [B, 1, T, P].

        Returns:
            All stored tokens as a `CompressedLatent`, and their rotated keys [B, 1, S, P]; where rows are packed, the
            same `CompressedLatent` again, which unpacks when it is read.

        Raises:
            CacheMismatchError: the shapes are not those of this layer's latents.
        """
        upstream.check_update_arguments(args, kwargs)
        self._check_shapes(key_states, value_states)
        rows = self.splice.rows(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        first_row = self._first_new_row()
        all_rows = self._store(rows, *args, **kwargs)
        kept = key_states if self.splice.codec is None else torch.cat([key_states, value_states], dim=-1)
        exact = self._track_exact(kept, first_row, all_rows)
        self.attention_mask = None
        if isinstance(first_row, int):  # rows may have left a sliding window at the front
            first_row = min(first_row, all_rows.shape[2] - rows.shape[2])
        fresh = (key_states, value_states) if self._wants_gradients(key_states, value_states) else None
        latent = CompressedLatent(all_rows, self.splice, exact, rows.shape[2], first_row, key_states.dtype, fresh)
        return latent, latent if latent.is_packed else latent.k_rot

    def _wants_gradients(self, *states: torch.Tensor) -> bool:
        """Whether what is computed from new tokens may be differentiated. (Static caches are not for training.)"""
        return False

    def _check_shapes(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        found = (key_states.shape[1], key_states.shape[-1], value_states.shape[-1])
        needed = (1, self.geometry.kv_lora_rank, self.geometry.qk_rope_head_dim)
        if found != needed:
            raise CacheMismatchError(
                f"A spliced cache layer got keys with (heads, width) {found[:2]} and values of width {found[2]}; it "
                f"needs latents with {needed[:2]} and rotated keys of width {needed[2]}. Either the cache belongs to "
                "another model, or this version of transformers caches expanded keys and values here."
            )

    def _first_new_row(self) -> int | torch.Tensor:
        return self.keys.shape[-2]

    def _store(self, rows: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().update(rows, rows[..., :0], *args, **kwargs)[0]

    def _track_exact(
        self, latents: torch.Tensor, first_row: int | torch.Tensor, all_rows: torch.Tensor
    ) -> ExactTokens | None:
        """Keep what is new among the exact tokens; return them as indexed in `all_rows`."""
        if self.exact is None:
            return None
        self._set_exact(fill_exact_tokens(self.exact, latents[:, 0], self.attention_mask, first_row))
        return self.exact

    def _set_exact(self, exact: ExactTokens) -> None:
        self.exact = exact

    def _map_exact(self, function: Any) -> None:
        if self.exact is not None:
            self.exact = ExactTokens(*map(function, self.exact))

    def offload(self) -> None:
        super().offload()
        self._map_exact(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        super().prefetch()
        if self.is_initialized:
            self._map_exact(lambda tensor: tensor.to(self.device, non_blocking=True))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._map_exact(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))


class _DynamicMixin(SplicedLayerMixin):
    """What growing layers have in common: they can be cropped and trained with, and their batch can be changed."""

    def _let_go(self) -> None:
        """Forget what else is held of rows that are no longer those of this layer."""

    def _wants_gradients(self, *states: torch.Tensor) -> bool:
        return torch.is_grad_enabled() and any(t.requires_grad for t in (*states, *self.splice.parameters()))

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        # The stock layer starts from a tensor without dimensions, which has no length to ask for.
        row_dtype = self.geometry.row_dtype(key_states.dtype)
        self.keys = key_states.new_empty(key_states.shape[0], 1, 0, self.geometry.row_dim, dtype=row_dtype)
        self.values = self.keys[..., :0]

    def reset(self) -> None:
        super().reset()
        upstream.drop_rows(self)
        self.exact = None

    def crop(self, tokens_to_remove: int) -> None:
        before = self.keys.shape[-2] if self.is_initialized else 0
        super().crop(tokens_to_remove)
        if self.exact is not None and before:
            after = self.keys.shape[-2]
            # A window that recorded its past also lets go of rows at the front.
            dropped = before - abs(tokens_to_remove) - after if self.is_sliding else 0
            self.exact = self.exact.shifted(dropped, after)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map_exact(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._map_exact(lambda tensor: tensor[indices])


def _is_writable(tensor: torch.Tensor) -> bool:
    """A tensor made in inference mode can be changed there only. (Dynamo cannot ask, and runs in no such mode.)"""
    return torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not tensor.is_inference()


class _GrowingMixin(_DynamicMixin):
    """Appends rows to a buffer with room to spare instead of concatenating the whole past at each step."""

    def __init__(self, geometry: RowGeometry, splice: LearnedKVSplice, **stock_kwargs: Any) -> None:
        super().__init__(geometry, splice, **stock_kwargs)
        # `keys` is a view of its first rows. None while `keys` owns its memory.
        self._buffer: torch.Tensor | None = None
        # Without padding the first K rows are the exact tokens, so that later tokens need not be looked at.
        self._ever_padded = False

    def _store(self, rows: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        stored, total = self.keys.shape[-2], self.keys.shape[-2] + rows.shape[-2]
        if stored == 0:
            self.keys, self._buffer = rows, None
        elif torch.is_grad_enabled():
            # Autograd may keep the rows for the backward pass, of the queries if not of the rows themselves; writing
            # into what it keeps would be an error.
            self.keys, self._buffer = torch.cat([self.keys, rows], dim=-2), None
        else:
            if self._buffer is None or self._buffer.shape[-2] < total or not _is_writable(self._buffer):
                self._buffer = self._grown(total)
            self._buffer[:, :, stored:total] = rows
            self.keys = self._buffer[:, :, :total]
        self.values = self.keys[..., :0]
        return self.keys

    def _let_go(self) -> None:
        super()._let_go()
        self._buffer = None

    def __copy__(self) -> "_GrowingMixin":
        """Two layers with the same rows: neither goes on writing behind them in the buffer that both would see."""
        self._buffer = None
        clone = object.__new__(type(self))
        for name, value in vars(self).items():
            setattr(clone, name, value)
        return clone

    def _grown(self, needed: int) -> torch.Tensor:
        batch, heads, stored, width = self.keys.shape
        buffer = self.keys.new_empty(batch, heads, grown_capacity(needed), width)
        buffer[:, :, :stored] = self.keys
        return buffer

    def _track_exact(
        self, latents: torch.Tensor, first_row: int | torch.Tensor, all_rows: torch.Tensor
    ) -> ExactTokens | None:
        self._ever_padded |= self.attention_mask is not None
        if not self._ever_padded and isinstance(first_row, int) and first_row >= self.geometry.sink_tokens:
            return self.exact
        return super()._track_exact(latents, first_row, all_rows)

    def offload(self) -> None:
        super().offload()
        self._buffer = None

    def prefetch(self) -> None:
        super().prefetch()
        self._buffer = None

    def reset(self) -> None:
        super().reset()
        self._buffer, self._ever_padded = None, False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._buffer = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._buffer = None

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._buffer = None


class _WindowMixin(_DynamicMixin):
    """A sliding window: rows leave at the front, and the exact tokens among them with them."""

    def _track_exact(
        self, latents: torch.Tensor, first_row: int | torch.Tensor, all_rows: torch.Tensor
    ) -> ExactTokens | None:
        exact = super()._track_exact(latents, first_row, all_rows)
        if exact is None:
            return None
        total = int(first_row) + latents.shape[2]
        self.exact = exact.shifted(total - self.keys.shape[-2], self.keys.shape[-2])
        return exact.shifted(total - all_rows.shape[2], all_rows.shape[2])


class _StaticMixin(SplicedLayerMixin):
    """Buffers of fixed size, changed in place so that compiled graphs keep their addresses."""

    def _allocate_exact(self, key_states: torch.Tensor) -> None:
        super()._allocate_exact(key_states)
        if self.exact is not None and not torch.compiler.is_compiling():
            for tensor in self.exact:
                torch._dynamo.mark_static_address(tensor)

    def _first_new_row(self) -> int | torch.Tensor:
        # A copy: `update` advances the counter in place.
        return self.cumulative_length.clone()

    def _set_exact(self, exact: ExactTokens) -> None:
        if self.exact is not None:
            for mine, new in zip(self.exact, exact, strict=True):
                mine.copy_(new)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.exact is not None:
            self._set_exact(self.exact.shifted(0, self.cumulative_length))

    def reset(self) -> None:
        super().reset()
        if self.exact is not None:
            batch, count, latent_dim = self.exact.latents.shape
            empty = empty_exact_tokens(batch, count, latent_dim, self.exact.latents.dtype, self.exact.latents.device)
            self._set_exact(empty)


class _StaticWindowMixin(_StaticMixin):
    """A sliding window in a buffer of fixed size."""

    def _first_new_row(self) -> int | torch.Tensor:
        return min(self.cumulative_length_int, self.max_cache_len)

    def _track_exact(
        self, latents: torch.Tensor, first_row: int | torch.Tensor, all_rows: torch.Tensor
    ) -> ExactTokens | None:
        exact = super()._track_exact(latents, first_row, all_rows)
        if exact is None:
            return None
        window, total = self.keys.shape[-2], int(first_row) + latents.shape[2]
        kept = exact.shifted(max(total - window, 0), window)
        # Returned are either the stored rows, or all rows before the window closed over them.
        returned = kept if all_rows is self.keys else exact.shifted(total - all_rows.shape[2], all_rows.shape[2])
        returned = ExactTokens(*(tensor.clone() for tensor in returned))
        self._set_exact(kept)
        return returned


class _WatchedMixin(_DynamicMixin):
    """Notices rows that somebody takes out by hand, as methods of eviction do: `layer.keys = layer.keys[:, :, kept]`.

    Everything that changes the rows goes through here, so that other rows than those of last time were put there from
    outside.
    """

    def __init__(self, geometry: RowGeometry, splice: LearnedKVSplice, **stock_kwargs: Any) -> None:
        super().__init__(geometry, splice, **stock_kwargs)
        self._own_keys: torch.Tensor | None = None

    def _follow(self) -> None:
        """Take over rows that were put here from outside.

        Raises:
            CacheMismatchError: they are not rows of this layer.
        """
        before, after = self._own_keys, self.keys if self.is_initialized else None
        if before is None or after is before or torch.compiler.is_compiling():
            return
        if after is None or after.dim() != 4 or after.dtype != before.dtype or after.shape[1::2] != before.shape[1::2]:
            raise CacheMismatchError(
                f"The rows {list(before.shape)}, {before.dtype} of a spliced cache layer were replaced from outside by "
                f"{None if after is None else (list(after.shape), after.dtype)}. Rows may be taken out "
                "(`layer.keys = layer.keys[:, :, kept]`); what is in them is this package's own."
            )
        if self.exact is not None:
            if after.shape[0] != before.shape[0]:
                raise CacheMismatchError(
                    f"The rows of a spliced cache layer were replaced from outside for {after.shape[0]} sequences "
                    f"instead of {before.shape[0]}: their first tokens are kept beside them. Use "
                    "cache.batch_select_indices, batch_repeat_interleave or reorder_cache."
                )
            self.exact = relocated(self.exact, before[:, 0], after[:, 0])
        self._let_go()
        self.values = after[..., :0]

    def update(self, *args: Any, **kwargs: Any) -> Any:
        return self._watched(super().update, *args, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        self._watched(super().crop, tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._watched(super().batch_repeat_interleave, repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._watched(super().batch_select_indices, indices)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._watched(super().reorder_cache, beam_idx)

    def offload(self) -> None:
        self._watched(super().offload)

    def prefetch(self) -> None:
        self._watched(super().prefetch)

    def reset(self) -> None:
        super().reset()
        self._own_keys = None

    def _watched(self, operation: Any, *args: Any, **kwargs: Any) -> Any:
        self._follow()
        result = operation(*args, **kwargs)
        self._own_keys = self.keys if self.is_initialized else None
        return result


class SplicedDynamicLayer(_WatchedMixin, _GrowingMixin, DynamicLayer):  # type: ignore[misc]
    """Spliced rows of a full-attention layer."""


class SplicedIndexedLayer(_WatchedMixin, _GrowingMixin, DynamicIndexedLayer):  # type: ignore[misc]
    """Spliced rows, and the indexer's keys as they are, of a sparse-attention layer."""


class SplicedSlidingWindowLayer(_WatchedMixin, _WindowMixin, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """Spliced rows of a sliding-window layer."""


class SplicedStaticLayer(_StaticMixin, StaticLayer):  # type: ignore[misc]
    """Spliced rows of a full-attention layer in a buffer of fixed size."""


class SplicedStaticIndexedLayer(_StaticMixin, StaticIndexedLayer):  # type: ignore[misc]
    """Spliced rows of a sparse-attention layer in a buffer of fixed size."""


class SplicedStaticSlidingWindowLayer(_StaticWindowMixin, StaticSlidingWindowLayer):  # type: ignore[misc]
    """Spliced rows of a sliding-window layer in a buffer of fixed size."""


# Exact types, not subclasses: a quantised layer is a `DynamicLayer` too, but its storage cannot hold our rows.
_SPLICED_TYPES: dict[type, type[SplicedLayerMixin]] = {
    DynamicLayer: SplicedDynamicLayer,
    DynamicIndexedLayer: SplicedIndexedLayer,
    DynamicSlidingWindowLayer: SplicedSlidingWindowLayer,
    StaticLayer: SplicedStaticLayer,
    StaticIndexedLayer: SplicedStaticIndexedLayer,
    StaticSlidingWindowLayer: SplicedStaticSlidingWindowLayer,
}


def splice_cache_layer(
    cache: Cache, layer_idx: int, geometry: RowGeometry, splice: LearnedKVSplice
) -> SplicedLayerMixin:
    """The spliced layer at `layer_idx` of `cache`, put there in place of an empty stock layer if need be.

    In place, because a substitute cache object would leave the caller's own one empty: a second turn would forget the
    first.

    Raises:
        CacheMismatchError: the layer already holds tokens of an unpatched model, or rows of other sizes, or is of a
            kind (quantised, say) that cannot hold spliced rows.
    """
    while len(cache.layers) <= layer_idx and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    if len(cache.layers) <= layer_idx:
        raise CacheMismatchError(
            f"The cache has {len(cache.layers)} layers, but the model stores a latent in layer {layer_idx}. It was "
            "made for another model: make it with this model's config, or start from KVSpliceCache(model)."
        )
    stock: Any = cache.layers[layer_idx]
    if isinstance(stock, SplicedLayerMixin) and (stock.geometry == geometry or not _is_empty(stock)):
        _require_same_splice(stock, layer_idx, geometry, splice)
        stock.splice = splice
        return stock
    if not isinstance(stock, SplicedLayerMixin):
        _require_replaceable(stock, layer_idx)
    layer = _spliced_like(stock, geometry, splice)
    cache.layers[layer_idx] = layer
    return layer


def _require_same_splice(stock: Any, layer_idx: int, geometry: RowGeometry, splice: LearnedKVSplice) -> None:
    """Refuse to go on with rows that another splice has made: decoded by this one they would be other latents."""
    if stock.geometry != geometry:
        raise CacheMismatchError(
            f"Cache layer {layer_idx} holds rows of {stock.geometry}; the model has {geometry}. The cache was "
            "filled by a model with another splice. Start from an empty cache, or from KVSpliceCache(model)."
        )
    if torch.compiler.is_compiling() or stock.identity == splice.identity:
        return
    if stock.identity and not _is_empty(stock):
        raise CacheMismatchError(
            f"Cache layer {layer_idx} holds {int(stock.get_seq_length())} tokens coded by another splice (its "
            f"parameters had the digest {stock.identity[:12]}, now it is {splice.identity[:12]}): another one was "
            "loaded, or it was trained. Start from an empty cache, or from KVSpliceCache(model)."
        )
    stock.identity = splice.identity


def _is_empty(layer: CacheLayerMixin) -> bool:
    return not layer.is_initialized or int(layer.get_seq_length()) == 0


def _require_replaceable(stock: Any, layer_idx: int) -> None:
    if type(stock) not in _SPLICED_TYPES:
        raise CacheMismatchError(
            f"Cache layer {layer_idx} is a {type(stock).__name__}, which cannot hold spliced rows (the splice is the "
            'compression). Use a dynamic or static cache: leave `cache_implementation` unset, or set it to "static" or '
            '"offloaded"; or call unpatch_model(model) first.'
        )
    if not _is_empty(stock):
        raise CacheMismatchError(
            f"Cache layer {layer_idx} already holds {int(stock.get_seq_length())} tokens stored without the splice. "
            "Start from an empty cache, or from KVSpliceCache(model)."
        )


def _spliced_like(stock: Any, geometry: RowGeometry, splice: LearnedKVSplice) -> SplicedLayerMixin:
    kind = next(kind for kind in _SPLICED_TYPES if type(stock) in (kind, _SPLICED_TYPES[kind]))
    arguments: dict[str, Any] = {}
    if isinstance(stock, StaticLayer):
        arguments["max_cache_len"] = stock.max_cache_len
    if isinstance(stock, StaticSlidingWindowLayer):
        arguments["sliding_window"] = stock.max_cache_len
    if isinstance(stock, DynamicSlidingWindowLayer):
        arguments["sliding_window"] = stock.sliding_window
    layer = _SPLICED_TYPES[kind](geometry, splice, **arguments)
    upstream.carry_layer_settings(stock, layer)
    return layer
