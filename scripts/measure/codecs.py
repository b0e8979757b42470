#!/usr/bin/env python
"""Loss against bytes: other codecs for the rows of a cache beside the one of this package, on the same text.

Every codec reads back whole windows without a cache; the first 4 tokens of each are exact and not counted in the bytes.
On latents of MLA every one but bf16 runs twice, as they are and standardised, and the better result counts; where there
are many windows, the better on some of them runs on all. On ordinary attention they code keys after their rotation and
values, head by head, as they are. The last line of stdout is one JSON object.

    python scripts/measure/codecs.py                                            # SmolLM2-135M as MLA, pydoc
    python scripts/measure/codecs.py --model smollm2                            # SmolLM2-135M as it is
    python scripts/measure/codecs.py --evaluation pydoc book.txt --rivals fp8-g128 int4-g32 --ours 288 184
"""

import functools
import itertools
import json
import math
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.table import Table
from tqdm import tqdm
from transformers import PreTrainedModel

from kvsplice_hf import KVSpliceCalibrator, KVSpliceConfig
from kvsplice_hf.bench.command_line import (
    DEMO,
    ProgramParser,
    console,
    environment,
    finish,
    load_model,
    readable_errors,
    require_known,
    results_folder,
)
from kvsplice_hf.bench.comparison import Comparison, Row, loss_text, ours
from kvsplice_hf.bench.rivals import (
    CACHE_BACKENDS,
    EXACT_TOKENS,
    HEAD_RIVALS,
    RIVALS,
    CacheBackend,
    Rival,
    collect_head_statistics,
    collect_statistics,
    simulated,
    simulated_heads,
)
from kvsplice_hf.errors import ConfigError
from kvsplice_hf.patch.sites import find_sites
from kvsplice_hf.upstream import cache_argument


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


_NAMES = list(dict.fromkeys([*RIVALS, *HEAD_RIVALS, *CACHE_BACKENDS]))
_OURS = "ours"
# Updates per window of a cache of transformers. What it returns at the first one is not coded yet, so that an eighth of
# each window is scored as the stock model: an advantage, but the first one also sets its scales.
_UPDATES = 8
# Windows per text on which the variants of a rival compete; the better one is then measured on all. What lies between
# them is many times the error of so few.
_SCREENED = 3
# Smallest loss in percent that the logarithmic axis shows.
_SMALLEST_DRAWN = 0.01


@dataclass
class Arguments:
    """Loss against bytes of several codecs for the rows of a cache."""

    model: str = field(default=DEMO, metadata={"help": 'folder, hub name, "demo" (SmolLM2 as MLA) or "smollm2"'})
    calibration: list[str] = field(
        default_factory=lambda: ["pydoc"], metadata={"help": "texts whose first half is calibrated on"}
    )
    calibration_tokens: int = field(default=16384, metadata={"help": "tokens to calibrate on, all texts together"})
    evaluation: list[str] = field(
        default_factory=lambda: ["pydoc"], metadata={"help": "texts whose second half is measured on"}
    )
    evaluation_tokens: int = field(default=8192, metadata={"help": "tokens to measure on, per text"})
    window: int = field(default=1024, metadata={"help": "tokens per sequence, in calibration and evaluation"})
    rivals: list[str] = field(
        default_factory=list, metadata={"help": f"any of {', '.join(_NAMES)}; none: all that suit the model"}
    )
    ours: list[float] = field(
        default_factory=lambda: [385.0, 257.0, 193.0, 154.0, 128.0],
        metadata={"help": "budgets of our own codec, bytes per token and layer with the exact tokens; 0: without it"},
    )
    key_blocks: list[int] = field(
        default_factory=lambda: [0],
        metadata={"help": "sizes of our bases of keys, each measured at each budget; 0: whole bases"},
    )
    statistics: list[str] = field(
        default_factory=list,
        metadata={"help": "files of KVSpliceCalibrator.save, to each of which ours is fitted; none: --calibration"},
    )
    dtype: str = field(default="float32", metadata={"help": "dtype of the model"})
    output: str = field(default="results", metadata={"help": "folder for the results"})


