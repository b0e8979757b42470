"""Training from scratch and its ablation: the optimiser, the text on disk, budgets, resuming, and the report."""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import load_program, run_program
from transformers import AutoModelForCausalLM

from kvsplice_hf import ConfigError
from kvsplice_hf.gpt2_mla import GPT2MLAForCausalLM
from kvsplice_hf.training.spam import AdamWSPAM, clip_spikes


ROOT = Path(__file__).parent.parent
ablate: Any = load_program("research/ablate.py")
ablation: Any = importlib.import_module("kvsplice_hf.bench.ablation")
gather_text: Any = load_program("research/gather_text.py")
pretraining_data: Any = importlib.import_module("kvsplice_hf.bench.pretraining.data")
records: Any = importlib.import_module("kvsplice_hf.bench.records")
report: Any = load_program("research/report.py")
text_sources: Any = importlib.import_module("kvsplice_hf.bench.pretraining.text_sources")
pretraining: Any = importlib.import_module("kvsplice_hf.bench.pretraining.run")

SMOKE = ROOT / "configs" / "ablations" / "smoke.yaml"
SMALL: dict[str, Any] = {
    "data": ["pydoc"],
    "vocab_size": 300,
    "n_layer": 1,
    "n_embd": 16,
    "n_head": 2,
    "n_positions": 32,
    "validation_blocks": 4,
    "max_steps": 8,
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "eval_steps": 4,
    "save_steps": 2,
    "samples": 0,
    "use_cpu": True,
    "disable_tqdm": True,
}


# The optimiser


