"""The contract of every MLA architecture: exact at full rank, the same with and without a cache, bytes as promised."""

from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import TINY_MODELS, build, tiny_batch
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache

from kvsplice_hf import KVSpliceConfig, cache_nbytes, get_kv_cache_size, patch_model_with_kvsplice
from kvsplice_hf.cache.splicing import SplicedLayerMixin
from kvsplice_hf.upstream import cache_argument, cache_of


# Logits are up to 8 in absolute value.
FP32_TOLERANCE = 5e-5
# In bf16 the patched model may stray from the stock one by as much as bf16 itself makes the stock one stray from fp32
# (root mean square over all logits), and half as much again for the two more roundings of the code.
BF16_RMS_RATIO = 1.5
PREFILL = 4

all_architectures = pytest.mark.parametrize("name", TINY_MODELS)
both_attentions = pytest.mark.parametrize("attention", ["expanded", "absorbed"])


def batch_for(name: str, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    # In bf16 a sparse-attention model may select other tokens for the smallest difference, so it gets no more tokens
    # than it selects.
    return tiny_batch(name, length=8 if dtype != torch.float32 and TINY_MODELS[name].is_dsa else 12)


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """Positions as `generate` counts them, from the first real token."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
def no_cache_logits(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits at the real positions, [tokens, vocabulary]."""
    return model(ids, attention_mask=mask, position_ids=positions_of(mask), use_cache=False).logits[mask.bool()]


@torch.no_grad()
def cached_logits(
    model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, cache: Cache | None = None
) -> tuple[torch.Tensor, Cache]:
    """Logits at the real positions from a prefill of four tokens and single steps, and the cache."""
    positions, parts = positions_of(mask), []
    for start, end in [(0, PREFILL), *((end - 1, end) for end in range(PREFILL + 1, ids.shape[1] + 1))]:
        inputs = {"input_ids": ids[:, start:end], "position_ids": positions[:, start:end]}
        output = model(**inputs, attention_mask=mask[:, :end], **cache_argument(cache), use_cache=True)
        cache = cache_of(output)
        parts.append(output.logits)
    return torch.cat(parts, dim=1)[mask.bool()], cache


def full_rank(attention: str, init: str = "svd") -> KVSpliceConfig:
    return KVSpliceConfig(compression_ratio=1.0, attention=attention, sink_tokens=2, init=init)


def rms(tensor: torch.Tensor) -> float:
    return tensor.float().pow(2).mean().sqrt().item()


@both_attentions
@all_architectures
def test_full_rank_gives_the_stock_logits_in_fp32(name: str, attention: str) -> None:
    model, batch = build(name), batch_for(name)
    expected = no_cache_logits(model, *batch), cached_logits(model, *batch)[0]
    patch_model_with_kvsplice(model, full_rank(attention))
    torch.testing.assert_close(no_cache_logits(model, *batch), expected[0], atol=FP32_TOLERANCE, rtol=0)
    torch.testing.assert_close(cached_logits(model, *batch)[0], expected[1], atol=FP32_TOLERANCE, rtol=0)


@both_attentions
@all_architectures
def test_full_rank_stays_within_the_rounding_of_bf16(name: str, attention: str) -> None:
    batch = batch_for(name, torch.bfloat16)
    model = build(name, dtype=torch.bfloat16)
    expected = no_cache_logits(model, *batch), cached_logits(model, *batch)[0]
    allowed = BF16_RMS_RATIO * rms(expected[0].float() - no_cache_logits(build(name), *batch))
    patch_model_with_kvsplice(model, full_rank(attention))
    assert rms(no_cache_logits(model, *batch) - expected[0]) <= allowed
    assert rms(cached_logits(model, *batch)[0] - expected[1]) <= allowed


@both_attentions
@all_architectures
def test_half_rank_gives_the_same_logits_with_and_without_a_cache(name: str, attention: str) -> None:
    model, batch = build(name), batch_for(name)
    stock = no_cache_logits(model, *batch)
    patch_model_with_kvsplice(model, KVSpliceConfig(compression_ratio=0.5, attention=attention))
    spliced = no_cache_logits(model, *batch)
    assert rms(spliced - stock) > 0.1, "half the rank of a random model must cost something, or nothing is spliced"
    torch.testing.assert_close(cached_logits(model, *batch)[0], spliced, atol=FP32_TOLERANCE, rtol=0)


@all_architectures
def test_half_rank_gives_the_same_logits_with_a_static_cache(name: str) -> None:
    model, batch = build(name), batch_for(name)
    patch_model_with_kvsplice(model, KVSpliceConfig(compression_ratio=0.5, sink_tokens=3))
    cache = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=16)
    spliced, cache = cached_logits(model, *batch, cache=cache)
    torch.testing.assert_close(spliced, no_cache_logits(model, *batch), atol=FP32_TOLERANCE, rtol=0)
    assert all(isinstance(cache.layers[index], SplicedLayerMixin) for index in TINY_MODELS[name].mla_layers)


