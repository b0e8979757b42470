"""The splice and adapters are trained together, saved side by side, and read again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ordinary_models import build_ordinary
from test_ordinary import calibration_of
from test_training import RECIPES, arguments, dataset
from tiny_models import build
from transformers import Trainer, TrainingArguments, default_data_collator

from kvsplice_hf import (
    CheckpointError,
    KVSpliceConfig,
    TrainingError,
    load_kvsplice,
    merge_kvsplice,
    patch_model_with_kvsplice,
    save_kvsplice,
    unmerge_kvsplice,
)
from kvsplice_hf.training import KVSpliceTrainer, freeze_all_but_kvsplice
from kvsplice_hf.weights.adapters import adapter_parameters


peft = pytest.importorskip("peft", reason="peft is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

MLA, ORDINARY = "deepseek_v3", "llama"
TARGETS = {MLA: ["kv_b_proj", "q_proj", "o_proj"], ORDINARY: ["q_proj", "k_proj", "v_proj", "o_proj"]}
ORDERS = ["patched, then adapted", "adapted, then patched"]
both_orders = pytest.mark.parametrize("order", ORDERS)
both_kinds = pytest.mark.parametrize("name", TARGETS)
IDS = torch.randint(8, 128, (2, 16), generator=torch.Generator().manual_seed(3))


def stock(name: str) -> Any:
    return build(name) if name == MLA else build_ordinary(name)


def adapt(model: Any, name: str) -> Any:
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=TARGETS[name], r=2, lora_alpha=8, init_lora_weights=False)
    return peft.get_peft_model(model, config)


def patch(model: Any, name: str) -> Any:
    if name == MLA:
        return patch_model_with_kvsplice(model, RECIPES["half the rank"])
    config = KVSpliceConfig(bits=4, sink_tokens=2)
    return patch_model_with_kvsplice(model, config, calibration=calibration_of(name))


def together(name: str, order: str) -> Any:
    model = stock(name)
    model = adapt(patch(model, name), name) if order == ORDERS[0] else patch(adapt(model, name), name)
    return freeze_all_but_kvsplice(model, train_adapters=True)


def parameters(model: Any) -> dict[str, dict[str, torch.Tensor]]:
    adapters = {id(parameter) for parameter in adapter_parameters(model)}
    kinds: dict[str, dict[str, torch.Tensor]] = {"splice": {}, "adapter": {}, "base": {}}
    for name, parameter in model.named_parameters():
        kind = "splice" if ".kvsplice." in name else "adapter" if id(parameter) in adapters else "base"
        kinds[kind][name] = parameter
    return kinds


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits


def plain_trainer(model: Any, folder: Path) -> Trainer:
    settings = TrainingArguments(
        str(folder), max_steps=2, per_device_train_batch_size=4, learning_rate=2e-3, report_to="none", use_cpu=True
    )
    return Trainer(model, settings, train_dataset=dataset(), data_collator=default_data_collator)


def spliced_trainer(model: Any, folder: Path, **changes: Any) -> KVSpliceTrainer:
    settings = {"max_steps": 2, "lm_weight": 1.0, "adapter_learning_rate": 1e-2} | changes
    return KVSpliceTrainer(
        model, arguments(folder, **settings), train_dataset=dataset(), data_collator=default_data_collator
    )


@pytest.mark.parametrize("trainer", [plain_trainer, spliced_trainer])
@both_orders
@both_kinds
def test_both_are_trained_and_the_base_is_not(name: str, order: str, trainer: Any, tmp_path: Path) -> None:
    model = together(name, order)
    before = {kind: {n: p.detach().clone() for n, p in own.items()} for kind, own in parameters(model).items()}
    trainer(model, tmp_path).train()
    for kind, own in parameters(model).items():
        changed = {n for n, p in own.items() if not torch.equal(p, before[kind][n])}
        assert own
        if kind == "adapter":
            assert changed == set(own)
        else:
            assert bool(changed) is (kind == "splice")


@both_orders
@both_kinds
def test_what_was_trained_is_saved_side_by_side_and_read_again(name: str, order: str, tmp_path: Path) -> None:
    model = together(name, order)
    spliced_trainer(model, tmp_path / "run", save_strategy="steps", save_steps=2).train()
    folder = tmp_path / "run" / "checkpoint-2"
    files = {path.name for path in folder.iterdir()}
    assert {"adapter_model.safetensors", "kvsplice_model.safetensors"} <= files
    assert not {"model.safetensors", "pytorch_model.bin"} & files
    expected = logits(model)
    again = peft.PeftModel.from_pretrained(stock(name), str(folder))
    torch.testing.assert_close(logits(load_kvsplice(again, folder)), expected, atol=1e-5, rtol=0)
    again = peft.PeftModel.from_pretrained(load_kvsplice(stock(name), folder), str(folder))
    torch.testing.assert_close(logits(again), expected, atol=1e-5, rtol=0)


@both_orders
def test_a_run_that_is_resumed_ends_where_the_other_did(order: str, tmp_path: Path) -> None:
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = together(MLA, order)
    spliced_trainer(whole, tmp_path, **settings).train()
    resumed = together(MLA, order)
    spliced_trainer(resumed, tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for kind, own in parameters(whole).items():
        for one, two in zip(own.values(), parameters(resumed)[kind].values(), strict=True):
            torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)


def test_a_splice_knows_its_base_with_and_without_an_adapter(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_kvsplice(together(MLA, ORDERS[0]), tmp_path)
    caplog.clear()
    load_kvsplice(stock(MLA), tmp_path)
    load_kvsplice(adapt(stock(MLA), MLA), tmp_path)
    assert "other weights" not in caplog.text
    load_kvsplice(build(MLA, seed=1), tmp_path)
    assert "other weights" in caplog.text


def test_what_cannot_be_trained_or_read_again_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no adapter is active"):
        freeze_all_but_kvsplice(patch(stock(MLA), MLA), train_adapters=True)
    model = together(MLA, ORDERS[0])
    with pytest.raises(TrainingError, match=r"Put them on with peft\.get_peft_model"):
        spliced_trainer(model.get_base_model(), tmp_path)
    frozen = freeze_all_but_kvsplice(together(MLA, ORDERS[0]))
    assert not any(p.requires_grad for p in adapter_parameters(frozen))
    spliced_trainer(frozen, tmp_path, save_strategy="steps", save_steps=2).train()
    assert not (tmp_path / "checkpoint-2" / "adapter_model.safetensors").exists()
    with pytest.raises(CheckpointError, match="There is no adapter 'default'"):
        spliced_trainer(together(MLA, ORDERS[0]), tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@both_orders
def test_a_merged_splice_is_unmerged_before_adapters_are_trained(order: str) -> None:
    model = merge_kvsplice(together(MLA, order)).train()
    with pytest.raises(TrainingError, match="unmerge_kvsplice"):
        model(input_ids=IDS, labels=IDS, use_cache=False)
    unmerge_kvsplice(model)(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    assert all(parameter.grad is not None for parameter in adapter_parameters(model))
