"""The package is a house of rooms: imports run one way, files and functions are short, and one call walks straight."""

import ast
import subprocess
import sys
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from test_packed import SINKS, calibrated
from tiny_models import build
from torch import nn

import kvsplice_hf
from kvsplice_hf import KVSpliceCalibrator, KVSpliceConfig, patch_model_with_kvsplice


PACKAGE = Path(kvsplice_hf.__file__).parent
ROOT = PACKAGE.parent
LONGEST_MODULE = 400
LONGEST_FUNCTION = 60
# A longer one says why in a comment with these words, a module among its first lines, a function just above it.
REASON = "Long because"
PROGRAMS = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "scripts").rglob("*.py")])


def test_imports_between_rooms_run_one_way() -> None:
    pytest.importorskip("importlinter", reason="import-linter is not installed")
    found = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout


def has_reason(lines: list[str], first: int, last: int) -> bool:
    return any(REASON in line for line in lines[max(first, 0) : last])


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_and_functions_can_be_seen_at_once(path: Path) -> None:
    text = path.read_text("utf-8")
    lines = text.splitlines()
    assert len(lines) <= LONGEST_MODULE or has_reason(lines, 0, 40), f"{len(lines)} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            begin = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            size = (node.end_lineno or node.lineno) - node.lineno + 1
            documented = ast.get_docstring(node, clean=False)
            size -= len(documented.splitlines()) if documented else 0
            assert size <= LONGEST_FUNCTION or has_reason(lines, begin - 4, begin), f"{node.name}: {size} lines"


def in_the_order_of_hashes(node: ast.AST) -> bool:
    """Whether an expression is a set, or is made of one without sorting it."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("sorted", "len"):
        return False
    is_set = isinstance(node, ast.Set | ast.SetComp) or (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("set", "frozenset")
    )
    of_keys = isinstance(node, ast.BinOp) and any(
        isinstance(side, ast.Call) and isinstance(side.func, ast.Attribute) and side.func.attr in ("keys", "items")
        for side in (node.left, node.right)
    )
    return is_set or of_keys or any(in_the_order_of_hashes(child) for child in ast.iter_child_nodes(node))


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.glob("test_*.py")), ids=lambda path: path.stem)
def test_cases_of_tests_are_in_one_order_whatever_the_hashes_of_strings(path: Path) -> None:
    """Otherwise processes that share the tests collect them differently, and none is run."""
    decorators = [
        decorator
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef)
        for decorator in node.decorator_list
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.parametrize"
    ]
    cases = [decorator.args[1] for decorator in decorators if len(decorator.args) > 1]
    assert [ast.unparse(case) for case in cases if in_the_order_of_hashes(case)] == []


# What is held in a model's weights is asked of this room by all others, and no call goes on from it.
ASKED_FROM_ANYWHERE = frozenset({"weights"})


class Walk:
    """The rooms that a call goes through, by the functions that get the model handed: in order, without repeats."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.stops: list[str] = []

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event != "call" or PACKAGE not in path.parents:
            return
        code = frame.f_code
        given = [frame.f_locals.get(name) for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]]
        room = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if room not in ASKED_FROM_ANYWHERE and any(value is self.model for value in given):
            self.stops.append(room)

    def rooms(self) -> list[str]:
        return [room for room, _ in groupby(self.stops)]


def walk_of(model: nn.Module, config: KVSpliceConfig, calibration: KVSpliceCalibrator | None) -> list[str]:
    walk = Walk(model)
    sys.setprofile(walk)
    try:
        patch_model_with_kvsplice(model, config, calibration=calibration)
    finally:
        sys.setprofile(None)
    return walk.rooms()


CASES = {
    "weights alone": ({"compression_ratio": 0.5}, False),
    "rank": ({"compression_ratio": 0.5}, True),
    "bytes": ({"bits": 5.0, "allocation": "global"}, True),
}


@pytest.mark.parametrize(("settings", "with_statistics"), CASES.values(), ids=CASES)
def test_patching_enters_each_room_once_or_twice(settings: dict[str, Any], with_statistics: bool) -> None:
    model = build("deepseek_v3", torch.float32)
    calibration = calibrated(model) if with_statistics else None
    rooms = walk_of(model, KVSpliceConfig(**settings, sink_tokens=SINKS), calibration)
    assert rooms[0] == "patching"
    assert rooms[-1] == "patch"
    assert max(rooms.count(room) for room in rooms) <= 2, rooms


def test_comparing_two_allocations_goes_from_calibration_to_patch_and_back_for_each() -> None:
    model = build("deepseek_v3", torch.float32)
    ids = torch.randint(8, 128, (16, 16), generator=torch.Generator().manual_seed(0))
    calibrator = KVSpliceCalibrator(model, sink_tokens=SINKS).collect(list(ids), holdout=2, progress=False)
    assert calibrator.holdout, "nothing is held out, so that nothing is compared"
    rooms = walk_of(model, KVSpliceConfig(bits=5.0, sink_tokens=SINKS), calibrator)
    assert rooms.count("patching") == 1
    # Each time it is patched, run (through a hook on the whole model), and unpatched.
    assert rooms.count("patch") <= 2 + 2 * 3, rooms
