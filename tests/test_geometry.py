"""Spline, then principal components: exact both ways, never worse than components alone, safe on disk."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from ordinary_models import VOCABULARY, build_ordinary
from tiny_models import build

from kvsplice_hf import KVSpliceCalibrator, KVSpliceConfig, patch_model_with_kvsplice
from kvsplice_hf.calibration.vectors import collect_vectors
from kvsplice_hf.code.heads import HeadKey
from kvsplice_hf.errors import CalibrationError, CheckpointError, ConfigError, PatchStateError
from kvsplice_hf.geometry import MonotoneSpline, SplinePCA


D = 16


def bent_vectors(count: int = 3000, seed: int = 0) -> torch.Tensor:
    """Gaussian vectors of few directions, each number stretched by a sinh: what a spline can straighten."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(D, D, generator=torch.Generator().manual_seed(5)) / 2
    directions = torch.randn(count, D, generator=generator) * torch.logspace(0, -2, D)
    return torch.sinh(2.0 * directions @ mixing.T)


def squared_error(geometry: SplinePCA, vectors: torch.Tensor) -> float:
    return float((geometry(vectors) - vectors).square().mean())


@pytest.mark.parametrize("knots", [2, 3, 7, 20])
def test_a_spline_begins_as_the_identity_and_is_exact_both_ways(knots: int) -> None:
    vectors = bent_vectors()
    spline = MonotoneSpline.over(vectors, knots)
    assert torch.allclose(spline(vectors), vectors, atol=1e-5)
    with torch.no_grad():
        spline.bends.copy_(torch.randn(spline.bends.shape, generator=torch.Generator().manual_seed(1)))
    wide = torch.cat([vectors, 20 * vectors[:100]])  # the tails as well
    bent = spline(wide)
    assert not torch.allclose(bent, wide, atol=0.1)
    assert torch.allclose(spline.inverse(bent), wide, atol=1e-5 * float(wide.abs().max()))


def test_a_spline_is_monotone_however_far_it_is_bent() -> None:
    spline = MonotoneSpline.over(bent_vectors(), 7)
    with torch.no_grad():
        spline.bends.copy_(50 * torch.randn(spline.bends.shape, generator=torch.Generator().manual_seed(1)))
    line = torch.linspace(-30, 30, 500)[:, None].expand(-1, D)
    rises = spline(line).diff(dim=0)
    assert (rises > 0).all()
    assert torch.isfinite(spline.slopes).all()


def test_equal_samples_still_give_knots_that_ascend() -> None:
    vectors = bent_vectors()
    vectors[:, 3] = 0.0  # never varies
    vectors[:2900, 4] = 1.0  # hardly
    spline = MonotoneSpline.over(vectors, 7)
    assert (spline.knots.diff(dim=1) > 0).all()
    assert torch.allclose(spline.inverse(spline(vectors)), vectors, atol=1e-4)


@pytest.mark.parametrize("k", [2, 8])
def test_a_fit_is_no_worse_than_components_alone_and_better_where_numbers_are_bent(k: int) -> None:
    geometry = SplinePCA(k)
    found = geometry.fit(bent_vectors(12_000), epochs=16, learning_rate=2e-2, progress=False)
    assert found.spline <= found.pca
    assert found.epoch > 0
    alone = SplinePCA(k)
    alone.fit(bent_vectors(12_000), epochs=0, progress=False)
    fresh = bent_vectors(seed=3)
    assert squared_error(geometry, fresh) < 0.99 * squared_error(alone, fresh)


def test_a_fit_that_only_harms_keeps_components_alone() -> None:
    straight = torch.randn(3000, D, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -2, D)
    found = SplinePCA(4).fit(straight, epochs=2, learning_rate=5.0, progress=False)
    assert (found.epoch, found.spline) == (0, found.pca)


def test_all_components_give_back_every_vector() -> None:
    vectors = bent_vectors()
    geometry = SplinePCA(D)
    geometry.fit(vectors, epochs=3, progress=False)
    assert (geometry(vectors) - vectors).abs().max() <= 1e-5 * vectors.abs().max()


def test_codes_have_the_shape_of_what_they_are_of() -> None:
    geometry = SplinePCA(5)
    geometry.fit(bent_vectors(), epochs=1, progress=False)
    vectors = bent_vectors()[:24].view(2, 3, 4, D)
    codes = geometry.compress(vectors)
    assert codes.shape == (2, 3, 4, 5)
    assert torch.equal(geometry.decompress(codes), geometry(vectors))
    assert geometry.compress(vectors.bfloat16()).dtype is torch.float32


def test_a_fit_is_the_same_each_time() -> None:
    first, second = SplinePCA(4), SplinePCA(4)
    reports = [geometry.fit(bent_vectors(), epochs=2, progress=False) for geometry in (first, second)]
    assert reports[0] == reports[1]
    assert torch.equal(first.compress(bent_vectors()), second.compress(bent_vectors()))


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    geometry = SplinePCA(4, knots=5)
    geometry.fit(bent_vectors(), epochs=2, progress=False)
    geometry.save(tmp_path / "geometry.safetensors")
    loaded = SplinePCA.load(tmp_path / "geometry.safetensors")
    assert (loaded.k, loaded.knots) == (4, 5)
    assert torch.equal(loaded(bent_vectors()), geometry(bent_vectors()))


