#!/usr/bin/env python
"""What the Triton kernels take of GPUs that are not here: shared memory, registers, and what found no register.

Every kernel is compiled for every target at the shapes of published models, with the blocks that would be chosen there.
Nothing is run, and no GPU is needed. It ends with an error where a kernel takes more than its limit. The table is
Markdown, on stderr and in the folder of the results. The last line of stdout is one JSON object.

    python scripts/measure/kernel_resources.py
    python scripts/measure/kernel_resources.py --targets sm_90 --geometries v3 --kernels attend --pages
"""

import itertools
import sys
from dataclasses import dataclass, field
from importlib.metadata import version

from tqdm import tqdm

from kvsplice_hf.bench.command_line import (
    ProgramParser,
    environment,
    finish,
    readable_errors,
    require_known,
    results_folder,
)
from kvsplice_hf.bench.kernels.head_shapes import HEAD_KERNEL, HEAD_KINDS, PUBLISHED_HEADS, head_cases
from kvsplice_hf.bench.kernels.resources import TARGETS, Row, compiled_anew, compiled_row, markdown_of
from kvsplice_hf.bench.kernels.shapes import DTYPES, KERNELS, KINDS, PREDICTED, cases, published


# Those that store a latent, and those with ordinary attention.
_GEOMETRIES = (*published(), *PUBLISHED_HEADS)
_KERNELS, _KINDS = (*KERNELS, HEAD_KERNEL), (*KINDS, *HEAD_KINDS)


@dataclass
class Arguments:
    """What the Triton kernels take of GPUs that are not here."""

    targets: list[str] = field(default_factory=lambda: list(TARGETS), metadata={"help": ", ".join(TARGETS)})
    kernels: list[str] = field(default_factory=lambda: list(_KERNELS), metadata={"help": ", ".join(_KERNELS)})
    geometries: list[str] = field(default_factory=lambda: list(_GEOMETRIES), metadata={"help": ", ".join(_GEOMETRIES)})
    # Of the others the limits of what is spilled are known; of these only those that the tests compile.
    kinds: list[str] = field(
        default_factory=lambda: [kind for kind in _KINDS if kind != PREDICTED], metadata={"help": ", ".join(_KINDS)}
    )
    dtypes: list[str] = field(default_factory=lambda: list(DTYPES), metadata={"help": ", ".join(DTYPES)})
    # As of the kind above: the limits are known of those that the tests compile.
    pages: bool = field(default=False, metadata={"help": "also rows in pages, as an engine has them"})
    output: str = field(default="results", metadata={"help": "folder for the results"})

    def __post_init__(self) -> None:
        known = {"targets": TARGETS, "kernels": _KERNELS, "geometries": _GEOMETRIES, "kinds": _KINDS, "dtypes": DTYPES}
        for option, names in known.items():
            require_known(option, getattr(self, option), names)


def compile_all(args: Arguments) -> list[Row]:
    """A row per case and target."""
    latents, heads = ([name for name in args.geometries if name in known] for known in (published(), PUBLISHED_HEADS))
    chosen = [
        case
        for case in itertools.chain(cases(latents), head_cases(heads))
        if case.kernel in args.kernels and case.kind in args.kinds and case.dtype in args.dtypes
        if args.pages or not getattr(case, "paged", False)
    ]
    pairs = list(itertools.product(args.targets, chosen))
    with compiled_anew():
        return [compiled_row(case, target) for target, case in tqdm(pairs, desc="compiling", file=sys.stderr)]


def main() -> None:
    with readable_errors():
        (args,) = ProgramParser(Arguments).parse_args_into_dataclasses()
        rows = compile_all(args)
    folder = results_folder(args.output, "kernel-resources")
    table = markdown_of(rows, args.targets)
    (folder / "table.md").write_text(table, encoding="utf-8")
    print(table, file=sys.stderr)
    where = environment(args)
    where["versions"]["triton"] = version("triton")
    finish({"rows": rows, **where}, folder)
    above = [f"{row['target']}, {row['kernel']}, {row['geometry']}, {row['kind']}" for row in rows if row["above"]]
    if above:
        sys.exit(f'{len(above)} cases take more than their limit; see "above" in the report. The first: {above[0]}')


if __name__ == "__main__":
    main()
