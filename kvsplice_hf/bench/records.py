"""What a folder of results holds: `experiment-N.json`, what was asked, and `runs.jsonl`, a line per finished run.

Lines are only ever appended, by any number of processes; the last of the experiment files is the one in force.
"""

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from kvsplice_hf import ConfigError


logger = logging.getLogger(__name__)

RUNS = "runs.jsonl"


class RunKey(NamedTuple):
    """What tells the runs of an experiment apart."""

    budget: str
    arm: str
    seed: int


def key_of(record: dict[str, Any]) -> RunKey:
    """The key of a finished run."""
    return RunKey(record["budget"], record["arm"], record["seed"])


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """The finished runs of a folder, the first where one was recorded twice; none where there is no file.

    A line that was cut off when its process was killed is left out, with a warning.
    """
    path = folder / RUNS
    if not path.exists():
        return []
    runs: dict[RunKey, dict[str, Any]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            runs.setdefault(key_of(record), record)
        except (ValueError, KeyError, TypeError):
            logger.warning("Line %d of %s is not a finished run and is left out.", number, path)
    return list(runs.values())


def append_run(folder: Path, record: dict[str, Any]) -> None:
    """Add a line; one that was cut off before it stays a line of its own."""
    path = folder / RUNS
    with FileLock(path.with_suffix(".lock")):
        whole = not path.exists() or path.read_bytes()[-1:] in (b"\n", b"")
        with path.open("a", encoding="utf-8") as file:
            file.write(("" if whole else "\n") + json.dumps(record) + "\n")


def write_experiment(folder: Path, definition: dict[str, Any]) -> None:
    """Keep what was asked; where it changed since the last time, beside what was asked before."""
    with FileLock(folder / "experiment.lock"):
        files = _experiment_files(folder)
        if files and json.loads(files[-1].read_text(encoding="utf-8")) == definition:
            return
        path = folder / f"experiment-{len(files)}.json"
        path.write_text(json.dumps(definition, indent=2) + "\n", encoding="utf-8")


def read_experiment(folder: Path) -> dict[str, Any]:
    """What was asked last.

    Raises:
        ConfigError: the folder is not there, or holds no experiment.
    """
    files = _experiment_files(folder)
    if not files:
        state = "holds no experiment-N.json" if folder.is_dir() else "is not there"
        raise ConfigError(f"{folder} {state}. A folder of results is made by scripts/research/ablate.py.")
    return json.loads(files[-1].read_text(encoding="utf-8"))


def _experiment_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("experiment-*.json"), key=lambda path: int(path.stem.split("-")[1]))
