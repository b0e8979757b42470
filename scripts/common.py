"""What the scripts share: loading a model, where results go, and what is noted beside every figure."""

import json
import os
import platform
import sys
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import accelerate
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


class LoadedModel(NamedTuple):
    """A model and its tokenizer."""

    model: PreTrainedModel
    tokenizer: Any


def load_model(name: str, dtype: str) -> LoadedModel:
    """The model and tokenizer of a folder or hub name, on the GPU if there is one."""
    device_map = "auto" if torch.cuda.is_available() else None
    model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype), device_map=device_map).eval()
    return LoadedModel(model, AutoTokenizer.from_pretrained(name))


def results_folder(output: str, script: str) -> Path:
    """A new folder `output/script-date-time`; a number is added where it exists, so nothing is overwritten."""
    stem = f"{script}-{datetime.now():%Y%m%d-%H%M%S}"
    for attempt in range(1000):
        folder = Path(output) / (stem if attempt == 0 else f"{stem}-{attempt}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(f"{output} holds a thousand folders {stem}-*")


def environment(arguments: object) -> dict[str, Any]:
    """The command, the machine and the versions behind a figure."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "arguments": vars(arguments),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "machine": gpu or f"{_processor()}, {torch.get_num_threads()} threads",
        "versions": {
            "accelerate": accelerate.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def finish(report: dict[str, Any], folder: Path) -> None:
    """Write the report beside its figures and print it as the last line of stdout."""
    report["folder"] = os.fspath(folder)
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report))
