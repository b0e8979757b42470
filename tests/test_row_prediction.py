"""Rows predicted from the rows of earlier layers: they come back to the last bit, or not at all."""

import functools
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ordinary_models import build_ordinary
from safetensors.numpy import load_file, save_file
from test_packed import calibrated
from tiny_models import TINY_MODELS, build
from transformers import DynamicCache, StaticCache

from kvsplice_hf import (
    CacheMismatchError,
    CheckpointError,
    ConfigError,
    KVSpliceConfig,
    PromptCache,
    UnsupportedError,
    describe_cache,
    load_cache,
    patch_model_with_kvsplice,
    save_cache,
)
from kvsplice_hf.bench.cross_layer import Groups, in_groups, sampled
from kvsplice_hf.patch.state import splice_parts_of
from kvsplice_hf.rest import prediction as rules
from kvsplice_hf.rest.ans import TOTAL, Reader, Writer
from kvsplice_hf.rest.predicted import pack_rows, unpack_rows
from kvsplice_hf.rest.prediction_text import fit_row_prediction, load_row_prediction, save_row_prediction
from kvsplice_hf.rest.row_prediction import RowPrediction, packed_splices, tokens_of
from kvsplice_hf.upstream import cache_argument


MODELS = ["deepseek_v3", "llama"]
CODECS = ["trellis", "rows"]
BATCH, LENGTH = 2, 20


@functools.cache
def made(name: str, codec: str) -> Any:
    """A patched model; whoever changes it makes another one."""
    model = build(name) if name in TINY_MODELS else build_ordinary(name)
    config = KVSpliceConfig(bits=5.0, sink_tokens=2, codec=codec)
    patch_model_with_kvsplice(model, config, calibration=calibrated(model))
    return model


def random_ids(model: Any, batch: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, model.config.vocab_size, (batch, length), generator=generator)


@functools.cache
def fitted(name: str, codec: str, depth: int = 2, uses_tokens: bool = True) -> RowPrediction:
    model = made(name, codec)
    ids = random_ids(model, 16, 64, seed=1)
    return fit_row_prediction(model, ids, max_tokens=1024, window=64, depth=depth, uses_tokens=uses_tokens)


