"""Pruning takes out the coordinates that hardly reach the heads: smaller rows, and as much error as it says."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from byte_tokenizer import byte_tokenizer
from programs import load_program
from test_contract_models import batch_for, cached_logits, no_cache_logits, rms
from test_packed import assert_same_but_for_flips, calibrated
from tiny_models import build
from torch import nn
from transformers import DynamicCache, StaticCache

from kvsplice_hf import (
    CacheMismatchError,
    CheckpointError,
    ConfigError,
    KVSpliceCache,
    KVSpliceConfig,
    PatchStateError,
    RowCodec,
    UnsupportedError,
    cache_nbytes,
    get_kv_cache_size,
    load_kvsplice,
    patch_model_with_kvsplice,
    save_kvsplice,
    splice_disabled,
    unpatch_model,
    upstream,
)
from kvsplice_hf.code.files import CONFIG_NAME, WEIGHTS_NAME
from kvsplice_hf.code.projection import LearnedKVSplice
from kvsplice_hf.manage.loading import read_splices
from kvsplice_hf.manage.merging import merge_kvsplice, unmerge_kvsplice
from kvsplice_hf.manage.pruning import effective_scales, plan_pruning, prune_kvsplice, pruning_candidates
from kvsplice_hf.patch.site_patch import PATCH_ATTRIBUTE
from kvsplice_hf.patch.state import patched_sites
from kvsplice_hf.upstream import cache_argument


NAME = "deepseek_v3"
ROOT = Path(__file__).parent.parent
TOLERANCE = 5e-5
RECIPES = {
    "half the rank": KVSpliceConfig(compression_ratio=0.5, sink_tokens=2),
    "an odd rank": KVSpliceConfig(rank=9, sink_tokens=0),
    "packed bytes": KVSpliceConfig(bits=5.0, sink_tokens=2),
}
# Of each layer: coordinates that are made nearly silent before they are pruned.
SILENT = ((1, 4), (2,))
recipes = pytest.mark.parametrize("recipe", RECIPES)
architectures = pytest.mark.parametrize("name", [NAME, "dots3_note", "mistral_large4"])


def spliced(recipe: str = "half the rank", name: str = NAME, silence: float = 0.02, **settings: Any) -> Any:
    """A patched model some coordinates of which are nearly silent."""
    model = build(name)
    config = KVSpliceConfig(**(RECIPES[recipe].to_dict() | settings))
    patch_model_with_kvsplice(model, config, calibration=calibrated(model) if config.is_packed else None)
    with torch.no_grad():
        for splice, coordinates in zip(splices(model), SILENT, strict=False):
            splice.expand.weight[:, coordinates] *= silence
    return model


def splices(model: nn.Module) -> list[LearnedKVSplice]:
    return [patched.splice for _, patched in patched_sites(model)]


def removed(reports: list[Any]) -> list[tuple[int, ...]]:
    """Coordinates, of the layers that had any silenced."""
    return [report.coordinates for report in reports[: len(SILENT)]]


def standard_latents(splice: LearnedKVSplice, count: int = 2000) -> torch.Tensor:
    """Latents that are white behind the transform."""
    white = torch.randn(count, splice.latent_dim, generator=torch.Generator().manual_seed(0))
    return ((white - splice.transform_shift) / F.softplus(splice.transform_scale)).detach()


def test_the_effective_scale_is_the_size_of_a_coordinate_times_what_the_heads_make_of_it() -> None:
    generator = torch.Generator().manual_seed(0)
    splice, weight = LearnedKVSplice(8, 3), torch.randn(11, 8, generator=generator)
    with torch.no_grad():
        splice.transform_scale.copy_(torch.randn(8, generator=generator))
        splice.transform_shift.copy_(torch.randn(8, generator=generator))
    for reader in (weight, None):
        scales = effective_scales(splice, reader)
        for j, code in enumerate(torch.eye(3)):
            change = splice.decode(code) - splice.decode(torch.zeros(3))
            seen = change if reader is None else weight @ change
            torch.testing.assert_close(scales[j], seen.norm() * splice.compress.weight[j].norm())


@recipes
@architectures
def test_candidates_are_the_silent_coordinates_and_nothing_changes(recipe: str, name: str) -> None:
    model = spliced(recipe, name)
    state = copy.deepcopy(model.state_dict())
    reports = pruning_candidates(model)
    assert removed(reports) == list(SILENT)
    assert [report.layer_idx for report in reports] == [site.layer_idx for site, _ in patched_sites(model)]
    assert [report.rank_before for report in reports] == [splice.rank for splice in splices(model)]
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


@recipes
@torch.no_grad()
def test_pruning_costs_about_the_error_it_states(recipe: str) -> None:
    model = spliced(recipe, silence=0.08)
    sites, before = patched_sites(model), copy.deepcopy(splices(model))
    reports = prune_kvsplice(model, threshold=0.3)
    assert all(report.coordinates for report in reports)
    for (site, patched), whole, report in zip(sites, before, reports, strict=True):
        latents = standard_latents(whole)
        # A key that says nothing of its latent.
        key = latents.new_zeros(*latents.shape[:-1], whole.predicted_from) if whole.predicted_from else None
        expected, found = (site.module.kv_b_proj(splice(latents, key)) for splice in (whole, patched.splice))
        measured = rms(found - expected) / rms(expected)
        assert measured < 1.5 * report.relative_error, (measured, report.relative_error)
        mean = site.module.kv_b_proj(whole.fold()[1])  # is in no coordinate of the code
        assert rms(found - expected) / rms(expected - mean) > report.relative_error / 1.5


@pytest.mark.parametrize("name", [NAME, "mistral_large4"])
def test_a_pruned_model_is_the_one_whose_coordinates_decode_to_nothing(name: str) -> None:
    model, silent = spliced(name=name, silence=0.08), spliced(name=name, silence=0.0)
    assert removed(prune_kvsplice(model, 0.3)) == list(SILENT)
    batch = batch_for(name)
    torch.testing.assert_close(no_cache_logits(model, *batch), no_cache_logits(silent, *batch), atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(cached_logits(model, *batch)[0], no_cache_logits(silent, *batch), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("attention", ["absorbed", "expanded"])
@recipes
@architectures
def test_pruned_rows_are_smaller_and_give_the_same_with_and_without_a_cache(
    recipe: str, name: str, attention: str
) -> None:
    model, batch = spliced(recipe, name, attention=attention), batch_for(name)
    sizes = {"seq_len": batch[0].shape[1], "batch_size": batch[0].shape[0]}
    before, old = get_kv_cache_size(model, **sizes), cached_logits(model, *batch)[1]
    reports = prune_kvsplice(model)
    cached, new = cached_logits(model, *batch)
    plain = no_cache_logits(model, *batch)
    with splice_disabled(model):
        stock = no_cache_logits(model, *batch)
    if RECIPES[recipe].is_packed:
        assert_same_but_for_flips(cached, plain, plain - stock)
    else:
        torch.testing.assert_close(cached, plain, atol=TOLERANCE, rtol=0)
    after = get_kv_cache_size(model, **sizes)
    assert after.compressed_bytes < before.compressed_bytes
    assert cache_nbytes(old) - cache_nbytes(new) == before.compressed_bytes - after.compressed_bytes
    assert [report.rank_after for report in reports] == [splice.rank for splice in splices(model)]
    for module in model.modules():  # those that reuse the latent of an earlier layer as well
        if PATCH_ATTRIBUTE in vars(module):
            state = vars(module)[PATCH_ATTRIBUTE]
            assert state.geometry.rank == state.splice.rank


@recipes
def test_a_pruned_model_generates(recipe: str) -> None:
    model, (ids, mask) = spliced(recipe), batch_for(NAME)
    settings: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    model.generate(ids, **settings)
    prune_kvsplice(model)
    found = model.generate(ids, **settings)
    assert found.shape == (ids.shape[0], ids.shape[1] + 8)
    assert torch.equal(model.generate(ids, **settings, use_cache=False), found)
    assert torch.equal(model.generate(ids, **settings, cache_implementation="static", disable_compile=True), found)


def test_a_persistent_batching_manager_does_not_keep_pages_of_the_old_size() -> None:
    if upstream.ContinuousBatchingManager is None:
        pytest.skip("the paged cache is of another kind before 5.23")
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model, prompt = spliced(), batch_for(NAME)[0][0].tolist()
    settings = GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=0)
    batching = ContinuousBatchingConfig(num_blocks=20, page_size=8, max_batch_tokens=64)
    model.generate_batch([prompt], settings, batching, persistent_manager=True)
    prune_kvsplice(model)
    (output,) = model.generate_batch([prompt], settings, batching).values()
    expected = model.generate(torch.tensor([prompt]), generation_config=settings)[0, len(prompt) :]
    assert output.generated_tokens == expected.tolist()


def test_packed_rows_lose_the_fields_of_pruned_coordinates_and_no_others() -> None:
    model = spliced("packed bytes")
    for splice in splices(model):
        splice.codec.sigmas += 0.01 * torch.arange(splice.rank)
    before, splice = copy.deepcopy(splices(model)[0]), splices(model)[0]
    prune_kvsplice(model)
    kept = [j for j in range(before.rank) if j not in SILENT[0]]
    columns = kept + list(range(before.rank, before.codec.row_dim))
    assert torch.equal(splice.compress.weight, before.compress.weight[kept])
    assert torch.equal(splice.expand.weight, before.expand.weight[:, columns])
    for name in ("widths", "scales", "centres"):
        assert torch.equal(getattr(splice.codec, name), getattr(before.codec, name)[columns])
    assert torch.equal(splice.codec.sigmas, before.codec.sigmas[kept])
    assert splice.codec.row_bytes < before.codec.row_bytes
    assert patched_sites(model)[0][1].geometry.packed_bytes == splice.codec.row_bytes


def test_rows_without_a_gain_stay_without_one() -> None:
    model = spliced("packed bytes")
    for splice in splices(model):
        splice.codec = RowCodec(splice.codec.widths, splice.codec.scales, splice.codec.centres, torch.empty(0))
    prune_kvsplice(model)
    assert all(len(splice.codec.sigmas) == 0 for splice in splices(model))
    assert splices(model)[0].codec.row_dim == splices(model)[0].rank + 8


@pytest.mark.parametrize("make", [DynamicCache, StaticCache, KVSpliceCache])
@recipes
def test_a_cache_filled_before_pruning_is_refused_and_an_empty_one_is_resized(
    recipe: str, make: Callable[..., Any]
) -> None:
    model, (ids, _) = spliced(recipe), batch_for(NAME)
    arguments: dict[str, Any] = {"config": model.config}
    if make is StaticCache:
        arguments["max_cache_len"] = 16
    used, empty = (KVSpliceCache(model) if make is KVSpliceCache else make(**arguments) for _ in range(2))
    with torch.no_grad():
        model(ids, **cache_argument(used))
        prune_kvsplice(model)
        with pytest.raises(CacheMismatchError, match="another splice"):
            model(ids[:, :1], **cache_argument(used))
        expected = model(ids, use_cache=True).logits
        torch.testing.assert_close(model(ids, **cache_argument(empty)).logits, expected, atol=TOLERANCE, rtol=0)


@recipes
@architectures
def test_a_pruned_splice_gives_bit_identical_logits_in_a_fresh_model(recipe: str, name: str, tmp_path: Path) -> None:
    model, batch = spliced(recipe, name), batch_for(name)
    prune_kvsplice(model)
    expected = no_cache_logits(model, *batch), cached_logits(model, *batch)[0]
    save_kvsplice(model, tmp_path / "first")
    fresh = load_kvsplice(build(name), tmp_path / "first")
    assert torch.equal(no_cache_logits(fresh, *batch), expected[0])
    assert torch.equal(cached_logits(fresh, *batch)[0], expected[1])
    save_kvsplice(fresh, tmp_path / "second")
    for file in (CONFIG_NAME, WEIGHTS_NAME):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    # A model that was pruned in the same way takes it, and one that was not refuses it.
    with torch.no_grad():
        splices(model)[0].transform_shift.add_(1.0)
    assert torch.equal(no_cache_logits(load_kvsplice(model, tmp_path / "first"), *batch), expected[0])
    with pytest.raises(CheckpointError, match="other shapes|rows of"):
        load_kvsplice(spliced(recipe, name), tmp_path / "first")


def test_a_saved_rank_is_read_where_a_layer_was_pruned_and_only_there(tmp_path: Path) -> None:
    model = spliced()
    prune_kvsplice(model)
    with torch.no_grad():
        assert [splice.rank for splice in splices(model)] == [14, 15]
    save_kvsplice(model, tmp_path)
    description = json.loads((tmp_path / CONFIG_NAME).read_text())
    assert description["layers"] == {
        "0": {"kv_lora_rank": 32, "pruned_from": 16, "rank": 14},
        "1": {"kv_lora_rank": 32, "pruned_from": 16, "rank": 15},
    }
    assert description["config"]["compression_ratio"] == 0.5


def changed(**sizes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda layers: layers["1"].update(sizes)


def without_rank(layers: dict[str, Any]) -> None:
    del layers["1"]["rank"]


@pytest.mark.parametrize(
    ("damage", "phrase"),
    [
        (changed(rank=13), r"compress\.weight: saved \(15, 32\), the model needs \(13, 32\)"),
        (changed(rank=99), "`rank` is 99"),
        (changed(rank=0), "`rank` is 0"),
        (changed(rank="15"), "sizes of layer 1"),
        (changed(rank=None), "sizes of layer 1"),
        (without_rank, "sizes of layer 1"),
        (lambda layers: layers.update({"1": 3}), '"layers" cannot be read'),
        (lambda layers: layers.update({"one": {}}), '"layers" cannot be read'),
    ],
)
def test_damaged_ranks_are_named_and_leave_the_model_alone(
    damage: Callable[[dict[str, Any]], None], phrase: str, tmp_path: Path
) -> None:
    model = spliced()
    prune_kvsplice(model)
    save_kvsplice(model, tmp_path)
    description = json.loads((tmp_path / CONFIG_NAME).read_text())
    damage(description["layers"])
    (tmp_path / CONFIG_NAME).write_text(json.dumps(description))
    fresh, batch = build(NAME), batch_for(NAME)
    with pytest.raises(CheckpointError, match=phrase):
        load_kvsplice(fresh, tmp_path)
    assert torch.equal(no_cache_logits(fresh, *batch), no_cache_logits(build(NAME), *batch))
    with pytest.raises(CheckpointError):
        read_splices(tmp_path)


@recipes
def test_saved_splices_can_be_read_without_the_model(recipe: str, tmp_path: Path) -> None:
    model = spliced(recipe)
    prune_kvsplice(model)
    found = read_splices(save_kvsplice(model, tmp_path))
    assert list(found) == [0, 1]
    for alone, splice in zip(found.values(), splices(model), strict=True):
        latents, k_rot = standard_latents(splice, 3), torch.ones(3, 8)
        turns = torch.arange(12, dtype=torch.uint8).view(3, 4)
        assert torch.equal(alone.rows(latents, k_rot, turns), splice.rows(latents, k_rot, turns))


def test_a_layer_that_only_others_read_is_not_pruned() -> None:
    """Of a latent that a later layer reuses, what that layer reads counts as well."""
    model = spliced(name="mistral_large4", silence=1.0)
    site, patched = patched_sites(model)[0]
    direction = patched.splice.fold()[0][:, 1].detach()
    direction = direction / direction.norm()
    with torch.no_grad():
        weight = site.module.kv_b_proj.weight
        weight -= torch.outer(weight @ direction, direction)
    assert effective_scales(patched.splice, weight)[1] < 1e-4
    assert 1 not in pruning_candidates(model)[0].coordinates


def test_candidates_are_below_the_threshold_times_the_median_and_the_largest_stays() -> None:
    scales = torch.tensor([1.0, 5.0, 2.0, 2.0])
    for threshold, coordinates in ((0.5, ()), (0.6, (0,)), (1.0, (0,)), (1.1, (0, 2, 3)), (1e9, (0, 2, 3))):
        plan = plan_pruning(3, scales, threshold)
        assert plan.coordinates == coordinates
        squares = [scales[j].item() ** 2 for j in coordinates]
        assert plan.relative_error == pytest.approx((sum(squares) / 34) ** 0.5)
        assert (plan.layer_idx, plan.rank_before, plan.rank_after) == (3, 4, 4 - len(coordinates))


def test_one_coordinate_stays_whatever_the_threshold() -> None:
    model = spliced()
    assert {report.rank_after for report in prune_kvsplice(model, 1e9)} == {1}
    assert no_cache_logits(model, *batch_for(NAME)).isfinite().all()
    assert {report.coordinates for report in prune_kvsplice(model, 1e9)} == {()}


def test_where_nothing_is_silent_nothing_changes() -> None:
    model = spliced(silence=1.0)
    parameters = dict(model.named_parameters())
    assert [report.coordinates for report in prune_kvsplice(model, 1e-6)] == [(), ()]
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    silent = plan_pruning(0, torch.zeros(3), 0.1)
    assert (silent.coordinates, silent.relative_error) == ((), 0.0)


@pytest.mark.parametrize("threshold", [0, -1.0, float("inf"), float("nan"), True, "0.1", None])
def test_a_threshold_out_of_range_is_refused(threshold: Any) -> None:
    model = spliced()
    for call in (prune_kvsplice, pruning_candidates):
        with pytest.raises(ConfigError, match=f"`threshold` is {threshold!r}"):
            call(model, threshold)
    assert [splice.rank for splice in splices(model)] == [16, 16]


def test_models_that_cannot_be_pruned_are_refused_and_stay_as_they_are() -> None:
    with pytest.raises(PatchStateError, match="not patched"):
        prune_kvsplice(build(NAME))
    normed = patch_model_with_kvsplice(build(NAME), rank=12, use_layernorm=True)
    for call in (prune_kvsplice, pruning_candidates):
        with pytest.raises(ConfigError, match="LayerNorm"):
            call(normed)
    model = merge_kvsplice(spliced())
    merged = pruning_candidates(model)
    with pytest.raises(PatchStateError, match="merged. Call unmerge_kvsplice"):
        prune_kvsplice(model)
    assert pruning_candidates(unmerge_kvsplice(model)) == merged
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert removed(pruning_candidates(model)) == list(SILENT)
    with pytest.raises(UnsupportedError, match="offloaded"):
        prune_kvsplice(model)
    assert [splice.rank for splice in splices(model)] == [16, 16]


@pytest.mark.parametrize("trained", [True, False])
def test_pruned_parameters_are_trained_as_they_were_before(trained: bool) -> None:
    model, (ids, _) = spliced("packed bytes"), batch_for(NAME)
    for splice in splices(model):
        splice.requires_grad_(trained)
        splice.codec.train_steps(trained)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    prune_kvsplice(model)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    if trained:
        model.train()(ids, labels=ids, use_cache=False).loss.backward()
        for splice in splices(model):
            assert all(parameter.grad.shape == parameter.shape for parameter in splice.parameters())


@recipes
def test_a_pruned_model_merges_and_unpatches(recipe: str) -> None:
    model, batch = spliced(recipe), batch_for(NAME)
    prune_kvsplice(model)
    expected = no_cache_logits(model, *batch)
    stock = no_cache_logits(build(NAME), *batch)
    assert_same_but_for_flips(no_cache_logits(merge_kvsplice(model), *batch), expected, expected - stock)
    assert torch.equal(no_cache_logits(unpatch_model(model), *batch), stock)


def test_the_script_describes_a_packed_splice_without_its_model(tmp_path: Path) -> None:
    model = spliced("packed bytes")
    with torch.no_grad():
        splices(model)[1].transform_shift[0] = float("nan")
    command = [sys.executable, str(ROOT / "scripts" / "run" / "inspect_kvsplice.py")]
    command += ["--splice", str(save_kvsplice(model, tmp_path))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    assert "NaN" not in process.stdout, "which is no JSON"
    assert "heads read does not count" in process.stderr
    assert "1 not finite" in process.stderr
    report = json.loads(process.stdout.splitlines()[-1])
    for row, splice in zip(report["layers"], splices(model), strict=True):
        assert (row["rank"], row["row_bytes"]) == (splice.rank, splice.codec.row_bytes)
        assert sum(row["widths"]["code"].values()) == splice.rank
        assert sum(row["widths"]["k_rot"].values()) == 8
        for width, count in row["widths"]["code"].items():
            assert count == int((splice.codec.widths[: splice.rank] == int(width)).sum())
        scale = F.softplus(splice.transform_scale)
        assert row["scale"]["max"] == pytest.approx(scale.max().item())
        assert row["scale"]["std"] == pytest.approx(scale.std(correction=0).item(), rel=1e-4)
    assert [row["not_finite"] for row in report["layers"]] == [0, 1]
    assert report["layers"][0]["candidates"] == list(SILENT[0])
    assert report["pruned"] is None


def run_script(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """In this process: a new one takes seconds to start."""
    monkeypatch.setattr(sys, "argv", ["inspect_kvsplice.py", *map(str, arguments)])
    load_program("run/inspect_kvsplice.py").main()


def test_the_script_prunes_with_the_model_and_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build(NAME).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    model = spliced()
    save_kvsplice(model, tmp_path / "splice")
    common = ("--splice", tmp_path / "splice", "--model", tmp_path / "model")
    run_script(monkeypatch, *common)
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["candidates"] for row in shown["layers"]] == [list(coordinates) for coordinates in SILENT]
    run_script(monkeypatch, *common, "--prune", 0.1, "--output", tmp_path / "pruned")
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["coordinates"] for row in report["pruned"]] == [list(coordinates) for coordinates in SILENT]
    assert [row["rank_after"] for row in report["pruned"]] == [14, 15]
    prune_kvsplice(model)
    found = load_kvsplice(build(NAME), tmp_path / "pruned")
    assert torch.equal(no_cache_logits(found, *batch_for(NAME)), no_cache_logits(model, *batch_for(NAME)))
    with pytest.raises(SystemExit, match="holds a splice already"):
        run_script(monkeypatch, *common, "--prune", 0.1, "--output", tmp_path / "pruned")


def test_the_script_lists_no_candidates_behind_a_layernorm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_kvsplice(patch_model_with_kvsplice(build(NAME), rank=12, use_layernorm=True), tmp_path)
    run_script(monkeypatch, "--splice", tmp_path)
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(row["rank"], row["widths"], row["candidates"]) for row in report["layers"]] == [(12, None, None)] * 2
    assert "LayerNorm" in report["measure"]


def test_the_script_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, damaged = (save_kvsplice(spliced(), tmp_path / name) for name in ("good", "damaged"))
    with (damaged / WEIGHTS_NAME).open("ab") as file:
        file.write(b"x")
    cases: dict[str, tuple[object, ...]] = {
        "No saved splice at": (tmp_path / "nothing",),
        "truncated or was changed": (damaged,),
        "--prune needs --model": (good, "--prune", 0.1),
        "`threshold` is -1.0": (good, "--threshold", -1),
    }
    for phrase, arguments in cases.items():
        with pytest.raises(SystemExit, match=phrase):
            run_script(monkeypatch, "--splice", *arguments)
