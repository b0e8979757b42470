"""Every script runs at its smallest setting, and its last line of stdout is one JSON object."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import byte_tokenizer, trained_model
from ordinary_models import build_ordinary
from programs import assert_figures_only, load_program, run_program

from kvsplice_hf import ConfigError
from kvsplice_hf.bench.command_line import require_folder
from kvsplice_hf.calibration.statistics import LayerStatistics, save_statistics


ROOT = Path(__file__).parent.parent


def run(*command: str) -> dict[str, Any]:
    """What a program prints last, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    script, *arguments = command
    process = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / script), *arguments], capture_output=True, text=True, env=environment
    )
    assert process.returncode == 0, process.stderr
    assert_figures_only(process.stderr)
    return json.loads(process.stdout.splitlines()[-1])


def test_decode_steps_of_every_recipe_are_measured_beside_stock(tmp_path: Path) -> None:
    shape = ["--geometry", "mini", "--layers", "2", "--context", "96"]
    quick = ["--repeats", "1", "--steps", "1", "--bandwidth_mb", "4"]
    report = run_program("measure/decode.py", *shape, *quick, "--output", str(tmp_path))
    assert list(report["results"]) == ["stock", "full rank", "rank R/2"]
    for row in report["results"].values():
        assert len(row["decode_s"]) == 1
        assert min(row["decode_s"]) > 0
    sizes = {name: row["cache_bytes"] for name, row in report["results"].items()}
    # Two layers: a row has 576 numbers at full rank and 320 at half, and four exact latents of 512 come on top.
    assert sizes["stock"] == 2 * 96 * 576 * 4
    assert sizes["rank R/2"] == 2 * (96 * 320 * 4 + 4 * (512 * 4 + 8))
    assert {"command", "machine", "torch", "transformers"} <= set(report)


def test_a_misspelt_option_is_named_with_the_one_that_was_meant() -> None:
    with pytest.raises(SystemExit, match=r"unknown --contxt. Did you mean --contexts?\?"):
        run_program("measure/decode.py", "--contxt", "5")


@pytest.mark.parametrize("program", sorted((ROOT / "scripts").rglob("*.py")), ids=lambda path: path.name)
def test_every_program_parses_its_options_in_the_same_way(program: Path) -> None:
    assert "HfArgumentParser" not in program.read_text("utf-8")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A trained tiny model with its tokenizer, as any user's folder."""
    folder = tmp_path_factory.mktemp("model")
    trained_model().save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.eos_token = "A"
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_the_quality_script_shows_no_loss_at_full_rank_and_a_large_one_for_a_random_projection(
    model_folder: str, tmp_path: Path
) -> None:
    common = ["--model", model_folder, "--window", "48", "--samples", "4", "--chunk", "13", "--output", str(tmp_path)]
    common += ["--calibration", "none"]
    report = run_program("eval_deepseek_quality.py", *common, "--compression-ratio", "1.0")
    assert report["scored_text"].startswith("4 windows of 48 tokens from the evaluation half of pydoc")
    exact = report["results"][0]
    assert abs(exact["loss_percent"]) < 0.01
    assert exact["cache_check"] == "passed"
    broken = run_program("eval_deepseek_quality.py", *common, "--compression-ratio", "0.15", "--init", "orthogonal")
    assert broken["results"][0]["loss_percent"] > 10
    assert broken["results"][0]["bytes_ratio"] < 0.6
    unchecked = run_program("eval_deepseek_quality.py", *common, "--compression-ratio", "1.0", "--check-samples", "0")
    assert unchecked["results"][0]["cache_check"] == "not measured"
    folders = sorted(tmp_path.iterdir())
    assert len(folders) == 3, "no result may overwrite another"
    for folder in folders:
        assert {path.name for path in folder.iterdir()} == {"report.json", "quality_against_bytes.png"}


def test_the_throughput_script_measures_both_models_in_every_setting(model_folder: str, tmp_path: Path) -> None:
    settings = ["--batch-sizes", "1,2", "--seq-len", "16,24", "--trials", "1", "--new-tokens", "2"]
    settings += ["--compression-ratio", "0.5", "--calibration", "none"]
    report = run_program(
        "benchmark_deepseek_kvsplice.py", "--model", model_folder, *settings, "--output", str(tmp_path)
    )
    assert [(row["batch_size"], row["seq_len"]) for row in report["results"]] == [(1, 16), (2, 16), (1, 24), (2, 24)]
    for row in report["results"]:
        assert row["spliced"]["cache_bytes"] < row["original"]["cache_bytes"]
        assert min(row[name]["decode_tokens_per_s"] for name in ("original", "spliced")) > 0
    assert (Path(report["folder"]) / "speed_against_context.png").stat().st_size > 0


def test_the_demo_answers_with_both_models(model_folder: str, tmp_path: Path) -> None:
    model = ["--model", model_folder, "--calibration-tokens", "2048", "--prompt", "What is"]
    settings = ["--samples", "1", "--new-tokens", "4", "--context", "64", "--window", "64"]
    report = run_program("run/demo.py", *model, *settings, "--output", str(tmp_path))["models"][model_folder]
    assert set(report["answers"]) == set(report["speed"]) == {"original", "spliced"}
    assert all(answer["text"] for answer in report["answers"].values())
    assert report["bytes_per_token"]["spliced"] < report["bytes_per_token"]["original"]
    assert report["quality"]["kl"] > 0
    assert report["quality"]["perplexity_stderr"] is None, "one window has no spread, and NaN is no JSON"


