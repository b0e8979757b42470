"""What the kernels take of devices that are elsewhere, against what those have."""

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from kvsplice_hf.attend.triton.compilation import (
    KNOWN_SPILLS,
    SPILLED,
    TARGETS,
    Resources,
    compile_launch,
    limit_excesses,
    resources_of,
)
from kvsplice_hf.bench.kernels.head_shapes import HeadCase
from kvsplice_hf.bench.kernels.shapes import DTYPES, PACKED_KINDS, Case


Row = dict[str, Any]


@contextmanager
def compiled_anew() -> Iterator[None]:
    """Nothing that an earlier run has compiled is taken for what is compiled now."""
    with tempfile.TemporaryDirectory() as folder:
        before = os.environ.get("TRITON_CACHE_DIR")
        os.environ["TRITON_CACHE_DIR"] = folder
        try:
            yield
        finally:
            del os.environ["TRITON_CACHE_DIR"]
            if before is not None:
                os.environ["TRITON_CACHE_DIR"] = before


def compiled_row(case: Case | HeadCase, target: str) -> Row:
    """A case with its blocks, what it takes on a target, and which limits that is above."""
    launch = case.launch(TARGETS[target].limits)
    found = resources_of(compile_launch(launch, TARGETS[target]))
    settings = launch.settings
    sizes: Row = {
        name: settings[name] for name in ("BLOCK_M", "BLOCK_S", "num_warps", "num_stages") if name in settings
    }
    excesses = limit_excesses(found, target, spills_allowed(case, target))
    return {**case._asdict(), "target": target, "n": case.shape.row_dim, **sizes, **found._asdict(), "above": excesses}


def spills_allowed(case: Case | HeadCase, target: str) -> int:
    """Bytes of a thread that may be spilled."""
    rows = case.kind if case.kind in PACKED_KINDS else "unquantised"
    bits = torch.finfo(DTYPES[case.dtype]).bits
    if isinstance(case, HeadCase):
        return KNOWN_SPILLS.get((target, f"heads of {case.shape.row_dim // 2}", bits), SPILLED)
    if case.kernel != "attend":
        return SPILLED
    return KNOWN_SPILLS.get((target, rows + (", in pages" if case.paged else ""), bits), SPILLED)


def markdown_of(rows: Iterable[Row], targets: Sequence[str]) -> str:
    """Lines of kernels and shapes, columns of targets: kilobytes of shared memory / registers / spilled bytes.

    A line holds the most that any of its cases takes: dtypes of the same size, with and without a bias, and models with
    rows of the same size.
    """
    lines: dict[tuple[str, ...], dict[str, Resources]] = {}
    for row in rows:
        cells = lines.setdefault(_line_of(row), {})
        found = Resources(*(row[name] for name in Resources._fields))
        cells[row["target"]] = Resources(*map(max, found, cells.get(row["target"], found)))
    head = ["kernel", "rows", "n", "products", "queries", *targets]
    text = [head, ["---"] * len(head)]
    text += [[*line, *(_cell(cells.get(target)) for target in targets)] for line, cells in lines.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in text)


def _line_of(row: Row) -> tuple[str, ...]:
    bits = f"{torch.finfo(DTYPES[row['dtype']]).bits} bits"
    if row["kernel"] == "attend":
        return "attend", row["kind"], str(row["n"]), bits, row["phase"] + (", in pages" if row["paged"] else "")
    if row["kernel"] == "merge":
        return "merge", "any", "any", "32 bits", f"{row['rows']:,} rows"
    return row["kernel"], row["kind"], str(row["n"]), bits, row["phase"]


def _cell(found: Resources | None) -> str:
    if found is None:
        return "not compiled"
    return f"{found.shared_memory / 1024:.0f} / {found.registers} / {found.spilled}"
