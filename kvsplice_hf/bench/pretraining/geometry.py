"""A geometry fitted to a model that was just trained: the options of the research's calibrator, and what they do."""

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from kvsplice_hf.bench.pretraining.data import Blocks
from kvsplice_hf.bench.pretraining.training import ModelArguments, validation_loss
from kvsplice_hf.bench.through_geometry import through_geometries
from kvsplice_hf.calibration.geometries import MAX_SAMPLES, ModelGeometry, fit_geometry
from kvsplice_hf.errors import ConfigError
from kvsplice_hf.geometry import SplinePCA


@dataclass
class GeometryArguments:
    """A spline and principal components, fitted to values (or to latents of MLA) after training."""

    kvsplice_enable: bool = field(
        default=False, metadata={"help": "fit splines and components to all values of each layer (MLA: to latents)"}
    )
    kvsplice_k: int = field(default=64, metadata={"help": "numbers kept of a vector"})
    kvsplice_knots: int = field(default=7, metadata={"help": "of each spline"})
    kvsplice_samples: int = field(default=MAX_SAMPLES, metadata={"help": "vectors of each layer, at most"})
    kvsplice_save: str | None = field(
        default=None, metadata={"help": "safetensors file of the geometry; none: geometry.safetensors in output_dir"}
    )
    kvsplice_max_batches: int = field(default=64, metadata={"help": "batches to collect vectors from, at most"})
    kvsplice_epochs: int = field(default=8, metadata={"help": "passes over the vectors"})
    kvsplice_lr: float = field(default=2e-3, metadata={"help": "learning rate of the splines"})


GEOMETRY_OPTIONS = frozenset(item.name for item in fields(GeometryArguments))


def require_geometry(args: Any) -> None:
    """Refuse options of a geometry that cannot be, before the model is trained.

    Args:
        args: `ModelArguments` and `GeometryArguments`.

    Raises:
        ConfigError: they cannot be.
    """
    given = sorted(item.name for item in fields(GeometryArguments) if getattr(args, item.name) != item.default)
    if not args.kvsplice_enable:
        if given:
            raise ConfigError(f"{', '.join(given)} belong to a geometry; give --kvsplice_enable too.")
        return
    SplinePCA(args.kvsplice_k, args.kvsplice_knots)
    size = _vector_size(args)
    if args.kvsplice_k > size:
        raise ConfigError(f"--kvsplice_k is {args.kvsplice_k}, above the {size} numbers of a vector of this model.")
    if min(args.kvsplice_samples, args.kvsplice_max_batches) < 1:
        raise ConfigError(
            f"--kvsplice_samples is {args.kvsplice_samples} and --kvsplice_max_batches {args.kvsplice_max_batches}; "
            "both must be 1 or more."
        )
    if args.kvsplice_epochs < 0 or not (math.isfinite(args.kvsplice_lr) and args.kvsplice_lr > 0):
        raise ConfigError(
            f"--kvsplice_epochs is {args.kvsplice_epochs} and --kvsplice_lr {args.kvsplice_lr}; it takes 0 or more "
            "epochs and a rate above 0."
        )
    if args.kvsplice is not None:
        raise ConfigError("--kvsplice_enable is for a model without a built-in splice: leave --kvsplice out.")


def _vector_size(args: ModelArguments) -> int:
    """Numbers of all values of a layer, or of a latent."""
    return args.n_embd if args.architecture == "gpt2" else args.kv_lora_rank or args.n_embd // 3


def fit_after_training(model: Any, blocks: Blocks, args: Any, batch_size: int, folder: Path) -> dict[str, Any]:
    """Fit a geometry to vectors of the training text, save it, and measure what the model loses through it.

    Args:
        model: trained.
        blocks: its text.
        args: `GeometryArguments`.
        batch_size: blocks of a batch.
        folder: of the run, where `kvsplice_save` names no file.

    Returns:
        Entries of the report: the file, mean squared errors on held-out vectors, and the validation loss
        through components alone (`pca`) and through splines and components.
    """
    count = min(len(blocks.train), args.kvsplice_max_batches * batch_size)
    ids = blocks.train[:count]["input_ids"].long()
    settings: dict[str, Any] = {
        "knots": args.kvsplice_knots,
        "samples": args.kvsplice_samples,
        "max_batches": args.kvsplice_max_batches,
        "learning_rate": args.kvsplice_lr,
        "of": "layers",
    }
    batches = [{"input_ids": part} for part in ids.split(batch_size)]
    model.eval()
    fitted = {
        name: fit_geometry(model, batches, args.kvsplice_k, epochs=epochs, **settings)
        for name, epochs in (("pca", 0), ("spline", args.kvsplice_epochs))
    }
    path = Path(args.kvsplice_save) if args.kvsplice_save else folder / "geometry.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    fitted["spline"].save(path)
    found: dict[str, Any] = {"kvsplice_file": str(path)}
    for name, geometry in fitted.items():
        with through_geometries(model, geometry):
            found[f"kvsplice_{name}_loss"] = validation_loss(model, blocks.validation)
        found[f"kvsplice_{name}_mse"] = _mean_error(geometry)
    return found


def _mean_error(geometry: ModelGeometry) -> float:
    """Squared error of a number on vectors that were held out, mean over layers."""
    return sum(report.spline for report in geometry.reports.values()) / len(geometry)
