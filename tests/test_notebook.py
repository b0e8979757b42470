"""The notebook runs from its first cell to its last, at small settings, on the embedded model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvsplice_hf.demo import demo_folder


ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "docs" / "notebooks" / "kvsplice_quickstart.ipynb"


def test_the_notebook_is_kept_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert all(not cell["outputs"] for cell in cells if cell["cell_type"] == "code")


def test_every_cell_of_the_notebook_runs(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the embedded model needs the extra demo")
    if not demo_folder().exists():
        pytest.skip("the embedded model has not been built (tests/test_demo.py builds it)")
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    script = tmp_path / "notebook.py"
    script.write_text("\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"), "utf-8")
    settings = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "KVSPLICE_NOTEBOOK_SMALL": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path, env={**os.environ, **settings}
    )
    assert process.returncode == 0, process.stderr
    assert "trainable params" in process.stdout
    assert "128 bytes:" in process.stdout
