"""Spline, then principal components (`SplinePCA`), as the research compresses values and latents.

Legend: `M` vectors, `d` numbers of each, `k` of a code.
"""

import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from kvsplice_hf.errors import CalibrationError, CheckpointError, ConfigError
from kvsplice_hf.geometry.files import read_geometry_file, write_geometry_file
from kvsplice_hf.geometry.spline import MonotoneSpline


_FORMAT = "kvsplice-geometry"
_HELD_OUT = 0.1
# Stretches of vectors, one after the other as they were given, of each of which a part is held out.
_STRETCHES = 20
# A spline is kept where it gains this many times the standard error of what it gains over the stretches: it is the best
# of several passes, and a gain that may be chance may be a loss on other text.
_SURE = 3.0
_BATCH = 1024
_SEED = 0
# Vectors of which no number varies by more than this share of its size cannot be told apart in float32.
_VARIES = 1e-6


class Fitted(NamedTuple):
    """What `SplinePCA.fit` found, as mean squared errors per number on vectors that it was not fitted to.

    Attributes:
        pca: of principal components alone.
        spline: of what is kept: the spline and principal components after the best of all epochs, or components alone.
        epoch: after which epoch that was; 0: no spline was better beyond doubt, so that principal components alone are
            kept.
    """

    pca: float
    spline: float
    epoch: int


