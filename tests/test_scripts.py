"""Every script runs at its smallest setting, and its last line of stdout is one JSON object."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


ROOT = Path(__file__).parent.parent
DECODE = ["benchmark_decode.py", "--geometry", "mini", "--layers", "2", "--context", "96", "--prefill", "32"]


def run(*command: str) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    script, *arguments = command
    process = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / script), *arguments], capture_output=True, text=True, env=environment
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def test_benchmark_decode_measures_every_recipe_beside_stock() -> None:
    report = run(*DECODE, "--repeats", "1")
    assert list(report["results"]) == ["stock", "full rank", "rank R/2"]
    for row in report["results"].values():
        assert len(row["decode_s"]) == len(row["prefill_s"]) == 1
        assert min(row["decode_s"] + row["prefill_s"]) > 0
    sizes = {name: row["cache_bytes"] for name, row in report["results"].items()}
    # Two layers: a row has 576 numbers at full rank and 320 at half, and four exact latents of 512 come on top.
    assert sizes["stock"] == 2 * 96 * 576 * 4
    assert sizes["rank R/2"] == 2 * (96 * 320 * 4 + 4 * (512 * 4 + 8))
    assert {"command", "machine", "torch", "transformers"} <= set(report)


@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory from /proc")
def test_benchmark_decode_measures_peak_memory_of_every_recipe() -> None:
    report = run(*DECODE, "--memory", "--memory_steps", "2")
    assert all(row["peak_bytes"] > 0 for row in report["results"].values())


def test_a_wrong_argument_is_named() -> None:
    process = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "benchmark_decode.py"), "--contxt", "5"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.returncode != 0
    assert "contxt" in process.stderr
