"""A patched model can be copied, saved, moved, cast, trained, compiled and offloaded, and unpatched without a trace."""

import copy
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from test_packed import calibrated
from tiny_models import TINY_MODELS, build, tiny_batch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from kvsplice_hf import (
    CacheMismatchError,
    KVSpliceCache,
    KVSpliceConfig,
    PatchStateError,
    patch_model_with_kvsplice,
    splice_disabled,
    unpatch_model,
)
from kvsplice_hf.upstream import cache_argument, cache_of


NAME = "deepseek_v3"
HALF_RANK = KVSpliceConfig(compression_ratio=0.5, sink_tokens=2)
TOLERANCE = 2e-5


def logits(model: PreTrainedModel, use_cache: bool = False, name: str = NAME) -> torch.Tensor:
    """Logits at the real positions of the tiny batch; with a cache, the second half is decoded token by token."""
    ids, mask = tiny_batch(name)
    with torch.no_grad():
        if not use_cache:
            return model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        half = ids.shape[1] // 2
        output = model(ids[:, :half], attention_mask=mask[:, :half], use_cache=True)
        parts = [output.logits]
        for end in range(half + 1, ids.shape[1] + 1):
            output = model(ids[:, end - 1 : end], attention_mask=mask[:, :end], **cache_argument(cache_of(output)))
            parts.append(output.logits)
    return torch.cat(parts, dim=1)[mask.bool()]


def reloaded(model: PreTrainedModel) -> PreTrainedModel:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_unpatching_restores_logits_and_attributes_bit_exactly(name: str) -> None:
    model = build(name)
    expected = logits(model, name=name), logits(model, use_cache=True, name=name)
    before = {path: set(vars(module)) | set(module._modules) for path, module in model.named_modules()}
    keys, attention = list(model.state_dict()), model.config.get_text_config()._attn_implementation
    patch_model_with_kvsplice(model, HALF_RANK)
    assert not torch.equal(logits(model, name=name), expected[0])
    unpatch_model(model)
    assert torch.equal(logits(model, name=name), expected[0])
    assert torch.equal(logits(model, use_cache=True, name=name), expected[1])
    assert {path: set(vars(module)) | set(module._modules) for path, module in model.named_modules()} == before
    assert list(model.state_dict()) == keys
    assert model.config.get_text_config()._attn_implementation == attention
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("copied", [copy.deepcopy, reloaded], ids=["deepcopy", "torch.save"])
def test_a_copy_is_patched_by_itself(copied: Callable[[PreTrainedModel], PreTrainedModel]) -> None:
    model = patch_model_with_kvsplice(build(NAME), HALF_RANK)
    expected = logits(model), logits(model, use_cache=True)
    clone = copied(model)
    assert torch.equal(logits(clone), expected[0])
    with torch.no_grad():
        clone.model.layers[0].self_attn.kvsplice.transform_shift += 1.0
    assert not torch.equal(logits(clone), expected[0]), "the copy must read its own splice"
    assert torch.equal(logits(model), expected[0])
    assert torch.equal(logits(model, use_cache=True), expected[1])
    assert torch.equal(logits(unpatch_model(clone)), logits(build(NAME)))
    assert torch.equal(logits(model), expected[0]), "unpatching the copy must leave the original patched"


