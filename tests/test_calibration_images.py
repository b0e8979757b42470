"""Calibration of models of images and text: images are read and counted, or left out by choice, and never dropped."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import byte_tokenizer, trained_model
from multimodal_models import ALL_MODELS, build_with_images, placeholder_of, with_image
from ordinary_models import build_multimodal
from test_ordinary import SINKS, tokens
from transformers.image_processing_utils import BaseImageProcessor

from kvsplice_hf import (
    CalibrationError,
    ConfigError,
    KVSpliceCalibrator,
    KVSpliceConfig,
    calibrate,
    patch_model_with_kvsplice,
)
from kvsplice_hf.calibration.media import Media
from kvsplice_hf.calibration.sampling import sample_from_model
from kvsplice_hf.text import token_windows


NAME = "gemma3"  # of the checks that are the same for every model
LENGTH = 24
all_models = pytest.mark.parametrize("name", ALL_MODELS)


def words(count: int, seed: int = 1, length: int = LENGTH) -> torch.Tensor:
    return tokens(count, length, seed=seed).clamp(min=10)  # ids of images and their ends aside


def batches(name: str, model: Any, count: int = 8, rows: int = 2) -> list[dict[str, Any]]:
    """Prompts with an image each, of which each is another."""
    found = [with_image(name, model, words(rows, seed)) for seed in range(count)]
    for seed, batch in enumerate(found):
        noise = torch.Generator().manual_seed(seed)
        batch["pixel_values"] = torch.randn(batch["pixel_values"].shape, generator=noise)
    return found


def calibrator_of(name: str, model: Any, data: Any = None, **settings: Any) -> KVSpliceCalibrator:
    calibrator = KVSpliceCalibrator(model, sink_tokens=SINKS, **settings)
    return calibrator.collect(batches(name, model) if data is None else data, progress=False)


def first_layer(calibrator: KVSpliceCalibrator) -> Any:
    return next(iter(calibrator.statistics.values()))


@all_models
def test_images_are_read_and_their_places_are_counted(name: str) -> None:
    model = build_with_images(name)
    data = batches(name, model)
    counted = calibrator_of(name, model, data)
    assert counted.tokens == 8 * 2 * (LENGTH - SINKS)
    other = calibrator_of(name, model, [batch | {"pixel_values": -batch["pixel_values"]} for batch in data])
    assert not torch.allclose(first_layer(counted).latent_sum, first_layer(other).latent_sum, rtol=1e-3)
    assert first_layer(counted).fisher.abs().sum() > 0


@all_models
def test_places_of_images_are_left_out_by_choice(name: str) -> None:
    model = build_with_images(name)
    data = batches(name, model)
    of_images = sum(int((batch["input_ids"][:, SINKS:] == placeholder_of(name)).sum()) for batch in data)
    assert of_images > 0
    chosen = calibrator_of(name, model, data, count_images=False)
    assert chosen.tokens == 8 * 2 * (LENGTH - SINKS) - of_images


def test_the_model_is_as_it_was_and_sees_the_images_as_ever() -> None:
    model = build_multimodal(NAME)
    inputs = with_image(NAME, model, words(2))
    with torch.no_grad():
        before = model(**inputs).logits
    calibrator_of(NAME, model)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)


def test_predictions_of_parts_of_images_do_not_count() -> None:
    """Nobody asks for them; their gradients would say that the codes matter there."""
    media = Media(placeholders=(3,))
    assert media.predicted(torch.tensor([[9, 8, 3, 3, 7, 3]])).tolist() == [[True, False, False, True, False, True]]


def test_metrics_without_gradients_read_images_as_well() -> None:
    model = build_multimodal(NAME)
    assert calibrator_of(NAME, model, metric="pca").tokens == 8 * 2 * (LENGTH - SINKS)
    latents = build_with_images("kimi_k25 on latents")
    assert calibrator_of("kimi_k25 on latents", latents, metric="readers").tokens == 8 * 2 * (LENGTH - SINKS)


def test_the_whole_call_takes_batches_with_images() -> None:
    model = build_multimodal(NAME)
    data = batches(NAME, model, 12)
    config = KVSpliceConfig(bits=5.0, sink_tokens=SINKS)
    patch_model_with_kvsplice(model, config, calibration=data)
    assert model(**data[0]).logits.isfinite().all()
    calibrator = calibrate(build_multimodal(NAME), data, count_images=False)
    assert calibrator.tokens < 12 * 2 * LENGTH


def test_held_out_prompts_with_images_are_kept_for_the_check_and_left_out_of_files(tmp_path: Path) -> None:
    model = build_multimodal(NAME)
    calibrator = KVSpliceCalibrator(model, sink_tokens=SINKS)
    calibrator.collect(batches(NAME, model, 12), progress=False, holdout=2)
    assert all("pixel_values" in batch for batch in calibrator.holdout)
    patched = build_multimodal(NAME)
    patch_model_with_kvsplice(patched, KVSpliceConfig(bits=5.0, sink_tokens=SINKS), calibration=calibrator)
    calibrator.save(tmp_path / "statistics.safetensors")
    loaded = KVSpliceCalibrator.load(tmp_path / "statistics.safetensors", model)
    assert loaded.holdout == []
    assert loaded.tokens == calibrator.tokens


def test_a_padded_batch_with_images_counts_its_real_tokens() -> None:
    model = build_multimodal(NAME)
    data = batches(NAME, model)
    for batch in data:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["input_ids"] = batch["input_ids"].roll(3, dims=1)
        batch["token_type_ids"] = (batch["input_ids"] == placeholder_of(NAME)).int()
        batch["input_ids"][:, :3], batch["attention_mask"][:, :3] = 0, 0
    assert calibrator_of(NAME, model, data).tokens == 8 * 2 * (LENGTH - 3 - SINKS)


def test_what_a_processor_says_of_text_alone_changes_nothing() -> None:
    model = build_multimodal(NAME)
    plain = calibrator_of(NAME, model, [{"input_ids": words(2, seed)} for seed in range(8)])
    typed = [{"input_ids": words(2, seed), "token_type_ids": torch.zeros(2, LENGTH).long()} for seed in range(8)]
    assert torch.equal(first_layer(calibrator_of(NAME, model, typed)).latent_sum, first_layer(plain).latent_sum)


def test_a_model_never_writes_placeholders_to_calibrate_itself_on() -> None:
    model = build_multimodal(NAME)
    ids = torch.cat([batch["input_ids"] for batch in sample_from_model(model, 1024, 32)])
    assert ids.numel() == 1024
    assert not (ids == placeholder_of(NAME)).any()


# ----------------------------------------------------------------------------------------------------- what is refused


def test_placeholders_without_their_image_are_refused() -> None:
    model = build_multimodal(NAME)
    ids = with_image(NAME, model, words(2))["input_ids"]
    for data in (ids, {"input_ids": ids}, {"input_ids": ids, "token_type_ids": torch.zeros_like(ids)}):
        with pytest.raises(CalibrationError, match=r"8 placeholders of images \(token ids \(3,\)\), but no images"):
            calibrator_of(NAME, model, data)


def test_images_for_a_model_that_takes_none_are_refused() -> None:
    data = {"input_ids": words(2), "pixel_values": torch.zeros(2, 3, 8, 8)}
    with pytest.raises(
        CalibrationError, match="hold pixel_values, and the model takes no such argument, nor any image"
    ):
        KVSpliceCalibrator(trained_model()).collect(data, progress=False)
    with pytest.raises(CalibrationError, match=r"hold pixel_values_videos, .* it takes \[.*'pixel_values'"):
        calibrator_of("llava", build_multimodal("llava"), data | {"pixel_values_videos": torch.zeros(2, 3, 8, 8)})


def test_images_that_are_no_tensors_are_refused_with_what_to_do() -> None:
    model = build_multimodal(NAME)
    data = with_image(NAME, model, words(2))
    with pytest.raises(CalibrationError, match='hold pixel_values as a list; .* return_tensors="pt"'):
        calibrator_of(NAME, model, data | {"pixel_values": data["pixel_values"].tolist()})


def test_images_beside_sequences_of_several_lengths_are_refused() -> None:
    model = build_multimodal(NAME)
    data = with_image(NAME, model, words(2))
    ragged = [data["input_ids"][0].tolist(), data["input_ids"][1, :-2].tolist()]
    with pytest.raises(CalibrationError, match="no batch of sequences of one length"):
        calibrator_of(NAME, model, data | {"input_ids": ragged})


def test_a_batch_with_images_that_is_too_large_is_refused_and_not_cut() -> None:
    model = build_multimodal(NAME)
    with pytest.raises(CalibrationError, match="has 48 tokens, more than `max_tokens` = 40, and cannot be cut"):
        KVSpliceCalibrator(model).collect(batches(NAME, model), max_tokens=40, progress=False)


# ----------------------------------------------------------------------------------------------- processor as tokenizer


class Processor:
    """Of images and text, as those of transformers are: images come first, and the tokenizer is a part."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, images: Any = None, text: Any = None, **_: Any) -> Any:
        assert images is None, "text was given as images"
        return self.tokenizer(text)


