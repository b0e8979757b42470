"""Compiles the C++ sources of `csrc` for the processor at hand, keeps the library in the user's cache folder, loads it.

No package of wheels could hold it for every processor: what makes it fast are instructions that not all of them have. A
library is kept under a name made of its sources, the compiler and the processor, so that another machine with the same
home folder, or another release, compiles its own.
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
        return ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or ""
        reason = next((line for line in output.splitlines() if "error" in line), str(error))
        logger.warning(
            "The C++ code that reads cached rows on a CPU could not be compiled: %s. PyTorch reads them instead, which "
            "takes several times as long. It needs a C++20 compiler (g++ 12, clang 16 or later; CXX names one) and a "
            "folder to write to (KVSPLICE_CACHE names one). KVSPLICE_KERNELS=torch leaves it out without this message.",
            reason,
        )
        return None


def _compiled() -> Path:
    """The file of the library, compiled if it is not there yet."""
    compiler = [*_compiler(), *_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    folder = _cache_folder()
    with as_file(files("kvsplice_hf") / "csrc") as sources:
        library = folder / f"{_fingerprint(compiler, sources)}.so"
        if not library.exists():
            logger.info("Compiling the C++ code that reads cached rows, once for this machine: %s", library)
            folder.mkdir(parents=True, exist_ok=True)
            # Under a name of its own first: another process may be doing the same.
            with tempfile.TemporaryDirectory(dir=folder) as own:
                made = Path(own) / library.name
                _run([*compiler, "-o", str(made), str(sources / _SOURCE)])
                os.replace(made, library)
    return library


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
    root = os.environ.get("KVSPLICE_CACHE") or os.environ.get("XDG_CACHE_HOME", "~/.cache") + "/kvsplice_hf"
    return Path(root).expanduser() / "native"


def _fingerprint(compiler: list[str], sources: Path) -> str:
    """What the library depends on: its sources, the command, and what the compiler says of itself and the processor."""
    digest = hashlib.sha256(" ".join(compiler).encode())
    for path in sorted(sources.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    digest.update(_run([*compiler, "-dM", "-E", "-x", "c++", os.devnull]).encode())
    return digest.hexdigest()[:16]


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S).stdout
