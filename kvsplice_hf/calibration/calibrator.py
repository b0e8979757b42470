"""`KVSpliceCalibrator`: collect statistics once, fit any number of budgets to them."""

import hashlib
import logging
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

from torch import nn
from tqdm import tqdm

from kvsplice_hf.cache.turns import SLOT_DTYPE
from kvsplice_hf.calibration.allocate import Distortion, allocate, measure_distortion, smallest_row
from kvsplice_hf.calibration.collect import METRICS, Batch, Collector, has_images, usable_metric
from kvsplice_hf.calibration.data import as_batches, share_of_process
from kvsplice_hf.calibration.fingerprint import model_fingerprint, same_model
from kvsplice_hf.calibration.fit import LayerFit, fit_codec, fit_rank, fit_widths
from kvsplice_hf.calibration.holdout import split_holdout
from kvsplice_hf.calibration.report import CalibrationReport, report_of
from kvsplice_hf.calibration.solve import KindOfRows, LayerSolution, solve_together
from kvsplice_hf.calibration.statistics import (
    Statistics,
    join_across_processes,
    load_statistics,
    merge_across_processes,
    save_statistics,
)
from kvsplice_hf.code.codecs import codec_class
from kvsplice_hf.code.heads import PartKey, layer_of
from kvsplice_hf.code.keys import TURN_DTYPE
from kvsplice_hf.config import KVSpliceConfig
from kvsplice_hf.errors import CalibrationError, ConfigError
from kvsplice_hf.patch.families import AttentionSite
from kvsplice_hf.patch.sites import find_sites
from kvsplice_hf.weights.processes import failing_together, gathered, process_count, process_rank
from kvsplice_hf.weights.sharding import is_spread


logger = logging.getLogger(__name__)
_Parts = list[PartKey]

# A rank needs more tokens than dimensions for its covariance to have that rank at all; a few times more to be any good.
_TOKENS_PER_DIMENSION = 4


