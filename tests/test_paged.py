"""Continuous batching on codes: token for token what `generate` gives for each prompt alone."""

from typing import Any

import pytest
import torch
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


@pytest.mark.parametrize("batch_tokens", [1, 3, 16])
def test_a_prompt_may_be_read_in_parts(batch_tokens: int) -> None:
    model = spliced("deepseek_v3", compression_ratio=0.5)
    assert together(model, max_batch_tokens=batch_tokens) == alone(model)


@pytest.mark.parametrize("scheduler", ["fifo", "prefill_first"])
def test_more_requests_than_the_cache_holds(scheduler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    offloads: list[int] = []
    offload = OffloadingManager.offload_requests
    monkeypatch.setattr(OffloadingManager, "offload_requests", lambda self: offloads.append(1) or offload(self))
    model = spliced("deepseek_v3", compression_ratio=0.5)
    assert together(model, num_blocks=4, scheduler_type=scheduler) == alone(model)
    assert offloads, "everything fitted"


def test_a_shared_prefix_brings_its_exact_tokens_along() -> None:
    model, base = spliced("deepseek_v3", compression_ratio=0.25), prompts(2 * PAGE)[0]
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


def test_several_sequences_of_one_prompt_fork_the_pages() -> None:
    model = spliced("deepseek_v3", compression_ratio=0.5)
    generation = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=PAD_TOKEN)
    generation.num_return_sequences = 3  # the constructor allows it with sampling only
    config = ContinuousBatchingConfig(num_blocks=40, page_size=PAGE, max_batch_tokens=64)
    outputs = model.generate_batch(PROMPTS, generation, config)
    expected = [tokens for tokens in alone(model) for _ in range(3)]
    assert [output.generated_tokens for output in outputs.values()] == expected


@pytest.mark.parametrize("settings", [{"compression_ratio": 0.5}, {"bits": 4.0, "calibrate": True}])
def test_a_block_takes_the_bytes_of_its_rows(settings: dict[str, Any]) -> None:
    model = spliced("deepseek_v3", **settings)
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


def test_what_cannot_be_served_is_refused() -> None:
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
