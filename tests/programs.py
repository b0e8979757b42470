"""Programs under scripts, imported by path (some share their name with a module of the standard library), and run."""

import contextlib
import importlib.util
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest


SCRIPTS = Path(__file__).parent.parent / "scripts"
# What tables hold where a figure is missing or was divided by nothing.
_NO_FIGURES = re.compile(r"\b(nan|inf|None)\b|\b0\.0+x")


def load_program(path: str) -> Any:
    """The module of a program, once per process.

    Args:
        path: below `scripts`, as in "research/report.py".
    """
    name = "program_" + path.removesuffix(".py").replace("/", "_")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, SCRIPTS / path)
        assert spec is not None
        assert spec.loader is not None
        # Known before it is run: dataclasses look their annotations up in it.
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


def run_program(path: str, *arguments: str) -> dict[str, Any]:
    """What a program prints last, run in this process: a new one takes seconds to start.

    Its tables must hold figures alone.
    """
    stdout, stderr = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        patch.setattr(sys, "argv", [str(SCRIPTS / path), *arguments])
        load_program(path).main()
    assert_figures_only(stderr.getvalue())
    return json.loads(stdout.getvalue().splitlines()[-1])


def assert_figures_only(printed: str) -> None:
    """No cell of a printed table stands for something that was not measured."""
    wrong = [line for line in printed.splitlines() if "│" in line and _NO_FIGURES.search(line)]
    assert not wrong, "\n".join(wrong)