@torch.no_grad()
def tensors_of(model: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What the file of a cache would hold, and the splices of its packed rows."""
    ids = random_ids(model, BATCH, LENGTH)
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    model(ids, use_cache=True, **cache_argument(cache))
    layers: list[Any] = list(cache.layers)
    rows = {f"{index}.keys": layer.keys for index, layer in enumerate(layers)}
    splices = dict(zip(rows, packed_splices(model).values(), strict=True))
    return {**rows, "input_ids": ids, "other": torch.arange(3)}, splices


def nbytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())


# Symbols as words


@pytest.mark.parametrize("lanes", [1, 3, 400])
@pytest.mark.parametrize("count", [2, 5, 256])
def test_symbols_come_back_at_the_cost_of_their_probabilities(count: int, lanes: int) -> None:
    generator = np.random.default_rng(count)
    share = generator.dirichlet(np.full(count, 0.3))
    edges = np.floor(np.concatenate([[0], share.cumsum()[:-1], [1]]) * (TOTAL - count)).astype(np.int64) + np.arange(
        count + 1
    )
    edges[-1] = TOTAL
    symbols = generator.choice(count, size=(200, lanes), p=np.diff(edges) / TOTAL)
    writer = Writer(lanes)
    for row in symbols:
        writer.put(edges[row], edges[row + 1] - edges[row])
    states, words = writer.finish()
    reader = Reader(states, words, "a file")
    for row in symbols:
        found = np.searchsorted(edges, reader.slots, side="right") - 1
        assert (found == row).all()
        reader.take(edges[found], edges[found + 1] - edges[found])
    reader.finish()
    cost = -np.log2((edges[symbols + 1] - edges[symbols]) / TOTAL).sum() / 8
    assert cost <= words.nbytes + states.nbytes <= 1.01 * cost + 9 * lanes


def test_words_that_are_cut_off_or_left_over_are_noticed() -> None:
    writer = Writer(2)
    start, width = np.array([0, 100], dtype=np.int64), np.array([3, 9], dtype=np.int64)
    for _ in range(50):
        writer.put(start, width)
    states, words = writer.finish()
    for damaged in (words[:-1], np.append(words, np.uint32(1))):
        reader = Reader(states, damaged, "a file")

        def read(reader: Reader = reader) -> None:
            for _ in range(50):
                reader.take(start, width)
            reader.finish()

        with pytest.raises(CheckpointError, match="does not decode|do not decode"):
            read()
    with pytest.raises(CheckpointError, match="do not decode"):
        Reader(np.zeros(2, dtype=np.uint64), words, "a file")


# The same on any machine


@pytest.mark.parametrize("size", [1, 1023, 1024, 1025, 3000])
def test_products_are_exact_at_the_extremes_of_eight_bits_in_any_order(size: int) -> None:
    generator = np.random.default_rng(0)
    left = np.full((3, size), 127.0, dtype=np.float32)
    left[1] = generator.integers(-127, 128, size)
    left[2] = -127
    weights = np.full((size, 4), 127, dtype=np.int8)
    weights[:, 1:3] = generator.integers(-127, 128, (size, 2))
    expected = left.astype(np.int64) @ weights.astype(np.int64)
    order = generator.permutation(size)
    assert (rules.exact_product(left, weights) == expected).all()
    assert (rules.exact_product(left[:, order], weights[order]) == expected).all()


@pytest.mark.parametrize("name", MODELS)
def test_likelihoods_are_computed_from_whole_numbers_alone(name: str) -> None:
    for layer in fitted(name, "trellis").layers:
        for kind in rules.KINDS:
            assert all(array.dtype in (np.int8, np.int64) for array in layer.parts[kind]), kind
            assert all(table.dtype == np.int64 for table in layer.columns[kind].levels)
    model = made(name, "trellis")
    tokens = tokens_of(model, 8, torch.arange(5, 13), True)
    assert (tokens == np.rint(tokens)).all()
    assert np.abs(tokens).max() <= 127


# Rows


CASES = [*itertools.product(MODELS, CODECS, [2], [True]), *itertools.product(MODELS, ["trellis"], [0, 1], [False])]


@pytest.mark.parametrize(("name", "codec", "depth", "uses_tokens"), CASES)
def test_predicted_rows_come_back_to_the_last_bit(name: str, codec: str, depth: int, uses_tokens: bool) -> None:
    model, prediction = made(name, codec), fitted(name, codec, depth, uses_tokens)
    tensors, splices = tensors_of(model)
    kept, record = pack_rows(tensors, splices, prediction, model)
    assert not set(kept) & set(splices)
    assert torch.equal(kept["other"], tensors["other"])
    read = unpack_rows(kept.__getitem__, json.loads(json.dumps(record)), splices, prediction, model, "a file")
    for tensor_name, tensor in tensors.items():
        assert torch.equal(read(tensor_name), tensor), tensor_name


@pytest.mark.parametrize("name", MODELS)
def test_what_earlier_layers_and_tokens_tell_is_not_written_again(name: str) -> None:
    model = made(name, "trellis")
    tensors, splices = tensors_of(model)
    sizes = [
        nbytes(pack_rows(tensors, splices, fitted(name, "trellis", depth, uses_tokens), model)[0])
        for depth, uses_tokens in ((0, False), (1, False), (2, True))
    ]
    assert sizes[1] < sizes[0]
    assert sizes[2] < sizes[0]


def test_more_tokens_than_are_written_together_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvsplice_hf.rest import row_prediction

    monkeypatch.setattr(row_prediction, "BLOCK", 7)
    test_predicted_rows_come_back_to_the_last_bit("llama", "trellis", 2, True)


def test_no_changed_number_in_the_words_goes_unnoticed() -> None:
    model, prediction = made("llama", "trellis"), fitted("llama", "trellis")
    tensors, splices = tensors_of(model)
    kept, record = pack_rows(tensors, splices, prediction, model)
    generator = np.random.default_rng(0)
    streams = [name for name in kept if name.startswith("predicted.")]
    for number in range(60):
        name = streams[number % len(streams)]
        changed = kept[name].clone().view(torch.uint8)
        changed[int(generator.integers(len(changed)))] ^= 1 << int(generator.integers(8))
        damaged = {**kept, name: changed.view(kept[name].dtype)}
        with pytest.raises(CheckpointError):
            unpack_rows(damaged.__getitem__, record, splices, prediction, model, "a file")("0.keys")
    for wrong in ({"shape": [BATCH, LENGTH + 1]}, {"shape": [0, 3]}, {"shape": None}, {"rows": ""}):
        with pytest.raises(CheckpointError):
            unpack_rows(kept.__getitem__, record | wrong, splices, prediction, model, "a file")("0.keys")


# What is refused


def test_what_cannot_be_predicted_is_refused_by_name() -> None:
    model, prediction = made("llama", "trellis"), fitted("llama", "trellis")
    tensors, splices = tensors_of(model)
    without = {name: tensor for name, tensor in tensors.items() if name != "input_ids"}
    with pytest.raises(ConfigError, match="predicts rows from their tokens"):
        pack_rows(without, splices, prediction, model)
    with pytest.raises(CacheMismatchError, match="fitted to"):
        pack_rows(tensors, splices, fitted("deepseek_v3", "trellis"), model)
    shorter = {**tensors, "1.keys": tensors["1.keys"][:, :, 1:]}
    with pytest.raises(UnsupportedError, match="rows of different tokens"):
        pack_rows(shorter, splices, prediction, model)
    kept, record = pack_rows(tensors, splices, prediction, model)
    other = fitted("llama", "trellis", 1, False)
    with pytest.raises(CacheMismatchError, match="was written with the prediction"):
        unpack_rows(kept.__getitem__, record, splices, other, model, "a file")
    with pytest.raises(ConfigError, match="predicts rows, and `prediction` is None"):
        unpack_rows(kept.__getitem__, record, splices, None, model, "a file")


def test_models_without_packed_rows_are_refused_by_name() -> None:
    model = build_ordinary("llama")
    with pytest.raises(UnsupportedError, match="has no packed rows"):
        fit_row_prediction(model, random_ids(model, 4, 64))
    model = build("deepseek_v3")
    patch_model_with_kvsplice(model, KVSpliceConfig(rank=8))
    with pytest.raises(UnsupportedError, match="are numbers"):
        fit_row_prediction(model, random_ids(model, 4, 64))
    with pytest.raises(ConfigError, match="`depth` is -1"):
        fit_row_prediction(model, random_ids(model, 4, 64), depth=-1)


# Files of caches


@torch.no_grad()
def filled(model: Any, kind: str) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A cache of two sequences, one of them padded on the left, with its tokens and mask."""
    ids = random_ids(model, BATCH, LENGTH)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    config = model.config.get_text_config(decoder=True)
    cache: Any = StaticCache(config=config, max_cache_len=32) if kind == "static" else DynamicCache(config=config)
    model(ids, attention_mask=mask, use_cache=True, **cache_argument(cache))
    return cache, ids, mask


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", MODELS)
def test_a_cache_that_was_saved_by_prediction_loads_as_it_was(name: str, kind: str, tmp_path: Path) -> None:
    model, prediction = made(name, "trellis"), fitted(name, "trellis")
    cache, ids, mask = filled(model, kind)
    path = tmp_path / "cache"
    settings: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "prediction": prediction}
    save_cache(cache, path, model, **settings, compress="layers")
    assert describe_cache(path).compress == "layers"
    loaded = load_cache(model, path, prediction=prediction)
    assert type(loaded) is type(cache)
    for own, other in zip(cache.layers, loaded.layers, strict=True):
        assert torch.equal(own.keys, other.keys)
    if kind == "dynamic":
        part = load_cache(model, path, prediction=prediction, tokens=8)
        assert all(
            torch.equal(own.keys[:, :, :8], other.keys) for own, other in zip(cache.layers, part.layers, strict=True)
        )
    with pytest.raises(ConfigError, match="predicts rows, and `prediction` is None"):
        load_cache(model, path)
    with pytest.raises(ConfigError, match="predicts rows, and `prediction` is None"):
        save_cache(cache, path, model, input_ids=ids, compress="layers")
    with pytest.raises(ConfigError, match="predicts rows from their tokens"):
        save_cache(cache, path, model, prediction=prediction, compress="layers")


