#!/usr/bin/env python
"""What each step of the conversion to MLA brings, how much P and R matter, and that keeping all is exact.

Every row is a conversion of the same model, measured on the same text, which calibration does not see. The last line of
stdout is one JSON object.

    python scripts/research/ablate_conversion.py                    # SmolLM2-135M, all tables: an hour
    python scripts/research/ablate_conversion.py --model my-llama --tables steps widths
    python scripts/research/ablate_conversion.py --tables lengths --window 4096 --evaluation_tokens 8192
"""

import copy
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.table import Table
from transformers import PreTrainedModel

from kvsplice_hf.bench.command_line import (
    DEMO,
    LoadedModel,
    ProgramParser,
    console,
    environment,
    finish,
    readable_errors,
    results_folder,
)
from kvsplice_hf.bench.conversion import compare, load_original
from kvsplice_hf.bench.tables import with_error
from kvsplice_hf.bench.texts import spread_windows
from kvsplice_hf.convert import convert_to_mla
from kvsplice_hf.convert.rotation import VirtualHeads, choose_slots, closed_form_queries, virtual_heads
from kvsplice_hf.convert.sampling import LayerActivations, activations, capture_inputs
from kvsplice_hf.convert.source import SourceModel, read_source
from kvsplice_hf.convert.target import build_model, layer_weights


TABLES = ("exact", "steps", "widths", "ranks", "lengths")
_GREEDY_TOKENS = 64
_PROMPT = "The capital of France is"
Variant = tuple[str, Callable[[], PreTrainedModel]]


@dataclass
class Arguments:
    """What each step of the conversion to MLA brings."""

    model: str = field(default=DEMO, metadata={"help": 'folder, hub name or GGUF file; "demo": SmolLM2-135M'})
    tables: list[str] = field(default_factory=lambda: list(TABLES), metadata={"help": f"any of {', '.join(TABLES)}"})
    rope_dim: int = field(default=64, metadata={"help": "P of every row but those of `widths`"})
    widths: list[int] = field(default_factory=lambda: [32, 48, 96, 128], metadata={"help": "values of P"})
    ranks: list[int] = field(default_factory=lambda: [257, 193, 129], metadata={"help": "values of kv_lora_rank"})
    calibration_tokens: int = field(default=4096, metadata={"help": "how many tokens to calibrate on"})
    calibration_window: int = field(default=2048, metadata={"help": "tokens per calibration sequence"})
    evaluation_tokens: int = field(default=8192, metadata={"help": "how many tokens to measure on"})
    window: int = field(default=1024, metadata={"help": "tokens per evaluated sequence"})
    output: str = field(default="results", metadata={"help": "folder for the results"})