def steps_of(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """The parameter after each step."""
    values = []
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
        values.append(parameter.detach().clone())
    return torch.stack(values)


def random_gradients(steps: int, size: int = 5) -> torch.Tensor:
    return torch.randn(steps, size, generator=torch.Generator().manual_seed(0))


def test_without_spikes_and_resets_spam_is_adamw() -> None:
    ours, theirs = (torch.nn.Parameter(torch.ones(5)) for _ in range(2))
    gradients = random_gradients(20)
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    found = steps_of(AdamWSPAM([ours], threshold=1e12, reset_every=0, **settings), ours, gradients)
    expected = steps_of(torch.optim.AdamW([theirs], **settings), theirs, gradients)
    torch.testing.assert_close(found, expected)


def test_a_spike_is_clipped_to_the_threshold_and_the_rest_is_left() -> None:
    moment = torch.tensor([1.0, 4.0, 0.0, 1.0])
    gradient = torch.tensor([-100.0, 3.0, 7.0, 3.0])
    assert clip_spikes(gradient, moment, threshold=9.0).tolist() == [-3.0, 3.0, 7.0, 3.0]


def test_a_spike_moves_spam_by_its_definition() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = AdamWSPAM([parameter], lr=1.0, betas=(0.9, 0.99), eps=0.0, threshold=25.0, reset_every=0)
    steps_of(optimizer, parameter, torch.tensor([[2.0], [2.0], [1000.0]]))
    clipped = 5 * 2.0  # the bias-corrected second moment of two gradients of 2 is 4
    mean = 0.1 * (0.81 * 2 + 0.9 * 2 + clipped) / (1 - 0.9**3)
    square = 0.01 * (0.9801 * 4 + 0.99 * 4 + clipped**2) / (1 - 0.99**3)
    assert parameter.item() == pytest.approx(-1.0 - 1.0 - mean / math.sqrt(square), rel=1e-5)


def test_moments_start_anew_and_the_learning_rate_rises_after_a_reset() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = AdamWSPAM([parameter], lr=1.0, eps=0.0, reset_every=4, warmup=2)
    values = steps_of(optimizer, parameter, torch.tensor([[3.0]] * 4 + [[-1.0]] * 2)).flatten()
    # Gradients of one size move by the learning rate; had the moments been kept, -1 after 3 would have moved on down.
    torch.testing.assert_close(values[3] - values[2], torch.tensor(-1.0))
    torch.testing.assert_close(values[4] - values[3], torch.tensor(0.5))
    torch.testing.assert_close(values[5] - values[4], torch.tensor(1.0))
    assert optimizer.state[parameter]["exp_avg_sq"].item() == pytest.approx(1 - 0.999**2)


@pytest.mark.parametrize("wrong", [{"threshold": 0.0}, {"lr": -1.0}, {"betas": (0.9, 1.0)}, {"reset_every": -1}])
def test_settings_of_spam_out_of_range_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        AdamWSPAM([torch.nn.Parameter(torch.zeros(1))], **wrong)


# Text


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    documents = [f"Document {number} is about the number {number} and nothing else. " * 5 for number in range(60)]
    (folder / "numbers.txt").write_text(pretraining_data.DOCUMENT_BREAK.join(documents), encoding="utf-8")
    return folder


def data_arguments(folder: Path, cache: Path, **changes: Any) -> Any:
    settings = {"data": [str(folder)], "vocab_size": 280, "validation_share": 0.1, "cache": str(cache)}
    return pretraining_data.DataArguments(**settings | changes)


def test_tokenizer_and_blocks_are_made_once(text_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    first = pretraining_data.load_blocks(data_arguments(text_folder, tmp_path / "cache"), 32)

    def refuse(*_: Any) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(pretraining_data, "_train_tokenizer", refuse)
    monkeypatch.setattr(pretraining_data, "_pack_into", refuse)
    second = pretraining_data.load_blocks(data_arguments(text_folder, tmp_path / "cache"), 32)
    assert second.key == first.key
    assert torch.equal(second.train[:]["input_ids"], first.train[:]["input_ids"])
    (text_folder / "numbers.txt").write_text("other text", encoding="utf-8")
    with pytest.raises(AssertionError, match="made again"):
        pretraining_data.load_blocks(data_arguments(text_folder, tmp_path / "cache"), 32)


def test_blocks_hold_the_documents_one_after_the_other_and_none_of_the_validation(
    text_folder: Path, tmp_path: Path
) -> None:
    args = data_arguments(text_folder, tmp_path / "cache")
    blocks = pretraining_data.load_blocks(args, 16)
    source = pretraining_data.open_source(str(text_folder), args)
    parts = {part: list(source.documents(part)) for part in pretraining_data.PARTS}
    assert not set(parts["train"]) & set(parts["validation"])
    assert len(parts["validation"]) == 6
    written = pretraining_data.END_OF_TEXT.join(parts["train"])
    read = blocks.tokenizer.decode(blocks.train[:]["input_ids"].flatten())
    assert read == written[: len(read)]
    assert len(read) > 0.95 * len(written)


def test_text_that_is_missing_or_too_short_is_named(text_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing_there.*gather_text"):
        pretraining_data.load_blocks(data_arguments(tmp_path / "nothing_there", tmp_path), 16)
    with pytest.raises(ConfigError, match="validation part .* shorter than one block"):
        pretraining_data.load_blocks(data_arguments(text_folder, tmp_path), 4096)
    with pytest.raises(ConfigError, match="vocab_size is 100"):
        pretraining_data.load_blocks(data_arguments(text_folder, tmp_path, vocab_size=100), 16)


def test_gathered_text_has_no_repeats_and_a_manifest(tmp_path: Path, monkeypatch: Any) -> None:
    long = "A paragraph of more than sixty letters, which is long enough to be told from others."

    def unreachable(folder: Path) -> Any:
        raise text_sources.NotFetched("no such package")
        yield

    sources = {
        "one": text_sources.Source("here", "MIT", lambda folder: iter([f"{long}\n\nshort", "second document"])),
        "two": text_sources.Source("there", "PSF", lambda folder: iter([f"new\n\n{long}\n\nshort"])),
        "three": text_sources.Source("nowhere", "GPL", unreachable),
    }
    monkeypatch.setattr(gather_text, "SOURCES", sources)
    made = gather_text.run(gather_text.Arguments(output=str(tmp_path / "out"), minimum_mb=0.0))
    assert made["missing"] == {"three": "no such package"}
    assert (tmp_path / "out" / "two.txt").read_text() == "new\n\nshort"
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [entry["licence"] for entry in manifest["sources"]] == ["MIT", "PSF"]
    with pytest.raises(ConfigError, match="is there already"):
        gather_text.run(gather_text.Arguments(output=str(tmp_path / "out")))
    with pytest.raises(ConfigError, match="three: no such package"):
        gather_text.run(gather_text.Arguments(output=str(tmp_path / "more")))


# Training


def train(folder: Path, cache: str, **changes: Any) -> dict[str, Any]:
    settings = SMALL | {"output_dir": str(folder), "cache": cache} | changes
    return pretraining.train(*pretraining.parse([], **settings))


def losses(result: dict[str, Any]) -> list[float]:
    return [row["loss"] for row in result["history"] if "loss" in row]


_KILLED = """
import json, os, signal, sys
import torch
from kvsplice_hf.bench.pretraining import callbacks as pretraining_callbacks, run as pretraining
torch.set_num_threads(1)
tick = pretraining_callbacks.Clock.on_step_end
def kill_at_step_5(self, args, state, control, **kwargs):
    if state.global_step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    tick(self, args, state, control, **kwargs)
pretraining_callbacks.Clock.on_step_end = kill_at_step_5
pretraining.train(*pretraining.parse([], **json.loads(sys.argv[1])))
"""


def test_a_run_that_was_killed_goes_on_and_ends_at_the_same_loss(tmp_path: Path, cache: str) -> None:
    """With resets, whose moments must be taken up, and samples, which must not disturb."""
    changes = {"optimizer": "adamw_spam", "spam_reset_every": 3, "spam_warmup": 2, "kvsplice": {"rank": 2}}
    changes |= {"kv_lora_rank": 4, "dropout": 0.1}
    whole = train(tmp_path / "whole", cache, samples=1, sample_tokens=4, **changes)
    settings = SMALL | {"output_dir": str(tmp_path / "killed"), "cache": cache} | changes
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-c", _KILLED, json.dumps(settings)], capture_output=True, text=True, env=environment
    )
    assert process.returncode == -9, process.stderr
    # A checkpoint whose writing was cut off is passed over.
    (tmp_path / "killed" / "checkpoint-5").mkdir()
    with pytest.raises(ConfigError, match="other settings .learning_rate."):
        train(tmp_path / "killed", cache, learning_rate=0.5, **changes)
    resumed = train(tmp_path / "killed", cache, **changes)
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-6)
    assert resumed["validation_loss"] == pytest.approx(whole["validation_loss"], rel=1e-6)
    assert resumed["tokens"] == whole["tokens"] == 8 * 2 * 32
    assert len((tmp_path / "whole" / "samples.jsonl").read_text().splitlines()) == 2


def test_what_was_trained_loads_as_any_model_and_its_cache_is_measured(tmp_path: Path, cache: str) -> None:
    result = train(tmp_path, cache, kv_lora_rank=4)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(model, GPT2MLAForCausalLM)
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".bin", ".pt", ".pth")]
    assert result["cache_bytes_per_token"] == 4 * 2
    assert result["validation_perplexity"] == pytest.approx(math.exp(result["validation_loss"]))
    assert result["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    measured = [row["validation_loss"] for row in result["history"] if "validation_loss" in row]
    assert len(measured) == 2
    assert measured[-1] == result["validation_loss"]


def test_time_ends_a_run_and_its_schedule(tmp_path: Path, cache: str) -> None:
    seconds = 1.5
    result = train(
        tmp_path, cache, max_hours=seconds / 3600, max_steps=1_000_000, eval_strategy="no", save_strategy="no"
    )
    assert seconds <= result["seconds"] < seconds + 1
    rates = [row["learning_rate"] for row in result["history"] if "learning_rate" in row]
    assert rates[-1] < 0.05 * max(rates)


def test_tokens_are_a_budget_and_too_few_are_named(tmp_path: Path, cache: str) -> None:
    tokens = 2 * 32
    assert train(tmp_path / "a", cache, max_tokens=3 * tokens, max_steps=-1)["tokens"] == 3 * tokens
    with pytest.raises(ConfigError, match="less than one step of 64"):
        train(tmp_path / "b", cache, max_tokens=tokens - 1)
    with pytest.raises(ConfigError, match="less than one batch of 100000"):
        train(tmp_path / "c", cache, per_device_train_batch_size=100_000)


WRONG_SETTINGS = {
    "an unknown architecture": ({"architecture": "gpt5"}, "gpt5"),
    "MLA settings of a GPT-2": ({"architecture": "gpt2", "kv_lora_rank": 4}, "kv_lora_rank belong to MLA"),
    "a splice that is no JSON": ({"kvsplice": "{rank"}, "no JSON"),
    "an unknown optimiser": ({"optimizer": "sgdd"}, "sgdd"),
    "no time": ({"max_hours": 0.0}, "max_hours"),
}


@pytest.mark.parametrize(("settings", "phrase"), WRONG_SETTINGS.values(), ids=WRONG_SETTINGS)
def test_settings_that_cannot_be_used_are_named(settings: dict[str, Any], phrase: str) -> None:
    with pytest.raises(ConfigError, match=phrase):
        pretraining.parse([], **settings)


def test_configs_hold_known_settings_only() -> None:
    for path in (ROOT / "configs" / "gpt2_mla").glob("*.yaml"):
        importlib.import_module("kvsplice_hf.bench.command_line").read_settings(path, pretraining.KINDS)
    for path in (ROOT / "configs" / "ablations").glob("*.yaml"):
        assert list(ablation.read_ablation(path, None, {}).runs())
    nano = ablation.read_ablation(ROOT / "configs" / "ablations" / "nano.yaml", None, {})
    assert len({nano.fingerprint(key) for key in nano.runs()}) == 3 * len(nano.arms)


def test_the_script_takes_a_config_file_and_the_command_line_over_it(tmp_path: Path, cache: str) -> None:
    config = tmp_path / "settings.yaml"
    small = SMALL | {"cache": cache, "output_dir": str(tmp_path / "out"), "data": "pydoc", "max_steps": 500}
    config.write_text(json.dumps(small), encoding="utf-8")
    made = run_program(
        "run/train_gpt2_mla.py", "--config", str(config), "--max_steps", "2", "--kvsplice", '{"rank": 3}'
    )
    assert made["step"] == 2
    assert made["cache_bytes_per_token"] == 3 * 2
    assert {"machine", "versions", "command", "history"} <= set(made)
    with pytest.raises(SystemExit, match="holds a finished run"):
        run_program("run/train_gpt2_mla.py", "--config", str(config))
    config.write_text("n_layers: 3", encoding="utf-8")
    with pytest.raises(SystemExit, match="holds n_layers"):
        run_program("run/train_gpt2_mla.py", "--config", str(config))


# Ablation and report


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, cache: str) -> Path:
    """The first seed of all arms."""
    folder = tmp_path_factory.mktemp("results") / "first"
    settings = [f"cache={cache}", "use_cpu=true", "disable_tqdm=true"]
    done = run_program(
        "research/ablate.py", str(SMOKE), "--output_dir", str(folder), "--seeds", "0", "--set", *settings
    )
    assert done["done"] == done["runs"] == 6
    return folder


