"""Continuous batching on codes: token for token what `generate` gives for each prompt alone."""

from typing import Any

import pytest
import torch
from ordinary_models import ORDINARY_MODELS, build_ordinary
from test_ordinary import calibration_of
from test_packed import calibrated
from tiny_models import FIRST_ORDINARY_TOKEN, PAD_TOKEN, TINY_MODELS, build
from transformers import GenerationConfig

from kvsplice_hf import (
    KVSpliceConfig,
    UnsupportedError,
    patch_model_with_kvsplice,
    splice_disabled,
    unpatch_model,
    upstream,
)
from kvsplice_hf.patch.state import patched_sites


if upstream.ContinuousBatchingManager is None:
    pytest.skip("the paged cache is of another kind before 5.23", allow_module_level=True)

from transformers import ContinuousBatchingConfig  # noqa: E402
from transformers.generation.continuous_batching.offloading_manager import OffloadingManager  # noqa: E402


NEW_TOKENS = 9
PAGE = 8
FULL_RANK = {"compression_ratio": 1.0, "init": "identity"}
PLAIN = [name for name, spec in TINY_MODELS.items() if not (spec.is_dsa or spec.is_hybrid or spec.is_sliding)]
OTHERS = [name for name in TINY_MODELS if name not in PLAIN]


# Grouped queries, one window, windows beside full attention with soft caps, with other rotations, with learned sinks,
# learned positions, layers without a rotation, a partial one.
ORDINARY = ["llama", "mistral", "gemma2", "gemma3_text", "gpt_oss", "gpt2", "smollm3", "glm4"]
# Which fail in stock transformers as well, and the error that says why.
NOT_HANDED_ON = {"nemotron": "`read_index`", "stablelm": "`read_index`"}


def endless(name: str) -> Any:
    model = build_ordinary(name)
    model.generation_config.eos_token_id = None
    return model


def ordinary(name: str, **settings: Any) -> Any:
    model = endless(name)
    config = KVSpliceConfig(bits=5.0, sink_tokens=2, **settings)
    return patch_model_with_kvsplice(model, config, calibration=calibration_of(name))


def half(name: str) -> Any:
    return ordinary(name) if name in ORDINARY_MODELS else spliced(name, compression_ratio=0.5)


def spliced(name: str, base: str = "sdpa", calibrate: bool = False, **settings: Any) -> Any:
    model = build(name)
    model.set_attn_implementation(base)
    config = KVSpliceConfig(sink_tokens=2, **settings)
    return patch_model_with_kvsplice(model, config, calibration=calibrated(model) if calibrate else None)


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(FIRST_ORDINARY_TOKEN, 128, (length,), generator=generator).tolist() for length in lengths]


# From one token up, shorter than the exact tokens, on both sides of a page's end, and over several pages.
PROMPTS = prompts(5, 1, 23, 8, 7, 9, 2)


def alone(model: Any, inputs: list[list[int]] = PROMPTS) -> list[list[int]]:
    """What `generate` gives for each prompt alone."""
    ids = [torch.tensor([prompt]) for prompt in inputs]
    outputs = [model.generate(i, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=PAD_TOKEN) for i in ids]
    return [output[0, i.shape[1] :].tolist() for i, output in zip(ids, outputs, strict=True)]


def scored_alone(model: Any) -> tuple[list[list[int]], torch.Tensor]:
    """What `generate` gives for each prompt alone, and the logarithms of the probabilities of these tokens."""
    tokens, found = [], []
    for prompt in PROMPTS:
        settings = {"return_dict_in_generate": True, "output_logits": True, "pad_token_id": PAD_TOKEN}
        output = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, **settings)
        new = output.sequences[:, len(prompt) :]
        tokens.append(new[0].tolist())
        found.append(torch.stack(output.logits, 1).log_softmax(-1).gather(2, new[..., None]).flatten())
    return tokens, torch.cat(found)


def scored_together(model: Any) -> tuple[list[list[int]], torch.Tensor]:
    """What `generate_batch` gives, and the logarithms of the probabilities of these tokens."""
    generation = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=PAD_TOKEN)
    config = ContinuousBatchingConfig(num_blocks=40, page_size=PAGE, max_batch_tokens=64, return_logprobs=True)
    outputs = model.generate_batch(PROMPTS, generation, config).values()
    return [output.generated_tokens for output in outputs], torch.tensor([p for o in outputs for p in o.logprobs])


def together(model: Any, inputs: list[list[int]] = PROMPTS, **settings: Any) -> list[list[int]]:
    """What `generate_batch` gives."""
    settings = {"num_blocks": 40, "page_size": PAGE, "max_batch_tokens": 64} | settings
    outputs = model.generate_batch(
        inputs,
        generation_config=GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=PAD_TOKEN),
        continuous_batching_config=ContinuousBatchingConfig(**settings),
    )
    assert [output.error for output in outputs.values()] == [None] * len(inputs)
    return [output.generated_tokens for output in outputs.values()]


