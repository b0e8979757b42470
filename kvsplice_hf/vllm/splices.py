"""A saved splice as an engine reads it: one layer at a time, for models whose modules vLLM has its own code for.

vLLM rotates the keys of these models as pairs of neighbours, and some models of transformers put the first numbers of
all pairs in front before they rotate them. Scores are the same; codes are of keys in the order of transformers.
"""

import copy
import functools
import json
from pathlib import Path
from typing import Any

import torch
import transformers

from kvsplice_hf.cache.rows import RowGeometry
from kvsplice_hf.code.files import CONFIG_NAME, read_splice_files
from kvsplice_hf.code.keys import KeyProjection, turns_of
from kvsplice_hf.config import KVSpliceConfig
from kvsplice_hf.errors import CheckpointError, UnsupportedError
from kvsplice_hf.manage.loading import read_splices
from kvsplice_hf.vllm.pages import ServedLayer


# By the type of the model, whether transformers puts the first numbers of all pairs of a key in front.
_FIRST_NUMBERS_IN_FRONT = {"deepseek_v2": False, "deepseek_v3": True}

# The kinds of RoPE that vLLM has for these models.
_ROPE = ("default", "yarn")
# vLLM writes names of its own into the settings of a model when it makes it, for what they call yarn.
_NAMES_OF_VLLM = "deepseek_"


def require_known_model(config: Any) -> None:
    """Check that rows of a model can be served, by its settings.

    Raises:
        UnsupportedError: another kind of model, or settings that vLLM does not read.
    """
    kind = getattr(config, "model_type", "")
    if kind not in _FIRST_NUMBERS_IN_FRONT:
        known = ", ".join(sorted(_FIRST_NUMBERS_IN_FRONT))
        raise UnsupportedError(
            f"vLLM keeps spliced rows of models of the types {known}; this one is {kind!r}. Unset KVSPLICE_VLLM to "
            "serve it as it is, or run it in transformers with load_kvsplice."
        )
    parameters = getattr(config, "rope_parameters", None) or {}
    rope = parameters.get("rope_type", "default")
    unread = {
        "rope_interleave=False": not getattr(config, "rope_interleave", True),
        "tie_word_embeddings=True": getattr(config, "tie_word_embeddings", False),
        "attention_bias=True": getattr(config, "attention_bias", False),
        f"rope_type={rope!r}": rope not in _ROPE and not str(rope).startswith(_NAMES_OF_VLLM),
        # It then leaves out the factor on scores.
        "mscale_all_dim beside attention_factor=1.0": parameters.get("attention_factor") == 1.0
        and bool(parameters.get("mscale_all_dim")),
    }
    found = [name for name, is_found in unread.items() if is_found]
    if found:
        raise UnsupportedError(
            f"This model has {', '.join(found)}, which vLLM does not read for models of its type: without an error it "
            "would compute something else. Run it in transformers with load_kvsplice, or serve a model in the plain "
            "form (convert_to_mla with plain=True; docs/conversion.md)."
        )


def order_of_keys(config: Any) -> torch.Tensor:
    """Which number of vLLM's rotated key stands at each place of that of transformers, int64 [P]."""
    numbers = torch.arange(config.qk_rope_head_dim, dtype=torch.int64, device="cpu")
    return torch.cat([numbers[0::2], numbers[1::2]]) if _FIRST_NUMBERS_IN_FRONT[config.model_type] else numbers


def served_layer(
    directory: Path,
    layer_idx: int,
    config: Any,
    positions: int,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> ServedLayer:
    """One layer of a saved splice.

    Args:
        directory: of the splice.
        layer_idx: of the cache layer.
        config: of the model, as transformers has it.
        positions: how many there may be in a sequence.
        dtype, device: of the model; by default on the CPU.

    Raises:
        CheckpointError: a file is missing, damaged, of a newer schema, or without this layer.
    """
    splice, settings = splice_of(directory, layer_idx, dtype)
    geometry = RowGeometry(
        splice.latent_dim,
        splice.rank,
        config.qk_rope_head_dim,
        settings.sink_tokens,
        None if splice.codec is None else splice.codec.row_bytes,
        coded_keys=splice.keys is not None,
    )
    device = torch.device("cpu") if device is None else device
    turns = turns_at(config, positions, splice.keys, device)
    return ServedLayer(splice.to(device), geometry, dtype, turns, order_of_keys(config).to(device))


def splice_of(directory: Path, layer_idx: int, dtype: torch.dtype) -> tuple[Any, KVSpliceConfig]:
    """A copy of the splice of one layer in the dtype of the model, on the CPU, and the settings of all.

    Raises:
        CheckpointError: a file is missing, damaged, of a newer schema, or without this layer.
    """
    splices, settings = _read(directory, (directory / CONFIG_NAME).read_bytes())
    if layer_idx not in splices:
        raise CheckpointError(
            f"The splice in {directory} has no layer {layer_idx}: it has {sorted(splices)}. An engine needs all of "
            'them: save a splice that was made with layers="all".'
        )
    return copy.deepcopy(splices[layer_idx]).to(dtype), settings


@functools.lru_cache(maxsize=1)
def _read(directory: Path, description: bytes) -> tuple[dict[int, Any], KVSpliceConfig]:
    """All layers and the settings; kept while the first ones are asked for, by the content of the folder."""
    return read_splices(directory), read_splice_files(directory).config


@functools.lru_cache(maxsize=4)
def _turns_of(text: str, positions: int, columns: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """`turns_at`, the same tensor for all layers; of a model with these settings, as JSON."""
    settings = json.loads(text)
    rope = settings.get("rope_parameters") or {}
    if str(rope.get("rope_type")).startswith(_NAMES_OF_VLLM):
        rope["rope_type"] = "yarn"
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    modules = skeleton_of(config, 1).named_modules()
    rotary = type(next(module for name, module in modules if name.endswith("rotary_emb")))(config)
    ids = torch.arange(positions, dtype=torch.int64, device="cpu")[None]
    embeddings = rotary(torch.zeros(1, dtype=torch.float32, device="cpu"), ids)
    turns = turns_of(embeddings, torch.tensor(columns, dtype=torch.int64, device="cpu"))[0]
    return turns.contiguous().to(device)


def turns_at(config: Any, positions: int, keys: KeyProjection | None, device: torch.device) -> torch.Tensor | None:
    """The angles of all positions, uint8 [positions, F], as the rotary embedding of transformers makes them.

    Args:
        config: of the model.
        positions: how many.
        keys: how the keys are coded before their rotation; None where they are coded after it, and need no angles.
        device: of the angles.
    """
    if keys is None:
        return None
    return _turns_of(config.to_json_string(use_diff=False), positions, tuple(keys.pairs[2].tolist()), device)


def skeleton_of(config: Any, layers: int | None = None) -> Any:
    """The model of transformers without weights, with so many of its layers, or all."""
    smaller = copy.deepcopy(config)
    if layers is not None:
        smaller.num_hidden_layers = layers
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(smaller)
