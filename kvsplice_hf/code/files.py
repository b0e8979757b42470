"""The files of saved splices: `kvsplice_config.json` and `kvsplice_model.safetensors`.

The format is described in docs/checkpoint_format.md.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
import transformers
from safetensors import SafetensorError

from kvsplice_hf import folders
from kvsplice_hf.code.codecs import Codec, codec_class
from kvsplice_hf.code.heads import HeadKey, PartKey, layer_of
from kvsplice_hf.config import ROWS_CODEC, SCHEMA_VERSION, KVSpliceConfig
from kvsplice_hf.errors import CheckpointError, ConfigError
from kvsplice_hf.geometry.spline import require_spline


CONFIG_NAME = "kvsplice_config.json"
WEIGHTS_NAME = "kvsplice_model.safetensors"
FORMAT = "kvsplice"
# Of the files. Version 2 has keys that are coded before their rotation, version 3 a splice for each key head.
NEWEST_VERSION = 3
_KNOTS, _SLOPES = "bending.knots", "bending.slopes"


class SavedSplices(NamedTuple):
    """What a folder holds.

    Attributes:
        config: the settings.
        layers: by cache layer index its sizes: `kv_lora_rank`, `rank`, and `pruned_from` where it was pruned; of
            ordinary attention those of all key heads together, and how many `kv_heads` there are.
        tensors: under the names of `key_of`.
    """

    config: KVSpliceConfig
    layers: dict[int, dict[str, Any]]
    tensors: dict[str, torch.Tensor]


def key_of(part: PartKey, name: str) -> str:
    # By cache layer, not by path: a splice trained on `...ForCausalLM` fits the bare model as well.
    head = f"heads.{part.head}." if isinstance(part, HeadKey) else ""
    return f"layers.{layer_of(part)}.kvsplice.{head}{name}"


def write_splice_files(
    directory: Path,
    config: KVSpliceConfig,
    layers: dict[str, dict[str, Any]],
    tensors: dict[str, torch.Tensor],
    about: dict[str, Any],
) -> None:
    """Write both files; the folder is made if needed.

    Args:
        directory: where to.
        config, layers, tensors: as in `SavedSplices`.
        about: further entries of the JSON file.
    """
    directory.mkdir(parents=True, exist_ok=True)
    weights = safetensors.torch.save(tensors, metadata={"format": "pt"})
    description = {
        "config": _written(config),
        "format": FORMAT,
        "layers": layers,
        "schema_version": _version_of(tensors),
        "transformers_version": transformers.__version__,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    } | about
    # Each whole or not at all. A process that is killed between the two leaves files that do not fit; loading says so.
    folders.write_bytes(directory / WEIGHTS_NAME, weights)
    folders.write_bytes(directory / CONFIG_NAME, (json.dumps(description, indent=2, sort_keys=True) + "\n").encode())


def _written(config: KVSpliceConfig) -> dict[str, Any]:
    """The settings, without the codec where it is the oldest one: releases that know no other go on reading those."""
    return {name: value for name, value in config.to_dict().items() if (name, value) != ("codec", ROWS_CODEC)}


def _version_of(tensors: dict[str, torch.Tensor]) -> int:
    """The oldest version that describes what is saved: releases of before go on reading what they know."""
    if any(".heads." in name for name in tensors):
        return NEWEST_VERSION
    coded_keys = any(".keys." in name for name in tensors)
    return 2 if coded_keys else SCHEMA_VERSION


def codec_of(saved: SavedSplices, part: PartKey, directory: Path) -> Codec | None:
    """The codec that was saved for a layer, or for a key head, or None where its rows are numbers.

    Raises:
        CheckpointError: it is not known here, or its values cannot be used.
    """
    try:
        kind = codec_class(saved.config.row_codec)
        needed, further = (
            [saved.tensors[key] for name in names if (key := key_of(part, f"codec.{name}")) in saved.tensors]
            for names in (kind.saved, kind.saved_if_any)
        )
        return kind.from_saved([*needed, *further]) if len(needed) == len(kind.saved) else None
    except ConfigError as error:
        raise CheckpointError(f"The codec of layer {part} in {directory} cannot be used: {error}") from error


def read_splice_files(directory: Path) -> SavedSplices:
    """What the two files of a folder hold, checked against each other.

    Raises:
        CheckpointError: a file is missing, damaged, or of a newer schema.
    """
    description = _read_description(directory / CONFIG_NAME)
    config = _read_config(directory / CONFIG_NAME, description)
    layers = _read_layers(directory / CONFIG_NAME, description)
    tensors = _read_weights(directory / WEIGHTS_NAME, description["weights_sha256"])
    _check_splines(tensors, directory / WEIGHTS_NAME)
    return SavedSplices(config, layers, tensors)


def _check_splines(tensors: dict[str, torch.Tensor], path: Path) -> None:
    for name, knots in tensors.items():
        if not name.endswith(_KNOTS):
            continue
        try:
            require_spline(knots, tensors[name.removesuffix(_KNOTS) + _SLOPES])
        except (ConfigError, KeyError) as error:
            raise CheckpointError(f"{path} is damaged: the spline of {name} cannot be used: {error}") from error


def _read_description(path: Path) -> dict[str, Any]:
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"No saved splice at {path.parent}: {error}. It takes the files of save_kvsplice."
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: it is not JSON ({error}). Save the splice again.") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise CheckpointError(f'{path} is not a saved splice: "format" should be "{FORMAT}".')
    version = description.get("schema_version")
    if not isinstance(version, int) or version > NEWEST_VERSION:
        raise CheckpointError(
            f"{path} has schema version {version!r}; this release reads up to {NEWEST_VERSION}. Upgrade kvsplice_hf."
        )
    missing = sorted({"config", "layers", "model_type", "weights_sha256"} - set(description))
    if missing:
        raise CheckpointError(f"{path} is damaged: it lacks {missing}. Save the splice again.")
    return description


def _read_config(path: Path, description: dict[str, Any]) -> KVSpliceConfig:
    try:
        config = KVSpliceConfig.from_dict(description["config"])
        says_codec = "codec" in description["config"] or not config.is_packed
        return config if says_codec else dataclasses.replace(config, codec=ROWS_CODEC)
    except (ConfigError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} holds settings that cannot be used: {error}") from error


def _read_layers(path: Path, description: dict[str, Any]) -> dict[int, dict[str, Any]]:
    try:
        layers = {int(layer_idx): dict(sizes) for layer_idx, sizes in description["layers"].items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f'{path} is damaged: "layers" cannot be read ({error}). Save the splice again.'
        ) from error
    for layer_idx, sizes in layers.items():
        found = (sizes.get("kv_lora_rank"), sizes.get("rank"), sizes.get("kv_heads", 0))
        if any(type(size) is not int for size in found):
            raise CheckpointError(f"{path} is damaged: the sizes of layer {layer_idx} are {sizes}. Save it again.")
    return layers


def _read_weights(path: Path, sha256: str) -> dict[str, torch.Tensor]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"The weights of the splice cannot be read: {error}.") from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise CheckpointError(
            f"{path} is truncated or was changed: its SHA-256 is {found}, {CONFIG_NAME} says {sha256}. "
            "Copy both files again."
        )
    try:
        return safetensors.torch.load(content)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}. Save the splice again.") from error
