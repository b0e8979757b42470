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


# In the place of the embedded models: a tiny one that is trained in seconds, and a random one.
STANDS_IN = f"""
import copy, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
import kvsplice_hf.demo
from byte_tokenizer import byte_tokenizer, trained_model
from ordinary_models import build_ordinary
kvsplice_hf.demo.load_demo_model = lambda: (copy.deepcopy(trained_model()), byte_tokenizer())
kvsplice_hf.demo.load_original_demo_model = lambda: (
    build_ordinary("llama", vocab_size=256, max_position_embeddings=128), byte_tokenizer()
)
"""


def run_cells(before: str, folder: Path) -> str:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    script = folder / "notebook.py"
    script.write_text("\n".join([before, *code]), "utf-8")
    settings = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "KVSPLICE_NOTEBOOK_SMALL": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, cwd=folder, env={**os.environ, **settings}
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_every_cell_of_the_notebook_runs_on_a_tiny_model(tmp_path: Path) -> None:
    printed = run_cells(STANDS_IN, tmp_path)
    assert "trainable params" in printed
    assert "128 bytes:" in printed
    assert "ordinary attention: 8." in printed, "a quarter of bf16 is an eighth of a float32 cache"


@pytest.mark.slow
def test_every_cell_of_the_notebook_runs(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the embedded model needs the extra demo")
    if not demo_folder().exists():
        pytest.skip("the embedded model has not been built (tests/test_demo.py builds it)")
    assert "128 bytes:" in run_cells("", tmp_path)
