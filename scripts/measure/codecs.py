#!/usr/bin/env python
"""Loss against bytes: other codecs for the rows of an MLA cache beside the one of this package, on the same text.

Every codec reads back whole windows without a cache; the first 4 tokens of each are exact and not counted in the bytes.
Every one but bf16 runs twice, on latents as they are and on standardised ones, and the better result counts; where
there are many windows, the better on some of them runs on all. The last line of stdout is one JSON object.

    python scripts/measure/codecs.py                                            # SmolLM2-135M as MLA, pydoc
    python scripts/measure/codecs.py --evaluation pydoc book.txt --rivals fp8-g128 int4-g32 --ours 288 184
"""

import contextlib
import functools
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
from convert_to_mla import spread_windows
from rich.table import Table
from tqdm import tqdm
from transformers import HfArgumentParser, PreTrainedModel

from kvsplice_hf import KVSpliceCalibrator, KVSpliceConfig, patch_model_with_kvsplice, unpatch_model
from kvsplice_hf.bench.command_line import (
    DEMO,
    console,
    environment,
    finish,
    load_model,
    readable_errors,
    require_known,
    results_folder,
)
from kvsplice_hf.bench.rivals import (
    CACHE_BACKENDS,
    EXACT_TOKENS,
    RIVALS,
    CacheBackend,
    LayerStatistics,
    Rival,
    collect_statistics,
    simulated,
)
from kvsplice_hf.errors import ConfigError
from kvsplice_hf.patch.layers import find_mla_sites
from kvsplice_hf.patch.state import patched_sites
from kvsplice_hf.upstream import cache_argument


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


_NAMES = [*RIVALS, *CACHE_BACKENDS]
_OURS = "ours"
# Most likely tokens of the stock model whose probabilities are kept; all others count as one token in the divergence.
_TOP_TOKENS = 64
# Updates per window of a cache of transformers. What it returns at the first one is not coded yet, so that an eighth of
# each window is scored as the stock model: an advantage, but the first one also sets its scales.
_UPDATES = 8
# Windows per text on which the variants of a rival compete; the better one is then measured on all. What lies between
# them is many times the error of so few.
_SCREENED = 3
# Smallest loss in percent that the logarithmic axis shows.
_SMALLEST_DRAWN = 0.01

Forward = Callable[[torch.Tensor], torch.Tensor]
Row = dict[str, Any]


@dataclass
class Arguments:
    """Loss against bytes of several codecs for the rows of an MLA cache."""

    model: str = field(default=DEMO, metadata={"help": 'folder or hub name; "demo": SmolLM2-135M as MLA'})
    calibration: list[str] = field(
        default_factory=lambda: ["pydoc"], metadata={"help": "texts whose first half is calibrated on"}
    )
    calibration_tokens: int = field(default=16384, metadata={"help": "tokens to calibrate on, all texts together"})
    evaluation: list[str] = field(
        default_factory=lambda: ["pydoc"], metadata={"help": "texts whose second half is measured on"}
    )
    evaluation_tokens: int = field(default=8192, metadata={"help": "tokens to measure on, per text"})
    window: int = field(default=1024, metadata={"help": "tokens per sequence, in calibration and evaluation"})
    rivals: list[str] = field(default_factory=lambda: list(_NAMES), metadata={"help": f"any of {', '.join(_NAMES)}"})
    ours: list[float] = field(
        default_factory=lambda: [385.0, 257.0, 193.0, 154.0, 128.0],
        metadata={"help": "budgets of our own codec, bytes per token and layer with the exact tokens"},
    )
    statistics: list[str] = field(
        default_factory=list,
        metadata={"help": "files of KVSpliceCalibrator.save, to each of which ours is fitted; none: --calibration"},
    )
    dtype: str = field(default="float32", metadata={"help": "dtype of the model"})
    output: str = field(default="results", metadata={"help": "folder for the results"})


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


@dataclass
class StockScores:
    """What is kept of the stock model on one text: enough for perplexity, and for divergence over its likely tokens.

    Attributes:
        windows: token ids, [W, T].
        nll: negative log-likelihoods of the tokens after the first, nats, [W, T - 1].
        top: log-probabilities of the most likely tokens at each place, [W, T - 1, K].
        tokens: which tokens these are, [W, T - 1, K].
    """

    windows: torch.Tensor
    nll: torch.Tensor
    top: torch.Tensor
    tokens: torch.Tensor

    def some(self, count: int) -> "StockScores":
        """Of windows spread over the text."""
        every = len(self.windows) // count
        parts = (self.windows, self.nll, self.top, self.tokens)
        return StockScores(*(part[::every][:count] for part in parts)) if every > 1 else self