def test_finished_runs_are_skipped_and_other_settings_refused(results: Path, cache: str) -> None:
    before = (results / "runs.jsonl").read_bytes()
    common = [str(SMOKE), "--output_dir", str(results), "--seeds", "0"]
    settings = ["--set", f"cache={cache}", "use_cpu=true"]
    assert run_program("research/ablate.py", *common, *settings) == {
        "folder": str(results),
        "runs": 6,
        "skipped": 6,
        "done": 0,
    }
    assert (results / "runs.jsonl").read_bytes() == before
    with pytest.raises(SystemExit, match="with other settings"):
        run_program("research/ablate.py", *common, *settings, "learning_rate=0.1")


def test_arms_differ_as_they_should(results: Path) -> None:
    found = {run["arm"]: run for run in records.read_runs(results)}
    sizes = {name: run["cache_bytes_per_token"] for name, run in found.items()}
    layers, width = 2, 32
    assert sizes["GPT-2"] == layers * 2 * width * 2
    assert sizes["MLA-16"] == layers * 16 * 2
    half = layers * 8 * 2
    assert sizes["MLA-8"] == half
    assert {name for name, size in sizes.items() if size == half} == {
        "MLA-8",
        "MLA-16, splice 8",
        "MLA-16, calibrated 8",
        "MLA-16, tuned 8",
    }
    assert found["MLA-16, tuned 8"]["tuning_tokens"] == 2 * 2 * 64
    assert found["MLA-16, tuned 8"]["validation_loss"] != found["MLA-16, calibrated 8"]["validation_loss"]
    assert (results / "tokens" / "MLA-16__calibrated_8" / "seed-0" / "kvsplice_config.json").is_file()
    assert not list(results.rglob("checkpoint-*")), "what serves to resume is of no use any more"


