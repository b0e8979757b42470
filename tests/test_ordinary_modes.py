"""Ordinary attention in every mode of cache: offloaded, compiled, beside linear attention, on weights elsewhere."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import dispatch_model
from ordinary_models import HYBRID_MODELS, MERGED_MODELS, build_ordinary
from packaging.version import Version
from test_generate import _NoStream
from test_offloaded import WAYS
from test_ordinary import KINDS, SINKS, calibrated, calibration_of, packed, rms, step_by_step, tokens, uncached
from torch import nn
from transformers import CompileConfig, DynamicCache, PreTrainedModel, StaticCache

from kvsplice_hf import (
    CacheMismatchError,
    KVSpliceCache,
    KVSpliceConfig,
    NotMLAError,
    UnsupportedError,
    cache_nbytes,
    get_kv_cache_size,
    load_kvsplice,
    merge_kvsplice,
    patch_model_with_kvsplice,
    save_kvsplice,
    splice_disabled,
    unmerge_kvsplice,
    unpatch_model,
)
from kvsplice_hf.cache.splicing import SplicedLayerMixin
from kvsplice_hf.upstream import cache_argument, cache_of


PROMPT, ROOM = 12, 32
TEN_TOKENS: dict[str, Any] = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
CACHES: dict[str, Callable[[Any], Any]] = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=ROOM),
}
all_kinds = pytest.mark.parametrize("name", KINDS)
every_cache = pytest.mark.parametrize("kind", CACHES)


def needs_static_chunks(name: str) -> None:
    if name == "llama4_text" and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("chunked attention has no static cache in this release of transformers")


@torch.no_grad()
def in_steps(run: Any, cache: Any, ids: torch.Tensor, prompt: int = PROMPT) -> torch.Tensor:
    """Logits of a prompt and of single tokens behind it, through a cache of the caller."""
    logits = [run(ids[:, :prompt], use_cache=True, **cache_argument(cache)).logits] if prompt else []
    for place in range(prompt, ids.shape[1]):
        position = torch.full((ids.shape[0], 1), place)
        step = run(ids[:, place : place + 1], position_ids=position, use_cache=True, **cache_argument(cache))
        logits.append(step.logits)
    return torch.cat(logits, dim=1)


# ------------------------------------------------------------------------------------------------- offloaded caches


@all_kinds
@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
def test_an_offloaded_cache_generates_the_same_tokens(
    name: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "mistral" and implementation == "offloaded_static":
        pytest.skip("stock transformers has no offloaded static cache where all layers have a window")
    needs_static_chunks(name)
    monkeypatch.setattr(torch, "Stream", _NoStream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device=None: _NoStream())
    model = packed(name)
    expected = model.generate(tokens(2, PROMPT), **TEN_TOKENS)
    assert torch.equal(model.generate(tokens(2, PROMPT), cache_implementation=implementation, **TEN_TOKENS), expected)


# ------------------------------------------------------------------------------------------------- torch.compile


class Counting:
    """A backend that compiles nothing, and counts the graphs that it is given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        return graph

    def __deepcopy__(self, memo: Any) -> "Counting":  # as `generate` copies its settings
        return self


# Of gpt_oss a layer with a window and one without.
@pytest.mark.compiles
@pytest.mark.parametrize(("name", "kind"), [("llama", "dynamic"), ("gpt_oss", "static")])
def test_compiled_models_have_no_graph_breaks(name: str, kind: str) -> None:
    model, ids = packed(name), tokens(1, PROMPT + 2)
    expected = in_steps(model, CACHES[kind](model), ids)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(in_steps(compiled, CACHES[kind](model), ids), expected, atol=2e-5, rtol=0)


@pytest.mark.compiles
@pytest.mark.parametrize("name", ["gpt_oss", "gpt2"])
def test_steps_on_a_static_cache_are_compiled_as_often_as_those_of_the_stock_model(name: str) -> None:
    graphs = []
    for model in (build_ordinary(name), packed(name)):
        torch._dynamo.reset()
        backend, cache, ids = Counting(), CACHES["static"](model), tokens(1, PROMPT + 8)
        expected = in_steps(model, CACHES["static"](model), ids)[:, PROMPT:]
        in_steps(model, cache, ids[:, :PROMPT])
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        found = [
            compiled(
                ids[:, place : place + 1],
                position_ids=torch.tensor([[place]]),
                use_cache=True,
                **cache_argument(cache),
            ).logits
            for place in range(PROMPT, PROMPT + 8)
        ]
        torch.testing.assert_close(torch.cat(found, 1), expected, atol=2e-5, rtol=0)
        graphs.append(backend.graphs)
    assert graphs[1] <= graphs[0]


