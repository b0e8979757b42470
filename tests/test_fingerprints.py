"""Statistics that are kept, and pages that are shared, belong to one model, one tokenizer and one splice."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import byte_tokenizer, trained_model
from test_packed import calibrated
from tiny_models import build
from transformers import PreTrainedTokenizerFast

from kvsplice_hf import (
    CacheMismatchError,
    KVSpliceCalibrator,
    KVSpliceConfig,
    load_kvsplice,
    patch_model_with_kvsplice,
    save_kvsplice,
    unpatch_model,
    upstream,
)
from kvsplice_hf.cache.batching import init_continuous_batching
from kvsplice_hf.calibration import auto
from kvsplice_hf.calibration.fingerprint import model_fingerprint, same_model, tokenizer_fingerprint
from kvsplice_hf.code.files import CONFIG_NAME
from kvsplice_hf.patch.base import BASE_KEY, base_fingerprint
from kvsplice_hf.patch.sites import find_sites
from kvsplice_hf.patch.state import patched_sites


NAME = "deepseek_v3"


def fingerprint(model: Any) -> str:
    return model_fingerprint(model, find_sites(model))


def changed(name: str, by: float = 0.5) -> Any:
    model = build(NAME)
    with torch.no_grad():
        model.get_parameter(name).flatten()[-1] += by
    return model


@pytest.mark.parametrize("name", [name for name, _ in build(NAME).named_parameters()])
def test_a_model_that_differs_in_any_weight_is_another_one(name: str) -> None:
    assert not same_model(fingerprint(changed(name)), fingerprint(build(NAME)))


def test_what_takes_long_has_a_progress_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fingerprint(build(NAME))
    assert "weights" not in capsys.readouterr().err
    monkeypatch.setattr("kvsplice_hf.weights.fingerprint._PATIENCE", 0.0)
    fingerprint(build(NAME))
    assert "fingerprint of the weights" in capsys.readouterr().err


def test_buffers_that_are_saved_count_as_well() -> None:
    model = build(NAME)
    buffers = [(n, b) for n, b in model.named_buffers() if n in model.state_dict()]
    assert buffers, "the router's bias"
    buffers[0][1][0] += 1
    assert not same_model(fingerprint(model), fingerprint(build(NAME)))


def test_the_same_weights_are_the_same_model_in_any_dtype_and_without_the_output_layer() -> None:
    model = build(NAME)
    assert same_model(fingerprint(model), fingerprint(build(NAME)))
    assert same_model(fingerprint(model.bfloat16()), fingerprint(build(NAME)))
    assert same_model(fingerprint(model.model), fingerprint(build(NAME)))
    patched = patch_model_with_kvsplice(build(NAME), compression_ratio=0.5)
    unpatch_model(patched)
    assert same_model(fingerprint(patched), fingerprint(build(NAME)))


def test_statistics_of_a_fine_tuned_model_are_not_taken_for_its_base_without_a_word(
    caplog: pytest.LogCaptureFixture,
) -> None:
    statistics = calibrated(build(NAME))
    with caplog.at_level(logging.WARNING):
        patch_model_with_kvsplice(changed("model.norm.weight"), bits=4, calibration=statistics)
    assert "other weights" in caplog.text


def test_the_fingerprint_is_of_the_weights_that_were_seen(tmp_path: Path) -> None:
    model = build(NAME)
    calibrator = KVSpliceCalibrator(model).collect(torch.randint(8, 128, (32, 32)), progress=False)
    before = fingerprint(model)
    with torch.no_grad():
        model.lm_head.weight += 1
    calibrator.save(tmp_path / "statistics.safetensors")
    assert KVSpliceCalibrator.load(tmp_path / "statistics.safetensors").fingerprint == before


def key(model: Any = None, tokenizer: Any = None, **settings: Any) -> str:
    return auto._key(KVSpliceCalibrator(build(NAME) if model is None else model, **settings), tokenizer)


def other_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["another"])
    return tokenizer


KEYS = {
    "as it is": lambda: key(),
    "another seed": lambda: key(build(NAME, seed=1)),
    "the output layer": lambda: key(changed("lm_head.weight")),
    "exact tokens": lambda: key(sink_tokens=0),
    "the metric": lambda: key(metric="pca"),
    "the layers": lambda: key(layer_pattern="model.layers"),
    "a tokenizer": lambda: key(tokenizer=byte_tokenizer()),
    "another tokenizer": lambda: key(tokenizer=other_tokenizer()),
}


def test_kept_statistics_are_known_by_all_that_they_depend_on() -> None:
    found = {name: make() for name, make in KEYS.items()}
    assert len(set(found.values())) == len(found), found
    assert found == {name: make() for name, make in KEYS.items()}
    assert tokenizer_fingerprint(None) == ""


def test_a_default_patch_with_other_exact_tokens_calibrates_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVSPLICE_CACHE", str(tmp_path))
    for sinks in (4, 0, 4):
        model = trained_model(5)  # one for all
        patch_model_with_kvsplice(model, KVSpliceConfig(sink_tokens=sinks), tokenizer=byte_tokenizer())
        unpatch_model(model)
    assert len(list((tmp_path / "statistics").glob("*.safetensors"))) == 2


def test_statistics_that_left_out_another_number_of_tokens_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    statistics = calibrated(build(NAME))
    with caplog.at_level(logging.WARNING):
        patch_model_with_kvsplice(build(NAME), KVSpliceConfig(bits=4.0, sink_tokens=0), calibration=statistics)
    assert "leave out the first 2 tokens" in caplog.text


# ----------------------------------------------------------------------------------------- the base of a saved splice


OTHER_BASE = "saved on a model of the same shape with other weights"


def saved_splice(folder: Path, model: Any = None) -> Path:
    model = patch_model_with_kvsplice(build(NAME) if model is None else model, compression_ratio=0.5)
    return save_kvsplice(model, folder)


def half_patched(model: Any) -> Any:
    return patch_model_with_kvsplice(model, compression_ratio=0.5)


OTHER_BASES = {
    "another model": lambda: build(NAME, seed=1),
    "another model, patched": lambda: half_patched(build(NAME, seed=1)),
    "one that was tuned": lambda: changed("model.layers.0.mlp.up_proj.weight"),
}
SAME_BASES = {
    "the same": lambda: build(NAME),
    "the same, patched": lambda: half_patched(build(NAME)),
    "in bf16": lambda: build(NAME).bfloat16(),
    "without its output layer": lambda: build(NAME).model,
    "with another output layer": lambda: changed("lm_head.weight"),
}


@pytest.mark.parametrize("make", OTHER_BASES.values(), ids=OTHER_BASES)
def test_a_splice_that_was_saved_on_other_weights_is_loaded_with_a_warning(
    make: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved_splice(tmp_path)
    with caplog.at_level(logging.WARNING):
        load_kvsplice(make(), tmp_path)
    assert OTHER_BASE in caplog.text
    assert str(tmp_path) in caplog.text


@pytest.mark.parametrize("make", SAME_BASES.values(), ids=SAME_BASES)
def test_a_splice_that_was_saved_on_the_same_weights_is_loaded_without_a_warning(
    make: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved_splice(tmp_path)
    model = make()
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        load_kvsplice(model, tmp_path)
    assert not caplog.records


def test_a_folder_of_an_earlier_release_names_no_base_and_is_loaded_without_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = saved_splice(tmp_path) / CONFIG_NAME
    description = json.loads(path.read_text())
    assert description.pop(BASE_KEY)
    path.write_text(json.dumps(description))
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        load_kvsplice(build(NAME, seed=1), tmp_path)
    assert not caplog.records


def test_the_base_of_a_saved_splice_is_that_of_the_weights_as_they_are(tmp_path: Path) -> None:
    """Kept from one save to the next, but not beyond a change of the weights; the splice does not count."""
    model = half_patched(build(NAME))

    def saved() -> str:
        return json.loads((save_kvsplice(model, tmp_path) / CONFIG_NAME).read_text())[BASE_KEY]

    first = saved()
    with torch.no_grad():
        patched_sites(model)[0][1].splice.compress.weight += 1
    assert saved() == first
    with torch.no_grad():
        model.model.norm.weight += 1
    assert saved() not in (first, "")


def test_a_splice_beside_a_saved_model_names_its_base(tmp_path: Path) -> None:
    half_patched(build(NAME)).save_pretrained(tmp_path)
    model = build(NAME)
    found = json.loads((tmp_path / CONFIG_NAME).read_text())[BASE_KEY]
    assert found == base_fingerprint(model, model.model.layers[0].self_attn)


def test_of_a_model_whose_weights_are_not_here_no_base_is_named() -> None:
    with torch.device("meta"):
        model = type(build(NAME))(build(NAME).config)
    assert base_fingerprint(model, model.model.layers[0].self_attn) == ""


def test_loading_into_a_patched_model_says_what_is_replaced_and_which_saved_settings_are_not_in_force(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved_splice(tmp_path)
    same, other = half_patched(build(NAME)), build(NAME)
    patch_model_with_kvsplice(other, KVSpliceConfig(compression_ratio=0.5, sink_tokens=0))
    with caplog.at_level(logging.INFO):
        caplog.clear()
        load_kvsplice(same, tmp_path)
        assert f"splices of layers [0, 1] were replaced by those in {tmp_path}" in caplog.text
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
        load_kvsplice(other, tmp_path)
    assert "keeps its own settings, sink_tokens=0, where sink_tokens=4 were saved" in caplog.text


# ------------------------------------------------------------------------------------ pages of continuous batching


batching = pytest.mark.skipif(
    upstream.ContinuousBatchingManager is None, reason="the paged cache is of another kind before 5.23"
)


def two_splices(folder: Path) -> Any:
    """A patched model, and in the folder another splice of the same sizes."""
    other = patch_model_with_kvsplice(build(NAME), KVSpliceConfig(compression_ratio=0.5, init="orthogonal"))
    save_kvsplice(other, folder)
    return patch_model_with_kvsplice(build(NAME), compression_ratio=0.5)


def batch(model: Any, prompt: list[int], **settings: Any) -> list[int]:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    outputs = model.generate_batch(
        [prompt],
        GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0),
        ContinuousBatchingConfig(num_blocks=20, page_size=8, max_batch_tokens=64),
        **settings,
    )
    return next(iter(outputs.values())).generated_tokens


@batching
def test_a_persistent_manager_does_not_serve_prefixes_of_the_splice_before(tmp_path: Path) -> None:
    model, prompt = two_splices(tmp_path), torch.randint(8, 128, (33,)).tolist()
    batch(model, prompt, persistent_manager=True)
    manager = upstream.persistent_manager(model)
    batch(model, prompt, persistent_manager=True)
    assert upstream.persistent_manager(model) is manager, "the same splice goes on with the same pages"
    load_kvsplice(model, tmp_path)
    found = batch(model, prompt, persistent_manager=True)
    assert upstream.persistent_manager(model) is not manager
    ids = torch.tensor([prompt])
    assert found == model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, len(prompt) :].tolist()
    model.destroy_cached_continuous_batching_manager()


@batching
def test_pages_that_are_in_use_are_not_read_by_another_splice(tmp_path: Path) -> None:
    from transformers import ContinuousBatchingConfig

    model = two_splices(tmp_path)
    settings = ContinuousBatchingConfig(num_blocks=8, page_size=8, max_batch_tokens=16)
    manager = init_continuous_batching(model, patched_sites(model), continuous_batching_config=settings)
    rows = manager._create_batch_processor().cache._kvsplice_rows
    rows._require_same_splices()
    load_kvsplice(model, tmp_path)
    with pytest.raises(CacheMismatchError, match="make a new one"):
        rows._require_same_splices()
