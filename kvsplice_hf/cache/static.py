"""Spliced cache layers of fixed size: full attention, sparse attention with an indexer, sliding windows."""

import torch
from transformers.cache_utils import StaticIndexedLayer, StaticLayer, StaticSlidingWindowLayer

from kvsplice_hf.cache.exact import ExactTokens, empty_exact_tokens
from kvsplice_hf.cache.splicing import SplicedLayerMixin
from kvsplice_hf.cache.turns import FixedTurns, Turns


class _StaticMixin(SplicedLayerMixin):
    """Buffers of fixed size, changed in place so that compiled graphs keep their addresses."""

    def _allocate_exact(self, key_states: torch.Tensor) -> None:
        super()._allocate_exact(key_states)
        if self.exact is not None and not torch.compiler.is_compiling():
            for tensor in self.exact:
                torch._dynamo.mark_static_address(tensor)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        if self.geometry.coded_keys:
            self._allocate_slots(key_states)

    def _allocate_slots(self, key_states: torch.Tensor) -> None:
        """A table, unless another layer has one, and a slot for each row."""
        assert self.splice.keys is not None
        batch, length = key_states.shape[0], self.max_cache_len
        if not isinstance(self.table, FixedTurns) or (self.table.batch, self.table.length) != (batch, length):
            self.table = FixedTurns(self.splice.keys.pairs[2], batch, length, key_states.device)
        self.values = self.table.row_slots

    def _noted(self, first_row: int | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert isinstance(self.table, FixedTurns)
        return self.table.note(self.embeddings, first_row)

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

    def _allocate_slots(self, key_states: torch.Tensor) -> None:
        super()._allocate_slots(key_states)
        # Rows move through the window, and their slots with them, in place.
        self.values = self.values.clone()
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.values)

    def _noted(self, first_row: int | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super()._noted(self.cumulative_length_int)

    def _turns_of(self, slots: torch.Tensor, new_turns: torch.Tensor | None) -> Turns | None:
        assert self.table is None or isinstance(self.table, FixedTurns)
        if new_turns is None or self.table is None or self.table.before is None:
            return super()._turns_of(slots, new_turns)
        return self.table.unclosed(slots[:, 0, :, 0], new_turns[:, 0])

    def _first_new_row(self) -> int | torch.Tensor:
        return min(self.cumulative_length_int, self.max_cache_len)

    def _track_exact(
        self, states: tuple[torch.Tensor, torch.Tensor], first_row: int | torch.Tensor, all_rows: torch.Tensor
    ) -> ExactTokens | None:
        exact = super()._track_exact(states, first_row, all_rows)
        if exact is None:
            return None
        window, total = self.keys.shape[-2], int(first_row) + states[0].shape[2]
        kept = exact.shifted(max(total - window, 0), window)
        # Returned are either the stored rows, or all rows before the window closed over them.
        returned = kept if all_rows is self.keys else exact.shifted(total - all_rows.shape[2], all_rows.shape[2])
        returned = ExactTokens(*(tensor.clone() for tensor in returned))
        self._set_exact(kept)
        return returned


class SplicedStaticLayer(_StaticMixin, StaticLayer):  # type: ignore[misc]
    """Spliced rows of a full-attention layer in a buffer of fixed size."""


class SplicedStaticIndexedLayer(_StaticMixin, StaticIndexedLayer):  # type: ignore[misc]
    """Spliced rows of a sparse-attention layer in a buffer of fixed size."""


class SplicedStaticSlidingWindowLayer(_StaticWindowMixin, StaticSlidingWindowLayer):  # type: ignore[misc]
    """Spliced rows of a sliding-window layer in a buffer of fixed size."""