@pytest.mark.compiles
def test_generate_compiles_the_steps_on_a_static_cache() -> None:
    model, backend = packed("llama"), Counting()
    expected = model.generate(tokens(1, PROMPT), **TEN_TOKENS)
    torch._dynamo.reset()
    how = CompileConfig(backend=backend, fullgraph=True, mode=None)
    how._compile_all_devices = True  # by default only on accelerators
    found = model.generate(tokens(1, PROMPT), cache_implementation="static", compile_config=how, **TEN_TOKENS)
    assert torch.equal(found, expected)
    assert backend.graphs


# ----------------------------------------------------------------------------------------------- beside other layers


@pytest.mark.parametrize("name", HYBRID_MODELS)
def test_attention_beside_layers_of_another_kind_keeps_the_contract(name: str) -> None:
    model = build_ordinary(name)
    stock, ids = uncached(model, tokens()), tokens()
    assert rms(uncached(packed(name, bits=16.5), ids) - stock) < 0.02 * rms(stock)
    model = packed(name)
    without, (within, cache) = uncached(model, ids), step_by_step(model, ids)
    loss = rms(without - stock)
    assert loss > 0
    assert rms(within - without) < 0.02 * loss
    assert [isinstance(layer, SplicedLayerMixin) for layer in cache.layers] == [False, True]
    unpatch_model(model)
    assert torch.equal(uncached(model, ids), stock)


