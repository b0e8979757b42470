"""Weights that are elsewhere or nowhere: everything works on an offloaded model as on a loaded one, or says why not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module
from test_packed import calibrated
from tiny_models import build, tiny_batch
from torch import nn
from transformers import PreTrainedModel

from kvsplice_hf import (
    ConfigError,
    KVSpliceCalibrator,
    KVSpliceConfig,
    KVSpliceError,
    UnsupportedError,
    explain,
    get_kv_cache_size,
    load_kvsplice,
    merge_kvsplice,
    patch_model_with_kvsplice,
    prune_kvsplice,
    save_kvsplice,
    unmerge_kvsplice,
    unpatch_model,
)
from kvsplice_hf.calibration.fingerprint import model_fingerprint
from kvsplice_hf.calibration.sampling import sample_from_model
from kvsplice_hf.evaluation import score_windows
from kvsplice_hf.patch.sites import find_sites
from kvsplice_hf.weights.offload import (
    execution_device,
    input_device,
    read_all,
    read_parameter,
    write_all,
    write_parameter,
)


NAME = "deepseek_v3"
CPU = torch.device("cpu")


def to_cpu(model: nn.Module, folder: Path) -> Any:
    cpu_offload(model, execution_device=CPU)
    return model


def to_disk(model: nn.Module, folder: Path) -> Any:
    disk_offload(model, str(folder / "offloaded"), execution_device=CPU)
    return model


def by_device_map(model: nn.Module, folder: Path) -> Any:
    devices = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    devices |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    return dispatch_model(model, devices, main_device="cpu", offload_dir=str(folder / "mapped"), force_hooks=True)


def with_another_hook(model: nn.Module, folder: Path) -> Any:
    """Two hooks on each module, as several libraries that each add one make it."""
    cpu_offload(model, execution_device=CPU)
    for module in model.modules():
        if hasattr(module, "_hf_hook"):
            add_hook_to_module(module, ModelHook(), append=True)
    return model


WAYS = {"cpu": to_cpu, "disk": to_disk, "device map": by_device_map, "two hooks": with_another_hook}
every_way = pytest.mark.parametrize("way", WAYS)
KINDS = ["plain", "packed"]


def patched(kind: str, seed: int = 0, ratio: float = 0.5) -> PreTrainedModel:
    model = build(NAME, seed=seed)
    if kind == "packed":
        config = KVSpliceConfig(bits=4.0, sink_tokens=2)
        return patch_model_with_kvsplice(model, config, calibration=calibrated(build(NAME)))
    return patch_model_with_kvsplice(model, KVSpliceConfig(compression_ratio=ratio, sink_tokens=2))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids, mask = tiny_batch(NAME)
    return model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]


def tokens(model: Any) -> list[list[int]]:
    ids, mask = tiny_batch(NAME)
    return model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=0).tolist()


@every_way
@pytest.mark.parametrize("kind", KINDS)
def test_an_offloaded_model_generates_the_same(kind: str, way: str, tmp_path: Path) -> None:
    model = patched(kind)
    expected = logits(model), tokens(model)
    model = WAYS[way](model, tmp_path)
    assert torch.equal(logits(model), expected[0])
    assert tokens(model) == expected[1]
    assert all(layer.decode == "C++" or layer.refused for layer in explain(model).layers)


@every_way
@pytest.mark.parametrize("kind", KINDS)
def test_the_splice_of_an_offloaded_model_is_saved_whole(kind: str, way: str, tmp_path: Path) -> None:
    model = patched(kind)
    save_kvsplice(model, tmp_path / "loaded")
    save_kvsplice(WAYS[way](model, tmp_path), tmp_path / "offloaded")
    for file in ("kvsplice_model.safetensors", "kvsplice_config.json"):
        assert (tmp_path / "loaded" / file).read_bytes() == (tmp_path / "offloaded" / file).read_bytes()


@every_way
@pytest.mark.parametrize("kind", KINDS)
def test_a_splice_loaded_into_an_offloaded_model_is_the_one_that_runs(kind: str, way: str, tmp_path: Path) -> None:
    source = patched(kind)
    with torch.no_grad():
        for layer in source.model.layers:
            layer.self_attn.kvsplice.expand.weight *= 0.7
    save_kvsplice(source, tmp_path / "splice")
    expected = logits(source)
    model = WAYS[way](patched(kind), tmp_path)
    before = [layer.self_attn.kvsplice.identity for layer in model.model.layers]
    assert not torch.allclose(logits(model), expected)
    load_kvsplice(model, tmp_path / "splice")
    assert torch.equal(logits(model), expected)
    after = [layer.self_attn.kvsplice.identity for layer in model.model.layers]
    assert after == [layer.self_attn.kvsplice.identity for layer in source.model.layers]
    assert after != before


@every_way
def test_a_splice_is_loaded_into_an_offloaded_model_that_was_not_patched(way: str, tmp_path: Path) -> None:
    source = patched("plain")
    save_kvsplice(source, tmp_path / "splice")
    model = load_kvsplice(WAYS[way](build(NAME), tmp_path), tmp_path / "splice")
    assert torch.equal(logits(model), logits(source))


@every_way
@pytest.mark.parametrize("metric", ["fisher", "readers", "pca"])
def test_an_offloaded_model_is_calibrated_as_a_loaded_one(metric: str, way: str, tmp_path: Path) -> None:
    ids = list(torch.randint(8, 128, (32, 64), generator=torch.Generator().manual_seed(0)).split(1))
    found = []
    for model in (build(NAME), WAYS[way](build(NAME), tmp_path)):
        calibrator = KVSpliceCalibrator(model, metric=metric, sink_tokens=2).collect(ids, progress=False)
        assert len(calibrator.holdout) == 2
        patch_model_with_kvsplice(model, KVSpliceConfig(bits=4.0, sink_tokens=2), calibration=calibrator)
        found.append((calibrator.fingerprint, logits(model)))
        unpatch_model(model)
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[1][1], found[0][1], atol=1e-3, rtol=0)


@every_way
def test_an_offloaded_model_writes_text_and_is_scored(way: str, tmp_path: Path) -> None:
    model = WAYS[way](build(NAME), tmp_path)
    batches = sample_from_model(model, 128, 32)
    assert sum(batch["input_ids"].numel() for batch in batches) == 128
    patch_model_with_kvsplice(model, KVSpliceConfig(compression_ratio=0.5))
    assert score_windows(model, torch.cat([b["input_ids"] for b in batches]), progress=False).kl
    assert get_kv_cache_size(model, 100).compressed_bytes < get_kv_cache_size(model, 100).original_bytes


@every_way
def test_merging_works_and_pruning_says_why_not(way: str, tmp_path: Path) -> None:
    model = patched("plain")
    expected = logits(model)
    model = WAYS[way](model, tmp_path)
    merge_kvsplice(model)
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=0)
    unmerge_kvsplice(model)
    assert torch.equal(logits(model), expected)
    if way != "device map":  # which keeps the first layer in memory
        with pytest.raises(UnsupportedError, match="Prune before"):
            prune_kvsplice(model, threshold=0.5)
    unpatch_model(model)
    assert torch.equal(logits(model), logits(build(NAME)))


@every_way
def test_fingerprints_tell_models_apart_by_any_weight(way: str, tmp_path: Path) -> None:
    def fingerprint(change: str | None) -> str:
        model = build(NAME)
        if change is not None:
            with torch.no_grad():
                model.get_parameter(change).flatten()[-1] += 0.5
        model = WAYS[way](model, tmp_path / str(change))
        return model_fingerprint(model, find_sites(model))

    changes = [None, "model.layers.1.self_attn.o_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
    changes += ["lm_head.weight", "model.layers.0.self_attn.kv_b_proj.weight", "model.layers.1.mlp.gate.weight"]
    assert len({fingerprint(change) for change in changes}) == len(changes)


def test_buffers_that_are_offloaded_are_named_with_what_to_do() -> None:
    model = patched("packed")
    cpu_offload(model, execution_device=CPU, offload_buffers=True)
    with pytest.raises(UnsupportedError, match="offload_buffers=False"):
        logits(model)


# ------------------------------------------------------------------------------------- the one accessor


class OnlyBuffers(nn.Module):
    """As packed layers keep their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("packed", torch.ones(3, dtype=torch.uint8))