@pytest.mark.parametrize("attention", ["absorbed", "expanded"])
def test_a_changed_parameter_is_seen_by_the_next_call(attention: str) -> None:
    model = patch_model_with_kvsplice(build(NAME), KVSpliceConfig(compression_ratio=0.5, attention=attention))
    logits(model, use_cache=True)
    with torch.no_grad():
        attn = model.model.layers[1].self_attn
        for tensor in (attn.kvsplice.expand.weight, attn.kvsplice.transform_scale, attn.kv_b_proj.weight):
            tensor.mul_(1.1)
            torch.testing.assert_close(logits(model, use_cache=True), logits(model), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casting_takes_the_splice_along(dtype: torch.dtype) -> None:
    model = patch_model_with_kvsplice(build(NAME), HALF_RANK).to(dtype)
    splice = model.model.layers[0].self_attn.kvsplice
    assert {parameter.dtype for parameter in splice.parameters()} == {dtype}
    assert logits(model).isfinite().all()
    assert logits(model, use_cache=True).isfinite().all()


def test_a_splice_may_stay_in_fp32_while_the_model_is_bf16() -> None:
    model = patch_model_with_kvsplice(build(NAME, dtype=torch.bfloat16), HALF_RANK)
    expected = logits(model).float()
    for layer in model.model.layers:
        layer.self_attn.kvsplice.float()
    assert (logits(model).float() - expected).abs().mean() < 0.1
    assert logits(model, use_cache=True).isfinite().all()


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("name", ["deepseek_v3", "mistral_large4"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_gradients_reach_every_splice_and_checkpointing_does_not_change_them(name: str, use_cache: bool) -> None:
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = patch_model_with_kvsplice(build(name), HALF_RANK).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        ids, mask = tiny_batch(name)
        other_ids, other_mask = tiny_batch(name, seed=1, pad=1)
        # Two forwards before the backward: a recomputed forward must not see the mask of the other one.
        loss = model(ids, attention_mask=mask, labels=ids, use_cache=use_cache and not checkpointing).loss
        loss = loss + model(other_ids, attention_mask=other_mask, labels=other_ids, use_cache=False).loss
        loss.backward()
        return {key: p.grad for key, p in model.named_parameters() if ".kvsplice." in key}

    plain = gradients(checkpointing=False)
    assert plain
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in plain.values())
    for key, gradient in gradients(checkpointing=True).items():
        torch.testing.assert_close(gradient, plain[key], atol=1e-5, rtol=1e-4)


@pytest.mark.compiles
@pytest.mark.parametrize("attention", ["auto", "absorbed"])
def test_compiled_models_trace_without_graph_breaks(attention: str) -> None:
    model = patch_model_with_kvsplice(build(NAME), KVSpliceConfig(rank=9, attention=attention, sink_tokens=2))
    expected = logits(model), logits(model, use_cache=True)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), expected[0], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(logits(compiled, use_cache=True), expected[1], atol=TOLERANCE, rtol=0)


@pytest.mark.compiles
def test_compiled_models_with_keys_before_their_rotation_trace_without_graph_breaks() -> None:
    config = KVSpliceConfig(bits=4.0, sink_tokens=2)
    model = patch_model_with_kvsplice(build(NAME), config, calibration=calibrated(build(NAME)))
    expected = logits(model, use_cache=True)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled, use_cache=True), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("attention", ["auto", "absorbed", "expanded"])
@pytest.mark.parametrize("patch_first", [True, False])
def test_weights_offloaded_by_accelerate_give_the_same_logits(patch_first: bool, attention: str) -> None:
    config = KVSpliceConfig(rank=9, attention=attention)
    expected_model = patch_model_with_kvsplice(build(NAME), config)
    expected = logits(expected_model), logits(expected_model, use_cache=True)
    model = build(NAME)
    if patch_first:
        patch_model_with_kvsplice(model, config)
    cpu_offload(model, execution_device=torch.device("cpu"))
    if not patch_first:
        patch_model_with_kvsplice(model, config)
    assert model.model.layers[0].self_attn.kv_b_proj.weight.device.type == "meta"
    assert torch.equal(logits(model), expected[0])
    assert torch.equal(logits(model, use_cache=True), expected[1])


def test_weights_on_disk_dispatched_by_a_device_map_give_the_same_logits(tmp_path: Path) -> None:
    model = patch_model_with_kvsplice(build(NAME), HALF_RANK)
    expected = logits(model), logits(model, use_cache=True)
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    device_map |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = dispatch_model(model, device_map, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert torch.equal(logits(model), expected[0])
    assert torch.equal(logits(model, use_cache=True), expected[1])


def test_save_pretrained_writes_the_base_model_only(tmp_path: Path) -> None:
    model = patch_model_with_kvsplice(build(NAME), HALF_RANK)
    model.save_pretrained(tmp_path)
    plain, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(plain), logits(build(NAME)))