def test_a_store_keeps_prompts_by_their_prediction(tmp_path: Path) -> None:
    model, prediction = made("llama", "trellis"), fitted("llama", "trellis")
    ids = random_ids(model, 1, LENGTH)
    store = PromptCache(tmp_path, compress="layers", prediction=prediction)
    store.prepare(model, ids, keep=12)
    (entry,) = store.entries()
    assert describe_cache(entry.path).compress == "layers"
    assert store.find(model, ids) is not None
    assert PromptCache(tmp_path).find(model, ids) is None
    with pytest.raises(ConfigError, match="predicts rows, and `prediction` is None"):
        PromptCache(tmp_path, compress="layers")


def test_a_stock_cache_has_no_rows_to_predict(tmp_path: Path) -> None:
    model = build_ordinary("llama")
    cache, ids, _ = filled(model, "dynamic")
    with pytest.raises(UnsupportedError, match="has no packed rows"):
        save_cache(
            cache, tmp_path / "cache", model, input_ids=ids, compress="layers", prediction=fitted("llama", "trellis")
        )


# Files of predictions


@pytest.fixture(name="saved", scope="module")
def _saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prediction") / "prediction.safetensors"
    save_row_prediction(fitted("llama", "trellis"), path)
    return path


def test_a_prediction_that_was_kept_reads_what_the_fitted_one_has_written(saved: Path) -> None:
    model, prediction = made("llama", "trellis"), fitted("llama", "trellis")
    loaded = load_row_prediction(model, saved)
    assert loaded.identity == prediction.identity
    tensors, splices = tensors_of(model)
    kept, record = pack_rows(tensors, splices, prediction, model)
    read = unpack_rows(kept.__getitem__, record, splices, loaded, model, "a file")
    assert all(torch.equal(read(name), tensors[name]) for name in splices)


