#!/usr/bin/env python
"""Passkey retrieval: does the spliced model still find a number that was said once, far back in the context?

A prompt is prose with one sentence that names a random five-digit key at a given depth, and ends in a question for
that key. Original and spliced read the same prompts from one process and one set of weights, through the cache and in
chunks, so that the key has to come out of the (spliced) cache.

By default the key is not generated: it is appended, and counts if every token of it is the most likely one, which is
exact match of greedy decoding at the price of one prefill (`kvsplice_hf.evaluation.retrieval` says why). `--generate`
decodes with `model.generate` as well, counts its answers, and reports how often the two verdicts differ. The last
line of stdout is one JSON object.

    python scripts/measure/retrieval.py                        # SmolLM2-135M as MLA
    python scripts/measure/retrieval.py --lengths 512,1024 --depths 0.1,0.5,0.9 --samples 2 --compression-ratio 0.9
"""

import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import matplotlib
from rich.table import Table
from tqdm import tqdm
from transformers import PreTrainedModel

from kvsplice_hf import get_kv_cache_size
from kvsplice_hf.bench.command_line import (
    DEMO,
    Budget,
    ProgramParser,
    console,
    environment,
    finish,
    load_model,
    readable_errors,
    results_folder,
    splice,
)
from kvsplice_hf.bench.paired import mcnemar_p, paired_interval
from kvsplice_hf.errors import ConfigError
from kvsplice_hf.evaluation.retrieval import NEEDLE, QUESTION, PromptMaker, Trial, compare
from kvsplice_hf.text import load_texts


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


# Documents to cut the prose from. Some of the named sets are streams of billions of tokens.
FILLER_DOCUMENTS = 2000
NumberT = TypeVar("NumberT", int, float)


@dataclass
class Arguments(Budget):
    """Passkey retrieval of a model with and without the splice, through the cache."""

    model: str = field(default=DEMO, metadata={"help": 'folder, hub name, "demo" (SmolLM2 as MLA) or "smollm2"'})
    lengths: str = field(default="512,1024,2048", metadata={"help": "tokens of prompt and key, comma-separated"})
    depths: str = field(
        default="0.1,0.3,0.5,0.7,0.9", metadata={"help": "share of the prose ahead of the key, comma-separated"}
    )
    samples: int = field(default=4, metadata={"help": "prompts per length and depth"})
    dataset: str = field(
        default="pydoc", metadata={"help": "prose: pydoc, wikitext, fineweb-edu, tinystories, c4, file, folder"}
    )
    needle: str = field(default=NEEDLE, metadata={"help": "sentence that tells the key, written {key}"})
    question: str = field(default=QUESTION, metadata={"help": "end of the prompt; its last word is the answer, {key}"})
    chunk: int = field(default=128, metadata={"help": "tokens per forward through the cache"})
    generate: bool = field(default=False, metadata={"help": "count what model.generate answers (slower)"})
    seed: int = field(default=0, metadata={"help": "seed of keys and prose"})
    dtype: str = field(default="float32", metadata={"help": "dtype of the model"})
    output: str = field(default="results", metadata={"help": "folder for the results"})


def numbers(text: str, kind: type[NumberT], name: str) -> list[NumberT]:
    """The distinct comma-separated numbers of an argument, ascending.

    Raises:
        ConfigError: a part is no number of that kind.
    """
    try:
        return sorted({kind(part) for part in text.split(",")})
    except ValueError as error:
        raise ConfigError(f"`{name}` is {text!r}; it must be numbers separated by commas.") from error


def check_settings(lengths: list[int], depths: list[float], args: Arguments) -> None:
    """Raises ConfigError for settings that no model could run with."""
    if min(lengths) < 1:
        raise ConfigError(f"`lengths` has {min(lengths)}; a length is at least 1 token.")
    if min(depths) < 0 or max(depths) > 1:
        raise ConfigError(f"`depths` is {args.depths!r}; a depth is a share between 0 and 1.")
    for name in ("samples", "chunk"):
        if getattr(args, name) < 1:
            raise ConfigError(f"`{name}` is {getattr(args, name)}; it must be at least 1.")


def check_window(model: PreTrainedModel, lengths: list[int]) -> None:
    """Raises ConfigError for a length that the model's positions do not reach."""
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if window is not None and max(lengths) > window:
        raise ConfigError(
            f"`lengths` has {max(lengths)}, more than max_position_embeddings = {window} of this model. Give lengths "
            f"up to {window}."
        )


def summarise(trials: list[Trial]) -> dict[str, Any]:
    """Accuracies, their difference in points with its interval, and mean log-probabilities of some trials."""
    count = len(trials)
    original = [trial.original.correct for trial in trials]
    spliced = [trial.spliced.correct for trial in trials]
    lost = sum(o and not s for o, s in zip(original, spliced, strict=True))
    won = sum(s and not o for o, s in zip(original, spliced, strict=True))
    return {
        "samples": count,
        "original_accuracy": sum(original) / count,
        "spliced_accuracy": sum(spliced) / count,
        "difference_points": 100 * (won - lost) / count,
        "interval_points": [100 * limit for limit in paired_interval(lost, won, count)],
        "lost": lost,
        "won": won,
        "mcnemar_p": mcnemar_p(lost, won),
        "original_logprob": statistics.fmean(trial.original.logprob for trial in trials),
        "spliced_logprob": statistics.fmean(trial.spliced.logprob for trial in trials),
    }