def rewritten(path: Path, **changes: Any) -> None:
    """The file with other metadata; a change to a tensor puts that in its place."""
    about = {"format": "kvsplice-geometry", "version": 1, "k": 4, "knots": 7}
    tensors = safetensors.torch.load(path.read_bytes())
    for name, value in changes.items():
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        else:
            about[name] = value
    path.write_bytes(safetensors.torch.save(tensors, metadata={"kvsplice": json.dumps(about)}))


DAMAGES: dict[str, tuple[dict[str, Any], str]] = {
    "of something else": ({"format": "kvsplice"}, "is not a geometry"),
    "newer": ({"version": 2}, "reads up to 1"),
    "another k": ({"k": 5}, "do not fit each other"),
    "no k": ({"k": None}, "is damaged"),
    "knots that descend": ({"knots": torch.zeros(D, 7)}, "is damaged"),
    "not finite": ({"mean": torch.full((D,), torch.nan)}, "do not fit each other"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "geometry.safetensors"
    geometry = SplinePCA(4)
    geometry.fit(bent_vectors(), epochs=1, progress=False)
    geometry.save(path)
    changes, message = DAMAGES[damage]
    rewritten(path, **changes)
    with pytest.raises(CheckpointError, match=message):
        SplinePCA.load(path)


def test_a_file_cut_short_or_missing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "geometry.safetensors"
    geometry = SplinePCA(4)
    geometry.fit(bent_vectors(), epochs=1, progress=False)
    geometry.save(path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match="is damaged"):
        SplinePCA.load(path)
    with pytest.raises(CheckpointError, match="No geometry at"):
        SplinePCA.load(tmp_path / "other.safetensors")


def test_bad_settings_and_vectors_are_refused() -> None:
    vectors = bent_vectors()
    for settings, message in (((0,), "`k` is 0"), ((4, 1), "`knots` is 1")):
        with pytest.raises(ConfigError, match=message):
            SplinePCA(*settings)
    with pytest.raises(ConfigError, match="above the 16 numbers"):
        SplinePCA(17).fit(vectors)
    with pytest.raises(ConfigError, match="0 or more epochs"):
        SplinePCA(4).fit(vectors, epochs=-1)
    with pytest.raises(ConfigError, match=r"takes vectors \[M, d\]"):
        SplinePCA(4).fit(vectors[None])
    refused = {"never vary": torch.ones(100, D), "not finite": vectors.log(), "at least 32": vectors[:20]}
    for message, given in refused.items():
        with pytest.raises(CalibrationError, match=message):
            SplinePCA(4).fit(given)
    with pytest.raises(ConfigError, match="is not fitted"):
        SplinePCA(4).compress(vectors)


def test_a_geometry_of_another_model_is_refused_by_its_size() -> None:
    geometry = SplinePCA(4)
    geometry.fit(bent_vectors(), epochs=0, progress=False)
    with pytest.raises(ConfigError, match="another layer or model"):
        geometry.compress(torch.zeros(3, D + 1))
    with pytest.raises(ConfigError, match="have 4"):
        geometry.decompress(torch.zeros(3, 5))


def test_values_of_each_key_head_are_collected_without_the_first_tokens() -> None:
    model = build_ordinary("llama")
    ids = torch.randint(3, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))
    vectors = collect_vectors(model, [ids, ids], progress=False)
    assert set(vectors) == {HeadKey(layer, head) for layer in range(2) for head in range(2)}
    assert all(part.shape == (2 * 2 * 16, 8) for part in vectors.values())
    few = collect_vectors(model, [ids] * 9, max_samples=10, max_batches=4, progress=False)
    assert all(part.shape == (10, 8) for part in few.values())
    values = model.model.layers[1].self_attn.v_proj(layer_input(model, ids))[:, 4:, :8].flatten(0, 1)
    found = vectors[HeadKey(1, 0)][:32]
    assert torch.allclose(found.sort(dim=0).values, values.sort(dim=0).values, atol=1e-5)


@torch.no_grad()
def layer_input(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """What the attention of the second layer gets."""
    hidden = model.model(ids, output_hidden_states=True, use_cache=False).hidden_states[1]
    return model.model.layers[1].input_layernorm(hidden)


def test_latents_of_mla_are_collected() -> None:
    model = build("deepseek_v3")
    ids = torch.randint(3, 100, (2, 20), generator=torch.Generator().manual_seed(0))
    vectors = collect_vectors(model, [{"input_ids": ids}], progress=False)
    rank = model.config.kv_lora_rank
    assert all(part.shape == (32, rank) for part in vectors.values())
    assert len(vectors) == model.config.num_hidden_layers


def test_bad_batches_and_patched_models_are_refused() -> None:
    model = build_ordinary("llama")
    ids = torch.randint(3, VOCABULARY, (1, 4), generator=torch.Generator().manual_seed(0))
    with pytest.raises(CalibrationError, match="No tokens are left"):
        collect_vectors(model, [ids], progress=False)
    with pytest.raises(ConfigError, match="both must be 1 or more"):
        collect_vectors(model, [ids], max_batches=0)
    with pytest.raises(CalibrationError, match="the model knows"):
        collect_vectors(model, [ids + VOCABULARY], progress=False)
    long = torch.randint(3, VOCABULARY, (8, 60), generator=torch.Generator().manual_seed(0))
    calibrator = KVSpliceCalibrator(model, metric="pca")
    calibrator.collect([long], progress=False)
    patch_model_with_kvsplice(model, KVSpliceConfig(bits=4), calibration=calibrator)
    with pytest.raises(PatchStateError):
        collect_vectors(model, [long], progress=False)
