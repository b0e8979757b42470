"""The folders in which this package keeps what took long to make, and how a file gets into them.

What is kept only saves time the next time: where nothing can be kept, a warning says so and the caller goes on. Files
are written beside their place and moved there whole, so that two processes may write the same one, and one that is
killed leaves nothing that looks complete.
"""

import contextlib
import logging
import os
import stat
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


logger = logging.getLogger(__name__)

CACHE_VARIABLE = "KVSPLICE_CACHE"


def chosen_root() -> Path | None:
    """The folder that the environment variable `KVSPLICE_CACHE` names, or None where it names none."""
    named = os.environ.get(CACHE_VARIABLE)
    return expand_home(named) if named else None


def expand_home(path: str | Path) -> Path:
    """`path` with a leading "~" replaced.

    Raises:
        OSError: the user has no home folder (a container may run under a user that nobody has entered).
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise OSError(f"{error} ({path})") from error


def obstacle(folder: Path) -> str | None:
    """Why nothing can be kept in `folder`, or None. The folder is made if it is not there."""
    probe = folder / f".{uuid.uuid4().hex}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _removed_at_the_end(probe):
            probe.write_bytes(b"\0")
    except OSError as error:
        return str(error)
    return None


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make a file under another name in the folder of `path`, and move it to `path` when it is whole.

    The file gets the mode that the umask gives, whatever mode `write` chose: others may read what the user lets them
    read of other files.

    Args:
        path: the place of the file; its folder must be there.
        write: called with the other name; what it writes to that name becomes the file.

    Raises:
        OSError: the file cannot be made or moved. What was at `path` before is still there, and nothing else is left.
        Exception: whatever `write` raises.
    """
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with _removed_at_the_end(unfinished):
        mode = _touch(unfinished)
        write(unfinished)
        if stat.S_IMODE(unfinished.stat().st_mode) != mode:
            with contextlib.suppress(OSError):  # some file systems have no modes
                unfinished.chmod(mode)
        os.replace(unfinished, path)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file as `write_whole` does.

    Raises:
        OSError: it cannot be written. What was at `path` before is still there, and nothing else is left.
    """
    write_whole(path, lambda unfinished: unfinished.write_bytes(content))


def _touch(path: Path) -> int:
    """Make an empty file, and return the mode that the umask has given it. (To read the umask is to change it.)"""
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _removed_at_the_end(path: Path) -> Iterator[None]:
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


def apply_umask(folder: Path) -> None:
    """Give every file in `folder` the mode that the umask gives, whatever mode the library that wrote it chose.

    Raises:
        OSError: no file can be made in `folder`.
    """
    probe = folder / f".{uuid.uuid4().hex}.tmp"
    with _removed_at_the_end(probe):
        mode = _touch(probe)
    for path in folder.rglob("*"):
        if path.is_file():
            with contextlib.suppress(OSError):
                path.chmod(mode)


def warn_unkept(what: str, folder: Path | str, reason: object, consequence: str) -> None:
    """Say that `what` is not kept in `folder`, why, what follows from it, and what can be done."""
    logger.warning(
        "%s cannot be kept in %s: %s. %s The environment variable %s names another folder.",
        what,
        folder,
        str(reason).rstrip("."),
        consequence,
        CACHE_VARIABLE,
    )