@pytest.mark.parametrize("name", PLAIN)
def test_full_rank_generates_what_the_unpatched_model_generates(name: str) -> None:
    model = spliced(name, **FULL_RANK)
    batched = together(model)
    unpatch_model(model)
    assert batched == alone(model)


@pytest.mark.parametrize("base", ["sdpa", "eager"])
@pytest.mark.parametrize("attention", ["auto", "absorbed"])
@pytest.mark.parametrize(
    "settings",
    [{"compression_ratio": 0.5}, {"compression_ratio": 0.5, "use_layernorm": True}, {"bits": 5.0, "calibrate": True}],
    ids=["half", "layernorm", "packed"],
)
@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
def test_a_compressed_model_generates_what_it_generates_alone(
    name: str, settings: dict[str, Any], attention: str, base: str
) -> None:
    model = spliced(name, base, attention=attention, **settings)
    assert together(model) == alone(model)


@pytest.mark.parametrize(("name", "attention"), [*((name, "auto") for name in ORDINARY), ("llama", "expanded")])
def test_a_model_with_ordinary_attention_generates_what_it_generates_alone(name: str, attention: str) -> None:
    model = ordinary(name, attention=attention)
    (tokens, expected), (found, logprobs) = scored_alone(model), scored_together(model)
    assert found == tokens
    torch.testing.assert_close(logprobs, expected, atol=2e-4, rtol=0)
    unpatch_model(model)
    _, stock = scored_together(model)
    assert (stock - expected).abs().max() > 2e-3, "the splice changes too little, so that nothing was shown"


def test_the_first_tokens_are_exact_in_pages() -> None:
    """At bits at which they make the difference."""
    model = endless("llama")
    found = []
    for sinks in (0, 6):
        config = KVSpliceConfig(bits=2.5, sink_tokens=sinks)
        patch_model_with_kvsplice(model, config, calibration=calibration_of("llama"))
        found.append(scored_together(model)[1])
        torch.testing.assert_close(found[-1], scored_alone(model)[1], atol=2e-4, rtol=0)
        unpatch_model(model)
    assert (found[0] - found[1]).abs().max() > 2e-3


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("batch_tokens", [1, 3, 16])
def test_a_prompt_may_be_read_in_parts(batch_tokens: int, name: str) -> None:
    model = half(name)
    assert together(model, max_batch_tokens=batch_tokens) == alone(model)


@pytest.mark.parametrize("name", ["deepseek_v3", "gemma3_text"])
@pytest.mark.parametrize("scheduler", ["fifo", "prefill_first"])
def test_more_requests_than_the_cache_holds(scheduler: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    offloads: list[int] = []
    offload = OffloadingManager.offload_requests
    monkeypatch.setattr(OffloadingManager, "offload_requests", lambda self: offloads.append(1) or offload(self))
    model = half(name)
    assert together(model, num_blocks=4, scheduler_type=scheduler) == alone(model)
    assert offloads, "everything fitted"


@pytest.mark.parametrize("name", ["deepseek_v3", "llama", "mistral"])
def test_a_shared_prefix_brings_its_exact_tokens_along(name: str) -> None:
    model = ordinary(name) if name in ORDINARY_MODELS else spliced(name, compression_ratio=0.25)
    base = prompts(2 * PAGE)[0]
    inputs = [base + tail for tail in prompts(3, 1, 6)]
    expected = alone(model, inputs)
    manager_settings = {"num_blocks": 40, "page_size": PAGE, "max_batch_tokens": 64}
    generation = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=PAD_TOKEN)
    config = ContinuousBatchingConfig(**manager_settings)
    with model.continuous_batching_context_manager(generation, continuous_batching_config=config) as manager:
        for prompt, tokens in zip(inputs, expected, strict=True):
            request = manager.add_request(prompt)
            result = None
            while result is None:
                assert manager.is_running()
                result = manager.get_result(request, timeout=1)
            assert result.generated_tokens == tokens
        allocator = manager.batch_processor.cache.cache_allocators["full_attention"]
        assert allocator.match_prefix_blocks(base + [FIRST_ORDINARY_TOKEN]), "nothing was shared"


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss"])
def test_several_sequences_of_one_prompt_fork_the_pages(name: str) -> None:
    model = half(name)
    generation = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=PAD_TOKEN)
    generation.num_return_sequences = 3  # the constructor allows it with sampling only
    config = ContinuousBatchingConfig(num_blocks=40, page_size=PAGE, max_batch_tokens=64)
    outputs = model.generate_batch(PROMPTS, generation, config)
    expected = [tokens for tokens in alone(model) for _ in range(3)]
    assert [output.generated_tokens for output in outputs.values()] == expected


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("deepseek_v3", {"compression_ratio": 0.5}),
        ("deepseek_v3", {"bits": 4.0, "calibrate": True}),
        ("llama", {}),
        ("gpt2", {}),
    ],
)
def test_a_block_takes_the_bytes_of_its_rows(name: str, settings: dict[str, Any]) -> None:
    model = ordinary(name) if name in ORDINARY_MODELS else spliced(name, **settings)
    manager = model.init_continuous_batching(
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=8, page_size=256, max_batch_tokens=64)
    )
    sites = patched_sites(model)
    rows = sum(state.geometry.nbytes(torch.float32) for _, state in sites)
    exact = sum(2 * state.geometry.exact_dim * 4 for _, state in sites)
    allocator = manager._create_batch_processor().cache.cache_allocators["full_attention"]
    slack = 2 * len(sites) * 4 * 256
    assert 256 * rows + exact <= allocator.bytes_per_block < 256 * rows + exact + slack