@pytest.mark.parametrize("name", HYBRID_MODELS)
@pytest.mark.parametrize("mode", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_hybrid_models_generate_with_a_cache_what_they_do_without(name: str, mode: dict[str, Any]) -> None:
    model = packed(name)
    expected = model.generate(tokens(1, PROMPT), use_cache=False, **TEN_TOKENS)
    assert torch.equal(model.generate(tokens(1, PROMPT), **TEN_TOKENS, **mode), expected)


@pytest.mark.parametrize("name", HYBRID_MODELS)
def test_the_rows_of_hybrid_models_take_the_bytes_of_the_formula(name: str) -> None:
    model = packed(name)
    size, (_, cache) = get_kv_cache_size(model, seq_len=20), step_by_step(model, tokens(1, 20))
    cache.layers = [layer for layer in cache.layers if isinstance(layer, SplicedLayerMixin)]
    assert cache_nbytes(cache) == size.compressed_bytes < 0.75 * size.original_bytes


@pytest.mark.parametrize("name", HYBRID_MODELS)
def test_hybrid_models_have_no_pages(name: str) -> None:
    with pytest.raises(UnsupportedError, match=r"generate_batch.*(layers \[0\]|needs transformers)"):
        packed(name).generate_batch([tokens(1, 8)[0].tolist()])


@pytest.mark.parametrize("name", MERGED_MODELS)
def test_layers_that_are_attention_and_something_else_are_refused_by_name(name: str) -> None:
    model = build_ordinary(name)
    with pytest.raises(NotMLAError, match=r"Attention\) shares its cache layer"):
        patch_model_with_kvsplice(model, bits=5, calibration=list(tokens(12, 48)))


# ----------------------------------------------------------------------------------------------- offloaded weights


def by_device_map(model: Any, folder: Path) -> Any:
    """The second layer on a disk, everything else on the CPU, whatever the parts are called."""
    base, inner = model.base_model_prefix, model.base_model
    layers = next(name for name, part in inner.named_children() if isinstance(part, nn.ModuleList))
    devices = {name: "cpu" for name, _ in model.named_children() if name != base}
    devices |= {f"{base}.{name}": "cpu" for name, _ in inner.named_children() if name != layers}
    devices |= {f"{base}.{layers}.0": "cpu", f"{base}.{layers}.1": "disk"}
    return dispatch_model(model, devices, main_device="cpu", offload_dir=str(folder / "mapped"), force_hooks=True)


PLACES = WAYS | {"device map": by_device_map}
every_place = pytest.mark.parametrize("place", PLACES)
# Projections of their own; one for query, key and value; learned sinks and windows.
OFFLOADED = ["llama", "gpt2", "gpt_oss"]


@every_place
@pytest.mark.parametrize("name", OFFLOADED)
def test_an_offloaded_model_generates_saves_and_merges_as_a_loaded_one(name: str, place: str, tmp_path: Path) -> None:
    model = packed(name)
    expected, said = uncached(model, tokens()), model.generate(tokens(2, PROMPT), **TEN_TOKENS)
    model = PLACES[place](model, tmp_path)
    assert_near(model, expected)
    assert torch.equal(model.generate(tokens(2, PROMPT), **TEN_TOKENS), said)
    save_kvsplice(model, tmp_path / "splice")
    fresh = load_kvsplice(PLACES[place](build_ordinary(name), tmp_path / "fresh"), tmp_path / "splice")
    assert_near(fresh, expected)
    merge_kvsplice(model)
    assert_near(model, expected)
    unmerge_kvsplice(model)
    assert_near(model, expected)


def assert_near(model: PreTrainedModel, expected: torch.Tensor) -> None:
    """PyTorch may read what is offloaded, where C++ read what was loaded: sums in another order."""
    torch.testing.assert_close(uncached(model, tokens()), expected, atol=1e-4, rtol=0)


@every_place
@pytest.mark.parametrize("name", OFFLOADED)
def test_an_offloaded_model_is_calibrated_as_a_loaded_one(name: str, place: str, tmp_path: Path) -> None:
    model = PLACES[place](build_ordinary(name), tmp_path)
    known = calibrated(model)
    assert known.fingerprint == calibration_of(name).fingerprint
    patch_model_with_kvsplice(model, KVSpliceConfig(bits=5, sink_tokens=SINKS), calibration=known)
    torch.testing.assert_close(uncached(model, tokens()), uncached(packed(name), tokens()), atol=1e-3, rtol=0)
    unpatch_model(model)
    assert torch.equal(uncached(model, tokens()), uncached(build_ordinary(name), tokens()))


@pytest.mark.parametrize("place", ["disk", "device map"])
@pytest.mark.parametrize("name", OFFLOADED)
def test_an_offloaded_model_calibrates_itself_on_its_own_text(name: str, place: str, tmp_path: Path) -> None:
    found = []
    for model in (build_ordinary(name), PLACES[place](build_ordinary(name), tmp_path)):
        patch_model_with_kvsplice(model, KVSpliceConfig(bits=5, sink_tokens=SINKS))
        found.append(uncached(model, tokens()))
    torch.testing.assert_close(found[1], found[0], atol=1e-3, rtol=0)


# ------------------------------------------------------------------------------------ caches of other models


def filled(model: Any, kind: str) -> Any:
    cache = CACHES[kind](model)
    in_steps(model, cache, tokens(1, PROMPT))
    return cache


def step(model: PreTrainedModel, cache: Any) -> None:
    in_steps(model, cache, torch.cat([tokens(1, PROMPT), tokens(1, 1)], dim=1)[:, -1:], prompt=0)


@every_cache
@all_kinds
def test_a_stock_cache_with_tokens_is_refused_by_a_patched_model(name: str, kind: str) -> None:
    needs_static_chunks(name)
    cache = filled(build_ordinary(name), kind)
    with pytest.raises(CacheMismatchError, match="Cache layer 0 already holds 12 tokens stored without the splice"):
        step(packed(name), cache)


@every_cache
@all_kinds
def test_a_spliced_cache_is_refused_by_an_unpatched_model_which_stores_nothing(name: str, kind: str) -> None:
    needs_static_chunks(name)
    model = packed(name)
    cache, stock = filled(model, kind), build_ordinary(name)
    expected = in_steps(model, filled(model, kind), tokens(1, 1), prompt=0)
    for other in (cache, KVSpliceCache(model)):
        with pytest.raises(CacheMismatchError, match=r"module that is not patched.*a cache of its own"):
            step(stock, other)
    torch.testing.assert_close(in_steps(model, cache, tokens(1, 1), prompt=0), expected)


@every_cache
def test_a_spliced_cache_is_refused_by_another_model(kind: str) -> None:
    cache = filled(packed("llama"), kind)
    others = {"another splice": packed("llama", bits=7), "holds rows of": packed("gpt_neox")}
    for phrase, other in others.items():
        with pytest.raises(CacheMismatchError, match=phrase):
            step(other, cache)
    with splice_disabled(model := packed("llama")), pytest.raises(CacheMismatchError, match="splice disabled"):
        step(model, cache)


def test_the_cache_that_generate_returns_goes_on_in_the_next_turn() -> None:
    model = packed("llama")
    first = model.generate(tokens(1, PROMPT), return_dict_in_generate=True, **TEN_TOKENS)
    ids = torch.cat([first.sequences, tokens(1, 4)], dim=1)
    expected = model.generate(ids, **TEN_TOKENS)
    assert torch.equal(model.generate(ids, **cache_argument(cache_of(first)), **TEN_TOKENS), expected)
