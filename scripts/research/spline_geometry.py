#!/usr/bin/env python
"""Does bending each number by a spline before principal components help? Squared errors, and perplexity.

Latents of MLA, or values (or keys before their rotation) of each key head, of the calibration text are fitted to; those
of the evaluation text are measured on, and the model reads through both geometries. Errors are means over layers and
heads of the squared error over the variance: on vectors that each fit held out of its own text, and on those of the
other texts. The table says how many geometries kept a spline, and how many are worse than components alone on the other
texts, by more than rounding. The last line of stdout is one JSON object.

    python scripts/research/spline_geometry.py --model smollm2 --components 8 16 32 64
    python scripts/research/spline_geometry.py --time_size 64 --components 16
"""

import contextlib
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.table import Table
from tqdm import tqdm

from kvsplice_hf import KVSpliceConfig, patch_model_with_kvsplice, unpatch_model
from kvsplice_hf.bench.command_line import (
    DEMO,
    ProgramParser,
    console,
    environment,
    finish,
    load_model,
    readable_errors,
    results_folder,
)
from kvsplice_hf.bench.comparison import Comparison, Row, loss_text
from kvsplice_hf.bench.tables import number
from kvsplice_hf.bench.texts import spread_windows
from kvsplice_hf.bench.through_geometry import through_geometries
from kvsplice_hf.calibration.fingerprint import model_fingerprint
from kvsplice_hf.calibration.geometries import ModelGeometry
from kvsplice_hf.calibration.key_geometries import KeyGeometry, fit_key_geometries, pairing_of
from kvsplice_hf.calibration.vectors import Sample, collect_samples, collect_vectors
from kvsplice_hf.code.heads import PartKey, layer_of
from kvsplice_hf.errors import ConfigError
from kvsplice_hf.geometry import SplinePCA
from kvsplice_hf.geometry.spline_pca import Fitted
from kvsplice_hf.patch.sites import find_sites


# Geometries that kept no spline are those of components alone; what differs by less is rounding.
_WORSE = 1 + 1e-5
Fit = tuple[Mapping[PartKey, SplinePCA], Mapping[PartKey, Fitted], contextlib.AbstractContextManager[None]]


@dataclass
class Arguments:
    """Does bending each number by a spline before principal components help?"""

    model: str = field(default=DEMO, metadata={"help": 'folder, hub name, "demo" (SmolLM2 as MLA) or "smollm2"'})
    calibration: list[str] = field(
        default_factory=lambda: ["pydoc"], metadata={"help": "texts whose first half is fitted to"}
    )
    calibration_tokens: int = field(default=16384, metadata={"help": "tokens to run over, all texts together"})
    evaluation: list[str] = field(
        default_factory=lambda: ["pydoc"], metadata={"help": "texts whose second half is measured on"}
    )
    evaluation_tokens: int = field(default=4096, metadata={"help": "tokens to measure on, per text"})
    window: int = field(default=1024, metadata={"help": "tokens per sequence, in calibration and evaluation"})
    components: list[int] = field(default_factory=lambda: [8, 16, 32, 64], metadata={"help": "k, one row each"})
    knots: int = field(default=7, metadata={"help": "of each spline"})
    epochs: int = field(default=8, metadata={"help": "passes over the vectors"})
    learning_rate: float = field(default=2e-3, metadata={"help": "of the splines"})
    max_samples: int = field(default=120_000, metadata={"help": "vectors of each layer or head"})
    vectors: str = field(
        default="heads",
        metadata={"help": "of ordinary attention: values by key head (heads) or by layer (layers), or keys (keys)"},
    )
    layers: list[int] = field(default_factory=list, metadata={"help": "cache layer indices; none: all"})
    time_size: int = field(
        default=0,
        metadata={"help": "only time fits to so many vectors of this many numbers, drawn at random; 0: do not"},
    )
    perplexity: bool = field(default=True, metadata={"help": "measure it as well, where all layers are fitted"})
    dtype: str = field(default="float32", metadata={"help": "dtype of the model"})
    output: str = field(default="results", metadata={"help": "folder for the results"})

    def __post_init__(self) -> None:
        if not self.components or min(self.components) < 1:
            raise ConfigError(f"--components is {self.components}; it takes numbers of 1 or more.")
        if self.vectors not in ("heads", "layers", "keys"):
            raise ConfigError(f"--vectors is {self.vectors!r}; it takes heads, layers or keys.")


