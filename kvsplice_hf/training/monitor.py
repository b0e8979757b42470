"""What is reported while the splice trains: size and spread of scale and shift, as numbers and as histograms."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import TrainerCallback

from kvsplice_hf.code.projection import LearnedKVSplice
from kvsplice_hf.training.parameters import splices_of, statistics_of
from kvsplice_hf.weights.sharding import whole


def _transforms(splice: LearnedKVSplice) -> dict[str, torch.Tensor]:
    return {"scale": F.softplus(whole(splice.transform_scale).float()), "shift": whole(splice.transform_shift)}


def splice_metrics(model: nn.Module) -> dict[str, float]:
    """`kvsplice/scale_mean`, `_std`, `_min`, `_max`, the same of `shift`, and means by layer.

    The scale is the one in use, after the softplus.

    Raises:
        PatchStateError: the model is not patched.
    """
    by_layer = {layer: _transforms(splice) for layer, splice in splices_of(model).items()}
    metrics: dict[str, float] = {}
    for name in ("scale", "shift"):
        values = torch.cat([transforms[name].float().cpu() for transforms in by_layer.values()])
        metrics |= {f"kvsplice/{name}_{statistic}": value for statistic, value in statistics_of(values).items()}
        for layer, transforms in by_layer.items():
            metrics[f"kvsplice/layer_{layer}/{name}_mean"] = transforms[name].float().mean().item()
            metrics[f"kvsplice/layer_{layer}/{name}_std"] = transforms[name].float().std(correction=0).item()
    return metrics


class HistogramCallback(TrainerCallback):
    """Histograms of scale and shift of each layer, wherever the `Trainer` reports to (TensorBoard, W&B).

    Args:
        others: the callbacks of the `Trainer`, among them the one that writes for TensorBoard, if there is.
    """

    def __init__(self, others: list[TrainerCallback]) -> None:
        self._others = others

    def on_log(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if model is None:
            return
        by_layer = {layer: _transforms(splice) for layer, splice in splices_of(model).items()}
        if not state.is_world_process_zero:
            return
        writers = [writer for other in self._others if (writer := getattr(other, "tb_writer", None)) is not None]
        wandb = _wandb() if "wandb" in args.report_to else None
        if not writers and wandb is None:
            return
        for layer, transforms in by_layer.items():
            for name, values in transforms.items():
                tag, values = f"kvsplice/layer_{layer}/{name}", values.float().cpu()
                for writer in writers:
                    writer.add_histogram(tag, values, state.global_step)
                if wandb is not None:
                    wandb.log({tag: wandb.Histogram(values.numpy())}, commit=False)


def _wandb() -> Any:
    """The module, where it is installed and a run is open."""
    try:
        import wandb
    except ImportError:
        return None
    return wandb if wandb.run is not None else None
