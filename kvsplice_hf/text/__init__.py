"""Text to measure and to calibrate on."""

from kvsplice_hf.text.sources import (
    HUB_SETS,
    SOURCES,
    SPLITS,
    cut_windows,
    load_texts,
    looks_like_path,
    spread_evenly,
    stream_hub_texts,
    token_ids,
    token_windows,
)
from kvsplice_hf.text.tokenizers import tokenizer_of


__all__ = [
    "HUB_SETS",
    "SOURCES",
    "SPLITS",
    "cut_windows",
    "load_texts",
    "looks_like_path",
    "spread_evenly",
    "stream_hub_texts",
    "token_ids",
    "token_windows",
    "tokenizer_of",
]
