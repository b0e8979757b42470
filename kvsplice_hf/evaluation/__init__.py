"""How good a spliced model still is."""

from kvsplice_hf.evaluation.metrics import (
    TokenKLDivergence,
    TokenPerplexity,
    Top1Agreement,
    WindowScores,
    score_windows,
)


__all__ = ["Top1Agreement", "TokenKLDivergence", "TokenPerplexity", "WindowScores", "score_windows"]
