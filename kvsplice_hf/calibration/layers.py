"""Which layers cost least to compress, by the statistics of calibration: `layers="fisher:n"`.

To second order, an error e of a latent costs e^T F e / 2 nats of divergence, F being the Fisher information of the
predictions. So the loss of a layer can be told from its statistics alone, at any budget, and layers can be ranked by
it. What layers lose together is not in it. docs/fisher.md says how far that holds.
"""

import logging
from collections import defaultdict
from dataclasses import replace
from typing import Any

from torch import nn

from kvsplice_hf.calibration.calibrator import KVSpliceCalibrator
from kvsplice_hf.calibration.splices import calibrator_for
from kvsplice_hf.code.heads import PartKey, layer_of
from kvsplice_hf.config import KVSpliceConfig
from kvsplice_hf.errors import CalibrationError
from kvsplice_hf.patch.families import AttentionSite
from kvsplice_hf.weights.processes import of_first
from kvsplice_hf.weights.sharding import is_spread


logger = logging.getLogger(__name__)


def predicted_losses(calibrator: KVSpliceCalibrator, parts: list[PartKey], config: KVSpliceConfig) -> dict[int, float]:
    """What each layer is predicted to lose if it is compressed, each to the same bytes or rank: nats per token.

    Args:
        calibrator: the statistics.
        parts: the layers, or their key heads.
        config: the budget of each layer.

    Raises:
        CalibrationError: too few tokens for the rank, or statistics that nothing can be fitted to.
        ConfigError: the budget is below the smallest row.
    """
    losses: dict[int, float] = defaultdict(float)
    for part, fit in calibrator.fit(replace(config, layers="all", allocation="layer"), parts)[0].items():
        losses[layer_of(part)] += fit.predicted_loss
    return dict(losses)


def choose_layers(
    model: nn.Module, sites: list[AttentionSite], config: KVSpliceConfig, calibration: Any, tokenizer: Any
) -> tuple[KVSpliceConfig, KVSpliceCalibrator]:
    """The settings with the layers that `layers="fisher:n"` asks for, and the statistics that they were chosen by.

    Args:
        model: the model, not patched.
        sites: all layers that can be chosen.
        config: the settings.
        calibration, tokenizer: as in `patch_model_with_kvsplice`.

    Raises:
        CalibrationError: there are no statistics, or they are of another model or metric.
        ConfigError: the budget does not fit.
    """
    if calibration is None and not config.is_packed:
        raise CalibrationError(
            f"layers={config.layers!r} chooses layers by calibration statistics, and there are none. Pass "
            'calibration="auto", statistics, or text and tokenizer; or name the layers.'
        )
    stores = [site for site in sites if site.stores_latent]
    calibrator = calibrator_for(model, stores, config, calibration, tokenizer)
    if calibrator.metric != "fisher":
        raise CalibrationError(
            f"layers={config.layers!r} chooses layers by the Fisher information, and these statistics are of metric "
            f'{calibrator.metric!r}. Calibrate with metric="fisher", or name the layers.'
        )
    losses = predicted_losses(calibrator, [part for site in stores for part in site.all_parts], config)
    chosen = tuple(sorted(sorted(losses, key=lambda layer: losses[layer])[: config.cheapest_layers]))
    if is_spread(model.modules()):  # what processes compute from the same numbers may differ in its last digit
        chosen = of_first(chosen)
    logger.info("Layers %s cost least of %d by calibration.", list(chosen), len(losses))
    return replace(config, layers=chosen), calibrator
