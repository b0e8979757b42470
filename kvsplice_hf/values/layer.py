"""A cache layer with the keys of all tokens and the values of some.

Each key head keeps the values of its own tokens, in slots with their positions and with the attention that they have
got so far. The first tokens of a sequence lie beside, and stay.

Legend: `B` batch, `K` key heads, `S` stored tokens, `T` new ones, `F` first tokens, `M` slots, `d`, `v` sizes of a key
and of a value, `w` numbers that are stored of a value: v, or those of its code.
"""

from typing import Any, NamedTuple

import torch
from transformers.cache_utils import DynamicLayer

from kvsplice_hf import upstream
from kvsplice_hf.errors import CacheMismatchError
from kvsplice_hf.retention.selection import EMPTY, Budget, Extent, chosen
from kvsplice_hf.values.compression import LayerGeometry


# Typed loosely: its `update` returns tensors, ours does not.
_StockLayer: Any = DynamicLayer


class LayerPlan(NamedTuple):
    """What is done with the values of a layer.

    Attributes:
        budget: how many are kept.
        by: which scores decide.
        geometry: what they are coded by, or None.
        compresses_first: whether the call that brings a value reads what its code says.
    """

    budget: Budget
    by: str
    geometry: LayerGeometry | None
    compresses_first: bool

    @property
    def identity(self) -> str:
        """Of what has to be the same in all calls on one cache."""
        return f"{self.budget.first} first, {'exact' if self.geometry is None else self.geometry.identity}"


