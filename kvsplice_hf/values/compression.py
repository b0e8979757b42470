"""Values as codes of fewer numbers: `SplinePCA` of each key head, fitted to all values or to those that pruning leaves.

Legend: `B` batch, `K` key heads, `N` tokens, `v` numbers of a value, `k` of a code.
"""

import hashlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from kvsplice_hf.code.heads import PartKey
from kvsplice_hf.errors import CalibrationError, ConfigError
from kvsplice_hf.geometry import SplinePCA
from kvsplice_hf.patch.families import AttentionSite


class LayerGeometry:
    """The geometries of the key heads of a layer.

    Where no spline bends anything, a mixture of values is made of the mixture of their codes, so that they are not
    expanded one by one.

    Args:
        heads: one of each key head, fitted.
        device: where the layer is.
    """

    def __init__(self, heads: Sequence[SplinePCA], device: torch.device) -> None:
        self._heads = [head.to(device) for head in heads]
        splines, means, bases = zip(*(_parts(head) for head in heads), strict=True)
        self.is_linear = not any(bool(spline.bends.any()) for spline in splines)
        self._mean = torch.stack(means)[:, None]  # [K, 1, v]
        self._basis = torch.stack(bases)  # [K, v, k]
        self.identity = _digest([*means, *bases, *(spline.bends for spline in splines)])

    @property
    def width(self) -> int:
        """k."""
        return self._basis.shape[-1]

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """Codes [B, K, N, k] of values [B, K, N, v], in their dtype."""
        if self.is_linear:
            return ((values.float() - self._mean) @ self._basis).to(values.dtype)
        parts = [head.compress(values[:, index]) for index, head in enumerate(self._heads)]
        return torch.stack(parts, dim=1).to(values.dtype)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Values [B, K, N, v] of codes [B, K, N, k], in their dtype."""
        if self.is_linear:
            return (codes.float() @ self._basis.transpose(1, 2) + self._mean).to(codes.dtype)
        parts = [head.decompress(codes[:, index]) for index, head in enumerate(self._heads)]
        return torch.stack(parts, dim=1).to(codes.dtype)

    def mix(self, shares: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Mixed values [B, K, n, v] of shares [B, K, n, N] of codes [B, K, N, k]."""
        if not self.is_linear:
            return shares @ self.decode(codes)
        total = shares.float().sum(-1, keepdim=True)
        return ((shares @ codes).float() @ self._basis.transpose(1, 2) + total * self._mean).to(shares.dtype)


def geometry_of(geometries: Mapping[PartKey, SplinePCA], site: AttentionSite) -> LayerGeometry:
    """The geometries of a layer.

    Raises:
        ConfigError: a key head has none, or one for vectors of another size.
    """
    heads = []
    for part in site.parts:
        head = geometries.get(part)
        mean = None if head is None else head.mean
        if head is None or mean is None or len(mean) != site.kv_lora_rank:
            found = "is not fitted" if mean is None else f"is for vectors of {len(mean)} numbers"
            raise ConfigError(
                f"The geometry of {part} {'is missing' if head is None else found}; {site.name} has values of "
                f"{site.kv_lora_rank} numbers. Fit geometries to this model, with `fit_value_geometries`."
            )
        heads.append(head)
    if len({head.k for head in heads}) > 1:
        raise ConfigError(
            f"The geometries of {site.name} have codes of different sizes; all heads of a layer need one."
        )
    return LayerGeometry(heads, site.device)


def fit_geometries(
    vectors: Mapping[PartKey, torch.Tensor],
    k: int,
    *,
    knots: int = 7,
    epochs: int = 8,
    learning_rate: float = 2e-3,
    progress: bool = True,
) -> dict[PartKey, SplinePCA]:
    """A geometry of each layer or key head.

    Args:
        vectors: samples of each, float32 [M, v].
        k: numbers of a code.
        knots, epochs, learning_rate: of the splines; 0 epochs are principal components alone.
        progress: show a bar.

    Raises:
        CalibrationError: too few vectors.
        ConfigError: `k` above the numbers of a vector, or another setting that cannot be.
    """
    fitted = {}
    for part, rows in tqdm(vectors.items(), desc="fitting geometries", file=sys.stderr, disable=not progress):
        fitted[part] = SplinePCA(k, knots)
        fitted[part].fit(rows, epochs=epochs, learning_rate=learning_rate, progress=False)
    if not fitted:
        raise CalibrationError("There are no values to fit geometries to. Give more text.")
    return fitted


def _parts(head: SplinePCA) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    assert head.spline is not None
    assert head.mean is not None
    assert head.basis is not None
    return head.spline, head.mean, head.basis


def _digest(tensors: Sequence[Any]) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]
