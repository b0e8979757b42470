"""What bad input gets: an error of a stated class, a message that says what to do, and the model as it was."""

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ordinary_models import build_ordinary
from tiny_models import TINY_MODELS, build, tiny_batch
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel, QuantizedCache, cache_utils

from kvsplice_hf import (
    CacheMismatchError,
    CheckpointError,
    ConfigError,
    FoldingError,
    KVSpliceCache,
    KVSpliceConfig,
    KVSpliceError,
    NotMLAError,
    PatchStateError,
    TransformersTooOldError,
    UnsupportedError,
    cache_nbytes,
    get_kv_cache_size,
    load_kvsplice,
    materialised_nbytes,
    patch_model_with_kvsplice,
    save_kvsplice,
    unpatch_model,
)
from kvsplice_hf.upstream import cache_argument, cache_of


NAME = "deepseek_v3"
Case = tuple[type[KVSpliceError], str, Callable[[], Any]]


def llama() -> PreTrainedModel:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))


def bloom() -> PreTrainedModel:
    return build_ordinary("bloom")


def with_attention_class(edit: Callable[[type], type]) -> PreTrainedModel:
    """A tiny model whose attention modules are of an edited class."""
    model = build(NAME)
    changed = edit(type(model.model.layers[0].self_attn))
    for layer in model.model.layers:
        layer.self_attn.__class__ = changed
    return model


def remote_code() -> PreTrainedModel:
    def edit(stock: type) -> type:
        members = {"__module__": "transformers_modules.deepseek.modeling_deepseek", "expand_kv": None}
        return type("DeepseekV3Attention", (stock,), members)

    return with_attention_class(edit)


def before_latents() -> PreTrainedModel:
    return with_attention_class(lambda stock: type("DeepseekV3Attention", (stock,), {"expand_kv": None}))


def caches_expanded_keys() -> PreTrainedModel:
    def forward(self: Any, kv_nope: Any, k_rot: Any, past_key_values: Any) -> Any:
        keys, values = self.expand_kv(kv_nope, k_rot)
        return past_key_values.update(keys, values, self.layer_idx)

    return with_attention_class(lambda stock: type("DeepseekV32Attention", (stock,), {"forward": forward}))


