#!/usr/bin/env python
"""The Triton kernels on a GPU: whether they agree with PyTorch, and at which speed they read rows.

Correctness is checked at the shapes of published models, the same at which `kernel_resources.py` compiles the kernels,
also on packed rows whose keys were coded before their rotation ("coded keys"), on rows in pages as an engine has them
("in pages"), and on those of all key heads of a layer with ordinary attention ("heads").
Speed is that of a decode step's attention over a short and a long cache, beside the speed of a copy on this device; for
some shapes also with blocks other than the chosen ones. It ends with an error where a kernel disagrees. The tables are
Markdown, on stderr and in the folder of the results. The last line of stdout is one JSON object.

    python scripts/measure/gpu_kernels.py
    python scripts/measure/gpu_kernels.py --geometries v3 --dtypes bfloat16
    TRITON_INTERPRET=1 python scripts/measure/gpu_kernels.py --dry_run   # tiny shapes in the interpreter, no GPU
"""

import itertools
import sys
from dataclasses import dataclass, field
from importlib.metadata import version

import torch
from tqdm import tqdm

from kvsplice_hf.bench.bandwidth import copy_bandwidth
from kvsplice_hf.bench.command_line import (
    ProgramParser,
    environment,
    finish,
    readable_errors,
    require_known,
    results_folder,
)
from kvsplice_hf.bench.kernels.device import (
    Row,
    agreement_of,
    bandwidth_of,
    bandwidth_of_heads,
    describe,
    interpreted,
)
from kvsplice_hf.bench.kernels.head_shapes import HEAD_KINDS, PUBLISHED_HEADS, HeadCase, head_cases
from kvsplice_hf.bench.kernels.shapes import DTYPES, KINDS, LONG_CONTEXT, ROWS, TINY, Case, cases, published
from kvsplice_hf.bench.tables import NOT_MEASURED
from kvsplice_hf.errors import UnsupportedError


# Rows and megabytes of a dry run.
_FEW = 40
# Blocks are compared where rows are widest.
_COMPARED = ("v2-lite", "v3")


@dataclass
class Arguments:
    """The Triton kernels on a GPU: agreement with PyTorch, and speed."""

    geometries: list[str] = field(default_factory=lambda: list(published()), metadata={"help": ", ".join(published())})
    head_geometries: list[str] = field(
        default_factory=lambda: list(PUBLISHED_HEADS),
        metadata={"help": f"layers with ordinary attention: {', '.join(PUBLISHED_HEADS)}"},
    )
    dtypes: list[str] = field(default_factory=lambda: list(DTYPES), metadata={"help": ", ".join(DTYPES)})
    bandwidth_mb: int = field(default=512, metadata={"help": "size of the tensor whose copying gives the bandwidth"})
    dry_run: bool = field(default=False, metadata={"help": "tiny shapes in the interpreter: its figures mean nothing"})
    output: str = field(default="results", metadata={"help": "folder for the results"})

    def __post_init__(self) -> None:
        require_known("geometries", self.geometries, published())
        require_known("head_geometries", self.head_geometries, PUBLISHED_HEADS)
        require_known("dtypes", self.dtypes, DTYPES)
        if self.dry_run:
            self.geometries, self.head_geometries, self.bandwidth_mb = [TINY], [TINY], 1
            if not interpreted():
                raise UnsupportedError("--dry_run needs the interpreter of triton: set TRITON_INTERPRET=1.")
        elif not torch.cuda.is_available():
            raise UnsupportedError(f"torch {torch.__version__} finds no CUDA or ROCm device here; see --dry_run.")
        elif interpreted():
            raise UnsupportedError("TRITON_INTERPRET is set, so nothing would run on the GPU. Unset it.")

    @property
    def device(self) -> str:
        return "cpu" if self.dry_run else "cuda"


def check_all(args: Arguments) -> list[Row]:
    """A row per case of correctness."""
    rows = _FEW if args.dry_run else ROWS
    # Merging is part of attention with more than one split.
    every = itertools.chain(cases(args.geometries, rows), head_cases(args.head_geometries, rows))
    chosen = [case for case in every if case.kernel != "merge" and case.dtype in args.dtypes]
    return [agreement_of(case, args.device) for case in tqdm(chosen, desc="checking", file=sys.stderr)]


def time_all(args: Arguments, copy: float) -> list[Row]:
    """A row per case of speed and choice of blocks."""
    contexts = (_FEW,) if args.dry_run else (ROWS, LONG_CONTEXT)
    dtypes = [dtype for dtype in args.dtypes if dtype != "float16"] or args.dtypes  # it costs what bfloat16 costs
    found = []
    for name, kind, dtype, count in tqdm(
        list(itertools.product(args.geometries, KINDS, dtypes, contexts)), desc="timing", file=sys.stderr
    ):
        compared = args.dry_run or (name in _COMPARED and count == max(contexts) and dtype != "float32")
        case = Case("attend", name, kind, dtype, "decode", rows=count)
        found += bandwidth_of(case, args.device, copy, compared)
        found += bandwidth_of(case._replace(paged=True), args.device, copy)
    of_heads = list(itertools.product(args.head_geometries, HEAD_KINDS, dtypes, contexts))
    for name, kind, dtype, count in tqdm(of_heads, desc="timing all heads", file=sys.stderr):
        found += bandwidth_of_heads(HeadCase(name, kind, dtype, rows=count), args.device, copy)
    return found


def markdown_of(checks: list[Row], timings: list[Row]) -> str:
    """Both as Markdown."""
    lines = ["| kernel | model | rows | dtype | queries | bias | off | allowed | agrees |", "|" + "---|" * 9]
    for row in checks:
        cells = [
            row["kernel"],
            row["geometry"],
            row["kind"],
            row["dtype"],
            row["phase"] + _in_pages(row),
            "yes" if row["biased"] else "no",
        ]
        cells += [f"{row['off']:.1e}", f"{row['allowed']:.0e}", "yes" if row["agrees"] else "NO"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| model | rows | dtype | S | blocks | GB/s | of a copy |", "|" + "---|" * 7]
    for row in timings:
        cells = [row["geometry"], row["kind"] + _in_pages(row), row["dtype"], str(row["rows"]), row["blocks"]]
        if "skipped" in row:
            cells += [row["skipped"], NOT_MEASURED]
        else:
            cells += [f"{row['bytes_per_second'] / 1e9:.1f}", f"{row['of_copy']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _in_pages(row: Row) -> str:
    return ", in pages" if row.get("paged") else ""


def main() -> None:
    with readable_errors():
        (args,) = ProgramParser(Arguments).parse_args_into_dataclasses()
    copy = copy_bandwidth(args.bandwidth_mb, args.device)
    checks = check_all(args)
    timings = time_all(args, copy)
    copy = max(copy, copy_bandwidth(args.bandwidth_mb, args.device))
    folder = results_folder(args.output, "gpu-kernels")
    text = markdown_of(checks, timings)
    (folder / "table.md").write_text(text, encoding="utf-8")
    print(text, file=sys.stderr)
    where = environment(args)
    where["versions"]["triton"] = version("triton")
    report = {"device": describe(args.device), "copy_gb_s": copy / 1e9, "checks": checks, "timings": timings}
    finish({**report, **where}, folder)
    wrong = [row for row in checks if not row["agrees"]]
    if wrong:
        sys.exit(f"{len(wrong)} of {len(checks)} cases disagree with PyTorch: see {folder / 'table.md'}.")


if __name__ == "__main__":
    main()
