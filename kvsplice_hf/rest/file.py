"""The file of a cache: safetensors, with a description, and a digest of every byte.

The description is JSON in the metadata of the file, beside the digest. The digest is SHA-256 of the file with zeros in
the place of the digest itself, so that no byte can change without being noticed. docs/caches_at_rest.md describes the
format.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kvsplice_hf import folders
from kvsplice_hf.errors import CheckpointError


FORMAT = "kvsplice_cache"
NEWEST_VERSION = 2
# Files of rows as they are stay readable by earlier releases; compressed ones are of the newest version.
PLAIN_VERSION = 1
_MARK, _UNKNOWN = b'"sha256":"', b"0" * 64
_LENGTH_BYTES, _MOST_HEADER = 8, 2**26
_PIECE = 2**20


class CacheFile(NamedTuple):
    """An open file of a cache.

    Attributes:
        path: of the file.
        description: what it says of itself.
        names: of the tensors.
        tensor: gives the tensor of a name, read from the file where it is looked at.
    """

    path: Path
    description: dict[str, Any]
    names: frozenset[str]
    tensor: Callable[[str], torch.Tensor]


def write_cache_file(path: Path, tensors: Mapping[str, torch.Tensor], description: Mapping[str, Any]) -> None:
    """Write a file, whole or not at all.

    Args:
        path: of the file.
        tensors: by name.
        description: for JSON; with "compression" the file is of the newest version.

    Raises:
        CheckpointError: it cannot be written: no such folder, no permission, no space. What was there before still is.
    """
    version = NEWEST_VERSION if "compression" in description else PLAIN_VERSION
    content = json.dumps({"version": version, **description})
    metadata = {"format": FORMAT, "description": content, "sha256": _UNKNOWN.decode()}

    def write(unfinished: Path) -> None:
        save_file(dict(tensors), unfinished, metadata)
        hole = _place_of_digest(unfinished)
        found = _digest(unfinished, hole)
        with unfinished.open("r+b") as file:
            file.seek(hole)
            file.write(found.encode())

    try:
        folders.write_whole(path, write)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"The cache cannot be written to {path}: {error}. What was there before is as it was. Give a place that "
            "can be written to and has room."
        ) from error


def open_cache_file(path: Path, *, verify: bool = True) -> CacheFile:
    """Open a file that `write_cache_file` has made.

    Args:
        path: of the file.
        verify: read all of it once, and compare its digest.

    Raises:
        CheckpointError: it is missing, damaged, no such file, or of a newer version.
    """
    try:
        hole = _place_of_digest(path)
        whole = not verify or _digest(path, hole) == _written_digest(path, hole)
        handle = _opened(path)
    except OSError as error:
        raise CheckpointError(f"The file of a cache cannot be read: {error}.") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}. Save the cache again.") from error
    if not whole:
        raise CheckpointError(
            f"{path} is truncated or was changed: its content does not have the digest that it names. Save the cache "
            "again."
        )
    metadata = handle.metadata() or {}
    return CacheFile(path, _description(path, metadata), frozenset(handle.keys()), _reader(path, handle))


def _opened(path: Path) -> Any:
    """The file as safetensors maps it.

    Raises:
        OSError: it cannot be opened. (torch, which maps it, says so with a RuntimeError.)
        SafetensorError: its header is damaged.
    """
    try:
        return safe_open(path, framework="pt")
    except RuntimeError as error:
        raise OSError(str(error)) from error


def _reader(path: Path, handle: Any) -> Callable[[str], torch.Tensor]:
    def tensor(name: str) -> torch.Tensor:
        try:
            found: torch.Tensor = handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged: {error}. Save the cache again.") from error
        return found

    return tensor


def _description(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not the file of a cache, as save_cache(cache, path, model) writes it.")
    try:
        description = json.loads(metadata.get("description", ""))
        version = description["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: its description cannot be read ({error!r}).") from error
    if not isinstance(version, int) or version > NEWEST_VERSION:
        raise CheckpointError(
            f"{path} is the file of a cache of version {version!r}; this release reads up to {NEWEST_VERSION}. Upgrade "
            "kvsplice_hf, or save the cache again with this release."
        )
    return dict(description)


def _place_of_digest(path: Path) -> int:
    """Where in the file the digest stands.

    Raises:
        CheckpointError: nowhere; the file is something else.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        header = file.read(length) if length <= min(_MOST_HEADER, os.fstat(file.fileno()).st_size) else b""
    if header.count(_MARK) != 1 or len(header) < header.find(_MARK) + len(_MARK) + len(_UNKNOWN):
        raise CheckpointError(
            f"{path} is not the file of a cache, or its header is damaged. save_cache(cache, path, model) writes one."
        )
    return _LENGTH_BYTES + header.find(_MARK) + len(_MARK)


def _written_digest(path: Path, hole: int) -> str:
    with path.open("rb") as file:
        file.seek(hole)
        return file.read(len(_UNKNOWN)).decode(errors="replace")


def _digest(path: Path, hole: int) -> str:
    found, piece = hashlib.sha256(), bytearray(_PIECE)
    with path.open("rb") as file:
        found.update(file.read(hole) + _UNKNOWN)
        file.seek(hole + len(_UNKNOWN))
        while count := file.readinto(piece):
            found.update(memoryview(piece)[:count])
    return found.hexdigest()
