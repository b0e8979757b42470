"""Cache layers from which rows of some tokens are dropped, stock ones and spliced ones.

What a layer says of its length is the number of all tokens that it has seen: models derive positions and masks from it.
Beside the rows lies the position of each, so that a mask over all tokens can be taken apart for the rows that are left.

Rows of a call of a few tokens are dropped when the next call begins: until then assisted decoding may take the tokens
back (`crop`) as if they had never been there.

Legend: `B` batch, `K` key heads, `T` new tokens, `N` rows, `S` tokens seen, `M` rows that stay.
"""

from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from kvsplice_hf import upstream
from kvsplice_hf.cache.dynamic import SplicedDynamicLayer
from kvsplice_hf.cache.exact import UNFILLED, ExactTokens
from kvsplice_hf.cache.turns import is_writable
from kvsplice_hf.errors import CacheMismatchError
from kvsplice_hf.retention.plan import LayerPlan
from kvsplice_hf.retention.selection import EMPTY, staying


# A call of more tokens than this is a prompt, of which no token is taken back: its rows are dropped at once.
MOST_TAKEN_BACK = 64
# A buffer that is larger than its rows by more than this factor is let go.
_MOST_SPARE = 4
# By sequence.
_STATE = ("positions", "gone", "scores", "unsettled")
# The layer that a mixin below is combined with. Typed loosely: its `update` returns tensors, ours need not.
_StockLayer: Any = CacheLayerMixin