def test_changed_foreign_and_newer_files_of_predictions_are_refused(saved: Path, tmp_path: Path) -> None:
    model = made("llama", "trellis")
    content, generator = saved.read_bytes(), np.random.default_rng(0)
    path = tmp_path / "damaged"
    for _ in range(40):
        place = int(generator.integers(len(content)))
        path.write_bytes(
            content[:place] + bytes([content[place] ^ 1 << int(generator.integers(8))]) + content[place + 1 :]
        )
        with pytest.raises(CheckpointError):
            load_row_prediction(model, path)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_row_prediction(model, path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_row_prediction(model, tmp_path / "nowhere")
    save_file({"a": np.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="holds no prediction"):
        load_row_prediction(model, path)
    newer = {"format": "kvsplice_prediction", "description": json.dumps({"version": 99}), "sha256": ""}
    save_file(load_file(saved), path, newer)
    with pytest.raises(CheckpointError, match="version 99"):
        load_row_prediction(model, path)
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_row_prediction(fitted("llama", "trellis"), tmp_path / "no" / "folder")


def test_the_prediction_of_another_splice_is_refused_by_name(saved: Path) -> None:
    with pytest.raises(CacheMismatchError, match="fitted to"):
        load_row_prediction(made("llama", "rows"), saved)


# Layers in groups, simulated


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_groups_keep_to_their_bytes_and_leave_the_model_as_it_was(name: str) -> None:
    model = made(name, "trellis")
    codecs: dict[Any, Any] = {part: splice.codec for part, splice in splice_parts_of(model).items()}
    sample, ids = sampled(model, random_ids(model, 8, 64, seed=1)), random_ids(model, 1, 32)
    before = model(ids, use_cache=False).logits
    unpatched = build(name) if name in TINY_MODELS else build_ordinary(name)
    stock = unpatched(ids, use_cache=False).logits
    ordinary, errors = Groups(1, sample, codecs), {}
    for size in (1, 2):
        groups = Groups(size, sample, codecs)
        assert groups.bits_saved(ordinary) >= (0 if size == 1 else 0.01)
        for budget in (24, 12):
            simulated, found = groups.with_budget(budget)
            assert 0.75 * budget <= found <= budget
            with in_groups(model, simulated):
                errors[size, budget] = float((model(ids, use_cache=False).logits - stock).std())
    assert all(errors[size, 24] < errors[size, 12] for size in (1, 2))
    assert torch.equal(model(ids, use_cache=False).logits, before)
    assert all(splice.codec is codecs[part] for part, splice in splice_parts_of(model).items())
