"""Models of images and text: the text part is patched, the vision tower is left alone, and an image changes nothing.

On ordinary attention, and on latents. What calibration makes of images: `test_calibration_images.py`.
"""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from multimodal_models import ALL_MODELS, LATENT_MODELS, build_with_images, placeholder_of, with_image
from ordinary_models import MULTIMODAL_MODELS
from packaging.version import Version
from test_ordinary import SINKS, rms, tokens
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageTextToText

from kvsplice_hf import (
    KVSpliceCache,
    KVSpliceCalibrator,
    KVSpliceConfig,
    cache_nbytes,
    get_kv_cache_size,
    load_kvsplice,
    patch_model_with_kvsplice,
    save_kvsplice,
    unpatch_model,
)
from kvsplice_hf.patch.state import patched_sites
from kvsplice_hf.upstream import cache_argument, cache_of


all_models = pytest.mark.parametrize("name", ALL_MODELS)
on_latents = pytest.mark.parametrize("name", LATENT_MODELS)
PROMPT = 12
# Whose layers 1 and 3 attend to the image.
MLLAMA: dict[str, Any] = {
    "text_config": {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "cross_attention_layers": [1, 3],
    },
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_global_layers": 1,
        "attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        "max_num_tiles": 1,
        "vision_output_dim": 32,
        "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [[1, 1]],
    },
    "image_token_index": 3,
}


@functools.cache
def calibration_of(name: str) -> KVSpliceCalibrator:
    calibrator = KVSpliceCalibrator(build_with_images(name), sink_tokens=SINKS)
    return calibrator.collect(list(prompt(12, 48)), progress=False)


def packed(name: str, bits: float = 5.0) -> Any:
    config = KVSpliceConfig(bits=bits, sink_tokens=SINKS)
    return patch_model_with_kvsplice(build_with_images(name), config, calibration=calibration_of(name))


def exact(name: str) -> Any:
    """A patched model that loses nothing: all of the rank of latents, or 16 bits for each number of keys and values."""
    if name not in LATENT_MODELS:
        return packed(name, bits=16.5)
    return patch_model_with_kvsplice(build_with_images(name), KVSpliceConfig(compression_ratio=1.0, sink_tokens=SINKS))


def prompt(count: int = 2, length: int = 20) -> torch.Tensor:
    ids = tokens(count, length)
    return torch.where(ids < 10, ids + 10, ids)  # ids of images and their ends aside


