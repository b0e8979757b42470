"""What is relied on in transformers: checked when patching, watched while running, and said in one place.

Each change of upstream that would leave the cache uncompressed has to raise, and does so here: the changes are made to
the attention class of a tiny model, or to what the patch sees of a call.
"""

import ast
import logging
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from test_packed import calibrated
from tiny_models import TINY_MODELS, build, tiny_batch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

import kvsplice_hf
from kvsplice_hf import (
    CacheMismatchError,
    KVSpliceCache,
    KVSpliceConfig,
    TransformersTooOldError,
    UpstreamChangedError,
    cache_nbytes,
    get_kv_cache_size,
    patch_model_with_kvsplice,
    unpatch_model,
    upstream,
)
from kvsplice_hf.cache.rows import CompressedLatent
from kvsplice_hf.cache.splicing import SplicedLayerMixin
from kvsplice_hf.evaluation import score_windows
from kvsplice_hf.gpt2_mla import GPT2MLAConfig, GPT2MLAForCausalLM
from kvsplice_hf.training import KVSpliceTrainer, KVSpliceTrainingArguments, freeze_all_but_kvsplice
from kvsplice_hf.upstream import cache_argument, cache_of


NAME = "deepseek_v3"
HALF = KVSpliceConfig(compression_ratio=0.5, sink_tokens=2)
PACKAGE = Path(kvsplice_hf.__file__).parent
all_architectures = pytest.mark.parametrize("name", TINY_MODELS)


def generated(model: PreTrainedModel, name: str = NAME, **settings: Any) -> Cache:
    """The cache that `generate` leaves after a few tokens."""
    ids, mask = tiny_batch(name)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0} | settings
    return cache_of(model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **settings))


# ------------------------------------------------------------------------- what is compressed after `generate`

BYTES_MAY_DIFFER_BY = 1.02  # the formula's factor: linear-attention states are taken off before


@pytest.mark.parametrize("kind", ["half the rank", "packed"])
@all_architectures
def test_after_generate_every_patched_layer_is_ours_and_takes_the_bytes_of_the_formula(name: str, kind: str) -> None:
    model = build(name)
    others = cache_nbytes(generated(model, name))
    length = tiny_batch(name)[0].shape[1] + 3
    others -= get_kv_cache_size(model, length, batch_size=2).original_bytes  # linear-attention states
    if kind == "packed":
        config = KVSpliceConfig(bits=4.0, sink_tokens=2)
        patch_model_with_kvsplice(model, config, calibration=calibrated(model))
    else:
        patch_model_with_kvsplice(model, HALF)
    cache = generated(model, name)
    spliced = [index for index, layer in enumerate(cache.layers) if isinstance(layer, SplicedLayerMixin)]
    assert spliced == list(TINY_MODELS[name].mla_layers)
    promised = get_kv_cache_size(model, length, batch_size=2)
    found = cache_nbytes(cache) - others
    assert promised.compressed_bytes / BYTES_MAY_DIFFER_BY <= found <= promised.compressed_bytes * BYTES_MAY_DIFFER_BY
    assert found < promised.original_bytes


def test_the_output_serves_under_the_name_of_the_release_and_under_the_old_one() -> None:
    model = patch_model_with_kvsplice(build(NAME), HALF)
    ids, mask = tiny_batch(NAME)
    output = model.generate(ids, attention_mask=mask, max_new_tokens=3, pad_token_id=0, return_dict_in_generate=True)
    assert getattr(output, upstream.CACHE_NAME) is cache_of(output)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert output.past_key_values is cache_of(output)
        assert output["past_key_values"] is cache_of(output)
    assert cache_nbytes(output) == cache_nbytes(cache_of(output))


