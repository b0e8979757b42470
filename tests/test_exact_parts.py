"""Exact keys or exact values beside coded ones, and budgets in all their forms, over kinds of ordinary attention."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ordinary_models import build_ordinary
from test_ordinary import (
    KINDS,
    SINKS,
    calibrated,
    calibration_of,
    packed,
    rms,
    step_by_step,
    tokens,
    uncached,
)
from tiny_models import build

from kvsplice_hf import (
    ConfigError,
    KVSpliceCache,
    KVSpliceCalibrator,
    KVSpliceConfig,
    cache_nbytes,
    explain,
    get_kv_cache_size,
    load_kvsplice,
    patch_model_with_kvsplice,
    save_kvsplice,
)
from kvsplice_hf.patch.state import patched_sites
from kvsplice_hf.upstream import cache_argument, cache_of


all_kinds = pytest.mark.parametrize("name", KINDS)
EXACT: dict[str, dict[str, Any]] = {"keys": {"keys": "exact"}, "values": {"values": "exact"}}
both_parts = pytest.mark.parametrize("part", EXACT)
BITS = 11.0  # 16 for what is exact, about 5 for the rest


@all_kinds
@both_parts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_exact_comes_back_as_its_bf16_number_and_the_rest_does_not(
    name: str, part: str, dtype: torch.dtype
) -> None:
    model = build_ordinary(name)
    known = calibrated(model)
    model = patch_model_with_kvsplice(
        model.to(dtype), KVSpliceConfig(bits=BITS, sink_tokens=SINKS, **EXACT[part]), calibration=known
    )
    for site, patched in patched_sites(model):
        shape = (1, site.kv_heads, 9)
        values, keys = torch.randn(*shape, site.kv_lora_rank), torch.randn(*shape, site.qk_rope_head_dim)
        values, keys = values.to(dtype), keys.to(dtype)
        turns = torch.zeros(1, 1, 9, site.qk_rope_head_dim // 2, dtype=torch.uint8)
        with torch.no_grad():
            read = dict(zip(("values", "keys"), patched.splice.round_trip(values, keys, turns), strict=True))
        given = {"values": values, "keys": keys}
        (coded,) = set(given) - {part}
        assert torch.equal(read[part], given[part].bfloat16().to(dtype))
        assert not torch.allclose(read[coded], given[coded], rtol=1e-3)


@all_kinds
@both_parts
def test_with_and_without_a_cache_the_numbers_are_the_same(name: str, part: str) -> None:
    stock, model = uncached(build_ordinary(name), tokens()), packed(name, BITS, **EXACT[part])
    without, (within, _) = uncached(model, tokens()), step_by_step(model, tokens())
    loss = rms(without - stock)
    assert loss > 0
    assert rms(within - without) < 0.02 * loss
    decoded, _ = step_by_step(packed(name, BITS, attention="expanded", **EXACT[part]), tokens())
    torch.testing.assert_close(within, decoded, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        said = {layer.decode for layer in explain(model).layers}
    assert said == {"expanded"} if name == "gemma2" else said <= {"C++", "PyTorch"}


@all_kinds
@both_parts
def test_bytes_are_those_of_the_formula_and_of_the_budget(name: str, part: str) -> None:
    model = packed(name, BITS, **EXACT[part])
    size = get_kv_cache_size(model, seq_len=40)
    cache = KVSpliceCache(model)
    with torch.no_grad():
        model(tokens(1, 40), use_cache=True, **cache_argument(cache))
    assert cache_nbytes(cache) == size.compressed_bytes
    sites = list(patched_sites(model))
    # One gain per key head, and every number of what is exact.
    least = sum(2 * site.row_dim // 2 + site.kv_heads for site, _ in sites)
    rows = sum(sum(patched.splice.row_bytes) for _, patched in sites)
    assert least < rows <= sum(BITS * site.row_dim / 8 for site, _ in sites)


@all_kinds
@both_parts
def test_a_saved_splice_keeps_what_is_exact(name: str, part: str, tmp_path: Path) -> None:
    model = packed(name, BITS, **EXACT[part])
    save_kvsplice(model, tmp_path)
    fresh = load_kvsplice(build_ordinary(name), tmp_path)
    assert torch.equal(uncached(fresh, tokens()), uncached(model, tokens()))
    assert [patched.patch.config.to_dict()[part] for _, patched in patched_sites(fresh)] == ["exact"] * 2


@both_parts
def test_the_keyword_is_short_for_the_setting(part: str) -> None:
    model = build_ordinary("gpt2")
    patch_model_with_kvsplice(model, bits=BITS, calibration=calibration_of("gpt2"), **EXACT[part])
    assert {getattr(patched.patch.config, part) for _, patched in patched_sites(model)} == {"exact"}


@both_parts
def test_a_budget_that_what_is_exact_exceeds_names_the_smallest_one(part: str) -> None:
    model = build_ordinary("llama")
    known = calibrated(model)
    phrase = rf"below the (\d+\.\d) that are the least: .*smallest row with exact `{part}`.*or code `{part}`"
    with pytest.raises(ConfigError, match=phrase):  # without a budget it is a quarter of stock
        patch_model_with_kvsplice(model, KVSpliceConfig(sink_tokens=SINKS, **EXACT[part]), calibration=known)


FORMS: dict[str, dict[str, float]] = {
    "bytes": {"bytes_per_token": 3},
    "bits": {"bits": 0.5},
    "times": {"compression": 60},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("exact", [{}, *EXACT.values()], ids=["coded", *EXACT])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_the_budget_that_an_error_names_is_enough(name: str, exact: dict[str, str], form: str) -> None:
    model = build_ordinary(name)
    known = calibration_of(name)
    (field,) = FORMS[form]
    with pytest.raises(ConfigError) as error:
        patch_model_with_kvsplice(model, KVSpliceConfig(sink_tokens=SINKS, **FORMS[form], **exact), calibration=known)
    words = str(error.value).split(f"`{field}` of ")[1].removeprefix("at least ").removeprefix("at most ")
    named = float(words.split()[0].rstrip(","))
    settings = {"sink_tokens": SINKS, "allocation": "layer", field: named, **exact}
    patch_model_with_kvsplice(model, KVSpliceConfig(**settings), calibration=known)
    assert named > 0


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_a_budget_may_be_given_as_bytes_bits_or_how_many_times_less(name: str) -> None:
    rows = []
    for form in ("bytes_per_token", "bits", "compression"):
        model = build_ordinary(name) if name == "llama" else build(name)
        known = KVSpliceCalibrator(model).collect(list(tokens(12, 48)), progress=False)
        row_dim = sum(layer.latent_dim + layer.rope_dim for layer in known.statistics.values()) / 2
        budget = {"bytes_per_token": 2 * row_dim / 3, "bits": 16 / 3, "compression": 3}[form]
        patch_model_with_kvsplice(model, calibration=known, **{form: budget})
        rows.append([patched.geometry.packed_bytes for _, patched in patched_sites(model)])
        assert sum(rows[-1]) <= 2 * 2 * row_dim / 3
    assert rows[0] == rows[1] == rows[2]


def test_the_rotated_key_of_a_latent_can_be_exact_and_the_latent_cannot() -> None:
    model, ids = build("deepseek_v3"), tokens()
    known = KVSpliceCalibrator(model).collect(list(tokens(12, 48)), progress=False)
    with pytest.raises(ConfigError, match=r"`values` is 'exact'; .* stores a latent"):
        patch_model_with_kvsplice(model, bits=12, values="exact", calibration=known)
    patch_model_with_kvsplice(model, bits=12, keys="exact", calibration=known)
    for _, patched in patched_sites(model):
        latent, k_rot = torch.randn(1, 1, 9, patched.splice.latent_dim), torch.randn(1, 1, 9, 16)
        k_rot = k_rot[..., : patched.geometry.qk_rope_head_dim]
        with torch.no_grad():
            assert torch.equal(patched.splice.round_trip(latent, k_rot)[1], k_rot.bfloat16().float())
    with torch.no_grad():
        output = model(ids[:, :19], use_cache=True)
        step = model(ids[:, 19:], use_cache=True, **cache_argument(cache_of(output))).logits
        torch.testing.assert_close(step[:, 0], model(ids, use_cache=False).logits[:, 19], atol=1e-3, rtol=1e-3)
