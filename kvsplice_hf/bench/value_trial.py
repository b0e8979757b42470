"""Pruned, compressed and packed values of one model, on the same windows.

Legend: `P` tokens of a prompt, `C` tokens after it.
"""

import contextlib
import copy
import functools
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import scipy.stats
import torch
from rich.table import Table
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel

from kvsplice_hf import KVSpliceCalibrator, KVSpliceConfig, patch_model_with_kvsplice
from kvsplice_hf.bench import pruned_values
from kvsplice_hf.bench.comparison import Row, loss_text
from kvsplice_hf.bench.expanded_cache import caching_heads, sites_of_heads
from kvsplice_hf.bench.pruned_values import Scores, add_vectors, continued, joined, prefilled, sizes_of
from kvsplice_hf.bench.rounds import interleaved, timed
from kvsplice_hf.bench.tables import NOT_MEASURED, number, with_error
from kvsplice_hf.bench.texts import spread_windows
from kvsplice_hf.code.heads import PartKey
from kvsplice_hf.errors import ConfigError
from kvsplice_hf.geometry import SplinePCA
from kvsplice_hf.patch.state import patched_sites
from kvsplice_hf.upstream import cache_argument
from kvsplice_hf.values import ValuePrunedLayer, ValuePruning
from kvsplice_hf.values.compression import fit_geometries


FULL, V19, V20 = "full", "V19: pruned", "V20, A: pruned, then components"
B = "compress_first"
# Of one turn of a recipe, the first of which does not count.
_STEPS = 4
# Bytes that a coded value and the share of exact tokens take, at least.
_LEAST_VALUE = 8


class Settings(Protocol):
    """What a trial is told; `scripts/research/ablate_values.py` says what each means."""

    prompt: int
    continuation: int
    chunk: int
    keep: int
    first: int
    recent: int
    components: int
    epochs: int
    evaluation: list[str]
    windows: int
    calibration: list[str]
    calibration_windows: int


class Arm(NamedTuple):
    """A row of the table.

    Attributes:
        name: in tables.
        pruning: of values; None: the full model.
        packed: settings of packed rows in its place.
    """

    name: str
    pruning: ValuePruning | None = None
    packed: KVSpliceConfig | None = None

    @property
    def own_prompt(self) -> bool:
        """Whether its prompt computes something else than that of the full model."""
        return self.pruning is None or self.pruning.strategy != "prune_first"


