"""Geometries for the values that a model keeps.

Legend: `B` batch, `T` tokens, `M` samples, `v` numbers of a value, `k` of a code.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import DynamicCache

from kvsplice_hf import upstream
from kvsplice_hf.calibration.vectors import collect_vectors
from kvsplice_hf.code.heads import HeadKey, PartKey
from kvsplice_hf.errors import ConfigError
from kvsplice_hf.geometry import SplinePCA
from kvsplice_hf.retention.selection import EMPTY
from kvsplice_hf.values.compression import fit_geometries
from kvsplice_hf.values.layer import ValuePrunedLayer
from kvsplice_hf.values.pruning import ValuePruning


def fit_value_geometries(
    model: nn.Module,
    batches: Sequence[torch.Tensor],
    k: int,
    *,
    pruning: ValuePruning | None = None,
    knots: int = 7,
    epochs: int = 8,
    learning_rate: float = 2e-3,
    max_samples: int = 120_000,
    progress: bool = True,
) -> dict[PartKey, SplinePCA]:
    """A geometry for the values of each key head: `SplinePCA` to k numbers.

    Args:
        model: with ordinary attention, as it is.
        batches: token ids [B, T] each, without padding.
        k: numbers of a code.
        pruning: fit to the values that are left of it after a prompt (strategy A); None: to those of all tokens (B).
        knots, epochs, learning_rate: of the splines; 0 epochs are principal components alone, which decode faster.
        max_samples: values of each head, at most.
        progress: show bars.

    Raises:
        CalibrationError: too few tokens.
        ConfigError: `k` above v, `pruning` that compresses already, or another setting that cannot be.
        KVSpliceError: as `ValuePruning`, and `collect_vectors`.
    """
    if pruning is None:
        vectors = collect_vectors(
            model, batches, max_samples=max_samples, max_batches=max(1, len(batches)), progress=progress
        )
    elif pruning.geometries is not None:
        raise ConfigError("`pruning` has geometries already; geometries are fitted to values as they come.")
    else:
        with pruning(model):
            vectors = _kept_vectors(model, batches, max_samples, progress)
    return fit_geometries(vectors, k, knots=knots, epochs=epochs, learning_rate=learning_rate, progress=progress)


@torch.no_grad()
def _kept_vectors(
    model: Any, batches: Sequence[torch.Tensor], max_samples: int, progress: bool
) -> dict[PartKey, torch.Tensor]:
    """Values that pruning leaves of prompts, without the first tokens, float32 [M, v] of each head, on the CPU."""
    drawn: dict[PartKey, list[torch.Tensor]] = {}
    quota = -(-max_samples // max(1, len(batches)))
    bar = tqdm(batches, desc="collecting kept values", file=sys.stderr, disable=not progress)
    for ids in bar:
        cache = DynamicCache(config=model.config)
        model(ids.to(model.device), use_cache=True, **upstream.cache_argument(cache))
        for layer_idx, layer in enumerate(cache.layers):
            if isinstance(layer, ValuePrunedLayer):
                for head, rows in enumerate(kept_rows(layer)):
                    drawn.setdefault(HeadKey(layer_idx, head), []).append(rows[:quota].float().cpu())
    return {part: torch.cat(rows)[:max_samples] for part, rows in drawn.items()}


def kept_rows(layer: ValuePrunedLayer) -> list[torch.Tensor]:
    """Of each head the values in slots, [n, v], in an order that says nothing of their scores."""
    assert layer.positions is not None
    assert layer.values is not None
    found = []
    for head in range(layer.values.shape[1]):
        rows = layer.values[:, head][layer.positions[:, head] != EMPTY]
        seeded = torch.Generator().manual_seed(head)
        order = torch.randperm(len(rows), generator=seeded, dtype=torch.int64, device="cpu")
        found.append(rows[order.to(rows.device)])
    return found