def test_the_demo_shows_several_models_each_with_statistics_of_its_own(model_folder: str, tmp_path: Path) -> None:
    ordinary = tmp_path / "ordinary"
    build_ordinary("llama", vocab_size=256, max_position_embeddings=128).save_pretrained(ordinary)
    byte_tokenizer().save_pretrained(ordinary)
    for file in Path(model_folder).iterdir():
        if not (ordinary / file.name).exists() or "token" in file.name:
            shutil.copy(file, ordinary)
    settings = ["--samples", "1", "--new-tokens", "4", "--context", "64", "--window", "64", "--calibration-tokens"]
    settings += ["2048", "--prompt", "What is", "--statistics", str(tmp_path / "known.safetensors")]
    report = run_program("run/demo.py", "--model", str(ordinary), model_folder, *settings, "--output", str(tmp_path))
    assert list(report["models"]) == [str(ordinary), model_folder]
    for one in report["models"].values():
        assert one["bytes_per_token"]["spliced"] < 0.6 * one["bytes_per_token"]["original"]
    kept = {path.name for path in tmp_path.glob("known*")}
    assert kept == {"known-ordinary.safetensors", f"known-{Path(model_folder).name}.safetensors"}


def test_the_demo_is_of_both_forms_of_the_embedded_model() -> None:
    program = load_program("run/demo.py")
    assert program.Arguments().model == ["smollm2", "demo"]


