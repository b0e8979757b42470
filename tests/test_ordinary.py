"""Ordinary attention on packed keys and values: the contract, over architectures and modes."""

import copy
import functools
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from ordinary_models import ORDINARY_MODELS, REFUSED_MODELS, VOCABULARY, build_ordinary
from packaging.version import Version
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, eager_attention_forward, repeat_kv

from kvsplice_hf import (
    CacheMismatchError,
    CalibrationError,
    ConfigError,
    KVSpliceCache,
    KVSpliceCalibrator,
    KVSpliceConfig,
    NotMLAError,
    UnsupportedError,
    UpstreamChangedError,
    cache_nbytes,
    explain,
    get_kv_cache_size,
    load_kvsplice,
    merge_kvsplice,
    patch_model_with_kvsplice,
    prune_kvsplice,
    save_kvsplice,
    splice_disabled,
    unmerge_kvsplice,
    unpatch_model,
)
from kvsplice_hf.code.heads import HeadKey, HeadSplices
from kvsplice_hf.manage.loading import read_splices
from kvsplice_hf.patch.sites import find_sites
from kvsplice_hf.patch.state import patched_sites, splice_parts_of
from kvsplice_hf.training import freeze_all_but_kvsplice
from kvsplice_hf.upstream import cache_argument, cache_of


SINKS = 2
# Multi-head, grouped queries, a window, soft caps and norms, learned sinks, learned positions, a partial rotation,
# layers without one, chunks.
KINDS = ["gpt_neox", "llama", "mistral", "gemma2", "gpt_oss", "gpt2", "smollm3", "llama4_text"]
all_models = pytest.mark.parametrize("name", ORDINARY_MODELS)
all_kinds = pytest.mark.parametrize("name", KINDS)


def tokens(batch: int = 2, count: int = 20, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, count), generator=torch.Generator().manual_seed(seed))


def calibrated(model: PreTrainedModel, **settings: Any) -> KVSpliceCalibrator:
    return KVSpliceCalibrator(model, sink_tokens=SINKS, **settings).collect(list(tokens(12, 48)), progress=False)


@functools.cache
def calibration_of(name: str) -> KVSpliceCalibrator:
    """The calibration of a model, made once; its solutions serve all budgets."""
    return calibrated(build_ordinary(name))


def packed(name: str, bits: float = 5.0, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    config = KVSpliceConfig(bits=bits, sink_tokens=SINKS, **settings)
    return patch_model_with_kvsplice(build_ordinary(name, dtype), config, calibration=calibration_of(name))


@torch.no_grad()
def uncached(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, use_cache=False).logits


@torch.no_grad()
def step_by_step(model: Any, ids: torch.Tensor, prompt: int = 12) -> tuple[torch.Tensor, Any]:
    """Logits of a prompt and of single tokens behind it, and the cache."""
    output = model(ids[:, :prompt], use_cache=True)
    cache, logits = cache_of(output), [output.logits]
    for place in range(prompt, ids.shape[1]):
        logits.append(model(ids[:, place : place + 1], use_cache=True, **cache_argument(cache)).logits)
    return torch.cat(logits, dim=1), cache


def rms(values: torch.Tensor) -> float:
    return values.float().square().mean().sqrt().item()


@all_models
def test_with_16_bits_per_number_the_model_computes_as_before(name: str) -> None:
    stock = uncached(build_ordinary(name), tokens())
    found = uncached(packed(name, bits=16.5), tokens())
    assert rms(found - stock) < 0.02 * rms(stock)


@all_models
def test_with_and_without_a_cache_the_numbers_are_the_same(name: str) -> None:
    stock, model = uncached(build_ordinary(name), tokens()), packed(name)
    without, (within, _) = uncached(model, tokens()), step_by_step(model, tokens())
    loss = rms(without - stock)
    assert loss > 0
    assert rms(within - without) < 0.02 * loss


@all_models
def test_unpatching_gives_the_model_back_bit_for_bit(name: str) -> None:
    model = build_ordinary(name)
    stock, names = uncached(model, tokens()), set(model.state_dict())
    patch_model_with_kvsplice(model, KVSpliceConfig(bits=4, sink_tokens=SINKS), calibration=calibration_of(name))
    assert not torch.equal(uncached(model, tokens()), stock)
    unpatch_model(model)
    assert torch.equal(uncached(model, tokens()), stock)
    assert set(model.state_dict()) == names


@all_models
def test_a_cache_takes_the_bytes_of_the_formula_and_less_than_stock(name: str) -> None:
    model = packed(name)
    size = get_kv_cache_size(model, seq_len=40)
    cache = KVSpliceCache(model)
    with torch.no_grad():
        model(tokens(1, 40), use_cache=True, **cache_argument(cache))
    assert cache_nbytes(cache) == size.compressed_bytes < 0.75 * size.original_bytes


@all_models
def test_padding_on_the_left_changes_nothing(name: str) -> None:
    model, ids = packed(name), tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :4] = ids[0, :4] = 0
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    together = model.generate(ids, attention_mask=mask, **settings)
    alone = model.generate(ids[:1, 4:], **settings)
    assert torch.equal(together[0, 12:], alone[0, 8:])


