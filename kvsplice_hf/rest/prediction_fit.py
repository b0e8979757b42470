"""Fits the prediction of rows (`prediction`) to those of some text: ridge regression, and how far it is off, usually.

Here numbers are floating point. What is kept of them are integers.

Legend: `N` tokens, `c` columns of a part, `D` numbers that a part is predicted from, `g` groups of columns.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from kvsplice_hf.rest.ans import TOTAL, Numbers
from kvsplice_hf.rest.prediction import (
    BEHIND,
    FARTHEST,
    GAINS,
    KINDS,
    LEVEL_BITS,
    SIGNALS,
    Columns,
    LayerPrediction,
    Likelihoods,
    Part,
    Passage,
    edges_of,
    exact_product,
    inputs_of,
    level_values,
    scales_of,
)


Floats: TypeAlias = NDArray[np.float64]
# What predicts is spread over its 8 bits like this.
_INPUT_SPREAD = 28.0
_LARGEST_WEIGHT = 127
# Of the ridge, relative to the second moment of what predicts, times the share of weights in tokens: the fewer tokens
# there are for each weight, the less they say. By a search on SmolLM2, where it hardly matters within a factor of 3.
_RIDGE = 0.25
_AT_ONCE = 4096
_SIGNAL_UNIT = 256
_LEAST = 1e-12


def fit_prediction(
    numbers: Sequence[Mapping[str, NDArray[np.uint8]]],
    columns: Sequence[Mapping[str, Columns]],
    tokens: NDArray[np.float32],
    counted: NDArray[np.bool_],
    depth: int,
    progress: bool = True,
) -> list[LayerPrediction]:
    """The prediction of all layers.

    Args:
        numbers: by layer and kind of part, the levels uint8 [N, c] of its columns.
        columns: the same of what is known without text.
        tokens: see `Passage`.
        counted: which tokens to fit to, [N]: the first ones of a sequence are unlike all others.
        depth: see `Passage`.
        progress: show a progress bar.
    """
    passage = Passage(tokens, depth)
    fitted = []
    bar = tqdm(numbers, desc="predicting", file=sys.stderr, disable=not progress)
    for own, layer_columns in zip(bar, columns, strict=True):
        gains = own[GAINS].astype(np.int64) - 128
        targets = {
            kind: _target(layer_columns[kind], own[kind].astype(np.int64), None if kind == GAINS else gains, counted)
            for kind in KINDS
        }
        # What a part is predicted from begins with what those ahead of it are predicted from.
        known = [passage.predictors(GAINS), *(_inputs(targets[kind]) for kind in (GAINS, BEHIND))]
        moments = _Moments(np.concatenate(known, axis=1)[counted], [targets[kind].values[counted] for kind in KINDS])
        parts: dict[str, Part] = {}
        layer = LayerPrediction(parts, layer_columns)
        for place, kind in enumerate(KINDS):
            parts[kind] = _fit_part(targets[kind], passage.predictors(kind), passage, counted, moments, place)
            likely = passage.likelihoods(layer, kind, gains)
            passage.see(layer, kind, likely, targets[kind].numbers, gains)
        fitted.append(layer)
    return fitted


class _Target(NamedTuple):
    """What a part is to become.

    Attributes:
        columns, numbers, gains: as of `Likelihoods` and `put_part`.
        values: numbers [N, c] where scales are 1.
        inputs, centres: see `Part`.
    """

    columns: Columns
    numbers: Numbers
    gains: Numbers | None
    values: Floats
    inputs: Numbers
    centres: Numbers


def _target(columns: Columns, numbers: Numbers, gains: Numbers | None, counted: NDArray[np.bool_]) -> _Target:
    table = level_values(columns, numbers)
    if gains is None:  # which are not around 0
        centres = np.rint(table[counted].mean(0)).astype(np.int64)
    else:
        centres = np.zeros(table.shape[1], dtype=np.int64)
    values = table.astype(np.float64) * np.exp2(np.asarray(scales_of(columns, gains)) / 16 - LEVEL_BITS)
    spread = (values - centres * np.exp2(-LEVEL_BITS))[counted].std(0)
    return _Target(columns, numbers, gains, values, _scale(_INPUT_SPREAD / spread.clip(_LEAST)), centres)


def _inputs(target: _Target) -> NDArray[np.float32]:
    nothing = np.zeros(0, dtype=np.int64)
    part = Part(
        np.zeros((0, 0), dtype=np.int8), nothing, nothing, nothing, target.inputs, target.centres, nothing, nothing
    )
    return inputs_of(part, target.columns, target.numbers, target.gains)


class _Moments:
    """Second moments of all that may predict, and of it with all that is predicted.

    Args:
        predictors: [N, D].
        values: of each part, [N, c].
    """

    def __init__(self, predictors: NDArray[np.float32], values: list[Floats]) -> None:
        size, widths = predictors.shape[1], [part.shape[1] for part in values]
        self._mean = predictors.mean(0, dtype=np.float64)
        self._targets = [part.mean(0) for part in values]
        self._count = max(1, len(predictors))
        self._gram = torch.zeros(size, size, dtype=torch.float64, device="cpu")
        cross = torch.zeros(size, sum(widths), dtype=torch.float64, device="cpu")
        centre, whole = np.concatenate(self._targets), np.concatenate(values, axis=1)
        for start in range(0, len(predictors), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            left = torch.from_numpy(predictors[part] - self._mean.astype(np.float32))
            self._gram += (left.T @ left).double()
            cross += (left.T @ torch.from_numpy((whole[part] - centre).astype(np.float32))).double()
        self._cross = cross.split(widths, dim=1)

    def ridge(self, place: int, size: int) -> tuple[Floats, Floats]:
        """Weights [size, c] and offset [c] of the least squares of a part, from the first `size` that predict."""
        gram = self._gram[:size, :size].clone()
        diagonal = gram.diagonal().clamp(min=1.0)
        gram.diagonal().add_(diagonal * (_RIDGE * size / self._count) + (1e-3 * diagonal.mean() if size else 0.0))
        weights = torch.linalg.solve(gram, self._cross[place][:size]).numpy()
        return weights, self._targets[place] - self._mean[:size] @ weights


def _fit_part(
    target: _Target,
    predictors: NDArray[np.float32],
    passage: Passage,
    counted: NDArray[np.bool_],
    moments: _Moments,
    place: int,
) -> Part:
    columns, values = target.columns, target.values
    weights, offset = moments.ridge(place, predictors.shape[1])
    rest = values[counted] - (predictors[counted] @ weights.astype(np.float32) + offset)
    spreads = _scale(1 / rest.std(0).clip(_LEAST))
    usual_size = np.exp2(spreads / 16)
    weights, offset = weights * usual_size, offset * usual_size
    largest = np.abs(weights).max(0, initial=_LEAST).clip(_LEAST)
    units = np.ceil(16 * np.log2(largest / _LARGEST_WEIGHT)).astype(np.int64).clip(-256, 64)
    size = np.exp2(-units / 16)
    whole = np.rint(weights * size).clip(-_LARGEST_WEIGHT, _LARGEST_WEIGHT).astype(np.int8)
    groups = int(columns.groups.max(initial=-1)) + 1
    part = Part(
        weights=whole,
        offset=np.rint(offset * size).astype(np.int64),
        units=units,
        spreads=spreads,
        inputs=target.inputs,
        centres=target.centres,
        usual=np.zeros((SIGNALS + 1, groups), dtype=np.int64),
        cumulative=np.zeros(1, dtype=np.int64),
    )
    sums = exact_product(predictors, whole) + part.offset
    off = values * usual_size - sums * np.exp2(units / 16)
    signals = passage.signals(columns, target.gains)
    part = part._replace(usual=_usual(off[counted], signals[counted], columns.groups))
    likely = Likelihoods(part, columns, predictors, signals, target.gains)
    return part._replace(cumulative=_cumulative(likely, columns, target.numbers, counted))


def _scale(factors: NDArray[np.float64]) -> Numbers:
    return np.rint(16 * np.log2(factors)).clip(-128, 255).astype(np.int64)


def _usual(off: NDArray[np.float64], signals: Numbers, groups: Numbers) -> Numbers:
    """How the size of deviations [N, c] follows from signals [N, SIGNALS, g]: int64 [SIGNALS + 1, g]."""
    found = np.zeros((SIGNALS + 1, signals.shape[2]), dtype=np.int64)
    for group in range(signals.shape[2]):
        own = off[:, groups == group]
        energy = np.square(own).mean(1)
        size = 8 * np.log2(energy + (0.05 if own.shape[1] == 1 else 0.001))
        known = np.concatenate([signals[:, :, group], np.ones((len(own), 1))], axis=1).astype(np.float64)
        moments = known.T @ known
        moments[np.diag_indices(len(moments))] += 1e-3 * len(own)
        fitted = np.linalg.solve(moments, known.T @ size)
        left = energy * np.exp2(-(known @ fitted) / 8)
        fitted[-1] += 8 * np.log2(left.mean())
        found[:, group] = np.rint(fitted * _SIGNAL_UNIT).astype(np.int64)
    return found


def _cumulative(likely: Likelihoods, columns: Columns, numbers: Numbers, counted: NDArray[np.bool_]) -> Numbers:
    """How deviations are distributed, as `Part.cumulative`. Each lies anywhere between the edges of its level."""
    counts = np.zeros(2 * FARTHEST, dtype=np.float64)
    generator = np.random.default_rng(0)
    for column, (levels, step) in enumerate(zip(columns.levels, columns.steps, strict=True)):
        if likely.count(column) < 2:
            continue
        edges, free, index = edges_of(levels, step), numbers[:, column] % step, numbers[:, column] // step
        low, high = (
            likely.deviations(column, np.clip(edges[free, place], -(1 << 16), 1 << 16)) for place in (index, index + 1)
        )
        # Outermost levels have no outer edge: as far as the inner one.
        value = likely.deviations(column, levels[numbers[:, column]])
        low = np.where(index == 0, 2 * value - high, low)
        high = np.where(index == likely.count(column) - 1, 2 * value - low, high)
        place = low + (high - low) * generator.random(len(low))
        place = np.rint(place[counted]).astype(np.int64).clip(-FARTHEST, FARTHEST - 1) + FARTHEST
        counts += np.bincount(place, minlength=2 * FARTHEST)
    counts = counts + counts[::-1] + 1e-3
    width = np.arange(-8, 9)
    smooth = np.convolve(counts, np.exp(-np.square(width / 4.0)), mode="same") + 1e-3
    share = np.concatenate([[0.0], np.cumsum(smooth) / smooth.sum()])
    return np.rint(share * TOTAL).astype(np.int64)