class Ablation:
    """One model, its calibration text, and the tables of conversions of it."""

    def __init__(self, original: LoadedModel, args: Arguments) -> None:
        self.model, self.tokenizer = original
        self.args = args
        self.calibration = self.windows(args.calibration_window)

    def windows(self, length: int) -> torch.Tensor:
        return spread_windows(self.tokenizer, "pydoc", "calibration", length, self.args.calibration_tokens)

    def convert(self, calibration: torch.Tensor | None = None, **settings: Any) -> PreTrainedModel:
        text = self.calibration if calibration is None else calibration
        return convert_to_mla(self.model, **{"rope_dim": self.args.rope_dim, "calibration": text, **settings})

    def exact(self) -> Iterator[Variant]:
        yield "every rotation kept", lambda: convert_to_mla(self.model, rope_dim="all")

    def steps(self) -> Iterator[Variant]:
        """From the recipe that needs second moments only, one improvement after the other."""
        yield (
            "second moments of keys, mean cosine",
            lambda: self.without_fit(functools.partial(moment_heads, weighed=False)),
        )
        yield "+ complex, weighed by queries", lambda: self.without_fit(functools.partial(moment_heads, weighed=True))
        yield "+ pairs and distances that attention reads", lambda: self.without_fit(virtual_heads)
        yield "+ queries fitted to the logits (convert_to_mla)", self.convert

    def widths(self) -> Iterator[Variant]:
        for width in self.args.widths:
            yield f"P = {width}", lambda width=width: self.convert(rope_dim=width)

    def ranks(self) -> Iterator[Variant]:
        for rank in self.args.ranks:
            yield f"P = {self.args.rope_dim}, R = {rank}", lambda rank=rank: self.convert(kv_lora_rank=rank)

    def lengths(self) -> Iterator[Variant]:
        for length in (512, 1024, 2048, 4096):
            yield f"calibrated on sequences of {length}", lambda n=length: self.convert(calibration=self.windows(n))

    @torch.no_grad()
    def without_fit(self, heads: "HeadMaker") -> PreTrainedModel:
        """The closed form alone: virtual heads of some kind, and queries that read them at their mean turn."""
        source = read_source(self.model)
        inputs = capture_inputs(source, list(self.calibration))
        generator = torch.Generator().manual_seed(0)
        pairs = zip(source.layers, inputs, strict=True)
        virtual = [heads(source, activations(source, layer, hidden), generator) for layer, hidden in pairs]
        slots = choose_slots([layer.cost for layer in virtual], self.args.rope_dim // 2)
        layers = [
            layer_weights(source, layer, closed_form_queries(source, mixed, slots), slots)
            for layer, mixed in zip(source.layers, virtual, strict=True)
        ]
        return build_model(source, layers, slots)


HeadMaker = Callable[[SourceModel, Sequence[LayerActivations], torch.Generator], VirtualHeads]


def moment_heads(
    source: SourceModel, sequences: Sequence[LayerActivations], generator: torch.Generator, weighed: bool
) -> VirtualHeads:
    """Eigenvectors of the keys' second moment per frequency; distances are weighed by 1 / (distance + 1).

    Args:
        source: the model.
        sequences: activations of a layer.
        generator: not needed.
        weighed: take complex moments, with key heads weighed by the energy of their queries; otherwise real ones, so
            that the eigenvectors are the same for both members of a pair.
    """
    keys = torch.cat([sequence.keys for sequence in sequences]).to(torch.complex128)  # [T, G, F]
    queries = torch.cat([sequence.queries for sequence in sequences]).abs().double() ** 2
    energy = queries.mean(0).view(source.num_key_heads, -1, len(source.inv_freq)).sum(1).T  # [F, G]
    moment = torch.einsum("tgf,tkf->fgk", keys, keys.conj()) / len(keys)
    metric = energy if weighed else torch.ones_like(energy)
    moment = moment if weighed else moment.real.to(moment)
    root = metric.sqrt()
    values, vectors = torch.linalg.eigh(root[:, :, None] * moment * root[:, None, :])
    values, vectors = values.flip(-1), vectors.flip(-1)
    if not weighed:
        values = values * torch.einsum("fg,fgv->fv", energy, vectors.abs() ** 2)
    distance = torch.arange(len(sequences[0].keys), dtype=torch.float64)
    weight = 1 / (distance + 1)
    cosine = ((distance[:, None] * source.inv_freq.double()).cos() * weight[:, None]).sum(0) / weight.sum()
    return VirtualHeads(
        mix=vectors.mH * root[:, None, :],
        unmix=vectors / root[:, :, None],
        cost=values * (1 - cosine**2)[:, None],
        mean_turn=cosine.to(torch.complex128).expand(source.num_heads, -1),
    )


@torch.no_grad()
def exactness(original: LoadedModel, converted: PreTrainedModel, window: torch.Tensor) -> dict[str, Any]:
    """Greatest difference of the logits, their greatest size, and whether greedy text is identical."""
    ids = window[None].to(original.model.device)
    before, after = original.model(ids).logits, converted(ids).logits
    prompt = original.tokenizer(_PROMPT, return_tensors="pt").to(original.model.device)
    settings: dict[str, Any] = {"max_new_tokens": _GREEDY_TOKENS, "min_new_tokens": _GREEDY_TOKENS, "do_sample": False}
    texts = [model.generate(**prompt, **settings) for model in (original.model, converted)]
    in_bf16 = {
        name: kl_nats(full.float(), copy.deepcopy(model).to(torch.bfloat16)(ids).logits.float())
        for name, model, full in (("original", original.model, before), ("converted", converted, after))
    }
    return {
        "bf16_kl_to_fp32_nats": in_bf16,
        "largest_logit_difference": (before - after).abs().max().item(),
        "largest_logit": before.abs().max().item(),
        "greedy_text_identical": torch.equal(*texts),
        "greedy_tokens": _GREEDY_TOKENS,
        "greedy_text": original.tokenizer.decode(texts[1][0]),
    }


def kl_nats(logits: torch.Tensor, other: torch.Tensor) -> float:
    """Mean divergence per token of logits [1, T, vocabulary]."""
    log_p, log_q = logits[0].log_softmax(-1), other[0].log_softmax(-1)
    return torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True).item()


def run(args: Arguments) -> dict[str, Any]:
    original = load_original(args.model, "float32")
    ablation = Ablation(original, args)
    windows = spread_windows(original.tokenizer, "pydoc", "evaluation", args.window, args.evaluation_tokens)
    report: dict[str, Any] = {}
    for table in args.tables:
        report[table] = []
        for name, make in getattr(ablation, table)():
            start, cpu_start = time.perf_counter(), time.process_time()
            converted = make()
            row = {"name": name, "conversion_s": time.perf_counter() - start}
            row |= {"conversion_cpu_s": time.process_time() - cpu_start, "kv_lora_rank": converted.config.kv_lora_rank}
            row |= compare(original.model, converted, windows)
            if table == "exact":
                row |= exactness(original, converted, windows[0])
            report[table].append(row)
            print(f"{table}: {name}: {row['perplexity_change_percent']:+.2f} %", file=sys.stderr)
    return report


def table_of(name: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(name, "R", "perplexity", "original", "change", "KL (nats)", "conversion")
    for row in rows:
        table.add_row(
            row["name"],
            str(row["kv_lora_rank"]),
            f"{row['perplexity_after']:.3f}",
            f"{row['perplexity_before']:.3f}",
            with_error(row["perplexity_change_percent"], row["perplexity_change_stderr_percent"], "+.3f") + " %",
            f"{row['kl_nats']:.5f}",
            f"{row['conversion_s']:.0f} s",
        )
    return table


def main() -> None:
    (args,) = ProgramParser(Arguments).parse_args_into_dataclasses()
    unknown = sorted(set(args.tables) - set(TABLES))
    if unknown:
        sys.exit(f"--tables has {', '.join(unknown)}; it takes {', '.join(TABLES)}.")
    with readable_errors():
        report = run(args)
    for name, rows in report.items():
        console().print(table_of(name, rows))
    finish(report | environment(args), results_folder(args.output, "conversion"))


if __name__ == "__main__":
    main()
