"""Models of images and text: the text part is patched, the vision tower is left alone, and an image changes nothing."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from ordinary_models import IMAGE_TOKEN, MULTIMODAL_MODELS, build_multimodal, with_image
from test_ordinary import SINKS, calibrated, rms, tokens

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


all_models = pytest.mark.parametrize("name", MULTIMODAL_MODELS)
PROMPT = 12


@functools.cache
def calibration_of(name: str) -> KVSpliceCalibrator:
    return calibrated(build_multimodal(name))


def packed(name: str, bits: float = 5.0) -> Any:
    config = KVSpliceConfig(bits=bits, sink_tokens=SINKS)
    return patch_model_with_kvsplice(build_multimodal(name), config, calibration=calibration_of(name))


def prompt(count: int = 2, length: int = 20) -> torch.Tensor:
    ids = tokens(count, length)
    return torch.where(ids < 10, ids + 10, ids)  # ids of images and their ends aside


@torch.no_grad()
def uncached(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(**with_image(model, ids), use_cache=False).logits


@torch.no_grad()
def step_by_step(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a prompt with an image, and of single tokens of text behind it."""
    output = model(**with_image(model, ids[:, :PROMPT]), use_cache=True)
    cache, logits = cache_of(output), [output.logits]
    for place in range(PROMPT, ids.shape[1]):
        logits.append(model(ids[:, place : place + 1], use_cache=True, **cache_argument(cache)).logits)
    return torch.cat(logits, dim=1)


@all_models
def test_an_image_is_seen_and_the_text_part_alone_is_patched(name: str) -> None:
    model = packed(name)
    inputs = with_image(model, prompt())
    assert (inputs["input_ids"] == IMAGE_TOKEN).any()
    assert [".language_model." in site.name for site, _ in patched_sites(model)] == [True, True]
    vision = [module for path, module in model.named_modules() if "visual" in path or "vision" in path]
    assert len(vision) > 5
    assert not [module for module in vision if any("kvsplice" in key for key in vars(module)) or module._forward_hooks]
    with torch.no_grad():
        first = model(**inputs).logits
        other = model(**inputs | {"pixel_values": -inputs["pixel_values"]}).logits
    assert not torch.allclose(first, other, atol=1e-3)


@all_models
def test_with_16_bits_per_number_the_model_computes_as_before(name: str) -> None:
    stock = uncached(build_multimodal(name), prompt())
    assert rms(uncached(packed(name, bits=16.5), prompt()) - stock) < 0.02 * rms(stock)


@all_models
def test_with_and_without_a_cache_the_numbers_are_the_same(name: str) -> None:
    stock, model = uncached(build_multimodal(name), prompt()), packed(name)
    without = uncached(model, prompt())
    loss = rms(without - stock)
    assert loss > 0
    assert rms(step_by_step(model, prompt()) - without) < 0.02 * loss


@all_models
def test_unpatching_gives_the_model_back_bit_for_bit(name: str) -> None:
    model = packed(name)
    stock = uncached(build_multimodal(name), prompt())
    assert not torch.equal(uncached(model, prompt()), stock)
    unpatch_model(model)
    assert torch.equal(uncached(model, prompt()), stock)
    assert set(model.state_dict()) == set(build_multimodal(name).state_dict())


@all_models
def test_a_cache_takes_the_bytes_of_the_formula_and_less_than_stock(name: str) -> None:
    model, ids = packed(name), prompt(1, 40)
    size, cache = get_kv_cache_size(model, seq_len=40), KVSpliceCache(model)
    with torch.no_grad():
        model(**with_image(model, ids), use_cache=True, **cache_argument(cache))
    assert cache_nbytes(cache) == size.compressed_bytes < 0.75 * size.original_bytes


@all_models
def test_padding_on_the_left_changes_nothing(name: str) -> None:
    model, ids = packed(name), prompt(1, PROMPT)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    alone = model.generate(**with_image(model, ids), **settings)[:, PROMPT:]
    filled = torch.cat([torch.zeros(1, 4, dtype=torch.int64), ids], dim=1)
    mask = (filled > 0).long()
    padded = model.generate(**with_image(model, filled, start=6), attention_mask=mask, **settings)
    assert torch.equal(padded[:, PROMPT + 4 :], alone)


@all_models
def test_a_saved_splice_gives_the_same_logits_where_it_is_loaded(name: str, tmp_path: Path) -> None:
    model = packed(name)
    save_kvsplice(model, tmp_path)
    assert torch.equal(uncached(load_kvsplice(build_multimodal(name), tmp_path), prompt()), uncached(model, prompt()))
