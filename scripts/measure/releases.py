#!/usr/bin/env python
"""Run the contract tests on several releases of transformers, one row of a table per release.

    python scripts/measure/releases.py                       # the matrix
    python scripts/measure/releases.py 5.15.0 5.23.0         # some of it
    python scripts/measure/releases.py newest --tests all    # whatever the package index has today

Each release gets an environment of its own under `.releases/`, in which only transformers, and what it insists on, is
installed; everything else, torch above all, is that of the environment that runs this script. The contract: patch and
undo, the same numbers with and without a cache, every mode of `generate`, bytes, save and load, threads, and what is
checked of transformers itself. The exit status is 1 if any test failed or could not be run.
"""

import json
import os
import subprocess
import sys
import sysconfig
import time
import venv
from collections import Counter
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

from rich.console import Console
from rich.table import Table

from kvsplice_hf.bench.command_line import parse_with_positional
from kvsplice_hf.bench.tables import NOT_MEASURED


ROOT = Path(__file__).resolve().parent.parent.parent
# The oldest that is supported, the first whose sparse-attention models cache latents, two in between, the last two.
RELEASES = ["5.15.0", "5.18.0", "5.20.2", "5.22.2", "5.23.0", "5.24.0"]
CONTRACT = [
    "contract_models",
    "packed",
    "ordinary",
    "generate",
    "cache_layers",
    "sinks",
    "lifecycle",
    "checkpoint",
    "paged",
    "gpt2_mla",
    "errors",
    "upstream",
    "threads",
]


@dataclass
class Arguments:
    releases: list[str] = field(
        default_factory=lambda: list(RELEASES), metadata={"help": 'Releases of transformers; "newest" is allowed.'}
    )
    tests: list[str] = field(
        default_factory=lambda: list(CONTRACT),
        metadata={"help": 'Names of test files without "test_" and ".py"; "all" for every test.'},
    )
    workers: int = field(default=2, metadata={"help": "Processes that run tests."})
    folder: str = field(default=".releases", metadata={"help": "Where the environments are kept."})
    output: str = field(default="results/releases.json", metadata={"help": "Where the results are written."})


@dataclass
class Row:
    """What the tests said on one release."""

    release: str
    passed: int = 0
    failed: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    minutes: float = 0.0
    problem: str = ""

    @property
    def is_good(self) -> bool:
        return not self.failed and not self.problem and self.passed > 0


def environment(release: str, folder: Path) -> Path:
    """The interpreter of an environment with this release, made if it is not there.

    Raises:
        subprocess.CalledProcessError: the package index does not give it.
    """
    if release == version("transformers"):
        return Path(sys.executable)
    home = folder / release
    python = home / "bin" / "python"
    ready = home / ".ready"
    if release == "newest" or not ready.exists():
        venv.create(home, clear=True)
        packages = Path(sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)}))
        # Behind its own packages, those of this environment.
        # Paths in files of a shared folder are not followed: the package itself, installed in place, is named as well.
        (packages / "zz_shared.pth").write_text(f"{sysconfig.get_path('purelib')}\n{ROOT}\n", "utf-8")
        wanted = "transformers" if release == "newest" else f"transformers=={release}"
        options = ["--quiet", "--disable-pip-version-check", *(["--upgrade"] if release == "newest" else [])]
        subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", *options, wanted], check=True)
        ready.touch()
    return python


def run_tests(python: Path, arguments: Arguments, report: Path) -> int:
    files = [] if arguments.tests == ["all"] else [f"tests/test_{name}.py" for name in arguments.tests]
    command = [python, "-m", "pytest", "-n", str(arguments.workers), f"--junitxml={report}", *files]
    surroundings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=ROOT, check=False, env=surroundings).returncode


def read_report(row: Row, report: Path) -> None:
    """Count what the report of pytest holds."""
    skipped: Counter[str] = Counter()
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        skip = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            row.failed += 1
            row.failures.append(f"{case.get('classname')}::{case.get('name')}")
        elif skip is not None:
            skipped[skip.get("message", "")] += 1
        else:
            row.passed += 1
    row.skipped = dict(skipped.most_common())


def check(release: str, arguments: Arguments, folder: Path) -> Row:
    row, started = Row(release), time.monotonic()
    try:
        python = environment(release, folder)
    except subprocess.CalledProcessError as error:
        row.problem = f"not installed: pip ended with {error.returncode}"
        return row
    ask = [python, "-c", "import transformers; print(transformers.__version__)"]
    found = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    row.release = found if release == "newest" else release
    if found != row.release:
        row.problem = f"the environment has {found}; delete {folder / release}"
        return row
    report = folder / f"report-{row.release}.xml"
    report.unlink(missing_ok=True)
    status = run_tests(python, arguments, report)
    if report.exists():
        read_report(row, report)
    if status not in (0, 1) or not report.exists():
        row.problem = f"pytest ended with {status}"
    row.minutes = round((time.monotonic() - started) / 60, 1)
    return row


def show(rows: list[Row]) -> None:
    table = Table("transformers", "passed", "skipped", "failed", "minutes", "why skipped, or what failed")
    for row in rows:
        reasons = [f"{count}: {reason}" for reason, count in row.skipped.items()]
        reasons = [row.problem] * bool(row.problem) + row.failures[:20] + reasons
        counts = [row.passed, sum(row.skipped.values()), row.failed, row.minutes]
        ran = row.passed or row.failed or row.skipped
        table.add_row(row.release, *(str(count) if ran else NOT_MEASURED for count in counts), "\n".join(reasons))
    Console(width=160 if not sys.stdout.isatty() else None).print(table)


def main() -> int:
    arguments = parse_with_positional(Arguments, "releases", __doc__)
    folder = (ROOT / arguments.folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    rows = [check(release, arguments, folder) for release in arguments.releases]
    output = ROOT / arguments.output
    output.parent.mkdir(parents=True, exist_ok=True)
    settings = {"torch": version("torch"), "python": sys.version.split()[0], "tests": arguments.tests}
    output.write_text(json.dumps({**settings, "rows": [asdict(row) for row in rows]}, indent=2) + "\n", "utf-8")
    show(rows)
    return 0 if all(row.is_good for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