class ImageProcessor(BaseImageProcessor):
    """Of images alone."""

    def __call__(self, images: Any, **_: Any) -> Any:
        raise AssertionError("text was given to a processor of images")


SENTENCES = [f"The value of object {number} is {number * 7}, and its name is not known. " * 4 for number in range(12)]


def test_a_processor_is_as_good_as_its_tokenizer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KVSPLICE_CACHE", str(tmp_path))
    tokenizer = byte_tokenizer()
    processor = Processor(tokenizer)
    plain, through = (
        calibrate(trained_model(), SENTENCES, tokenizer=given, window=64) for given in (tokenizer, processor)
    )
    assert torch.equal(first_layer(plain).latent_sum, first_layer(through).latent_sum)
    assert torch.equal(token_windows(tokenizer, SENTENCES, 32), token_windows(processor, SENTENCES, 32))
    config = KVSpliceConfig(bits=5.0)
    expected = patch_model_with_kvsplice(_fresh(), config, calibration=SENTENCES, tokenizer=tokenizer)
    patched = patch_model_with_kvsplice(_fresh(), config, calibration=SENTENCES, tokenizer=processor)
    ids = torch.arange(40, 60)[None]
    with torch.no_grad():
        assert torch.equal(patched(ids).logits, expected(ids).logits)


