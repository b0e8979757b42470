"""GPT-2 with Multi-head Latent Attention: a transformers model like any other, and an MLA model like any other."""

import copy
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_contract_models import FP32_TOLERANCE, cached_logits, full_rank, no_cache_logits, rms
from test_packed import assert_same_but_for_flips, calibrated
from tiny_models import tiny_batch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    StaticCache,
)

from kvsplice_hf import (
    CalibrationError,
    ConfigError,
    KVSpliceCache,
    KVSpliceConfig,
    PatchStateError,
    cache_nbytes,
    get_kv_cache_size,
    load_kvsplice,
    patch_model_with_kvsplice,
    save_kvsplice,
    splice_disabled,
    unpatch_model,
    upstream,
)
from kvsplice_hf.cache.splicing import SplicedLayerMixin
from kvsplice_hf.gpt2_mla import (
    GPT2_MLA,
    GPT2_MLA_KV,
    GPT2MLAAttention,
    GPT2MLAConfig,
    GPT2MLAForCausalLM,
    GPT2MLAModel,
    MLA_Config,
    MLA_Flash,
)
from kvsplice_hf.patch.folding import read_weight
from kvsplice_hf.patch.sites import find_sites
from kvsplice_hf.training import KVSpliceTrainer, KVSpliceTrainingArguments, freeze_all_but_kvsplice
from kvsplice_hf.upstream import cache_argument