class ValuePrunedLayer(_StockLayer):
    """Keys of all tokens as in a stock layer; values, positions and scores of those that are kept.

    Attributes:
        keys: [B, K, S, d].
        values: of tokens in slots, [B, K, M, w].
        positions: of those tokens, int32 [B, K, M]; `EMPTY` in a slot without one.
        scores: attention that they have got, float32 [B, K, M].
        first_values: of the first tokens, as they came, [B, K, F, v].
        first_positions: of those tokens, int32 [B, F].
        plan: what the hook says of the running call; None between calls.
        awaits_scores: whether values of the running call are not stored yet.
        identity: of the plan that the stored values were made by.
    """

    keys: Any
    values: Any

    def __init__(self) -> None:
        super().__init__()
        self.positions: torch.Tensor | None = None
        self.scores: torch.Tensor | None = None
        self.first_values: torch.Tensor | None = None
        self.first_positions: torch.Tensor | None = None
        self.plan: LayerPlan | None = None
        self.awaits_scores = False
        self.identity = ""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, "SomeValues"]:
        """Store the keys of new tokens; their values wait for what attention says of them.

        Args:
            key_states: [B, K, T, d].
            value_states: [B, K, T, v].

        Raises:
            CacheMismatchError: the call does not come from a model inside the context of value pruning.
        """
        upstream.check_update_arguments(args, kwargs)
        if self.plan is None:
            raise CacheMismatchError(
                "A cache whose values are pruned got keys and values outside of value pruning. Nothing was stored. "
                "Call the model inside `with ValuePruning(...)(model):`, or give it a cache of its own."
            )
        if self.awaits_scores:
            raise CacheMismatchError(
                "An earlier call on this cache ended with an error before the values of its tokens were stored. Start "
                "from an empty cache."
            )
        plan, self.plan = self.plan, None
        if not self.is_initialized:
            self._allocate(key_states, value_states, plan)
        self.keys = torch.cat([self.keys, key_states], dim=-2)
        self.awaits_scores = True
        return self.keys, SomeValues(self, plan, value_states)

    def _allocate(self, key_states: torch.Tensor, value_states: torch.Tensor, plan: LayerPlan) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        batch, heads = key_states.shape[:2]
        width = value_states.shape[-1] if plan.geometry is None else plan.geometry.width
        first = plan.budget.first
        self.keys = key_states[:, :, :0]
        self.values = value_states.new_empty(batch, heads, 0, width)
        self.positions = torch.full((batch, heads, 0), EMPTY, dtype=torch.int32, device=self.device)
        self.scores = torch.zeros((batch, heads, 0), dtype=torch.float32, device=self.device)
        self.first_values = value_states.new_zeros(batch, heads, first, value_states.shape[-1])
        self.first_positions = torch.full((batch, first), EMPTY, dtype=torch.int32, device=self.device)
        self.identity = plan.identity

    def keep(self, plan: LayerPlan, values: torch.Tensor, received: torch.Tensor, extent: Extent) -> None:
        """Store the values of new tokens, and let go of those that have lost.

        Args:
            plan: of the call.
            values: of new tokens, [B, K, T, w].
            received: attention of the call on slots and new tokens, float32 [B, K, M + T].
            extent: of the sequences, the new tokens included.
        """
        assert self.positions is not None
        assert self.scores is not None
        new = extent.positions(values.shape[2], values.device)
        if plan.budget.first:  # which lie beside
            ranks = extent.ranks(values.shape[2], values.device)
            new = new.masked_fill(ranks < plan.budget.first, EMPTY)
        new = new[:, None].expand(*values.shape[:2], -1)
        positions = torch.cat([self.positions, new], dim=-1)
        scores = received.clone()
        scores[..., : self.scores.shape[-1]] += self.scores
        found = chosen(positions, scores, extent, plan.budget, plan.by)
        self.awaits_scores = False
        self._take(torch.cat([self.values, values], dim=-2), positions, scores, found)

    def prune(self, plan: LayerPlan) -> None:
        """Let values go, and code the others, in a cache without padding that holds all of them as they came.

        What a call under the plan would have left of a prompt, without another prompt.

        Args:
            plan: with as many first tokens as the cache was filled with.
        """
        assert self.positions is not None
        assert self.scores is not None
        found = chosen(self.positions, self.scores, Extent(self.keys.shape[-2], None), plan.budget, plan.by)
        values = self.values if plan.geometry is None else plan.geometry.encode(self.values)
        self.identity = plan.identity
        self._take(values, self.positions, self.scores, found)

    def _take(
        self,
        values: torch.Tensor,
        positions: torch.Tensor,
        scores: torch.Tensor,
        found: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> None:
        """Keep the chosen candidates, or all."""
        if found is not None:
            places, stays = found
            values = values.gather(2, places[..., None].expand(-1, -1, -1, values.shape[-1]))
            positions = positions.gather(2, places).masked_fill(~stays, EMPTY)
            scores = scores.gather(2, places).masked_fill(~stays, 0.0)
        self.values, self.positions, self.scores = values, positions, scores

    def keep_first(self, values: torch.Tensor, extent: Extent) -> None:
        """Store the first tokens of each sequence among new ones, as they came, [B, K, T, v]."""
        assert self.first_values is not None
        assert self.first_positions is not None
        first, count = self.first_positions.shape[1], values.shape[2]
        if not first or (extent.real is None and extent.length - count >= first):
            return
        ranks = extent.ranks(count, values.device)
        positions = extent.positions(count, values.device)
        # Others: caches that were copied may still see these.
        self.first_values, self.first_positions = self.first_values.clone(), self.first_positions.clone()
        for rank in range(first):
            here = (ranks == rank) & (positions != EMPTY)  # [B or 1, T]
            there = here.any(-1, keepdim=True)
            place = here.int().argmax(-1)
            found = values.index_select(2, place) if len(place) == 1 else _taken(values, place)
            old = self.first_values[:, :, rank : rank + 1]
            self.first_values[:, :, rank : rank + 1] = torch.where(there[:, None, :, None], found, old)
            position = positions.gather(1, place[:, None])
            self.first_positions[:, rank : rank + 1] = torch.where(
                there, position, self.first_positions[:, rank : rank + 1]
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Remove tokens from the end. Values that were let go on their account do not come back."""
        held = self.values
        if self.is_initialized:
            self.values = self.keys[..., :0]
        super().crop(tokens_to_remove)
        if not self.is_initialized:
            return
        self.values, length = held, self.keys.shape[-2]
        assert self.positions is not None
        assert self.scores is not None
        assert self.first_positions is not None
        gone = self.positions >= length
        self.positions, self.scores = self.positions.masked_fill(gone, EMPTY), self.scores.masked_fill(gone, 0.0)
        self.first_positions = self.first_positions.masked_fill(self.first_positions >= length, EMPTY)

    def reset(self) -> None:
        super().reset()
        upstream.drop_rows(self)
        self.positions = self.scores = self.first_values = self.first_positions = None
        self.plan, self.awaits_scores, self.identity = None, False, ""

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._map(lambda tensor: tensor[indices, ...])

    def offload(self) -> None:
        super().offload()
        self._map(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        super().prefetch()
        self._map(lambda tensor: tensor.to(self.device, non_blocking=True))

    def _map(self, function: Any) -> None:
        for name in ("positions", "scores", "first_values", "first_positions"):
            held = getattr(self, name)
            if held is not None:
                setattr(self, name, function(held))


def _taken(values: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Of values [B, K, T, v] the one at a place [B] of each sequence, [B, K, 1, v]."""
    return values.gather(2, place[:, None, None, None].expand(-1, values.shape[1], 1, values.shape[-1]))


class SomeValues:
    """What `update` returns in the place of values: those of new tokens, and the layer that has the others.

    Attributes:
        layer: the cache layer.
        plan: of the call.
        new: values of new tokens as they came, [B, K, T, v].
    """

    def __init__(self, layer: ValuePrunedLayer, plan: LayerPlan, new: torch.Tensor) -> None:
        self.layer, self.plan, self.new = layer, plan, new

    @property
    def shape(self) -> torch.Size:
        """[B, K, S, v]: models may read the number of tokens from it."""
        return torch.Size((*self.new.shape[:2], self.layer.keys.shape[-2], self.new.shape[-1]))

    def __getitem__(self, index: Any) -> Any:
        return self.__getattr__("[...]")

    def __getattr__(self, name: str) -> Any:
        raise upstream.changed("an attention module", f"`{name}` of pruned values was asked for, as of a tensor.")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise upstream.changed(
            "an attention module",
            f"pruned values came to {getattr(function, '__name__', function)}, and not to the attention function "
            "registered under the name in the config.",
        )
