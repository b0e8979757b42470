#!/usr/bin/env python
"""Passkey retrieval: does the spliced model still find a number that was said once, far back in the context?

A prompt is prose with one sentence that names a random five-digit key at a given depth, and ends in a question for
that key. Original and spliced read the same prompts from one process and one set of weights, through the cache and in
chunks, so that the key has to come out of the (spliced) cache.

By default the key is not generated but appended to the prompt, and an answer counts if every token of the key is the
most likely one given the prompt and the tokens of the key before it. That is exact match of greedy decoding, at the
price of one prefill. Greedy decoding emits the most likely token and goes on from there: as long as it has been right,
its prefix is the true prefix, and both look at the same distribution. At the first token where the key is not the most
likely one, greedy decoding emits another token, and its answer is wrong whatever follows. (The two sum in another
order, so a tie within rounding can fall either way.) `--generate` decodes with `model.generate` as well, counts its
answers, and reports how often the two verdicts differ. The last line of stdout is one JSON object.

    python scripts/measure/retrieval.py                        # SmolLM2-135M as MLA
    python scripts/measure/retrieval.py --lengths 512,1024 --depths 0.1,0.5,0.9 --samples 2 --compression-ratio 0.9
"""

import itertools
import math
import random
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import matplotlib
import torch
from rich.table import Table
from torch import nn
from tqdm import tqdm
from transformers import HfArgumentParser, PreTrainedModel

from kvsplice_hf import get_kv_cache_size, splice_disabled
from kvsplice_hf.bench.command_line import (
    DEMO,
    Budget,
    console,
    environment,
    finish,
    load_model,
    readable_errors,
    results_folder,
    splice,
)
from kvsplice_hf.errors import ConfigError
from kvsplice_hf.text import load_texts
from kvsplice_hf.upstream import cache_argument, cache_of


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


KEY = "{key}"
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is {key}"
# Documents to cut the prose from. Some of the named sets are streams of billions of tokens.
FILLER_DOCUMENTS = 2000
NumberT = TypeVar("NumberT", int, float)


@dataclass
class Arguments(Budget):
    """Passkey retrieval of a model with and without the splice, through the cache."""

    model: str = field(default=DEMO, metadata={"help": 'folder or hub name; "demo": SmolLM2-135M as MLA'})
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