def test_the_cache_may_be_sized_by_the_memory_there_is() -> None:
    model = spliced("deepseek_v3", compression_ratio=0.5)
    manager = model.init_continuous_batching(
        continuous_batching_config=ContinuousBatchingConfig(max_memory_percent=0.005, max_batch_tokens=64)
    )
    assert manager._create_batch_processor().cache.num_blocks > 8


def test_a_persistent_manager_serves_twice() -> None:
    model = spliced("deepseek_v3", compression_ratio=0.5)
    generation = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=PAD_TOKEN)
    config = ContinuousBatchingConfig(num_blocks=40, page_size=PAGE, max_batch_tokens=64)
    for _ in range(2):
        outputs = model.generate_batch(PROMPTS, generation, config, persistent_manager=True)
        assert [output.generated_tokens for output in outputs.values()] == alone(model)
    model.destroy_cached_continuous_batching_manager()


def test_generate_and_the_settings_are_as_before() -> None:
    model = spliced("deepseek_v3", compression_ratio=0.5)
    expected, eos = alone(model), model.generation_config.eos_token_id
    together(model)
    assert alone(model) == expected
    assert model.generation_config.eos_token_id == eos
    assert model.config._attn_implementation == "kvsplice_sdpa"


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_are_refused(name: str) -> None:
    model = spliced(name, "eager", compression_ratio=0.5)
    with pytest.raises(UnsupportedError, match="model.generate"):
        model.generate_batch(PROMPTS)


@pytest.mark.parametrize("name", NOT_HANDED_ON)
def test_pages_that_come_without_the_requests_are_refused(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(AssertionError):
        together(ordinary(name))
    errors = [record.exc_info[1] for record in caplog.records if record.exc_info]
    assert any(isinstance(error, UnsupportedError) and NOT_HANDED_ON[name] in str(error) for error in errors)


def test_chunked_attention_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="chunked layers"):
        ordinary("llama4_text").generate_batch(PROMPTS)


def test_what_cannot_be_taken_apart_by_request_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model = ordinary("llama")
    for layer in model.model.layers:  # a bias by position, say
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "position_bias": torch.ones(1)}), with_kwargs=True
        )
    with pytest.raises(AssertionError):
        together(model)
    errors = [record.exc_info[1] for record in caplog.records if record.exc_info]
    assert any(isinstance(error, UnsupportedError) and "`position_bias`" in str(error) for error in errors)


def test_layers_of_one_window_that_rotate_in_different_ways_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    model = ordinary("llama")
    module = model.model.layers[1].self_attn

    def turned(module: Any, args: Any, kwargs: Any) -> Any:
        cos, sin = kwargs["position_embeddings"]
        return args, {**kwargs, "position_embeddings": (sin, cos)}

    hooks = module._forward_pre_hooks
    module.register_forward_pre_hook(turned, with_kwargs=True)
    hooks.move_to_end(next(reversed(hooks)), last=False)  # before the one of the patch
    with pytest.raises(AssertionError):
        together(model)
    errors = [record.exc_info[1] for record in caplog.records if record.exc_info]
    assert any(isinstance(error, UnsupportedError) and "how a token is rotated" in str(error) for error in errors)


def test_what_cannot_be_served_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"layers \[0\]"):
        ordinary("llama", layers=(1,)).generate_batch(PROMPTS)
    model = spliced("deepseek_v3", compression_ratio=0.5, layers="last:1")
    with pytest.raises(UnsupportedError, match=r"layers \[0\]"):
        model.generate_batch(PROMPTS)
    model = spliced("deepseek_v3", compression_ratio=0.5, attention="expanded")
    with pytest.raises(UnsupportedError, match="attention="):
        model.generate_batch(PROMPTS)
    model = spliced("deepseek_v3", compression_ratio=0.5)
    with splice_disabled(model), pytest.raises(UnsupportedError, match="disabled"):
        model.generate_batch(PROMPTS)
    with pytest.raises(UnsupportedError, match="compilation"):
        model.generate_batch(PROMPTS, continuous_batching_config=ContinuousBatchingConfig(default_compile_level=1))
    model = patch_model_with_kvsplice(build("deepseek_v3"), KVSpliceConfig(compression_ratio=0.5, sink_tokens=9))
    with pytest.raises(UnsupportedError, match="page_size"):
        model.generate_batch(PROMPTS, continuous_batching_config=ContinuousBatchingConfig(page_size=PAGE))
