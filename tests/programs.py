"""Programs under scripts, imported by path: some share their name with a module of the standard library."""

import importlib.util
import sys
from pathlib import Path
from typing import Any


SCRIPTS = Path(__file__).parent.parent / "scripts"


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
