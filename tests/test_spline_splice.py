"""`transform="spline"`: splines and principal components as the transform of a splice, in the cache of real models."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from ordinary_models import build_ordinary
from test_gpt2_training import SMALL, pretraining
from test_paged import alone, together
from tiny_models import FIRST_ORDINARY_TOKEN, build
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from kvsplice_hf import (
    KVSpliceCalibrator,
    KVSpliceConfig,
    cache_nbytes,
    explain,
    load_kvsplice,
    merge_kvsplice,
    patch_model_with_kvsplice,
    prune_kvsplice,
    save_kvsplice,
    unmerge_kvsplice,
    unpatch_model,
)
from kvsplice_hf.bench.through_geometry import through_geometries
from kvsplice_hf.calibration.fit import fit_geometry as fit_of_geometry
from kvsplice_hf.calibration.geometries import ModelGeometry, fit_geometry
from kvsplice_hf.calibration.key_geometries import KeyGeometry, SampledKeys, fit_key_geometries, pairing_of
from kvsplice_hf.calibration.vectors import collect_samples
from kvsplice_hf.code.bent import SplineSplice
from kvsplice_hf.code.heads import HeadKey
from kvsplice_hf.errors import CalibrationError, CheckpointError, ConfigError, UnsupportedError
from kvsplice_hf.geometry import FixedSpline, SplinePCA
from kvsplice_hf.gpt2_mla import GPT2MLAConfig
from kvsplice_hf.patch.state import patched_sites, splice_parts_of
from kvsplice_hf.upstream import CACHE_NAME


# Latents, values of grouped queries, and values that GPT-2's c_attn makes together with queries and keys. And keys,
# whose numbers are rotated with those of the other half, with their neighbours, or in part.
MODELS = {"latents": "deepseek_v3", "grouped": "llama", "c_attn": "gpt2"}
WITH_KEYS = {"keys in halves": "llama", "keys as neighbours": "helium", "keys in part": "stablelm"}
MODELS |= WITH_KEYS
RANK, KEY_RANK = 3, 5


def model_of(kind: str) -> PreTrainedModel:
    return build(MODELS[kind]) if kind == "latents" else build_ordinary(MODELS[kind])


def tokens(batch: int = 2, length: int = 14, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_ORDINARY_TOKEN, 100, (batch, length), generator=generator)


CALIBRATION = tokens(8, 40, seed=0)


def patched(kind: str, **settings: Any) -> PreTrainedModel:
    """A patched model whose splines are bent at random: text as random as this leaves nothing to straighten."""
    model = model_of(kind)
    of_keys = {"key_rank": KEY_RANK} if kind in WITH_KEYS else {}
    config = KVSpliceConfig(**{"transform": "spline", "rank": RANK, "spline_epochs": 1} | of_keys | settings)
    patch_model_with_kvsplice(model, config, calibration=CALIBRATION)
    for splice in splice_parts_of(model).values():
        bend(splice)
    return model


def bend(splice: Any) -> None:
    assert isinstance(splice, SplineSplice)
    generator = torch.Generator().manual_seed(2)
    for bending in [splice.bending, *([] if splice.keys is None else [splice.keys.bending])]:
        slopes = torch.exp(torch.randn(bending.slopes.shape, generator=generator) / 2)
        bending.set_to(bending.knots.clone(), slopes)


@torch.no_grad()
def in_one_go(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, use_cache=False).logits


@torch.no_grad()
def in_steps(model: PreTrainedModel, ids: torch.Tensor, prompt: int = 9) -> tuple[torch.Tensor, Any]:
    """Logits by a prompt and single tokens behind it, and the cache."""
    cache = DynamicCache(config=model.config)
    logits = [model(ids[:, :prompt], **{CACHE_NAME: cache}).logits]
    for place in range(prompt, ids.shape[1]):
        logits.append(model(ids[:, place : place + 1], **{CACHE_NAME: cache}).logits)
    return torch.cat(logits, dim=1), cache


@pytest.mark.parametrize("kind", MODELS)
def test_steps_with_a_cache_compute_what_one_pass_without_does(kind: str) -> None:
    model = patched(kind)
    stock = in_one_go(model_of(kind), tokens())
    whole, (steps, _) = in_one_go(model, tokens()), in_steps(model, tokens())
    assert torch.allclose(whole, steps, atol=2e-5 * float(whole.abs().max()))
    assert not torch.allclose(whole, stock, atol=1e-2)


@pytest.mark.parametrize("kind", MODELS)
def test_padded_batches_and_generation_go_through_splines(kind: str) -> None:
    model = patched(kind)
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    together = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    alone = model.generate(ids[:1, 5:], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(together[:1, 5:], alone)


def test_the_full_rank_changes_nothing_but_rounding() -> None:
    model = model_of("latents")
    stock = in_one_go(model, tokens())
    rank = model.config.kv_lora_rank
    spliced = patched("latents", rank=rank)
    assert torch.allclose(in_one_go(spliced, tokens()), stock, atol=1e-4 * float(stock.abs().max()))
    for splice in splice_parts_of(spliced).values():
        vectors = torch.randn(50, rank, generator=torch.Generator().manual_seed(0))
        assert (splice(vectors) - vectors).abs().max() <= 1e-5 * vectors.abs().max()


@pytest.mark.parametrize("kind", MODELS)
def test_unpatching_leaves_no_trace(kind: str) -> None:
    stock = in_one_go(model_of(kind), tokens())
    assert torch.equal(in_one_go(unpatch_model(patched(kind)), tokens()), stock)


@pytest.mark.parametrize("kind", MODELS)
def test_the_cache_holds_so_many_numbers_and_no_more(kind: str) -> None:
    model, ids = patched(kind, sink_tokens=0), tokens()
    site, state = patched_sites(model)[0]
    held = cache_nbytes(in_steps(model, ids)[1]) / ids.numel() / len(patched_sites(model))
    numbers = max(site.kv_heads, 1) * (RANK + (KEY_RANK if kind in WITH_KEYS else site.qk_rope_head_dim))
    expected = numbers * (2 if site.kv_heads else site.dtype.itemsize)
    assert state.geometry.nbytes(site.dtype) == expected
    assert expected <= held <= expected + (site.qk_rope_head_dim if kind in WITH_KEYS else 0)  # angles of the tokens


@pytest.mark.parametrize("kind", MODELS)
def test_explain_says_that_each_step_decodes(kind: str) -> None:
    for layer in explain(patched(kind)).layers:
        assert (layer.decode, layer.prefill) == ("expanded", "expanded")
        assert "a spline does not fold into the weights" in layer.refused["codes"]


@pytest.mark.parametrize("kind", MODELS)
def test_what_was_saved_is_loaded_in_another_model_and_over_another_splice(kind: str, tmp_path: Path) -> None:
    model = patched(kind)
    save_kvsplice(model, tmp_path)
    expected = in_one_go(model, tokens())
    fresh = load_kvsplice(model_of(kind), tmp_path)
    identities = [[state.splice.identity for _, state in patched_sites(one)] for one in (model, fresh)]
    assert identities[0] == identities[1]
    assert torch.equal(in_one_go(fresh, tokens()), expected)
    for splice in splice_parts_of(fresh).values():
        splice.bending.slopes.fill_(1.0)
    assert [state.splice.identity for _, state in patched_sites(fresh)] != identities[0]
    assert torch.equal(in_one_go(load_kvsplice(fresh, tmp_path), tokens()), expected)


def test_saved_splines_that_cannot_be_are_refused(tmp_path: Path) -> None:
    save_kvsplice(patched("latents"), tmp_path)
    weights, description = tmp_path / "kvsplice_model.safetensors", tmp_path / "kvsplice_config.json"
    tensors = safetensors.torch.load(weights.read_bytes())
    tensors["layers.1.kvsplice.bending.slopes"][2, 3] = -1.0
    content = safetensors.torch.save(tensors)
    weights.write_bytes(content)
    about = json.loads(description.read_text())
    description.write_text(json.dumps(about | {"weights_sha256": hashlib.sha256(content).hexdigest()}))
    with pytest.raises(CheckpointError, match=r"the spline of layers\.1.*slopes be above 0"):
        load_kvsplice(model_of("latents"), tmp_path)


def test_a_splice_of_another_transform_is_not_loaded_over(tmp_path: Path) -> None:
    save_kvsplice(patched("latents"), tmp_path)
    model = model_of("latents")
    patch_model_with_kvsplice(model, rank=RANK)
    with pytest.raises(CheckpointError, match="made for other shapes"):
        load_kvsplice(model, tmp_path)


@pytest.mark.parametrize("kind", MODELS)
def test_a_cast_leaves_splines_as_they_are(kind: str) -> None:
    model = patched(kind)
    before = in_one_go(model, tokens())
    splines = [splice.bending.knots.clone() for splice in splice_parts_of(model).values()]
    model.bfloat16()
    for splice, knots in zip(splice_parts_of(model).values(), splines, strict=True):
        assert torch.equal(splice.bending.knots, knots)
    steps, _ = in_steps(model, tokens())
    assert (steps.float() - before).norm() < 0.05 * before.norm()


@pytest.mark.parametrize("kind", MODELS)
def test_a_merged_splice_computes_the_same(kind: str) -> None:
    model = patched(kind)
    expected = in_one_go(model, tokens())
    merge_kvsplice(model)
    steps, _ = in_steps(model, tokens())
    assert torch.allclose(steps, expected, atol=2e-5 * float(expected.abs().max()))
    assert torch.equal(in_one_go(unmerge_kvsplice(model), tokens()), expected)


def test_gradients_reach_the_projection_behind_splines() -> None:
    model = patched("latents")
    model(tokens(), labels=tokens()).loss.backward()
    for splice in splice_parts_of(model).values():
        assert splice.compress.weight.grad.abs().max() > 0
        assert not any("bending" in name for name, _ in splice.named_parameters())


SOURCES = ("geometry", "its file", "statistics", "their file")


@pytest.mark.parametrize("kind", ["latents", "grouped"])
@pytest.mark.parametrize("source", SOURCES)
def test_splices_are_made_of_geometries_or_statistics(source: str, kind: str, tmp_path: Path) -> None:
    model, path = model_of(kind), tmp_path / "calibration.safetensors"
    if source in ("geometry", "its file"):
        found: Any = fit_geometry(model, CALIBRATION, RANK, epochs=1, progress=False)
        geometries = dict(found)
    else:
        found = KVSpliceCalibrator(model, metric="pca").collect(CALIBRATION, progress=False)
        geometries = {part: SplinePCA(RANK) for part in found.statistics}
        for part, geometry in geometries.items():
            layer = found.statistics[part]
            geometry.fit(layer.rows[:, : layer.latent_dim], epochs=1, progress=False)
    if "file" in source:
        found.save(path)
    config = KVSpliceConfig(transform="spline", rank=RANK, spline_epochs=1)
    patch_model_with_kvsplice(model, config, calibration=path if "file" in source else found)
    for part, splice in splice_parts_of(model).items():
        fit = fit_of_geometry(geometries[part], None)
        assert torch.allclose(splice.expand.weight, fit.expand)
        assert torch.equal(splice.bending.slopes, fit.bending[1])
        vectors = torch.randn(20, splice.latent_dim, generator=torch.Generator().manual_seed(0))
        assert torch.allclose(splice(vectors), geometries[part](vectors), atol=1e-5)


def test_geometries_of_another_model_are_refused(tmp_path: Path) -> None:
    model, path = model_of("grouped"), tmp_path / "geometry.safetensors"
    geometry = fit_geometry(model, CALIBRATION, RANK, epochs=0, progress=False)
    geometry.save(path)
    assert ModelGeometry.load(path, model).fingerprint == geometry.fingerprint
    assert torch.equal(ModelGeometry.load(path)[HeadKey(0, 1)].basis, geometry[HeadKey(0, 1)].basis)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1.0
    with pytest.raises(CheckpointError, match="fitted on another model"):
        ModelGeometry.load(path, model)
    with pytest.raises(CheckpointError, match="fitted on another model"):
        patch_model_with_kvsplice(model, KVSpliceConfig(transform="spline", rank=RANK), calibration=path)
    one = geometry[HeadKey(0, 1)]
    one.save(path)
    assert SplinePCA.load(path, geometry.fingerprint).fitted_on == geometry.fingerprint
    with pytest.raises(CheckpointError, match="was fitted on another model"):
        SplinePCA.load(path, "another")
    with pytest.raises(CheckpointError, match="is not a geometry of the kind"):
        ModelGeometry.load(path)


def test_geometries_that_do_not_fit_the_settings_are_refused() -> None:
    model = model_of("grouped")
    geometry = fit_geometry(model, CALIBRATION, RANK, epochs=0, progress=False)
    for settings in ({"rank": RANK + 1}, {"rank": RANK, "knots": 5}):
        with pytest.raises(ConfigError, match=f"Give rank={RANK} and knots=7"):
            patch_model_with_kvsplice(model, KVSpliceConfig(transform="spline", **settings), calibration=geometry)
    whole = fit_geometry(model, CALIBRATION, RANK, of="layers", epochs=0, progress=False)
    assert list(whole) == [0, 1]
    with pytest.raises(ConfigError, match='fit it with of="heads"'):
        patch_model_with_kvsplice(model, KVSpliceConfig(transform="spline", rank=RANK), calibration=whole)
    with pytest.raises(ConfigError, match="have one `k`"):
        ModelGeometry({}, "")


@pytest.mark.parametrize("kind", WITH_KEYS)
@pytest.mark.parametrize("source", ["geometry", "its file", "statistics"])
def test_keys_go_through_splines_of_their_own(kind: str, source: str, tmp_path: Path) -> None:
    model, path = model_of(kind), tmp_path / "geometry.safetensors"
    if source == "statistics":
        found: Any = KVSpliceCalibrator(model, metric="pca").collect(CALIBRATION, progress=False)
        samples = {part: SampledKeys.of(layer) for part, layer in found.statistics.items()}
        geometries, _ = fit_key_geometries(samples, KEY_RANK, epochs=1, progress=False)
    else:
        found = fit_geometry(model, CALIBRATION, RANK, key_k=KEY_RANK, epochs=1, progress=False)
        found.save(path)
        geometries = found.keys_of
    config = KVSpliceConfig(transform="spline", rank=RANK, key_rank=KEY_RANK, spline_epochs=1)
    patch_model_with_kvsplice(model, config, calibration=path if source == "its file" else found)
    for part, splice in splice_parts_of(model).items():
        geometry, pairs = geometries[part]
        assert torch.equal(splice.keys.pairs, pairs)
        keys = torch.randn(20, len(geometry.mean), generator=torch.Generator().manual_seed(0))
        turns = torch.zeros(20, len(keys[0]) // 2, dtype=torch.uint8)
        assert torch.allclose(splice.keys.decode(splice.keys.encode(keys, turns), turns), geometry(keys), atol=1e-5)


@pytest.mark.parametrize(("kind", "pairing"), [("keys in halves", 1), ("keys as neighbours", 2)])
def test_rotations_are_undone_as_the_model_pairs_its_numbers(kind: str, pairing: int) -> None:
    model = model_of(kind)
    with torch.no_grad():  # keys of few directions before their rotation, as those of trained models are
        for layer in model.model.layers:
            weight = layer.self_attn.k_proj.weight
            weight.copy_(torch.outer(torch.randn(len(weight)), weight[0]) + 0.01 * weight)
    drawn = collect_samples(model, list(CALIBRATION.split(1)), with_keys=True, progress=False)
    assert pairing_of({part: sample.keys for part, sample in drawn.items()}, 2) == pairing


def test_a_damaged_file_of_key_geometries_is_refused(tmp_path: Path) -> None:
    model, path = model_of("keys in halves"), tmp_path / "geometry.safetensors"
    geometry = fit_geometry(model, CALIBRATION, RANK, key_k=KEY_RANK, epochs=0, progress=False)
    for damage in ("pairs", "lost"):
        keys = {part: KeyGeometry(found.geometry, found.pairs.clone()) for part, found in geometry.keys_of.items()}
        if damage == "pairs":
            keys[HeadKey(0, 1)].pairs[0, 0] = 1
            ModelGeometry(dict(geometry), "", keys=keys).save(path)
            with pytest.raises(CheckpointError, match="its pairs are not those"):
                ModelGeometry.load(path)
        else:
            del keys[HeadKey(0, 1)]
            with pytest.raises(ConfigError, match="for all key heads or for none"):
                ModelGeometry(dict(geometry), "", keys=keys)


KEYS_REFUSED: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    "a latent": ("latents", {}, ConfigError, "`key_rank` is for ordinary attention"),
    "no rotation": ("c_attn", {}, UnsupportedError, "not rotated by angles that the model hands to its layers"),
    "too many": ("grouped", {"key_rank": 99}, ConfigError, "`key_rank` is 99, but the keys of"),
    "no geometry of keys": ("grouped", {"geometry": None}, ConfigError, "the geometry holds none of keys"),
    "another size": ("grouped", {"geometry": 4}, ConfigError, "the geometry holds keys of 4 numbers"),
}


@pytest.mark.parametrize("case", KEYS_REFUSED)
def test_keys_that_cannot_go_through_splines_are_named(case: str) -> None:
    kind, settings, error, message = KEYS_REFUSED[case]
    model, calibration = model_of(kind), CALIBRATION
    stock = in_one_go(model, tokens())
    if "geometry" in settings:
        calibration = fit_geometry(model, CALIBRATION, RANK, key_k=settings["geometry"], epochs=0, progress=False)
    config = KVSpliceConfig(transform="spline", rank=RANK, key_rank=settings.get("key_rank", KEY_RANK))
    with pytest.raises(error, match=message):
        patch_model_with_kvsplice(model, config, calibration=calibration)
    assert torch.equal(in_one_go(model, tokens()), stock)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("latents", {"key_k": 2}, "`key_k` is for ordinary attention"),
        ("grouped", {"key_k": 2, "of": "layers"}, '`key_k` goes with of="heads"'),
        ("grouped", {"key_k": 99}, "`key_k` is 99; the keys of"),
    ],
)
def test_geometries_of_keys_that_cannot_be_are_named_before_the_model_runs(
    kind: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        fit_geometry(model_of(kind), CALIBRATION, RANK, epochs=0, progress=False, **settings)


def test_the_values_of_c_attn_are_collected_by_head_or_by_layer() -> None:
    model = model_of("c_attn")
    width, heads = model.config.n_embd, model.config.n_head
    whole = fit_geometry(model, CALIBRATION, width, of="layers", epochs=0, progress=False)
    assert [len(geometry.mean) for geometry in whole.values()] == [width] * model.config.n_layer
    assert all(math.isfinite(report.pca) for report in whole.reports.values())
    apart = fit_geometry(model, CALIBRATION, 2, epochs=0, progress=False)
    assert len(apart) == model.config.n_layer * heads
    joined = torch.cat([apart[HeadKey(0, head)].mean for head in range(heads)])
    assert torch.allclose(joined, whole[0].mean, atol=1e-5)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "packed rows": ({"rank": None, "bits": 4}, "does not go with packed rows"),
    "no budget": ({"rank": None}, "does not go with packed rows"),
    "absorbed": ({"attention": "absorbed"}, "a spline does not fold into the weights"),
    "layernorm": ({"use_layernorm": True}, "does not go with `use_layernorm`"),
    "another transform": ({"transform": "softplus"}, "`transform` is 'softplus'"),
    "no splines for keys": ({"transform": "affine", "key_rank": 4}, '`key_rank` is for `transform="spline"`'),
    "no key": ({"key_rank": 0}, "`key_rank` is 0"),
    "one knot": ({"knots": 1}, "`knots` is 1; a spline needs at least 2"),
    "epochs": ({"spline_epochs": -1}, "`spline_epochs` is -1"),
    "rate": ({"spline_learning_rate": 0}, "`spline_learning_rate` is 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_splines_cannot_have_are_named(case: str) -> None:
    settings, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        KVSpliceConfig(**{"transform": "spline", "rank": 4} | settings)


def test_settings_of_splines_survive_json_and_are_left_out_where_there_are_none() -> None:
    config = KVSpliceConfig(
        transform="spline", compression_ratio=0.25, knots=5, spline_epochs=3, spline_learning_rate=1e-2
    )
    assert KVSpliceConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert not {"transform", "knots"} & set(KVSpliceConfig(rank=4).to_dict())


@pytest.mark.parametrize("kind", MODELS)
def test_what_cannot_be_fitted_leaves_the_model_as_it_was(kind: str) -> None:
    model = model_of(kind)
    stock = in_one_go(model, tokens())
    with pytest.raises(ConfigError, match="`rank` is 999"):
        patch_model_with_kvsplice(model, KVSpliceConfig(transform="spline", rank=999), calibration=CALIBRATION)
    few = tokens(1, 8)
    with pytest.raises(CalibrationError, match="it takes at least"):
        patch_model_with_kvsplice(model, KVSpliceConfig(transform="spline", rank=2), calibration=few)
    with pytest.raises(ConfigError, match="above the"):
        fit_geometry(model, CALIBRATION, 999)
    assert torch.equal(in_one_go(model, tokens()), stock)


def test_what_needs_affine_codes_refuses_splines() -> None:
    with pytest.raises(ConfigError, match="go through splines"):
        prune_kvsplice(patched("latents"))
    with pytest.raises(ConfigError, match="fitted to vectors of a trained model"):
        GPT2MLAConfig(kvsplice={"transform": "spline", "rank": 4})
    with pytest.raises(ConfigError, match="`knots` is 1"):
        FixedSpline(4, 1)
    with pytest.raises(ConfigError, match="knots \\[d, n\\]"):
        FixedSpline(4, 5).set_to(torch.zeros(4, 5), torch.ones(4, 5))


OPTIONS = (
    "--kvsplice-enable --kvsplice-k 3 --kvsplice-knots 4 --kvsplice-samples 100 --kvsplice-max-batches 6 "
    "--kvsplice-epochs 2 --kvsplice-lr 2e-3 --kvsplice-save"
)


@pytest.mark.parametrize("architecture", ["gpt2", "gpt2-mla"])
def test_training_takes_the_options_of_the_research(architecture: str, tmp_path: Path) -> None:
    path = tmp_path / "kept" / "geometry.safetensors"
    settings = SMALL | {"output_dir": str(tmp_path / "run"), "cache": str(tmp_path / "cache"), "max_steps": 2}
    args, training = pretraining.parse([*OPTIONS.split(), str(path)], **settings, architecture=architecture)
    report = pretraining.train(args, training)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    geometry = ModelGeometry.load(path, model)
    size = SMALL["n_embd"] if architecture == "gpt2" else SMALL["n_embd"] // 3
    assert [(len(one.mean), one.k, one.knots) for one in geometry.values()] == [(size, 3, 4)]
    assert report["kvsplice_file"] == str(path)
    assert 0 < report["kvsplice_spline_mse"] <= report["kvsplice_pca_mse"]
    with through_geometries(model.eval(), geometry), torch.no_grad():
        assert not torch.equal(in_one_go(model, tokens()), in_one_go(build_again(tmp_path / "run"), tokens()))
    assert all(math.isfinite(report[f"kvsplice_{name}_loss"]) for name in ("pca", "spline"))


def build_again(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


WRONG_OPTIONS = {
    "not enabled": ({"kvsplice_k": 8}, "kvsplice_k belong to a geometry"),
    "one knot": ({"kvsplice_enable": True, "kvsplice_knots": 1}, "`knots` is 1"),
    "k above the values": ({"kvsplice_enable": True, "kvsplice_k": 17, "architecture": "gpt2"}, "above the 16 numbers"),
    "k above the latent": ({"kvsplice_enable": True, "kvsplice_k": 6}, "above the 5 numbers"),
    "no sample": ({"kvsplice_enable": True, "kvsplice_k": 2, "kvsplice_samples": 0}, "both must be 1 or more"),
    "a rate of 0": ({"kvsplice_enable": True, "kvsplice_k": 2, "kvsplice_lr": 0.0}, "a rate above 0"),
    "a splice": ({"kvsplice_enable": True, "kvsplice_k": 2, "kvsplice": '{"rank": 2}'}, "leave --kvsplice out"),
}


@pytest.mark.parametrize("case", WRONG_OPTIONS)
def test_options_of_a_geometry_that_cannot_be_are_refused_before_training(case: str) -> None:
    settings, message = WRONG_OPTIONS[case]
    with pytest.raises(ConfigError, match=message):
        pretraining.parse([], **SMALL | settings)


@pytest.mark.parametrize("kind", MODELS)
def test_a_splice_computes_what_a_model_does_that_reads_through_geometries(kind: str) -> None:
    model = model_of(kind)
    geometry = fit_geometry(model, CALIBRATION, RANK, epochs=4, learning_rate=5e-2, progress=False)
    with through_geometries(model, geometry):
        read = in_one_go(model, tokens())
    patch_model_with_kvsplice(model, KVSpliceConfig(transform="spline", rank=RANK), calibration=geometry)
    # Rows of key heads are in bf16.
    assert torch.allclose(
        in_one_go(model, tokens()), read, atol=(2e-5 if kind == "latents" else 2e-2) * float(read.abs().max())
    )


@pytest.mark.parametrize("kind", ["latents", "grouped"])
def test_continuous_batching_and_beams_read_through_splines(kind: str) -> None:
    model = patched(kind)
    assert together(model) == alone(model)
    settings = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(tokens(), **settings), model.generate(tokens(), use_cache=False, **settings))


@pytest.mark.parametrize("kind", MODELS)
def test_static_caches_hold_codes_behind_splines(kind: str) -> None:
    model, ids = patched(kind), tokens()
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    grown = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, cache_implementation="static", disable_compile=True, **settings), grown)
