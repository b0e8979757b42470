"""Caches used as people use them: rows taken out by hand, copies, other splices, training loops."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from test_packed import calibrated
from tiny_models import TINY_MODELS, build, tiny_batch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from kvsplice_hf import (
    CacheMismatchError,
    KVSpliceCache,
    KVSpliceConfig,
    load_kvsplice,
    merge_kvsplice,
    patch_model_with_kvsplice,
    save_kvsplice,
    unmerge_kvsplice,
)
from kvsplice_hf.cache.exact import UNFILLED, ExactTokens, relocated
from kvsplice_hf.upstream import cache_argument, cache_of


NAME = "deepseek_v3"
TOLERANCE = 5e-5


def tokens(count: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(8, 128, (batch, count), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def filled(model: PreTrainedModel, ids: torch.Tensor, cache: Any = None) -> Cache:
    return cache_of(model(ids, use_cache=True, **cache_argument(cache)))


@torch.no_grad()
def steps(model: PreTrainedModel, cache: Cache, ids: torch.Tensor, first: int) -> torch.Tensor:
    """Logits of single steps, at positions from `first` on."""
    parts = []
    for index in range(ids.shape[1]):
        position = torch.full((len(ids), 1), first + index)
        parts.append(model(ids[:, index : index + 1], position_ids=position, **cache_argument(cache)).logits)
    return torch.cat(parts, 1)


def take_rows(cache: Cache, kept: list[int]) -> None:
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]


# Of 20 tokens, after how many they are taken out, and how many steps follow.
EVICTIONS = {
    "from the middle": [0, 1, 2, 3, 12, 13, 14, 15, 16, 17, 18, 19],
    "all but the last": list(range(12, 20)),
    "some of the first": [1, 3, 8, 9, 15, 19],
    "nothing": list(range(20)),
    "all but one": [7],
    "the end": list(range(9)),
}


@pytest.mark.parametrize("kind", ["plain", "packed"])
@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("grown", [False, True], ids=["after the prompt", "after some steps"])
@pytest.mark.parametrize("eviction", EVICTIONS)
def test_rows_taken_out_by_hand_stay_out(eviction: str, grown: bool, sinks: int, kind: str) -> None:
    """At full rank and 16 bits the model is the stock one, which forgets what was taken out."""
    stock, model = build(NAME), build(NAME)
    ids, more = tokens(20), tokens(6, seed=1)
    if kind == "packed":
        config = KVSpliceConfig(bits=16.0, sink_tokens=sinks)
        patch_model_with_kvsplice(model, config, calibration=calibrated(model))
    else:
        patch_model_with_kvsplice(model, KVSpliceConfig(compression_ratio=1.0, init="identity", sink_tokens=sinks))
    found = []
    for each in (stock, model):
        cache = filled(each, ids[:, :14] if grown else ids)
        if grown:
            steps(each, cache, ids[:, 14:], 14)
        take_rows(cache, EVICTIONS[eviction])
        found.append(steps(each, cache, more, 20))
        assert cache.get_seq_length() == len(EVICTIONS[eviction]) + 6
    tolerance = TOLERANCE if kind == "plain" else 0.05 * float(found[0].abs().max())  # rows of bf16 numbers
    torch.testing.assert_close(found[1], found[0], atol=tolerance, rtol=0)


def test_rows_taken_out_again_and_again_stay_out() -> None:
    stock, model = build(NAME), build(NAME)
    patch_model_with_kvsplice(model, KVSpliceConfig(compression_ratio=1.0, init="identity", sink_tokens=3))
    found = []
    for each in (stock, model):
        cache, parts = filled(each, tokens(12, batch=2)), []
        for index in range(8):  # a window of eight, and the first two
            length = cache.get_seq_length()
            take_rows(cache, [0, 1, *range(length - 8, length)])
            parts.append(steps(each, cache, tokens(1, batch=2, seed=index), 12 + index))
        found.append(torch.cat(parts, 1))
    torch.testing.assert_close(found[1], found[0], atol=TOLERANCE, rtol=0)


def test_exact_tokens_are_known_again_by_their_rows() -> None:
    rows = torch.arange(7.0)[None, :, None].expand(2, 7, 3).clone()
    exact = ExactTokens(torch.zeros(2, 3, 4), torch.tensor([[0, 2, 4], [1, UNFILLED, UNFILLED]]))

    def places(kept: list[int]) -> list[list[int]]:
        return relocated(exact, rows, rows[:, kept]).positions.tolist()

    assert places([0, 1, 2, 3, 4, 5, 6]) == exact.positions.tolist()
    assert places([2, 4, 5]) == [[-1, 0, 1], [-1, UNFILLED, UNFILLED]]
    assert places([4, 0, 1]) == [[1, -1, 0], [2, UNFILLED, UNFILLED]]
    assert places([0, 1, 2]) == [[0, 2, UNFILLED], [1, UNFILLED, UNFILLED]], "cut off at the end: to be filled again"
    twice = rows.clone()
    twice[:, 2] = twice[:, 0]
    assert relocated(exact, twice, twice[:, [0, 2, 4]]).positions[0].tolist() == [0, 1, 2]


REPLACEMENTS = {
    "other width": lambda keys: keys[..., :-1],
    "other dtype": lambda keys: keys.half(),
    "fewer sequences": lambda keys: keys[:1],
    "nothing": lambda keys: None,
}


@pytest.mark.parametrize("replacement", REPLACEMENTS)
def test_rows_of_another_kind_put_in_by_hand_are_refused(replacement: str) -> None:
    model = patch_model_with_kvsplice(build(NAME), KVSpliceConfig(compression_ratio=0.5, sink_tokens=2))
    cache = filled(model, tokens(9, batch=2))
    for layer in cache.layers:
        layer.keys = REPLACEMENTS[replacement](layer.keys)
    with torch.no_grad(), pytest.raises((CacheMismatchError, AttributeError)):
        model(tokens(1, batch=2), position_ids=torch.full((2, 1), 9), **cache_argument(cache))


@pytest.mark.parametrize("how", ["copy.copy of the layers", "copy.deepcopy", "pickle"])
def test_copies_of_a_cache_go_on_apart(how: str) -> None:
    model = patch_model_with_kvsplice(build(NAME), KVSpliceConfig(compression_ratio=0.5, sink_tokens=2))
    prompt, ways = tokens(9), [tokens(5, seed=1), tokens(5, seed=2)]
    expected = []
    for way in ways:
        cache = filled(model, prompt)
        steps(model, cache, tokens(2, seed=7), 9)
        expected.append(steps(model, cache, way, 11))
    cache = filled(model, prompt)
    steps(model, cache, tokens(2, seed=7), 9)
    if how == "pickle":
        other = pickle.loads(pickle.dumps(cache))
    elif how == "copy.deepcopy":
        other = copy.deepcopy(cache)
    else:
        other = copy.copy(cache)
        other.layers = [copy.copy(layer) for layer in cache.layers]
    parts: list[list[torch.Tensor]] = [[], []]
    for index in range(5):  # by turns
        for part, each, way in zip(parts, (cache, other), ways, strict=True):
            part.append(steps(model, each, way[:, index : index + 1], 11 + index))
    for part, whole in zip(parts, expected, strict=True):
        torch.testing.assert_close(torch.cat(part, 1), whole, atol=1e-6, rtol=0)


# ------------------------------------------------------------------------------------------ of another splice


def two_splices(kind: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    first, second = build(NAME), build(NAME)
    if kind == "packed":
        for model in (first, second):  # rows of one layout
            config = KVSpliceConfig(bits=4.0, sink_tokens=2)
            patch_model_with_kvsplice(model, config, calibration=calibrated(model))
        with torch.no_grad():
            for layer in second.model.layers:
                layer.self_attn.kvsplice.codec.centres += 0.1
    else:
        for model, init in ((first, "svd"), (second, "orthogonal")):
            patch_model_with_kvsplice(model, KVSpliceConfig(compression_ratio=0.5, init=init, sink_tokens=0))
    return first, second


def load_the_other(first: PreTrainedModel, second: PreTrainedModel, folder: Path) -> None:
    save_kvsplice(second, folder)
    load_kvsplice(first, folder)


def train_a_step(first: PreTrainedModel, second: PreTrainedModel, folder: Path) -> None:
    splice = first.model.layers[0].self_attn.kvsplice
    with torch.no_grad():
        splice.compress.weight += 0.01


def replace_a_parameter(first: PreTrainedModel, second: PreTrainedModel, folder: Path) -> None:
    splice = first.model.layers[0].self_attn.kvsplice
    splice.expand.weight.data = splice.expand.weight.data * 1.01


def load_a_state_dict(first: PreTrainedModel, second: PreTrainedModel, folder: Path) -> None:
    first.load_state_dict(second.state_dict())


CHANGES = [load_the_other, train_a_step, replace_a_parameter, load_a_state_dict]


@pytest.mark.parametrize("by_pickle", [False, True])
@pytest.mark.parametrize("kind", ["plain", "packed"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_cache_of_another_splice_is_refused_and_an_empty_one_is_taken(
    change: Any, kind: str, by_pickle: bool, tmp_path: Path
) -> None:
    first, second = two_splices(kind)
    cache, empty = filled(first, tokens(9)), KVSpliceCache(first)
    if by_pickle:
        cache = pickle.loads(pickle.dumps(cache))
    change(first, second, tmp_path)
    with pytest.raises(CacheMismatchError, match="coded by another splice"):
        steps(first, cache, tokens(1), 9)
    assert filled(first, tokens(9), empty).get_seq_length() == 9
    cache.reset()
    assert filled(first, tokens(9), cache).get_seq_length() == 9


SAME = {
    "merging": lambda model, folder: merge_kvsplice(model),
    "merging and back": lambda model, folder: unmerge_kvsplice(merge_kvsplice(model)),
    "its own file": lambda model, folder: load_kvsplice(model, save_kvsplice(model, folder)),
    "a copy": lambda model, folder: copy.deepcopy(model),
    "training mode": lambda model, folder: model.train().eval(),
    "gradients asked for": lambda model, folder: model.requires_grad_(True),
}


@pytest.mark.parametrize("kind", ["plain", "packed"])
@pytest.mark.parametrize("what", SAME)
def test_a_splice_stays_the_same_through(what: str, kind: str, tmp_path: Path) -> None:
    model, _ = two_splices(kind)
    expected = steps(model, filled(model, tokens(9)), tokens(3, seed=1), 9)
    cache = pickle.loads(pickle.dumps(filled(model, tokens(9))))
    model = SAME[what](model, tmp_path) or model
    torch.testing.assert_close(steps(model, cache, tokens(3, seed=1), 9), expected, atol=2e-4, rtol=0)


def test_the_file_says_whose_codes_it_reads(tmp_path: Path) -> None:
    import json

    model, _ = two_splices("packed")
    save_kvsplice(model, tmp_path)
    described = json.loads((tmp_path / "kvsplice_config.json").read_text("utf-8"))["identities"]
    for index, layer in enumerate(model.model.layers):
        assert described[str(index)] == layer.self_attn.kvsplice.identity


# ------------------------------------------------------------------------------------------ training loops


@pytest.mark.parametrize("kind", ["plain", "packed"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("chunks", [[20], [13, 7], [8, 1, 1, 10]])
def test_a_loop_with_gradients_computes_what_one_call_without_a_cache_does(
    chunks: list[int], training: bool, kind: str
) -> None:
    """Also its gradients: of the last chunk, whatever the past was."""
    model, _ = two_splices(kind)
    model.train(training).requires_grad_(True)
    ids = tokens(20, batch=2)

    def gradients(through_cache: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        if through_cache:
            cache, parts = None, []
            for part in ids.split(chunks, dim=1):
                output = model(part, use_cache=True, **cache_argument(cache))
                cache, logits = cache_of(output), output.logits
                parts.append(logits)
            assert cache.get_seq_length() == 20
            logits = torch.cat(parts, 1)
        else:
            logits = model(ids, use_cache=False).logits
        logits.square().mean().backward()
        return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    whole, expected = gradients(False)
    logits, found = gradients(True)
    torch.testing.assert_close(logits, whole, atol=5e-4 if kind == "packed" else TOLERANCE, rtol=0)
    assert set(found) == set(expected)
    if len(chunks) == 1 or kind == "plain":
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-4 * float(gradient.abs().max()) + 1e-6, rtol=1e-3)


@pytest.mark.parametrize("name", [name for name, spec in TINY_MODELS.items() if not spec.is_hybrid])
def test_a_model_in_training_remembers_its_prompt(name: str) -> None:
    model = patch_model_with_kvsplice(build(name), KVSpliceConfig(compression_ratio=0.5, sink_tokens=2))
    ids, _ = tiny_batch(name, pad=0)
    with torch.no_grad():
        expected = model(ids[:, -1:], **cache_argument(cache_of(model(ids[:, :-1], use_cache=True)))).logits
    model.train()
    output = model(ids[:, :-1], use_cache=True)
    assert cache_of(output).get_seq_length() == ids.shape[1] - 1
    logits = model(ids[:, -1:], **cache_argument(cache_of(output))).logits
    torch.testing.assert_close(logits.detach(), expected, atol=TOLERANCE, rtol=0)


def test_a_cache_that_the_caller_holds_is_filled_in_training() -> None:
    model = patch_model_with_kvsplice(build(NAME), KVSpliceConfig(compression_ratio=0.5)).train()
    cache = DynamicCache()
    model(tokens(9), **cache_argument(cache))
    assert cache.get_seq_length() == 9