def test_an_attention_function_set_after_the_patch_is_used_and_kept() -> None:
    model = patch_model_with_kvsplice(build(NAME), HALF_RANK)
    expected = logits(model), logits(model, use_cache=True)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(logits(model), expected[0], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(logits(model, use_cache=True), expected[1], atol=TOLERANCE, rtol=0)
    assert unpatch_model(model).config._attn_implementation == "eager"


def test_models_built_from_one_config_object_are_patched_one_by_one() -> None:
    first = build(NAME)
    second = type(first)(first.config).eval()
    second.load_state_dict(first.state_dict())
    expected = logits(second), logits(second, use_cache=True)
    patch_model_with_kvsplice(first, HALF_RANK)
    assert torch.equal(logits(second), expected[0])
    assert torch.equal(logits(second, use_cache=True), expected[1])


@pytest.mark.parametrize("name", ["deepseek_v3", "mistral_large4"])
def test_a_disabled_splice_gives_the_stock_logits_bit_exactly(name: str) -> None:
    model = build(name)
    expected = logits(model, name=name), logits(model, use_cache=True, name=name)
    patch_model_with_kvsplice(model, HALF_RANK)
    spliced = logits(model, use_cache=True, name=name)
    with splice_disabled(model):
        assert torch.equal(logits(model, name=name), expected[0])
        assert torch.equal(logits(model, use_cache=True, name=name), expected[1])
    assert torch.equal(logits(model, use_cache=True, name=name), spliced)


def test_a_spliced_cache_cannot_be_continued_with_the_splice_disabled() -> None:
    model = patch_model_with_kvsplice(build(NAME), HALF_RANK)
    ids, _ = tiny_batch(NAME, pad=0)
    cache = cache_of(model(ids, use_cache=True))
    with splice_disabled(model), pytest.raises(CacheMismatchError, match="spliced"):
        model(ids[:, :1], **cache_argument(cache))


@pytest.mark.parametrize("init", ["svd", "orthogonal", "identity"])
def test_patching_leaves_the_random_state_alone(init: str) -> None:
    model = build(NAME)
    before = torch.get_rng_state()
    patch_model_with_kvsplice(model, KVSpliceConfig(rank=5, init=init))
    assert torch.equal(torch.get_rng_state(), before)


def test_patching_a_patched_model_and_unpatching_an_unpatched_one_raise() -> None:
    model = patch_model_with_kvsplice(build(NAME))
    with pytest.raises(PatchStateError, match="already patched"):
        patch_model_with_kvsplice(model, compression_ratio=0.5)
    unpatch_model(model)
    with pytest.raises(PatchStateError, match="not patched"):
        unpatch_model(model)


def test_layers_in_another_place_are_patched_by_their_pattern() -> None:
    inner = build(NAME)
    model = nn.Module()
    model.transformer, model.other = nn.Module(), build(NAME)
    model.transformer.h = inner.model.layers
    expected = logits(inner), logits(model.other)
    patch_model_with_kvsplice(model, rank=5, layer_pattern="transformer.h")
    assert not torch.equal(logits(inner), expected[0])
    assert torch.equal(logits(model.other), expected[1])
    assert len(KVSpliceCache(model).layers) == len(inner.model.layers)
    unpatch_model(model)
    assert torch.equal(logits(inner), expected[0])


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_a_lora_adapter_on_the_expanding_projection_is_heeded() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = patch_model_with_kvsplice(build(NAME), KVSpliceConfig(compression_ratio=1.0, sink_tokens=0))
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["kv_b_proj"], init_lora_weights=False))
    torch.testing.assert_close(logits(tuned, use_cache=True), logits(tuned), atol=TOLERANCE, rtol=0)
    assert not torch.allclose(logits(tuned), logits(build(NAME)), atol=1e-2)
    assert unpatch_model(tuned) is tuned
