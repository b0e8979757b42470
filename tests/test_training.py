"""Fine-tuning: only the splice learns, the loss falls, runs resume where they stopped, and misuse is named."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import trained_model
from datasets import Dataset
from test_packed import calibrated
from tiny_models import build
from transformers import Trainer, TrainingArguments, default_data_collator

from kvsplice_hf import (
    ConfigError,
    KVSpliceConfig,
    PatchStateError,
    TrainingError,
    load_kvsplice,
    patch_model_with_kvsplice,
    save_kvsplice,
    splice_disabled,
    unpatch_model,
)
from kvsplice_hf.patch.state import patched_sites
from kvsplice_hf.training import (
    KVSpliceTrainer,
    KVSpliceTrainingArguments,
    freeze_all_but_kvsplice,
    print_trainable_parameters,
)
from kvsplice_hf.training.objectives import divergence_from


ROOT = Path(__file__).parent.parent
RECIPES = {
    "half the rank": KVSpliceConfig(compression_ratio=0.5, sink_tokens=2),
    "half the rank, LayerNorm": KVSpliceConfig(compression_ratio=0.5, use_layernorm=True, sink_tokens=2),
    "packed": KVSpliceConfig(bits=3, sink_tokens=2),
}
LOSSES = {
    "divergence": {"kl_weight": 1.0},
    "labels": {"kl_weight": 0.0, "lm_weight": 1.0},
    "latents": {"kl_weight": 0.0, "reconstruction_weight": 1.0},
    "all three": {"kl_weight": 1.0, "lm_weight": 0.1, "reconstruction_weight": 0.1},
}
all_recipes = pytest.mark.parametrize("recipe", RECIPES)


def windows(count: int = 16, tokens: int = 16) -> torch.Tensor:
    return torch.randint(8, 128, (count, tokens), generator=torch.Generator().manual_seed(1))


def dataset(count: int = 16) -> Dataset:
    rows = windows(count).tolist()
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def spliced(recipe: str, name: str = "deepseek_v3", dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    model = build(name, dtype)
    config = RECIPES[recipe]
    calibration = None if config.use_layernorm else calibrated(model)
    patch_model_with_kvsplice(model, config, calibration=calibration)
    return freeze_all_but_kvsplice(model, **settings)


def arguments(folder: Path, **changes: Any) -> KVSpliceTrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-3,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "data_seed": 0,
    }
    return KVSpliceTrainingArguments(**settings | changes)


def trainer(model: Any, folder: Path, **changes: Any) -> KVSpliceTrainer:
    return KVSpliceTrainer(
        model, arguments(folder, **changes), train_dataset=dataset(), data_collator=default_data_collator
    )


@torch.no_grad()
def divergence(model: Any) -> float:
    model.eval()
    ids = windows()
    with splice_disabled(model):
        original = model(ids, use_cache=False).logits
    return divergence_from(original, model(ids, use_cache=False).logits, torch.ones_like(ids, dtype=torch.bool)).item()


@all_recipes
def test_training_brings_the_model_closer_and_leaves_the_base_bit_for_bit(recipe: str, tmp_path: Path) -> None:
    stock = build("deepseek_v3")
    before_tensors = {name: tensor.clone() for name, tensor in stock.state_dict().items()}
    logits = stock(windows(), use_cache=False).logits
    model = spliced(recipe)
    before = divergence(model)
    trainer(model, tmp_path, max_steps=25).train()
    assert divergence(model) < 0.8 * before
    gradients = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert all(".kvsplice." in name for name in gradients)
    unpatch_model(model)
    assert all(torch.equal(tensor, before_tensors[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model.eval()(windows(), use_cache=False).logits, logits)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_objective_falls(loss: str, tmp_path: Path) -> None:
    model = spliced("half the rank")
    run = trainer(model, tmp_path, max_steps=25, logging_steps=5, lr_scheduler_type="constant", **LOSSES[loss])
    run.train()
    losses = [row["loss"] for row in run.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3", "minicpm3", "youtu"])
def test_every_parameter_of_the_splice_gets_a_gradient(name: str) -> None:
    model = build(name)
    patch_model_with_kvsplice(model, RECIPES["packed"], calibration=calibrated(model))
    freeze_all_but_kvsplice(model.train())
    model(windows(), labels=windows()).loss.backward()  # with the cache that transformers makes unless told otherwise
    for _, patched in patched_sites(model):
        gradients = {name: parameter.grad for name, parameter in patched.splice.named_parameters()}
        assert set(gradients) >= {"transform_scale", "compress.weight", "expand.weight", "codec.scales"}
        assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients.values())


def test_a_plain_trainer_improves_the_loss_as_well(tmp_path: Path) -> None:
    model = spliced("half the rank")
    plain = {name: value for name, value in arguments(tmp_path).to_dict().items() if name in _OF_PLAIN}
    run = Trainer(
        model,
        TrainingArguments(**plain | {"max_steps": 25, "logging_steps": 5, "report_to": "none"}),
        train_dataset=dataset(),
        data_collator=default_data_collator,
    )
    run.train()
    losses = [row["loss"] for row in run.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]


_OF_PLAIN = {"output_dir", "per_device_train_batch_size", "learning_rate", "save_strategy", "disable_tqdm", "use_cpu"}


@all_recipes
def test_a_run_that_was_cut_off_resumes_with_the_same_losses(recipe: str, tmp_path: Path) -> None:
    def losses(run: Any) -> list[float]:
        return [row["loss"] for row in run.state.log_history if "loss" in row]

    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = trainer(spliced(recipe), tmp_path / "whole", **saving)
    whole.train()
    second = trainer(spliced(recipe), tmp_path / "second", **saving)
    second.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(second) == losses(whole)
    for (_, ours), (_, theirs) in zip(patched_sites(second.model), patched_sites(whole.model), strict=True):
        for name, tensor in ours.splice.state_dict().items():
            assert torch.equal(tensor, theirs.splice.state_dict()[name]), name


@all_recipes
def test_checkpoints_hold_the_splice_alone_and_load_into_a_fresh_base_model(recipe: str, tmp_path: Path) -> None:
    model = spliced(recipe)
    run = trainer(model, tmp_path, save_strategy="steps", save_steps=4)
    run.train()
    folder = tmp_path / "checkpoint-4"
    assert {"kvsplice_config.json", "kvsplice_model.safetensors"} <= {path.name for path in folder.iterdir()}
    assert not {"model.safetensors", "training_args.bin"} & {path.name for path in folder.iterdir()}
    expected = model.eval()(windows(), use_cache=False).logits
    fresh = load_kvsplice(build("deepseek_v3"), folder)
    torch.testing.assert_close(fresh(windows(), use_cache=False).logits, expected)


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path: Path) -> None:
    model = spliced("packed")
    run = KVSpliceTrainer(
        model,
        arguments(
            tmp_path,
            max_steps=4,
            learning_rate=0.5,  # so that it only gets worse
            eval_strategy="steps",
            save_strategy="steps",
            eval_steps=1,
            save_steps=1,
            load_best_model_at_end=True,
        ),
        train_dataset=dataset(),
        eval_dataset=dataset(4),
        data_collator=default_data_collator,
    )
    run.train()
    best = load_kvsplice(build("deepseek_v3"), run.state.best_model_checkpoint)
    torch.testing.assert_close(model.eval()(windows(), use_cache=False).logits, best(windows(), use_cache=False).logits)


def test_groups_have_learning_rates_of_their_own(tmp_path: Path) -> None:
    run = trainer(spliced("packed"), tmp_path, transform_learning_rate=0.1, steps_learning_rate=0.0, weight_decay=0.01)
    groups = {group["name"]: group for group in run.create_optimizer().param_groups}
    assert {name: group["lr"] for name, group in groups.items()} == {"projection": 2e-3, "transform": 0.1, "steps": 0.0}
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "projection": 0.01,
        "transform": 0.0,
        "steps": 0.0,
    }


def test_a_model_in_half_precision_trains_its_splice_in_float32(tmp_path: Path) -> None:
    model = spliced("half the rank", dtype=torch.bfloat16)
    before = divergence(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    trainer(model, tmp_path, max_steps=25).train()
    assert divergence(model) < before
    assert model.generate(windows(1), max_new_tokens=3, do_sample=False).shape == (1, 19)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_accumulated_and_checkpointed_gradients_are_the_same(checkpointing: bool, tmp_path: Path) -> None:
    def after(**changes: Any) -> torch.Tensor:
        model = spliced("half the rank")
        trainer(model, tmp_path, max_steps=2, optim="sgd", **changes).train()
        return patched_sites(model)[0][1].splice.compress.weight

    known = {item.name for item in fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    changed = {name: checkpointing, "per_device_train_batch_size": 2}
    torch.testing.assert_close(after(), after(gradient_accumulation_steps=2, **changed), atol=1e-6, rtol=1e-5)


def test_reports_hold_the_terms_and_the_transform(tmp_path: Path) -> None:
    run = trainer(spliced("half the rank"), tmp_path, reconstruction_weight=0.5)
    run.train()
    report = run.state.log_history[0]
    names = {f"kvsplice/{part}_{kind}" for part in ("scale", "shift") for kind in ("mean", "std", "min", "max")}
    assert names | {"kvsplice/kl", "kvsplice/reconstruction", "kvsplice/layer_1/scale_mean"} <= set(report)
    assert report["loss"] == pytest.approx(report["kvsplice/kl"] + 0.5 * report["kvsplice/reconstruction"], rel=1e-3)
    assert report["kvsplice/scale_min"] > 0


def test_tensorboard_gets_numbers_and_histograms(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    os.environ["TENSORBOARD_LOGGING_DIR"] = str(tmp_path / "logs")
    try:
        trainer(spliced("half the rank"), tmp_path, report_to="tensorboard").train()
    finally:
        del os.environ["TENSORBOARD_LOGGING_DIR"]
    tags: dict[str, set[str]] = {"scalars": set(), "histograms": set()}
    for events in {path.parent for path in tmp_path.rglob("events.out.*")}:
        found = EventAccumulator(str(events)).Reload().Tags()
        tags = {kind: tags[kind] | set(found[kind]) for kind in tags}
    assert any(tag.endswith("kvsplice/kl") for tag in tags["scalars"])
    assert "kvsplice/layer_0/scale" in tags["histograms"]


def test_the_line_about_parameters_is_that_of_peft(capsys: pytest.CaptureFixture) -> None:
    model = spliced("half the rank")
    print_trainable_parameters(model)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert capsys.readouterr().out.startswith(f"trainable params: {trained:,d} || all params: ")


def test_misuse_is_named(tmp_path: Path) -> None:
    with pytest.raises(PatchStateError, match="patch_model_with_kvsplice"):
        freeze_all_but_kvsplice(build("deepseek_v3"))
    with pytest.raises(PatchStateError, match="patch_model_with_kvsplice"):
        trainer(build("deepseek_v3"), tmp_path)
    model = spliced("half the rank")
    model.lm_head.weight.requires_grad_(True)
    with pytest.raises(TrainingError, match=r"lm_head\.weight.*freeze_all_but_kvsplice"):
        trainer(model, tmp_path)
    with pytest.raises(TrainingError, match="No parameter of the splice"):
        trainer(model.requires_grad_(False), tmp_path)
    with pytest.raises(ConfigError, match="one must be above 0"):
        arguments(tmp_path, kl_weight=0.0)
    with pytest.raises(ConfigError, match="TrainingArguments; it must be KVSpliceTrainingArguments"):
        KVSpliceTrainer(spliced("packed"), TrainingArguments(output_dir=str(tmp_path)))


def test_a_loss_that_is_not_finite_and_a_wrong_column_end_the_run(tmp_path: Path) -> None:
    model = spliced("half the rank")
    with torch.no_grad():
        patched_sites(model)[0][1].splice.compress.weight[0, 0] = torch.nan
    with pytest.raises(TrainingError, match="loss is nan at step 0"):
        trainer(model, tmp_path).train()
    run = trainer(spliced("half the rank"), tmp_path, remove_unused_columns=False)
    run.train_dataset = Dataset.from_dict({"tokens": windows().tolist()})
    with pytest.raises(TrainingError, match=r"\['tokens'\], not `input_ids`"):
        run.train()


def test_padding_is_not_counted(tmp_path: Path) -> None:
    run = trainer(spliced("half the rank"), tmp_path, lm_weight=1.0)
    ids = windows(2)
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 5).long().expand(2, -1)
    run.model.eval()
    with torch.no_grad():
        plain = run.compute_loss(run.model, {"input_ids": ids})
        found = run.compute_loss(run.model, {"input_ids": padded, "attention_mask": mask})
    # The first real token is predicted by none in the one and by padding in the other, where labels hide it.
    assert found == pytest.approx(plain.item(), rel=0.1)


SMALL = ["--dataset", "pydoc", "--evaluation_windows", "2", "--evaluation_window", "64", "--block_size", "64"]
SMALL += ["--train_windows", "24", "--validation_windows", "4", "--max_steps", "3", "--logging_steps", "1", "--use_cpu"]
SMALL += ["--calibration", "pydoc", "--calibration_tokens", "1024", "--compression_ratio", "0.5"]


def run_script(*options: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(ROOT / "scripts" / "run" / "finetune_kvsplice.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_the_script_takes_a_config_file_and_the_command_line_over_it(model_folder: str, tmp_path: Path) -> None:
    config = tmp_path / "tune.yaml"
    config.write_text(f"model: {model_folder}\nmax_steps: 50\nlearning_rate: 1.0e-3\noutput_dir: {tmp_path / 'out'}\n")
    process = run_script("--config", str(config), *SMALL)
    assert process.returncode == 0, process.stderr
    report = json.loads(process.stdout.splitlines()[-1])
    assert report["before"]["pydoc"]["kl"] > 0
    assert set(report["after"]) == {"pydoc"}
    assert max(row["step"] for row in report["history"]) == 3
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"kvsplice_config.json", "kvsplice_model.safetensors", "training.png", "report.json"} <= made


def test_two_processes_train_one_splice(model_folder: str, tmp_path: Path) -> None:
    launcher = ("-m", "accelerate.commands.launch", "--config_file")
    process = run_script(
        *("--model", model_folder, *SMALL, "--output_dir", str(tmp_path)),
        launcher=(*launcher, str(ROOT / "configs" / "accelerate_two_processes_cpu.yaml")),
    )
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout.splitlines()[-1])["after"]["pydoc"]["kl"] > 0
    load_kvsplice(copy.deepcopy(trained_model()), tmp_path)


WRONG = {
    "an unknown setting": ("learning_rat: 1", "learning_rat"),
    "no mapping": ("- 1", "no mapping"),
    "a broken file": ("a: [", "cannot be read"),
}


@pytest.mark.parametrize(("text", "phrase"), WRONG.values(), ids=WRONG)
def test_a_config_that_cannot_be_used_is_named(text: str, phrase: str, tmp_path: Path) -> None:
    config = tmp_path / "tune.yaml"
    config.write_text(text)
    process = run_script("--config", str(config))
    assert process.returncode != 0
    assert phrase in process.stderr
    assert "Traceback" not in process.stderr


def test_a_data_set_without_the_column_is_named(model_folder: str, tmp_path: Path) -> None:
    Dataset.from_dict({"body": ["some text"] * 4}).save_to_disk(tmp_path / "set")
    process = run_script("--model", model_folder, *SMALL, "--dataset", str(tmp_path / "set"), "--evaluation", "pydoc")
    assert process.returncode != 0
    assert "['body']; --text_column is 'text'" in process.stderr


def test_a_saved_splice_can_be_tuned_further(model_folder: str, tmp_path: Path) -> None:
    model = copy.deepcopy(trained_model())
    patch_model_with_kvsplice(model, compression_ratio=0.5)
    save_kvsplice(model, tmp_path / "start")
    options = ["--model", model_folder, "--splice", str(tmp_path / "start"), "--output_dir", str(tmp_path / "out")]
    process = run_script(*options, *SMALL)
    assert process.returncode == 0, process.stderr