@dataclass(frozen=True)
class Prompt:
    """One question with its answer.

    Attributes:
        ids: token ids, int64 [length]: prose, needle, prose, question, and the key as the last `answer` tokens.
        answer: tokens of the key.
        needle_start: index of the needle's first token.
        key: the five digits.
        depth: share of the prose ahead of the needle, as asked for.
    """

    ids: torch.Tensor
    answer: int
    needle_start: int
    key: str
    depth: float

    @property
    def length(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Verdict:
    """How one model did on one prompt.

    Attributes:
        teacher_forced: every token of the key was the most likely one.
        logprob: mean log-probability of the key's tokens, nats.
        generated: `model.generate` answered with the key's tokens; None if it was not asked.
    """

    teacher_forced: bool
    logprob: float
    generated: bool | None = None

    @property
    def correct(self) -> bool:
        return self.teacher_forced if self.generated is None else self.generated


@dataclass(frozen=True)
class Trial:
    """One prompt and the verdicts on both models."""

    prompt: Prompt
    original: Verdict
    spliced: Verdict


def numbers(text: str, kind: type[NumberT], name: str) -> list[NumberT]:
    """The distinct comma-separated numbers of an argument, ascending.

    Raises:
        ConfigError: a part is no number of that kind.
    """
    try:
        return sorted({kind(part) for part in text.split(",")})
    except ValueError as error:
        raise ConfigError(f"`{name}` is {text!r}; it must be numbers separated by commas.") from error


def tokens(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def first_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer puts ahead of any text: its begin-of-text token, or nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a").input_ids[:1] == [bos] else []


def question_tokens(tokenizer: Any, question: str, key: str) -> tuple[list[int], int]:
    """The question with its answer, and how many of the tokens are the answer.

    Question and key are tokenized together, because the space between them may belong to either side.
    """
    whole = tokens(tokenizer, "\n\n" + question.replace(KEY, key))
    asked = tokens(tokenizer, "\n\n" + question.removesuffix(KEY))
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(asked, whole, strict=False))
    return whole, len(whole) - len(list(same))


class PromptMaker:
    """Makes prompts of exact token lengths. The same seed, length, depth and number give the same prompt."""

    def __init__(self, tokenizer: Any, texts: list[str], needle: str, question: str, seed: int = 0) -> None:
        """
        Args:
            tokenizer: a tokenizer of transformers.
            texts: the prose, as documents.
            needle: the sentence to hide, with `{key}` at least once.
            question: the end of the prompt, with `{key}` once and last.
            seed: chooses keys and prose.

        Raises:
            ConfigError: `{key}` is not where it has to be.
        """
        if KEY not in needle:
            raise ConfigError(f"`needle` is {needle!r}; it must hold {KEY}.")
        if question.count(KEY) != 1 or not question.endswith(KEY):
            raise ConfigError(f"`question` is {question!r}; it must end in {KEY} and hold it once, as the answer.")
        self.tokenizer, self.needle, self.question, self.seed = tokenizer, needle, question, seed
        self.start = first_tokens(tokenizer)
        self.filler = tokens(tokenizer, "\n\n".join(texts))

    def make(self, length: int, depth: float, number: int) -> Prompt:
        """The prompt with that number, `length` tokens long with the key at its end.

        Raises:
            ConfigError: needle and question leave no room for prose, or there is less prose than that.
        """
        # Seeded by a string, which is hashed the same in every process; by the cell, so that no cell depends on which
        # others are measured.
        draw = random.Random(f"{self.seed}/{length}/{depth}/{number}")
        key = str(draw.randrange(10_000, 100_000))
        needle = tokens(self.tokenizer, f"\n\n{self.needle.replace(KEY, key)}\n\n")
        question, answer = question_tokens(self.tokenizer, self.question, key)
        count = length - len(self.start) - len(needle) - len(question)
        if count < 1:
            raise ConfigError(f"`lengths` has {length}; needle and question alone take {length - count} tokens.")
        if count > len(self.filler):
            raise ConfigError(
                f"`lengths` has {length}, which takes {count} tokens of prose; the texts have {len(self.filler)}. Give "
                "more text or shorter lengths."
            )
        first = draw.randrange(len(self.filler) - count + 1)
        prose = self.filler[first : first + count]
        ahead = round(depth * count)
        ids = self.start + prose[:ahead] + needle + prose[ahead:] + question
        return Prompt(torch.tensor(ids), answer, len(self.start) + ahead, key, depth)


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


@torch.no_grad()
def score(model: nn.Module, prompt: Prompt, chunk: int) -> Verdict:
    """Teacher-forced verdict: the prompt goes through the cache in chunks, then the key in one forward.

    Args:
        model: a causal language model.
        prompt: what to ask.
        chunk: tokens per forward of the prefill.
    """
    ids = prompt.ids[None].to(model.device)
    # The last token of the prompt predicts the first of the key, and the last token of the key predicts nothing that
    # is known.
    asked = prompt.length - prompt.answer - 1
    cache = None
    for part in ids[:, :asked].split(chunk, dim=1):
        cache = cache_of(model(part, **cache_argument(cache), use_cache=True, logits_to_keep=1))
    logits = model(ids[:, asked:-1], **cache_argument(cache), use_cache=True).logits[0].float()
    key = ids[0, asked + 1 :]
    logprobs = logits.log_softmax(-1).gather(-1, key[:, None])
    return Verdict(bool((logits.argmax(-1) == key).all()), logprobs.mean().item())


@torch.no_grad()
def generates_key(model: PreTrainedModel, prompt: Prompt, chunk: int) -> bool:
    """Whether the greedy continuation is the key, token by token.

    Args:
        model: a causal language model.
        prompt: what to ask.
        chunk: tokens per forward of the prefill.
    """
    ids = prompt.ids[None].to(model.device)
    asked = ids[:, : -prompt.answer]
    # Whatever the model's own generation settings ask for, this is plain greedy decoding.
    greedy = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "max_new_tokens": prompt.answer}
    output = model.generate(
        asked, attention_mask=torch.ones_like(asked), prefill_chunk_size=chunk, pad_token_id=0, **greedy
    )
    return torch.equal(output, ids)


def judge(model: PreTrainedModel, prompt: Prompt, chunk: int, generate: bool) -> Verdict:
    verdict = score(model, prompt, chunk)
    if not generate:
        return verdict
    return Verdict(verdict.teacher_forced, verdict.logprob, generates_key(model, prompt, chunk))


def compare(model: PreTrainedModel, prompts: Iterable[Prompt], chunk: int, generate: bool = False) -> list[Trial]:
    """Ask a patched model, and itself with the splice disabled, the same questions."""
    trials = []
    for prompt in prompts:
        with splice_disabled(model):
            original = judge(model, prompt, chunk, generate)
        trials.append(Trial(prompt, original, judge(model, prompt, chunk, generate)))
    return trials


def paired_interval(lost: int, won: int, count: int) -> tuple[float, float]:
    """95 % interval of the difference of two paired shares, (won - lost) / count.

    The adjusted Wald interval of Bonett and Price (2012): one imagined pair is added to each of the two kinds of
    disagreement. Unlike the plain one it keeps a width where the models never disagree, as two similar models do over
    few samples.

    Args:
        lost: prompts that only the original answers.
        won: prompts that only the spliced model answers.
        count: prompts.
    """
    lost_share, won_share = (lost + 1) / (count + 2), (won + 1) / (count + 2)
    centre = won_share - lost_share
    error = math.sqrt((lost_share + won_share - centre**2) / (count + 2))
    half = statistics.NormalDist().inv_cdf(0.975) * error
    return max(centre - half, -1.0), min(centre + half, 1.0)


def mcnemar_p(lost: int, won: int) -> float:
    """Exact two-sided p-value of McNemar's test: were disagreements to fall either way by a fair coin."""
    count = lost + won
    tail = sum(math.comb(count, k) for k in range(min(lost, won) + 1)) / 2**count
    return min(1.0, 2 * tail)


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
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
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