def relative_error(geometry: SplinePCA, vectors: torch.Tensor) -> float:
    """Squared error over the variance."""
    return float((geometry(vectors) - vectors).square().mean() / vectors.var(dim=0, correction=0).mean())


class Trial(Comparison):
    """One model, its vectors, and geometries of different sizes fitted to them."""

    args: Arguments

    def vectors(self, windows: torch.Tensor) -> dict[PartKey, torch.Tensor]:
        """Of the layers that are looked at."""
        found = collect_vectors(
            self.model,
            list(windows.split(1)),
            max_samples=self.args.max_samples,
            max_batches=1024,
            of=self.args.vectors,
        )
        layers = self.args.layers
        return {part: rows for part, rows in found.items() if not layers or getattr(part, "layer_idx", part) in layers}

    def held_out(self) -> dict[PartKey, torch.Tensor]:
        """Vectors of the evaluation texts."""
        texts = [
            spread_windows(self.tokenizer, text, "evaluation", self.args.window, self.args.evaluation_tokens)
            for text in dict.fromkeys(self.args.evaluation)
        ]
        return self.vectors(torch.cat(texts))

    def fitted(self, training: Any, k: int, epochs: int) -> Fit:
        """Geometries, what their fits found, and a context in which the model reads through them."""
        settings = {"knots": self.args.knots, "learning_rate": self.args.learning_rate}
        found = ModelGeometry.fit(training, k, "", epochs=epochs, **settings)
        return found, found.reports, through_geometries(self.model, found)

    def measured(self, name: str, k: int, epochs: int, training: Any, held_out: Any) -> Row:
        """One row of the table."""
        start = time.perf_counter()
        geometries, reports, through = self.fitted(training, k, epochs)
        seconds = (time.perf_counter() - start) / len(geometries)
        errors = {str(part): relative_error(geometries[part], rows) for part, rows in held_out.items()}
        row = {"name": name, "k": k, "error": statistics.fmean(errors.values()), "errors": errors, "fit_s": seconds}
        variances = {part: float(rows.var(dim=0, correction=0).mean()) for part, rows in training.items()}
        fits = [report.spline / variances[part] for part, report in reports.items()]
        row |= {"error_of_fit": statistics.fmean(fits), "texts": None}
        row |= {"parts": len(fits), "bent": sum(report.epoch > 0 for report in reports.values())}
        if self.args.perplexity and not self.args.layers:
            with torch.no_grad(), through:
                row["texts"] = self.texts(self.plain, f"{name}, k = {k}")
        errors = f"squared error {row['error_of_fit']:.5f} held out of the fit, {row['error']:.5f} on other texts"
        tqdm.write(f"{name}, k = {k}: {errors}", file=sys.stderr)
        return row

    def run(self) -> list[Row]:
        training, held_out = self.vectors(self.calibration), self.held_out()
        size = min(rows.shape[1] for rows in training.values())
        if max(self.args.components) > size:
            raise ConfigError(f"--components is {self.args.components}, and vectors have {size} numbers.")
        rows = [
            self.measured(name, k, epochs, training, held_out)
            for k in self.args.components
            for name, epochs in (("PCA", 0), ("spline, PCA", self.args.epochs))
        ]
        for alone, bent in zip(rows[::2], rows[1::2], strict=True):
            bent["worse"] = sum(error > _WORSE * alone["errors"][part] for part, error in bent["errors"].items())
        return rows


