#!/usr/bin/env python
"""How much time does a stored prompt save, of several questions about one document?

Each question is asked twice, in turns: of the whole prompt, and with a store of prompts (`PromptCache`), in which the
first question leaves the document for the others. The tokens of both answers are compared. The last line of stdout is
one JSON object.

    python scripts/measure/questions.py --model smollm2 --tokens 4096 --bytes_per_token 193
    python scripts/measure/questions.py --model demo --tokens 4096 --bytes_per_token 193 --compress entropy
"""

import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.table import Table
from tqdm import tqdm
from transformers import StoppingCriteriaList

from kvsplice_hf import PromptCache
from kvsplice_hf.bench.command_line import (
    DEMO,
    BudgetOrSplice,
    ProgramParser,
    console,
    environment,
    finish,
    load_model,
    readable_errors,
    require_known,
    results_folder,
    splice,
)
from kvsplice_hf.bench.generating import TokenClock
from kvsplice_hf.bench.texts import spread_windows
from kvsplice_hf.errors import ConfigError
from kvsplice_hf.rest.compression import check_compress


QUESTIONS = (
    "What is this text about?",
    "Which functions are described, and what do they return?",
    "Which errors are raised, and when?",
    "Give one example of how it is used.",
    "What should a reader be careful about?",
    "Summarise the text in one sentence.",
)
CACHES = ("stock", "spliced")


@dataclass
class Arguments(BudgetOrSplice):
    """Several questions about one document, with and without a store of prompts."""

    model: str = field(default=DEMO, metadata={"help": 'folder, hub name, "demo" (SmolLM2 as MLA) or "smollm2"'})
    caches: str = field(default="spliced", metadata={"help": '"spliced", "stock", or both with a comma between them'})
    text: str = field(default="pydoc", metadata={"help": "where the document comes from"})
    tokens: int = field(default=4096, metadata={"help": "of the document"})
    questions: int = field(default=4, metadata={"help": f"how many are asked, 2 to {len(QUESTIONS)}"})
    new_tokens: int = field(default=32, metadata={"help": "of each answer"})
    compress: str | None = field(default=None, metadata={"help": 'how the store compresses rows: "entropy", or not'})
    dtype: str = field(default="float32", metadata={"help": "dtype of the model"})
    output: str = field(default="results", metadata={"help": "folder for the results"})


def check(args: Arguments) -> list[str]:
    """The caches to measure.

    Raises:
        ConfigError: nothing could be measured with these settings.
    """
    for name, least, most in (
        ("tokens", 1, None),
        ("questions", 2, len(QUESTIONS)),
        ("new_tokens", 1, None),
    ):
        value = getattr(args, name)
        if value < least or (most is not None and value > most):
            limits = f"at least {least}" if most is None else f"{least} to {most}"
            raise ConfigError(f"--{name} is {value}; it must be {limits}.")
    check_compress(args.compress)
    caches = [name.strip() for name in args.caches.split(",")]
    require_known("caches", caches, CACHES)
    return caches


def asked(model: Any, ids: torch.Tensor, new_tokens: int, store: PromptCache | None, keep: int) -> dict[str, Any]:
    """One answer: its tokens, and how long it took."""
    clock = TokenClock(ids.device)
    start = time.perf_counter()
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if store is not None:
        inputs = store.prepare(model, **inputs, keep=keep)
    output = model.generate(
        **inputs,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    return {
        "tokens": output[0, ids.shape[1] :].tolist(),
        "first_token_s": clock.times[0] - start,
        "total_s": clock.times[-1] - start,
    }


def measure(name: str, model: Any, prompts: list[torch.Tensor], keep: int, args: Arguments) -> list[dict[str, Any]]:
    """One line per question."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        store = PromptCache(folder, compress=args.compress)
        # What is asked of a model once, and remembered while it lives: who it is.
        store.find(model, prompts[0])
        for number, ids in enumerate(tqdm(prompts, desc=f"questions, {name}"), start=1):
            ways: list[PromptCache | None] = [None, store]
            found = {
                way is not None: asked(model, ids, args.new_tokens, way, keep)
                for way in (ways if number % 2 else ways[::-1])
            }
            rows.append(
                {
                    "cache": name,
                    "question": number,
                    "anew": {key: value for key, value in found[False].items() if key != "tokens"},
                    "stored": {key: value for key, value in found[True].items() if key != "tokens"},
                    "same_tokens": found[False]["tokens"] == found[True]["tokens"],
                    "stored_bytes": sum(entry.nbytes for entry in store.entries()),
                }
            )
    return rows


def table_of(rows: list[dict[str, Any]]) -> Table:
    table = Table("cache", "question", "first token, anew", "stored", "answer, anew", "stored", "saved", "same tokens")
    for row in rows:
        anew, stored = row["anew"], row["stored"]
        times = [f"{way[name] * 1000:,.0f} ms" for name in ("first_token_s", "total_s") for way in (anew, stored)]
        saved = f"{(anew['total_s'] - stored['total_s']) * 1000:,.0f} ms"
        which = f"{row['question']}, which stores" if row["question"] == 1 else str(row["question"])
        table.add_row(row["cache"], which, *times, saved, "yes" if row["same_tokens"] else "no")
    return table


@torch.no_grad()
def run(args: Arguments) -> dict[str, Any]:
    caches = check(args)
    model, tokenizer = load_model(args.model, args.dtype)
    document = spread_windows(tokenizer, args.text, "evaluation", args.tokens, args.tokens)[:1]
    document = document.to(next(model.parameters()).device)
    prompts = []
    for question in QUESTIONS[: args.questions]:
        text = tokenizer(f"\n\nQuestion: {question}\nAnswer:", add_special_tokens=False, return_tensors="pt")
        prompts.append(torch.cat([document, text["input_ids"].to(document)], dim=1))
    rows: list[dict[str, Any]] = []
    for name in sorted(caches, key=CACHES.index):
        if name == "spliced":
            splice(model, tokenizer, args)
        rows += measure(name, model, prompts, document.shape[1], args)
    return {"results": rows}


def main() -> None:
    (args,) = ProgramParser(Arguments).parse_args_into_dataclasses()
    with readable_errors():
        report = run(args)
    folder = results_folder(args.output, "questions")
    console().print(table_of(report["results"]))
    finish(report | environment(args), folder)


if __name__ == "__main__":
    main()
