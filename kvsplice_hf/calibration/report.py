"""`CalibrationReport`: what a fit chose, as figures and as a picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvsplice_hf.calibration.fit import LayerFit
from kvsplice_hf.calibration.solve import LayerSolution
from kvsplice_hf.code.codec import RowCodec
from kvsplice_hf.code.heads import PartKey


@dataclass
class CalibrationReport:
    """What a fit chose, layer by layer.

    Attributes:
        layers: cache layer indices, or layers and key heads.
        ranks: spliced rank r of each.
        row_bytes: bytes of a stored row of each (where rows are not packed, in bf16).
        predicted_loss: nats per token of each, by the metric.
        spectra: cost of dropping each coordinate (descending, those of keys last), nats per token, a tensor per layer.
        widths: bits per coordinate `[code | key]`, one tensor per layer; empty where rows have no widths.
    """

    layers: list[PartKey]
    ranks: list[int]
    row_bytes: list[int]
    predicted_loss: list[float]
    spectra: list[torch.Tensor]
    widths: list[torch.Tensor]

    @property
    def mean_row_bytes(self) -> float:
        return sum(self.row_bytes) / len(self.row_bytes)

    def summary(self) -> dict[str, Any]:
        """The figures as JSON-ready values."""
        return {
            "layers": self.layers,
            "ranks": self.ranks,
            "row_bytes": self.row_bytes,
            "mean_row_bytes": self.mean_row_bytes,
            "predicted_loss_nats": self.predicted_loss,
            "mean_bits": [float(widths.float().mean()) if len(widths) else None for widths in self.widths],
        }

    def draw(self, path: str | Path) -> None:
        """Spectra, bytes and predicted loss per layer, as a PNG. Needs matplotlib."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 3.6), layout="constrained")
        spectrum, size, loss = figure.subplots(1, 3)
        for layer_idx, values in zip(self.layers, self.spectra, strict=True):
            spectrum.plot(values.clamp(min=1e-12), linewidth=0.7, label=str(layer_idx))
        spectrum.set(yscale="log", title="cost of dropping a coordinate", xlabel="coordinate", ylabel="nats per token")
        size.bar([str(layer) for layer in self.layers], self.row_bytes)
        size.set(title="bytes per token", xlabel="layer")
        loss.bar([str(layer) for layer in self.layers], self.predicted_loss)
        loss.set(title="predicted loss", xlabel="layer", ylabel="nats per token")
        for axes in (size, loss):
            axes.tick_params(axis="x", labelsize=6, rotation=90)
        figure.savefig(path, dpi=120)


def report_of(
    chosen: Sequence[PartKey], solutions: Sequence[LayerSolution], fits: Sequence[LayerFit]
) -> CalibrationReport:
    """What was chosen for each part."""
    empty = torch.zeros(0, dtype=torch.uint8, device="cpu")
    in_bf16 = [2 * (fit.rank + solution.rope_dim) for fit, solution in zip(fits, solutions, strict=True)]
    return CalibrationReport(
        layers=list(chosen),
        ranks=[fit.rank for fit in fits],
        row_bytes=[fit.codec.row_bytes if fit.codec else size for fit, size in zip(fits, in_bf16, strict=True)],
        predicted_loss=[fit.predicted_loss for fit in fits],
        spectra=[solution.cost for solution in solutions],
        widths=[fit.codec.widths if isinstance(fit.codec, RowCodec) else empty for fit in fits],
    )
