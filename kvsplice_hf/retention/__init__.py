"""Retention: a cache of bounded size, from which whole rows of tokens are dropped.

    with Retention(keep=512)(model):
        model.generate(**inputs)

The model may be patched or not. docs/retention.md says what it costs. Value pruning (`kvsplice_hf.values`) keeps the
keys of all tokens; `prune_kvsplice` drops coordinates of codes.
"""

from kvsplice_hf.retention.layer import RetainedLayer, RetainedSplicedLayer
from kvsplice_hf.retention.policy import Retention


__all__ = ["RetainedLayer", "RetainedSplicedLayer", "Retention"]
