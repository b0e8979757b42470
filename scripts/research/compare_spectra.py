#!/usr/bin/env python
"""How easy latents are to compress: spectra of calibration statistics of one or several models, side by side.

For each layer, the variances of the latent along its principal axes, and the costs of the coordinates of calibration
(variance times how much the model's predictions feel it). The faster they fall, the more a low rank or unequal widths
gain. The files are those of `KVSpliceCalibrator.save`. The last line of stdout is one JSON object.

    python scripts/research/compare_spectra.py smollm2.safetensors gpt2-mla.safetensors
"""

import statistics as means
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.table import Table

from kvsplice_hf import KVSpliceCalibrator
from kvsplice_hf.bench.command_line import (
    console,
    environment,
    finish,
    parse_with_positional,
    readable_errors,
    results_folder,
)
from kvsplice_hf.calibration.solve import solve_layer


SHARES = (1 / 8, 1 / 4, 1 / 2)
KINDS = {"pca": "variance", "fisher": "cost"}
# Coordinates below this share of the mean count as this much: numbers that never vary would gain without bound.
_FLOOR = 1e-6


@dataclass
class Arguments:
    """Spectra of calibration statistics."""

    files: list[str] = field(metadata={"help": "files of KVSpliceCalibrator.save, of metric fisher"})
    output: str = field(default="results", metadata={"help": "folder for the results"})


def spectra(calibrator: KVSpliceCalibrator, kind: str) -> list[torch.Tensor]:
    """For each layer, [R] in descending order with sum 1; `kind` is a metric of calibration."""
    found = []
    for layer in calibrator.statistics.values():
        solution = solve_layer(layer, kind)
        cost = solution.cost[: solution.latent_dim].sort(descending=True).values
        found.append(cost / cost.sum())
    return found


def measure(spectrum: torch.Tensor) -> dict[str, float]:
    """Figures of one spectrum [R] of sum 1.

    Returns:
        `top_...`: share of the sum that the largest coordinates hold. `effective_rank`: exp of the entropy, of R (Roy
        and Vetterli, EUSIPCO 2007). `gain_bits`: bits per number by which unequal widths beat equal ones at the same
        error, if none of them falls to zero: half the log of the arithmetic over the geometric mean (Jayant and
        Noll, Digital Coding of Waveforms, chapter 12).
    """
    size = len(spectrum)
    floored = spectrum.clamp_min(_FLOOR / size)
    return {
        **{f"top_{share:g}": spectrum[: round(share * size)].sum().item() for share in SHARES},
        "effective_rank": (-(spectrum * floored.log()).sum()).exp().item() / size,
        "gain_bits": 0.5 * (floored.mean().log2() - floored.log2().mean()).item(),
    }


def draw(curves: dict[str, list[torch.Tensor]], path: Path) -> None:
    """Mean over layers of the share that is lost with the last coordinates."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for name, layers in curves.items():
        lost = torch.stack([1 - layer.cumsum(0) for layer in layers]).mean(0).clamp_min(_FLOOR)
        axes.plot(torch.arange(1, len(lost) + 1) / len(lost), lost, label=name)
    axes.set(xlabel="coordinates kept, of R", ylabel="share of the rest", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    args = parse_with_positional(Arguments, "files", __doc__.split("\n")[0])
    rows: list[dict[str, Any]] = []
    curves: dict[str, list[torch.Tensor]] = {}
    with readable_errors():
        for path in args.files:
            calibrator = KVSpliceCalibrator.load(path)
            for kind, word in KINDS.items():
                layers = spectra(calibrator, kind)
                curves[f"{Path(path).stem}: {word}"] = layers
                figures = [measure(layer) for layer in layers]
                row = {name: means.fmean(figure[name] for figure in figures) for name in figures[0]}
                rows.append({"file": Path(path).stem, "of": word, "layers": len(layers), **row})
    folder = results_folder(args.output, "spectra")
    draw(curves, folder / "spectra.png")
    names = [f"top_{share:g}" for share in SHARES] + ["effective_rank", "gain_bits"]
    table = Table("latents", "of", "layers", *(name.replace("_", " ") for name in names))
    for row in rows:
        table.add_row(row["file"], row["of"], str(row["layers"]), *(f"{row[name]:.3f}" for name in names))
    console().print(table)
    finish({"rows": rows, **environment(args)}, folder)


if __name__ == "__main__":
    main()
