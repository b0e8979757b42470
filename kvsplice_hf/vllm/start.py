"""What is checked before an engine starts: the splice, the model it was made for, and what the engine was asked for.

Each of these errors ends the start of the engine, with our message.
"""

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
import transformers

from kvsplice_hf.code.files import CONFIG_NAME, read_splice_files
from kvsplice_hf.errors import CheckpointError, ConfigError, UnsupportedError, UpstreamChangedError
from kvsplice_hf.manage.loading import require_fit
from kvsplice_hf.patch.base import BASE_KEY, base_fingerprint
from kvsplice_hf.patch.sites import find_sites
from kvsplice_hf.vllm.ordinary import is_of_heads, not_for_heads, require_no_windows, require_ordinary_model
from kvsplice_hf.vllm.splices import require_known_model, skeleton_of


logger = logging.getLogger(__name__)

# The folder of the splice, and whether the weights of the model are compared with those it was made for.
FOLDER_VARIABLE = "KVSPLICE_VLLM"
BASE_VARIABLE = "KVSPLICE_VLLM_BASE"
# The release of vLLM that all this was run on.
TESTED_VLLM = "0.32.0"
_BASE_CHOICES = ("same", "any")


def folder_named() -> Path | None:
    """The folder that the environment names, or None."""
    name = os.environ.get(FOLDER_VARIABLE, "")
    return Path(name).expanduser().absolute() if name else None


def folder_asked_for() -> Path | None:
    """The folder of the splice that the environment names, or None.

    Raises:
        CheckpointError: there is no splice in it, or it is damaged.
    """
    folder = folder_named()
    if folder is not None:
        read_splice_files(folder)
    return folder


def tell_of_release(version: str) -> None:
    """Say so where another release of vLLM is installed than the one that was tested."""
    if version.split("+")[0] != TESTED_VLLM:
        logger.warning(
            "Splices were tested in vLLM %s, and %s is installed. Should it fail, see docs/serving.md.",
            TESTED_VLLM,
            version,
        )


def unlike_tested(what: str) -> UpstreamChangedError:
    """The error for a vLLM that does something else than the release that was tested."""
    return UpstreamChangedError(
        f"vLLM does not do what its plug-in for splices relies on: {what}. Install vLLM {TESTED_VLLM}, or unset "
        f"{FOLDER_VARIABLE} to serve the model without its splice."
    )


def require_servable(engine: Any, folder: Path) -> None:
    """Check that an engine can keep the rows of a splice.

    Args:
        engine: vLLM's `VllmConfig`.
        folder: of the splice.

    Raises:
        UnsupportedError: the model, or something that the engine was asked for, cannot be served with spliced rows.
        CheckpointError: the splice was made for another model, or does not have all its layers.
        ConfigError: `KVSPLICE_VLLM_BASE` is none of its values, or pages are smaller than what is kept exactly.
    """
    config, of_heads = engine.model_config.hf_text_config, is_of_heads(folder)
    if of_heads:
        require_ordinary_model(engine.model_config)
    else:
        require_known_model(config)
    _require_supported(engine, of_heads)
    _require_pipeline_that_starts(engine)
    saved = read_splice_files(folder).config
    if engine.cache_config.block_size < saved.sink_tokens:
        raise ConfigError(
            f"Blocks of {engine.cache_config.block_size} tokens cannot hold the {saved.sink_tokens} exact first tokens "
            f"of the splice in {folder}. Give the engine a larger block_size."
        )
    skeleton = skeleton_of(config)
    if of_heads:
        require_no_windows(find_sites(skeleton))
    chosen = {site.layer_idx for site in require_fit(skeleton, folder)}
    left = sorted({site.layer_idx for site in find_sites(skeleton)} - chosen)
    if left:
        raise UnsupportedError(
            f"The splice in {folder} leaves layers {left} as they are, and vLLM keeps spliced rows in all layers or in "
            'none. Make one with layers="all".'
        )
    _require_same_base(engine, folder)
    if _device_of(engine) == "cuda":
        logger.warning(
            "Splices in vLLM have not run on a GPU yet: their backend was compiled for GPUs, and run in Triton's "
            "interpreter. Compare what it writes before you rely on it (docs/serving.md)."
        )


