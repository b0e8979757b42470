"""Windows of text to calibrate and to measure on."""

from typing import Any

import torch

from kvsplice_hf.text import load_texts, spread_evenly, token_windows


def spread_windows(tokenizer: Any, source: str, split: str, window: int, tokens: int) -> torch.Tensor:
    """About `tokens` tokens in windows that lie evenly over one half of a text, int64 [windows, window]."""
    windows = token_windows(tokenizer, load_texts(source, split), window)
    return spread_evenly(windows, max(1, tokens // window))
