"""Fits the prediction of rows (`prediction`) to those of some text: ridge regression, and how far it is off, usually.

Here numbers are floating point. What is kept of them are integers.

Legend: `N` tokens, `c` columns of a part, `D` numbers that a part is predicted from, `g` groups of columns.
"""

import sys
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from kvsplice_hf.rest.ans import TOTAL, Numbers
from kvsplice_hf.rest.prediction import (
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
    level_values,
    scales_of,
)


Floats = NDArray[np.float64]
# What predicts is spread over its 8 bits like this.
_INPUT_SPREAD = 28.0
_LARGEST_WEIGHT = 127
# Of the ridge, relative to the second moment of what predicts.
_RIDGE = 0.01
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
        parts: dict[str, Part] = {}
        layer = LayerPrediction(parts, layer_columns)
        for kind in KINDS:
            levels = own[kind].astype(np.int64)
            of_columns = None if kind == GAINS else gains
            parts[kind] = _fit_part(layer_columns[kind], passage, kind, levels, of_columns, counted)
            likely = passage.likelihoods(layer, kind, of_columns)
            passage.see(layer, kind, likely, levels, gains)
        fitted.append(layer)
    return fitted


def _fit_part(
    columns: Columns,
    passage: Passage,
    kind: str,
    numbers: Numbers,
    gains: Numbers | None,
    counted: NDArray[np.bool_],
) -> Part:
    predictors = passage.predictors(kind)
    table = level_values(columns, numbers)
    centres = np.rint(table[counted].mean(0)).astype(np.int64) if gains is None else np.zeros(table.shape[1], np.int64)
    factors = np.exp2(np.asarray(scales_of(columns, gains)) / 16 - LEVEL_BITS)
    values = table * factors
    inputs = _scale(_INPUT_SPREAD / (values - centres * np.exp2(-LEVEL_BITS))[counted].std(0).clip(_LEAST))
    weights, offset = _ridge(predictors[counted], values[counted])
    rest = values[counted] - (predictors[counted] @ weights.astype(np.float32) + offset)
    spreads = _scale(1 / rest.std(0).clip(_LEAST))
    usual_size = np.exp2(spreads / 16)
    weights, offset = weights * usual_size, offset * usual_size
    units = np.ceil(16 * np.log2(np.abs(weights).max(0, initial=_LEAST).clip(_LEAST) / _LARGEST_WEIGHT)).astype(
        np.int64
    )
    units = units.clip(-256, 64)
    size = np.exp2(-units / 16)
    whole = np.rint(weights * size).clip(-_LARGEST_WEIGHT, _LARGEST_WEIGHT).astype(np.int8)
    part = Part(
        weights=whole,
        offset=np.rint(offset * size).astype(np.int64),
        units=units,
        spreads=spreads,
        inputs=inputs,
        centres=centres,
        usual=np.zeros((SIGNALS + 1, int(columns.groups.max(initial=-1)) + 1), dtype=np.int64),
        cumulative=np.zeros(1, dtype=np.int64),
    )
    sums = exact_product(predictors, whole) + part.offset
    off = table * factors * usual_size - sums * np.exp2(units / 16)
    signals = passage.signals(columns, gains)
    part = part._replace(usual=_usual(off[counted], signals[counted], columns.groups))
    return part._replace(cumulative=_cumulative(part, columns, predictors, signals, gains, numbers, counted))


def _scale(factors: NDArray[np.float64]) -> Numbers:
    return np.rint(16 * np.log2(factors)).clip(-128, 255).astype(np.int64)


def _ridge(
    predictors: NDArray[np.float32], values: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weights [D, c] and offset [c] of the least squares."""
    mean, target = predictors.mean(0, dtype=np.float64), values.mean(0)
    size = predictors.shape[1]
    if size == 0:
        return np.zeros((0, values.shape[1])), target
    gram = torch.zeros(size, size, dtype=torch.float64, device="cpu")
    cross = torch.zeros(size, values.shape[1], dtype=torch.float64, device="cpu")
    for start in range(0, len(predictors), _AT_ONCE):
        left = torch.from_numpy(predictors[start : start + _AT_ONCE] - mean.astype(np.float32))
        right = torch.from_numpy((values[start : start + _AT_ONCE] - target).astype(np.float32))
        gram += (left.T @ left).double()
        cross += (left.T @ right).double()
    diagonal = gram.diagonal().clamp(min=1.0)
    gram.diagonal().add_(_RIDGE * diagonal + 1e-3 * diagonal.mean())
    weights = torch.linalg.solve(gram, cross).numpy()
    return weights, target - mean @ weights


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


def _cumulative(
    part: Part,
    columns: Columns,
    predictors: NDArray[np.float32],
    signals: Numbers,
    gains: Numbers | None,
    numbers: Numbers,
    counted: NDArray[np.bool_],
) -> Numbers:
    """How deviations are distributed, as `Part.cumulative`. Each lies anywhere between the edges of its level."""
    part = part._replace(cumulative=np.zeros(2 * FARTHEST + 1, dtype=np.int64))
    likely = Likelihoods(part, columns, predictors, signals, gains)
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