@torch.no_grad()
def score_stock(forward: Forward, windows: torch.Tensor, text: str) -> StockScores:
    nll, top, tokens = [], [], []
    for window in tqdm(windows, desc=f"stock: {text}", file=sys.stderr):
        log_probabilities = _log_probabilities(forward, window)
        best = log_probabilities.topk(min(_TOP_TOKENS, log_probabilities.shape[-1]), dim=-1)
        nll.append(_nll(log_probabilities, window))
        top.append(best.values.cpu())
        tokens.append(best.indices.int().cpu())
    return StockScores(windows, *map(torch.stack, (nll, top, tokens)))


@torch.no_grad()
def score(forward: Forward, stock: StockScores, label: str) -> Row:
    """Perplexity of a codec beside that of the stock model on one text, with divergence and agreement."""
    nll, divergence, agrees = [], [], []
    for window, top, tokens in tqdm(
        zip(stock.windows, stock.top, stock.tokens, strict=True), label, len(stock.windows), file=sys.stderr
    ):
        log_probabilities = _log_probabilities(forward, window)
        nll.append(_nll(log_probabilities, window))
        indices = tokens.long().to(log_probabilities.device)
        divergence.append(lumped_divergence(top, log_probabilities.gather(-1, indices).cpu()).mean())
        agrees.append((log_probabilities.argmax(-1) == indices[:, 0]).double().mean())
    row = loss_of(torch.stack(nll), stock.nll)
    row["kl_nats"] = _finite(torch.stack(divergence).mean().item())
    row["top1_agreement"] = torch.stack(agrees).mean().item()
    return row


def _log_probabilities(forward: Forward, window: torch.Tensor) -> torch.Tensor:
    """Of the tokens after each but the last of a window [T], [T - 1, vocabulary]."""
    return forward(window)[:-1].float().log_softmax(-1)


