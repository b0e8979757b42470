"""Splines and principal components of keys before their rotation (`KeyGeometry`), and samples to fit them to.

Which numbers of a key its model rotates together is not told by the angles. Of the ways that models have, the one is
taken whose principal components leave least: undone in another way, a rotation stays in the keys as noise.

Legend: `M` sampled keys, `P` numbers of each, `F` angles of a token, `k` numbers of a code.
"""

import sys
from collections.abc import Mapping
from typing import NamedTuple, Self

import torch
from tqdm import tqdm

from kvsplice_hf.calibration.statistics import PAIRINGS, LayerStatistics
from kvsplice_hf.code.heads import PartKey
from kvsplice_hf.code.keys import Pairs, undo_turns
from kvsplice_hf.errors import ConfigError, UnsupportedError
from kvsplice_hf.geometry import SplinePCA
from kvsplice_hf.geometry.spline_pca import Fitted


class SampledKeys(NamedTuple):
    """Keys of one key head.

    Attributes:
        rotated: float32 [M, P].
        turns: how they were rotated (`code.keys`), uint8 [M, F].
        columns: which of the model's angles turn them, int64 [F]; F is 0 where they are not known.
    """

    rotated: torch.Tensor
    turns: torch.Tensor
    columns: torch.Tensor

    @classmethod
    def of(cls, layer: LayerStatistics) -> Self:
        """Those that statistics hold."""
        return cls(layer.rows[:, layer.latent_dim :], layer.turns, layer.columns)

    def before_rotation(self, pairing: int) -> torch.Tensor:
        """[M, P], with the rotation undone in one of `PAIRINGS`."""
        return undo_turns(self.rotated, self.turns, Pairs(*PAIRINGS[pairing](self.columns)))


class KeyGeometry(NamedTuple):
    """A geometry of keys before their rotation.

    Attributes:
        geometry: fitted to them.
        pairs: which of their numbers are rotated together, int64 [3, F] as `code.keys.Pairs`.
    """

    geometry: SplinePCA
    pairs: torch.Tensor


def fit_key_geometries(
    keys: Mapping[PartKey, SampledKeys],
    k: int,
    *,
    knots: int = 7,
    epochs: int = 8,
    learning_rate: float = 2e-3,
    progress: bool = True,
) -> tuple[dict[PartKey, KeyGeometry], dict[PartKey, Fitted]]:
    """Fit a geometry to the keys of each key head; arguments as of `SplinePCA` and `SplinePCA.fit`.

    Returns:
        The geometries, and what each fit found.

    Raises:
        CalibrationError: as `SplinePCA.fit`.
        ConfigError: `k` is above P, or a setting that cannot be.
        UnsupportedError: the model does not say how it rotates its keys.
    """
    pairing = pairing_of(keys, k)
    geometries, reports = {}, {}
    for part, sample in tqdm(keys.items(), desc="fitting splines of keys", file=sys.stderr, disable=not progress):
        geometry = SplinePCA(k, knots)
        found = sample.before_rotation(pairing)
        reports[part] = geometry.fit(found, epochs=epochs, learning_rate=learning_rate, progress=False)
        geometries[part] = KeyGeometry(geometry, torch.stack(list(Pairs(*PAIRINGS[pairing](sample.columns)))))
    return geometries, reports


def pairing_of(keys: Mapping[PartKey, SampledKeys], k: int) -> int:
    """Which of `PAIRINGS` the model has: the one whose k principal components leave least of the keys of all heads.

    Raises:
        ConfigError: `k` is not among 1 to P.
        UnsupportedError: the model does not say how it rotates its keys.
    """
    unknown = next((part for part, sample in keys.items() if not len(sample.columns)), None)
    if unknown is not None:
        raise UnsupportedError(
            f"The keys of layer {unknown} are not rotated by angles that the model hands to its layers, so that no "
            "geometry can be fitted to them as they are before. Leave `key_rank` (or `key_k`) out: keys are then "
            "stored as they come."
        )
    for part, sample in keys.items():
        if not 1 <= k <= sample.rotated.shape[1]:
            raise ConfigError(
                f"{k} numbers of a key were asked for, and the keys of layer {part} have {sample.rotated.shape[1]}. "
                "Give `key_rank` (or `key_k`) from 1 to that."
            )
    left = [sum(_left(sample.before_rotation(way), k) for sample in keys.values()) for way in range(1, len(PAIRINGS))]
    return 1 + left.index(min(left))


def _left(keys: torch.Tensor, k: int) -> float:
    """The share of the variance of keys [M, P] outside of k principal components, or of half of all where k is more.

    Outside of all of them nothing is left, in whatever way a rotation was undone.
    """
    centred = keys.double() - keys.double().mean(0)
    spectrum = torch.linalg.eigvalsh(centred.T @ centred).clamp(min=0).flip(0)
    return float(spectrum[min(k, keys.shape[1] // 2) :].sum() / spectrum.sum().clamp(min=1e-300))
