"""The lanes of the test suite: what runs in which, and how long it may take on two cores (CONTRIBUTING.md).

- fast, under 90 seconds: the contracts, on four architectures. For every change.
- full, under 10 minutes: everything but what is marked slow. `make test`.
- slow: what is marked so, and is worth it before a release.
"""

from pathlib import Path
from typing import Any

from tiny_models import TINY_MODELS


LANES = ("fast", "full", "slow")
# A plain one; one with complex RoPE; one with a sparse-attention indexer; one that shares latents between layers.
FAST_ARCHITECTURES = ("deepseek_v3", "deepseek_v2", "glm_moe_dsa", "mistral_large4")
# Files of the fast lane. Their tests of other architectures, and those marked, are left to the full lane.
FAST_FILES = (
    "test_absorbed",
    "test_checkpoint",
    "test_codec",
    "test_config",
    "test_contract_models",
    "test_dispatch",
    "test_folding",
    "test_generate",
    "test_how_to_add",
    "test_lifecycle",
    "test_packed",
    "test_projection",
    "test_public_api",
    "test_rooms",
    "test_sinks",
    "test_streaming",
    "test_upstream",
)


def is_in_lane(item: Any, lane: str) -> bool:
    """Whether a collected test runs in a lane."""
    slow = item.get_closest_marker("slow") is not None
    if lane != "fast":
        return slow == (lane == "slow")
    if item.get_closest_marker("compiles") is not None:
        return False
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    named = [value for value in values if isinstance(value, str) and value in TINY_MODELS]
    return not slow and Path(item.fspath).stem in FAST_FILES and all(name in FAST_ARCHITECTURES for name in named)