def test_a_run_that_was_cut_off_before_it_was_recorded_is_taken_up(results: Path, tmp_path: Path, cache: str) -> None:
    common = [str(SMOKE), "--output_dir", str(tmp_path), "--arms", "MLA-8", "--seeds", "0", "--set", f"cache={cache}"]
    folder = tmp_path / "tokens" / "MLA-8" / "seed-0"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablate, "append_run", lambda *_: sys.exit("killed"))
        with pytest.raises(SystemExit):
            run_program("research/ablate.py", *common, "use_cpu=true")
    assert (folder / "checkpoint-6").is_dir()
    # Half a line, as a killed process may leave.
    (tmp_path / "runs.jsonl").write_text('{"arm": "MLA-8", "se', encoding="utf-8")
    assert run_program("research/ablate.py", *common, "use_cpu=true")["done"] == 1
    (again,) = records.read_runs(tmp_path)
    whole = {run["arm"]: run for run in records.read_runs(results)}["MLA-8"]
    assert again["validation_loss"] == pytest.approx(whole["validation_loss"], rel=1e-6)


def test_two_processes_share_every_run(tmp_path: Path, cache: str) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    options = ["--output_dir", str(tmp_path), "--arms", "MLA-16, tuned 8", "--seeds", "0", "--set", f"cache={cache}"]
    process = subprocess.run(
        [sys.executable, *launcher, "scripts/research/ablate.py", str(SMOKE), *options, "use_cpu=true"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout.splitlines()[-1])["done"] == 2
    trained, tuned = records.read_runs(tmp_path)
    assert trained["tokens"] == 2 * 6 * 4 * 64
    assert tuned["tuning_tokens"] == 2 * 2 * 2 * 64
    assert trained["processes"] == 2


def test_the_report_joins_the_folder_of_another_machine(results: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    second.mkdir()
    records.write_experiment(second, records.read_experiment(results))
    for run in records.read_runs(results):
        shifted = {"seed": 1, "machine": "another machine", "validation_loss": run["validation_loss"] + 0.01}
        records.append_run(second, run | shifted)
    made = run_program("research/report.py", str(results), str(second), "--output", str(tmp_path))
    ((name, rows),) = made["results"].items()
    assert name.startswith("smoke, tokens")
    assert [row["arm"] for row in rows] == records.read_experiment(results)["arms"]
    assert all(row["seeds"] == 2 and row["loss_interval"] == pytest.approx(12.706 * 0.005, rel=1e-4) for row in rows)
    by_arm = {row["arm"]: row for row in rows}
    assert by_arm["MLA-8"]["difference"] is None, "the control is not compared with itself"
    assert by_arm["GPT-2"]["difference_interval"] == pytest.approx(0.0, abs=1e-9)
    text = Path(made["markdown"]).read_text()
    assert "another machine: tokens/s" in text
    assert "Does a splice trained end to end beat a latent of its size?" in text
    figures = list(Path(made["folder"]).glob("*.png"))
    assert len(figures) == 4
    assert all(figure.name in text for figure in figures)


def test_results_on_other_text_are_not_mixed(results: Path, tmp_path: Path) -> None:
    records.write_experiment(tmp_path, records.read_experiment(results))
    records.append_run(tmp_path, records.read_runs(results)[0] | {"data": "of another text", "seed": 1})
    made = run_program("research/report.py", str(results), str(tmp_path), "--output", str(tmp_path))
    assert sorted(len(rows) for rows in made["results"].values()) == [1, 6]


def test_intervals_are_students() -> None:
    found = report.interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half == pytest.approx(4.303 / math.sqrt(3), rel=1e-4)
    assert report.interval([1.0]).half is None
    paired = report.paired_difference({0: 1.0, 1: 5.0, 2: 9.0}, {1: 4.0, 2: 8.0})
    assert paired == (1.0, 0.0)
    assert report.paired_difference({0: 1.0}, {1: 1.0}) is None


QUESTION = {"ask": "Is it better?", "arm": "a", "against": "b"}


def test_an_answer_is_as_sure_as_its_interval() -> None:
    theirs = {0: 2.0, 1: 2.1, 2: 2.2}
    better = {seed: loss - 0.1 - 0.001 * seed for seed, loss in theirs.items()}
    assert report.answer(QUESTION, {"a": better, "b": theirs}).startswith("Yes: a against b, -0.10")
    assert report.answer(QUESTION, {"a": theirs, "b": better}).startswith("No")
    assert report.answer(QUESTION, {"a": {0: 1.9, 1: 2.3, 2: 2.0}, "b": theirs}).startswith("Not decided")
    assert report.answer(QUESTION, {"a": {0: 1.9}, "b": theirs}).startswith("One seed only")
    assert report.answer(QUESTION, {"b": theirs}) == "Not measured yet."


WRONG_ABLATIONS = {
    "an unknown key": ("nmae: x\narms: {a: {}}", "nmae"),
    "no arms": ("name: x", "has no arms"),
    "arms in a list": ("arms: [a, b]", "must be a mapping"),
    "an unknown setting of an arm": ("arms: {a: {kv_lora_rnak: 3}}", "arm 'a' has kv_lora_rnak"),
    "an unknown key after training": ("arms: {a: {}, b: {after: a, rank: 3}}", "arm 'b' has rank"),
    "an unknown setting of a splice": ("arms: {a: {}, b: {after: a, kvsplice: {rnak: 3}}}", "arm 'b': .*rnak"),
    "an unknown setting of tuning": (
        "arms: {a: {}, b: {after: a, kvsplice: {rank: 3}, tune: {steps: 3}}}",
        "arm 'b': `tune` has steps",
    ),
    "nothing to do": ("arms: {a: {}, b: {after: a}}", "arm 'b': .*needs `kvsplice`"),
    "a parent that is not there": ("arms: {b: {after: a, kvsplice: {rank: 3}}}", "comes after 'a'"),
    "a control that is not there": ("control: c\narms: {a: {}}", "refers to c"),
    "a budget that is not there": ("arms: {a: {budgets: [time]}}", "asks for the budgets time"),
}


@pytest.mark.parametrize(("text", "phrase"), WRONG_ABLATIONS.values(), ids=WRONG_ABLATIONS)
def test_an_ablation_that_cannot_be_run_is_named(text: str, phrase: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match=phrase):
        run_program("research/ablate.py", str(path), "--output_dir", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_what_is_not_there_is_named(tmp_path: Path, cache: str) -> None:
    with pytest.raises(SystemExit, match="nothing.yaml cannot be read"):
        run_program("research/ablate.py", str(tmp_path / "nothing.yaml"))
    with pytest.raises(SystemExit, match="arms has MLA-9; it takes GPT-2"):
        run_program("research/ablate.py", str(SMOKE), "--output_dir", str(tmp_path / "out"), "--arms", "MLA-9")
    with pytest.raises(SystemExit, match="--set has 'x'"):
        run_program("research/ablate.py", str(SMOKE), "--output_dir", str(tmp_path / "out"), "--set", "x")
    missing = ["--set", f"data={tmp_path / 'no_text'}", f"cache={cache}", "use_cpu=true"]
    with pytest.raises(SystemExit, match="no_text"):
        run_program("research/ablate.py", str(SMOKE), "--output_dir", str(tmp_path / "out"), *missing)
    with pytest.raises(SystemExit, match="no_results is not there"):
        run_program("research/report.py", str(tmp_path / "no_results"))
    records.write_experiment(tmp_path, {"name": "x", "arms": [], "control": None, "questions": []})
    with pytest.raises(SystemExit, match="holds no finished run yet"):
        run_program("research/report.py", str(tmp_path))