class SplinePCA(nn.Module):
    """Vectors of d numbers as k numbers, and back.

    Each number goes through a monotone piecewise-linear spline, then the first k principal components of what that
    gives are kept. With k = d the inverse is exact up to rounding.

    Args:
        k: numbers of a code.
        knots: of each spline.

    Attributes:
        spline: the bending, after `fit`.
        mean: of bent vectors, [d].
        basis: principal components, [d, k], orthonormal.
        fitted_on: what the vectors are of, to be set by the caller and kept in files: a fingerprint of the model.

    Raises:
        ConfigError: `k` or `knots` cannot be.

    Examples:
        >>> geometry = SplinePCA(16)
        >>> report = geometry.fit(vectors)  # [M, 64]
        >>> geometry.decompress(geometry.compress(vectors)).shape
        torch.Size([120000, 64])
    """

    spline: MonotoneSpline | None
    mean: torch.Tensor | None
    basis: torch.Tensor | None

    def __init__(self, k: int, knots: int = 7) -> None:
        super().__init__()
        if k < 1:
            raise ConfigError(f"`k` is {k}; a code needs at least 1 number.")
        if knots < 2:
            raise ConfigError(f"`knots` is {knots}; a spline needs at least 2.")
        self.k, self.knots, self.fitted_on = k, knots, ""
        self.spline = None
        self.register_buffer("mean", None)
        self.register_buffer("basis", None)

    def fit(
        self, vectors: torch.Tensor, *, epochs: int = 8, learning_rate: float = 2e-3, progress: bool = True
    ) -> Fitted:
        """Fit to vectors [M, d], of any float type; what was fitted before is dropped.

        The spline is trained by gradients through the error of reconstruction, a tenth of the vectors held out. The
        components are those of all other vectors, found anew before each epoch. Kept is the best epoch on the vectors
        held out, where it gains three times the standard error of the gain; otherwise the identity, which is principal
        components alone. Vectors are held out in 20 stretches, spread over all as they were given, and the standard
        error is that over these: vectors that lie side by side in a text are alike.

        Args:
            vectors: samples.
            epochs: passes over the vectors; 0: principal components alone.
            learning_rate: of Adam, falling to 0 along a cosine.
            progress: show a bar.

        Raises:
            CalibrationError: too few vectors, numbers that are not finite, or vectors that never vary.
            ConfigError: k above d, or `epochs` or `learning_rate` that cannot be.
        """
        vectors = self._checked(vectors, epochs, learning_rate)
        training, held_out = _divided(vectors)
        fit = _Fit(MonotoneSpline.over(training, self.knots), training, held_out, self.k)
        components_alone = best = fit.state()
        bar = tqdm(range(epochs), desc="fitting splines", file=sys.stderr, disable=not progress)
        for epoch in bar:
            fit.train(_rates(learning_rate, epochs, epoch, fit.batches))
            found = fit.state()
            if found.error < best.error:
                best = found._replace(epoch=epoch + 1)
        if not best.is_surely_below(components_alone):
            best = components_alone
        self._keep(fit.spline, best)
        return Fitted(components_alone.error, best.error, best.epoch)

    def compress(self, vectors: torch.Tensor) -> torch.Tensor:
        """Codes [..., k] of vectors [..., d], in float32.

        Raises:
            ConfigError: nothing is fitted yet, or the vectors are of another size.
        """
        spline, mean, basis = self.fitted()
        if vectors.shape[-1] != len(mean):
            raise ConfigError(
                f"Got vectors of {vectors.shape[-1]} numbers, and this geometry was fitted to vectors of {len(mean)}. "
                "It belongs to another layer or model."
            )
        return (spline(vectors.float()) - mean) @ basis

    def decompress(self, codes: torch.Tensor) -> torch.Tensor:
        """Vectors [..., d] of codes [..., k], in float32.

        Raises:
            ConfigError: nothing is fitted yet, or the codes are of another size.
        """
        spline, mean, basis = self.fitted()
        if codes.shape[-1] != self.k:
            raise ConfigError(f"Got codes of {codes.shape[-1]} numbers; those of this geometry have {self.k}.")
        return spline.inverse(codes.float() @ basis.T + mean)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """What is left of vectors [..., d] after both ways."""
        return self.decompress(self.compress(vectors))

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a file holds of it, on the CPU.

        Raises:
            ConfigError: nothing is fitted yet.
        """
        spline, mean, basis = self.fitted()
        held = {"knots": spline.knots, "bends": spline.bends, "mean": mean, "basis": basis}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in held.items()}

    @classmethod
    def of_tensors(cls, k: int, knots: int, tensors: Mapping[str, torch.Tensor]) -> "SplinePCA":
        """What has given these `tensors`.

        Raises:
            ConfigError: they do not fit each other, or are not finite.
            KeyError: one is missing.
        """
        geometry = cls(k, knots)
        geometry._take(tensors)
        return geometry

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all.

        Raises:
            ConfigError: nothing is fitted yet.
            OSError: it cannot be written.
        """
        about = {"k": self.k, "knots": self.knots, "fitted_on": self.fitted_on}
        write_geometry_file(path, _FORMAT, about, self.tensors())

    @classmethod
    def load(cls, path: str | Path, fitted_on: str | None = None) -> "SplinePCA":
        """Read what `save` wrote.

        Args:
            path: the file.
            fitted_on: if given, the vectors must have been of this.

        Raises:
            CheckpointError: there is no such file, or it is damaged, of something else, of another model, or of a newer
                version.
        """
        about, tensors = read_geometry_file(path, _FORMAT)
        found = about.get("fitted_on", "")
        if fitted_on is not None and found != fitted_on:
            raise CheckpointError(
                f"The geometry in {path} was fitted on another model: {found or 'it does not say which'}, needed is "
                f"{fitted_on}. Fit one to vectors of this model."
            )
        try:
            geometry = cls.of_tensors(int(about["k"]), int(about["knots"]), tensors)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path} is damaged: {error}. Fit and save the geometry again.") from error
        geometry.fitted_on = str(about.get("fitted_on", ""))
        return geometry

    def _take(self, tensors: Mapping[str, torch.Tensor]) -> None:
        knots, bends, mean, basis = (tensors[name] for name in ("knots", "bends", "mean", "basis"))
        if knots.dim() != 2 or not all(map(_is_finite, tensors.values())):
            raise ConfigError("its tensors do not fit each other")
        d, n = knots.shape
        if (n, bends.shape, mean.shape, basis.shape) != (self.knots, (d, n + 1), (d,), (d, self.k)):
            raise ConfigError("its tensors do not fit each other")
        self._keep(MonotoneSpline(knots.float()), _State(_NO_ERRORS, bends, mean.float(), basis.float(), 0))

    def _keep(self, spline: MonotoneSpline, state: "_State") -> None:
        with torch.no_grad():
            spline.bends.copy_(state.bends)
        self.spline = spline.requires_grad_(False)
        self.mean, self.basis = state.mean, state.basis

    def fitted(self) -> tuple[MonotoneSpline, torch.Tensor, torch.Tensor]:
        """The spline, the mean and the basis.

        Raises:
            ConfigError: nothing is fitted yet.
        """
        if self.spline is None or self.mean is None or self.basis is None:
            raise ConfigError("This geometry is not fitted. Call `fit` with vectors, or `SplinePCA.load`.")
        return self.spline, self.mean, self.basis

    def _checked(self, vectors: torch.Tensor, epochs: int, learning_rate: float) -> torch.Tensor:
        if epochs < 0 or not (math.isfinite(learning_rate) and learning_rate > 0):
            raise ConfigError(
                f"`epochs` is {epochs} and `learning_rate` {learning_rate}; it takes 0 or more epochs "
                "and a rate above 0."
            )
        if vectors.dim() != 2 or not vectors.is_floating_point():
            raise ConfigError(f"`fit` takes vectors [M, d] of a float type; got {vectors.dtype} {list(vectors.shape)}.")
        count, size = vectors.shape
        if self.k > size:
            raise ConfigError(f"`k` is {self.k}, above the {size} numbers of a vector.")
        if count < 2 * size:
            raise CalibrationError(f"Got {count} vectors of {size} numbers; it takes at least {2 * size} to fit them.")
        vectors = vectors.detach().float()
        if not _is_finite(vectors):
            raise CalibrationError("Some of the vectors hold numbers that are not finite. Leave those out.")
        spread, largest = vectors.std(dim=0).amax(), vectors.abs().amax()
        if not spread > _VARIES * largest:
            raise CalibrationError("The vectors never vary, so that there is nothing to fit. Collect others.")
        return vectors

    def extra_repr(self) -> str:
        return f"k={self.k}, knots={self.knots}, fitted={self.spline is not None}"


