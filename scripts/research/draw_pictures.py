#!/usr/bin/env python
"""Draws the pictures of the README into docs/images, from the figures kept in docs/data. Nothing is measured.

    python scripts/research/draw_pictures.py
    python scripts/research/draw_pictures.py --output /tmp/pictures

The last line of stdout is one JSON object.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

from kvsplice_hf.bench.command_line import ProgramParser


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.patches import FancyBboxPatch  # noqa: E402


DATA = Path(__file__).resolve().parents[2] / "docs" / "data"
OURS = "ours"
TEXTS = {"speeches": "speeches", "python_documentation": "Python documentation"}
BLUE, ORANGE, GREY, PALE = "#1f5fa8", "#d9822b", "#7a7f87", "#eef2f7"


@dataclass
class Arguments:
    """Pictures of the README, from the figures in docs/data."""

    data: str = field(default=str(DATA), metadata={"help": "folder of the figures"})
    output: str = field(default=str(DATA.parent / "images"), metadata={"help": "folder for the pictures"})


def by_name(rows: Iterable[dict[str, Any]], name: str) -> dict[str, list[dict[str, Any]]]:
    """The rows by their value of `name`, in the order in which values first occur."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row[name], []).append(row)
    return groups


def draw_perplexity(data: dict[str, Any]) -> Any:
    """Perplexity loss against the bytes of a cached row, one panel per text."""
    figure, panels = plt.subplots(1, len(TEXTS), figsize=(11, 5.2), sharey=True, layout="constrained")
    rivals = by_name(data["rows"], "family")
    ours = rivals.pop(OURS)
    for axes, (text, title) in zip(panels, TEXTS.items(), strict=True):
        for (family, rows), marker in zip(rivals.items(), "osDv^<>PhXd", strict=False):
            points = [(row["row_bytes"], row[f"{text}_percent"]) for row in rows]
            axes.plot(*zip(*points, strict=True), marker, markersize=6, alpha=0.75, label=family)
        axes.errorbar(
            [row["row_bytes"] for row in ours],
            [row[f"{text}_percent"] for row in ours],
            yerr=[row[f"{text}_error"] for row in ours],
            fmt="-*",
            color="black",
            markersize=11,
            capsize=3,
            label="kvsplice_hf",
        )
        axes.set(xlabel="bytes of a cached row, per token and layer", title=title, yscale="log")
        axes.axvline(data["stock_row_bytes"], color=GREY, linestyle="--", linewidth=1)
        axes.text(data["stock_row_bytes"] - 8, 250, "stock bf16", rotation=90, color=GREY, ha="right", va="top")
        axes.set_yticks([0.01, 0.1, 1, 10, 100], ["0.01 %", "0.1 %", "1 %", "10 %", "100 %"])
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("increase of perplexity")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    figure.suptitle("SmolLM2-135M as MLA, without training: lower and further left is better")
    return figure


def draw_decode(data: dict[str, Any]) -> Any:
    """Time of a decode step against the tokens in the cache, one line per recipe."""
    figure, axes = plt.subplots(figsize=(8, 4.4), layout="constrained")
    styles = {
        "stock": (GREY, "o-"),
        "full rank": (ORANGE, "s--"),
        "r = R/2": ("#5a9e6f", "D--"),
        "packed": (BLUE, "*-"),
    }
    for recipe, rows in by_name(data["rows"], "recipe").items():
        colour, style = styles[recipe]
        middle = [row["step_ms"] for row in rows]
        below = [row["step_ms"] - row["lowest_ms"] for row in rows]
        above = [row["highest_ms"] - row["step_ms"] for row in rows]
        label = "packed, a quarter of the bf16 bytes" if recipe == "packed" else recipe
        places = [row["context"] for row in rows]
        axes.errorbar(places, middle, yerr=[below, above], fmt=style, color=colour, capsize=3, label=label)
    contexts = sorted({row["context"] for row in data["rows"]})
    axes.set(xscale="log", yscale="log", xlabel="tokens in the cache", ylabel="decode step, ms")
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axes.set_yticks([100, 200, 500, 1000, 2000], ["100", "200", "500", "1000", "2000"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set_title("DeepSeek-V2-Lite shape, 4 layers, fp32, 2 CPU cores")
    return figure


def _box(axes: Any, left: float, bottom: float, width: float, text: str, colour: str, height: float = 1.5) -> None:
    box = FancyBboxPatch(
        (left, bottom),
        width,
        height,
        boxstyle="round,pad=0.02,rounding_size=0.12",
        facecolor=PALE,
        edgecolor=colour,
        linewidth=1.6,
    )
    axes.add_patch(box)
    axes.text(left + width / 2, bottom + height / 2, text, ha="center", va="center", fontsize=9)


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": GREY, "linewidth": 1.4})


def draw_overview() -> Any:
    """What a layer stores and reads, in stock transformers and with the splice."""
    figure, axes = plt.subplots(figsize=(10, 3.8), layout="constrained")
    axes.set(xlim=(0, 16), ylim=(0.4, 6.4))
    axes.axis("off")
    stages = [(2.9, "encode a new token"), (7.0, "KV cache, per token and layer"), (12.4, "decode step")]
    for left, title in stages:
        axes.text(left, 6.15, title, fontsize=10, fontweight="bold")
    _box(axes, 0.1, 2.3, 2.2, "latent c\n(R dimensions)\n+ rotated key\n(P dimensions)", GREY, height=1.9)
    _box(axes, 6.9, 4.2, 4.2, "stock: [ c | k_rot ]\nR + P values in bf16", GREY)
    _box(
        axes, 12.2, 4.2, 3.7, "kv_b_proj expands all S tokens\ninto keys and values of all heads,\nthen attention", GREY
    )
    _box(axes, 2.8, 0.7, 3.5, "splice: project onto a\ncalibrated basis, quantise\n(0 to 16 bits per coordinate)", BLUE)
    _box(
        axes,
        6.9,
        0.7,
        4.2,
        "spliced: [ code | k_rot ] packed\na quarter of the bytes by default;\nfirst 4 tokens of a sequence exact",
        BLUE,
    )
    _box(
        axes,
        12.2,
        0.7,
        3.7,
        "queries are projected into the\nspace of the codes; attention\nreads codes, nothing is expanded",
        BLUE,
    )
    _arrow(axes, (2.35, 3.6), (6.85, 4.95))
    _arrow(axes, (2.35, 2.6), (2.9, 2.3))
    _arrow(axes, (6.35, 1.45), (6.85, 1.45))
    _arrow(axes, (11.15, 1.45), (12.15, 1.45))
    _arrow(axes, (11.15, 4.95), (12.15, 4.95))
    axes.text(0.1, 5.2, "stock transformers", fontsize=10, color=GREY)
    axes.text(0.1, 1.35, "patched with\nkvsplice_hf", fontsize=10, color=BLUE)
    return figure


def save(figure: Any, path: Path) -> str:
    # The same figures give the same file: ids from a fixed salt, and no date.
    with matplotlib.rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return str(path)


def main() -> None:
    (args,) = ProgramParser(Arguments).parse_args_into_dataclasses()
    data, output = Path(args.data), Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    pictures = {"how_it_works": draw_overview()}
    for name, draw in (("perplexity_against_bytes", draw_perplexity), ("decode_against_context", draw_decode)):
        pictures[name] = draw(json.loads((data / f"{name}.json").read_text(encoding="utf-8")))
    print(json.dumps({"pictures": [save(figure, output / f"{name}.svg") for name, figure in pictures.items()]}))


if __name__ == "__main__":
    main()
