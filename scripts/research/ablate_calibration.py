#!/usr/bin/env python
"""What each part of calibration and codec brings: one row per part left out or done otherwise, at the same bytes.

All rows have the same budget and the same evaluation text, which calibration does not see. The last line of stdout is
one JSON object.

    python scripts/research/ablate_calibration.py --evaluation speeches.txt pydoc --calibration novel.txt dictionary.txt
    python scripts/research/ablate_calibration.py --rows default pca tokens-2048
"""

import contextlib
import functools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from rich.table import Table

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
from kvsplice_hf.bench.tables import NOT_FINITE, number
from kvsplice_hf.calibration import allocate, calibrator, collect, fit, solve
from kvsplice_hf.code.levels import GRIDS
from kvsplice_hf.code.projection import LearnedKVSplice
from kvsplice_hf.code.trellis import TrellisCodec
from kvsplice_hf.text import spread_evenly
from kvsplice_hf.training.parameters import splices_of


# Least mean squared error of a unit Gaussian on so many bits, and the largest uniform level over its standard deviation
# (Max, Quantizing for minimum distortion, 1960), by width.
_GAUSSIAN_LOADING = {1: 1.596, 2: 1.991, 3: 2.344, 4: 2.680, 5: 3.010, 6: 3.330, 7: 3.650, 8: 3.960}


@dataclass
class Arguments:
    """What each part of calibration and codec brings."""

    model: str = field(default=DEMO, metadata={"help": 'folder or hub name; "demo": SmolLM2-135M as MLA'})
    budget: float = field(default=154.0, metadata={"help": "bytes per token and layer, with the exact tokens"})
    calibration: list[str] = field(default_factory=lambda: ["pydoc"], metadata={"help": "texts to calibrate on"})
    calibration_tokens: int = field(default=16384, metadata={"help": "tokens to calibrate on, all texts together"})
    evaluation: list[str] = field(default_factory=lambda: ["pydoc"], metadata={"help": "texts to measure on"})
    evaluation_tokens: int = field(default=4096, metadata={"help": "tokens to measure on, per text"})
    window: int = field(default=1024, metadata={"help": "tokens per sequence, in calibration and evaluation"})
    rows: list[str] = field(default_factory=list, metadata={"help": "names of the rows; none: all"})
    dtype: str = field(default="float32", metadata={"help": "dtype of the model"})
    output: str = field(default="results", metadata={"help": "folder for the results"})


@dataclass
class Part:
    """One row of the table.

    Attributes:
        what: what it says in the table.
        changes: settings of `KVSpliceConfig` that differ.
        metric: of the calibration.
        tokens: calibrated on the first so many; 0: all.
        behind_coded_layers: calibrated on what each layer sees once all layers are coded by the default.
        while_collecting, while_fitting: contexts in which that happens.
    """

    what: str
    changes: dict[str, Any] = field(default_factory=dict)
    metric: str = "fisher"
    tokens: int = 0
    behind_coded_layers: bool = False
    while_collecting: Callable[[], Any] = contextlib.nullcontext
    while_fitting: Callable[[], Any] = contextlib.nullcontext


@contextlib.contextmanager
def uniform_levels() -> Iterator[None]:
    """Levels at equal distances, of rows that are rounded."""
    with mock.patch.dict(GRIDS, {width: grid._replace(bend=0.0) for width, grid in GRIDS.items()}):
        yield


@contextlib.contextmanager
def no_gain() -> Iterator[None]:
    """Every token on the same grid."""

    def ones(codes: torch.Tensor) -> torch.Tensor:
        return torch.ones(len(codes), 1, dtype=codes.dtype)

    def without(statistics: Any, solution: Any, allocation: Any, kind: Any) -> Any:
        def make(**values: Any) -> Any:
            return kind(**{**values, "sigmas": torch.empty(0)})

        make.error_ratios = kind.error_ratios  # type: ignore[attr-defined]
        return fit_widths(statistics, solution, allocation, make)  # type: ignore[arg-type]

    fit_widths = fit.fit_widths
    with (
        mock.patch.object(allocate, "gains_of", ones),
        mock.patch.object(calibrator, "fit_widths", without),
        latents_alone(),  # which along a trellis takes a gain
    ):
        yield


