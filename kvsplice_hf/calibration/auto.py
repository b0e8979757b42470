"""Calibration without data: varied text if there is a tokenizer, otherwise text that the model writes itself.

Varied text is better by far on the model it was measured on, and needs no sampling (docs/calibration.md).

Statistics are kept in a cache folder, so that a model is calibrated once per machine.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import cached_assets_path

from kvsplice_hf.calibration.calibrator import KVSpliceCalibrator
from kvsplice_hf.calibration.collect import Batch
from kvsplice_hf.calibration.data import WINDOW, as_batches, sample_from_model
from kvsplice_hf.errors import CalibrationError, UnsupportedError
from kvsplice_hf.version import __version__


logger = logging.getLogger(__name__)

AUTO_TOKENS = 16_384
# Sampling costs more than the statistics.
OWN_TOKENS = 8192


def auto_calibrate(
    model: Any, calibrator: KVSpliceCalibrator, tokenizer: Any, sample: Callable[[], list[Batch]]
) -> None:
    """Fill `calibrator` from the cache folder, or else from varied text, or without a tokenizer the model's own.

    Args:
        model: the model to calibrate.
        calibrator: of that model, with no token seen yet.
        tokenizer: of the model, or None.
        sample: makes the model's own text.
    """
    path = statistics_folder() / f"{_key(calibrator, tokenizer is not None)}.safetensors"
    try:
        calibrator.adopt(KVSpliceCalibrator.load(path, model))
        logger.info("Calibration statistics read from %s.", path)
        return
    except CalibrationError as error:
        if path.exists():
            logger.warning("%s Its place is taken by a new calibration.", error)
    if tokenizer is None:
        logger.warning(
            "Calibrating on text that the model samples. Pass `tokenizer` to use varied text instead: it is faster, "
            "and lost several times less perplexity where both were measured (docs/calibration.md)."
        )
        batches = sample()
    else:
        batches = as_batches("varied", tokenizer, AUTO_TOKENS, _window(model))
    calibrator.collect_batches(batches)
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    calibrator.save(unfinished)
    unfinished.replace(path)


def own_text(model: Any) -> list[Batch]:
    """Text that the model writes itself.

    Raises:
        UnsupportedError: the model cannot write text.
    """
    if not getattr(model, "can_generate", lambda: False)():
        raise UnsupportedError(
            f"A {type(model).__name__} cannot write text to calibrate itself on. Give `calibration` (token ids, texts "
            "with `tokenizer`, or a KVSpliceCalibrator), or a budget that needs none: `compression_ratio` or `rank`."
        )
    return sample_from_model(model, OWN_TOKENS, _window(model))


def _window(model: Any) -> int:
    """Tokens per sequence: no more than the model has positions for."""
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or WINDOW
    return min(WINDOW, positions)


def statistics_folder() -> Path:
    """Where automatic calibrations are kept. The environment variable `KVSPLICE_CACHE` overrides the folder."""
    root = os.environ.get("KVSPLICE_CACHE")
    folder = Path(root) / "statistics" if root else cached_assets_path("kvsplice_hf", "statistics")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _key(calibrator: KVSpliceCalibrator, with_text: bool) -> str:
    settings = [
        calibrator.fingerprint,
        calibrator.metric,
        with_text,
        AUTO_TOKENS if with_text else OWN_TOKENS,
        WINDOW,
        __version__,
    ]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]
