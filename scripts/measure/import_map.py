#!/usr/bin/env python
"""A map of the imports of the package: its rooms by floors, and which use which. Of this tree, or of any commit.

    python scripts/measure/import_map.py
    python scripts/measure/import_map.py --revision v0.1.0 --output docs/images/imports_before.svg

A module or sub-package directly in the package is one box. Its floor is the longest way down from it. The last line of
stdout is one JSON object: modules, boxes, floors, imports, and whether there is a circle.
"""

import io
import json
import subprocess
import sys
import tarfile
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import matplotlib

from kvsplice_hf.bench.command_line import ProgramParser, console, readable_errors


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


ROOT = Path(__file__).parent.parent.parent
PACKAGE = "kvsplice_hf"


@dataclass
class Arguments:
    """A map of the imports of the package."""

    revision: str | None = field(default=None, metadata={"help": "commit to draw; by default the files as they are"})
    output: str = field(default="docs/images/imports.svg", metadata={"help": "where the picture goes"})


def edges_of(folder: Path) -> tuple[int, dict[str, set[str]]]:
    """How many modules the package in `folder` has, and which box uses which."""
    imported = sys.modules.pop(PACKAGE)  # or the one in use would be found, whatever the folder
    sys.path.insert(0, str(folder))
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    sys.path.remove(str(folder))
    sys.modules[PACKAGE] = imported
    edges: dict[str, set[str]] = defaultdict(set)
    for module in graph.modules - {PACKAGE}:
        box = _box(module)
        edges[box] |= {_box(used) for used in graph.find_modules_directly_imported_by(module) - {PACKAGE}} - {box}
    return len(graph.modules), dict(edges)


def _box(module: str) -> str:
    return module.split(".")[1]


def floors_of(edges: dict[str, set[str]]) -> dict[str, int]:
    """The floor of each box: 0 for those that use no other one."""

    @cache
    def floor(box: str) -> int:
        return 1 + max(map(floor, edges.get(box, ())), default=-1)

    return {box: floor(box) for box in sorted(edges)}


def has_circle(edges: dict[str, set[str]]) -> bool:
    """Whether some box uses itself by way of others."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError:
        return True
    return False


def draw(edges: dict[str, set[str]], path: Path) -> None:
    """The picture: one row of boxes per floor, and a line for each import."""
    floors = floors_of(edges)
    rows: dict[int, list[str]] = defaultdict(list)
    for box, floor in floors.items():
        rows[floor].append(box)
    widest = max(map(len, rows.values()))
    places = {
        box: ((index + 0.5) * widest / len(row), floor) for floor, row in rows.items() for index, box in enumerate(row)
    }
    figure, axes = plt.subplots(figsize=(1.5 * widest + 1, 0.8 * len(rows) + 0.5))
    for box, used in edges.items():
        for other in used:
            (x, y), (to_x, to_y) = places[box], places[other]
            axes.plot([x, to_x], [y - 0.18, to_y + 0.18], color="tab:blue", alpha=0.35, linewidth=0.8, zorder=1)
    for box, (x, y) in places.items():
        axes.text(
            x, y, box, ha="center", va="center", fontsize=9, zorder=2, bbox={"boxstyle": "round", "facecolor": "white"}
        )
    axes.set(xlim=(0, widest), ylim=(-0.6, len(rows) - 0.4))
    axes.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def main() -> None:
    """Draw the map and print what it shows."""
    (args,) = ProgramParser(Arguments).parse_args_into_dataclasses()
    with tempfile.TemporaryDirectory() as folder:
        where = ROOT
        if args.revision is not None:
            packed = subprocess.run(
                ["git", "archive", args.revision, PACKAGE], cwd=ROOT, check=True, capture_output=True
            ).stdout
            with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
                archive.extractall(folder, filter="data")
            where = Path(folder)
        modules, edges = edges_of(where)
    circle = has_circle(edges)
    found = {"revision": args.revision, "modules": modules, "boxes": len(edges), "circle": circle}
    if not circle:
        found["floors"] = 1 + max(floors_of(edges).values())
        draw(edges, Path(args.output))
        console().print(f"Drawn: {args.output}")
    found["imports"] = sum(map(len, edges.values()))
    print(json.dumps(found))


if __name__ == "__main__":
    with readable_errors():
        main()