def _require_supported(engine: Any, of_heads: bool) -> None:
    """Refuse what the engine was asked for and spliced rows cannot do."""
    parallel, model, device = engine.parallel_config, engine.model_config, _device_of(engine)
    asked = {
        f"kv_cache_dtype={engine.cache_config.cache_dtype!r}": engine.cache_config.cache_dtype != "auto",
        "speculative decoding": engine.speculative_config is not None,
        "a KV connector": engine.kv_transfer_config is not None,
        "LoRA": engine.lora_config is not None,
        "context parallelism": max(parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size) > 1,
        f"device {device!r}": device not in ("cpu", "cuda"),
        "float32 on a GPU": device == "cuda" and model.dtype is torch.float32,
        "two batches at once": parallel.use_ubatching,
        "VLLM_MLA_DISABLE": not of_heads and not model.use_mla,
    }
    asked |= not_for_heads(engine) if of_heads else {}
    found = [name for name, is_asked in asked.items() if is_asked]
    if found:
        raise UnsupportedError(
            f"vLLM with a splice does not serve {', '.join(found)}. Leave that out, or unset {FOLDER_VARIABLE} to "
            "serve the model without its splice (docs/serving.md)."
        )


def _device_of(engine: Any) -> str:
    """The kind of device; what PyTorch on ROCm calls cuda as well is "rocm"."""
    kind = str(engine.device_config.device_type)
    return "rocm" if kind == "cuda" and torch.version.hip is not None else kind


def _require_pipeline_that_starts(engine: Any) -> None:
    """Refuse stages of layers where vLLM would fail at its first request, with or without a splice.

    Its workers on CPUs make the tensors that a stage receives in when they warm up, and do so only to compile.
    """
    stages = engine.parallel_config.pipeline_parallel_size
    is_eager = engine.compilation_config.mode.name == "NONE"
    if (
        stages > 1
        and _device_of(engine) == "cpu"
        and (is_eager or os.environ.get("VLLM_CPU_CI_ENV", "0") not in ("", "0"))
    ):
        raise UnsupportedError(
            f"vLLM {TESTED_VLLM} on a CPU does not run layers in {stages} stages without compiling them, with a splice "
            "or without. Leave out enforce_eager and VLLM_CPU_CI_ENV, or pipeline_parallel_size (docs/serving.md)."
        )


def _require_same_base(engine: Any, folder: Path) -> None:
    """Compare the weights of the checkpoint with those that the splice was made for; all of them are read."""
    choice = os.environ.get(BASE_VARIABLE, _BASE_CHOICES[0])
    if choice not in _BASE_CHOICES:
        raise ConfigError(f"`{BASE_VARIABLE}` is {choice!r}; it must be one of {', '.join(_BASE_CHOICES)}.")
    saved = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")).get(BASE_KEY, "")
    if choice == "any" or not saved:
        logger.warning("Whether the splice in %s was made for the weights that vLLM serves is not checked.", folder)
        return
    name = engine.model_config.model
    logger.info("Reading the weights of %s, to compare them with those that the splice was made for.", name)
    model = transformers.AutoModelForCausalLM.from_pretrained(name, revision=engine.model_config.revision, dtype="auto")
    if base_fingerprint(model, find_sites(model)[0].module) != saved:
        raise CheckpointError(
            f"The splice in {folder} was made for other weights than those of {name}, and may lose much on these. "
            f"Calibrate that model and save its own splice; or set {BASE_VARIABLE}=any, if one was tuned from the "
            "other or is the other in another precision."
        )