@pytest.mark.parametrize("old_name", [False, True])
def test_a_cache_may_be_handed_to_the_model_under_either_name(old_name: bool) -> None:
    model = patch_model_with_kvsplice(build(NAME), HALF)
    ids, _ = tiny_batch(NAME, pad=0)
    cache = DynamicCache()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(ids, **({"past_key_values": cache} if old_name else cache_argument(cache)))
    assert isinstance(cache.layers[0], SplicedLayerMixin)
    assert cache.get_seq_length() == ids.shape[1]


# ---------------------------------------------------------------------------------- changes seen when patching


def source_of(forward: Any) -> str:
    import inspect
    import textwrap

    return textwrap.dedent(inspect.getsource(inspect.unwrap(forward)))


def with_rewritten_forward(*replacements: tuple[str, str], name: str = NAME) -> PreTrainedModel:
    """A tiny model of the next release: the forward of its attention class with pieces of its source replaced."""
    model = build(name)
    stock = type(model.model.layers[0].self_attn)
    # Without decorators: the one that renames the cache belongs to the release at hand.
    source = source_of(stock.forward)
    source = source[source.index("def forward") :]
    for pattern, replacement in replacements:
        assert re.search(pattern, source), pattern
        source = re.sub(pattern, replacement, source)
    namespace = dict(vars(sys.modules[stock.__module__]))
    exec(compile(source, "<next release>", "exec"), namespace)
    changed = type(stock.__name__, (stock,), {"forward": namespace["forward"]})
    for layer in model.model.layers:
        layer.self_attn.__class__ = changed
    return model


CACHE = upstream.CACHE_NAME
NEXT_RELEASES: dict[str, tuple[tuple[str, str], ...]] = {
    "the cache is renamed again": ((rf"\b{CACHE}\b", "kv_memory"),),
    "the mask is renamed": ((r"\battention_mask\b", "mask"),),
    "the hidden states are renamed": ((r"\bhidden_states\b", "embeddings"),),
    "keys are made without expand_kv": (
        (r"key_states, value_states = self\.expand_kv\((\w+), (\w+)\)", r"key_states, value_states = \1, \2"),
    ),
    "the cache is written by something else than update": ((rf"\b{CACHE}\.update\(", f"{CACHE}.store("),),
    "the attention function is fixed": (
        (r"ALL_ATTENTION_FUNCTIONS\.get_interface\([^)]*\)", "eager_attention_forward"),
    ),
}


@pytest.mark.parametrize("change", NEXT_RELEASES)
def test_a_next_release_is_refused_by_name_when_patching_and_the_model_is_as_it_was(change: str) -> None:
    model = with_rewritten_forward(*NEXT_RELEASES[change])
    attributes = set(vars(model.model.layers[0].self_attn))
    with pytest.raises(UpstreamChangedError) as caught:
        patch_model_with_kvsplice(model, HALF)
    message = str(caught.value)
    assert "model.layers.0.self_attn (DeepseekV3Attention)" in message
    assert upstream.INSTALLED in message
    assert upstream.NEWEST_TESTED in message
    assert "pip install" in message
    assert set(vars(model.model.layers[0].self_attn)) == attributes


