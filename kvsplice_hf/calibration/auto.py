"""Calibration without data: varied text if there is a tokenizer, otherwise text that the model writes itself.

Varied text is better by far on the model it was measured on, and needs no sampling (docs/calibration.md).

Statistics are kept in a cache folder, so that a model is calibrated once per machine. Where they cannot be kept, or the
kept ones are damaged, a warning says so and the model is calibrated.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import cached_assets_path
from safetensors import SafetensorError

from kvsplice_hf import folders
from kvsplice_hf.calibration.calibrator import KVSpliceCalibrator
from kvsplice_hf.calibration.collect import Batch, require_runnable
from kvsplice_hf.calibration.data import WINDOW, as_batches
from kvsplice_hf.calibration.fingerprint import tokenizer_fingerprint
from kvsplice_hf.calibration.sampling import sample_from_model
from kvsplice_hf.errors import CalibrationError, UnsupportedError
from kvsplice_hf.text import tokenizer_of
from kvsplice_hf.version import __version__
from kvsplice_hf.weights.processes import gathered


logger = logging.getLogger(__name__)

AUTO_TOKENS = 20_000
# Sampling costs more than the statistics.
OWN_TOKENS = 8192


def auto_calibrate(
    model: Any, calibrator: KVSpliceCalibrator, tokenizer: Any, sample: Callable[[], list[Batch]]
) -> None:
    """Fill `calibrator` from the cache folder, or else from varied text, or without a tokenizer the model's own.

    Args:
        model: the model to calibrate.
        calibrator: of that model, with no token seen yet.
        tokenizer: of the model, a processor that has one, or None.
        sample: makes the model's own text.

    Raises:
        ConfigError: a tokenizer was given that is none, and has none.
    """
    tokenizer = None if tokenizer is None else tokenizer_of(tokenizer)
    name = f"{_key(calibrator, tokenizer)}.safetensors"
    path, reason = _place(name)
    kept = None if path is None else _read_kept(calibrator, path)
    if all(gathered(kept is not None)):  # or none: to collect takes all processes
        assert kept is not None
        calibrator.adopt(kept)
        logger.info("Calibration statistics read from %s.", path)
        return
    if path is not None:
        reason = folders.obstacle(path.parent)
    if reason is not None:  # said before the time is spent
        _warn_unkept(path, reason)
    calibrator.collect_batches(_text(model, tokenizer, sample))
    if path is not None and reason is None:
        _keep(calibrator, path)


def _place(name: str) -> tuple[Path | None, str | None]:
    """Where a file of statistics is kept, or None and why there is no such place."""
    try:
        return statistics_folder() / name, None
    except OSError as error:
        return None, str(error)


def _read_kept(calibrator: KVSpliceCalibrator, path: Path) -> KVSpliceCalibrator | None:
    """The statistics kept at `path`; None where there are none, or none that anything can be fitted to."""
    try:
        kept = KVSpliceCalibrator.load(path)
        _require_same_model(kept, calibrator)
        for layer_idx, layer in kept.statistics.items():
            layer.check(f"layer {layer_idx}")
    except Exception as error:  # a damaged file can raise anything, and must not keep the model from being patched
        if os.path.lexists(path):
            logger.warning("%s is not used, and the model is calibrated again: %s", path, error)
        return None
    return kept


def _require_same_model(kept: KVSpliceCalibrator, calibrator: KVSpliceCalibrator) -> None:
    """Check kept statistics against a calibrator that has seen no token yet.

    Raises:
        CalibrationError: they are of another model, or by another metric.
    """
    found, needed = (
        (c.metric, c.fingerprint, {index: (layer.latent_dim, layer.rope_dim) for index, layer in c.statistics.items()})
        for c in (kept, calibrator)
    )
    if found != needed:
        raise CalibrationError(f"It holds statistics of another model ({found}, needed are {needed}).")


def _keep(calibrator: KVSpliceCalibrator, path: Path) -> None:
    try:
        folders.write_whole(path, calibrator.save)
    except (OSError, SafetensorError) as error:  # safetensors raises its own where a disk is full
        _warn_unkept(path, error)


def _warn_unkept(path: Path | None, reason: object) -> None:
    place = "the cache folder" if path is None else path.parent
    consequence = "The model is patched all the same, and will be calibrated again the next time."
    folders.warn_unkept("Calibration statistics", place, reason, consequence)


def _text(model: Any, tokenizer: Any, sample: Callable[[], list[Batch]]) -> list[Batch]:
    if tokenizer is not None:
        return as_batches("varied", tokenizer, AUTO_TOKENS, _window(model))
    logger.warning(
        "Calibrating on text that the model samples. Pass `tokenizer` to use varied text instead: it is faster, "
        "and lost several times less perplexity where both were measured (docs/calibration.md)."
    )
    return sample()


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
    require_runnable(model, "fisher")  # before text is sampled
    return sample_from_model(model, OWN_TOKENS, _window(model))


def _window(model: Any) -> int:
    """Tokens per sequence: no more than the model has positions for."""
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or WINDOW
    return min(WINDOW, positions)


def statistics_folder() -> Path:
    """Where automatic calibrations are kept. The environment variable `KVSPLICE_CACHE` overrides the folder.

    Raises:
        OSError: there is no such folder, and none can be made.
    """
    root = folders.chosen_root()
    if root is not None:
        return root / "statistics"
    try:
        return cached_assets_path("kvsplice_hf", "statistics")
    except (RuntimeError, ValueError) as error:  # no home folder; a file where a folder should be
        raise OSError(str(error)) from error


def _key(calibrator: KVSpliceCalibrator, tokenizer: Any) -> str:
    """Of everything that the statistics depend on."""
    with_text = tokenizer is not None
    settings = [
        calibrator.fingerprint,
        calibrator.metric,
        calibrator.layer_pattern,
        calibrator.sink_tokens,
        tokenizer_fingerprint(tokenizer),
        with_text,
        AUTO_TOKENS if with_text else OWN_TOKENS,
        WINDOW,
        __version__,
    ]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]