MODES: dict[str, dict[str, Any]] = {
    "static cache": {"cache_implementation": "static"},
    "beams of one": {"num_beams": 1},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@all_kinds
@pytest.mark.parametrize("mode", MODES)
def test_modes_of_generate_that_are_greedy_agree(name: str, mode: str) -> None:
    if mode == "prompt lookup" and name == "llama4_text":
        pytest.skip("chunked attention has no cache that can be cropped in transformers")
    if mode == "static cache" and name == "llama4_text" and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("chunked attention has no static cache in this release of transformers")
    model, settings = packed(name), {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    expected = model.generate(tokens(1, 12), **settings)
    assert torch.equal(model.generate(tokens(1, 12), **settings | MODES[mode]), expected)


@all_kinds
@pytest.mark.parametrize(
    "mode", [{"num_beams": 3}, {"do_sample": True}, {"do_sample": True, "num_return_sequences": 2}]
)
def test_other_modes_of_generate_run(name: str, mode: dict[str, Any]) -> None:
    torch.manual_seed(0)
    output = packed(name).generate(tokens(2, 12), max_new_tokens=6, min_new_tokens=6, **mode)
    assert output.shape[1] == 18


@all_kinds
def test_beams_with_a_cache_are_those_without(name: str) -> None:
    model, settings = packed(name), {"num_beams": 3, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = model.generate(tokens(2, 12), use_cache=False, **settings)
    assert torch.equal(model.generate(tokens(2, 12), **settings), expected)


@all_kinds
def test_attention_on_rows_is_attention_on_what_they_decode_to(name: str) -> None:
    on_rows, _ = step_by_step(packed(name), tokens())
    decoded, _ = step_by_step(packed(name, attention="expanded"), tokens())
    torch.testing.assert_close(on_rows, decoded, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        said = {layer.decode for layer in explain(packed(name)).layers}
    assert said == {"expanded"} if name == "gemma2" else said <= {"C++", "PyTorch"}


@all_kinds
def test_the_first_tokens_are_exact(name: str) -> None:
    if name == "llama4_text":
        pytest.skip("in chunks of a text first tokens cannot be told from others, and none is kept")
    stock = uncached(build_ordinary(name), tokens())
    found = uncached(packed(name, bits=2.5), tokens())
    assert torch.allclose(found[:, :SINKS], stock[:, :SINKS], atol=1e-5)
    assert not torch.allclose(found[:, SINKS + 2 :], stock[:, SINKS + 2 :], atol=1e-3)


@all_kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_generates(name: str, dtype: torch.dtype) -> None:
    if dtype == torch.float16 and name == "gpt_oss":
        pytest.skip("experts of gpt_oss have no half-precision product on a CPU")
    model = build_ordinary(name)
    known = calibrated(model)
    patch_model_with_kvsplice(model.to(dtype), KVSpliceConfig(bits=5, sink_tokens=SINKS), calibration=known)
    output = model.generate(tokens(2, 12), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert output.shape == (2, 16)


@all_kinds
def test_a_saved_splice_gives_the_same_logits_wherever_it_is_loaded(name: str, tmp_path: Path) -> None:
    model = packed(name)
    expected = uncached(model, tokens())
    save_kvsplice(model, tmp_path)
    identities = [splice.identity for splice in splice_parts_of(model).values()]
    fresh = load_kvsplice(build_ordinary(name), tmp_path)
    assert torch.equal(uncached(fresh, tokens()), expected)
    assert [splice.identity for splice in splice_parts_of(fresh).values()] == identities
    again = load_kvsplice(packed(name), tmp_path)
    assert torch.equal(uncached(again, tokens()), expected)
    read = read_splices(tmp_path)
    assert all(isinstance(splice, HeadSplices) for splice in read.values())
    assert [head.identity for splice in read.values() for head in splice] == identities


@all_kinds
def test_statistics_from_a_file_fit_the_same_splice(name: str, tmp_path: Path) -> None:
    model = build_ordinary(name)
    known = calibrated(model)
    known.save(tmp_path / "statistics.safetensors")
    loaded = KVSpliceCalibrator.load(tmp_path / "statistics.safetensors", model)
    assert list(loaded.statistics) == list(known.statistics)
    assert all(isinstance(part, HeadKey) for part in loaded.statistics)
    config = KVSpliceConfig(bits=5, sink_tokens=SINKS)
    first = uncached(patch_model_with_kvsplice(model, config, calibration=known), tokens())
    unpatch_model(model)
    assert torch.equal(uncached(patch_model_with_kvsplice(model, config, calibration=loaded), tokens()), first)


@all_kinds
def test_calibrating_leaves_the_model_as_it_was(name: str) -> None:
    model = build_ordinary(name)
    before = copy.deepcopy(vars(find_sites(model)[0].module)), uncached(model, tokens())
    calibrated(model)
    assert set(vars(find_sites(model)[0].module)) == set(before[0])
    assert torch.equal(uncached(model, tokens()), before[1])
    assert not any(parameter.grad is not None for parameter in model.parameters())


@all_kinds
def test_the_splice_can_be_trained_merged_copied_and_disabled(name: str) -> None:
    model = packed(name)
    expected = uncached(model, tokens())
    merge_kvsplice(model)
    torch.testing.assert_close(uncached(model, tokens()), expected, atol=1e-4, rtol=1e-4)
    unmerge_kvsplice(model)
    assert torch.equal(uncached(copy.deepcopy(model), tokens()), expected)
    with splice_disabled(model):
        assert torch.equal(uncached(model, tokens()), uncached(build_ordinary(name), tokens()))
    freeze_all_but_kvsplice(model).train()
    model(tokens(), labels=tokens()).loss.backward()
    for splice in splice_parts_of(model).values():
        gradients = {key: parameter.grad for key, parameter in splice.named_parameters()}
        assert set(gradients) >= {"compress.weight", "expand.weight", "codec.scales"}
        assert all(gradient is not None for gradient in gradients.values())


@all_kinds
def test_bytes_go_where_they_save_most_or_the_same_to_each_layer(name: str) -> None:
    same = [sum(patched.splice.row_bytes) for _, patched in patched_sites(packed(name, allocation="layer"))]
    free = [sum(patched.splice.row_bytes) for _, patched in patched_sites(packed(name, allocation="global"))]
    assert max(same) - min(same) <= 8
    assert sum(free) <= sum(same) + 4


def test_layers_can_be_chosen() -> None:
    model = packed("llama", layers=(1,))
    assert [site.layer_idx for site, _ in patched_sites(model)] == [1]
    without, (within, _) = uncached(model, tokens()), step_by_step(model, tokens())
    torch.testing.assert_close(within, without, atol=1e-4, rtol=1e-4)


def test_a_cache_of_another_splice_or_without_one_is_refused() -> None:
    model, ids = packed("llama"), tokens(1, 12)
    with torch.no_grad():
        stock = cache_of(build_ordinary("llama")(ids, use_cache=True))
        with pytest.raises(CacheMismatchError, match="stored without the splice"):
            model(ids[:, :1], use_cache=True, **cache_argument(stock))
        coded = cache_of(packed("llama", bits=7)(ids, use_cache=True))
        with pytest.raises(CacheMismatchError, match="another splice"):
            model(ids[:, :1], use_cache=True, **cache_argument(coded))


@pytest.mark.parametrize("name", REFUSED_MODELS)
def test_models_whose_attention_cannot_be_reached_are_refused_by_name(name: str) -> None:
    model = build_ordinary(name)
    with pytest.raises(
        NotMLAError, match=rf"(?i)no attention layer that can be patched.* {name}\w*Attention: .*by itself"
    ):
        patch_model_with_kvsplice(model, bits=5, calibration=list(tokens(12, 48)))


def test_models_with_an_encoder_are_refused_by_name() -> None:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 64, "max_position_embeddings": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    config = AutoConfig.for_model("bart", **sizes, **heads, is_encoder_decoder=True)
    with pytest.raises(NotMLAError, match="encoder-decoder"):
        patch_model_with_kvsplice(AutoModelForSeq2SeqLM.from_config(config), bits=5)


def test_what_does_not_work_yet_says_so() -> None:
    model = build_ordinary("llama")
    known = calibrated(model)
    with pytest.raises(ConfigError, match=r"`compression_ratio` and `rank` are for layers that store a latent"):
        patch_model_with_kvsplice(model, compression_ratio=0.5)
    with pytest.raises(UnsupportedError, match='metric="readers"'):
        KVSpliceCalibrator(model, metric="readers")
    with pytest.raises(ConfigError, match=r"below the .* that are the least|smallest row takes"):
        patch_model_with_kvsplice(model, bytes_per_token=3, calibration=known)
    patch_model_with_kvsplice(model, KVSpliceConfig(bits=5, sink_tokens=SINKS), calibration=known)
    with pytest.raises(UnsupportedError, match="instead of pruning"):
        prune_kvsplice(model)


def test_statistics_of_another_model_are_refused() -> None:
    known = calibrated(build_ordinary("llama", head_dim=16))
    with pytest.raises(CalibrationError, match="of another model"):
        patch_model_with_kvsplice(build_ordinary("llama"), bits=5, calibration=known)


def test_an_attention_function_that_cannot_be_stood_in_for_is_named() -> None:
    model = build_ordinary("llama")
    known = calibrated(model)
    model.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(UnsupportedError, match="flex_attention.*sdpa"):
        patch_model_with_kvsplice(model, bits=5, calibration=known)


def test_eager_attention_returns_the_weights() -> None:
    model = build_ordinary("llama")
    model.set_attn_implementation("eager")
    patch_model_with_kvsplice(model, KVSpliceConfig(bits=5, sink_tokens=SINKS), calibration=calibrated(model))
    cache = KVSpliceCache(model)
    with torch.no_grad():
        model(tokens(1, 12), use_cache=True, **cache_argument(cache))
        output = model(tokens(1, 13)[:, 12:], use_cache=True, output_attentions=True, **cache_argument(cache))
    (first, *_) = output.attentions
    assert first.shape == (1, 4, 1, 13)
    torch.testing.assert_close(first.sum(-1), torch.ones(1, 4, 1))


class _Repeats(LlamaAttention):
    """Repeats keys before it hands them on, as older code did."""

    def forward(
        self, hidden_states: Any, position_embeddings: Any, attention_mask: Any, cache: Any = None, **kwargs: Any
    ) -> Any:
        cache = kwargs.get("past_key_values") if cache is None else cache  # its name in earlier releases
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (part(hidden_states).view(shape).transpose(1, 2) for part in projections)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        key, value = (repeat_kv(states, self.num_key_value_groups) for states in (key, value))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling)
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights


class _Forgets(_Repeats):
    """Comes to no attention function where it has a cache."""

    def forward(
        self, hidden_states: Any, position_embeddings: Any, attention_mask: Any, cache: Any = None, **kwargs: Any
    ) -> Any:
        if hidden_states is None:
            return cache.update, ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        return hidden_states, None


OTHER_WAYS = {
    "repeated keys, no cache": (_Repeats, False, "key heads to the attention function"),
    "repeated keys, cache": (_Repeats, True, "compressed keys and values"),
    "no attention function": (_Forgets, True, "without a call of the attention function"),
}


@pytest.mark.parametrize(("kind", "use_cache", "phrase"), OTHER_WAYS.values(), ids=OTHER_WAYS)
def test_a_module_that_goes_another_way_is_named_and_computes_nothing(kind: type, use_cache: bool, phrase: str) -> None:
    model = build_ordinary("llama")
    known = calibrated(model)
    for layer in model.model.layers:
        layer.self_attn.__class__ = kind
    patch_model_with_kvsplice(model, KVSpliceConfig(bits=5, sink_tokens=SINKS), calibration=known)
    with torch.no_grad(), pytest.raises(UpstreamChangedError, match=phrase):
        model(tokens(1, 8), use_cache=use_cache)


def test_what_attention_on_rows_does_not_know_is_left_to_the_stock_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias by position, say, which would be dropped without a word."""
    model = packed("llama")
    cache = cache_of(model(tokens(1, 12), use_cache=True))
    heads = importlib.import_module("kvsplice_hf.patch.heads")
    monkeypatch.setattr(heads, "decode_heads", lambda *args, **kwargs: pytest.fail("it was attended to rows"))
    seen: dict[str, Any] = {}

    def stock(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        seen.update(kwargs, keys=key.shape[2])
        return query.transpose(1, 2), None

    monkeypatch.setattr(heads, "attend_expanded", stock)
    with torch.no_grad():
        model(tokens(1, 1), use_cache=True, position_bias=torch.ones(1), **cache_argument(cache))
    assert seen["keys"] == 13
    assert torch.equal(seen["position_bias"], torch.ones(1))
