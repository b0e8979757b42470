"""How the keys in a cache were rotated: once for all layers, by slots.

Rows hold keys before their rotation (`code.keys`), so that reading them needs the angles that each token was rotated
by. All layers of one rotary embedding have the same ones. A table holds them, and beside each row lies the slot
of its token in the table: an integer, in what is the `values` of a stock cache layer, so that cropping, beams, windows
and rows that somebody takes out by hand move it along. Layers share these integers too.

A table holds what was seen, and computes nothing: it is right for every kind of RoPE. In a cache that grows a slot is
the position of its token, where positions reach the attention modules and tokens at one position were rotated alike;
otherwise each token gets a slot of its own. In a static cache a slot is a row.

Legend: `B` sequences, `T` new tokens, `S` stored tokens, `F` pairs of numbers of a key.
"""

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from kvsplice_hf.code.keys import TURN_DTYPE, turns_of


SLOT_DTYPE = torch.int32
# Positions this far beyond the tokens that there are do not get slots by position: the table would be mostly empty.
_MOST_EMPTY = 1024
_EMPTY = 255  # no angle
# Slots of tokens that have no row any more are forgotten when they are more than this part of the others, and some.
_MOST_DEAD = 4
_FEW_DEAD = 64


class Turns(NamedTuple):
    """How the tokens of one call were rotated.

    Attributes:
        lines: uint8 [F, slots], the table.
        slots: int32 [B, S], of the tokens.
    """

    lines: torch.Tensor
    slots: torch.Tensor

    def by_token(self, tokens: slice = slice(None)) -> torch.Tensor:
        """uint8 [B, s, F] of some of the tokens."""
        return self.lines[:, self.slots[:, tokens].long()].permute(1, 2, 0)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Turns":
        return Turns(*(tensor.to(device, non_blocking=non_blocking) for tensor in self))


def embedding_tensor(embeddings: Any) -> torch.Tensor:
    """The tensor by whose identity embeddings are known again: all layers of a call get the same one."""
    return embeddings if isinstance(embeddings, torch.Tensor) else embeddings[0]


class _OfLastCall:
    """Whose angles a table was given last: all layers of a call ask with the same ones."""

    # A weak reference to the tensor of the embeddings.
    _seen: Any

    def is_of(self, embeddings: Any) -> bool:
        """Whether the embeddings of the running call were noted here."""
        return self._seen is not None and self._seen() is embedding_tensor(embeddings)


