#!/usr/bin/env python
"""Fisher information layer by layer, and whether it tells what compressing a layer costs.

For each layer: the spectrum of the Fisher information of its attention probabilities (mean over heads) and of its
latents, or of the values of its key heads; the loss that calibration predicts; and the divergence that is measured with
that layer alone compressed. Rank correlations over layers say which of them predicts it. Then n layers are compressed,
chosen by calibration (`layers="fisher:n"`), as the last n, and as those that cost least when measured, beside all
layers at the same bytes. The last line of stdout is one JSON object.

    python scripts/analyze_fisher.py --model smollm2 --statistics statistics.safetensors --choices 8 15 22
    python scripts/analyze_fisher.py --model results/nano/tokens/MLA-48/seed-0 --window 256 --compression 24
"""

import statistics as means
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.table import Table

from kvsplice_hf import ConfigError, KVSpliceCalibrator, KVSpliceConfig
from kvsplice_hf.bench.command_line import (
    DEMO,
    Calibration,
    ProgramParser,
    calibrate,
    console,
    environment,
    finish,
    load_model,
    readable_errors,
    results_folder,
)
from kvsplice_hf.bench.fisher import (
    TOP,
    LayerCosts,
    attention_fisher,
    latent_fisher,
    rank_correlation,
    spectrum_of,
)
from kvsplice_hf.bench.texts import spread_windows
from kvsplice_hf.code.heads import layer_of


# What is held against the measured cost of a layer.
PREDICTORS = {
    "predicted_loss": "loss that calibration predicts",
    "latent_trace": "trace of the Fisher information of the latents",
    "latent_top_share": f"share of its top {TOP} directions",
    "latent_effective_rank": "its effective rank",
    "attention_trace": "trace of the Fisher information of attention",
    "attention_top_share": f"share of its top {TOP} directions (attention)",
    "attention_effective_rank": "its effective rank (attention)",
}


@dataclass
class Arguments(Calibration):
    """Fisher information layer by layer."""

    model: str = field(default=DEMO, metadata={"help": 'folder, hub name, "demo" (SmolLM2 as MLA) or "smollm2"'})
    texts: list[str] = field(default_factory=lambda: ["pydoc"], metadata={"help": "text to measure on"})
    window: int = field(default=512, metadata={"help": "tokens of a window"})
    windows: int = field(default=2, metadata={"help": "windows of each text"})
    compression: float = field(default=16.0, metadata={"help": "how many times smaller a compressed layer is"})
    choices: list[int] = field(default_factory=list, metadata={"help": "how many layers to compress; half of them"})
    dtype: str = field(default="float32", metadata={"help": "dtype of the model"})
    output: str = field(default="results", metadata={"help": "folder for the results"})


def check(args: Arguments, layers: int | None = None) -> None:
    """Raises ConfigError for settings that no model, or not this one, could run with."""
    for name, least in (("windows", 1), ("window", 2)):
        if getattr(args, name) < least:
            raise ConfigError(f"--{name} is {getattr(args, name)}; it must be at least {least}.")
    if args.calibration in ("none", "auto") and (args.statistics is None or not Path(args.statistics).exists()):
        raise ConfigError(
            f"--calibration is {args.calibration}, and there are no --statistics; the Fisher information of latents "
            "comes from them. Give a text, or a file of KVSpliceCalibrator.save."
        )
    for count in args.choices:
        if count < 1 or (layers is not None and count > layers):
            most = "the layers of the model" if layers is None else f"the {layers} layers of {args.model}"
            raise ConfigError(f"--choices has {count}; it takes from 1 to {most}.")


def rows_of(model: Any, calibrator: KVSpliceCalibrator, windows: torch.Tensor, costs: LayerCosts) -> list[dict]:
    """The figures of each layer, by ascending cache layer index; those of heads beside their mean."""
    attention, latents = attention_fisher(model, windows), latent_fisher(calibrator)
    one_layer = costs.one_by_one()
    rows = []
    for layer in costs.layers:
        heads = [spectrum_of(head) for head in attention[layer]]
        parts = [spectrum_of(matrix) for part, matrix in latents.items() if layer_of(part) == layer]
        rows.append(
            {
                "layer": layer,
                "attention_trace": means.fmean(head.trace for head in heads),
                "attention_top_share": means.fmean(head.top_share for head in heads),
                "attention_effective_rank": means.fmean(head.effective_rank for head in heads),
                "latent_trace": sum(part.trace for part in parts),
                "latent_top_share": means.fmean(part.top_share for part in parts),
                "latent_effective_rank": means.fmean(part.effective_rank for part in parts),
                "latent_dimension": parts[0].dimension,
                "predicted_loss": one_layer.predicted[layer],
                "measured_kl": one_layer.measured[layer],
                "attention_heads": [head._asdict() for head in heads],
                "latent_heads": [part._asdict() for part in parts],
            }
        )
    return rows