def test_a_class_that_hands_over_to_a_known_one_is_taken() -> None:
    def edit(stock: type) -> type:
        def forward(self: Any, hidden_states: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
            return stock.forward(self, hidden_states, attention_mask=attention_mask, **kwargs)

        # The cache has to be among the parameters, by one of its known names.
        namespace: dict[str, Any] = {"stock": stock}
        parameters = f"self, hidden_states, attention_mask=None, {CACHE}=None, **kwargs"
        call = f"stock.forward(self, hidden_states, attention_mask=attention_mask, {CACHE}={CACHE}, **kwargs)"
        exec(f"def forward({parameters}):\n    return {call}", namespace)
        return type(stock.__name__, (stock,), {"forward": namespace["forward"]})

    model = build(NAME)
    changed = edit(type(model.model.layers[0].self_attn))
    for layer in model.model.layers:
        layer.self_attn.__class__ = changed
    cache = generated(patch_model_with_kvsplice(model, HALF))
    assert all(isinstance(layer, SplicedLayerMixin) for layer in cache.layers)


def test_a_fixed_attention_function_is_no_hindrance_to_the_expanded_path() -> None:
    model = with_rewritten_forward(*NEXT_RELEASES["the attention function is fixed"])
    model.set_attn_implementation("eager")
    patch_model_with_kvsplice(model, KVSpliceConfig(compression_ratio=0.5, attention="expanded"))
    assert all(isinstance(layer, SplicedLayerMixin) for layer in generated(model).layers)


# --------------------------------------------------------------------------------- changes seen while running


@pytest.fixture
def patched() -> PreTrainedModel:
    return patch_model_with_kvsplice(build(NAME), HALF)


def hidden_from_the_hook(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "find_cache", lambda args, kwargs: None)


def past_the_hook(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    for layer in model.model.layers:
        layer.self_attn._forward_pre_hooks.clear()


def hidden_in_an_argument(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder layer hands the cache over inside of something else, and the module takes it out again."""
    stock = type(model.model.layers[0].self_attn).forward

    def forward(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        holder = kwargs.pop("holder")
        return stock(self, hidden_states, **kwargs, **cache_argument(holder[0]))

    def hide(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {name: value for name, value in kwargs.items() if name != CACHE} | {"holder": [kwargs.get(CACHE)]}

    for layer in model.model.layers:
        layer.self_attn.forward = forward.__get__(layer.self_attn)
        layer.self_attn.register_forward_pre_hook(hide, with_kwargs=True, prepend=True)


def update_ignores_our_layer(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cache, "update", lambda self, keys, values, layer_idx, *args, **kwargs: (keys, values))


def update_with_more_arguments(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = Cache.update

    def update(self: Any, keys: Any, values: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return stock(self, keys, values, layer_idx, *args, **kwargs, sequence_ids=torch.zeros(2))

    monkeypatch.setattr(Cache, "update", update)


def update_with_more_values(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = Cache.update

    def update(self: Any, keys: Any, values: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return self.layers[layer_idx].update(keys, values, torch.zeros(2))

    del stock
    monkeypatch.setattr(Cache, "update", update)


def expansion_is_skipped(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return hidden_states, None

    for layer in model.model.layers:
        layer.self_attn.forward = forward.__get__(layer.self_attn)


def other_attention_function(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module keeps the function that it found before the patch."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    stock = ALL_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setattr(type(ALL_ATTENTION_FUNCTIONS), "get_interface", lambda self, name, default: stock)


CHANGES: dict[str, Callable[[PreTrainedModel, pytest.MonkeyPatch], None]] = {
    "the hook does not find the cache": hidden_from_the_hook,
    "the hook is not run": past_the_hook,
    "the cache hides inside another argument": hidden_in_an_argument,
    "update does not come to our layer": update_ignores_our_layer,
    "update gets another keyword argument": update_with_more_arguments,
    "update gets another value": update_with_more_values,
    "expand_kv is never called": expansion_is_skipped,
    "the attention function is not looked up by our name": other_attention_function,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_while_running_raises_instead_of_running_uncompressed(
    change: str, patched: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    generated(patched)  # as it is, it runs
    CHANGES[change](patched, monkeypatch)
    with pytest.raises((UpstreamChangedError, CacheMismatchError)) as caught:
        generated(patched, max_new_tokens=40)  # long enough for attention on codes
    if isinstance(caught.value, UpstreamChangedError):
        assert upstream.INSTALLED in str(caught.value)
        assert upstream.NEWEST_TESTED in str(caught.value)


@pytest.mark.parametrize("keep_attention", [False, True])
def test_codes_that_are_taken_for_a_tensor_say_so(keep_attention: bool) -> None:
    codes = CompressedLatent(torch.zeros(1, 1, 3, 4), None, None, 1, 2)  # type: ignore[arg-type]
    with pytest.raises(UpstreamChangedError, match="transpose"):
        codes.transpose(2, 3)
    with pytest.raises(UpstreamChangedError, match="compressed codes came to"):
        torch.matmul(torch.zeros(1, 1, 1, 4), codes)  # type: ignore[call-overload]
    assert not hasattr(codes, "dtype_of_keys")


class NotACache:
    """Looks like one, as caches of other libraries do."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0

    def update(self, keys: Any, values: Any, *args: Any, **kwargs: Any) -> Any:
        return keys, values


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_object_that_is_no_cache_is_refused(patched: PreTrainedModel, name: str) -> None:
    attention, states = patched.model.layers[0].self_attn, torch.zeros(1, 3, 64)
    with pytest.raises(CacheMismatchError, match=r"NotACache; it needs a transformers `Cache`"):
        attention(states, attention_mask=None, position_embeddings=None, **{name: NotACache()})


def test_two_caches_in_one_call_are_refused(patched: PreTrainedModel) -> None:
    with pytest.raises(CacheMismatchError, match="two different caches"):
        upstream.find_cache((), {"first": DynamicCache(), "second": DynamicCache()})


def test_forward_called_past_the_module_is_refused(patched: PreTrainedModel) -> None:
    attention = patched.model.layers[0].self_attn
    with torch.no_grad(), pytest.raises(UpstreamChangedError, match="Call the module itself"):
        attention.expand_kv(torch.zeros(1, 1, 3, 32), torch.zeros(1, 1, 3, 8))


def test_hooks_and_state_are_gone_after_unpatching(patched: PreTrainedModel) -> None:
    unpatch_model(patched)
    for module in patched.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


# ------------------------------------------------------------------------------------- deprecations of our own


def calibrate_and_patch(folder: Path) -> None:
    model = build(NAME)
    patch_model_with_kvsplice(model, bits=4, calibration=torch.randint(8, 128, (32, 64)))


def score(folder: Path) -> None:
    score_windows(patch_model_with_kvsplice(build(NAME), HALF), torch.randint(8, 128, (2, 24)), chunk=8, progress=False)


def generate_on_a_cache(folder: Path) -> None:
    model = patch_model_with_kvsplice(build(NAME), HALF)
    ids, mask = tiny_batch(NAME)
    model.generate(ids, attention_mask=mask, **cache_argument(KVSpliceCache(model)), max_new_tokens=3, pad_token_id=0)
    cache_nbytes(generated(model))


def run_gpt2_mla(folder: Path) -> None:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64, "kv_lora_rank": 16, "n_positions": 32}
    model = GPT2MLAForCausalLM(GPT2MLAConfig(**sizes, kvsplice={"compression_ratio": 0.5})).eval()
    ids = torch.randint(0, 64, (1, 8))
    model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    model(ids, labels=ids).loss.backward()
    model.save_pretrained(folder)
    GPT2MLAForCausalLM.from_pretrained(folder)


def fine_tune(folder: Path) -> None:
    rows = [{"input_ids": ids} for ids in torch.randint(8, 128, (4, 16))]
    model = freeze_all_but_kvsplice(patch_model_with_kvsplice(build(NAME), HALF))
    settings = {"max_steps": 2, "save_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    KVSpliceTrainer(model, KVSpliceTrainingArguments(str(folder), **settings), train_dataset=rows).train()


OWN_CALLS = [calibrate_and_patch, score, generate_on_a_cache, run_gpt2_mla, fine_tune]


@pytest.mark.parametrize("call", OWN_CALLS, ids=lambda call: call.__name__)
def test_no_deprecation_warning_of_transformers_comes_from_our_own_calls(
    call: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    # `warning_once` of transformers says a thing once per process, by logging.
    monkeypatch.setattr(logging.Logger, "warning_once", lambda self, message, *args: said.append(str(message)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(tmp_path)
    said += [str(item.message) for item in caught]
    assert [message for message in said if "deprecated" in message.lower()] == []


# ------------------------------------------------------------------------------------------------- releases


def with_version(version: str, code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process in which transformers says that it is of this version."""
    head = f"import transformers; transformers.__version__ = {version!r}\n"
    return subprocess.run([sys.executable, "-c", head + code], capture_output=True, text=True, check=False)


def test_transformers_below_the_oldest_is_refused_at_import_with_both_numbers() -> None:
    result = with_version("5.14.1", "import kvsplice_hf")
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert "TransformersTooOldError: kvsplice_hf needs transformers>=5.15.0" in last
    assert "5.14.1 is installed" in last
    assert issubclass(TransformersTooOldError, ImportError)


def test_transformers_above_the_newest_tested_is_warned_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(upstream, "INSTALLED", "99.0.0")
    upstream.warn_if_newer_than_tested.cache_clear()
    with caplog.at_level(logging.WARNING, logger="kvsplice_hf"):
        for _ in range(2):
            patch_model_with_kvsplice(build(NAME), HALF)
    upstream.warn_if_newer_than_tested.cache_clear()
    found = [record.getMessage() for record in caplog.records if "newer than" in record.getMessage()]
    assert len(found) == 1
    assert "99.0.0" in found[0]
    assert upstream.NEWEST_TESTED in found[0]


def test_the_newest_tested_release_is_the_bound_of_the_package_and_the_pin_of_the_constraints() -> None:
    root = PACKAGE.parent
    if not (root / "setup.cfg").exists():
        pytest.skip("not run from a checkout")
    oldest, newest = upstream.MIN_TRANSFORMERS.split("."), upstream.NEWEST_TESTED.split(".")
    bounds = f"transformers>={oldest[0]}.{oldest[1]},<{newest[0]}.{int(newest[1]) + 1}"
    assert bounds in (root / "setup.cfg").read_text("utf-8")
    assert f"\ntransformers=={upstream.NEWEST_TESTED}\n" in (root / "constraints.txt").read_text("utf-8")


def test_continuous_batching_is_there_from_the_release_on_that_it_was_written_for() -> None:
    there = Version(upstream.INSTALLED) >= Version(upstream.MIN_TRANSFORMERS_PAGED)
    assert (upstream.ContinuousBatchingManager is not None) == there


# What other rooms may take from transformers: its public classes, and these.
ELSEWHERE = {"cache_utils", "activations", "modeling_layers", "modeling_outputs", "utils", "trainer", "models"}
INTERNALS = ("masking_utils", "modeling_utils", "generation")


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_only_one_room_knows_the_internals_of_transformers() -> None:
    found = {
        f"{path.relative_to(PACKAGE)}: {module}"
        for path in PACKAGE.rglob("*.py")
        for module in imports_of(path)
        if path.name != "upstream.py" and any(module.startswith(f"transformers.{name}") for name in INTERNALS)
    }
    # The attention class of GPT-2 MLA is an MLA module itself, and looks its function up as all of them do. The base
    # class of streamers is public, and exported from nowhere else.
    assert found == {
        "gpt2_mla/attention.py: transformers.modeling_utils",
        "calibration/sampling.py: transformers.generation.streamers",
    }


def test_only_one_room_spells_the_old_name_of_the_cache_argument() -> None:
    # As the keyword of a call, a string or an attribute, in scripts too: transformers warns of it. (A forward of ours
    # has a parameter of that name.)
    scripts = PACKAGE.parent / "scripts"
    found = [
        f"{path.name}:{node.lineno}"
        for path in (*PACKAGE.rglob("*.py"), *scripts.rglob("*.py"))
        if path.name != "upstream.py"
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if (isinstance(node, ast.Constant) and node.value == "past_key_values")
        or (isinstance(node, ast.keyword) and node.arg == "past_key_values")
        or (isinstance(node, ast.Attribute) and node.attr == "past_key_values")
    ]
    assert found == []
