"""The Triton kernels at the shapes of published models: compiled for devices that are elsewhere, or run on one.

It needs Triton.

Raises:
    UnsupportedError: on import, where Triton is missing; the message holds the command that installs it.
"""

import importlib.util

from kvsplice_hf.errors import UnsupportedError


if importlib.util.find_spec("triton") is None:
    raise UnsupportedError(
        "kvsplice_hf.bench.kernels needs Triton, not installed here: pip install 'kvsplice_hf[bench,gpu]'"
    )