def _nll(log_probabilities: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
    targets = window[1:, None].to(log_probabilities.device)
    return -log_probabilities.gather(-1, targets)[:, 0].double().cpu()


def lumped_divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) in nats from log-probabilities [..., K] of some tokens, all others taken as one token: [...].

    Never above the divergence over the whole vocabulary.
    """
    p, q = p.double(), q.double()
    known = (p.exp() * (p - q)).sum(-1)
    # Where the known tokens hold all the probability, rounding may leave a remainder just below 0.
    rest_p, rest_q = ((1 - side.exp().sum(-1)).clamp_min(1e-12) for side in (p, q))
    return known + rest_p * (rest_p / rest_q).log()


def loss_of(nll: torch.Tensor, stock: torch.Tensor) -> Row:
    """Change of the perplexity in percent, and its standard error from the windows' differences (None for one).

    Args:
        nll: of the codec, [W, T - 1].
        stock: of the stock model, the same windows.
    """
    change = (nll - stock).mean(1)
    factor = change.mean().exp()
    stderr = 100 * (factor * change.std() / math.sqrt(len(change))).item() if len(change) > 1 else None
    return {
        "perplexity": _finite(nll.mean().exp().item()),
        "stock_perplexity": stock.mean().exp().item(),
        "loss_percent": _finite(100 * change.mean().expm1().item()),
        "loss_stderr_percent": _finite(stderr),
        "windows": len(change),
    }


def _finite(value: float | None) -> float | None:
    """JSON has neither NaN nor infinity."""
    return value if value is not None and math.isfinite(value) else None


class Comparison:
    """One model, its calibration, and the texts that the stock model has been scored on."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, args: Arguments) -> None:
        self.model, self.tokenizer, self.args = model, tokenizer, args
        share = args.calibration_tokens // len(args.calibration)
        parts = [spread_windows(tokenizer, text, "calibration", args.window, share) for text in args.calibration]
        self.calibration = torch.cat(parts)
        self.stock = {
            text: score_stock(
                self.plain, spread_windows(tokenizer, text, "evaluation", args.window, args.evaluation_tokens), text
            )
            for text in dict.fromkeys(args.evaluation)
        }

    @functools.cached_property
    def statistics(self) -> dict[int, LayerStatistics]:
        return collect_statistics(self.model, tqdm(self.calibration.split(1), desc="calibration", file=sys.stderr))

    def plain(self, window: torch.Tensor) -> torch.Tensor:
        """Logits of a window [T] without a cache, [T, vocabulary]."""
        return self.model(window[None].to(self.model.device), use_cache=False).logits[0]

    @property
    def chunk(self) -> int:
        """Tokens per update of a cache of transformers."""
        return math.ceil(self.args.window / _UPDATES)

    def through(self, backend: CacheBackend, window: torch.Tensor) -> torch.Tensor:
        """Logits of a window [T] through a cache of transformers, [T, vocabulary]."""
        cache = backend.make_cache(self.model.config)
        chunks = window[None].to(self.model.device).split(self.chunk, dim=1)
        return torch.cat([self.model(ids, **cache_argument(cache), use_cache=True).logits[0] for ids in chunks])

    def texts(self, forward: Forward, label: str, windows: int = sys.maxsize) -> dict[str, Row]:
        """Scores on so many windows of each text."""
        return {text: score(forward, stock.some(windows), f"{label}: {text}") for text, stock in self.stock.items()}

    def bytes_of(self, codec: Rival | CacheBackend) -> float:
        """Per token and layer, averaged over layers, which may differ in size."""
        sites = [site for site in find_mla_sites(self.model) if site.stores_latent]
        return statistics.fmean(codec.bytes_per_token(site.kv_lora_rank, site.qk_rope_head_dim) for site in sites)

    def row(self, name: str, bytes_per_token: float, texts: dict[str, Row], **more: Any) -> Row:
        ratio = bytes_per_token / self.bytes_of(RIVALS["bf16"])
        return {"name": name, "bytes_per_token": bytes_per_token, "bytes_ratio": ratio, "texts": texts, **more}

    def rival(self, rival: Rival) -> Row:
        """The better of the two variants on all windows, with the other on those on which they competed."""
        rival = replace(rival, tokens=self.args.window - EXACT_TOKENS)
        variants = [
            replace(rival, is_standardised=choice)
            for choice in (False, True)
            if not choice or rival.has_standardised_variant
        ]
        if len(variants) == 1:
            return self.row(
                rival.name, self.bytes_of(rival), self.read_back(rival), standardised=False, other_variant=None
            )
        screened = [(self.read_back(variant, _SCREENED), variant) for variant in variants]
        (texts, best), (loser_texts, loser) = sorted(screened, key=lambda pair: mean_loss(pair[0]))
        if any(len(stock.some(_SCREENED).windows) < len(stock.windows) for stock in self.stock.values()):
            texts = self.read_back(best)
        other = {"standardised": loser.is_standardised, "texts": loser_texts}
        return self.row(rival.name, self.bytes_of(rival), texts, standardised=best.is_standardised, other_variant=other)

    def read_back(self, rival: Rival, windows: int = sys.maxsize) -> dict[str, Row]:
        with simulated(self.model, rival, self.statistics):
            return self.texts(self.plain, rival.name + "*" * rival.is_standardised, windows)

    def backend(self, backend: CacheBackend) -> Row:
        reason = backend.why_not()
        if reason is not None:
            return {"name": backend.name, "skipped": reason}
        texts = self.texts(functools.partial(self.through, backend), backend.name)
        return self.row(backend.name, self.bytes_of(backend), texts, chunk=self.chunk)

    @functools.cached_property
    def calibrators(self) -> dict[str, KVSpliceCalibrator]:
        """Ours, by name: from the statistics that are given, or calibrated on the same tokens as the rivals."""
        if self.args.statistics:
            return {Path(path).stem: KVSpliceCalibrator.load(path, self.model) for path in self.args.statistics}
        calibrator = KVSpliceCalibrator(self.model, sink_tokens=EXACT_TOKENS)
        return {"": calibrator.collect(list(self.calibration))}

    def ours(self, budget: float, calibration: str) -> Row:
        """Our codec at a budget that counts the exact tokens as well."""
        config = KVSpliceConfig(bytes_per_token=budget, sink_tokens=EXACT_TOKENS)
        with ours(self.model, self.calibrators[calibration], config) as bytes_per_token:
            texts = self.texts(self.plain, f"{_OURS} {budget:g} {calibration}")
        return self.row(_OURS, bytes_per_token, texts, budget=budget, calibration=calibration)

    def run(self) -> list[Row]:
        names = dict.fromkeys(self.args.rivals)  # each once, in the order given
        rows = [
            self.ours(budget, name)
            for name in (self.calibrators if self.args.ours else ())
            for budget in self.args.ours
        ]
        rows += [self.rival(RIVALS[name]) for name in names if name in RIVALS]
        return rows + [self.backend(CACHE_BACKENDS[name]) for name in names if name in CACHE_BACKENDS]


