"""At full rank a patched model generates the tokens of the stock one, in every mode of `generate`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import TINY_MODELS, build, tiny_batch
from transformers import DynamicCache, PreTrainedModel, StaticCache

from kvsplice_hf import KVSpliceCache, KVSpliceConfig, patch_model_with_kvsplice
from kvsplice_hf.cache.splicing import SplicedLayerMixin
from kvsplice_hf.upstream import cache_argument, cache_of


FULL_RANK = KVSpliceConfig(compression_ratio=1.0, sink_tokens=2)
NEW_TOKENS = 12
Mode = Callable[[PreTrainedModel], torch.Tensor]

MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.3},
    "beam search": {"do_sample": False, "num_beams": 3},
    "beam sampling": {"do_sample": True, "num_beams": 3},
    "several returned beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "chunked prefill": {"do_sample": False, "prefill_chunk_size": 5},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
    "static cache, chunked prefill": {
        "do_sample": False,
        "cache_implementation": "static",
        "prefill_chunk_size": 5,
        "disable_compile": True,
    },
    "static cache, beam search": {"do_sample": False, "num_beams": 3, "cache_implementation": "static"},
    "no cache": {"do_sample": False, "use_cache": False},
}


def tokens(model: PreTrainedModel, name: str, **settings: Any) -> torch.Tensor:
    """What `generate` returns for the tiny batch (left-padded, unless one sequence is asked for)."""
    ids, mask = tiny_batch(name, batch=settings.pop("batch", 2), length=14)
    torch.manual_seed(0)
    return model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, **settings)


def assert_same_tokens(name: str, patched: PreTrainedModel, **settings: Any) -> None:
    expected = tokens(build(name), name, **settings)
    assert torch.equal(tokens(patched, name, **settings), expected)


@pytest.mark.parametrize("attention", ["auto", "absorbed", "expanded"])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_generates_the_stock_tokens(mode: str, attention: str) -> None:
    config = KVSpliceConfig(compression_ratio=1.0, sink_tokens=2, attention=attention)
    assert_same_tokens("deepseek_v3", patch_model_with_kvsplice(build("deepseek_v3"), config), **MODES[mode])


@pytest.mark.parametrize("mode", ["greedy", "beam search", "chunked prefill", "static cache"])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_architecture_generates_the_stock_tokens(name: str, mode: str) -> None:
    assert_same_tokens(name, patch_model_with_kvsplice(build(name), FULL_RANK), **MODES[mode], disable_compile=True)


@pytest.mark.parametrize("name", ["deepseek_v3", "dots3_note", "deepseek_v32"])
@pytest.mark.parametrize("patched_role", ["target", "draft", "both"])
def test_assisted_decoding_generates_the_stock_tokens(name: str, patched_role: str) -> None:
    target, draft = build(name), build(name, seed=1)
    expected = tokens(target, name, batch=1, do_sample=False, assistant_model=draft)
    if patched_role in ("target", "both"):
        patch_model_with_kvsplice(target, FULL_RANK)
    if patched_role in ("draft", "both"):
        patch_model_with_kvsplice(draft, FULL_RANK)
    assert torch.equal(tokens(target, name, batch=1, do_sample=False, assistant_model=draft), expected)


@pytest.mark.parametrize("name", ["deepseek_v3", "dots3_note", "deepseek_v32"])
def test_prompt_lookup_generates_the_stock_tokens(name: str) -> None:
    patched = patch_model_with_kvsplice(build(name), FULL_RANK)
    assert_same_tokens(name, patched, batch=1, do_sample=False, prompt_lookup_num_tokens=3)


CACHES: dict[str, Callable[[PreTrainedModel], Any]] = {
    "DynamicCache()": lambda model: DynamicCache(),
    "DynamicCache(config)": lambda model: DynamicCache(config=model.config.get_text_config()),
    "StaticCache": lambda model: StaticCache(config=model.config.get_text_config(), max_cache_len=64),
}


@pytest.mark.parametrize("kind", [*CACHES, "KVSpliceCache"])
@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v32"])
def test_two_turns_on_one_cache_generate_the_stock_tokens(name: str, kind: str) -> None:
    if name == "deepseek_v32" and kind == "DynamicCache()":
        pytest.skip("stock sparse-attention models need a cache made from the config")

    def two_turns(model: PreTrainedModel, cache: Any) -> torch.Tensor:
        first, _ = tiny_batch(name, batch=1, pad=0)
        said = model.generate(first, **cache_argument(cache), max_new_tokens=5, do_sample=False)
        second = torch.cat([said, first[:, :4]], dim=1)
        return model.generate(second, **cache_argument(cache), max_new_tokens=5, do_sample=False)

    stock, patched = build(name), patch_model_with_kvsplice(build(name), FULL_RANK)
    stock_kind = "DynamicCache(config)" if kind == "KVSpliceCache" else kind
    expected = two_turns(stock, CACHES[stock_kind](stock))
    cache = KVSpliceCache(patched) if kind == "KVSpliceCache" else CACHES[kind](patched)
    assert torch.equal(two_turns(patched, cache), expected)
    assert all(isinstance(cache.layers[index], SplicedLayerMixin) for index in TINY_MODELS[name].mla_layers)
    assert int(cache.get_seq_length()) == expected.shape[1] - 1, "the caller's own cache must hold the tokens"


class _NoStream:
    """Stands in for the side stream of an offloaded cache, which exists on accelerators only."""

    def wait_stream(self, other: object) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *exception: object) -> None: ...


# Not mistral_large4: its indexer-only layers cannot be prefetched in stock transformers 5.23.
@pytest.mark.parametrize("name", ["deepseek_v3", "dots3_note", "deepseek_v32"])
def test_an_offloaded_cache_generates_the_stock_tokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "Stream", _NoStream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device=None: _NoStream())
    patched = patch_model_with_kvsplice(build(name), FULL_RANK)
    assert_same_tokens(name, patched, do_sample=False, cache_implementation="offloaded")


@pytest.mark.parametrize("cache_implementation", [None, "static"])
def test_the_cache_that_generate_returns_is_spliced(cache_implementation: str | None) -> None:
    patched = patch_model_with_kvsplice(build("deepseek_v3"), rank=5)
    ids, mask = tiny_batch("deepseek_v3")
    settings = {"cache_implementation": cache_implementation} if cache_implementation else {}
    output = patched.generate(
        ids, attention_mask=mask, max_new_tokens=3, return_dict_in_generate=True, do_sample=False, **settings
    )
    layers = cache_of(output).layers
    assert layers
    assert all(isinstance(layer, SplicedLayerMixin) for layer in layers)


def test_a_left_padded_row_generates_what_it_generates_alone() -> None:
    # At a rank that loses much: only with the exact tokens in their places is a padded row the same as an unpadded one.
    patched = patch_model_with_kvsplice(build("deepseek_v3"), rank=6)
    ids, mask = tiny_batch("deepseek_v3", pad=5)
    together = patched.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    for row in range(2):
        real = ids[row : row + 1, mask[row].bool()]
        alone = patched.generate(real, attention_mask=torch.ones_like(real), max_new_tokens=8, do_sample=False)
        assert torch.equal(together[row, -8:], alone[0, -8:])


def test_inference_mode_generates_the_stock_tokens() -> None:
    patched = patch_model_with_kvsplice(build("deepseek_v3"), FULL_RANK)
    with torch.inference_mode():
        assert_same_tokens("deepseek_v3", patched, do_sample=False)