class TurnTable(_OfLastCall):
    """The table of a growing cache.

    Args:
        columns: which of the model's angles turn its keys, int64 [F].
    """

    def __init__(self, columns: torch.Tensor) -> None:
        self.columns = columns
        self.lines: torch.Tensor | None = None
        self.used = 0
        # Position of the first slot; None before the first token.
        self._base: int | None = None
        self._by_position = True
        # Of the last call: its embeddings, and what was found for them.
        self._seen: Any = None
        self._noted: tuple[torch.Tensor, torch.Tensor] | None = None
        self._joined: tuple[Any, ...] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_seen": None, "_noted": None, "_joined": None}

    @property
    def nbytes(self) -> int:
        """Of the slots in use."""
        return 0 if self.lines is None else self.used * self.lines.shape[0] * self.lines.itemsize

    def note(self, embeddings: Any, position_ids: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep how new tokens are rotated.

        Args:
            embeddings: as the attention modules get them.
            position_ids: the same, or None.

        Returns:
            Their turns uint8 [B or 1, T, F], and their slots int32 [B or 1, T].
        """
        if self._noted is not None and self.is_of(embeddings):
            return self._noted
        turns = turns_of(embeddings, self.columns)
        self._noted = turns, self._place(turns, position_ids)
        self._seen = None if torch.compiler.is_compiling() else weakref.ref(embedding_tensor(embeddings))
        return self._noted

    def _place(self, turns: torch.Tensor, position_ids: Any) -> torch.Tensor:
        if self._by_position:
            slots = self._at_positions(turns, position_ids)
            if slots is not None:
                return slots
            self._by_position = False
        start, count = self.used, turns.shape[0] * turns.shape[1]
        self._grow(start + count, turns)
        assert self.lines is not None
        self.lines[:, start : start + count] = turns.flatten(0, 1).T
        slots = torch.arange(start, start + count, dtype=SLOT_DTYPE, device=turns.device)
        return slots.view(turns.shape[:2])

    def _at_positions(self, turns: torch.Tensor, position_ids: Any) -> torch.Tensor | None:
        """Slots by position, or None where a slot would have to hold two different rotations."""
        if isinstance(position_ids, torch.Tensor) and position_ids.dim() == 3:
            position_ids = position_ids[0]  # of several axes, along which text goes in step
        fits = isinstance(position_ids, torch.Tensor) and position_ids.shape == turns.shape[:2]
        if not fits or torch.compiler.is_compiling():
            return None
        positions = position_ids.to(turns.device)
        low, high = (int(end) for end in positions.aminmax())
        base = low if self._base is None else self._base
        if low < base or high - base >= 2 * (self.used + positions.shape[1]) + _MOST_EMPTY:
            return None
        places = positions - base
        self._grow(high - base + 1, turns)
        assert self.lines is not None
        before, wanted = self.lines[:, places], turns.permute(2, 0, 1)
        free = before == _EMPTY
        self.lines[:, places] = torch.where(free, wanted, before)
        if not torch.equal(self.lines[:, places], wanted):
            return None
        self._base = base
        return places.to(SLOT_DTYPE)

    def _grow(self, count: int, turns: torch.Tensor) -> None:
        """Have `count` slots, new ones empty."""
        lines = self.lines
        if lines is None or not is_writable(lines) or lines.shape[1] < count or lines.device != turns.device:
            capacity = max(count + min(count, max(1024, count // 8)), 0 if lines is None else lines.shape[1])
            grown = torch.full((turns.shape[2], capacity), _EMPTY, dtype=TURN_DTYPE, device=turns.device)
            if lines is not None:
                grown[:, : self.used] = lines[:, : self.used]
            self.lines = grown
        self.used = max(self.used, count)

    def joined(self, before: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Slots of stored tokens and of new ones, int32 [B, 1, S, 1]: the same tensor for layers that ask the same.

        Args:
            before: of the stored ones, [B, 1, S', 1].
            slots: of the new ones, as `note` gives them, [B or 1, T].
        """
        return self.shared("join", before, slots, lambda: torch.cat([before, as_values(slots, before.shape[0])], 2))

    def shared(self, operation: str, before: torch.Tensor, argument: Any, compute: Any) -> torch.Tensor:
        """`compute()`, or what it gave for the layer before, if that did the same with the same slots."""
        known = self._joined
        if known is not None and not torch.compiler.is_compiling():
            same = known[0] == operation and known[2] is argument
            if same and _is_same(known[1], before):
                result: torch.Tensor = known[3]
                return result
        result = compute()
        self._joined = operation, before, argument, result
        return result

    def compacted(self, live: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """Forget the slots that no row refers to, where there are many of them.

        Args:
            live: the slots of all rows of all layers that have this table, int32 of any shape.

        Returns:
            The new slots by the old ones, int32 [old slots]; None where nothing has changed.
        """
        if self.lines is None:
            return None
        needed = torch.zeros(self.used, dtype=torch.bool, device=self.lines.device)
        for slots in live:
            needed[slots.flatten().long().to(needed.device)] = True
        count = int(needed.sum())
        if self.used <= count + count // _MOST_DEAD + _FEW_DEAD:
            return None
        self.lines, self.used = self.lines[:, : self.used][:, needed], count
        # A slot is no longer the position of its token.
        self._base, self._by_position = None, False
        self._seen = self._noted = self._joined = None
        return (needed.cumsum(0) - 1).to(SLOT_DTYPE)

    def reset(self) -> None:
        """Forget everything."""
        self.__init__(self.columns)  # type: ignore[misc]

    def to_save(self) -> dict[str, Any]:
        """All that a copy in another process needs, as tensors and plain values."""
        lines = None if self.lines is None else self.lines[:, : self.used]
        return {"lines": lines, "used": self.used, "base": self._base, "by_position": self._by_position}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Become the table that `to_save` gave."""
        self.reset()
        self.lines, self.used = saved["lines"], saved["used"]
        self._base, self._by_position = saved["base"], saved["by_position"]


def is_writable(tensor: torch.Tensor) -> bool:
    """A tensor made in inference mode can be changed there only. (Dynamo cannot ask, and runs in no such mode.)"""
    return torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not tensor.is_inference()


def as_values(slots: torch.Tensor, batch: int) -> torch.Tensor:
    """Slots [B or 1, T] in the place of values, [B, 1, T, 1]."""
    return slots.expand(batch, -1)[:, None, :, None]


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are one, or views of the same numbers."""
    if one is other:
        return True
    alike = one.shape == other.shape and one.stride() == other.stride() and one.device == other.device
    return alike and (one.numel() == 0 or one.data_ptr() == other.data_ptr())


class FixedTurns(_OfLastCall):
    """The table of static cache layers of one length: a slot is a row, and in a window the next row, round and round.

    Changed in place, so that compiled graphs keep its address.

    Args:
        columns: which of the model's angles turn its keys, int64 [F].
        batch, length: sequences, and rows of each.
        device: of the cache.
    """

    def __init__(self, columns: torch.Tensor, batch: int, length: int, device: torch.device) -> None:
        self.columns, self.batch, self.length = columns.to(device), batch, length
        self.lines = torch.zeros(len(columns), batch * length, dtype=TURN_DTYPE, device=device)
        # The slots of rows that stay where they are, in the place of values: one tensor for all layers.
        self.row_slots = torch.arange(batch * length, dtype=SLOT_DTYPE, device=device).view(batch, 1, length, 1)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.lines)
            torch._dynamo.mark_static_address(self.row_slots)
        # The lines before the last call, where it has overwritten some that its tokens still see.
        self.before: torch.Tensor | None = None
        self._seen: Any = None
        self._noted: tuple[torch.Tensor, torch.Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "before": None, "_seen": None, "_noted": None}

    @property
    def nbytes(self) -> int:
        """Of all slots."""
        return self.lines.nbytes

    def note(self, embeddings: Any, first: int | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep how new tokens are rotated; those that would be overwritten at once are not.

        Args:
            embeddings: as the attention modules get them.
            first: how many tokens came before.

        Returns:
            Their turns uint8 [B, T, F], and their slots int32 [B, T].
        """
        if self._noted is not None and not torch.compiler.is_compiling() and self.is_of(embeddings):
            return self._noted
        turns = turns_of(embeddings, self.columns).expand(self.batch, -1, -1)
        count = turns.shape[1]
        row = (torch.arange(count, dtype=torch.int64, device=turns.device) + first) % self.length
        sequence = torch.arange(self.batch, dtype=torch.int64, device=turns.device)
        slots = sequence[:, None] * self.length + row
        closes = count > 1 and isinstance(first, int) and first + count > self.length
        self.before = self.lines.clone() if closes else None
        kept = slice(max(0, count - self.length), None)
        self.lines.index_copy_(1, slots[:, kept].flatten(), turns[:, kept].flatten(0, 1).T.contiguous())
        found = turns, slots.to(SLOT_DTYPE)
        if not torch.compiler.is_compiling():
            self._seen, self._noted = weakref.ref(embedding_tensor(embeddings)), found
        return found

    def unclosed(self, slots: torch.Tensor, new_turns: torch.Tensor) -> Turns:
        """How rows were rotated that several new tokens of a window see, of which more are left than it holds.

        Args:
            slots: of all rows, [B, S]; those of the new tokens are not read.
            new_turns: [B, T, F].
        """
        assert self.before is not None
        batch, count = new_turns.shape[:2]
        lines = torch.cat([self.before, new_turns.flatten(0, 1).T], dim=1)
        new = torch.arange(batch * count, dtype=SLOT_DTYPE, device=slots.device) + self.before.shape[1]
        return Turns(lines, torch.cat([slots[:, :-count], new.view(batch, count)], dim=1))

    def reset(self) -> None:
        """Forget the last call. Slots are written before they are read."""
        self.before = self._seen = self._noted = None

    def to_save(self) -> dict[str, Any]:
        """All that a copy in another process needs, as tensors and plain values."""
        return {"lines": self.lines, "batch": self.batch, "length": self.length}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Become the table that `to_save` gave, one of this size."""
        self.reset()
        self.lines.copy_(saved["lines"])
