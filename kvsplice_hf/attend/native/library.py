"""Compiles the C++ sources of `csrc` for the processor at hand, keeps the library in the user's cache folder, loads it.

No package of wheels could hold it for every processor: what makes it fast are instructions that not all of them have. A
library is kept under a name made of its sources, the compiler and the processor, so that another machine with the same
home folder, or another release, compiles its own. The name ends with a checksum of the file: to load a library that is
cut short is to crash.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from importlib.resources import as_file, files
from pathlib import Path

from kvsplice_hf import folders


logger = logging.getLogger(__name__)

_COMPILERS = ("g++", "clang++", "c++")
_SOURCE = "library.cpp"
# The threads are those of the OpenMP that PyTorch has loaded already.
_FLAGS = ("-std=c++20", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-fvisibility=hidden")
_TIMEOUT_S = 300


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The library, or None where it cannot be had; then a warning says why."""
    try:
        return _load()
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or ""
        reason = next((line for line in output.splitlines() if "error" in line), str(error))
        logger.warning(
            "The C++ code that reads cached rows on a CPU could not be compiled: %s. PyTorch reads them instead, which "
            "takes several times as long. It needs a C++20 compiler (g++ 12, clang 16 or later; CXX names one) and a "
            "folder for temporary files (TMPDIR names one). KVSPLICE_KERNELS=torch leaves it out without this message.",
            reason,
        )
        return None


def _load() -> ctypes.CDLL:
    """The library as it is kept, or else compiled, and kept if it can be.

    Raises:
        OSError, subprocess.SubprocessError: it cannot be compiled, or not be loaded.
    """
    compiler = [*_compiler(), *_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    with as_file(files("kvsplice_hf.attend.native") / "csrc") as sources:
        name, folder = _fingerprint(compiler, sources), None
        try:
            folder = _cache_folder()
            kept = _find_kept(folder, name)
            if kept is not None:
                return ctypes.CDLL(str(kept))
        except OSError as error:  # no home folder, or one that no code may be loaded from
            logger.info("No library is read from %s: %s", folder, error)
        # Not in the folder where it is kept: it is to be had without one.
        with tempfile.TemporaryDirectory() as own:
            made = Path(own) / "library.so"
            logger.info("Compiling the C++ code that reads cached rows, once for this machine.")
            _run([*compiler, "-o", str(made), str(sources / _SOURCE)])
            return _keep_and_load(made, name)


def _keep_and_load(made: Path, name: str) -> ctypes.CDLL:
    """Load the library from the folder where it is kept, or else from where it was made; it stays when its file goes.

    Raises:
        OSError: it cannot be loaded from either.
    """
    folder: Path | str = "the user's cache folder"
    try:
        folder = _cache_folder()
        return ctypes.CDLL(str(_keep(made, folder, name)))
    except OSError as error:
        library = ctypes.CDLL(str(made))
        consequence = "It serves this process, and the next one compiles it again."
        folders.warn_unkept("The C++ code that reads cached rows on a CPU", folder, error, consequence)
        return library


def _find_kept(folder: Path, name: str) -> Path | None:
    """The file of the library `name` in `folder`, if there is one that is whole."""
    for path in sorted(folder.glob(f"{name}-*.so")):
        try:
            if path.name == _kept_name(name, path.read_bytes()):
                return path
        except OSError:
            pass
    return None


def _kept_name(name: str, content: bytes) -> str:
    return f"{name}-{hashlib.sha256(content).hexdigest()[:16]}.so"


def _keep(made: Path, folder: Path, name: str) -> Path:
    """Put a copy of the library into `folder`, in the place of damaged ones.

    Raises:
        OSError: it cannot be written.
    """
    content = made.read_bytes()
    kept = folder / _kept_name(name, content)
    folder.mkdir(parents=True, exist_ok=True)
    folders.write_bytes(kept, content)
    for path in folder.glob(f"{name}-*.so"):
        if path != kept:
            path.unlink(missing_ok=True)
    return kept


def _compiler() -> list[str]:
    """The command of the compiler.

    Raises:
        FileNotFoundError: there is none.
    """
    named = os.environ.get("CXX")
    if named:
        return shlex.split(named)
    found = next((name for name in _COMPILERS if shutil.which(name)), None)
    if found is None:
        raise FileNotFoundError(f"no C++ compiler was found among {', '.join(_COMPILERS)}")
    return [found]


def _cache_folder() -> Path:
    """Where the library is kept.

    Raises:
        OSError: the user has no home folder.
    """
    root = folders.chosen_root()
    if root is None:
        root = folders.expand_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "kvsplice_hf"
    return root / "native"


def _fingerprint(compiler: list[str], sources: Path) -> str:
    """What the library depends on: its sources, the command, and what the compiler says of itself and the processor."""
    digest = hashlib.sha256(" ".join(compiler).encode())
    for path in sorted(sources.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    digest.update(_run([*compiler, "-dM", "-E", "-x", "c++", os.devnull]).encode())
    return digest.hexdigest()[:16]


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S).stdout
