"""What the programs in `scripts` share: command lines, results, model shapes, rival codecs, training from scratch.

It needs the packages of the extra `bench`.

Raises:
    UnsupportedError: on import, where one of them is missing; the message holds the command that installs them.
"""

import importlib.util

from kvsplice_hf.errors import UnsupportedError


# Modules that the requirements of the package alone do not bring, and what they are installed as.
_MODULES = {
    "datasets": "datasets",
    "evaluate": "evaluate",
    "filelock": "filelock",
    "matplotlib": "matplotlib",
    "psutil": "psutil",
    "scipy": "scipy",
    "yaml": "pyyaml",
}


def _require_packages() -> None:
    missing = [package for module, package in _MODULES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UnsupportedError(
            f"kvsplice_hf.bench, and so the programs in scripts, need {', '.join(missing)}, not installed here: "
            "pip install 'kvsplice_hf[bench]'"
        )


_require_packages()