class Trial:
    """One model, its texts and its arms.

    Args:
        model: unpatched.
        tokenizer: of the model.
        args: see `Settings`.
        calibrator: for packed rows; None: without them.

    Raises:
        ConfigError: settings that do not fit together, or a text that is not there.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, args: Settings, calibrator: KVSpliceCalibrator | None
    ) -> None:
        self.model, self.tokenizer, self.args, self.calibrator = model, tokenizer, args, calibrator
        self.sites = sites_of_heads(model)
        self.protocol = pruned_values.Protocol(args.prompt, args.continuation, args.chunk)
        if args.keep > args.prompt:
            raise ConfigError(
                f"--keep is {args.keep} and --prompt {args.prompt}: nothing would be pruned. Lower --keep."
            )
        window = args.prompt + args.continuation
        self.windows = {
            text: spread_windows(tokenizer, text, "evaluation", window, args.windows * window)
            for text in args.evaluation
        }
        self._pruning = ValuePruning(keep=args.keep, first=args.first, recent=args.recent)
        self._packed: dict[str, PreTrainedModel] = {}

    @contextlib.contextmanager
    def pruned(self, pruning: ValuePruning | None) -> Iterator[None]:
        """The model, which caches keys and values of its heads, with pruned values."""
        with contextlib.ExitStack() as stack:
            if pruning is not None:
                stack.enter_context(pruning.on(self.sites))
            stack.enter_context(caching_heads(self.sites))
            yield

    def everything(self) -> ValuePruning:
        """Keeps all values, and says what each token has got of attention."""
        return replace(self._pruning, keep=None, share=1.0)

    def geometries(self) -> dict[str, dict[PartKey, SplinePCA]]:
        """By name: of values that pruning leaves, components alone and behind a spline; of all values."""
        args = self.args
        every: dict[PartKey, list[torch.Tensor]] = {}
        left: dict[PartKey, list[torch.Tensor]] = {}
        for text in args.calibration:
            count = max(1, args.calibration_windows // len(args.calibration))
            windows = spread_windows(self.tokenizer, text, "calibration", args.prompt, count * args.prompt)
            for window in tqdm(windows, desc=f"values of {text}", file=sys.stderr):
                cache = self._prompt(window)
                add_vectors(every, cache)
                add_vectors(left, self._left_of(cache, self._pruning))
        fit = functools.partial(fit_geometries, k=args.components, progress=False)
        found = {"left": fit(joined(left), epochs=0), "all": fit(joined(every), epochs=0)}
        return found | ({"left, spline": fit(joined(left), epochs=args.epochs)} if args.epochs else {})

    @torch.no_grad()
    def _prompt(self, window: torch.Tensor) -> DynamicCache:
        """A cache that holds the prompt of a window with all its values."""
        with self.pruned(self.everything()):
            return prefilled(self.model, window, self.protocol)

    def arms(self) -> list[Arm]:
        """What is measured, but for packed rows."""
        fitted, plain = self.geometries(), self._pruning
        first_and_recent = replace(plain, recent=self.args.keep - self.args.first)
        coded = replace(plain, geometries=fitted["left"])
        arms = [
            Arm(V19, plain),
            Arm("V19 with mean scores", replace(plain, scores="mean")),
            Arm("first and recent tokens alone", first_and_recent),
            Arm(V20, coded),
            Arm("V20, B: components of all, then pruned", replace(plain, geometries=fitted["all"], strategy=B)),
            Arm("components alone", replace(self.everything(), geometries=fitted["all"], strategy=B)),
        ]
        if "left, spline" in fitted:
            spline = replace(coded, geometries=fitted["left, spline"])
            arms.insert(4, Arm("V20, A: pruned, then spline and components", spline))
        return arms

    def packed_arms(self, budgets: Sequence[float], codec: str) -> list[Arm]:
        """Packed rows of so many bytes: both coded, and exact keys where values have room beside them."""
        arms = []
        for budget in budgets:
            settings: dict[str, Any] = {"bytes_per_token": budget, "codec": codec}
            arms.append(Arm(f"packed, {budget:.0f} bytes", packed=KVSpliceConfig(**settings)))
            if budget > self._key_bytes() + _LEAST_VALUE * max(site.kv_heads for site in self.sites):
                exact = KVSpliceConfig(**settings, keys="exact")
                arms.append(Arm(f"packed values, exact keys, {budget:.0f} bytes", packed=exact))
        return arms

    def _key_bytes(self) -> float:
        """Of exact keys in bf16, per token and layer."""
        return statistics.fmean(2 * site.kv_heads * site.qk_rope_head_dim for site in self.sites)

    @torch.no_grad()
    def scores(self, arms: list[Arm]) -> list[Row]:
        """A row of each arm, with its scores on each text."""
        found: dict[str, dict[str, Row]] = {arm.name: {} for arm in arms}
        for text, windows in self.windows.items():
            scores = {arm.name: Scores() for arm in arms}
            for window in tqdm(windows, desc=text, file=sys.stderr):
                self._score_window(arms, window, scores)
            for arm in arms:
                found[arm.name][text] = scores[arm.name].row()
        return [{"name": name, "texts": texts} for name, texts in found.items()]

    def _score_window(self, arms: list[Arm], window: torch.Tensor, scores: dict[str, Scores]) -> None:
        prompt = self._prompt(window)
        with self.pruned(self.everything()):
            full = continued(self.model, window, copy.deepcopy(prompt), self.protocol)
        for arm in arms:
            with self.inside(arm) as model:
                if arm.pruning is None or arm.own_prompt:
                    cache = prefilled(model, window, self.protocol)
                else:
                    cache = self._left_of(prompt, arm.pruning)
                found = continued(model, window, cache, self.protocol)
            scores[arm.name].add(found, full, window[self.args.prompt + 1 :])

    def _left_of(self, prompt: DynamicCache, pruning: ValuePruning) -> DynamicCache:
        """What pruning leaves of the cache of a prompt."""
        cache = copy.deepcopy(prompt)
        for site in self.sites:
            layer = cache.layers[site.layer_idx]
            if isinstance(layer, ValuePrunedLayer):
                layer.prune(pruning.plan_of(site))
        return cache

    def _packed_model(self, arm: Arm) -> Any:
        """Another model on the same weights, patched."""
        if arm.name not in self._packed:
            model: Any = copy.deepcopy(self.model, {id(weight): weight for weight in self.model.parameters()})
            patch_model_with_kvsplice(model, arm.packed, calibration=self.calibrator)
            self._packed[arm.name] = model
        return self._packed[arm.name]

    @torch.no_grad()
    def sizes(self, arms: list[Arm]) -> dict[str, dict[str, float]]:
        """Bytes per token and layer after a prompt, of the tensors of caches with their numbers in bf16."""
        window = next(iter(self.windows.values()))[0]
        with self.pruned(None):
            found = {FULL: sizes_of(prefilled(self.model, window, self.protocol))}
        prompt = self._prompt(window)
        for arm in arms:
            if arm.pruning is not None:
                found[arm.name] = sizes_of(self._left_of(prompt, arm.pruning))
        return found

    def packed_sizes(self, arms: list[Arm]) -> dict[str, dict[str, float]]:
        """Bytes of a packed row, and those of its values where its keys are exact."""
        found = {}
        for arm in arms:
            patched = patched_sites(self._packed_model(arm))
            nbytes = statistics.fmean(state.geometry.nbytes(site.dtype) for site, state in patched)
            found[arm.name] = {"bytes": nbytes}
            if arm.packed is not None and arm.packed.keys == "exact":
                found[arm.name]["value_bytes"] = nbytes - self._key_bytes()
        return found

    @torch.no_grad()
    def step_times(self, arms: list[Arm], rounds: int) -> dict[str, float]:
        """Median seconds of a step of one token behind a prompt, each arm in turn in every round."""
        window = next(iter(self.windows.values()))[0]
        caches: dict[str, Any] = {}
        seconds: dict[str, list[float]] = {arm.name: [] for arm in arms}
        for arm in tqdm(arms, desc="prompts", file=sys.stderr):
            with self.inside(arm) as model:
                caches[arm.name] = prefilled(model, window, self.protocol)
        by_name = {arm.name: arm for arm in arms}
        for turn in interleaved(list(by_name), rounds):
            with self.inside(by_name[turn.name]) as model:
                cache = cache_argument(caches[turn.name])
                step = functools.partial(model, window[None, -1:].to(model.device), use_cache=True, **cache)
                taken = [timed(step, model.device) for _ in range(_STEPS)]
            if turn.counts:
                seconds[turn.name] += taken[1:]
        return {name: statistics.median(found) for name, found in seconds.items()}

    @contextlib.contextmanager
    def inside(self, arm: Arm) -> Iterator[Any]:
        """The model as the arm has it."""
        if arm.packed is not None:
            yield self._packed_model(arm)
            return
        with self.pruned(arm.pruning):
            yield self.model


def table_of(rows: list[Row], texts: list[str]) -> Table:
    """Rows as they come."""
    names = ("", "bytes", "of values", "beside", "step", *(f"{text}: loss" for text in texts))
    table = Table(*names, *(f"{text}: KL" for text in texts))
    for row in rows:
        found = [row["texts"].get(text) for text in texts]
        losses = [NOT_MEASURED if each is None else loss_text(each) for each in found]
        divergences = [NOT_MEASURED if each is None else number(each["kl_nats"], ".4f") for each in found]
        bytes_ = [number(row.get(name), ".1f") for name in ("bytes", "value_bytes", "beside_bytes")]
        step = row.get("step_s")
        table.add_row(row["name"], *bytes_, number(step and 1000 * step, ".1f"), *losses, *divergences)
    return table


def means_of(models: list[list[Row]], texts: list[str]) -> Table:
    """Change of the loss in nats over models, with the half width of its 95 % interval."""
    table = Table("means over models", *(f"{text}: nats" for text in texts))
    for rows in zip(*models, strict=True):
        cells = []
        for text in texts:
            found = [math.log1p(row["texts"][text]["loss_percent"] / 100) for row in rows if text in row["texts"]]
            cells.append(_mean_text(found))
        table.add_row(rows[0]["name"], *cells)
    return table


def _mean_text(values: list[float]) -> str:
    if len(values) < 2:
        return NOT_MEASURED
    spread = statistics.stdev(values) / math.sqrt(len(values))
    half = float(scipy.stats.t.ppf(0.975, len(values) - 1)) * spread
    return with_error(statistics.fmean(values), half, "+.4f")
