"""The figures of an ablation's report."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure


def _colours(names: Iterable[str]) -> dict[str, Any]:
    palette = matplotlib.colormaps["tab20"]
    return {name: palette(index % 20) for index, name in enumerate(names)}


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    return path


def draw_curves(records: list[dict[str, Any]], arms: list[str], path: Path) -> Path | None:
    """Validation loss against tokens and against seconds of training, a line per run; None without any history."""
    records = [record for record in records if record.get("history")]
    if not records:
        return None
    colours = _colours(arms)
    figure = Figure(figsize=(13, 5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, name in zip(panels, ("tokens", "seconds"), strict=True):
        labelled: set[str] = set()
        for record in sorted(records, key=lambda record: arms.index(record["arm"])):
            arm = record["arm"]
            points = [(row[name], row["validation_loss"]) for row in record["history"] if "validation_loss" in row]
            label = None if arm in labelled else arm
            axes.plot(*zip(*points, strict=True), color=colours[arm], linewidth=1, label=label)
            labelled.add(arm)
        axes.set(xlabel=f"{name} of training", title=f"Validation loss against {name}")
    panels[0].set_ylabel("nats per token")
    # The beginning, where all fall alike, would take up the scale.
    last = [record["validation_loss"] for record in records]
    panels[0].set_ylim(min(last) - 0.1 * (max(last) - min(last)) - 0.02, max(last) + 0.6)
    panels[1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return _save(figure, path)


def draw_losses(rows: list[dict[str, Any]], control: str | None, path: Path) -> Path:
    """Final loss of each arm with its interval, and that of the control as a line."""
    figure = Figure(figsize=(9, 1.5 + 0.35 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(reversed(rows)):
        axes.errorbar(row["loss"], place, xerr=row["loss_interval"], fmt="o", capsize=4, color="tab:blue")
        axes.plot(row["losses"], [place] * len(row["losses"]), "|", color="grey", markersize=10)
    axes.set_yticks(range(len(rows)), [row["arm"] for row in reversed(rows)])
    for row in rows:
        if row["arm"] == control:
            axes.axvline(row["loss"], linestyle="--", color="grey", label=f"control: {control}")
            axes.legend()
    axes.set(xlabel="validation loss, nats per token; bars: 95 % interval, strokes: seeds", title="Final loss")
    axes.grid(axis="x", alpha=0.3)
    return _save(figure, path)


def draw_quality_against_bytes(rows: list[dict[str, Any]], path: Path) -> Path:
    """Final loss against the bytes of the cache, one point per arm."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    colours = _colours(row["arm"] for row in rows)
    for row in rows:
        axes.errorbar(
            row["cache_bytes_per_token"],
            row["loss"],
            yerr=row["loss_interval"],
            fmt="s" if row["after"] else "o",
            capsize=3,
            color=colours[row["arm"]],
            label=row["arm"],
        )
    axes.set(
        xlabel="cache bytes per token, all layers, bf16",
        ylabel="validation loss, nats per token",
        title="Quality against cache bytes (squares: spliced or converted after training)",
        xscale="log",
    )
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    axes.grid(alpha=0.3)
    return _save(figure, path)


def draw_speed(speeds: dict[str, dict[str, float]], path: Path) -> Path:
    """Tokens per second of training, by arm and machine."""
    machines = sorted({machine for by_machine in speeds.values() for machine in by_machine})
    height = 0.8 / len(machines)
    figure = Figure(figsize=(9, 1.5 + 0.4 * len(speeds)), layout="constrained")
    axes = figure.subplots()
    for index, machine in enumerate(machines):
        places = [place + (index - (len(machines) - 1) / 2) * height for place in range(len(speeds))]
        values = [by_machine.get(machine, math.nan) for by_machine in speeds.values()]  # no bar where none was measured
        axes.barh(places, values, height, label=machine)
    axes.set_yticks(range(len(speeds)), list(speeds))
    axes.invert_yaxis()
    axes.set(xlabel="tokens per second of training, median over seeds", title="Training speed")
    axes.legend(fontsize="small")
    return _save(figure, path)