@contextlib.contextmanager
def gaussian_steps() -> Iterator[None]:
    """Uniform steps as for a Gaussian, not fitted."""

    def assumed(unit: torch.Tensor, weight: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        scale = _GAUSSIAN_LOADING[width]
        error = (weight * (unit - allocate.quantised(unit / scale, width) * scale).square()).mean(0)
        return torch.full((unit.shape[1],), scale), error

    with (
        uniform_levels(),
        no_gain(),
        mock.patch.object(allocate, "fit_scales", assumed),
        mock.patch.object(fit, "fit_scales", assumed),
    ):
        yield


@contextlib.contextmanager
def same_bits_everywhere(rot_bits: int | None = None) -> Iterator[None]:
    """No water-filling: all coordinates get the same bits as far as the budget goes, the first ones one more.

    Args:
        rot_bits: bits of k_rot; by default as the others.
    """

    def flat(solutions: Any, distortions: Any, budget: float, **more: Any) -> list[Any]:
        return [allocate.Allocation(_flat_widths(solution, budget, rot_bits)) for solution in solutions]

    with mock.patch.object(calibrator, "allocate", flat):
        yield


def _flat_widths(solution: Any, budget: float, rot_bits: int | None) -> torch.Tensor:
    R, n = solution.latent_dim, len(solution.cost)
    widths = torch.zeros(n, dtype=torch.long)
    if rot_bits is not None:
        widths[R:] = rot_bits
    open_to_all = torch.arange(n) < (n if rot_bits is None else R)
    bits = int((budget - 4) * 8) - int(widths.sum())  # planes are rounded up to whole bytes, and there is the gain
    each, rest = divmod(max(bits, 0), int(open_to_all.sum()))
    widths[open_to_all] = min(each, 8)
    widths[: rest if each < 8 else 0] += 1
    return widths


@contextlib.contextmanager
def rot_bits(bits: int) -> Iterator[None]:
    """k_rot on a fixed number of bits, water-filling for the rest."""

    def increments(solution: Any, distortion: Any) -> torch.Tensor:
        per_bit = original(solution, distortion)
        columns = torch.arange(per_bit.shape[1])
        per_bit[solution.latent_dim :] = torch.where(columns < (9 if bits == 16 else bits), torch.inf, 0.0)
        return per_bit

    def capped(tables: Any, budget: float) -> Any:
        for table in tables:
            table.per_bit, table.with_key_gain = table.per_bit.nan_to_num(posinf=_BEYOND), None
        return fill(tables, budget)

    original, fill = allocate.increments, allocate._fill
    with mock.patch.object(allocate, "increments", increments), mock.patch.object(allocate, "_fill", capped):
        yield


_BEYOND = 1e12  # nats per bit


@contextlib.contextmanager
def near_positions() -> Iterator[None]:
    """Keys as they are at the beginning of a text."""
    with mock.patch.object(collect, "_usable_positions", return_value=0):
        yield


@contextlib.contextmanager
def shrinkage(share: float) -> Iterator[None]:
    """Another share of the metric's diagonal."""
    solved = functools.partial(solve.solve_together, shrinkage=share)
    with mock.patch.object(calibrator, "solve_together", solved):
        yield


@contextlib.contextmanager
def narrow_scales() -> Iterator[None]:
    """No coordinate reaches beyond six times its root mean square, as in release 0.2."""
    with mock.patch.object(allocate, "_SCALES", allocate._SCALES[allocate._SCALES <= 6.0]):
        yield


@contextlib.contextmanager
def latents_alone() -> Iterator[None]:
    """Latents are not predicted from their keys."""
    with mock.patch.object(TrellisCodec, "keys_apart", False):
        yield


@contextlib.contextmanager
def key_gain(margin: float) -> Iterator[None]:
    """A gain of their own for the keys of layers where it saves so many times what its bits save elsewhere."""
    with mock.patch.object(allocate, "_GAIN_MARGIN", margin):
        yield


@contextlib.contextmanager
def coded_layers(splices: dict[int, LearnedKVSplice]) -> Iterator[None]:
    """While statistics are collected, layers hand on what the codes of their rows give back; gradients pass through."""

    def coded(collector: Any, site: Any, module: Any, latent: torch.Tensor, k_rot: torch.Tensor) -> Any:
        splice, embeddings = splices[site.layer_idx], collector._embeddings
        with torch.no_grad():
            turns = None if splice.keys is None else splice.keys.turns_of(embeddings)[:, None]
            read = splice.round_trip(latent, k_rot, turns)
        counted = collector._counted[:, None, :, None]  # the first tokens are kept exactly
        parts = zip((latent, k_rot), read, strict=True)
        return expand[type(module)](module, *(exact + (code - exact).detach() * counted for exact, code in parts))

    def record_coded(collector: Any, site: Any, latent: torch.Tensor, k_rot: torch.Tensor) -> Any:
        kind = type(site.module)
        expand.setdefault(kind, kind.expand_kv)
        with mock.patch.object(kind, "expand_kv", functools.partial(coded, collector, site)):
            return record(collector, site, latent, k_rot)

    expand: dict[type, Any] = {}
    record = collect.Collector._record
    with mock.patch.object(collect.Collector, "_record", record_coded):
        yield


PARTS = {
    "default": Part("default: Fisher, global water-filling, gains, bent levels, fitted scales"),
    "no-sinks": Part("first tokens not exact", changes={"sink_tokens": 0}),
    "behind-coded-layers": Part("calibrated on what coded layers before hand on", behind_coded_layers=True),
    "near-positions": Part("keys seen at the first positions only", while_collecting=near_positions),
    "readers": Part("metric: readers (forward passes only)", metric="readers", changes={"allocation": "layer"}),
    "pca": Part("metric: PCA", metric="pca", changes={"allocation": "layer"}),
    "rotated-keys": Part("keys coded after their rotation", changes={"keys": "rotated"}),
    "key-gain": Part("a gain for keys wherever it saves its bits", while_fitting=functools.partial(key_gain, 1.0)),
    "key-gains": Part("a gain for all keys", while_fitting=functools.partial(key_gain, -1e9)),
    "key-blocks-16": Part("keys: bases of 16 x 16", changes={"key_block": 16}),
    "key-blocks-2": Part("keys: bases of 2 x 2", changes={"key_block": 2}),
    "narrow-scales": Part("levels within six deviations", while_fitting=narrow_scales),
    "per-layer": Part("the same bytes for each layer", changes={"allocation": "layer"}),
    "flat": Part("no water-filling: the same bits for all coordinates", while_fitting=same_bits_everywhere),
    "no-gain": Part("no gain per token", while_fitting=no_gain),
    "latents-alone": Part("latents not predicted from their keys", while_fitting=latents_alone),
    "rounded": Part("each coordinate rounded, no trellis", changes={"codec": "rows"}),
    "uniform": Part("rounded, uniform levels, fitted scales", changes={"codec": "rows"}, while_fitting=uniform_levels),
    "gaussian-steps": Part(
        "rounded, uniform steps as for a Gaussian, no gain", changes={"codec": "rows"}, while_fitting=gaussian_steps
    ),
    "rot-8": Part("k_rot on 8 bits", while_fitting=functools.partial(rot_bits, 8)),
    "rot-16": Part("k_rot in bf16", while_fitting=functools.partial(rot_bits, 16)),
    "no-shrinkage": Part("Fisher as measured", while_fitting=functools.partial(shrinkage, 0.0)),
    "shrinkage-0.5": Part("Fisher shrunk by 0.5 to its diagonal", while_fitting=functools.partial(shrinkage, 0.5)),
    "tokens-2048": Part("2048 calibration tokens", tokens=2048),
    "tokens-8192": Part("8192 calibration tokens", tokens=8192),
}


class Ablation(Comparison):
    """The rows of the table, on one model and one text."""

    @functools.cache  # noqa: B019 (lives as long as the script)
    def calibrated(self, metric: str, tokens: int, sinks: int, collecting: Callable[[], Any]) -> KVSpliceCalibrator:
        """A calibration; rows that collect in the same way share it."""
        windows = self.calibration
        if tokens:  # spread over the texts
            windows = spread_evenly(windows, max(1, tokens // windows.shape[1]))
        with collecting():
            return KVSpliceCalibrator(self.model, metric=metric, sink_tokens=sinks).collect(
                list(windows), max_tokens=windows.numel()
            )

    def behind_coded_layers(self, known: KVSpliceCalibrator, config: KVSpliceConfig) -> KVSpliceCalibrator:
        """The same tokens again, while all layers are coded by what was `known`."""
        with ours(self.model, known, config):
            splices = splices_of(self.model)  # which outlive the patch
        again = KVSpliceCalibrator(self.model, metric=known.metric, sink_tokens=config.sink_tokens)
        with coded_layers(splices):
            return again.collect(list(self.calibration), max_tokens=self.calibration.numel())

    def part(self, name: str) -> Row:
        part = PARTS[name]
        config = KVSpliceConfig(bytes_per_token=self.args.budget, **part.changes)
        known = self.calibrated(part.metric, part.tokens, config.sink_tokens, part.while_collecting)
        if part.behind_coded_layers:
            known = self.behind_coded_layers(known, config)
        fresh = KVSpliceCalibrator(self.model, metric=part.metric)  # what is fitted in a context stays in it
        fresh.adopt(known)
        with part.while_fitting(), ours(self.model, fresh, config) as size:
            texts = self.texts(self.plain, name)
        return self.row(name, size, texts, what=part.what)


def table_of(rows: list[Row], texts: list[str]) -> Table:
    table = Table("", "bytes", *(f"{text}: loss" for text in texts), "KL (nats)")
    for row in rows:
        losses = [loss_text(row["texts"][text]) for text in texts]
        divergences = [row["texts"][text]["kl_nats"] for text in texts]
        mean = NOT_FINITE if None in divergences else number(statistics.fmean(divergences), ".5f")
        table.add_row(row["what"], f"{row['bytes_per_token']:.1f}", *losses, mean)
    return table


def main() -> None:
    (args,) = ProgramParser(Arguments).parse_args_into_dataclasses()
    with readable_errors():
        require_known("rows", args.rows, PARTS)
        ablation = Ablation(*load_model(args.model, args.dtype), args)
        rows = [ablation.part(name) for name in args.rows or PARTS]
    console().print(table_of(rows, list(ablation.stock)))
    finish({"results": rows, **environment(args)}, results_folder(args.output, "calibration"))


if __name__ == "__main__":
    main()
