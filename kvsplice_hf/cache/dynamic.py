"""Spliced cache layers that grow: full attention, sparse attention with an indexer, sliding windows.

Legend: `B` batch, `T` new tokens, `S` stored tokens, `K` exact tokens, `R` kv_lora_rank, `r` spliced rank,
`P` qk_rope_head_dim.
"""

from typing import Any

import torch
from transformers.cache_utils import DynamicIndexedLayer, DynamicLayer, DynamicSlidingWindowLayer

from kvsplice_hf import upstream
from kvsplice_hf.cache.exact import ExactTokens, relocated
from kvsplice_hf.cache.rows import RowGeometry
from kvsplice_hf.cache.splicing import SplicedLayerMixin
from kvsplice_hf.cache.turns import TurnTable, is_writable
from kvsplice_hf.code.projection import LearnedKVSplice
from kvsplice_hf.errors import CacheMismatchError


def grown_capacity(needed: int) -> int:
    """Rows to allocate for `needed` rows: double while small, an eighth more from 8192 rows on.

    Doubling all the way would leave up to half of a long cache unused. With an eighth, a row is copied about nine times
    over the life of the cache, against once per generated token when every step concatenates.
    """
    return needed + min(needed, max(1024, needed // 8))


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
        self.values = self._values_of(self.keys, None)

    def reset(self) -> None:
        super().reset()
        upstream.drop_rows(self)
        self.exact = None
        if self.table is not None:
            self.table.reset()

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


class _GrowingMixin(_DynamicMixin):
    """Appends rows to a buffer with room to spare instead of concatenating the whole past at each step."""

    def __init__(self, geometry: RowGeometry, splice: LearnedKVSplice, **stock_kwargs: Any) -> None:
        super().__init__(geometry, splice, **stock_kwargs)
        # `keys` is a view of its first rows. None while `keys` owns its memory.
        self._buffer: torch.Tensor | None = None
        # Without padding the first K rows are the exact tokens, so that later tokens need not be looked at.
        self._ever_padded = False

    def _store(
        self, rows: torch.Tensor, slots: torch.Tensor | None, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        stored, total = self.keys.shape[-2], self.keys.shape[-2] + rows.shape[-2]
        if stored == 0:
            self.keys, self._buffer = rows, None
        elif torch.is_grad_enabled():
            # Autograd may keep the rows for the backward pass, of the queries if not of the rows themselves; writing
            # into what it keeps would be an error.
            self.keys, self._buffer = torch.cat([self.keys, rows], dim=-2), None
        else:
            if self._buffer is None or self._buffer.shape[-2] < total or not is_writable(self._buffer):
                self._buffer = self._grown(total)
            self._buffer[:, :, stored:total] = rows
            self.keys = self._buffer[:, :, :total]
        if slots is None:
            self.values = self.keys[..., :0]
        else:
            assert isinstance(self.table, TurnTable)
            self.values = self.table.joined(self.values, slots)
        return self.keys, self.values

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
        self, states: tuple[torch.Tensor, torch.Tensor], first_row: int | torch.Tensor, all_rows: torch.Tensor
    ) -> ExactTokens | None:
        self._ever_padded |= self.attention_mask is not None
        if not self._ever_padded and isinstance(first_row, int) and first_row >= self.geometry.sink_tokens:
            return self.exact
        return super()._track_exact(states, first_row, all_rows)

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
        self, states: tuple[torch.Tensor, torch.Tensor], first_row: int | torch.Tensor, all_rows: torch.Tensor
    ) -> ExactTokens | None:
        exact = super()._track_exact(states, first_row, all_rows)
        if exact is None:
            return None
        total = int(first_row) + states[0].shape[2]
        self.exact = exact.shifted(total - self.keys.shape[-2], self.keys.shape[-2])
        return exact.shifted(total - all_rows.shape[2], all_rows.shape[2])


class _WatchedMixin(_DynamicMixin):
    """Notices rows that somebody takes out by hand, as methods of eviction do: `layer.keys = layer.keys[:, :, kept]`.

    Everything that changes the rows goes through here, so that other rows than those of last time were put there from
    outside.
    """

    def __init__(self, geometry: RowGeometry, splice: LearnedKVSplice, **stock_kwargs: Any) -> None:
        super().__init__(geometry, splice, **stock_kwargs)
        self._own_keys: torch.Tensor | None = None
        self._own_values: torch.Tensor | None = None

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
                "(`layer.keys = layer.keys[:, :, kept]`, and the same of `layer.values`); what is in them is this "
                "package's own."
            )
        if self.exact is not None:
            if after.shape[0] != before.shape[0]:
                raise CacheMismatchError(
                    f"The rows of a spliced cache layer were replaced from outside for {after.shape[0]} sequences "
                    f"instead of {before.shape[0]}: their first tokens are kept beside them. Use "
                    "cache.batch_select_indices, batch_repeat_interleave or reorder_cache."
                )
            rows = (before, after)
            if self._own_values is not None and self.geometry.coded_keys and self.values.shape[2] == after.shape[2]:
                rows = (self._own_values, self.values)  # which are different for all rows, as rows need not be
            self.exact = relocated(self.exact, *(part[:, 0] for part in rows))
        self._let_go()
        if not self.geometry.coded_keys:
            self.values = after[..., :0]
        elif self.values.shape[:3] != after.shape[:3]:
            raise CacheMismatchError(
                f"Rows were taken out of a spliced cache layer from outside: {after.shape[2]} of them are left, and "
                f"{self.values.shape[2]} slots in `layer.values`, which say what positions they have. Take the same "
                "ones out of both: `layer.keys = layer.keys[:, :, kept]` and `layer.values = layer.values[:, :, kept]`."
            )

    def replace_slots(self, slots: torch.Tensor) -> None:
        """Other slots of the same rows, [B, 1, S, 1], after the table has forgotten some."""
        self.values = slots
        if self._own_keys is not None:
            self._own_values = slots

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
        self._own_keys = self._own_values = None

    def _watched(self, operation: Any, *args: Any, **kwargs: Any) -> Any:
        self._follow()
        result = operation(*args, **kwargs)
        self._own_keys, self._own_values = (self.keys, self.values) if self.is_initialized else (None, None)
        return result


class SplicedDynamicLayer(_WatchedMixin, _GrowingMixin, DynamicLayer):  # type: ignore[misc]
    """Spliced rows of a full-attention layer."""


class SplicedIndexedLayer(_WatchedMixin, _GrowingMixin, DynamicIndexedLayer):  # type: ignore[misc]
    """Spliced rows, and the indexer's keys as they are, of a sparse-attention layer."""


class SplicedSlidingWindowLayer(_WatchedMixin, _WindowMixin, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """Spliced rows of a sliding-window layer."""