def test_automatic_calibration_keeps_the_statistics_of_a_tokenizer_and_its_processor_in_one_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KVSPLICE_CACHE", str(tmp_path))
    for given in (byte_tokenizer(), Processor(byte_tokenizer())):
        patch_model_with_kvsplice(_fresh(), bits=5.0, tokenizer=given)
    assert len(list((tmp_path / "statistics").glob("*.safetensors"))) == 1


@pytest.mark.parametrize("given", [ImageProcessor(), Processor(None), Processor(ImageProcessor())], ids=lambda x: "")
def test_a_processor_without_a_tokenizer_is_refused_by_its_name(given: Any) -> None:
    message = f"`tokenizer` is a {type(given).__name__}; it must be a tokenizer of transformers, or a processor"
    for call in (
        lambda: patch_model_with_kvsplice(_fresh(), bits=5.0, tokenizer=given),
        lambda: patch_model_with_kvsplice(_fresh(), bits=5.0, calibration=SENTENCES, tokenizer=given),
        lambda: calibrate(_fresh(), SENTENCES, tokenizer=given),
        lambda: token_windows(given, SENTENCES, 32),
    ):
        with pytest.raises(ConfigError, match=message):
            call()


def _fresh() -> Any:
    return copy.deepcopy(trained_model())