@all_architectures
def test_a_splice_with_transform_and_layernorm_gives_the_same_logits_with_and_without_a_cache(name: str) -> None:
    """The shift makes the constant that absorbed attention leaves out of the scores matter (sinks, exact tokens)."""
    model, batch = build(name), batch_for(name)
    config = KVSpliceConfig(compression_ratio=0.5, attention="absorbed", use_layernorm=True, sink_tokens=2)
    patch_model_with_kvsplice(model, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".kvsplice." in key:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    expected = no_cache_logits(model, *batch)
    scale = max(1.0, expected.abs().max().item() / 8)
    torch.testing.assert_close(cached_logits(model, *batch)[0], expected, atol=FP32_TOLERANCE * scale, rtol=0)


@all_architectures
def test_cache_bytes_are_those_of_the_formula(name: str) -> None:
    model, batch = build(name), batch_for(name)
    _, stock = cached_logits(model, *batch)
    patch_model_with_kvsplice(model, KVSpliceConfig(compression_ratio=0.5, sink_tokens=2))
    _, spliced = cached_logits(model, *batch)
    size = get_kv_cache_size(model, seq_len=batch[0].shape[1], batch_size=batch[0].shape[0])
    # Linear-attention states and vision parts are the same in both, and in no formula.
    other = cache_nbytes(stock) - size.original_bytes
    assert other >= 0
    assert (other > 0) == TINY_MODELS[name].is_hybrid
    assert cache_nbytes(spliced) - other == size.compressed_bytes


@all_architectures
def test_only_the_chosen_layers_are_spliced(name: str) -> None:
    model, batch = build(name), batch_for(name)
    tiny = TINY_MODELS[name]
    last = tiny.mla_layers[-1]
    patch_model_with_kvsplice(model, KVSpliceConfig(compression_ratio=0.5, layers="last:1"))
    cached, cache = cached_logits(model, *batch)
    spliced = [index for index, layer in enumerate(cache.layers) if isinstance(layer, SplicedLayerMixin)]
    assert spliced == [last]
    torch.testing.assert_close(cached, no_cache_logits(model, *batch), atol=FP32_TOLERANCE, rtol=0)


@all_architectures
def test_a_left_padded_row_gives_the_logits_it_gives_alone(name: str) -> None:
    if TINY_MODELS[name].is_hybrid:
        pytest.skip("stock linear-attention layers let padding change the last digits of their states")
    model, (ids, mask) = build(name), batch_for(name)
    patch_model_with_kvsplice(model, KVSpliceConfig(compression_ratio=0.5, sink_tokens=3))
    together, _ = cached_logits(model, ids, mask)
    pad = int((mask[1] == 0).sum())
    alone, _ = cached_logits(model, ids[1:, pad:], mask[1:, pad:])
    torch.testing.assert_close(together[mask[0].sum() :], alone, atol=2 * FP32_TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["deepseek_v3", "glm_moe_dsa"])
def test_attention_weights_of_eager_models_are_those_of_the_expanded_path(name: str) -> None:
    def weights(attention: str) -> tuple[torch.Tensor, ...]:
        model = build(name)
        model.set_attn_implementation("eager")
        config = KVSpliceConfig(compression_ratio=0.5, attention=attention, sink_tokens=2)
        patch_model_with_kvsplice(model, config)
        ids, mask = tiny_batch(name)
        with torch.no_grad():
            cache = cache_of(model(ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True))
            return model(ids[:, -1:], attention_mask=mask, **cache_argument(cache), output_attentions=True).attentions

    for absorbed, expanded in zip(weights("absorbed"), weights("expanded"), strict=True):
        torch.testing.assert_close(absorbed, expanded, atol=FP32_TOLERANCE, rtol=0)


def test_packed_sequences_each_keep_their_own_first_tokens() -> None:
    model = patch_model_with_kvsplice(build("deepseek_v3"), KVSpliceConfig(compression_ratio=0.5, sink_tokens=2))
    ids, _ = tiny_batch("deepseek_v3", batch=1, pad=0)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    with torch.no_grad():
        packed = model(ids, position_ids=positions, use_cache=False).logits[0]
        parts = [model(part, use_cache=False).logits[0] for part in (ids[:, :5], ids[:, 5:])]
    torch.testing.assert_close(packed, torch.cat(parts), atol=FP32_TOLERANCE, rtol=0)


def test_a_lazily_built_cache_is_spliced_in_place() -> None:
    model, batch = build("deepseek_v3"), batch_for("deepseek_v3")
    patch_model_with_kvsplice(model, compression_ratio=0.5)
    cache = DynamicCache()
    cached_logits(model, *batch, cache=cache)
    assert [type(layer).__name__ for layer in cache.layers] == ["SplicedDynamicLayer"] * len(cache.layers)
    assert cache.get_seq_length() == batch[0].shape[1]


def test_the_table_holds_every_mla_module_of_transformers() -> None:
    """Fails when transformers gains an architecture with latents, so that support for it is shown, not assumed."""
    folder = Path(transformers.__file__).parent / "models"
    found = {path.parent.name for path in folder.glob("*/modeling_*.py") if "def expand_kv(" in path.read_text("utf-8")}
    assert found <= set(TINY_MODELS), f"no tiny model for {sorted(found - set(TINY_MODELS))}"
    missing = {name for name, model in TINY_MODELS.items() if model.available} - found
    assert not missing, f"no MLA module any more in {sorted(missing)}"
