"""Variants of one model on the same texts: loss of each beside the bytes that a row of its cache takes."""

import contextlib
import functools
import statistics
import sys
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from kvsplice_hf import KVSpliceCalibrator, KVSpliceConfig, patch_model_with_kvsplice, unpatch_model
from kvsplice_hf.bench.rivals import RIVALS, CacheBackend, Rival
from kvsplice_hf.bench.texts import spread_windows
from kvsplice_hf.evaluation.reference import Forward, score_against, score_reference
from kvsplice_hf.patch.families import AttentionSite
from kvsplice_hf.patch.sites import find_sites
from kvsplice_hf.patch.state import patched_sites


Row = dict[str, Any]


class TextArguments(Protocol):
    """Settings of a comparison.

    Attributes:
        calibration: texts whose first half is calibrated on.
        calibration_tokens: of all of them together.
        evaluation: texts whose second half is measured on.
        evaluation_tokens: of each.
        window: tokens per sequence.
    """

    calibration: list[str]
    calibration_tokens: int
    evaluation: list[str]
    evaluation_tokens: int
    window: int


@contextlib.contextmanager
def ours(model: PreTrainedModel, calibrator: KVSpliceCalibrator, config: KVSpliceConfig) -> Iterator[float]:
    """Our own codec; inside the context the model's rows are coded, after it everything is as before.

    Args:
        model: an unpatched model.
        calibrator: of that model.
        config: with a budget of bytes.

    Yields:
        The bytes that a row takes per token, averaged over layers.
    """
    patch_model_with_kvsplice(model, config, calibration=calibrator)
    try:
        yield statistics.fmean(patched.geometry.nbytes(site.dtype) for site, patched in patched_sites(model))
    finally:
        unpatch_model(model)


class Comparison:
    """One model, the tokens it is calibrated on, and the texts that the stock model has been scored on.

    Attributes:
        calibration: token ids, int64 [W, T].
        stock: scores of the stock model by text.

    Raises:
        ConfigError: a text is unknown, or shorter than a window.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, args: TextArguments) -> None:
        self.model, self.tokenizer, self.args = model, tokenizer, args
        share = args.calibration_tokens // len(args.calibration)
        parts = [spread_windows(tokenizer, text, "calibration", args.window, share) for text in args.calibration]
        self.calibration = torch.cat(parts)
        self.stock = {
            text: score_reference(
                self.plain,
                spread_windows(tokenizer, text, "evaluation", args.window, args.evaluation_tokens),
                f"stock: {text}",
            )
            for text in dict.fromkeys(args.evaluation)
        }

    def plain(self, window: torch.Tensor) -> torch.Tensor:
        """Logits of a window [T] without a cache, [T, vocabulary]."""
        return self.model(window[None].to(self.model.device), use_cache=False).logits[0]

    def texts(self, forward: Forward, label: str, windows: int = sys.maxsize) -> dict[str, Row]:
        """Scores on so many windows of each text."""
        return {
            text: score_against(forward, stock.some(windows), f"{label}: {text}") for text, stock in self.stock.items()
        }

    def bytes_of(self, codec: Rival | CacheBackend) -> float:
        """Per token and layer, averaged over layers, which may differ in size."""
        return statistics.fmean(_bytes_at(site, codec) for site in find_sites(self.model) if site.stores_latent)

    @functools.cached_property
    def has_heads(self) -> bool:
        """Whether the model has ordinary attention, whose rows are keys and values of heads."""
        return any(site.kv_heads for site in find_sites(self.model))

    def row(self, name: str, bytes_per_token: float, texts: dict[str, Row], **more: Any) -> Row:
        """A row of the table; bytes beside those of bf16."""
        ratio = bytes_per_token / self.bytes_of(RIVALS["bf16"])
        return {"name": name, "bytes_per_token": bytes_per_token, "bytes_ratio": ratio, "texts": texts, **more}


def _bytes_at(site: AttentionSite, codec: Rival | CacheBackend) -> float:
    if site.kv_heads and isinstance(codec, Rival):
        return codec.heads_bytes(site.kv_heads, site.qk_rope_head_dim, site.kv_lora_rank)
    heads = max(site.kv_heads, 1)
    return codec.bytes_per_token(heads * site.kv_lora_rank, heads * site.qk_rope_head_dim)


def loss_text(row: Row) -> str:
    """The loss on one text as tables show it, with its standard error where there is one."""
    if row["loss_percent"] is None:
        return "not finite"
    stderr = row["loss_stderr_percent"]
    return f"{row['loss_percent']:+.3f}" + ("" if stderr is None else f" ± {stderr:.3f}") + " %"