class KVSpliceCalibrator:
    """Collects what calibration needs to know of a model, and fits splices of any budget to it.

    Args:
        model: an unpatched model that can be patched; it is run as it is.
        metric: "fisher" (what predictions depend on; forward and backward passes), "readers" (what the layer's weights
            and queries read; forward passes) or "pca" (size alone). Where gradients cannot pass the layers of a
            quantised model, another one is taken instead of "fisher", with a warning.
        layer_pattern, sink_tokens: see `KVSpliceConfig`.
        seed: of the sampled labels and rows.
        count_images: whether tokens that stand for parts of images, videos or sound are counted. Where they are not,
            the model reads them all the same, and codes are fitted to text alone.

    Raises:
        NotMLAError: the model has no layer that can be patched.
        ConfigError: an unknown metric.

    Examples:
        >>> calibrator = KVSpliceCalibrator(model).collect(texts, tokenizer=tokenizer, max_tokens=16_384)
        >>> calibrator.save("statistics.safetensors")
        >>> patch_model_with_kvsplice(model, bytes_per_token=193, calibration=calibrator)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        metric: str = "fisher",
        layer_pattern: str | None = None,
        sink_tokens: int = 4,
        seed: int = 0,
        count_images: bool = True,
    ) -> None:
        if metric not in METRICS:
            raise ConfigError(f"`metric` is {metric!r}; it must be one of {', '.join(map(repr, METRICS))}.")
        metric = usable_metric(model, metric, layer_pattern)
        self.metric, self.layer_pattern = metric, layer_pattern
        self.sink_tokens: int | None = sink_tokens
        self._collector: Collector | None = Collector(model, metric, layer_pattern, sink_tokens, seed, count_images)
        self.statistics: Statistics = self._collector.statistics
        self._fingerprint = ""
        # Sequences that nothing is fitted to.
        self.holdout: list[Batch] = []
        # By layer, and whether keys may be coded before their rotation.
        self._solutions: dict[tuple[PartKey, KindOfRows], LayerSolution] = {}
        self._distortions: dict[tuple[PartKey, KindOfRows], Distortion] = {}

    def collect(
        self,
        data: Any,
        *,
        tokenizer: Any = None,
        max_tokens: int = 16_384,
        window: int = 512,
        holdout: int | None = None,
        progress: bool = True,
    ) -> Self:
        """Run the model over `data` and add up statistics; may be called several times.

        Under `torch.distributed` (accelerate launch) every process takes its share, and all end up with the sum. Where
        the model itself is spread over processes (tensor parallelism, FSDP), all run it together, on the same text,
        which must be given to each.

        Args:
            data: see `kvsplice_hf.calibration.data.as_batches`: token ids, texts, a data set, or a name or path.
            tokenizer: needed unless `data` are tokens.
            max_tokens: how many tokens to use.
            window: tokens per sequence of texts; fewer where the model has fewer positions.
            holdout: sequences that nothing is fitted to and that the choice between allocations is checked on; by
                default two, or none of fewer than 24.
            progress: show a progress bar.

        Raises:
            CalibrationError: the data cannot be used, or the model's numbers on them are not finite.
        """
        if self._collector is None:
            raise CalibrationError("These statistics were loaded from a file; collecting more needs a new calibrator.")
        window = min(window, self._collector.max_positions or window)
        with failing_together():  # all take part below
            batches = as_batches(data, tokenizer, max_tokens, window, self._collector.media)
        self.collect_batches(batches, progress, holdout)
        return self

    def collect_batches(self, batches: list[Batch], progress: bool = True, holdout: int | None = None) -> None:
        """Run the model over token batches."""
        assert self._collector is not None
        _ = self.fingerprint  # of the weights as they are now
        rank, size, spread = process_rank(), process_count(), is_spread(self._collector.model.modules())
        before = self._collector.statistics
        if size > 1:  # what all processes know already must be counted once
            self._collector.reset_statistics()
        if spread:
            _require_same_text(batches)
        batches, held_out = split_holdout(batches, holdout)
        self.holdout += held_out
        self._collector.run(batches if spread else share_of_process(batches, rank, size), progress and rank == 0)
        if size > 1:
            join = join_across_processes if spread else merge_across_processes
            total = join(self._collector.statistics)
            for layer_idx, layer in before.items():
                total[layer_idx].merge(layer)
            self._collector.statistics = total
        self.statistics = self._collector.statistics
        self._solutions.clear()
        self._distortions.clear()

    @property
    def fingerprint(self) -> str:
        """Of the model that the statistics are of; see `fingerprint`. Taken before the first token is counted."""
        if not self._fingerprint and self._collector is not None:
            self._fingerprint = model_fingerprint(self._collector.model, self._collector.sites)
        return self._fingerprint

    @property
    def tokens(self) -> int:
        """Calibration tokens seen so far (sinks left out)."""
        return int(max(float(layer.count) for layer in self.statistics.values()))

    def save(self, path: str | Path) -> None:
        """Write the statistics as safetensors.

        Sequences that were held out are kept as token ids, those with images not at all.
        """
        note = {"metric": self.metric, "fingerprint": self.fingerprint}
        if self.sink_tokens is not None:
            note["sink_tokens"] = str(self.sink_tokens)
        save_statistics(
            self.statistics, path, note, [batch["input_ids"] for batch in self.holdout if not has_images(batch)]
        )

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None) -> Self:
        """Read a file of `save`.

        Args:
            path: the file.
            model: if given, the statistics must be of this model.

        Raises:
            CalibrationError: the file is missing or damaged, or its statistics are of another model.
        """
        statistics, held_out, note = load_statistics(path)
        self = cls.__new__(cls)
        self.metric, self._fingerprint = note.get("metric", "fisher"), note.get("fingerprint", "")
        self.statistics, self._collector = statistics, None
        self.layer_pattern = None
        self.sink_tokens = int(note["sink_tokens"]) if "sink_tokens" in note else None  # not known before 0.2
        self._solutions, self._distortions = {}, {}
        self.holdout = [{"input_ids": ids} for ids in held_out]
        if model is not None:
            self.require_model([site for site in find_sites(model) if site.stores_latent], model)
        return self

    def adopt(self, other: "KVSpliceCalibrator") -> None:
        """Take over the statistics of another calibrator of the same model."""
        self.statistics, self.holdout = other.statistics, other.holdout
        if self._collector is not None:
            self._collector.statistics = other.statistics
        self._solutions.clear()
        self._distortions.clear()

    def require_model(self, sites: list[AttentionSite], model: nn.Module) -> None:
        """Refuse statistics of another model, and warn where only the weights are others (another checkpoint).

        Args:
            sites: the layers of `model` that statistics are needed of.
            model: the model to be patched.

        Raises:
            CalibrationError: layers or sizes differ.
        """
        for site, part in [(one, part) for one in sites for part in one.all_parts]:
            layer = self.statistics.get(part)
            if layer is None:
                raise CalibrationError(
                    f"The calibration holds layers {_named(self.statistics)}, but not {part} ({site.name}). "
                    "It is of another model: calibrate this one."
                )
            if (layer.latent_dim, layer.rope_dim) != (site.kv_lora_rank, site.qk_rope_head_dim):
                raise CalibrationError(
                    f"The calibration of layer {part} is for rows of {layer.latent_dim} + {layer.rope_dim} "
                    f"numbers, {site.name} has {site.kv_lora_rank} + {site.qk_rope_head_dim}. It is of another model: "
                    "calibrate this one."
                )
        if not same_model(self.fingerprint, model_fingerprint(model, sites)):
            logger.warning(
                "The calibration is of a model of the same shape with other weights. The splice will fit that model: "
                "calibrate this one, unless one was tuned from the other."
            )

    def fit(
        self, config: KVSpliceConfig, layers: list[PartKey] | None = None
    ) -> tuple[dict[PartKey, LayerFit], CalibrationReport]:
        """Splices of the given layers, or of their key heads, for the budget of `config`.

        Raises:
            CalibrationError: too few tokens for the rank, or statistics that nothing can be fitted to.
            ConfigError: the budget is below the smallest row.
        """
        chosen = sorted(self.statistics) if layers is None else layers
        if self.sink_tokens is not None and self.sink_tokens != config.sink_tokens:
            logger.warning(
                "The statistics leave out the first %d tokens of each sequence, the splice is to keep %d exactly "
                "(sink_tokens). Codes of tokens that were left out lose more. Calibrate with the same number.",
                self.sink_tokens,
                config.sink_tokens,
            )
        for layer_idx in chosen:
            self.statistics[layer_idx].check(f"layer {layer_idx}")
        of_rows = KindOfRows.of(config)
        solutions = [self._solution(layer_idx, of_rows) for layer_idx in chosen]
        fit = self._fit_ranks
        if config.is_packed:
            fit = self._fit_bytes if codec_class(config.codec).fitted_together else self._fit_codecs
        fits = fit(config, chosen, solutions)
        return dict(zip(chosen, fits, strict=True)), report_of(chosen, solutions, fits)

    def solution(self, layer_idx: PartKey, config: KVSpliceConfig) -> LayerSolution:
        """The best basis of a layer for rows of this kind.

        Raises:
            CalibrationError: the layer was not calibrated, or nothing can be fitted to its statistics.
        """
        if layer_idx not in self.statistics:
            raise CalibrationError(
                f"The calibration holds layers {sorted(self.statistics)}, but not {layer_idx}. It is of another model: "
                "calibrate this one."
            )
        self.statistics[layer_idx].check(f"layer {layer_idx}")
        return self._solution(layer_idx, KindOfRows.of(config))

    def _solution(self, layer_idx: PartKey, of_rows: KindOfRows) -> LayerSolution:
        key = layer_idx, of_rows
        if key not in self._solutions:
            parts = [part for part in self.statistics if layer_of(part) == layer_of(layer_idx)]
            found = solve_together([self.statistics[part] for part in parts], self.metric, rows=of_rows)
            self._solutions |= {(part, of_rows): solution for part, solution in zip(parts, found, strict=True)}
        return self._solutions[key]

    def _distortion(self, layer_idx: PartKey, of_rows: KindOfRows) -> Distortion:
        key = layer_idx, of_rows
        if key not in self._distortions:
            self._distortions[key] = measure_distortion(self._solution(layer_idx, of_rows))
        return self._distortions[key]

    def _fit_ranks(self, config: KVSpliceConfig, chosen: _Parts, solutions: list[LayerSolution]) -> list[LayerFit]:
        fits = []
        for layer_idx, solution in zip(chosen, solutions, strict=True):
            rank = config.rank_for(solution.latent_dim, f"layer {layer_idx}")
            self._require_tokens(rank)
            fits.append(fit_rank(self.statistics[layer_idx], solution, rank))
        return fits

    def _fit_bytes(self, config: KVSpliceConfig, chosen: _Parts, solutions: list[LayerSolution]) -> list[LayerFit]:
        self._require_tokens(max(solution.latent_dim for solution in solutions))
        budget = _part_budget(config, chosen, solutions)
        progress = tqdm(chosen, desc="measuring codes", file=sys.stderr, disable=len(chosen) < 8)
        distortions = [self._distortion(layer_idx, KindOfRows.of(config)) for layer_idx in progress]
        kind: Any = codec_class(config.codec)
        layers = [layer_of(part) for part in chosen] if config.allocation == "layer" else None
        found = allocate(solutions, distortions, budget, kind=kind, layers=layers)
        parts = zip(chosen, solutions, found, strict=True)
        return [fit_widths(self.statistics[layer_idx], solution, bits, kind) for layer_idx, solution, bits in parts]

    def _fit_codecs(self, config: KVSpliceConfig, chosen: _Parts, solutions: list[LayerSolution]) -> list[LayerFit]:
        self._require_tokens(max(solution.latent_dim for solution in solutions))
        kind = codec_class(config.codec)
        return [
            fit_codec(
                self.statistics[layer_idx],
                solution,
                kind,
                config.row_budget(len(solution.cost), _shared_bytes(solutions, len(solutions))),
                f"layer {layer_idx}",
            )
            for layer_idx, solution in zip(chosen, solutions, strict=True)
        ]

    def _require_tokens(self, rank: int) -> None:
        needed = _TOKENS_PER_DIMENSION * rank
        if self.tokens < needed:
            raise CalibrationError(
                f"The calibration saw {self.tokens} tokens; {rank} dimensions need {needed} at least, and 8,000 to "
                "20,000 to be good. Give more text or a higher `max_tokens`."
            )


def _require_same_text(batches: Sequence[Batch]) -> None:
    """Refuse that processes that run one model together are given different tokens.

    Raises:
        CalibrationError: they are; in all of them.
    """
    digest = hashlib.sha256()
    for batch in batches:
        for name, tensor in sorted(batch.items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.flatten().tolist()}".encode())
    if len(set(gathered(digest.hexdigest()))) > 1:
        raise CalibrationError(
            "The processes that run this model together were given different calibration text. Give each of them the "
            "same: where a model is spread over processes, they share its layers and not the text."
        )


def calibrate(
    model: nn.Module,
    data: Any,
    *,
    tokenizer: Any = None,
    metric: str = "fisher",
    max_tokens: int = 16_384,
    window: int = 512,
    holdout: int | None = None,
    count_images: bool = True,
) -> KVSpliceCalibrator:
    """Run an unpatched model over `data`, and remember what fitting a splice of any budget needs.

    In short for `KVSpliceCalibrator(model, metric=metric, count_images=count_images).collect(data, ...)`, where the
    arguments are described.

    Raises:
        NotMLAError: the model has no layer that can be patched.
        ConfigError: an unknown metric.
        CalibrationError: the data cannot be used, or the model's numbers on them are not finite.

    Examples:
        >>> statistics = calibrate(model, texts, tokenizer=tokenizer)
        >>> patch_model_with_kvsplice(model, bytes_per_token=193, calibration=statistics)
    """
    calibrator = KVSpliceCalibrator(model, metric=metric, count_images=count_images)
    return calibrator.collect(data, tokenizer=tokenizer, max_tokens=max_tokens, window=window, holdout=holdout)


def _part_budget(config: KVSpliceConfig, chosen: Sequence[PartKey], solutions: Sequence[LayerSolution]) -> float:
    """Bytes of the rows of a part on average: of a layer, or of one of its key heads."""
    dims: dict[int, int] = {}
    smallest: dict[int, int] = {}
    for part, solution in zip(chosen, solutions, strict=True):
        layer = layer_of(part)
        dims[layer] = dims.get(layer, 0) + len(solution.cost)
        smallest[layer] = smallest.get(layer, 0) + smallest_row(solution)
    least = max(smallest.values()) if config.allocation == "layer" else sum(smallest.values()) / len(smallest)
    shared = _shared_bytes(solutions, len(dims))
    return config.row_budget(max(dims.values()), shared, least) * len(dims) / len(solutions)


def _shared_bytes(solutions: Sequence[LayerSolution], layers: int) -> float:
    """Bytes per token and layer, for one sequence, of how its keys were rotated: an angle per pair, and a slot."""
    sizes = [TURN_DTYPE.itemsize * solution.rope_dim // 2 for solution in solutions if solution.pairs is not None]
    return (max(sizes) + SLOT_DTYPE.itemsize) / layers if sizes else 0.0


def _named(parts: Iterable[PartKey]) -> list[int]:
    return sorted({layer_of(part) for part in parts})
