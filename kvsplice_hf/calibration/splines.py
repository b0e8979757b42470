"""What a splice with `transform="spline"` is made of: geometries, given, or fitted to vectors of the model."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from kvsplice_hf.calibration.auto import AUTO_TOKENS
from kvsplice_hf.calibration.calibrator import KVSpliceCalibrator
from kvsplice_hf.calibration.collect import Batch
from kvsplice_hf.calibration.data import WINDOW, as_batches
from kvsplice_hf.calibration.fit import LayerFit, fit_geometry
from kvsplice_hf.calibration.geometries import MAX_SAMPLES, ModelGeometry, is_model_geometry
from kvsplice_hf.calibration.media import Media
from kvsplice_hf.calibration.vectors import collect_vectors
from kvsplice_hf.code.heads import PartKey
from kvsplice_hf.config import KVSpliceConfig
from kvsplice_hf.errors import ConfigError, UnsupportedError
from kvsplice_hf.geometry import SplinePCA
from kvsplice_hf.patch.families import AttentionSite
from kvsplice_hf.weights.sharding import is_spread


def spline_fits(
    model: nn.Module,
    sites: list[AttentionSite],
    config: KVSpliceConfig,
    calibration: Any,
    tokenizer: Any,
    own_text: Callable[[], list[Batch]],
) -> dict[PartKey, LayerFit]:
    """A spline and principal components for each layer that stores a latent, and for the values of each key head.

    Args:
        model: unpatched.
        sites: its layers to patch.
        config: the settings, with a rank.
        calibration: a `ModelGeometry` or the path of its file; statistics, or their path, of which the sampled rows are
            fitted to; or text and the like, which the model runs over. None and "auto" take varied text where there is
            a tokenizer.
        tokenizer: for texts.
        own_text: makes text that the model writes itself.

    Raises:
        CalibrationError: the text or statistics cannot be used, or are too few.
        CheckpointError: the file of a geometry cannot be used, or is of another model.
        ConfigError: the rank is above the size of a vector, or a geometry does not fit the settings.
        UnsupportedError: the model is spread over processes.
    """
    if is_spread(model.modules()):
        raise UnsupportedError(
            'transform="spline" is fitted in one process, and this model is spread over several. Fit and save the '
            "splice before the model is spread, or use the affine transform."
        )
    stores = [site for site in sites if site.stores_latent]
    ranks = {part: config.rank_for(site.kv_lora_rank, site.name) for site in stores for part in site.parts}
    if isinstance(calibration, (str, Path)) and str(calibration).endswith(".safetensors"):
        from_geometry = is_model_geometry(calibration)
        calibration = ModelGeometry.load(calibration) if from_geometry else KVSpliceCalibrator.load(calibration)
    if isinstance(calibration, ModelGeometry):
        geometries = _given(calibration, model, config, ranks)
    else:
        vectors = _vectors(model, stores, config, calibration, tokenizer, own_text)
        geometries = {part: _fitted(vectors[part], rank, config) for part, rank in _progress(ranks)}
    key_dims = {part: site.qk_rope_head_dim if site.kv_heads else None for site in stores for part in site.parts}
    return {part: fit_geometry(geometry, key_dims[part]) for part, geometry in geometries.items()}


def _progress(ranks: dict[PartKey, int]) -> Any:
    return tqdm(ranks.items(), desc="fitting splines", file=sys.stderr, disable=len(ranks) < 8)


def _fitted(vectors: torch.Tensor, rank: int, config: KVSpliceConfig) -> SplinePCA:
    geometry = SplinePCA(rank, config.knots)
    geometry.fit(vectors, epochs=config.spline_epochs, learning_rate=config.spline_learning_rate, progress=False)
    return geometry


def _given(
    geometry: ModelGeometry, model: nn.Module, config: KVSpliceConfig, ranks: dict[PartKey, int]
) -> dict[PartKey, SplinePCA]:
    """Geometries that were fitted before, checked against the model and the settings."""
    geometry.require_model(model, config.layer_pattern)
    missing = [str(part) for part in ranks if part not in geometry]
    if missing:
        raise ConfigError(
            f"The geometry holds {', '.join(map(str, geometry))}, but not {', '.join(missing)}. A splice has one for "
            'each layer of latents, and for each key head of ordinary attention: fit it with of="heads".'
        )
    wrong = sorted({rank for rank in ranks.values() if rank != geometry.k})
    if wrong or geometry.knots != config.knots:
        raise ConfigError(
            f"The geometry keeps k = {geometry.k} numbers behind splines of {geometry.knots} knots; the settings ask "
            f"for rank {', '.join(map(str, wrong)) or geometry.k} and `knots` {config.knots}. Give rank={geometry.k} "
            f"and knots={geometry.knots}, or fit another geometry."
        )
    return {part: geometry[part] for part in ranks}


def _vectors(
    model: nn.Module,
    stores: list[AttentionSite],
    config: KVSpliceConfig,
    calibration: Any,
    tokenizer: Any,
    own_text: Callable[[], list[Batch]],
) -> dict[PartKey, torch.Tensor]:
    """Vectors [M, n] of each part."""
    if isinstance(calibration, KVSpliceCalibrator):
        calibration.require_model(stores, model)
        held = calibration.statistics
        return {part: held[part].rows[:, : site.kv_lora_rank] for site in stores for part in site.parts}
    if calibration is None or (isinstance(calibration, str) and calibration == "auto"):
        calibration = "varied" if tokenizer is not None else None
    positions = getattr(stores[0].module.config.get_text_config(decoder=True), "max_position_embeddings", None)
    window, tokens = min(WINDOW, positions or WINDOW), AUTO_TOKENS if calibration == "varied" else MAX_SAMPLES
    if calibration is None:
        batches = own_text()
    else:
        batches = as_batches(calibration, tokenizer, tokens, window, Media.of(model))
    return collect_vectors(
        model,
        batches,
        max_samples=MAX_SAMPLES,
        max_batches=len(batches),
        sink_tokens=config.sink_tokens,
        layer_pattern=config.layer_pattern,
    )
