"""What all spliced cache layers have in common: rows are encoded on the way in, and first tokens kept exactly.

The stock cache layers of transformers are reused whole: a spliced layer gives them the rows as their `keys`, and as
their `values` nothing (width 0), or where keys are coded before their rotation the slots that say how each was rotated
(`turns`). So cropping, beam reordering, sliding windows, static buffers, offloading and the indexer's keys work as
upstream wrote them.

Legend: `B` batch, `T` new tokens, `S` stored tokens, `K` exact tokens, `R` kv_lora_rank, `r` spliced rank,
`P` qk_rope_head_dim.
"""

import copy
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from kvsplice_hf import upstream
from kvsplice_hf.cache.exact import ExactTokens, empty_exact_tokens, fill_exact_tokens
from kvsplice_hf.cache.heads import (
    CompressedHeads,
    compressed_states,
    encode_states,
    exact_states,
    latents_and_keys,
)
from kvsplice_hf.cache.rows import CompressedLatent, RowGeometry
from kvsplice_hf.cache.turns import SLOT_DTYPE, FixedTurns, Turns, TurnTable, as_values
from kvsplice_hf.code.projection import LearnedKVSplice
from kvsplice_hf.errors import CacheMismatchError


# What the hook hands over for one call.
_OF_A_CALL = ("announced", "attention_mask", "embeddings", "position_ids")
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
        # Set by the attention module's hook just before its forward: that a patched module is about to call `update`,
        # which could not tell from keys and values of ordinary attention.
        self.announced: bool | None = None
        # The same: `update` does not get to see the mask.
        self.attention_mask: torch.Tensor | None = None
        # The same: how the model rotates the new keys, and their positions.
        self.embeddings: Any = None
        self.position_ids: Any = None
        # How the stored keys were rotated; where they are coded before that, the hook finds or makes it.
        self.table: TurnTable | FixedTurns | None = None

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
        return {**vars(self), "splice": None, **dict.fromkeys(_OF_A_CALL)}

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate for the batch, dtype and device of `key_states`; widths come from the geometry.

        `early_initialization` calls this with the head size of the expanded keys, which does not matter here.
        """
        if self.geometry.coded_keys:
            self.splice.require_codec_here()
        row_dtype = self.geometry.row_dtype(key_states.dtype)
        rows = key_states.new_empty(key_states.shape[0], 1, 0, self.geometry.row_dim, dtype=row_dtype)
        super().lazy_initialization(rows, self._values_of(rows, None))
        self._allocate_exact(key_states)

    def _values_of(self, rows: torch.Tensor, slots: torch.Tensor | None) -> torch.Tensor:
        """What is stored as the values of rows [B, 1, T, w] with these slots [B or 1, T]."""
        if not self.geometry.coded_keys:
            return rows[..., :0]
        if slots is None:
            return rows.new_empty(*rows.shape[:-1], 1, dtype=SLOT_DTYPE)
        return as_values(slots, rows.shape[0])

    def _allocate_exact(self, key_states: torch.Tensor) -> None:
        if self.geometry.sink_tokens > 0:
            sizes = (key_states.shape[0], self.geometry.sink_tokens, self.geometry.exact_dim)
            self.exact = empty_exact_tokens(*sizes, dtype=key_states.dtype, device=key_states.device)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[CompressedLatent | CompressedHeads, torch.Tensor | CompressedLatent | CompressedHeads]:
        """Encode and store new tokens.

        Args:
            key_states: latents [B, 1, T, R]; or of ordinary attention keys [B, K, T, d].
            value_states: rotated keys [B, 1, T, P]; or values [B, K, T, v].

        Returns:
            All stored tokens as a `CompressedLatent`, and their rotated keys [B, 1, S, P]; where rows are packed, the
            same `CompressedLatent` again, which unpacks when it is read. Of ordinary attention twice the same
            `CompressedHeads`.

        Raises:
            CacheMismatchError: the shapes are not those of this layer's latents, or keys and values come from a module
                that is not patched.
        """
        upstream.check_update_arguments(args, kwargs)
        self._check_shapes(key_states, value_states)
        if self.geometry.heads and not self.announced:
            raise CacheMismatchError(
                "A spliced cache layer got keys and values of an attention module that is not patched, and would hand "
                "it rows that it cannot read. Nothing was stored. Give this model a cache of its own (pass nothing, or "
                "DynamicCache(config=model.config)), or patch it."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        first_row = self._first_new_row()
        new_turns, slots = self._note_turns(first_row)
        latents, k_rot = latents_and_keys(self.splice, key_states, value_states)
        rows = encode_states(self.splice, latents, k_rot, new_turns, self.identity)
        all_rows, all_slots = self._store(rows, slots, *args, **kwargs)
        exact = self._track_exact((latents, k_rot), first_row, all_rows)
        for name in _OF_A_CALL:
            setattr(self, name, None)
        if isinstance(first_row, int):  # rows may have left a sliding window at the front
            first_row = min(first_row, all_rows.shape[2] - rows.shape[2])
        fresh = (latents, k_rot) if self._wants_gradients(latents, k_rot) else None
        turns = self._turns_of(all_slots, new_turns)
        of_call = (rows.shape[2], first_row, key_states.dtype, fresh, turns)
        stored = compressed_states(all_rows, self.splice, exact, *of_call, identity=self.identity)
        as_values = isinstance(stored, CompressedHeads) or stored.is_packed
        return stored, stored if as_values else stored.k_rot

    def _wants_gradients(self, *states: torch.Tensor) -> bool:
        """Whether what is computed from new tokens may be differentiated. (Static caches are not for training.)"""
        return False

    def _check_shapes(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        found = (key_states.shape[1], key_states.shape[-1], value_states.shape[-1])
        needed = (1, self.geometry.kv_lora_rank, self.geometry.qk_rope_head_dim)
        if self.geometry.heads:
            K = self.geometry.heads
            needed = (K, self.geometry.qk_rope_head_dim // K, self.geometry.kv_lora_rank // K)
        if found != needed:
            raise CacheMismatchError(
                f"A spliced cache layer got keys with (heads, width) {found[:2]} and values of width {found[2]}; it "
                f"needs latents with {needed[:2]} and rotated keys of width {needed[2]}. Either the cache belongs to "
                "another model, or this version of transformers caches expanded keys and values here."
            )

    def _first_new_row(self) -> int | torch.Tensor:
        return self.keys.shape[-2]

    def _note_turns(self, first_row: int | torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """How the new keys were rotated, uint8 [B or 1, 1, T, F], and their slots [B or 1, T]; None and None without.

        Raises:
            UpstreamChangedError: nothing says how.
        """
        if not self.geometry.coded_keys:
            return None, None
        if self.embeddings is None or self.table is None:
            raise upstream.changed(
                "a spliced cache layer",
                f"it got no `{upstream.POSITION_EMBEDDINGS}` that say how the new keys were rotated, and its rows hold "
                "keys before their rotation.",
            )
        turns, slots = self._noted(first_row)
        return turns[:, None], slots

    def _noted(self, first_row: int | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert isinstance(self.table, TurnTable)
        return self.table.note(self.embeddings, self.position_ids)

    def _turns_of(self, slots: torch.Tensor, new_turns: torch.Tensor | None) -> Turns | None:
        """How the keys of rows with these slots [B, 1, S, 1] were rotated."""
        if new_turns is None or self.table is None:
            return None
        assert self.table.lines is not None
        return Turns(self.table.lines, slots[:, 0, :, 0])

    def _store(
        self, rows: torch.Tensor, slots: torch.Tensor | None, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep rows [B, 1, T, w] and their slots [B or 1, T]; all of both that the new tokens see."""
        stored: tuple[torch.Tensor, torch.Tensor] = super().update(rows, self._values_of(rows, slots), *args, **kwargs)
        return stored

    def _track_exact(
        self, states: tuple[torch.Tensor, torch.Tensor], first_row: int | torch.Tensor, all_rows: torch.Tensor
    ) -> ExactTokens | None:
        """Keep what is new among the exact tokens; return them as indexed in `all_rows`.

        `states`: latents [B, 1, T, R] and rotated keys [B, 1, T, P], or values and keys of ordinary attention.
        """
        if self.exact is None:
            return None
        kept = exact_states(self.splice, *states)
        self._set_exact(fill_exact_tokens(self.exact, kept[:, 0], self.attention_mask, first_row))
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