class CodecComparison(Comparison):
    """Our codec, its rivals and the caches of transformers, on one model and its texts."""

    args: Arguments

    @functools.cached_property
    def statistics(self) -> dict[Any, Any]:
        """Of latents by layer, or of keys and values by key head."""
        collect = collect_head_statistics if self.has_heads else collect_statistics
        return collect(self.model, tqdm(self.calibration.split(1), desc="calibration", file=sys.stderr))

    @functools.cached_property
    def rivals(self) -> Mapping[str, Rival]:
        """Those that suit the model."""
        return HEAD_RIVALS if self.has_heads else RIVALS

    @property
    def chunk(self) -> int:
        """Tokens per update of a cache of transformers."""
        return math.ceil(self.args.window / _UPDATES)

    def through(self, backend: CacheBackend, window: torch.Tensor) -> torch.Tensor:
        """Logits of a window [T] through a cache of transformers, [T, vocabulary]."""
        cache = backend.make_cache(self.model.config)
        chunks = window[None].to(self.model.device).split(self.chunk, dim=1)
        return torch.cat([self.model(ids, **cache_argument(cache), use_cache=True).logits[0] for ids in chunks])

    def rival(self, rival: Rival) -> Row:
        """The better of the two variants on all windows, with the other on those on which they competed."""
        rival = replace(rival, tokens=self.args.window - EXACT_TOKENS)
        variants = [
            replace(rival, is_standardised=choice)
            for choice in (False, True)
            if not choice or (rival.has_standardised_variant and not self.has_heads)
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
        simulation = simulated_heads if self.has_heads else simulated
        with simulation(self.model, rival, self.statistics):
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

    def ours(self, budget: float, calibration: str, key_block: int = 0) -> Row:
        """Our codec at a budget that counts the exact tokens as well."""
        config = KVSpliceConfig(bytes_per_token=budget, sink_tokens=EXACT_TOKENS, key_block=key_block or None)
        with ours(self.model, self.calibrators[calibration], config) as bytes_per_token:
            texts = self.texts(self.plain, f"{_OURS} {budget:g} {calibration} {key_block or ''}")
        more = {"budget": budget, "calibration": calibration, "key_block": key_block}
        return self.row(_OURS, bytes_per_token, texts, **more)

    def run(self) -> list[Row]:
        """All rows, each told as soon as it is there: the program runs for long, and may not reach its end."""
        names = dict.fromkeys(self.args.rivals or [*self.rivals, *CACHE_BACKENDS])  # each once, in the order given
        budgets = [budget for budget in self.args.ours if budget]
        own = itertools.product(self.calibrators if budgets else (), budgets, self.args.key_blocks)
        rows = [self.told(self.ours(budget, name, key_block)) for name, budget, key_block in own]
        return rows + [self.told(self.named(name)) for name in names]

    def named(self, name: str) -> Row:
        """A rival, or a cache of transformers, by name."""
        return self.rival(self.rivals[name]) if name in self.rivals else self.backend(CACHE_BACKENDS[name])

    @staticmethod
    def told(row: Row) -> Row:
        print(json.dumps(row), file=sys.stderr)
        return row


def mean_loss(texts: dict[str, Row]) -> float:
    """Mean over texts, infinite where one is."""
    losses = [text["loss_percent"] for text in texts.values()]
    return math.inf if None in losses else statistics.fmean(losses)


def table_of(rows: list[Row], texts: list[str]) -> Table:
    """Rows by bytes, those that were skipped below; `*` marks where the standardised variant was the better one."""
    columns = [f"{Path(text).name}: loss" for text in texts]
    notes = ["* latents standardised per channel"] if any(row.get("standardised") for row in rows) else []
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


def require_suited(args: Arguments, model: PreTrainedModel) -> None:
    """Refuse rivals that do not suit the model, before the stock model is scored.

    Raises:
        ConfigError: there is one.
    """
    has_heads = any(site.kv_heads for site in find_sites(model))
    require_known("rivals", args.rivals, [*(HEAD_RIVALS if has_heads else RIVALS), *CACHE_BACKENDS])


def main() -> None:
    (args,) = ProgramParser(Arguments).parse_args_into_dataclasses()
    with readable_errors():
        check(args)
        loaded = load_model(args.model, args.dtype)
        require_suited(args, loaded.model)
        comparison = CodecComparison(*loaded, args)
        rows = comparison.run()
    folder = results_folder(args.output, "codecs")
    draw(rows, list(comparison.stock), folder / "loss_against_bytes.png")
    console().print(table_of(rows, list(comparison.stock)))
    calibrated = {"calibrated_tokens": comparison.calibration.numel(), "exact_tokens": EXACT_TOKENS}
    finish({"results": rows, **calibrated, **environment(args)}, folder)


if __name__ == "__main__":
    main()