ROOT = Path(__file__).parent.parent
BASE: dict[str, Any] = {
    "vocab_size": 128,
    "n_positions": 64,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "kv_lora_rank": 32,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
HALF = {"compression_ratio": 0.5}
PLAIN: dict[str, dict[str, Any]] = {
    "shared latent": {},
    "separate latents": {"kv_latents": "separate"},
    "separate latents with an MLP": {"kv_latents": "separate_mlp"},
    "decoupled RoPE": {"qk_rope_head_dim": 8},
    "normalised latents": {"latent_norm": True, "q_lora_rank": 24},
    "heads of other sizes": {"qk_nope_head_dim": 20, "v_head_dim": 12},
    "MLP in a latent space": {"mlp_latent_dim": 16},
    "reciprocal MLP": {"reciprocal_mlp": 0.25, "mlp_latent_dim": 16},
    "reciprocal attention": {"queries_from_latent": True, "reciprocal_layers": "last:1"},
}
SPLICED: dict[str, dict[str, Any]] = {
    "splice": {"kvsplice": HALF},
    "splice with LayerNorm": {"kvsplice": HALF | {"use_layernorm": True}},
    "splice on the last layer": {"kvsplice": HALF, "kvsplice_layers": "last:1"},
    "splice with exact tokens": {"kvsplice": {"rank": 12, "sink_tokens": 2}},
    "splice, reciprocal attention, separate latents, RoPE": {
        "kvsplice": {"rank": 12, "sink_tokens": 2},
        "kv_latents": "separate",
        "qk_rope_head_dim": 8,
        "queries_from_latent": True,
        "reciprocal_layers": "all",
        "reciprocal_heads": 3,
        "reciprocal_weight": 0.4,
    },
    "splice, separate latents, RoPE": {"kvsplice": HALF, "kv_latents": "separate", "qk_rope_head_dim": 8},
}
VARIANTS = PLAIN | SPLICED

every_variant = pytest.mark.parametrize("variant", VARIANTS)
plain_variants = pytest.mark.parametrize("variant", PLAIN)
spliced_variants = pytest.mark.parametrize("variant", SPLICED)
both_attentions = pytest.mark.parametrize("attention", ["expanded", "absorbed"])


def config_of(variant: str, **settings: Any) -> GPT2MLAConfig:
    return GPT2MLAConfig(**(BASE | copy.deepcopy(VARIANTS[variant]) | settings))


@torch.no_grad()
def sharpen(model: PreTrainedModel) -> PreTrainedModel:
    """Attention that is selective and logits that hear of it; a splice that is no longer as it was initialised."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".kvsplice." in name or name.endswith("reciprocal.gate"):
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        elif parameter.ndim > 1 and (".attn." in name or "wte" in name):
            parameter.copy_(0.25 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def build(variant: str, **settings: Any) -> GPT2MLAForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return sharpen(GPT2MLAForCausalLM(config_of(variant, **settings)))


def assert_close(found: torch.Tensor, expected: torch.Tensor, atol: float = FP32_TOLERANCE) -> None:
    scale = max(1.0, expected.abs().max().item() / 8)  # the tolerance is for logits up to 8
    torch.testing.assert_close(found, expected, atol=atol * scale, rtol=0)


# --------------------------------------------------------------------------------------- a transformers model like any


@every_variant
def test_the_same_logits_come_without_a_cache_with_one_and_with_a_static_one(variant: str) -> None:
    model, batch = build(variant), tiny_batch(build(variant))
    expected = no_cache_logits(model, *batch)
    found, cache = cached_logits(model, *batch)
    assert_close(found, expected)
    static = StaticCache(config=model.config, max_cache_len=16)
    assert_close(cached_logits(model, *batch, cache=static)[0], expected)
    assert any(isinstance(layer, SplicedLayerMixin) for layer in cache.layers) == (variant in SPLICED)


@every_variant
def test_greedy_beams_and_a_static_cache_generate_what_no_cache_does(variant: str) -> None:
    model = build(variant)
    ids, mask = tiny_batch(model)

    def tokens(**settings: Any) -> torch.Tensor:
        return model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, **settings)

    greedy = tokens(use_cache=False)
    assert torch.equal(tokens(), greedy)
    assert torch.equal(tokens(cache_implementation="static", disable_compile=True), greedy)
    assert torch.equal(tokens(num_beams=3), tokens(num_beams=3, use_cache=False))


@every_variant
def test_a_saved_model_comes_back_the_same_through_the_auto_classes(variant: str, tmp_path: Path) -> None:
    model = build(variant)
    batch = tiny_batch(model)
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is GPT2MLAForCausalLM
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(no_cache_logits(loaded, *batch), no_cache_logits(model, *batch))
    assert torch.equal(cached_logits(loaded, *batch)[0], cached_logits(model, *batch)[0])
    bare = AutoModel.from_pretrained(tmp_path)
    assert type(bare) is GPT2MLAModel
    with torch.no_grad():
        assert torch.equal(bare(batch[0])[0], model.transformer(batch[0])[0])
    saved, found = model.config.to_dict(), loaded.config.to_dict()
    assert {name: found[name] for name in BASE | VARIANTS[variant]} == BASE | VARIANTS[variant]
    assert {name for name in saved if saved[name] != found[name]} <= {"_name_or_path"}


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")
@every_variant
def test_gradients_reach_every_parameter_and_checkpointing_does_not_change_them(variant: str) -> None:
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = build(variant, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        ids, mask = tiny_batch(model)
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    plain = gradients(checkpointing=False)
    assert not [name for name, gradient in plain.items() if gradient is None or gradient.abs().max() == 0]
    for name, gradient in gradients(checkpointing=True).items():
        torch.testing.assert_close(gradient, plain[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", ["shared latent", "splice with LayerNorm", "MLP in a latent space"])
def test_the_loss_falls_in_twenty_steps(variant: str) -> None:
    torch.manual_seed(0)
    model = GPT2MLAForCausalLM(config_of(variant)).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.arange(24).repeat(4, 2) + 8
    losses = []
    for _ in range(20):
        loss = model(ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(128), rel=0.05), "GPT-2's initialisation predicts nothing"
    assert losses[-1] < 0.7 * losses[0]


def test_embeddings_are_tied_unless_the_settings_say_otherwise(tmp_path: Path) -> None:
    tied, untied = build("shared latent"), build("shared latent", tie_word_embeddings=False)
    assert tied.lm_head.weight is tied.transformer.wte.weight
    assert untied.lm_head.weight is not untied.transformer.wte.weight
    tied.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert len(loaded.resize_token_embeddings(130).weight) == len(loaded.lm_head.weight) == 130


def test_the_initialisation_is_that_of_gpt2() -> None:
    torch.manual_seed(0)
    settings = {"n_embd": 256, "n_layer": 8, "n_head": 4, "kv_lora_rank": 128, "kvsplice": HALF}
    model = GPT2MLAForCausalLM(GPT2MLAConfig(**(BASE | settings), kv_latents="separate"))
    residual = 0.02 / math.sqrt(2 * 8)
    block = model.transformer.h[3]
    attention, splice = block.attn, block.attn.kvsplice
    for weight, std in (
        (attention.q_proj.weight, 0.02),
        (attention.kv_a_proj.weight, 0.02),
        (attention.kv_b_proj.key_weight, 0.02),
        (attention.kv_b_proj.value_weight, 0.02),
        (attention.o_proj.weight, residual),
        (block.mlp.c_fc.weight, 0.02),
        (block.mlp.c_proj.weight, residual),
        (model.transformer.wte.weight, 0.02),
        (model.transformer.wpe.weight, 0.02),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.05)
    torch.testing.assert_close(splice.compress.weight, splice.expand.weight.T)
    torch.testing.assert_close(splice.compress.weight @ splice.expand.weight, torch.eye(64), atol=1e-5, rtol=0)
    other = model.transformer.h[4].attn.kvsplice
    assert not torch.equal(splice.expand.weight, other.expand.weight), "each layer, and each seed, has its own"


@pytest.mark.parametrize("variant", ["shared latent", "decoupled RoPE", "splice with exact tokens"])
def test_eager_and_sdpa_give_the_same_logits(variant: str) -> None:
    eager, sdpa = build(variant, attn_implementation="eager"), build(variant, attn_implementation="sdpa")
    batch = tiny_batch(sdpa)
    assert_close(no_cache_logits(eager, *batch), no_cache_logits(sdpa, *batch))
    assert_close(cached_logits(eager, *batch)[0], cached_logits(sdpa, *batch)[0])


@pytest.mark.parametrize("variant", ["separate latents", "splice, separate latents, RoPE"])
def test_compiled_models_train_without_graph_breaks(variant: str) -> None:
    model = build(variant)
    ids, mask = tiny_batch(model)
    expected = model(ids, attention_mask=mask, labels=ids, use_cache=False).loss
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    found = compiled(ids, attention_mask=mask, labels=ids, use_cache=False).loss
    torch.testing.assert_close(found, expected)
    found.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_hidden_states_weights_and_chosen_logits_are_handed_out() -> None:
    model = build("shared latent", attn_implementation="eager")
    ids, _ = tiny_batch(model, pad=0)
    with torch.no_grad():
        output = model(ids, output_hidden_states=True, output_attentions=True)
        last = model(inputs_embeds=model.transformer.wte(ids), logits_to_keep=1).logits
        as_tuple = model(ids, return_dict=False)
    assert [tuple(states.shape) for states in output.hidden_states] == [(2, 12, 64)] * 3
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, 4, 12, 12)] * 2
    torch.testing.assert_close(last, output.logits[:, -1:])
    assert torch.equal(as_tuple[0], output.logits)
    with pytest.raises(ValueError, match="either"):
        model()


# ----------------------------------------------------------------------------------------------- an MLA model like any


@plain_variants
def test_its_layers_are_found_and_hold_the_sizes_of_the_settings(variant: str) -> None:
    model = build(variant)
    config = model.config
    for layer_idx, site in enumerate(find_sites(model)):
        heads = 4 + config.reciprocal_heads_of(layer_idx)  # one that attends twice counts twice
        assert (site.name, site.layer_idx, site.num_heads) == (f"transformer.h.{layer_idx}.attn", layer_idx, heads)
        assert (site.kv_lora_rank, site.qk_rope_head_dim) == (32, config.qk_rope_head_dim)
        assert (site.qk_nope_head_dim, site.v_head_dim) == (config.qk_nope_head_dim, config.v_head_dim)
        assert read_weight(site.module.kv_b_proj) is not None


@both_attentions
@plain_variants
def test_full_rank_gives_the_logits_of_the_unpatched_model_and_unpatching_restores_them(
    variant: str, attention: str
) -> None:
    model = build(variant)
    batch = tiny_batch(model)
    expected = no_cache_logits(model, *batch), cached_logits(model, *batch)[0]
    patch_model_with_kvsplice(model, full_rank(attention))
    assert_close(no_cache_logits(model, *batch), expected[0])
    assert_close(cached_logits(model, *batch)[0], expected[1])
    unpatch_model(model)
    assert torch.equal(no_cache_logits(model, *batch), expected[0])
    assert torch.equal(cached_logits(model, *batch)[0], expected[1])


@both_attentions
@plain_variants
def test_half_rank_gives_the_same_logits_with_and_without_a_cache(variant: str, attention: str) -> None:
    model = build(variant)
    batch = tiny_batch(model)
    stock = no_cache_logits(model, *batch)
    patch_model_with_kvsplice(model, KVSpliceConfig(compression_ratio=0.5, attention=attention, sink_tokens=3))
    spliced = no_cache_logits(model, *batch)
    assert rms(spliced - stock) > 0.1
    found, cache = cached_logits(model, *batch)
    assert_close(found, spliced)
    static = StaticCache(config=model.config, max_cache_len=16)
    assert_close(cached_logits(model, *batch, cache=static)[0], spliced)
    size = get_kv_cache_size(model, seq_len=12, batch_size=2)
    assert cache_nbytes(cache) == size.compressed_bytes < size.original_bytes


@pytest.mark.parametrize("metric", ["fisher", "readers"])
@pytest.mark.parametrize("variant", ["shared latent", "separate latents", "decoupled RoPE"])
def test_packed_rows_give_the_same_logits_with_and_without_a_cache(variant: str, metric: str) -> None:
    model = build(variant)
    batch = tiny_batch(model)
    stock = no_cache_logits(model, *batch)
    calibrator = calibrated(model, metric=metric)
    patch_model_with_kvsplice(model, KVSpliceConfig(bits=5.0, sink_tokens=2), calibration=calibrator)
    spliced = no_cache_logits(model, *batch)
    cached, cache = cached_logits(model, *batch)
    assert_same_but_for_flips(cached, spliced, spliced - stock)
    assert {layer.keys.dtype for layer in cache.layers} == {torch.uint8}
    assert torch.equal(no_cache_logits(unpatch_model(model), *batch), stock)


def test_calibration_begins_at_the_first_position_where_positions_are_learned() -> None:
    model = build("shared latent", n_positions=16)
    with torch.no_grad():
        model.transformer.wpe.weight[8:] = float("nan")
    ids = torch.randint(8, 128, (40, 8))
    patch_model_with_kvsplice(model, bits=5.0, calibration=ids)
    assert all(torch.isfinite(block.attn.kvsplice.compress.weight).all() for block in model.transformer.h)


def test_texts_for_calibration_are_cut_to_the_positions_that_the_model_has() -> None:
    from byte_tokenizer import byte_tokenizer

    model = build("shared latent", n_positions=16, vocab_size=300)
    text = "Nobody had told the miller that the river would rise so soon after the thaw. " * 8
    patch_model_with_kvsplice(model, bits=5.0, calibration=[text], tokenizer=byte_tokenizer())
    assert model.transformer.h[0].attn.kvsplice.codec is not None


@pytest.mark.parametrize("source", ["text that comes along", "text of its own"])
def test_automatic_calibration_keeps_to_the_positions_that_the_model_has(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from byte_tokenizer import byte_tokenizer

    from kvsplice_hf.calibration import auto

    monkeypatch.setenv("KVSPLICE_CACHE", str(tmp_path))
    monkeypatch.setattr(auto, "AUTO_TOKENS", 512)
    monkeypatch.setattr(auto, "OWN_TOKENS", 512)
    model = build("shared latent", n_positions=16, vocab_size=300)
    tokenizer = byte_tokenizer() if source == "text that comes along" else None
    patch_model_with_kvsplice(model, bits=5.0, calibration="auto", tokenizer=tokenizer)
    assert model.transformer.h[0].attn.kvsplice.codec is not None


@pytest.mark.parametrize("variant", ["separate latents", "separate latents with an MLP"])
def test_separate_latents_keep_keys_and_values_apart(variant: str) -> None:
    attention = build(variant).transformer.h[0].attn
    by_head = attention.kv_b_proj.weight.view(4, 32, 32)
    assert by_head[:, :16, 16:].abs().max() == by_head[:, 16:, :16].abs().max() == 0
    assert by_head[:, :16, :16].abs().min() > 0
    assert by_head[:, 16:, 16:].abs().min() > 0
    latent, k_rot = torch.randn(1, 1, 5, 32), torch.zeros(1, 1, 5, 0)
    key, value = attention.expand_kv(latent, k_rot)
    changed = torch.cat([latent[..., :16], torch.randn(1, 1, 5, 16)], dim=-1)
    other_key, other_value = attention.expand_kv(changed, k_rot)
    assert torch.equal(other_key, key)
    assert not torch.equal(other_value, value)
    shared = build("shared latent").transformer.h[0].attn
    assert sum(p.numel() for p in attention.kv_b_proj.parameters()) == shared.kv_b_proj.weight.numel() // 2


def test_an_mlp_in_a_latent_space_has_as_many_parameters_as_promised() -> None:
    mlp = build("MLP in a latent space").transformer.h[0].mlp
    assert sum(p.numel() for p in mlp.parameters()) == 64 * 16 + (16 * 64 + 64) + (64 * 16 + 16)


# ---------------------------------------------------------------------------------------------- the built-in splice


@spliced_variants
def test_a_built_in_splice_caches_codes_on_the_chosen_layers(variant: str) -> None:
    model = build(variant)
    batch = tiny_batch(model)
    _, cache = cached_logits(model, *batch)
    spliced = [isinstance(layer, SplicedLayerMixin) for layer in cache.layers]
    assert spliced == ([False, True] if "last" in variant else [True, True])
    assert cache_nbytes(cache) == get_kv_cache_size(model, seq_len=12, batch_size=2).compressed_bytes
    with splice_disabled(model):
        assert rms(no_cache_logits(model, *batch) - no_cache_logits(build(variant), *batch)) > 0.1


def test_a_built_in_splice_is_trained_with_the_model_and_goes_where_the_model_goes(tmp_path: Path) -> None:
    model = build("splice")
    batch = tiny_batch(model)
    expected = no_cache_logits(model, *batch)
    clone = copy.deepcopy(model)
    assert torch.equal(cached_logits(clone, *batch)[0], cached_logits(model, *batch)[0])
    save_kvsplice(model, tmp_path)
    other = GPT2MLAForCausalLM(config_of("splice")).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(no_cache_logits(other, *batch), expected)
    nn.init.zeros_(other.transformer.h[0].attn.kvsplice.compress.weight)
    assert torch.equal(no_cache_logits(load_kvsplice(other, tmp_path), *batch), expected)
    assert len(KVSpliceCache(model).layers) == 2
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half.transformer.h[0].attn.kvsplice.compress.weight.dtype == torch.bfloat16
    assert cached_logits(half, *batch)[0].isfinite().all()


def test_a_built_in_splice_can_be_tuned_alone(tmp_path: Path) -> None:
    model = freeze_all_but_kvsplice(build("splice"))
    before = model.state_dict()["transformer.h.0.attn.kvsplice.compress.weight"].clone()
    wte = model.transformer.wte.weight.detach().clone()
    arguments = KVSpliceTrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_strategy="no"
    )
    data = [{"input_ids": row, "labels": row} for row in tiny_batch(model, batch=4, pad=0)[0]]
    KVSpliceTrainer(model, arguments, train_dataset=data).train()
    assert not torch.equal(model.state_dict()["transformer.h.0.attn.kvsplice.compress.weight"], before)
    assert torch.equal(model.transformer.wte.weight, wte)


def test_a_model_built_from_the_settings_of_a_spliced_one_decodes_on_codes(caplog: pytest.LogCaptureFixture) -> None:
    first = build("splice")
    second = GPT2MLAForCausalLM(first.config).eval()
    third = GPT2MLAForCausalLM(copy.deepcopy(first.config)).eval()
    assert "only the expanded path" not in caplog.text
    for model in (second, third):
        assert model.config._attn_implementation == "kvsplice_sdpa"
        model.load_state_dict(first.state_dict())
        batch = tiny_batch(model)
        assert torch.equal(cached_logits(model, *batch)[0], cached_logits(first, *batch)[0])


def test_a_model_whose_built_in_splice_was_taken_off_is_not_saved_as_if_it_had_one(tmp_path: Path) -> None:
    model = build("splice")
    with pytest.raises(PatchStateError, match="already patched"):
        patch_model_with_kvsplice(model, rank=4)
    unpatch_model(model)
    with pytest.raises(ConfigError, match="taken off by unpatch_model"):
        model.save_pretrained(tmp_path)
    patch_model_with_kvsplice(model, KVSpliceConfig(rank=4))
    with pytest.raises(ConfigError, match="taken off by unpatch_model"):
        model.save_pretrained(tmp_path)
    unpatch_model(model).config.kvsplice = None
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys"))
    batch = tiny_batch(model)
    assert torch.equal(no_cache_logits(loaded, *batch), no_cache_logits(model, *batch))


@pytest.mark.skipif(upstream.ContinuousBatchingManager is None, reason="the paged cache is of another kind before 5.23")
def test_continuous_batching_generates_what_each_prompt_gives_alone() -> None:
    model = build("splice")
    prompts = [torch.randint(8, 128, (length,)).tolist() for length in (5, 11, 3)]
    settings = {"max_new_tokens": 5, "do_sample": False}
    outputs = model.generate_batch(
        prompts,
        generation_config=GenerationConfig(**settings, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=16, page_size=8, max_batch_tokens=32),
    )
    found = [output.generated_tokens for output in outputs.values()]
    assert found == [
        model.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist() for prompt in prompts
    ]


@torch.no_grad()
def test_caches_of_gpt2_124m_shapes_take_36_and_6_and_3_mebibytes_at_1024_tokens() -> None:
    # One of twelve layers, and a vocabulary and an MLP of no size, which caches know nothing of: half precision is slow
    # on a CPU.
    shapes = {"vocab_size": 16, "n_positions": 1024, "n_embd": 768, "n_layer": 1, "n_head": 12, "n_inner": 8}
    tokens = {"bos_token_id": None, "eos_token_id": None}
    models = (
        (GPT2LMHeadModel(GPT2Config(**shapes, **tokens)), 36.0),
        (GPT2MLAForCausalLM(GPT2MLAConfig(**shapes, **tokens, kv_lora_rank=256)), 6.0),
        (GPT2MLAForCausalLM(GPT2MLAConfig(**shapes, **tokens, kv_lora_rank=256, kvsplice=HALF)), 3.0),
    )
    ids = torch.zeros(1, 1024, dtype=torch.long)
    for model, mebibytes in models:
        cache = DynamicCache(config=model.config)
        model.half().eval()(ids, **cache_argument(cache), use_cache=True, logits_to_keep=1)
        assert cache.get_seq_length() == 1024
        assert 12 * cache_nbytes(cache) == mebibytes * 2**20


# ---------------------------------------------------------------------------------------------------------- from GPT-2


def gpt2(**settings: Any) -> GPT2LMHeadModel:
    """A random GPT-2 with biases and norms that are not as they were initialised."""
    names = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "bos_token_id", "eos_token_id")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(**({name: BASE[name] for name in names} | settings))).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    parameter += 0.3 * torch.randn_like(parameter)
                elif "c_attn" in name or "attn.c_proj" in name or "wte" in name:
                    nn.init.normal_(parameter, std=0.25)
    return model


@pytest.mark.parametrize("calibrate", [False, True])
@pytest.mark.parametrize("settings", [{}, {"scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False}])
def test_a_conversion_of_gpt2_at_full_rank_gives_its_logits(settings: dict[str, Any], calibrate: bool) -> None:
    source = gpt2(**settings)
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    batch = tiny_batch(source)
    calibration = {"input_ids": batch[0], "attention_mask": batch[1]}
    converted = GPT2MLAForCausalLM.from_gpt2(source, 64, calibration=[calibration] if calibrate else None)
    assert not converted.training
    assert_close(no_cache_logits(converted, *batch), no_cache_logits(source, *batch), atol=1e-4)
    assert_close(cached_logits(converted, *batch)[0], no_cache_logits(source, *batch), atol=1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in source.state_dict().items())
    assert not any(block.ln_1._forward_hooks for block in source.transformer.h)


def test_a_conversion_loses_more_the_fewer_numbers_it_keeps_and_less_where_it_has_seen_tokens() -> None:
    source = gpt2(n_layer=1)
    with torch.no_grad():  # hidden states that lie in few directions, which the weights know nothing of
        basis = torch.randn(6, 64)
        for table in (source.transformer.wte, source.transformer.wpe):
            table.weight.copy_(torch.randn(len(table.weight), 6) @ basis)
    batch = tiny_batch(source)
    expected = no_cache_logits(source, *batch)

    def loss(rank: int, calibration: Any = None) -> float:
        converted = GPT2MLAForCausalLM.from_gpt2(source, rank, calibration)
        return rms(no_cache_logits(converted, *batch) - expected)

    losses = [loss(rank) for rank in (8, 24, 48)]
    assert losses == sorted(losses, reverse=True)
    seen = torch.randint(8, 128, (16, 32), generator=torch.Generator().manual_seed(3))
    assert loss(8, seen) < 1e-3 < 0.1 * losses[0]


def test_a_converted_model_can_have_a_splice_built_in() -> None:
    converted = GPT2_MLA_KV.from_gpt2(gpt2(), 32)
    assert converted.config.kvsplice == HALF
    _, cache = cached_logits(converted, *tiny_batch(converted))
    assert all(isinstance(layer, SplicedLayerMixin) for layer in cache.layers)


def test_what_cannot_be_converted_is_named() -> None:
    with pytest.raises(ConfigError, match="from 1 to n_embd"):
        GPT2MLAForCausalLM.from_gpt2(gpt2(), 65)
    with pytest.raises(ConfigError, match="cross-attention"):
        GPT2MLAForCausalLM.from_gpt2(gpt2(add_cross_attention=True), 32)
    adapted = gpt2()
    adapted.transformer.h[0].attn.c_attn = torch.nn.Sequential(adapted.transformer.h[0].attn.c_attn)
    with pytest.raises(ConfigError, match="c_attn that is a Sequential .packed or adapted."):
        GPT2MLAForCausalLM.from_gpt2(adapted, 32)
    with pytest.raises(ConfigError, match="GPT2LMHeadModel"):
        GPT2MLAForCausalLM.from_gpt2(build("shared latent"), 32)
    with pytest.raises(CalibrationError, match="int64"):
        GPT2MLAForCausalLM.from_gpt2(gpt2(), 32, calibration=torch.randn(2, 8))


# ------------------------------------------------------------------------------------------------ settings and imports


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_head": 5}, "`n_embd` .64. is not divisible by `n_head` .5."),
        ({"n_layer": 0}, "`n_layer` is 0"),
        ({"n_embd": 64.0}, "`n_embd` is 64.0"),
        ({"v_head_dim": 0}, "`v_head_dim` is 0"),
        ({"kv_lora_rank": 0}, "`kv_lora_rank` is 0; it must be from 1 to 128"),
        ({"kv_lora_rank": 129}, "`kv_lora_rank` is 129; it must be from 1 to 128"),
        ({"kv_lora_rank": None}, "`kv_lora_rank` is None"),
        ({"kv_lora_rank": 31, "kv_latents": "separate"}, "it must be even"),
        ({"kv_latents": "both"}, "`kv_latents` is 'both'"),
        ({"q_lora_rank": 65}, "`q_lora_rank` is 65"),
        ({"mlp_latent_dim": 65}, "`mlp_latent_dim` is 65"),
        ({"qk_rope_head_dim": 7}, "rotated in pairs"),
        ({"qk_rope_head_dim": -2}, "rotated in pairs"),
        ({"rope_theta": 0.0}, "`rope_theta` is 0.0"),
        ({"kvsplice": 0.5}, "`kvsplice` is a float"),
        ({"kvsplice": {"ratio": 0.5}}, "Unknown KVSpliceConfig fields"),
        ({"kvsplice": {"compression_ratio": 1.5}}, "`compression_ratio` is 1.5"),
        ({"kvsplice": {"rank": 33}}, "kv_lora_rank 32"),
        ({"kvsplice": {}}, "needs `compression_ratio` or `rank`"),
        ({"kvsplice": {"bits": 4}}, "needs `compression_ratio` or `rank`"),
        ({"kvsplice": HALF | {"layers": "all"}}, "`kvsplice_layers`"),
        ({"kvsplice": HALF | {"init": "svd"}}, "orthogonal"),
        ({"kvsplice": HALF, "kvsplice_layers": "last:3"}, "only 2 layers"),
        ({"kvsplice": HALF, "kvsplice_layers": "first:1"}, "`layers` is 'first:1'"),
        ({"kvsplice": HALF, "kvsplice_layers": [1]}, "`kvsplice_layers` is"),
        ({"kvsplice": HALF, "kvsplice_layers": "fisher:1"}, "`kvsplice_layers` is 'fisher:1'; it must be"),
    ],
)
def test_settings_that_cannot_work_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GPT2MLAConfig(**(BASE | settings))


def test_settings_changed_afterwards_are_checked_when_the_model_is_built() -> None:
    config = config_of("shared latent")
    config.kv_lora_rank = 500
    with pytest.raises(ConfigError, match="`kv_lora_rank` is 500"):
        GPT2MLAForCausalLM(config)


def test_the_names_of_the_research_mean_the_same_models() -> None:
    assert (MLA_Config, MLA_Flash, GPT2_MLA) == (GPT2MLAConfig, GPT2MLAAttention, GPT2MLAForCausalLM)
    config = MLA_Config(d_model=96, n_heads=6, n_layers=3, d_latent=48, block_size=32, vocab_size=50)
    assert (config.n_embd, config.n_head, config.n_layer, config.kv_lora_rank, config.n_positions) == (96, 6, 3, 48, 32)
    assert (config.qk_nope_head_dim, config.v_head_dim) == (16, 16)
    assert config.to_diff_dict()["kv_lora_rank"] == 48


def test_gpt2_mla_kv_has_a_splice_unless_the_settings_have_one_already(tmp_path: Path) -> None:
    config = config_of("shared latent")
    model = sharpen(GPT2_MLA_KV(config))
    assert config.kvsplice is None, "the caller's settings are left alone"
    assert [block.attn.kvsplice.rank for block in model.transformer.h] == [16, 16]
    assert GPT2_MLA_KV(config_of("splice with exact tokens")).transformer.h[0].attn.kvsplice.rank == 12
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    batch = tiny_batch(model)
    assert torch.equal(cached_logits(loaded, *batch)[0], cached_logits(model, *batch)[0])


def test_only_importing_the_sub_package_registers_the_model() -> None:
    code = """
import kvsplice_hf
from transformers import AutoConfig, AutoModelForCausalLM
try:
    AutoConfig.for_model("gpt2_mla")
except ValueError:
    pass
else:
    raise SystemExit("importing kvsplice_hf registered gpt2_mla")
import kvsplice_hf.gpt2_mla as sub
config = AutoConfig.for_model("gpt2_mla", n_embd=32, n_head=2, n_layer=1, vocab_size=16, kv_lora_rank=8)
assert type(AutoModelForCausalLM.from_config(config)) is sub.GPT2MLAForCausalLM
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_exports_are_sorted_documented_and_exist() -> None:
    import kvsplice_hf.gpt2_mla as sub

    assert sub.__all__ == sorted(sub.__all__)
    assert all(len(getattr(sub, name).__doc__) > 30 for name in sub.__all__)
