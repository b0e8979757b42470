"""Asymmetric numeral systems: symbols to words and back, at the cost of their probabilities (lossless).

Duda, Asymmetric numeral systems (arXiv 1311.2540); as range coding, with a state for each of many lanes whose words are
interleaved (Giesen, Interleaved entropy coders, arXiv 1402.3392). A symbol is an interval of [0, 2^16): its width is
its probability. Each call moves all lanes by one symbol, so that numpy does the work. Reading gives back symbols in the
order in which they were put.

Legend: `L` lanes, one for each token here.
"""

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvsplice_hf.errors import CheckpointError


# Probabilities are multiples of 2^-16.
PRECISION = 16
TOTAL = 1 << PRECISION
_WORD = 32
# States lie within [2^32, 2^64).
_LOWEST = np.uint64(1 << _WORD)
_SLOT = np.uint64(TOTAL - 1)
_SHIFT, _WORD_SHIFT, _FULL_SHIFT = np.uint64(PRECISION), np.uint64(_WORD), np.uint64(2 * _WORD - PRECISION)

Numbers: TypeAlias = NDArray[np.int64]


def damaged(path: object) -> CheckpointError:
    """What is raised of a file whose words are not those of its rows."""
    return CheckpointError(f"{path} is damaged: its predicted rows do not decode. Save the cache again.")


class Writer:
    """Takes symbols in the order in which they are to be read.

    Args:
        lanes: L.
    """

    def __init__(self, lanes: int) -> None:
        self._lanes = lanes
        self._steps: list[tuple[NDArray[np.uint16], NDArray[np.uint16]]] = []

    def put(self, starts: Numbers, widths: Numbers) -> None:
        """One symbol of each lane: where its interval starts, and how wide it is (1 to 2^16 - 1), each [L]."""
        self._steps.append((starts.astype(np.uint16), widths.astype(np.uint16)))

    def finish(self) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
        """The states to begin reading with, [L], and all words."""
        state = np.full(self._lanes, _LOWEST, dtype=np.uint64)
        words: list[NDArray[np.uint32]] = []
        for starts, widths in reversed(self._steps):  # what is written last is read first
            width = widths.astype(np.uint64)
            full = state >= width << _FULL_SHIFT
            words.append(state[full].astype(np.uint32))
            state[full] >>= _WORD_SHIFT
            whole, rest = np.divmod(state, width)
            state = (whole << _SHIFT) + rest + starts
        return state, np.concatenate([*words[::-1], np.empty(0, dtype=np.uint32)])


class Reader:
    """Gives symbols back: look at `slots`, find the intervals that they lie in, and `take` these.

    Args:
        states, words: of `Writer.finish`.
        path: of the file, for messages.

    Raises:
        CheckpointError: the states are none.
    """

    def __init__(self, states: NDArray[np.uint64], words: NDArray[np.uint32], path: object) -> None:
        self._state, self._words, self._path = states.copy(), words, path
        self._next = 0
        if bool((states < _LOWEST).any()):
            raise damaged(path)

    @property
    def slots(self) -> Numbers:
        """A number within the interval of the next symbol of each lane, [L]."""
        return (self._state & _SLOT).astype(np.int64)

    def take(self, starts: Numbers, widths: Numbers) -> None:
        """Go on behind these symbols, [L].

        Raises:
            CheckpointError: the words end here.
        """
        offset = (self._state & _SLOT) - starts.astype(np.uint64)
        self._state = widths.astype(np.uint64) * (self._state >> _SHIFT) + offset
        low = self._state < _LOWEST
        count = int(low.sum())
        if self._next + count > len(self._words):
            raise damaged(self._path)
        self._state[low] = (self._state[low] << _WORD_SHIFT) | self._words[self._next : self._next + count]
        self._next += count

    def finish(self) -> None:
        """Check that everything was read.

        Raises:
            CheckpointError: something was not, or the states are not those that writing began with.
        """
        if self._next != len(self._words) or bool((self._state != _LOWEST).any()):
            raise damaged(self._path)
