"""Spline, then principal components (`SplinePCA`), as the research compresses values and latents.

Legend: `M` vectors, `d` numbers of each, `k` of a code.
"""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn
from tqdm import tqdm

from kvsplice_hf import folders
from kvsplice_hf.errors import CalibrationError, CheckpointError, ConfigError
from kvsplice_hf.geometry.spline import MonotoneSpline


_FORMAT = "kvsplice-geometry"
_VERSION = 1
_HELD_OUT = 0.1
_BATCH = 1024
_SEED = 0
# Vectors of which no number varies by more than this share of its size cannot be told apart in float32.
_VARIES = 1e-6


class Fitted(NamedTuple):
    """What `SplinePCA.fit` found, as mean squared errors per number on vectors that it was not fitted to.

    Attributes:
        pca: of principal components alone.
        spline: of the spline and principal components, the best of all epochs.
        epoch: after which epoch that was; 0: the identity was best, so that principal components alone are kept.
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
        self.k, self.knots = k, knots
        self.spline = None
        self.register_buffer("mean", None)
        self.register_buffer("basis", None)

    def fit(
        self, vectors: torch.Tensor, *, epochs: int = 8, learning_rate: float = 2e-3, progress: bool = True
    ) -> Fitted:
        """Fit to vectors [M, d], of any float type; what was fitted before is dropped.

        The spline is trained by gradients through the error of reconstruction, a tenth of the vectors held out. The
        components are those of all other vectors, found anew before each epoch. Kept is the best epoch on the vectors
        held out, among them the identity: principal components alone.

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
        order = torch.randperm(len(vectors), generator=_generator(), dtype=torch.int64, device="cpu")
        shuffled = vectors[order.to(vectors.device)]
        count = max(1, round(_HELD_OUT * len(vectors)))
        held_out, training = shuffled[:count], shuffled[count:]
        fit = _Fit(MonotoneSpline.over(training, self.knots), training, held_out, self.k)
        best = fit.state()
        pca = best.error
        bar = tqdm(range(epochs), desc="fitting splines", file=sys.stderr, disable=not progress)
        for epoch in bar:
            fit.train(_rates(learning_rate, epochs, epoch, fit.batches))
            found = fit.state()
            if found.error < best.error:
                best = found._replace(epoch=epoch + 1)
        self._keep(fit.spline, best)
        return Fitted(pca, best.error, best.epoch)

    def compress(self, vectors: torch.Tensor) -> torch.Tensor:
        """Codes [..., k] of vectors [..., d], in float32.

        Raises:
            ConfigError: nothing is fitted yet, or the vectors are of another size.
        """
        spline, mean, basis = self._fitted()
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
        spline, mean, basis = self._fitted()
        if codes.shape[-1] != self.k:
            raise ConfigError(f"Got codes of {codes.shape[-1]} numbers; those of this geometry have {self.k}.")
        return spline.inverse(codes.float() @ basis.T + mean)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """What is left of vectors [..., d] after both ways."""
        return self.decompress(self.compress(vectors))

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all.

        Raises:
            ConfigError: nothing is fitted yet.
            OSError: it cannot be written.
        """
        spline, mean, basis = self._fitted()
        tensors = {"knots": spline.knots, "bends": spline.bends, "mean": mean, "basis": basis}
        about = {"format": _FORMAT, "version": _VERSION, "k": self.k, "knots": self.knots}
        held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        folders.write_bytes(Path(path), safetensors.torch.save(held, metadata={"kvsplice": json.dumps(about)}))

    @classmethod
    def load(cls, path: str | Path) -> "SplinePCA":
        """Read what `save` wrote.

        Raises:
            CheckpointError: there is no such file, or it is damaged, of something else, or of a newer version.
        """
        about, tensors = _read(Path(path))
        try:
            geometry = cls(int(about["k"]), int(about["knots"]))
            geometry._take(tensors)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path} is damaged: {error}. Fit and save the geometry again.") from error
        return geometry

    def _take(self, tensors: dict[str, torch.Tensor]) -> None:
        knots, bends, mean, basis = (tensors[name] for name in ("knots", "bends", "mean", "basis"))
        d, n = knots.shape
        shapes = (n, bends.shape, mean.shape, basis.shape)
        if shapes != (self.knots, (d, n + 1), (d,), (d, self.k)) or not all(map(_is_finite, tensors.values())):
            raise ConfigError("its tensors do not fit each other")
        spline = MonotoneSpline(knots.float())
        with torch.no_grad():
            spline.bends.copy_(bends)
        self._keep(spline, _State(0.0, bends, mean.float(), basis.float(), 0))

    def _keep(self, spline: MonotoneSpline, state: "_State") -> None:
        with torch.no_grad():
            spline.bends.copy_(state.bends)
        self.spline = spline.requires_grad_(False)
        self.mean, self.basis = state.mean, state.basis

    def _fitted(self) -> tuple[MonotoneSpline, torch.Tensor, torch.Tensor]:
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


class _State(NamedTuple):
    """A spline and its components, and their error on vectors held out."""

    error: float
    bends: torch.Tensor
    mean: torch.Tensor
    basis: torch.Tensor
    epoch: int


class _Fit:
    """Training of one spline."""

    def __init__(self, spline: MonotoneSpline, training: torch.Tensor, held_out: torch.Tensor, components: int) -> None:
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

    def _error(self, vectors: torch.Tensor) -> torch.Tensor:
        codes = (self.spline(vectors) - self._mean) @ self._basis
        return (self.spline.inverse(codes @ self._basis.T + self._mean) - vectors).square().mean()

    def train(self, rates: Iterator[float]) -> None:
        """One pass over the vectors."""
        with torch.enable_grad():
            for batch, rate in zip(self.training.split(_BATCH), rates, strict=True):
                for group in self._optimiser.param_groups:
                    group["lr"] = rate
                self._optimiser.zero_grad()
                (self._error(batch) / self._unit).backward()
                self._optimiser.step()
        self._mean, self._basis = self._find_components()

    @torch.no_grad()
    def state(self) -> _State:
        error = float(self._error(self.held_out))
        return _State(error, self.spline.bends.detach().clone(), self._mean, self._basis, 0)


def _rates(largest: float, epochs: int, epoch: int, batches: int) -> Iterator[float]:
    """Of the steps of an epoch, along a cosine over all."""
    for batch in range(batches):
        yield largest * (1 + math.cos(math.pi * (epoch * batches + batch) / (epochs * batches))) / 2


def _generator() -> torch.Generator:
    return torch.Generator(device="cpu").manual_seed(_SEED)


def _is_finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"No geometry at {path}: {error}. It takes a file of SplinePCA.save.") from error
    try:
        tensors = safetensors.torch.load(content)
        size = int.from_bytes(content[:8], "little")
        about = json.loads(json.loads(content[8 : 8 + size]).get("__metadata__", {}).get("kvsplice", "null"))
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}. Fit and save the geometry again.") from error
    if not isinstance(about, dict) or about.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path} is not a geometry: its metadata do not say so. It takes a file of SplinePCA.save."
        )
    if not isinstance(about.get("version"), int) or about["version"] > _VERSION:
        raise CheckpointError(
            f"{path} has version {about.get('version')!r} of the format; this release reads up to {_VERSION}. Upgrade "
            "kvsplice_hf."
        )
    return about, tensors
