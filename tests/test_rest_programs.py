"""The programs about caches in files: sizes and times of each form, questions about a document, coders of rows."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from programs import run_program


@pytest.fixture(name="settings")
def _settings(model_folder: str, tmp_path: Path) -> list[Any]:
    calibration = ["--calibration_tokens", "1024", "--bits", "4"]
    return ["--model", model_folder, *calibration, "--tokens", "200", "--output", str(tmp_path / "results")]


def test_every_form_of_a_file_is_measured(settings: list[Any]) -> None:
    report = run_program("measure/caches_at_rest.py", *settings, "--repeats", "1")
    stock, packed, smaller = report["results"]
    assert [row["cache"] for row in report["results"]] == ["stock, float32", "spliced", "spliced, entropy"]
    assert stock["file_bytes"] > packed["file_bytes"] > 0
    assert smaller["bytes_per_token_and_layer"] > 0
    assert all(row[name] > 0 for row in report["results"] for name in ("save_s", "load_s", "load_unverified_s"))


@pytest.mark.parametrize("compress", [[], ["--compress", "entropy"]])
def test_answers_with_a_store_are_those_without_and_each_question_has_its_times(
    settings: list[Any], compress: list[str]
) -> None:
    arguments = [*settings, *compress, "--questions", "3", "--new_tokens", "4", "--caches", "spliced, stock"]
    report = run_program("measure/questions.py", *arguments)
    assert [(row["cache"], row["question"]) for row in report["results"]] == [
        (cache, question) for cache in ("stock", "spliced") for question in (1, 2, 3)
    ]
    for row in report["results"]:
        assert row["same_tokens"]
        assert row["stored_bytes"] > 0
        assert all(0 < row[way]["first_token_s"] < row[way]["total_s"] for way in ("anew", "stored"))


def test_every_coder_that_is_installed_is_measured_and_none_beats_its_bound(settings: list[Any]) -> None:
    report = run_program("measure/row_coders.py", *settings)
    sizes = {row["coder"]: row["bytes_per_token_and_layer"] for row in report["results"]}
    bound = sizes["bound: tables of the rows, not counted"]
    assert bound < sizes["packed rows"]
    assert bound < sizes['compress="entropy": zlib, of columns']
    assert bound <= sizes["bound: adaptive tables"]
    for package in ("zstandard", "constriction"):
        missing = [sizes[name] is None for name in sizes if name.startswith(package)]
        assert set(missing) == {importlib.util.find_spec(package) is None}


@pytest.mark.parametrize(
    ("program", "arguments", "words"),
    [
        ("caches_at_rest", ["--compress", "zip"], ["--compress has zip", "none, entropy"]),
        ("questions", ["--questions", "1"], ["--questions is 1", "2 to 6"]),
        ("questions", ["--tokens", "0"], ["--tokens is 0", "at least 1"]),
        ("questions", ["--caches", "other"], ["--caches has other", "stock, spliced"]),
        ("questions", ["--compress", "zip"], ["`compress` is 'zip'"]),
        ("row_coders", ["--tokens", "0"], ["--tokens is 0", "at least 1"]),
        ("row_coders", ["--calibration", "none", "--compression_ratio", "0.5"], ["--bytes_per_token"]),
    ],
)
def test_a_setting_that_cannot_work_is_named(
    program: str, arguments: list[str], words: list[str], model_folder: str, tmp_path: Path
) -> None:
    folder = tmp_path / "results"
    with pytest.raises(SystemExit) as caught:
        run_program(f"measure/{program}.py", "--model", model_folder, "--output", str(folder), *arguments)
    message = caught.value.code
    assert all(word in message for word in ["ConfigError", *words]), message
    assert not folder.exists()
