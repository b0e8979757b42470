"""Windows of text to calibrate and to measure on."""

from typing import Any

import torch

from kvsplice_hf.text import load_texts, spread_evenly, token_windows


def spread_windows(tokenizer: Any, source: str, split: str, window: int, tokens: int) -> torch.Tensor:
    """Windows that lie evenly over one half of a text, token ids, int64 [W, T].

    Args:
        tokenizer: of the model.
        source: name of a text, file or folder.
        split: "calibration" or "evaluation", the halves of the text.
        window: tokens of a window, T.
        tokens: about so many in all windows together.

    Raises:
        ConfigError: there is no such text, or it is shorter than one window.
    """
    windows = token_windows(tokenizer, load_texts(source, split), window)
    return spread_evenly(windows, max(1, tokens // window))
