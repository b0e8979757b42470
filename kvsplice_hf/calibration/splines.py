"""What a splice with `transform="spline"` is made of: geometries, given, or fitted to vectors of the model."""

import sys
from collections.abc import Callable, Mapping
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
from kvsplice_hf.calibration.key_geometries import KeyGeometry, SampledKeys, fit_key_geometries
from kvsplice_hf.calibration.media import Media
from kvsplice_hf.calibration.vectors import Sample, collect_samples
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
    """A spline and principal components for each layer that stores a latent, and for each key head.

    Of key heads for their values, and with `key_rank` for their keys as well.

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
    _require_key_heads(stores, config)
    ranks = {part: config.rank_for(site.kv_lora_rank, site.name) for site in stores for part in site.parts}
    if isinstance(calibration, (str, Path)) and str(calibration).endswith(".safetensors"):
        from_geometry = is_model_geometry(calibration)
        calibration = ModelGeometry.load(calibration) if from_geometry else KVSpliceCalibrator.load(calibration)
    if isinstance(calibration, ModelGeometry):
        geometries, keys = _given(calibration, model, config, ranks)
    else:
        samples = _samples(model, stores, config, calibration, tokenizer, own_text)
        keys = _fitted_keys(samples, config)
        geometries = {part: _fitted(samples[part].vectors, rank, config) for part, rank in _progress(ranks)}
    key_dims = {part: site.qk_rope_head_dim if site.kv_heads else None for site in stores for part in site.parts}
    return {part: fit_geometry(geometry, key_dims[part], keys.get(part)) for part, geometry in geometries.items()}


def _require_key_heads(stores: list[AttentionSite], config: KVSpliceConfig) -> None:
    """Refuse `key_rank` where a layer has no keys of that size of its own, before the model runs."""
    if config.key_rank is None:
        return
    latent = next((site for site in stores if not site.kv_heads), None)
    if latent is not None:
        raise ConfigError(
            f"`key_rank` is for ordinary attention, and {latent.name} ({type(latent.module).__name__}) stores a latent "
            "with one rotated key beside it, which is stored as it comes. Leave `key_rank` out."
        )
    small = next((site for site in stores if site.qk_rope_head_dim < config.key_rank), None)
    if small is not None:
        raise ConfigError(
            f"`key_rank` is {config.key_rank}, but the keys of {small.name} have {small.qk_rope_head_dim} numbers."
        )


def _progress(ranks: dict[PartKey, int]) -> Any:
    return tqdm(ranks.items(), desc="fitting splines", file=sys.stderr, disable=len(ranks) < 8)


def _fitted(vectors: torch.Tensor, rank: int, config: KVSpliceConfig) -> SplinePCA:
    geometry = SplinePCA(rank, config.knots)
    geometry.fit(vectors, epochs=config.spline_epochs, learning_rate=config.spline_learning_rate, progress=False)
    return geometry


def _fitted_keys(samples: Mapping[PartKey, Sample], config: KVSpliceConfig) -> dict[PartKey, KeyGeometry]:
    if config.key_rank is None:
        return {}
    keys = {part: sample.keys for part, sample in samples.items() if sample.keys is not None}
    return fit_key_geometries(
        keys,
        config.key_rank,
        knots=config.knots,
        epochs=config.spline_epochs,
        learning_rate=config.spline_learning_rate,
        progress=len(keys) >= 8,
    )[0]


def _given(
    geometry: ModelGeometry, model: nn.Module, config: KVSpliceConfig, ranks: dict[PartKey, int]
) -> tuple[dict[PartKey, SplinePCA], dict[PartKey, KeyGeometry]]:
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
    if config.key_rank is None:
        return {part: geometry[part] for part in ranks}, {}
    if geometry.key_k != config.key_rank:
        held = "none of keys" if geometry.key_k is None else f"keys of {geometry.key_k} numbers"
        raise ConfigError(
            f"`key_rank` is {config.key_rank}, and the geometry holds {held}. Fit it with key_k={config.key_rank}, or "
            "change `key_rank`."
        )
    return {part: geometry[part] for part in ranks}, {part: geometry.keys_of[part] for part in ranks}


def _samples(
    model: nn.Module,
    stores: list[AttentionSite],
    config: KVSpliceConfig,
    calibration: Any,
    tokenizer: Any,
    own_text: Callable[[], list[Batch]],
) -> dict[PartKey, Sample]:
    """Latents or values of each part, and keys where they are coded."""
    if isinstance(calibration, KVSpliceCalibrator):
        calibration.require_model(stores, model)
        held = calibration.statistics
        return {
            part: Sample(held[part].rows[:, : site.kv_lora_rank], SampledKeys.of(held[part]))
            for site in stores
            for part in site.parts
        }
    if calibration is None or (isinstance(calibration, str) and calibration == "auto"):
        calibration = "varied" if tokenizer is not None else None
    positions = getattr(stores[0].module.config.get_text_config(decoder=True), "max_position_embeddings", None)
    window, tokens = min(WINDOW, positions or WINDOW), AUTO_TOKENS if calibration == "varied" else MAX_SAMPLES
    if calibration is None:
        batches = own_text()
    else:
        batches = as_batches(calibration, tokenizer, tokens, window, Media.of(model))
    return collect_samples(
        model,
        batches,
        max_samples=MAX_SAMPLES,
        max_batches=len(batches),
        sink_tokens=config.sink_tokens,
        layer_pattern=config.layer_pattern,
        with_keys=config.key_rank is not None,
    )
