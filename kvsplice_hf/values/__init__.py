"""Value pruning: the cache keeps all keys, and the values of those tokens that attention reads.

    with ValuePruning(keep=391)(model):
        model.generate(**inputs)

Not to be taken for `prune_kvsplice`, which drops coordinates of codes. docs/value_pruning.md says what it costs.
"""

from kvsplice_hf.values.fitting import fit_value_geometries
from kvsplice_hf.values.layer import ValuePrunedLayer
from kvsplice_hf.values.pruning import ValuePruning


__all__ = ["ValuePrunedLayer", "ValuePruning", "fit_value_geometries"]