def grouped(trials: list[Trial], **keys: Callable[[Trial], float]) -> list[dict[str, Any]]:
    """One summary for each combination of the keys' values, ascending."""
    groups: dict[tuple[float, ...], list[Trial]] = {}
    for trial in trials:
        groups.setdefault(tuple(key(trial) for key in keys.values()), []).append(trial)
    return [dict(zip(keys, values, strict=True)) | summarise(groups[values]) for values in sorted(groups)]


def report_of(trials: list[Trial]) -> dict[str, Any]:
    """Summaries per cell, per length, per depth and over all."""

    def length(trial: Trial) -> int:
        return trial.prompt.length

    def depth(trial: Trial) -> float:
        return trial.prompt.depth

    report: dict[str, Any] = {"results": grouped(trials, length=length, depth=depth)}
    report |= {"by_length": grouped(trials, length=length), "by_depth": grouped(trials, depth=depth)}
    report["overall"] = summarise(trials)
    verdicts = [verdict for trial in trials for verdict in (trial.original, trial.spliced)]
    generated = any(verdict.generated is not None for verdict in verdicts)
    report["scoring"] = "generate" if generated else "teacher_forced"
    if generated:
        report["verdicts"] = len(verdicts)
        report["verdicts_that_differ"] = sum(verdict.generated != verdict.teacher_forced for verdict in verdicts)
    return report


def table_of(report: dict[str, Any]) -> Table:
    """Each length's depths, then the length as a whole."""
    columns = ("length", "depth", "prompts", "original", "spliced", "difference (95 %)", "McNemar p", "log-prob (nats)")
    table = Table(*columns)
    for whole in report["by_length"]:
        for cell in report["results"]:
            if cell["length"] == whole["length"]:
                table.add_row(f"{cell['length']}", f"{cell['depth']:g}", *cells_of(cell))
        table.add_row(f"{whole['length']}", "all", *cells_of(whole), end_section=True)
    for row in report["by_depth"]:
        table.add_row("all", f"{row['depth']:g}", *cells_of(row))
    table.add_row("all", "all", *cells_of(report["overall"]))
    return table


def cells_of(row: dict[str, Any]) -> list[str]:
    low, high = row["interval_points"]
    return [
        f"{row['samples']}",
        f"{row['original_accuracy']:.0%}",
        f"{row['spliced_accuracy']:.0%}",
        f"{row['difference_points']:+.0f} points ({low:+.0f} to {high:+.0f})",
        f"{row['mcnemar_p']:.3g}",
        f"{row['original_logprob']:.2f} -> {row['spliced_logprob']:.2f}",
    ]


def draw_heat_maps(report: dict[str, Any], path: Path) -> None:
    """Accuracy over length and depth, original beside spliced."""
    lengths = [row["length"] for row in report["by_length"]]
    depths = [row["depth"] for row in report["by_depth"]]
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True, constrained_layout=True)
    for name, axes in zip(("original", "spliced"), panels, strict=True):
        shares = {(row["depth"], row["length"]): row[f"{name}_accuracy"] for row in report["results"]}
        image = axes.imshow([[shares[d, n] for n in lengths] for d in depths], vmin=0, vmax=1, aspect="auto")
        for (y, d), (x, n) in itertools.product(enumerate(depths), enumerate(lengths)):
            axes.text(x, y, f"{shares[d, n]:.0%}", ha="center", va="center", color="w" if shares[d, n] < 0.5 else "k")
        axes.set(title=f"{name}: {report['overall'][f'{name}_accuracy']:.0%}", xlabel="length (tokens)")
        axes.set_xticks(range(len(lengths)), lengths)
        axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    panels[0].set_ylabel("depth of the key")
    figure.colorbar(image, ax=panels, label="keys found")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def run(args: Arguments) -> dict[str, Any]:
    lengths, depths = numbers(args.lengths, int, "lengths"), numbers(args.depths, float, "depths")
    check_settings(lengths, depths, args)
    model, tokenizer = load_model(args.model, args.dtype)
    check_window(model, lengths)
    texts = load_texts(args.dataset, "evaluation", FILLER_DOCUMENTS)
    maker = PromptMaker(tokenizer, texts, args.needle, args.question, args.seed)
    cells = itertools.product(lengths, depths, range(args.samples))
    prompts = [maker.make(*cell) for cell in cells]
    splice(model, tokenizer, args)
    trials = compare(model, tqdm(prompts, desc="prompts"), args.chunk, args.generate)
    size = get_kv_cache_size(model, seq_len=max(lengths))
    return report_of(trials) | {"bytes_ratio": size.compressed_bytes / size.original_bytes}


def main() -> None:
    (args,) = ProgramParser(Arguments).parse_args_into_dataclasses()
    with readable_errors():
        report = run(args)
    folder = results_folder(args.output, "retrieval")
    draw_heat_maps(report, folder / "accuracy.png")
    console().print(table_of(report))
    if report["overall"]["original_accuracy"] < 0.5:
        console().print("The original model itself misses most keys: the difference says little. Try other wording.")
    finish(report | environment(args), folder)


if __name__ == "__main__":
    main()
