"""The import path of the research code, kept for its users. New code imports `kvsplice_hf`."""

from kvsplice_hf import LearnedKVSplice, get_kv_cache_size, patch_model_with_kvsplice


__all__ = ["LearnedKVSplice", "get_kv_cache_size", "patch_model_with_kvsplice"]