class Nothing(nn.Module):
    """Neither a parameter nor a buffer."""


@pytest.mark.parametrize(
    ("module", "device"), [(OnlyBuffers(), "cpu"), (Nothing(), "cpu"), (OnlyBuffers().to("meta"), "meta")]
)
def test_a_device_is_told_of_any_module(module: nn.Module, device: str) -> None:
    assert execution_device(module).type == device
    assert input_device(module).type == device


def zero3_shard() -> nn.Module:
    """What DeepSpeed ZeRO-3 leaves of a layer: an empty parameter that knows its number."""
    layer = nn.Linear(3, 2, bias=False)
    layer.weight = nn.Parameter(torch.empty(0))
    layer.weight.ds_id = 7
    return layer


NOWHERE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "never loaded": (lambda: nn.Linear(3, 2, bias=False, device="meta"), "Load the model"),
    "in a shard of ZeRO-3": (zero3_shard, "GatheredParameters"),
}


@pytest.mark.parametrize("case", NOWHERE)
def test_weights_that_are_nowhere_are_a_clear_error(case: str) -> None:
    make, words = NOWHERE[case]
    with pytest.raises(ConfigError, match=words):
        read_parameter(make(), "weight")
    with pytest.raises(ConfigError, match=words):
        write_parameter(make(), "weight", torch.zeros(make().weight.shape))
    with pytest.raises(ConfigError, match=words):
        read_all(make())


@every_way
def test_what_is_written_is_read_again(way: str, tmp_path: Path) -> None:
    model = WAYS[way](build(NAME), tmp_path)
    layer = model.model.layers[1].self_attn.o_proj
    value = torch.randn(read_parameter(layer, "weight").shape)
    write_parameter(layer, "weight", value)
    assert torch.equal(read_parameter(layer, "weight"), value)
    assert torch.equal(read_all(layer)["weight"], value)
    x = torch.randn(1, value.shape[1])
    torch.testing.assert_close(layer(x), x @ value.T)
    with pytest.raises(ConfigError, match="shape"):
        write_parameter(layer, "weight", value[:1])
    with pytest.raises(ConfigError, match="no values for"):
        write_all(layer, {})


def test_a_model_that_was_never_loaded_is_refused_everywhere(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = type(build(NAME))(build(NAME).config)
    save_kvsplice(patched("plain"), tmp_path)
    calls: list[Callable[[], Any]] = [
        lambda: patch_model_with_kvsplice(model, bits=4, calibration=torch.randint(8, 128, (8, 64))),
        lambda: patch_model_with_kvsplice(model, compression_ratio=0.5),
    ]
    for call in calls:
        with pytest.raises(KVSpliceError, match="[Ll]oad"):
            call()
    assert json.loads((tmp_path / "kvsplice_config.json").read_text("utf-8"))["format"] == "kvsplice"