class KeyTrial(Trial):
    """The same of keys before their rotation, read through a patch that keeps values whole, in bf16."""

    def __init__(self, *args: Any) -> None:
        self.samples: dict[PartKey, Sample] = {}
        self.pairing = 0
        super().__init__(*args)

    def vectors(self, windows: torch.Tensor) -> dict[PartKey, torch.Tensor]:
        """See `Trial.vectors`. The first ones say how the model pairs the numbers of its keys."""
        settings = {"max_samples": self.args.max_samples, "max_batches": 1024}
        found = collect_samples(self.model, list(windows.split(1)), with_keys=True, **settings)
        keys = {part: sample.keys for part, sample in found.items() if sample.keys is not None}
        if not self.samples:
            self.samples, self.pairing = found, pairing_of(keys, min(self.args.components))
        layers = self.args.layers
        chosen = {part: sample for part, sample in keys.items() if not layers or layer_of(part) in layers}
        return {part: sample.before_rotation(self.pairing) for part, sample in chosen.items()}

    def fitted(self, training: Any, k: int, epochs: int) -> Fit:
        """See `Trial.fitted`."""
        settings = {"knots": self.args.knots, "learning_rate": self.args.learning_rate}
        keys = {part: self.samples[part].keys for part in training}
        found, reports = fit_key_geometries(keys, k, epochs=epochs, **settings)
        return {part: key.geometry for part, key in found.items()}, reports, self.through(found, k)

    @contextlib.contextmanager
    def through(self, keys: dict[PartKey, KeyGeometry], k: int) -> Iterator[None]:
        """A patched model, unpatched afterwards."""
        values = {part: sample.vectors for part, sample in self.samples.items()}
        size = next(iter(values.values())).shape[1]
        fingerprint = model_fingerprint(self.model, find_sites(self.model))
        whole = ModelGeometry.fit(values, size, fingerprint, knots=self.args.knots, epochs=0, progress=False, keys=keys)
        config = KVSpliceConfig(transform="spline", rank=size, key_rank=k, knots=self.args.knots)
        patch_model_with_kvsplice(self.model, config, calibration=whole)
        try:
            yield
        finally:
            unpatch_model(self.model)


def table_of(rows: list[Row], texts: list[str]) -> Table:
    """Rows as they come, components alone above those behind a spline."""
    columns = ("geometry", "k", "held out of the fit", "other texts", "bent", "worse there", "seconds of a fit")
    table = Table(*columns, *(f"{text}: loss" for text in texts))
    for row in rows:
        losses = ["not measured" if row["texts"] is None else loss_text(row["texts"][text]) for text in texts]
        bent = f"{row['bent']} of {row['parts']}"
        errors = f"{row['error_of_fit']:.5f}", f"{row['error']:.5f}"
        table.add_row(
            row["name"], str(row["k"]), *errors, bent, str(row.get("worse", "")), number(row["fit_s"]), *losses
        )
    return table


def timed(args: Arguments, k: int) -> Row:
    """Seconds of one fit to random vectors, each number bent, so that splines have something to do."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(args.max_samples, args.time_size, generator=generator).sinh()
    start = time.perf_counter()
    SplinePCA(k, args.knots).fit(vectors, epochs=args.epochs, learning_rate=args.learning_rate)
    return {"k": k, "vectors": list(vectors.shape), "fit_s": time.perf_counter() - start}


def run(args: Arguments) -> list[Row]:
    """All rows."""
    if args.time_size:
        rows = [timed(args, k) for k in args.components]
        table = Table("vectors", "k", "seconds of a fit")
        for row in rows:
            table.add_row(" x ".join(map(str, row["vectors"])), str(row["k"]), number(row["fit_s"]))
        console().print(table)
        return rows
    model, tokenizer = load_model(args.model, args.dtype)
    rows = (KeyTrial if args.vectors == "keys" else Trial)(model, tokenizer, args).run()
    console().print(table_of(rows, list(dict.fromkeys(args.evaluation))))
    return rows


def main() -> None:
    with readable_errors():
        (args,) = ProgramParser(Arguments).parse_args_into_dataclasses()
        folder = results_folder(args.output, "spline_geometry")
        finish({"rows": run(args), **environment(args)}, folder)


if __name__ == "__main__":
    main()