def test_one_command_runs_benchmark_and_quality(model_folder: str, tmp_path: Path) -> None:
    # Calibrated by the first of the two programs, read by the second.
    calibration = f"--calibration_tokens 2048 --statistics {tmp_path / 'statistics.safetensors'}"
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "OUTPUT": str(tmp_path),
        "BENCHMARK_ARGS": f"--batch_sizes 1 --seq_len 16 --trials 1 --new_tokens 2 {calibration}",
        "QUALITY_ARGS": f"--samples 2 --window 32 {calibration}",
    }
    command = [str(ROOT / "scripts" / "test_deepseek_kvsplice.sh"), "--model", model_folder]
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    assert_figures_only(process.stderr)
    benchmark, quality = (json.loads(line) for line in process.stdout.splitlines() if line.startswith("{"))
    assert benchmark["results"][0]["spliced"]["cache_bytes"] < benchmark["results"][0]["original"]["cache_bytes"]
    assert quality["results"][0]["cache_check"] == "passed"
    wrong = subprocess.run([*command[:1], "--modle", "x"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "--modle" in wrong.stderr


def test_the_quality_script_says_which_half_of_a_file_or_folder_it_scores(model_folder: str, tmp_path: Path) -> None:
    for name in ("first.txt", "second.txt"):
        (tmp_path / name).write_text("Some words of a text of one's own.\n\n" * 40)
    common = ["--model", model_folder, "--window", "48", "--samples", "2", "--calibration", "none"]
    common += ["--compression-ratio", "1.0", "--output", str(tmp_path / "results"), "--dataset"]
    for text, half in ((tmp_path / "first.txt", "what is behind the middle"), (tmp_path, "every other file")):
        said = run_program("eval_deepseek_quality.py", *common, str(text))["scored_text"]
        assert f"2 windows of 48 tokens from the evaluation half ({half}" in said
        assert str(text) in said


def test_the_quality_script_says_in_its_help_that_it_scores_a_half(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["eval_deepseek_quality.py", "--help"])
    with pytest.raises(SystemExit):
        load_program("eval_deepseek_quality.py").main()
    assert "only its evaluation half is scored" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("path", ["missing", "./missing", "a/b/c", "~/missing", "file.txt"])
def test_a_path_that_is_no_folder_is_not_asked_for_on_the_hub(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "file.txt").write_text("")
    path = path if "/" in path else f"here/{path}"
    with pytest.raises(ConfigError, match=re.escape(f"--model {path} is no")):
        require_folder("model", path)
    require_folder("model", "here")
    require_folder("model", "user/name")
    require_folder("model", "name")


@pytest.mark.parametrize("script", ["run/demo.py", "eval_deepseek_quality.py", "benchmark_deepseek_kvsplice.py"])
def test_a_model_that_is_not_there_ends_a_script_with_its_name(script: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="nothing_there"):
        run_program(script, "--model", str(tmp_path / "nothing_there"))


@pytest.mark.parametrize(
    ("script", "option", "value"),
    [
        ("run/demo.py", "--dtype", "float7"),
        ("benchmark_deepseek_kvsplice.py", "--batch-sizes", "1,two"),
        ("benchmark_deepseek_kvsplice.py", "--trials", "0"),
        ("measure/profile_training.py", "--steps", "2"),
        ("measure/benchmark_calibration.py", "--rounds", "0"),
        ("measure/benchmark_calibration.py", "--metrics", "fishy"),
        ("research/ablate_calibration.py", "--rows", "fishy"),
        ("research/study_tuning.py", "--coordinates", "fishy"),
        ("research/study_tuning.py", "--steps", "0"),
        ("research/study_tuning.py", "--windows", "3"),
        ("research/study_tuning.py", "--calibration", "auto"),
        ("research/ablate_conversion.py", "--tables", "fishy"),
    ],
)
def test_a_setting_that_cannot_be_used_ends_a_script_with_its_name_and_value(
    script: str, option: str, value: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_program(script, option, value)
    assert option.replace("-", "_").strip("_") in str(ended.value).replace("-", "_")
    assert value in str(ended.value)


def test_every_part_of_calibration_can_be_left_out(model_folder: str, tmp_path: Path) -> None:
    sizes = ["--budget", "14", "--window", "64", "--evaluation-tokens", "512", "--calibration-tokens", "2048"]
    rows = [
        "--rows",
        "default",
        "no-sinks",
        "readers",
        "flat",
        "no-gain",
        "gaussian-steps",
        "rot-8",
        "behind-coded-layers",
    ]
    report = run_program(
        "research/ablate_calibration.py", "--model", model_folder, *sizes, *rows, "--output", str(tmp_path)
    )
    losses = {row["name"]: row["texts"]["pydoc"]["kl_nats"] for row in report["results"]}
    assert list(losses) == rows[1:]
    assert losses["flat"] > losses["default"]
    assert all(row["bytes_per_token"] <= 14 for row in report["results"])


def test_a_learning_curve_has_a_row_for_each_look_of_each_run(model_folder: str, tmp_path: Path) -> None:
    sizes = ["--bytes_per_token", "14", "--calibration", "pydoc", "--calibration_tokens", "2048", "--block_size", "64"]
    runs = ["--windows", "2", "4", "--coordinates", "calibrated", "plain", "--learning_rates", "1e-5", "1e-4"]
    report = run_program(
        *("research/study_tuning.py", "--model", model_folder, *sizes, *runs),
        *("--dataset", "pydoc", "--evaluation_windows", "2", "--steps", "4", "--looks", "2", "--output", str(tmp_path)),
    )
    rows = report["results"]
    found = [(row["coordinates"], row["windows"], row["step"]) for row in rows]
    assert found == [(name, size, step) for name in ("calibrated", "plain") for size in (2, 4) for step in (0, 2, 4)]
    before = [row["texts"] for row in rows if row["step"] == 0]
    assert all(texts == before[0] for texts in before)
    assert all(row["texts"] != before[0] for row in rows if row["step"])


def test_the_research_import_path_leads_to_the_package() -> None:
    code = "import deepseek_kvsplice_plugin as p, kvsplice_hf as k; assert p.LearnedKVSplice is k.LearnedKVSplice"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'scripts'}"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_training_speed_is_measured_side_by_side_with_what_it_is_made_of(tmp_path: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text("n_layer: 1\nn_embd: 32\nn_head: 2\nn_positions: 16\nkv_lora_rank: 12\n")
    report = run_program(
        *("measure/profile_training.py", "--config", str(config), "--steps", "3"),
        *("--batch_size", "2", "--vocab_size", "64"),
        *("--output", str(tmp_path)),
    )
    rows = {row["name"]: row for row in report["results"]}
    assert len(rows) == 7
    # A layer of GPT-2 maps 32 numbers to 96, MLA to 32 and by way of 12 to 64; neither other matrix differs.
    difference = rows["GPT-2"]["forward_gflop"] - rows["MLA"]["forward_gflop"]
    assert difference == pytest.approx(2 * 32 * (32 * 64 - 12 * (32 + 64)) / 1e9, rel=0.01)
    for row in rows.values():
        assert min(row["milliseconds"].values()) > 0
        assert row["milliseconds_by_operator"]["matrix products"] > 0


def test_spectra_are_those_of_the_statistics(tmp_path: Path) -> None:
    """Two layers whose latents have equal variances in all directions, and one direction."""
    latents = torch.eye(8).repeat(8, 1) - 1 / 8
    even, single = (LayerStatistics.empty(8, 0) for _ in range(2))
    for layer, rows in ((even, latents), (single, torch.randn(64, 1) * torch.ones(8))):
        layer.add_rows(rows, torch.zeros(64, 0), torch.Generator())
        layer.add_gradients(torch.eye(8))
    for name, layer in (("even", even), ("single", single)):
        save_statistics({0: layer}, tmp_path / f"{name}.safetensors", {"metric": "fisher"}, [])
    files = [str(tmp_path / f"{name}.safetensors") for name in ("even", "single")]
    rows = {
        (row["file"], row["of"]): row
        for row in run_program("research/compare_spectra.py", *files, "--output", str(tmp_path))["rows"]
    }
    assert rows["even", "variance"]["effective_rank"] == pytest.approx(7 / 8, abs=0.01)  # the sum is constant
    assert rows["single", "variance"]["top_0.125"] > 0.5
    assert rows["single", "cost"]["gain_bits"] > rows["even", "cost"]["gain_bits"]