_NO_ERRORS = torch.zeros(1, dtype=torch.float64, device="cpu")


class _State(NamedTuple):
    """A spline and its components, and their errors on vectors held out, the mean of each stretch of them."""

    errors: torch.Tensor
    bends: torch.Tensor
    mean: torch.Tensor
    basis: torch.Tensor
    epoch: int

    @property
    def error(self) -> float:
        return float(self.errors.mean())

    def is_surely_below(self, other: "_State") -> bool:
        """Whether its error is lower than that of `other` by far more than the error differs between stretches."""
        gains = other.errors - self.errors
        if len(gains) < 2:
            return False
        return bool(gains.mean() > _SURE * gains.std() / math.sqrt(len(gains)))


class _Fit:
    """Training of one spline."""

    def __init__(
        self, spline: MonotoneSpline, training: torch.Tensor, held_out: list[torch.Tensor], components: int
    ) -> None:
        self.spline, self.training, self.held_out, self.components = spline, training, held_out, components
        self.batches = math.ceil(len(training) / _BATCH)
        self._optimiser = torch.optim.Adam(spline.parameters())
        self._mean, self._basis = self._find_components()
        # So that rates do not depend on the unit of the vectors.
        self._unit = training.var(dim=0).mean().clamp_min(torch.finfo(training.dtype).tiny)

    @torch.no_grad()
    def _find_components(self) -> tuple[torch.Tensor, torch.Tensor]:
        bent = self.spline(self.training)
        mean = bent.mean(dim=0)
        apart = (bent - mean).double()
        _, vectors = torch.linalg.eigh(apart.T @ apart)
        return mean, vectors[:, -self.components :].flip(1).float().contiguous()

    def _errors(self, vectors: torch.Tensor) -> torch.Tensor:
        """Squared, of each vector, [M]."""
        codes = (self.spline(vectors) - self._mean) @ self._basis
        return (self.spline.inverse(codes @ self._basis.T + self._mean) - vectors).square().mean(dim=1)

    def train(self, rates: Iterator[float]) -> None:
        """One pass over the vectors."""
        with torch.enable_grad():
            for batch, rate in zip(self.training.split(_BATCH), rates, strict=True):
                for group in self._optimiser.param_groups:
                    group["lr"] = rate
                self._optimiser.zero_grad()
                (self._errors(batch).mean() / self._unit).backward()
                self._optimiser.step()
        self._mean, self._basis = self._find_components()

    @torch.no_grad()
    def state(self) -> _State:
        errors = self._errors(torch.cat(self.held_out)).double().split([len(part) for part in self.held_out])
        return _State(
            torch.stack([part.mean() for part in errors]),
            self.spline.bends.detach().clone(),
            self._mean,
            self._basis,
            0,
        )


def _rates(largest: float, epochs: int, epoch: int, batches: int) -> Iterator[float]:
    """Of the steps of an epoch, along a cosine over all."""
    for batch in range(batches):
        yield largest * (1 + math.cos(math.pi * (epoch * batches + batch) / (epochs * batches))) / 2


def _divided(vectors: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Vectors to train on, in random order, and those held out of each stretch: its last ones."""
    stretches = vectors.tensor_split(max(1, min(_STRETCHES, round(_HELD_OUT * len(vectors)))))
    counts = [max(1, round(_HELD_OUT * len(part))) for part in stretches]
    training = torch.cat([part[:-count] for part, count in zip(stretches, counts, strict=True)])
    order = torch.randperm(len(training), generator=_generator(), dtype=torch.int64, device="cpu")
    held_out = [part[-count:] for part, count in zip(stretches, counts, strict=True)]
    return training[order.to(training.device)], held_out


def _generator() -> torch.Generator:
    return torch.Generator(device="cpu").manual_seed(_SEED)


def _is_finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
