"""What belongs to one call of a patched model, kept apart from the model: threads may call it at the same time.

Three things do: the mask of the call, whether the splice takes part (`splice_disabled`), and who is told of round trips
(`recorded_round_trips` of `training`). None of them is an attribute of a module.

- A `Call` is what the hook before an attention module saw. It is handed on to `expand_kv` of the same module through a
  variable of the thread: that runs in the same thread, and before any other attention module does.
- The last two are settings of the thread that entered the context (`SpliceState`). Gradient checkpointing runs a
  forward again during the backward pass, in another thread perhaps and out of the context. So under gradient
  checkpointing the decoder hands its state down to its attention modules as a keyword argument, which is kept with the
  other arguments until the forward runs again.

The variables belong to threads, and not to contexts of `contextvars`, because `torch.compile` can read them.
"""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


# The keyword argument with which a decoder hands its state to its attention modules.
STATE_ARGUMENT = "kvsplice_state"


# Told of a round trip: the attention module, the latent, and what its code decodes to.
Listener = Callable[[Any, torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True)
class SpliceState:
    """How a patched model runs.

    Attributes:
        enabled: False where the model runs as if it were not patched.
        on_round_trip: told of the round trips of calls without a cache, and of those with gradients.
    """

    enabled: bool = True
    on_round_trip: Listener | None = None


_DEFAULT = SpliceState()


class Call(NamedTuple):
    """What the hook before the forward of an attention module saw.

    Attributes:
        module: the attention module.
        state: how the model runs.
        mask: the attention mask, as the module got it.
        new_tokens: T, or None where the hidden states could not be found.
        reads_cache: whether rows of a spliced cache are to reach `expand_kv`.
        embeddings: how the keys of the new tokens are rotated, as the model hands it over; or None.
    """

    module: Any
    state: SpliceState
    mask: torch.Tensor | None
    new_tokens: int | None
    reads_cache: bool
    embeddings: Any = None


class _Thread(threading.local):
    """Variables of a thread, with the values they have in a new one."""

    call: Call | None = None
    was_expanded: bool = False
    batches: bool = False
    states: tuple[tuple[object, SpliceState], ...] = ()


_thread = _Thread()


def enter_call(call: Call) -> None:
    """Say that the forward of `call.module` is about to run in this thread."""
    _thread.call, _thread.was_expanded = call, False


def note_batch(found: bool) -> None:
    """Say whether the model that is about to run in this thread was given a batch of continuous batching."""
    _thread.batches = found


def runs_batch() -> bool:
    """Whether the model that runs in this thread was given a batch of continuous batching."""
    return _thread.batches


def running_call(module: Any) -> Call | None:
    """What was said of the forward of `module` that is running in this thread; None where nothing was."""
    call = _thread.call
    return call if call is not None and call.module is module else None


def note_expansion() -> None:
    """Say that the running forward has come to `expand_kv`."""
    _thread.was_expanded = True


def leave_call(module: Any) -> bool:
    """Say that the forward of `module` is over; whether it came to `expand_kv`."""
    expanded = running_call(module) is None or _thread.was_expanded
    _thread.call = None  # the mask is not kept alive
    return expanded


def current_state(patch: object) -> SpliceState:
    """How the model with this patch (known by its identity) runs in this thread."""
    for identity, state in reversed(_thread.states):
        if identity is patch:
            return state
    return _DEFAULT


@contextlib.contextmanager
def states_of_thread(states: Iterable[tuple[object, SpliceState]]) -> Iterator[None]:
    """Within this context models with these patches run in this thread, and in no other one, as their states say."""
    before = _thread.states
    _thread.states = (*before, *states)
    try:
        yield
    finally:
        _thread.states = before
