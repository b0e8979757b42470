"""Rows predicted from the rows of earlier layers, and written at the cost of what that leaves open. Nothing is lost.

Linear prediction and arithmetic coding, as lossless coders of sound and pictures do it. The level of each column is
predicted from the tokens themselves and from the rows of the layers before it, which a reader has already. From the
prediction follows how likely each level is; a likely one takes few bits (`ans`). A layer is written in three parts:
the gains of its rows, the columns behind the shared gain (keys), and those that have it (values or latents), which are
predicted from the keys too.

A reader must find the very same likelihoods, on any machine, or all is lost. So everything that they are computed from
is an integer: what predicts (the numbers of a row, on 8 bits), the weights (8 bits), and the tables. Sums of at most
1024 such products are exact in float32, whatever the order, so that a matrix product of any library will do.

Legend: `T` tokens, `c` columns of a part, `D` numbers that a part is predicted from, `g` groups of columns of one head.
A scale of k is 2^(k / 16).
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvsplice_hf.rest.ans import PRECISION, TOTAL, Numbers, Reader, Writer
from kvsplice_hf.rest.row_levels import Parity


GAINS, BEHIND, AHEAD = KINDS = ("gains", "behind", "ahead")
# Levels are in units of 2^-12 of a scale, deviations in 2^-7 of what is usual, and no more than 16 times that.
LEVEL_BITS, Z_BITS = 12, 7
FARTHEST = 16 << Z_BITS
# 2^(i / 16) in units of 2^-16. Written out: powers of floating point may differ between machines.
# fmt: off
_MANTISSAS = np.array(
    [65536, 68438, 71468, 74632, 77936, 81386, 84990, 88752,
     92682, 96785, 101070, 105545, 110218, 115098, 120194, 125515],
    dtype=np.int64,
)
# fmt: on
_LEAST_SCALE, _LARGEST_SCALE = -320, 255
_EXACT_SUM = 1024
_BEYOND = 1 << 31
# What is usual of a group is known from six numbers: its gain; how far this layer was off in its gains and behind; and
# the layer before in its gains, behind and ahead.
SIGNALS = 6
_SIGNAL_BITS = 8
_MOST_UNUSUAL = 96


class Part(NamedTuple):
    """What a part of a layer is predicted by.

    Attributes:
        weights: int8 [D, c].
        offset: of the sums, int64 [c].
        units: the scale of the sums in usual deviations, [c].
        spreads: that of levels where gains are 1, [c].
        inputs: that of levels as what predicts other parts, [c].
        centres: which of the levels is taken off before, [c].
        usual: what `SIGNALS` count, int64 [SIGNALS + 1, g].
        cumulative: how many of 2^16 deviations are below each, int64 [2 * FARTHEST + 1].
    """

    weights: NDArray[np.int8]
    offset: Numbers
    units: Numbers
    spreads: Numbers
    inputs: Numbers
    centres: Numbers
    usual: Numbers
    cumulative: Numbers


class Columns(NamedTuple):
    """What is known of the columns of a part without any text.

    Attributes:
        levels: the table of levels of each column, int64 ascending.
        steps: of each, 2 where a trellis leaves every other level, else 1.
        chains: where the columns of a head begin and end, and how many of them, from the first, lie along a trellis.
        groups: of each column, which head, [c].
        gains: of each column, which of the gains of the layer is its own; -1: none, [c].
    """

    levels: list[Numbers]
    steps: list[int]
    chains: list[tuple[int, int, int]]
    groups: Numbers
    gains: Numbers


class Known(NamedTuple):
    """What a reader knows of a layer that it has read.

    Attributes:
        inputs: numbers on 8 bits, float32 [T, columns], by part.
        unusual: how far it was off, [T], by part.
    """

    inputs: dict[str, NDArray[np.float32]]
    unusual: dict[str, Numbers]


def scaled(numbers: Numbers, scales: Numbers, bits: int) -> Numbers:
    """Numbers times 2^(scale / 16 - bits), rounded."""
    scales = np.clip(scales, _LEAST_SCALE, _LARGEST_SCALE)
    shifts = bits + 16 - (scales >> 4)
    return (numbers * _MANTISSAS[scales & 15] + (np.int64(1) << (shifts - 1))) >> shifts


def exact_product(left: NDArray[np.float32], weights: NDArray[np.int8]) -> Numbers:
    """[T, D] times [D, c], where `left` holds integers within 8 bits."""
    found = np.zeros((len(left), weights.shape[1]), dtype=np.int64)
    for start in range(0, len(weights), _EXACT_SUM):
        part = slice(start, start + _EXACT_SUM)
        found += (left[:, part] @ weights[part].astype(np.float32)).astype(np.int64)
    return found


def gathered(parts: list[NDArray[np.float32]], rows: int) -> NDArray[np.float32]:
    return np.concatenate(parts, axis=1) if parts else np.zeros((rows, 0), dtype=np.float32)


def scales_of(columns: Columns, gains: Numbers | None) -> Numbers | int:
    """The scales that the gains of rows [T, gains] give their columns, [T, c]."""
    if gains is None:
        return 0
    padded = np.concatenate([gains, np.zeros((len(gains), 1), dtype=np.int64)], axis=1)
    return padded[:, columns.gains]


def inputs_of(part: Part, columns: Columns, numbers: Numbers, gains: Numbers | None) -> NDArray[np.float32]:
    """What levels [T, c] are to other parts, that they predict."""
    found = level_values(columns, numbers) - part.centres
    found = scaled(found, part.inputs + scales_of(columns, gains), LEVEL_BITS)
    return np.clip(found, -127, 127).astype(np.float32)


def level_values(columns: Columns, numbers: Numbers) -> Numbers:
    """Levels of their numbers, [T, c]."""
    found = np.empty(numbers.shape, dtype=np.int64, order="F")
    for index, levels in enumerate(columns.levels):
        levels.take(numbers[:, index], out=found[:, index])
    return found


class Likelihoods:
    """How likely the levels of a part are: for each column and each number of levels, the place where it begins.

    Args:
        part, columns: of the part.
        predictors: [T, D], whole numbers.
        signals: int64 [T, SIGNALS, g].
        gains: of the rows, less 128, [T, gains]; None: of gains themselves.
    """

    def __init__(
        self,
        part: Part,
        columns: Columns,
        predictors: NDArray[np.float32],
        signals: Numbers,
        gains: Numbers | None,
    ) -> None:
        self.part, self.columns = part, columns
        usual = (signals * part.usual[:-1]).sum(1) + part.usual[-1] >> _SIGNAL_BITS
        usual = np.clip(usual, -_MOST_UNUSUAL, _MOST_UNUSUAL)
        self._expected = usual.sum(1) // max(1, usual.shape[1])
        widened = usual[:, columns.groups]
        sums = exact_product(predictors, part.weights) + part.offset
        limit = 1 << 20
        means = np.clip(scaled(sums, part.units - widened, -Z_BITS), -limit, limit)
        scales = np.clip(part.spreads + scales_of(columns, gains) - widened, -128, _LARGEST_SCALE)
        shifts = LEVEL_BITS - Z_BITS + 16 - (scales >> 4)
        # Columns are looked at one by one, so each of them lies in one piece.
        self._means, self._mantissas, self._shifts = map(np.asfortranarray, (means, _MANTISSAS[scales & 15], shifts))
        self._edges = [edges_of(levels, step) for levels, step in zip(columns.levels, columns.steps, strict=True)]

    def count(self, column: int) -> int:
        """Levels of a column that there are to choose from."""
        return len(self.columns.levels[column]) // self.columns.steps[column]

    def deviations(self, column: int, values: Numbers) -> Numbers:
        """How far from what is predicted the levels [T] of a column are."""
        return (values * self._mantissas[:, column] >> self._shifts[:, column]) - self._means[:, column]

    def start(self, column: int, free: Numbers, index: Numbers) -> Numbers:
        """Where in [0, 2^16] the levels from `index` on begin, of those that the trellis leaves free; each [T]."""
        off = np.clip(self.deviations(column, self._edges[column][free, index]), -FARTHEST, FARTHEST) + FARTHEST
        return (self.part.cumulative[off] * (TOTAL - self.count(column)) >> PRECISION) + index

    def unusual(self, numbers: Numbers) -> Numbers:
        """How far levels [T, c] are from what is predicted on the whole, as a scale; 0 is usual; [T]."""
        values = level_values(self.columns, numbers)
        off = np.abs((values * self._mantissas >> self._shifts) - self._means).clip(max=FARTHEST // 2)
        mean = off.sum(1) // max(1, off.shape[1])
        return self._expected + np.searchsorted(_THRESHOLDS, mean) - len(_THRESHOLDS) // 2


_THRESHOLDS = scaled(np.full(2 * 64 + 1, 1 << 2 * Z_BITS, dtype=np.int64), np.arange(-64, 65, dtype=np.int64), Z_BITS)


def edges_of(levels: Numbers, step: int) -> Numbers:
    """Between which two levels of those left free a choice changes, int64 [step, levels / step + 1]."""
    found = np.full((step, len(levels) // step + 1), _BEYOND, dtype=np.int64)
    found[:, 0] = -_BEYOND
    for free in range(step):
        own = levels[free::step]
        found[free, 1:-1] = own[:-1] + own[1:] >> 1
    return found


def put_part(writer: Writer, likely: Likelihoods, numbers: Numbers) -> None:
    """Write the levels [T, c] of a part."""
    for column, step in enumerate(likely.columns.steps):
        if likely.count(column) > 1:
            free, index = numbers[:, column] % step, numbers[:, column] // step
            start = likely.start(column, free, index)
            writer.put(start, likely.start(column, free, index + 1) - start)


def take_part(reader: Reader, likely: Likelihoods, rows: int) -> tuple[Numbers, Numbers]:
    """Read the levels and the codes of a part, each [T, c].

    Raises:
        CheckpointError: the words end here.
    """
    count = len(likely.columns.steps)
    numbers = np.zeros((rows, count), dtype=np.int64, order="F")
    codes = np.zeros((rows, count), dtype=np.int64, order="F")
    for first, last, chained in likely.columns.chains:
        parity = Parity(rows)
        for column in range(first, last):
            in_chain = column < first + chained
            free = parity.free() if in_chain else np.zeros(rows, dtype=np.int64)
            index = _found(reader, likely, column, free)
            numbers[:, column] = index * likely.columns.steps[column] + free
            codes[:, column] = parity.code(numbers[:, column]) if in_chain else index
    return numbers, codes


def _found(reader: Reader, likely: Likelihoods, column: int, free: Numbers) -> Numbers:
    """The next symbol of each lane, [T], by bisection."""
    low, count = np.zeros(len(free), dtype=np.int64), likely.count(column)
    if count == 1:
        return low
    slots = reader.slots
    step = count >> 1
    starts, ends = low.copy(), np.full(len(free), TOTAL, dtype=np.int64)
    while step:
        middle = likely.start(column, free, low + step)
        above = slots >= middle
        starts, ends = np.where(above, middle, starts), np.where(above, ends, middle)
        low += above * step
        step >>= 1
    reader.take(starts, ends - starts)
    return low


class LayerPrediction(NamedTuple):
    """How one layer is written.

    Attributes:
        parts: by kind.
        columns: by kind.
    """

    parts: Mapping[str, Part]
    columns: Mapping[str, Columns]


class Passage:
    """What is known along the way through the layers, of a writer as of a reader.

    Args:
        tokens: what is known of the tokens, float32 [T, e], whole numbers within 8 bits; e may be 0.
        depth: how many layers before a layer predict it.
    """

    def __init__(self, tokens: NDArray[np.float32], depth: int) -> None:
        self.tokens, self.depth = tokens, depth
        self.before: list[Known] = []
        self.now = Known({}, {})

    def predictors(self, kind: str) -> NDArray[np.float32]:
        """What a part is predicted from, [T, D]."""
        found = [self.tokens]
        for layer in self.before[: -self.depth - 1 : -1]:
            found += [layer.inputs[part] for part in KINDS]
        if kind != GAINS:
            found.append(self.now.inputs[GAINS])
        if kind == AHEAD:
            found.append(self.now.inputs[BEHIND])
        return gathered(found, len(self.tokens))

    def signals(self, columns: Columns, gains: Numbers | None) -> Numbers:
        """See `SIGNALS`; int64 [T, SIGNALS, g]."""
        groups = int(columns.groups.max()) + 1 if len(columns.groups) else 0
        found = np.zeros((len(self.tokens), SIGNALS, groups), dtype=np.int64)
        if gains is not None:
            found[:, 0, columns.groups] = scales_of(columns, gains)
        for place, kind in enumerate((GAINS, BEHIND), start=1):
            if kind in self.now.unusual:
                found[:, place] = self.now.unusual[kind][:, None]
        if self.before:
            for place, kind in enumerate(KINDS, start=3):
                found[:, place] = self.before[-1].unusual[kind][:, None]
        return found

    def likelihoods(self, layer: LayerPrediction, kind: str, gains: Numbers | None) -> Likelihoods:
        """Of a part of the layer that is next."""
        part, columns = layer.parts[kind], layer.columns[kind]
        gains = None if kind == GAINS else gains
        return Likelihoods(part, columns, self.predictors(kind), self.signals(columns, gains), gains)

    def see(self, layer: LayerPrediction, kind: str, likely: Likelihoods, numbers: Numbers, gains: Numbers) -> None:
        """Go on to the next part; that it was off by so much, and what it says of others, is known now."""
        own = None if kind == GAINS else gains
        self.now.inputs[kind] = inputs_of(layer.parts[kind], layer.columns[kind], numbers, own)
        self.now.unusual[kind] = likely.unusual(numbers)
        if kind == AHEAD:
            self.before.append(self.now)
            self.before = self.before[-max(self.depth, 1) :]
            self.now = Known({}, {})


def write_layers(
    layers: Iterator[tuple[LayerPrediction, Mapping[str, Numbers]]], passage: Passage
) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
    """Write the levels [T, c] of the parts of all layers, in their order.

    Returns:
        States and words of `ans.Writer.finish`.
    """
    writer = Writer(len(passage.tokens))
    for layer, numbers in layers:
        gains = numbers[GAINS] - 128
        for kind in KINDS:
            likely = passage.likelihoods(layer, kind, gains)
            put_part(writer, likely, numbers[kind])
            passage.see(layer, kind, likely, numbers[kind], gains)
    return writer.finish()


def read_layer(reader: Reader, layer: LayerPrediction, passage: Passage) -> dict[str, Numbers]:
    """The codes [T, c] of the parts of the next layer.

    Raises:
        CheckpointError: the words end here.
    """
    found: dict[str, Numbers] = {}
    gains: Numbers | None = None
    for kind in KINDS:
        likely = passage.likelihoods(layer, kind, gains)
        numbers, codes = take_part(reader, likely, len(passage.tokens))
        gains = numbers - 128 if gains is None else gains
        passage.see(layer, kind, likely, numbers, gains)
        found[kind] = codes
    return found