class PackedLinear(nn.Module):
    """A linear layer that keeps its weight in four-bit codes, and computes on its input in eight bits."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.step = weight.abs().max() / 7
        self.weight = nn.Parameter((weight / self.step).round().to(torch.int8), requires_grad=False)
        self.out_features = weight.shape[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = x.abs().amax(-1, keepdim=True).clamp_min(1e-9) / 127
        return nn.functional.linear((x / size).round() * size, (self.weight * self.step).to(x.dtype))


def packed() -> PreTrainedModel:
    model = build(NAME)
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj = PackedLinear(layer.self_attn.kv_b_proj.weight.detach())
    return model


def with_nan() -> PreTrainedModel:
    model = build(NAME)
    with torch.no_grad():
        model.model.layers[1].self_attn.kv_b_proj.weight[3, 3] = float("nan")
    return model


def on_meta() -> PreTrainedModel:
    with torch.device("meta"):
        return type(build(NAME))(build(NAME).config)


def with_flex_attention() -> PreTrainedModel:
    model = build(NAME)
    model.config._attn_implementation_internal = "flex_attention"
    return model


def two_decoders() -> nn.Module:
    return nn.ModuleDict({"first": build(NAME), "second": build(NAME)})


PATCH: dict[str, tuple[type[KVSpliceError], str, Callable[[], nn.Module], dict[str, Any]]] = {
    "attention out of reach": (NotMLAError, "Attention classes seen: .*BloomAttention", bloom, {}),
    "a rank for ordinary attention": (ConfigError, "ordinary attention. Give `bytes_per_token`", llama, {"rank": 5}),
    "not a model": (ConfigError, "`model` is a str", lambda: "deepseek-ai/DeepSeek-V2-Lite", {}),
    "remote code": (NotMLAError, "trust_remote_code=False", remote_code, {}),
    "transformers without latents": (TransformersTooOldError, r"Install transformers>=5\.15", before_latents, {}),
    "expands before it caches": (TransformersTooOldError, r"since 5\.18\.0", caches_expanded_keys, {}),
    "ratio 0": (ConfigError, r"in \(0, 1\]", lambda: build(NAME), {"compression_ratio": 0}),
    "ratio above 1": (ConfigError, r"`compression_ratio` is 1\.5", lambda: build(NAME), {"compression_ratio": 1.5}),
    "rank above R": (ConfigError, "kv_lora_rank 32. Give a rank of at most 32", lambda: build(NAME), {"rank": 33}),
    "rank 0": (ConfigError, "`rank` is 0", lambda: build(NAME), {"rank": 0}),
    "rank and ratio": (ConfigError, "one budget", lambda: build(NAME), {"rank": 3, "compression_ratio": 0.5}),
    "unknown layers": (ConfigError, '"all", "last:n"', lambda: build(NAME), {"layers": "first:2"}),
    "absent layer": (ConfigError, r"\[7\], which hold no latent", lambda: build(NAME), {"layers": [0, 7]}),
    "unknown layer pattern": (NotMLAError, r"model\.layers", lambda: build(NAME), {"layer_pattern": "transformer.h"}),
    "pattern without MLA": (NotMLAError, "under 'lm_head'", lambda: build(NAME), {"layer_pattern": "lm_head"}),
    "two decoders": (NotMLAError, "more than one decoder", two_decoders, {}),
    "config of another type": (ConfigError, "must be a KVSpliceConfig", lambda: build(NAME), {"config": {"rank": 4}}),
    "folding a packed projection": (
        FoldingError,
        "PackedLinear",
        packed,
        {"config": KVSpliceConfig(attention="absorbed")},
    ),
    "absorbed under flex attention": (
        UnsupportedError,
        "'flex_attention'.*sdpa",
        with_flex_attention,
        {"config": KVSpliceConfig(attention="absorbed")},
    ),
    "weights that are not finite": (ConfigError, "model.layers.1.self_attn holds values", with_nan, {}),
    "weights not loaded": (ConfigError, "meta device", on_meta, {}),
}


@pytest.mark.parametrize("case", PATCH)
def test_a_patch_that_cannot_be_made_raises_and_leaves_the_model_as_it_was(case: str) -> None:
    error, phrase, make, settings = PATCH[case]
    model = make()
    modules = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    before = {path: (set(vars(module)), set(module._modules)) for path, module in modules.items()}
    with pytest.raises(error, match=phrase):
        patch_model_with_kvsplice(model, **settings)
    assert {path: (set(vars(module)), set(module._modules)) for path, module in modules.items()} == before
    assert not any(module._forward_pre_hooks for module in modules.values())


def patched(**settings: Any) -> PreTrainedModel:
    return patch_model_with_kvsplice(build(NAME), **settings)


def run(model: PreTrainedModel, cache: Any) -> Any:
    ids, mask = tiny_batch(NAME, pad=0)
    length = cache.get_seq_length() if hasattr(cache, "get_seq_length") else 0
    with torch.no_grad():
        full = torch.cat([torch.ones(ids.shape[0], int(length), dtype=mask.dtype), mask], dim=1)
        return cache_of(model(ids, attention_mask=full, **cache_argument(cache), use_cache=True))


def with_foreign_cache() -> None:
    run(patched(), run(build(NAME), DynamicCache()))


def with_cache_of_another_splice() -> None:
    run(patched(rank=5), run(patched(rank=6), None))


def require_fp8_cache() -> None:
    if not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("this transformers has no quantised cache without further packages")


def with_quantised_cache() -> None:
    require_fp8_cache()
    model = patched()
    run(model, QuantizedCache(backend="fp8", config=model.config))


def generate_with_quantised_cache() -> None:
    require_fp8_cache()
    generate(cache_implementation="quantized", cache_config={"backend": "fp8"})


def generate(**settings: Any) -> None:
    ids, mask = tiny_batch(NAME)
    patched().generate(ids, attention_mask=mask, max_new_tokens=2, **settings)


def expand_elsewhere() -> None:
    """An attention module that caches expanded keys after all, found out at the first update."""
    model = patched()
    KVSpliceCache(model).update(torch.zeros(1, 4, 3, 24), torch.zeros(1, 4, 3, 16), 0)


def wrap_projection_after_the_patch() -> None:
    model = patched(config=KVSpliceConfig(attention="absorbed"))
    layer = model.model.layers[0].self_attn
    layer.kv_b_proj = PackedLinear(layer.kv_b_proj.weight.detach())
    run(model, None)


def change_attention_after_the_patch() -> None:
    model = patched(config=KVSpliceConfig(attention="absorbed"))
    model.set_attn_implementation("eager")
    run(model, None)


USE: dict[str, Case] = {
    "a cache filled without the splice": (CacheMismatchError, "already holds 12 tokens", with_foreign_cache),
    "a cache filled with another splice": (CacheMismatchError, "another splice", with_cache_of_another_splice),
    "a quantised cache": (CacheMismatchError, "Fp8QuantizedLayer", with_quantised_cache),
    "cache_implementation='quantized'": (
        CacheMismatchError,
        "leave `cache_implementation` unset",
        generate_with_quantised_cache,
    ),
    "a cache that is no Cache": (CacheMismatchError, "of type list", lambda: run_attention_with_list()),
    "generate_batch": (
        UnsupportedError,
        "model.generate",
        lambda: patched(layers="last:1").generate_batch([[1, 2, 3]]),
    ),
    "expanded keys in a spliced layer": (CacheMismatchError, r"\(4, 24\).*needs latents", expand_elsewhere),
    "a packed projection after an absorbed patch": (
        FoldingError,
        r"layers\.0\.self_attn.*PackedLinear: .* off\): its activations",
        wrap_projection_after_the_patch,
    ),
    "another attention after an absorbed patch": (UnsupportedError, "patch again", change_attention_after_the_patch),
    "a cache for an unpatched model": (PatchStateError, "not patched", lambda: KVSpliceCache(build(NAME))),
    "saving an unpatched model": (
        PatchStateError,
        "patch_model_with_kvsplice",
        lambda: save_kvsplice(build(NAME), "x"),
    ),
    "unpatching an unpatched model": (PatchStateError, "nothing to .*undo", lambda: unpatch_model(build(NAME))),
    "saving where a file is": (CheckpointError, "is a file. Give the name of a folder", lambda: save_on_a_file("")),
    "saving below a file": (CheckpointError, "is a file. Give the name of a folder", lambda: save_on_a_file("x/y")),
    "loading into a model without latents": (KVSpliceError, "No saved splice", lambda: load_kvsplice(llama(), "x")),
    "cache size of attention out of reach": (NotMLAError, "BloomAttention", lambda: get_kv_cache_size(bloom())),
}


def save_on_a_file(below: str) -> None:
    model = patched(rank=5)
    with tempfile.NamedTemporaryFile() as file:
        save_kvsplice(model, Path(file.name) / below)


def run_attention_with_list() -> None:
    model = patched()
    model.model.layers[0].self_attn(hidden_states=torch.zeros(1, 3, 64), attention_mask=None, **cache_argument([]))


@pytest.mark.parametrize("name", ["axk2", "deepseek_v32", "glm_moe_dsa", "hy_v4"])
def test_a_release_that_caches_expanded_keys_for_the_architecture_is_refused(name: str) -> None:
    if not TINY_MODELS[name].available or TINY_MODELS[name].caches_latents:
        pytest.skip("only releases before 5.18 expand the keys of sparse-attention models before they cache them")
    with pytest.raises(TransformersTooOldError, match=r"Install transformers>=5\.18"):
        patch_model_with_kvsplice(build(name, needs_latent_cache=False))


@pytest.mark.parametrize("case", USE)
def test_a_call_that_cannot_work_raises_and_says_what_to_do(case: str) -> None:
    error, phrase, call = USE[case]
    with pytest.raises(error, match=phrase):
        call()


def test_a_packed_projection_runs_expanded_and_gives_the_same_with_and_without_a_cache() -> None:
    model = patch_model_with_kvsplice(packed(), compression_ratio=0.5)
    ids, mask = tiny_batch(NAME)
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, use_cache=False).logits[:, -1]
        cache = cache_of(model(ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True))
        last = model(ids[:, -1:], attention_mask=mask, **cache_argument(cache)).logits[:, -1]
    torch.testing.assert_close(last, whole, atol=2e-5, rtol=0)
    assert materialised_nbytes(model) == 0


def test_a_failed_call_leaves_the_foreign_cache_as_it_was() -> None:
    cache = run(build(NAME), DynamicCache())
    before = copy.deepcopy(cache)
    with pytest.raises(CacheMismatchError):
        run(patched(), cache)
    assert cache_nbytes(cache) == cache_nbytes(before)
    assert [type(layer) for layer in cache.layers] == [type(layer) for layer in before.layers]