def correlations(rows: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Of each predictor with the measured cost, over layers."""
    cost = [row["measured_kl"] for row in rows]
    return {name: rank_correlation([row[name] for row in rows], cost)._asdict() for name in PREDICTORS}


def choices(rows: list[dict[str, Any]], counts: list[int], costs: LayerCosts) -> list[dict[str, Any]]:
    """Divergence with n layers compressed, chosen in three ways, and with all layers at the same bytes."""

    def least(figure: str, count: int) -> list[int]:
        ranked = sorted(rows, key=lambda row: row[figure])
        return sorted(row["layer"] for row in ranked[:count])

    found = []
    for count in counts:
        chosen = {
            f"fisher:{count}": least("predicted_loss", count),
            f"last:{count}": costs.layers[-count:],
            f"measured:{count}": least("measured_kl", count),
        }
        size = costs.bytes_with(costs.layers[-count:])
        for name, layers in chosen.items():
            found.append({"layers": name, "bytes": size, "kl_nats": costs.of(layers), "chosen": layers})
        whole = replace(costs.config, compression=None, bytes_per_token=size)
        kl = costs.of(costs.layers, whole)
        found.append({"layers": "all, water-filling", "bytes": size, "kl_nats": kl, "chosen": costs.layers})
    return found


def tables_of(rows: list[dict[str, Any]], found: dict[str, Any], chosen: list[dict[str, Any]]) -> list[Table]:
    by_layer = Table("layer", "attention: trace", f"top {TOP}", "eff. rank", "latent: trace", f"top {TOP}", "eff. rank")
    by_layer.add_column("predicted (nats)")
    by_layer.add_column("measured KL")
    for row in rows:
        figures = [f"{row['attention_trace']:.3f}", f"{row['attention_top_share']:.3f}"]
        figures += [f"{row['attention_effective_rank']:.1f}", f"{row['latent_trace']:.3g}"]
        figures += [f"{row['latent_top_share']:.3f}", f"{row['latent_effective_rank']:.1f}"]
        figures += [f"{row['predicted_loss']:.3g}", f"{row['measured_kl']:.3g}"]
        by_layer.add_row(str(row["layer"]), *figures)
    ranks = Table("against the measured cost of a layer", "Spearman's rho", "p", title=f"{len(rows)} layers")
    for name, title in PREDICTORS.items():
        rho, p_value = found[name]["rho"], found[name]["p_value"]
        ranks.add_row(title, *("all the same" if x is None else f"{x:.2g}" for x in (rho, p_value)))
    kinds = Table("layers", "bytes per token and layer", "KL (nats)")
    for row in chosen:
        kinds.add_row(row["layers"], f"{row['bytes']:.1f}", f"{row['kl_nats']:.3g}")
    return [by_layer, ranks, kinds]


def draw(rows: list[dict[str, Any]], chosen: list[dict[str, Any]], path: Path) -> None:
    """Shares of the top directions by layer, predicted against measured cost, and the choices of layers."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    shares, cost, kinds = figure.subplots(1, 3)
    index = [row["layer"] for row in rows]
    for name, label in (("attention_top_share", "attention"), ("latent_top_share", "latents")):
        shares.plot(index, [row[name] for row in rows], marker=".", label=label)
    shares.set(xlabel="layer", ylabel=f"share of the trace in the top {TOP} directions", ylim=(0, 1.02))
    shares.legend()
    cost.scatter([row["predicted_loss"] for row in rows], [row["measured_kl"] for row in rows], s=12)
    for row in rows:
        cost.annotate(str(row["layer"]), (row["predicted_loss"], row["measured_kl"]), fontsize=7)
    cost.set(xlabel="predicted loss of one layer (nats)", ylabel="measured KL (nats)", xscale="log", yscale="log")
    for way in ("fisher", "last", "measured", "all"):
        of_way = [row for row in chosen if row["layers"].startswith(way)]
        kinds.plot([row["bytes"] for row in of_way], [row["kl_nats"] for row in of_way], marker="o", label=way)
    kinds.set(xlabel="bytes per token and layer", ylabel="KL (nats)", yscale="log")
    kinds.legend()
    figure.savefig(path, dpi=120)


def run(args: Arguments) -> dict[str, Any]:
    check(args)
    model, tokenizer = load_model(args.model, args.dtype)
    config = KVSpliceConfig(compression=args.compression)
    count = args.windows * args.window
    windows = torch.cat([spread_windows(tokenizer, text, "evaluation", args.window, count) for text in args.texts])
    calibrator = calibrate(model, tokenizer, args)
    costs = LayerCosts(model, calibrator, config, windows)
    check(args, len(costs.layers))
    rows = rows_of(model, calibrator, windows, costs)
    chosen = choices(rows, args.choices or [max(1, len(rows) // 2)], costs)
    return {"layers": rows, "rank_correlations": correlations(rows), "choices": chosen, "windows": len(windows)}


def main() -> None:
    (args,) = ProgramParser(Arguments, description=__doc__.split("\n")[0]).parse_args_into_dataclasses()
    with readable_errors():
        report = run(args)
    folder = results_folder(args.output, "fisher")
    draw(report["layers"], report["choices"], folder / "fisher.png")
    for table in tables_of(report["layers"], report["rank_correlations"], report["choices"]):
        console().print(table)
    finish(report | environment(args), folder)


if __name__ == "__main__":
    main()
