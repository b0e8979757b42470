"""From settings to splices: the one question that patching asks.

It decides what the splices are fitted to, collects statistics where there are none yet, and compares allocations. To
compare, and to let a model write its own text, a model is patched for a moment and is afterwards as it was.
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kvsplice_hf.calibration.auto import auto_calibrate, own_text
from kvsplice_hf.calibration.calibrator import KVSpliceCalibrator
from kvsplice_hf.calibration.collect import predicts
from kvsplice_hf.calibration.fit import LayerFit, write_fit_
from kvsplice_hf.calibration.holdout import divergence, log_probabilities
from kvsplice_hf.calibration.splines import spline_fits
from kvsplice_hf.code.bent import new_splice
from kvsplice_hf.code.codecs import codec_class
from kvsplice_hf.code.heads import PartKey, joined
from kvsplice_hf.code.initialise import initialise_, normal_tensors
from kvsplice_hf.code.projection import LearnedKVSplice
from kvsplice_hf.config import KVSpliceConfig
from kvsplice_hf.patch.apply import patched_for_a_moment, sites_to_patch
from kvsplice_hf.patch.families import AttentionSite
from kvsplice_hf.patch.mla import effective_weight
from kvsplice_hf.patch.sites import find_sites
from kvsplice_hf.weights.processes import of_first
from kvsplice_hf.weights.sharding import is_spread


logger = logging.getLogger(__name__)


def splices_for(
    model: nn.Module, sites: list[AttentionSite], config: KVSpliceConfig, calibration: Any = None, tokenizer: Any = None
) -> dict[int, Any]:
    """The splices of the layers that store a latent, by cache layer index, fitted as the settings say.

    Args:
        model: the model, not patched.
        sites: its layers to patch.
        config: the settings.
        calibration, tokenizer: as in `patch_model_with_kvsplice`.

    Raises:
        CalibrationError: the calibration text or statistics cannot be used, or are too few for the rank.
        CheckpointError: the file of a geometry cannot be used, or is of another model.
        ConfigError: the budget does not fit, or weights are missing or damaged.
    """
    fits = _fits(model, sites, config, calibration, tokenizer)
    # Of a model that processes run together: what they compute from the same numbers may differ in its last digit.
    return make_splices(sites, config, of_first(fits) if is_spread(model.modules()) else fits)


def _fits(
    model: nn.Module, sites: list[AttentionSite], config: KVSpliceConfig, calibration: Any, tokenizer: Any
) -> dict[PartKey, LayerFit]:
    """What calibration found for each layer; nothing where the weights alone decide."""
    if config.transform == "spline":
        return spline_fits(model, sites, config, calibration, tokenizer, lambda: _own_text(model, config))
    if calibration is None and not config.is_packed:
        if config.init == "svd" and config.compression_ratio != 1.0:
            logger.warning(
                "No calibration: the projection keeps what the weights of kv_b_proj read most, which says little about "
                "what matters. On real weights half the rank chosen in this way multiplied the perplexity by 97 "
                '(docs/calibration.md). Pass calibration="auto", or text and tokenizer.'
            )
        return {}
    stores = [site for site in sites if site.stores_latent]
    calibration = calibrator_for(model, stores, config, calibration, tokenizer)
    competing = config.is_packed and codec_class(config.codec).fitted_together
    if competing and config.allocation == "auto" and calibration.holdout and predicts(model):
        return _better_allocation(model, sites, config, calibration)
    return calibration.fit(config, [part for site in stores for part in site.all_parts])[0]


def calibrator_for(
    model: nn.Module, stores: list[AttentionSite], config: KVSpliceConfig, calibration: Any, tokenizer: Any
) -> KVSpliceCalibrator:
    """The statistics to fit to: those that were given, or collected now; arguments as of `splices_for`.

    Args:
        stores: the layers to patch that store a latent.

    Raises:
        CalibrationError: the calibration text or statistics cannot be used, or are of another model.
    """
    for site in stores:  # weights that are missing or damaged are named before the model is run
        if not site.kv_heads:
            effective_weight(site)
    if isinstance(calibration, (str, Path)) and str(calibration).endswith(".safetensors"):
        calibration = KVSpliceCalibrator.load(calibration)
    if not isinstance(calibration, KVSpliceCalibrator):
        calibrator = KVSpliceCalibrator(model, layer_pattern=config.layer_pattern, sink_tokens=config.sink_tokens)
        if calibration is None or (isinstance(calibration, str) and calibration == "auto"):
            auto_calibrate(model, calibrator, tokenizer, lambda: _own_text(model, config))
        else:
            calibrator.collect(calibration, tokenizer=tokenizer)
        calibration = calibrator
    calibration.require_model(stores, model)
    return calibration


def _better_allocation(
    model: nn.Module, sites: list[AttentionSite], config: KVSpliceConfig, calibrator: KVSpliceCalibrator
) -> dict[PartKey, LayerFit]:
    """Bytes that layers compete for, unless giving each the same loses less on text that was held out."""
    layers = [part for site in sites if site.stores_latent for part in site.all_parts]
    stock = log_probabilities(model, calibrator.holdout)
    fits, losses = {}, {}
    for allocation in ("global", "layer"):
        fits[allocation] = calibrator.fit(replace(config, allocation=allocation), layers)[0]
        with patched_for_a_moment(model, sites, make_splices(sites, config, fits[allocation]), config):
            losses[allocation] = divergence(stock, log_probabilities(model, calibrator.holdout))
    best = min(losses, key=lambda allocation: losses[allocation])
    logger.info("Divergence on held-out text, nats per token: %s. Taken: %s.", losses, best)
    return fits[best]


def _own_text(model: Any, config: KVSpliceConfig) -> list[dict[str, torch.Tensor]]:
    """Text the model writes, faster than unpatched: at full rank the splice changes nothing but the speed."""
    if all(site.kv_heads for site in find_sites(model, config.layer_pattern)):
        return own_text(model)  # ordinary attention is not slow unpatched
    exact = KVSpliceConfig(compression_ratio=1.0, init="identity", layer_pattern=config.layer_pattern)
    sites = sites_to_patch(model, exact)
    with patched_for_a_moment(model, sites, make_splices(sites, exact, {}), exact):
        return own_text(model)


def make_splices(sites: list[AttentionSite], config: KVSpliceConfig, fits: dict[PartKey, LayerFit]) -> dict[int, Any]:
    """The splices of the layers that store a latent, by cache layer index.

    Args:
        sites: the layers to patch.
        config: the settings.
        fits: what calibration found; a part that it lacks starts as `config.init` says.
    """
    with normal_tensors():
        return {site.layer_idx: _make_splice(site, config, fits) for site in sites if site.stores_latent}


def _make_splice(site: AttentionSite, config: KVSpliceConfig, fits: dict[PartKey, LayerFit]) -> Any:
    parts = {part: _make_part(site, config, fits.get(part)) for part in site.parts}
    return joined(parts).train(site.module.training)


def _make_part(site: AttentionSite, config: KVSpliceConfig, fit: LayerFit | None) -> LearnedKVSplice:
    module = site.module
    rank = config.rank_for(site.kv_lora_rank, site.name) if fit is None else fit.rank
    device = site.device
    # The constructors of linear layers draw random numbers, which are overwritten right away. A patch must not change
    # what a seeded program draws next.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        predicted_from = 0 if fit is None else fit.predicted_from
        splice = new_splice(
            config, site.kv_lora_rank, rank, predicted_from=predicted_from, device=device, dtype=site.dtype
        )
    if fit is None:
        weight = effective_weight(site, device) if config.init == "svd" else None
        initialise_(splice, config.init, weight)
    else:
        write_fit_(splice, fit)
    return splice.train(module.training)