class RetainedLayerMixin(_StockLayer):
    """Drops rows. Combined below with each kind of layer that grows.

    Attributes:
        positions: of the token of each row among all seen, int32 [B, N]; `EMPTY` in a row without one. None as long as
            row and position are the same number, and there is no padding.
        gone: tokens of each sequence whose rows were dropped, int64 [B]; None as long as there are none.
        scores: attention that the token of each row has got, float32 [B, N]; None where the policy needs none.
        unsettled: the same of the last call by query, float32 [B, T, N], until that is settled.
        seen: S.
        open_tokens: T of the last call, until that is settled.
        last_drop: S when rows were dropped last.
        plan: what the hook says of the running call; None between calls.
        real: the same: which of all seen and new tokens are no padding, bool [B, S + T]; None: all.
        is_running: whether a call has stored rows of which nothing is decided.
        is_ragged: whether some rows are `EMPTY`.
        retention: identity of the plan that the rows were kept by.
    """

    keys: Any
    values: Any

    def begin_retention(self) -> None:
        """Start from the rows that are there, all of them tokens."""
        self.positions: torch.Tensor | None = None
        self.gone: torch.Tensor | None = None
        self.scores: torch.Tensor | None = None
        self.unsettled: torch.Tensor | None = None
        self.seen, self.open_tokens, self.last_drop = self.row_count, 0, 0
        self.plan: LayerPlan | None = None
        self.real: torch.Tensor | None = None
        self.is_running, self.is_ragged, self.retention = False, False, ""

    @property
    def row_count(self) -> int:
        """N."""
        return self.keys.shape[-2] if self.is_initialized and self.keys.numel() else 0

    def get_seq_length(self) -> int:
        """S: all tokens seen, so that positions go on from them."""
        return self.seen

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Store new tokens, as the layer without retention does.

        Args:
            key_states, value_states: as of that layer.

        Returns:
            All N + T rows, as that layer gives them.

        Raises:
            CacheMismatchError: the call does not come from a model inside the context of retention, an earlier one
                ended with an error, or somebody else has taken rows out.
        """
        upstream.check_update_arguments(args, kwargs)
        if self.plan is None:
            raise CacheMismatchError(
                "A cache from which rows are dropped got keys and values outside of retention. Nothing was stored. "
                "Call the model inside `with Retention(...)(model):`, or give it a cache of its own."
            )
        self._require_own_rows()
        found = super().update(key_states, value_states, *args, **kwargs)
        self._append(key_states.shape[-2])
        self.is_running = True
        return found

    def _require_own_rows(self) -> None:
        rows = self.seen if self.positions is None else self.positions.shape[-1]
        if rows != self.row_count:
            raise CacheMismatchError(
                f"A cache from which rows are dropped has {self.row_count} rows and positions for {rows}: somebody "
                "else has taken rows out of it. Leave that to retention, or start from an empty cache."
            )

    def _append(self, count: int) -> None:
        """Note the positions of new tokens."""
        start, end, real = self.seen, self.seen + count, self.real
        if self.positions is not None or real is not None:
            batch, device = self.keys.shape[0], self.keys.device
            new = torch.arange(start, end, dtype=torch.int32, device=device)
            old, new = self.positions, new.expand(batch, -1)
            real = None if real is None else real.expand(batch, -1)
            if real is not None and old is None:
                old = torch.arange(start, dtype=torch.int32, device=device).masked_fill(~real[:, :start], EMPTY)
                self.is_ragged = True
            if real is not None:
                new = new.masked_fill(~real[:, start:], EMPTY)
                self.is_ragged = self.is_ragged or not bool(real[:, start:].all())
            self.positions = new if old is None else torch.cat([old, new], dim=-1)
        self.seen, self.open_tokens = end, count
        self.real = None

    def mask_of_rows(self, mask: torch.Tensor | None, count: int, dtype: torch.dtype) -> torch.Tensor | None:
        """The part of a mask over all tokens that is about the rows here.

        Args:
            mask: bool or added to scores, [B or 1, 1, T, S + T]; None: causal.
            count: T.
            dtype: of a mask that is made where there was none.

        Returns:
            [B, 1, T, N + T], or None.
        """
        if self.gone is None or (mask is None and count == 1 and not self.is_ragged):
            return mask
        assert self.positions is not None
        device = self.positions.device
        new = torch.arange(self.seen, self.seen + count, dtype=torch.int32, device=device)
        positions = torch.cat([self.positions, new.expand(len(self.positions), -1)], dim=-1)
        hidden = (positions == EMPTY)[:, None, None].expand(-1, 1, count, -1)
        if mask is None:
            hidden = hidden | (positions[:, None, None] > new[:, None])
            found = torch.zeros(hidden.shape, dtype=dtype, device=device)
        else:
            places = positions.clamp_min(0).long()[:, None, None].expand(-1, 1, count, -1)
            found = mask.to(device).expand(len(positions), -1, -1, -1).gather(-1, places)
        return found.masked_fill(hidden, False if found.dtype == torch.bool else torch.finfo(found.dtype).min)

    def finish(self, plan: LayerPlan, received: torch.Tensor | None) -> None:
        """The call is over: drop rows, or leave that to the next one where its tokens may be taken back.

        Args:
            plan: of the call.
            received: attention of its queries on all rows, float32 [B, T, N]; None where the policy needs none.
        """
        self.is_running, self.retention = False, plan.identity
        self.unsettled = received
        if self.open_tokens == 1 or self.open_tokens > MOST_TAKEN_BACK:
            self.settle(plan)

    def settle(self, plan: LayerPlan) -> None:
        """Drop the rows that the plan does not keep.

        Raises:
            CacheMismatchError: somebody else has taken rows out.
        """
        if not self.open_tokens:
            return
        self._require_own_rows()
        self.open_tokens = 0
        if self.unsettled is not None:
            scores = self.unsettled.sum(1)
            if self.scores is not None:
                scores[:, : self.scores.shape[1]] += self.scores
            self.scores, self.unsettled = scores, None
        count, device = self.row_count, self.keys.device
        # A share is of the tokens of each sequence, which may be as long as others but for padding that is gone.
        by_sequence = self.is_ragged or plan.budget.share is not None
        real = self.positions != EMPTY if self.positions is not None and by_sequence else None
        held, seen = [count], [self.seen]
        if real is not None:
            held = real.sum(-1).tolist()
            seen = held if self.gone is None else (real.sum(-1) + self.gone).tolist()
        limits = [plan.limit(*each) for each in zip(held, seen, strict=True)]
        if limits == held:
            return
        positions = self.positions
        if positions is None:
            positions = torch.arange(count, dtype=torch.int32, device=device).expand(self.keys.shape[0], -1)
        places, stays = staying(real, count, limits, plan.always, self._order(plan, positions), device)
        self._keep_rows(places, stays)
        self.positions = self._chosen(positions, places, stays, EMPTY)
        if self.scores is not None:
            self.scores = self._chosen(self.scores, places, stays, 0.0)
        dropped = torch.tensor(held, dtype=torch.int64, device=device)
        dropped -= torch.tensor(limits, dtype=torch.int64, device=device)
        self.gone = (0 if self.gone is None else self.gone) + dropped.expand(self.keys.shape[0])
        self.is_ragged = min(limits) < max(limits)
        self.last_drop = self.seen

    def _order(self, plan: LayerPlan, positions: torch.Tensor) -> torch.Tensor | None:
        """What tokens are ranked by, float32 [B, N]; None: they stay in the order in which they came."""
        if not plan.scored:
            return None
        assert self.scores is not None
        if plan.by == "sum":
            return self.scores
        ends = positions.amax(-1, keepdim=True) + 1  # behind the last token of each sequence
        return self.scores / (ends - positions).clamp_min(1)

    def _chosen(
        self, state: torch.Tensor, places: torch.Tensor, stays: torch.Tensor | None, nothing: float
    ) -> torch.Tensor:
        """What is known of the rows that stay, [B, M]."""
        found = state.gather(-1, places.expand(len(state), -1))
        return found if stays is None else found.masked_fill(~stays, nothing)

    def _keep_rows(self, places: torch.Tensor, stays: torch.Tensor | None) -> None:
        """Drop all rows but those at places [B or 1, M]; which of them hold one, bool [B, M], or None: all."""
        self.keys, self.values = _taken(self.keys, places), _taken(self.values, places)

    def crop(self, tokens_to_remove: int) -> None:
        """Take tokens back from the end.

        Raises:
            CacheMismatchError: rows were dropped on their account, or their attention is among the scores.
        """
        # What is positive is how many tokens are to be left: early releases take it, later ones refuse it below.
        count = -tokens_to_remove if tokens_to_remove <= 0 else max(self.seen - tokens_to_remove, 0)
        if tokens_to_remove < 0 and self.seen and count >= self.seen:
            self.reset()
            return
        if count and self.seen:
            self._require_removable(count)
        before = self.row_count
        super().crop(tokens_to_remove)
        if self.row_count == before:
            return
        self.seen, self.open_tokens = self.seen - count, max(self.open_tokens - count, 0)
        if self.positions is not None:
            self.positions = self.positions[:, :-count]
        if self.unsettled is not None:
            self.unsettled = self.unsettled[:, :-count, :-count]

    def _require_removable(self, count: int) -> None:
        scored = self.scores is not None or self.unsettled is not None
        if (self.gone is None or self.seen - count >= self.last_drop) and not (scored and count > self.open_tokens):
            return
        why = (
            "what they attended to is among the scores"
            if scored
            else f"rows were dropped when there were {self.last_drop} tokens, which would still be there without them"
        )
        raise CacheMismatchError(
            f"The last {count} of {self.seen} tokens cannot be taken out of a cache from which rows are dropped: "
            f"{why}. Only tokens of the last call can be, if it brought 2 to {MOST_TAKEN_BACK}. Start from an empty "
            "cache, or keep more tokens."
        )

    def reset(self) -> None:
        super().reset()
        upstream.drop_rows(self)
        self.begin_retention()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._map_state(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map_state(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._map_state(lambda tensor: tensor[indices])

    def offload(self) -> None:
        super().offload()
        self._map_state(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        super().prefetch()
        self._map_state(lambda tensor: tensor.to(self.device, non_blocking=True))

    def _map_state(self, function: Any) -> None:
        for name in _STATE:
            held = getattr(self, name)
            if held is not None:
                setattr(self, name, function(held))


class RetainedLayer(RetainedLayerMixin, DynamicLayer):
    """Keys and values as they are, or latents and rotated keys, of the tokens that are kept."""


class RetainedSplicedLayer(RetainedLayerMixin, SplicedDynamicLayer):
    """Spliced rows of the tokens that are kept."""

    def _keep_rows(self, places: torch.Tensor, stays: torch.Tensor | None) -> None:
        self._watched(self._keep_own, places, stays)

    def _keep_own(self, places: torch.Tensor, stays: torch.Tensor | None) -> None:
        before = self.row_count
        rows, values = _taken(self.keys, places), _taken(self.values, places)
        count, buffer = rows.shape[-2], self._buffer
        if buffer is None or buffer.shape[-2] > _MOST_SPARE * max(count, 1) or not is_writable(buffer):
            self._let_go()
            self.keys = rows
        else:  # the next token is written behind them
            buffer[:, :, :count] = rows
            self.keys = buffer[:, :, :count]
        self.values = values if self.geometry.coded_keys else self.keys[..., :0]
        if self.exact is not None:
            self.exact = _moved(self.exact, before, places, stays)


def _taken(rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Of rows [B, K, N, w] those at places [B or 1, M]."""
    if len(places) == 1:
        return rows.index_select(2, places[0])
    return rows.gather(2, places[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[3]))


def _moved(exact: ExactTokens, before: int, places: torch.Tensor, stays: torch.Tensor | None) -> ExactTokens:
    """Exact tokens among the rows that stay, of `before` rows; -1 where a token has no row any more."""
    batch, slots = len(exact.positions), places.shape[-1]
    places = places.expand(batch, -1)
    # One place more, for slots without a row.
    sources = places if stays is None else torch.where(stays, places, before)
    now = torch.full((batch, before + 1), -1, dtype=torch.int64, device=places.device)
    new = torch.arange(slots, dtype=torch.int64, device=places.device).expand(batch, -1)
    now.scatter_(1, sources, new)
    now[:, before] = -1
    valid = exact.valid(before)
    found = now.gather(1, torch.where(valid, exact.positions, before))
    return ExactTokens(exact.latents, torch.where(exact.positions == UNFILLED, UNFILLED, found))
