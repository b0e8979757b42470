"""The one command for a machine with a GPU: what it says without one, what it runs, and what it leaves behind."""

import importlib
import json
import os
import stat
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from programs import SCRIPTS, load_program
from transformers import HfArgumentParser

from kvsplice_hf.bench.tables import NOT_MEASURED


SCRIPT = SCRIPTS / "gpu_check.sh"
# Stands for the interpreter of Python: everything is installed, there is a GPU, and programs print what they are given.
STUB = """#!/usr/bin/env bash
if [ "$1" = -c ]; then echo "collected"; exit 0; fi
echo "a table" >&2
echo "{\\"arguments\\": \\"$*\\"}"
case "$1" in *"${FAILS:-nothing}") exit 1 ;; esac
"""


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    everything = {**os.environ, "PYTHON": sys.executable, **environment}
    everything.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments], env=everything, capture_output=True, text=True, cwd=SCRIPTS.parent
    )


@pytest.fixture
def stub(tmp_path: Path) -> str:
    path = tmp_path / "python"
    path.write_text(STUB, encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def folder_in(output: Path) -> Path:
    (folder,) = (path for path in output.iterdir() if path.is_dir())
    return folder


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_in_one_sentence_and_measures_nothing(tmp_path: Path) -> None:
    result = run("--output", str(tmp_path))
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("No GPU: PyTorch finds no CUDA or ROCm device here.")
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_installed_is_named_with_the_command_that_installs_it(tmp_path: Path) -> None:
    without = tmp_path / "torch.py"
    without.write_text("raise ModuleNotFoundError('No module named torch')", encoding="utf-8")
    result = run(PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    assert "No module named torch" in result.stderr
    assert result.stderr.endswith("pip install -e '.[bench,gpu]'\n")


@pytest.mark.parametrize("arguments", [["--fast"], ["--output"]])
def test_unknown_arguments_are_refused(arguments: list[str]) -> None:
    assert run(*arguments).returncode == 2


def test_on_a_gpu_kernels_and_decode_steps_are_measured_into_one_folder(stub: str, tmp_path: Path) -> None:
    result = run("--output", str(tmp_path / "out"), PYTHON=stub)
    assert result.returncode == 0, result.stderr
    folder = folder_in(tmp_path / "out")
    names = ["kernels", "decode-v2-lite", "decode-v3"]
    expected = {f"{name}.{ending}" for name in names for ending in ("json", "log")}
    assert {path.name for path in folder.iterdir()} == expected | {"environment.txt", "results.md"}
    assert "collected" in (folder / "environment.txt").read_text("utf-8")
    with tarfile.open(f"{folder}.tar.gz") as archive:
        assert f"{folder.name}/results.md" in archive.getnames()
    assert f"send {folder}.tar.gz back" in result.stderr
    for name in names:
        assert f"## {name}" in (folder / "results.md").read_text("utf-8")
        arguments = json.loads((folder / f"{name}.json").read_text("utf-8"))["arguments"].split()
        assert Path(arguments[0]).exists()
        assert arguments[-2:] == ["--output", str(folder)]


def test_decode_takes_the_arguments_that_it_is_given(stub: str, tmp_path: Path) -> None:
    run("--output", str(tmp_path / "out"), PYTHON=stub)
    given = json.loads((folder_in(tmp_path / "out") / "decode-v3.json").read_text("utf-8"))["arguments"]
    # Recipes have blanks in their names, which the stub does not keep apart.
    given = given.replace("full rank", "full-rank").replace("rank R/2", "rank-R/2").replace("packed 4x", "packed-4x")
    arguments = [
        word.replace("rank-", "rank ").replace("-rank", " rank").replace("packed-", "packed ") for word in given.split()
    ]
    arguments[arguments.index("cuda")] = "cpu"
    (parsed,) = HfArgumentParser(load_program("measure/decode.py").Arguments).parse_args_into_dataclasses(arguments[1:])
    assert (parsed.geometry, parsed.dtype) == ("v3", "bfloat16")
    assert parsed.recipes == ["stock", "full rank", "rank R/2", "packed 4x"]
    assert 65536 in parsed.contexts


def test_what_fails_is_named_and_the_rest_is_measured_all_the_same(stub: str, tmp_path: Path) -> None:
    result = run("--output", str(tmp_path / "out"), PYTHON=stub, FAILS="gpu_kernels.py")
    assert result.returncode == 1
    assert "kernels failed; its last words: a table" in result.stderr
    assert "Failed: kernels." in result.stderr
    assert (folder_in(tmp_path / "out") / "decode-v3.json").exists()


@pytest.mark.slow
def test_a_dry_run_runs_every_program_in_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="the kernels need triton, which is not installed")
    result = run("--dry-run", "--output", str(tmp_path))
    assert result.returncode == 0, result.stderr
    folder = folder_in(tmp_path)
    kernels = json.loads((folder / "kernels.json").read_text("utf-8"))
    assert {row["kernel"] for row in kernels["checks"]} == {"attend", "attend heads", "pack", "search"}
    assert all(row["agrees"] for row in kernels["checks"])
    kinds = {"full rank", "half rank", "packed", "coded keys", "trellis", "trellis, coded keys"}
    kinds |= {"trellis, predicted latents"}
    heads = {"heads", "heads, trellis, predicted values"}
    assert {row["kind"] for row in kernels["timings"]} == kinds | heads
    assert {row["kind"] for row in kernels["checks"] if row["kernel"] == "attend heads"} == heads
    assert {row["kind"] for row in kernels["checks"] if row["kernel"] == "attend"} == kinds
    assert not [row for row in kernels["timings"] if "skipped" in row]
    assert json.loads((folder / "decode-mini.json").read_text("utf-8"))["rows"]
    assert "figures mean nothing" in (folder / "results.md").read_text("utf-8")


# The program for the kernels

CHECK = {
    "kernel": "attend",
    "geometry": "v3",
    "kind": "packed",
    "dtype": "bfloat16",
    "phase": "decode",
    "biased": False,
}
CHECK |= {"off": 0.5, "allowed": 0.03, "agrees": False}
TIMING = {"geometry": "v3", "kind": "packed", "dtype": "bfloat16", "rows": 4096, "blocks": "chosen"}


def test_a_kernel_that_disagrees_stands_out_and_ends_the_program_with_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton", reason="the kernels need triton, which is not installed")
    program = load_program("measure/gpu_kernels.py")
    monkeypatch.setattr(program, "interpreted", lambda: True)
    monkeypatch.setattr(program, "check_all", lambda args: [CHECK])
    monkeypatch.setattr(program, "time_all", lambda args, copy: [TIMING | {"skipped": "OutOfResources: shared memory"}])
    monkeypatch.setattr(sys, "argv", ["gpu_kernels.py", "--dry_run", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match="1 of 1 cases disagree with PyTorch"):
        program.main()
    printed = capsys.readouterr()
    assert "| 5.0e-01 | 3e-02 | NO |" in printed.err
    assert f"| chosen | OutOfResources: shared memory | {NOT_MEASURED} |" in printed.err
    assert json.loads(printed.out.splitlines()[-1])["checks"] == [CHECK]


@pytest.mark.parametrize(("target", "hip"), [("sm_90", None), ("gfx942", "7.0")])
def test_a_device_is_compared_with_what_its_kernels_are_compiled_for(
    target: str, hip: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="the kernels need triton, which is not installed")
    device = importlib.import_module("kvsplice_hf.bench.kernels.device")
    name = "NVIDIA H100 80GB HBM3" if hip is None else "gfx942:sramecc+:xnack-"
    properties = SimpleNamespace(major=9, minor=0, gcnArchName=name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(device, "limits_of", lambda where: device.TARGETS[target].limits)
    found = device.describe("cuda")
    assert found["target"] == target
    assert found["limits"] == found["expected_limits"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_the_program_for_the_kernels_says_what_it_is_missing() -> None:
    pytest.importorskip("triton", reason="the kernels need triton, which is not installed")
    program = load_program("measure/gpu_kernels.py")
    with pytest.raises(program.UnsupportedError, match="no CUDA or ROCm device"):
        program.Arguments()
    with pytest.raises(program.UnsupportedError, match="TRITON_INTERPRET=1"):
        program.Arguments(dry_run=True)