def mean_loss(texts: dict[str, Row]) -> float:
    """Mean over texts, infinite where one is."""
    losses = [text["loss_percent"] for text in texts.values()]
    return math.inf if None in losses else statistics.fmean(losses)


def table_of(rows: list[Row], texts: list[str]) -> Table:
    """Rows by bytes, those that were skipped below; `*` marks where the standardised variant was the better one."""
    columns = [f"{Path(text).name}: loss" for text in texts]
    notes = ["* latents standardised per channel"]
    notes += [f"{row['name']}: skipped. {row['skipped']}" for row in rows if "skipped" in row]
    table = Table("codec", "bytes", "of stock", *columns, "KL (nats)", caption="\n".join(notes), caption_justify="left")
    measured = [row for row in rows if "skipped" not in row]
    for row in sorted(measured, key=lambda row: -row["bytes_per_token"]):
        divergences = [row["texts"][text]["kl_nats"] for text in texts]
        table.add_row(
            f"{row['name']} {row.get('calibration', '')}" + "*" * row.get("standardised", False),
            f"{row['bytes_per_token']:.0f}",
            f"{row['bytes_ratio']:.3f}x",
            *(loss_text(row["texts"][text]) for text in texts),
            "not finite" if None in divergences else f"{statistics.fmean(divergences):.5f}",
        )
    return table


def loss_text(row: Row) -> str:
    if row["loss_percent"] is None:
        return "not finite"
    stderr = row["loss_stderr_percent"]
    return f"{row['loss_percent']:+.3f}" + ("" if stderr is None else f" ± {stderr:.3f}") + " %"


def draw(rows: list[Row], texts: list[str], path: Path) -> None:
    """Loss against bytes, a panel per text. What is too small for the axis, or a gain, lies on its lower edge."""
    figure, panels = plt.subplots(
        1, len(texts), figsize=(6.5 * len(texts), 5), sharey=True, squeeze=False, constrained_layout=True
    )
    for axes, text in zip(panels[0], texts, strict=True):
        points = [
            (row["name"], row["bytes_per_token"], max(row["texts"][text]["loss_percent"], _SMALLEST_DRAWN))
            for row in rows
            if "skipped" not in row and row["texts"][text]["loss_percent"] is not None
        ]
        own = sorted(point[1:] for point in points if point[0] == _OURS)
        others = [point for point in points if point[0] != _OURS]
        axes.scatter([x for _, x, _ in others], [y for _, _, y in others], color="tab:grey", s=18, label="others")
        for name, x, y in others:
            axes.annotate(name, (x, y), fontsize=6, xytext=(3, 3), textcoords="offset points")
        if own:
            axes.plot(*zip(*own, strict=True), marker="o", color="tab:red", label=_OURS)
            axes.legend()
        axes.set(xlabel="bytes per token and layer", title=Path(text).name, yscale="log")
    panels[0, 0].set_ylabel("increase of perplexity, %")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def check(args: Arguments) -> None:
    """Say what is wrong before a model is loaded.

    Raises:
        ConfigError: the window is too short, or there is no such rival.
    """
    require_known("rivals", args.rivals, _NAMES)
    if args.window < EXACT_TOKENS + 2:
        raise ConfigError(f"--window is {args.window}; the first {EXACT_TOKENS} tokens are exact, so it needs more.")


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    with readable_errors():
        check(args)
        comparison = Comparison(*load_model(args.model, args.dtype), args)
        rows = comparison.run()
    folder = results_folder(args.output, "codecs")
    draw(rows, list(comparison.stock), folder / "loss_against_bytes.png")
    console().print(table_of(rows, list(comparison.stock)))
    calibrated = {"calibrated_tokens": comparison.calibration.numel(), "exact_tokens": EXACT_TOKENS}
    finish({"results": rows, **calibrated, **environment(args)}, folder)


if __name__ == "__main__":
    main()
