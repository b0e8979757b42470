"""Falcon, whose modules compute attention by themselves: what they get of the cache is decoded for them."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from ordinary_models import build_ordinary
from test_ordinary import SINKS, calibrated, rms, step_by_step, tokens, uncached

from kvsplice_hf import (
    KVSpliceCache,
    KVSpliceConfig,
    UnsupportedError,
    UpstreamChangedError,
    cache_nbytes,
    explain,
    get_kv_cache_size,
    load_kvsplice,
    patch_model_with_kvsplice,
    save_kvsplice,
    splice_disabled,
    unpatch_model,
)
from kvsplice_hf.patch.alone import StandIn
from kvsplice_hf.patch.state import patched_sites
from kvsplice_hf.training import freeze_all_but_kvsplice
from kvsplice_hf.upstream import cache_argument, cache_of


# Settings, and how many key heads its cache gets.
VARIANTS: dict[str, tuple[dict[str, Any], int]] = {
    "multi-query": ({}, 1),
    "multi-head": ({"multi_query": False}, 4),
    "newer, keys repeated": ({"new_decoder_architecture": True, "num_kv_heads": 2}, 4),
    "biases by position instead of a rotation": ({"alibi": True}, 1),
}
all_variants = pytest.mark.parametrize("variant", VARIANTS)
GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


def build(variant: str) -> Any:
    return build_ordinary("falcon", **VARIANTS[variant][0])


def packed(variant: str, bits: float = 5.0, **settings: Any) -> Any:
    model = build(variant)
    config = KVSpliceConfig(bits=bits, sink_tokens=SINKS, **settings)
    return patch_model_with_kvsplice(model, config, calibration=calibrated(model))


@all_variants
def test_the_contract_holds_for_every_variant(variant: str) -> None:
    stock = uncached(build(variant), tokens())
    exact = packed(variant, bits=16.5)
    assert rms(uncached(exact, tokens()) - stock) < 0.02 * rms(stock)
    model = packed(variant)
    assert [site.kv_heads for site, _ in patched_sites(model)] == 2 * [VARIANTS[variant][1]]
    without, (within, _) = uncached(model, tokens()), step_by_step(model, tokens())
    loss = rms(without - stock)
    assert rms(within - without) < 0.02 * loss
    size, cache = get_kv_cache_size(model, seq_len=40), KVSpliceCache(model)
    with torch.no_grad():
        model(tokens(1, 40), use_cache=True, **cache_argument(cache))
    assert cache_nbytes(cache) == size.compressed_bytes < 0.75 * size.original_bytes
    with splice_disabled(model):
        assert torch.equal(uncached(model, tokens()), stock)
    unpatch_model(model)
    assert torch.equal(uncached(model, tokens()), stock)


@all_variants
@pytest.mark.parametrize(
    "mode", [{"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}, {"num_beams": 1}], ids=str
)
def test_greedy_modes_of_generate_agree(variant: str, mode: dict[str, Any]) -> None:
    if "static" in mode.values() and "biases" in variant:
        pytest.skip("Falcon makes its biases for the tokens so far in transformers, not for all rows of a static cache")
    model = packed(variant)
    expected = model.generate(tokens(1, 12), use_cache=False, **GREEDY)
    assert torch.equal(model.generate(tokens(1, 12), **GREEDY, **mode), expected)


@all_variants
def test_padding_on_the_left_changes_nothing(variant: str) -> None:
    model, ids = packed(variant), tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :4] = ids[0, :4] = 0
    together = model.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(together[0, 12:], model.generate(ids[:1, 4:], **GREEDY)[0, 8:])


def test_eager_attention_is_served_as_well_and_returns_its_weights() -> None:
    model = packed("multi-query")
    logits = uncached(model, tokens())
    model.set_attn_implementation("eager")
    torch.testing.assert_close(uncached(model, tokens()), logits, atol=1e-3, rtol=1e-3)
    cache = cache_of(model(tokens(1, 12), use_cache=True))
    output = model(tokens(1, 1), use_cache=True, output_attentions=True, **cache_argument(cache))
    assert output.attentions[0].shape == (1, 4, 1, 13)


def test_every_step_decodes_and_explain_says_why() -> None:
    layers = explain(packed("multi-query")).layers
    assert {layer.decode for layer in layers} == {"expanded"}
    assert all("computes attention by itself" in layer.refused["codes"] for layer in layers)
    with pytest.raises(UnsupportedError, match=r'attention="absorbed" needs .* computes attention by itself'):
        packed("multi-query", attention="absorbed")


def test_the_settings_and_the_modules_are_left_as_they_were() -> None:
    model = build("multi-query")
    module = model.transformer.h[0].self_attention
    before = dict(vars(module)), copy.deepcopy(model.config)
    known = calibrated(model)
    assert not module._forward_pre_hooks
    patch_model_with_kvsplice(model, KVSpliceConfig(bits=5, sink_tokens=SINKS), calibration=known)
    assert model.config._attn_implementation == before[1]._attn_implementation
    unpatch_model(model)
    assert set(vars(module)) == set(before[0])
    assert not module._forward_pre_hooks


def test_the_splice_is_trained_saved_and_loaded(tmp_path: Path) -> None:
    model = packed("multi-query")
    expected = uncached(model, tokens())
    save_kvsplice(model, tmp_path)
    assert torch.equal(uncached(load_kvsplice(build("multi-query"), tmp_path), tokens()), expected)
    freeze_all_but_kvsplice(model).train()
    model(tokens(), labels=tokens()).loss.backward()
    for _, patched in patched_sites(model):
        gradients = [p.grad for p in patched.splice.parameters() if p.requires_grad]
        assert gradients
        assert all(gradient is not None for gradient in gradients)


def test_a_module_that_asks_a_cache_that_is_not_there_for_more_is_named() -> None:
    with pytest.raises(UpstreamChangedError, match="`layers` of its cache was asked for in a call without a cache"):
        _ = StandIn(None, lambda key, value: (key, value)).layers
