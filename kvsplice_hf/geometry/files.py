"""Files of geometries: tensors in safetensors, and what is to be known of them in its metadata."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from kvsplice_hf import folders
from kvsplice_hf.errors import CheckpointError


# Of all formats of geometries.
_VERSION = 1
_KEY = "kvsplice"


def write_geometry_file(
    path: str | Path, kind: str, about: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Write one file, whole or not at all.

    Args:
        path: the file.
        kind: name of its format.
        about: what is to be known of it, as JSON can hold it.
        tensors: on the CPU, contiguous.

    Raises:
        OSError: it cannot be written.
    """
    note = json.dumps({"format": kind, "version": _VERSION, **about})
    folders.write_bytes(Path(path), safetensors.torch.save(dict(tensors), metadata={_KEY: note}))


def read_geometry_file(path: str | Path, kind: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What `write_geometry_file` wrote: what is to be known, and the tensors.

    Raises:
        CheckpointError: there is no such file, or it is damaged, of another format, or of a newer version.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise CheckpointError(f"No geometry at {path}: {error}. It takes a file of SplinePCA.save.") from error
    try:
        tensors, about = safetensors.torch.load(content), _noted(content)
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}. Fit and save the geometry again.") from error
    if not isinstance(about, dict) or about.get("format") != kind:
        raise CheckpointError(
            f"{path} is not a geometry of the kind {kind!r}: its metadata do not say so. What SplinePCA.save wrote, "
            "SplinePCA.load reads; what ModelGeometry.save wrote, ModelGeometry.load."
        )
    if not isinstance(about.get("version"), int) or about["version"] > _VERSION:
        raise CheckpointError(
            f"{path} has version {about.get('version')!r} of the format; this release reads up to {_VERSION}. Upgrade "
            "kvsplice_hf."
        )
    return about, tensors


def is_geometry_file(path: str | Path, kind: str) -> bool:
    """Whether a file says that it holds a geometry of that format; False where it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            first = file.read(8)
            about = _noted(first + file.read(int.from_bytes(first, "little")))
    except (OSError, ValueError, OverflowError, MemoryError):
        return False
    return isinstance(about, dict) and about.get("format") == kind


def _noted(content: bytes) -> Any:
    """What stands in the metadata of a safetensors file.

    Raises:
        ValueError: its header is no JSON.
    """
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    return json.loads(header.get("__metadata__", {}).get(_KEY, "null"))