@torch.no_grad()
def uncached(name: str, model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(**with_image(name, model, ids), use_cache=False).logits


@torch.no_grad()
def step_by_step(name: str, model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a prompt with an image, and of single tokens of text behind it."""
    output = model(**with_image(name, model, ids[:, :PROMPT]), use_cache=True)
    cache, logits = cache_of(output), [output.logits]
    for place in range(PROMPT, ids.shape[1]):
        logits.append(model(ids[:, place : place + 1], use_cache=True, **cache_argument(cache)).logits)
    return torch.cat(logits, dim=1)


@all_models
def test_an_image_is_seen_and_the_text_part_alone_is_patched(name: str) -> None:
    model = packed(name)
    inputs = with_image(name, model, prompt())
    assert (inputs["input_ids"] == placeholder_of(name)).any()
    names = [site.name for site, _ in patched_sites(model)]
    assert len(names) > 1
    assert all(".language_model." in name for name in names)
    vision = [module for path, module in model.named_modules() if "visual" in path or "vision" in path]
    assert len(vision) > 5
    assert not [module for module in vision if any("kvsplice" in key for key in vars(module)) or module._forward_hooks]
    with torch.no_grad():
        first = model(**inputs).logits
        other = model(**inputs | {"pixel_values": -inputs["pixel_values"]}).logits
    assert not torch.allclose(first, other, atol=1e-3)


@all_models
def test_with_all_of_the_row_the_model_computes_as_before(name: str) -> None:
    stock = uncached(name, build_with_images(name), prompt())
    model = exact(name)
    assert rms(uncached(name, model, prompt()) - stock) < (1e-5 if name in LATENT_MODELS else 0.02) * rms(stock)
    assert rms(step_by_step(name, model, prompt()) - stock) < (1e-5 if name in LATENT_MODELS else 0.02) * rms(stock)


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True},
    "static cache": {"cache_implementation": "static"},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@on_latents
@pytest.mark.parametrize("mode", MODES)
def test_with_all_of_the_rank_every_mode_of_generate_gives_the_tokens_of_the_original(name: str, mode: str) -> None:
    if (name, mode) == ("glm5_next", "prompt lookup"):
        pytest.skip("in transformers there is no assisted generation where layers keep states")
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0} | MODES[mode]
    model, ids = build_with_images(name), prompt(1 if mode == "prompt lookup" else 2, PROMPT)

    def generated() -> torch.Tensor:
        torch.manual_seed(0)
        return model.generate(**with_image(name, model, ids), **settings)

    expected = generated()
    patch_model_with_kvsplice(model, compression_ratio=1.0)
    assert torch.equal(generated(), expected)


@pytest.mark.parametrize("name", MULTIMODAL_MODELS)
@pytest.mark.parametrize("mode", ["static cache", "prompt lookup"])
def test_modes_of_generate_that_are_greedy_agree(name: str, mode: str) -> None:
    if (name, mode) == ("gemma3", "static cache") and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("with an image the static cache of gemma3 fails in this release of transformers, patched or not")
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    model, ids = packed(name), prompt(1, PROMPT)
    expected = model.generate(**with_image(name, model, ids), **settings)
    assert torch.equal(model.generate(**with_image(name, model, ids), **settings | MODES[mode]), expected)


@pytest.mark.parametrize("name", MULTIMODAL_MODELS)
def test_beams_with_a_cache_are_those_without(name: str) -> None:
    settings = {"num_beams": 3, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    model, ids = packed(name), prompt(2, PROMPT)
    expected = model.generate(**with_image(name, model, ids), use_cache=False, **settings)
    assert torch.equal(model.generate(**with_image(name, model, ids), **settings), expected)


@all_models
def test_with_and_without_a_cache_the_numbers_are_the_same(name: str) -> None:
    stock, model = uncached(name, build_with_images(name), prompt()), packed(name)
    without = uncached(name, model, prompt())
    loss = rms(without - stock)
    assert loss > 0
    assert rms(step_by_step(name, model, prompt()) - without) < 0.02 * loss


@all_models
def test_unpatching_gives_the_model_back_bit_for_bit(name: str) -> None:
    model = packed(name)
    stock = uncached(name, build_with_images(name), prompt())
    assert not torch.equal(uncached(name, model, prompt()), stock)
    unpatch_model(model)
    assert torch.equal(uncached(name, model, prompt()), stock)
    assert set(model.state_dict()) == set(build_with_images(name).state_dict())


# The linear attention of glm5_next keeps states beside the rows.
@pytest.mark.parametrize("name", [name for name in ALL_MODELS if name != "glm5_next"])
def test_a_cache_takes_the_bytes_of_the_formula_and_less_than_stock(name: str) -> None:
    model, ids = packed(name), prompt(1, 40)
    size, cache = get_kv_cache_size(model, seq_len=40), KVSpliceCache(model)
    with torch.no_grad():
        model(**with_image(name, model, ids), use_cache=True, **cache_argument(cache))
    assert cache_nbytes(cache) == size.compressed_bytes < 0.75 * size.original_bytes


@all_models
def test_padding_on_the_left_changes_nothing(name: str) -> None:
    model, ids = packed(name), prompt(1, PROMPT)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    alone = model.generate(**with_image(name, model, ids), **settings)[:, PROMPT:]
    filled = torch.cat([torch.zeros(1, 4, dtype=torch.int64), ids], dim=1)
    mask = (filled > 0).long()
    padded = model.generate(**with_image(name, model, filled, start=6), attention_mask=mask, **settings)
    assert torch.equal(padded[:, PROMPT + 4 :], alone)


@all_models
def test_a_saved_splice_gives_the_same_logits_where_it_is_loaded(name: str, tmp_path: Path) -> None:
    model = packed(name)
    save_kvsplice(model, tmp_path)
    assert torch.equal(
        uncached(name, load_kvsplice(build_with_images(name), tmp_path), prompt()), uncached(name, model, prompt())
    )


def test_keys_of_latents_that_are_rotated_along_three_axes_are_turned_back_and_forth() -> None:
    """An image of two rows of three parts: its time stands still while height and width go on."""
    name = "hy_v4_vl"
    stock, model = build_with_images(name), packed(name)
    ids = prompt(1, 20)
    ids[:, 2:8] = placeholder_of(name)
    places = {"image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": (ids == placeholder_of(name)).int()}
    pixels = torch.randn(16, 3 * 16 * 16, generator=torch.Generator().manual_seed(0))
    seen: list[torch.Tensor] = []
    rotary = stock.model.language_model.rotary_emb
    rotary.register_forward_pre_hook(lambda _, __, given: seen.append(given["position_ids"]), with_kwargs=True)
    with torch.no_grad():
        expected = stock(input_ids=ids, pixel_values=pixels, **places, use_cache=False).logits
        without = model(input_ids=ids, pixel_values=pixels, **places, use_cache=False).logits
        places["mm_token_type_ids"] = places["mm_token_type_ids"][:, :PROMPT]
        output = model(input_ids=ids[:, :PROMPT], pixel_values=pixels, **places, use_cache=True)
        cache, logits = cache_of(output), [output.logits]
        for place in range(PROMPT, 20):
            logits.append(model(ids[:, place : place + 1], use_cache=True, **cache_argument(cache)).logits)
    time, height, width = seen[0][-3:, 0, 2:8].tolist()
    assert (len(set(time)), len(set(height)), len(set(width))) == (1, 2, 3)
    loss = rms(without - expected)
    assert 0 < rms(torch.cat(logits, dim=1) - without) + 1e-9 < 0.02 * loss


def test_every_model_of_images_on_latents_of_the_installed_transformers_is_among_these() -> None:
    """Found by their default settings: those whose text part has a rank of latents."""
    found = set()
    for kind in CONFIG_MAPPING:
        text = _text_part_beside_images(kind)
        if text is not None and "kv_lora_rank" in vars(text):
            found.add(kind)
    assert found <= set(LATENT_MODELS.values())
    assert found


def _text_part_beside_images(kind: str) -> Any:
    """The settings of the text part of an architecture that also has a vision tower."""
    sub_configs = getattr(CONFIG_MAPPING[kind], "sub_configs", None) or {}
    if "vision_config" not in sub_configs or "text_config" not in sub_configs:
        return None
    try:
        return getattr(AutoConfig.for_model(kind), "text_config", None)
    except ValueError:  # it has no default settings
        return None


def test_cross_attention_to_an_image_is_left_alone() -> None:
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model("mllama", **MLLAMA)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    ids = prompt(2, 16)
    ids[:, 1] = 3
    images = torch.randn(2, 1, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    places = {"aspect_ratio_ids": torch.ones(2, 1, dtype=torch.int64)}
    places["aspect_ratio_mask"] = torch.ones(2, 1, 1, dtype=torch.int64)
    places["cross_attention_mask"] = torch.ones(2, 16, 1, 1, dtype=torch.int64)
    inputs = {"input_ids": ids, "pixel_values": images, **places}
    with torch.no_grad():
        stock = model(**inputs, use_cache=False).logits
        other = model(**inputs | {"pixel_values": -images}, use_cache=False).logits
    assert rms(other - stock) > 1e-3
    calibrator = KVSpliceCalibrator(model, sink_tokens=SINKS).collect(list(prompt(12, 48)), progress=False)
    patch_model_with_kvsplice(model, KVSpliceConfig(bits=16.5, sink_tokens=SINKS), calibration=calibrator)
    assert [site.layer_idx for site, _ in patched_sites(model)] == [0, 2]
    assert not [name for name, module in model.named_modules() if "cross_attn" in name and "kvsplice" in vars(module)]
    with torch.no_grad():
        assert rms(model(**inputs, use_cache=False).logits - stock) < 0.02 * rms(stock)
        cached = model(**{**inputs, "use_cache": True})
    assert rms(cached.logits - stock) < 0.02 * rms(stock)
    layers = cache_of(cached).layers
    assert [type(layer).__name__.startswith("Spliced") for layer in layers] == [True, False, True, False]
