"""Multi-head Latent Attention models of Hugging Face transformers on a smaller KV cache.

Importing this package changes nothing: no class is patched, no name is registered.
"""

from kvsplice_hf.calibration.calibrator import KVSpliceCalibrator, calibrate
from kvsplice_hf.calibration.report import CalibrationReport
from kvsplice_hf.code.codec import RowCodec
from kvsplice_hf.code.projection import LearnedKVSplice
from kvsplice_hf.code.trellis import TrellisCodec
from kvsplice_hf.config import KVSpliceConfig
from kvsplice_hf.errors import (
    CacheMismatchError,
    CalibrationError,
    CheckpointError,
    ConfigError,
    FoldingError,
    KVSpliceError,
    NotMLAError,
    PatchStateError,
    TrainingError,
    TransformersTooOldError,
    UnsupportedError,
    UpstreamChangedError,
)
from kvsplice_hf.manage.explanation import Explanation, LayerPath, explain
from kvsplice_hf.manage.loading import load_kvsplice
from kvsplice_hf.manage.merging import merge_kvsplice, unmerge_kvsplice
from kvsplice_hf.manage.pruning import LayerPruning, prune_kvsplice, pruning_candidates
from kvsplice_hf.manage.sizes import (
    KVCacheSize,
    KVSpliceCache,
    cache_nbytes,
    get_kv_cache_size,
    materialised_nbytes,
)
from kvsplice_hf.patch.apply import unpatch_model
from kvsplice_hf.patch.saving import save_kvsplice
from kvsplice_hf.patch.state import splice_disabled
from kvsplice_hf.patching import patch_model_with_kvsplice
from kvsplice_hf.rest.prediction_text import fit_row_prediction, load_row_prediction, save_row_prediction
from kvsplice_hf.rest.row_prediction import RowPrediction
from kvsplice_hf.rest.saving import CacheDescription, describe_cache, load_cache, save_cache
from kvsplice_hf.rest.store import PromptCache
from kvsplice_hf.version import __version__


__all__ = [
    "CacheDescription",
    "CacheMismatchError",
    "CalibrationError",
    "CalibrationReport",
    "CheckpointError",
    "ConfigError",
    "Explanation",
    "FoldingError",
    "KVCacheSize",
    "KVSpliceCache",
    "KVSpliceCalibrator",
    "KVSpliceConfig",
    "KVSpliceError",
    "LayerPath",
    "LayerPruning",
    "LearnedKVSplice",
    "NotMLAError",
    "PatchStateError",
    "PromptCache",
    "RowCodec",
    "RowPrediction",
    "TrainingError",
    "TransformersTooOldError",
    "TrellisCodec",
    "UnsupportedError",
    "UpstreamChangedError",
    "__version__",
    "cache_nbytes",
    "calibrate",
    "describe_cache",
    "explain",
    "fit_row_prediction",
    "get_kv_cache_size",
    "load_cache",
    "load_kvsplice",
    "load_row_prediction",
    "materialised_nbytes",
    "merge_kvsplice",
    "patch_model_with_kvsplice",
    "prune_kvsplice",
    "pruning_candidates",
    "save_cache",
    "save_kvsplice",
    "save_row_prediction",
    "splice_disabled",
    "unmerge_kvsplice",
    "unpatch_model",
]
