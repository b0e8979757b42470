"""Caches in files: what comes back is what was saved, and nothing else comes back."""

import copy
import json
import random
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ordinary_models import build_ordinary
from safetensors.torch import save_file
from test_packed import calibrated
from tiny_models import TINY_MODELS, build, tiny_batch
from transformers import DynamicCache, QuantizedCache, StaticCache
from transformers.cache_utils import Cache, StaticLayer

from kvsplice_hf import (
    CacheMismatchError,
    CheckpointError,
    ConfigError,
    KVSpliceConfig,
    PromptCache,
    UnsupportedError,
    cache_nbytes,
    describe_cache,
    load_cache,
    patch_model_with_kvsplice,
    save_cache,
    save_kvsplice,
    unpatch_model,
)
from kvsplice_hf.rest import file as cache_file
from kvsplice_hf.upstream import CACHE_NAME, cache_argument


NAME, ROOM = "deepseek_v3", 24
MODELS = [NAME, "bailing_hybrid", "dots3_note", "mistral_large4", "llama", "mistral", "gemma2", "gpt2", "gpt_oss"]
RECIPES = ["stock", "packed"]
KINDS = ["dynamic", "static"]
# What `save_cache` is told of compression.
FORMS = [None, "entropy"]


def made(name: str, recipe: str, **changes: Any) -> Any:
    model = build(name, **changes) if name in TINY_MODELS else build_ordinary(name, **changes)
    if recipe == "packed":
        patch_model_with_kvsplice(model, KVSpliceConfig(bits=5.0, sink_tokens=2), calibration=calibrated(model))
    return model


def empty(model: Any, kind: str) -> Cache:
    config = model.config.get_text_config(decoder=True)
    return StaticCache(config=config, max_cache_len=ROOM) if kind == "static" else DynamicCache(config=config)


@torch.no_grad()
def filled(model: Any, kind: str = "dynamic", length: int = 12) -> tuple[Cache, torch.Tensor, torch.Tensor]:
    """A cache of two sequences, one of them padded on the left, with its tokens and mask."""
    ids, mask = tiny_batch(model, length=length)
    cache = empty(model, kind)
    model(ids, attention_mask=mask, use_cache=True, **cache_argument(cache))
    return cache, ids, mask


@torch.no_grad()
def steps(model: Any, cache: Cache, mask: torch.Tensor, count: int = 3) -> torch.Tensor:
    found = []
    for _ in range(count):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        place = (mask.cumsum(-1) - 1)[:, -1:]
        token = torch.full((len(mask), 1), 9)
        output = model(token, attention_mask=mask, position_ids=place, use_cache=True, **cache_argument(cache))
        found.append(output.logits)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_cache_goes_on_bit_for_bit_as_the_saved_one(name: str, recipe: str, kind: str, tmp_path: Path) -> None:
    model = made(name, recipe)
    cache, ids, mask = filled(model, kind)
    for form in FORMS:
        nbytes = save_cache(cache, tmp_path / str(form), model, input_ids=ids, attention_mask=mask, compress=form)
        assert nbytes == (tmp_path / str(form)).stat().st_size < 3 * cache_nbytes(cache) + 40_000
    size, expected = cache_nbytes(cache), steps(model, cache, mask)
    for form in FORMS:
        loaded = load_cache(model, tmp_path / str(form))
        assert type(loaded) is type(cache)
        assert cache_nbytes(loaded) == size
        assert torch.equal(steps(model, loaded, mask), expected), form


def test_a_file_says_what_it_stands_for(tmp_path: Path) -> None:
    model = made(NAME, "packed")
    cache, ids, mask = filled(model)
    save_cache(cache, tmp_path / "cache", model, input_ids=ids, attention_mask=mask)
    found = describe_cache(tmp_path / "cache")
    assert (found.length, found.lengths, found.static, found.spliced) == (12, (12, 9), False, (0, 1))
    assert torch.equal(found.input_ids, ids)
    assert found.model == "DeepseekV3Model"
    assert found.nbytes == (tmp_path / "cache").stat().st_size


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3},
    "several answers": {"do_sample": True, "num_return_sequences": 2},
    "looked up in the prompt": {"prompt_lookup_num_tokens": 2},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [NAME, "llama", "mistral"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_generate_goes_on_from_a_loaded_cache_as_from_the_saved_one(
    recipe: str, name: str, mode: str, tmp_path: Path
) -> None:
    model = made(name, recipe)
    ids = tiny_batch(model, batch=1, length=16)[0]
    cache = empty(model, "dynamic")
    with torch.no_grad():
        model(ids[:, :12], use_cache=True, **cache_argument(cache))
    for form in FORMS:
        save_cache(cache, tmp_path / str(form), model, input_ids=ids, compress=form)

    def answer(past: Cache) -> torch.Tensor:
        torch.manual_seed(0)
        batch = MODES[mode].get("num_beams", MODES[mode].get("num_return_sequences", 1))
        past.batch_repeat_interleave(batch if mode == "beams" else 1)
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, **MODES[mode], **cache_argument(past)
        )

    if mode in ("beams", "several answers"):  # generate repeats what it is given itself, or not: the same for both
        cache.batch_repeat_interleave(1)
    saved = copy.deepcopy(cache)
    try:
        expected = answer(saved)
    except (ValueError, RuntimeError, IndexError) as error:
        pytest.skip(f"generate does not go on from a cache in this mode: {error}")
    for form in FORMS:
        assert torch.equal(answer(load_cache(model, tmp_path / str(form), input_ids=ids)), expected), form


@pytest.mark.parametrize("form", FORMS)
def test_an_offloaded_cache_is_saved_and_loaded_whole(form: str | None, tmp_path: Path) -> None:
    model = made(NAME, "packed")
    (cache, _, mask), plain = filled(model), filled(model)[0]
    for layer in cache.layers:
        layer.offload()
    save_cache(cache, tmp_path / "cache", model, compress=form)
    assert torch.equal(steps(model, load_cache(model, tmp_path / "cache"), mask), steps(model, plain, mask))


@pytest.mark.parametrize("form", FORMS)
def test_another_process_reads_a_splice_and_a_cache_and_writes_the_same_tokens(
    form: str | None, tmp_path: Path
) -> None:
    model = made(NAME, "packed")
    ids = tiny_batch(model, batch=1)[0]
    cache = empty(model, "dynamic")
    with torch.no_grad():
        model(ids[:, :-1], use_cache=True, **cache_argument(cache))
    save_cache(cache, tmp_path / "cache", model, input_ids=ids, compress=form)
    save_kvsplice(model, tmp_path / "splice")
    model.save_pretrained(tmp_path / "model")
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, **cache_argument(cache))
    program = f"""
import torch
from transformers import AutoModelForCausalLM
from kvsplice_hf import load_cache, load_kvsplice
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "model")!r}).eval()
load_kvsplice(model, {str(tmp_path / "splice")!r})
ids = torch.tensor({ids.tolist()})
cache = load_cache(model, {str(tmp_path / "cache")!r}, input_ids=ids)
print(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, {CACHE_NAME}=cache).tolist())
"""
    unpatch_model(model)
    model.save_pretrained(tmp_path / "model")
    found = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert json.loads(found.stdout.splitlines()[-1]) == answer.tolist()


# ------------------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("name", [NAME, "llama"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_first_tokens_of_a_cache_are_loaded_as_if_there_had_been_no_more(
    recipe: str, kind: str, name: str, tmp_path: Path
) -> None:
    model = made(name, recipe)
    cache, ids, mask = filled(model, kind)
    save_cache(cache, tmp_path / "smaller", model, input_ids=ids, compress="entropy")
    save_cache(cache, tmp_path / "cache", model, input_ids=ids)
    if kind == "static" and not hasattr(StaticLayer, "crop"):
        with pytest.raises(CacheMismatchError, match="no part can be loaded"):
            load_cache(model, tmp_path / "cache", tokens=7)
        pytest.skip("static caches of this transformers cannot be cropped")
    cache.crop(-5)
    expected = steps(model, cache, mask[:, :7])
    for file in ("cache", "smaller"):
        loaded = load_cache(model, tmp_path / file, tokens=7)
        assert int(loaded.get_seq_length()) == 7
        assert torch.equal(steps(model, loaded, mask[:, :7]), expected), file


def test_a_window_that_has_closed_has_no_first_part(tmp_path: Path) -> None:
    model = made("mistral", "packed")
    cache = filled(model)[0]
    for form in FORMS:
        save_cache(cache, tmp_path / "cache", model, compress=form)
        with pytest.raises(CacheMismatchError, match="no part can be loaded"):
            load_cache(model, tmp_path / "cache", tokens=7)


# ---------------------------------------------------------------------------------------------------------- refusals


def other_weights(model: Any) -> Any:
    with torch.no_grad():
        next(model.parameters()).add_(0.5)
    return model


def other_settings(model: Any) -> Any:
    model.config.rms_norm_eps = 0.1
    return model


def other_splice(model: Any) -> Any:
    unpatch_model(model)
    return patch_model_with_kvsplice(model, KVSpliceConfig(bits=4.0, sink_tokens=2), calibration=calibrated(model))


def spliced(model: Any) -> Any:
    return patch_model_with_kvsplice(model, KVSpliceConfig(compression_ratio=0.5, init="identity"))


OTHERS = {
    "other weights": ("packed", other_weights, "other weights"),
    "other settings": ("packed", other_settings, "other settings"),
    "another dtype": ("stock", lambda model: model.to(torch.bfloat16), "another dtype"),
    "another splice": ("packed", other_splice, "coded by the splice"),
    "no splice": ("packed", unpatch_model, "coded by the splice"),
    "a splice where there was none": ("stock", spliced, "without a splice"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_the_cache_of_another_model_or_splice_is_refused_by_name(case: str, tmp_path: Path) -> None:
    recipe, change, message = OTHERS[case]
    model = made(NAME, recipe)
    cache = filled(model)[0]
    for form in FORMS:
        save_cache(cache, tmp_path / str(form), model, compress=form)
    changed = change(model)
    for form in FORMS:
        with pytest.raises(CacheMismatchError, match=message):
            load_cache(model if changed is None else changed, tmp_path / str(form))


def test_a_cache_that_another_splice_has_filled_is_not_saved(tmp_path: Path) -> None:
    model = made(NAME, "packed")
    cache = filled(model)[0]
    with pytest.raises(CacheMismatchError, match="coded by the splice"):
        save_cache(cache, tmp_path / "cache", other_splice(model))
    assert not list(tmp_path.iterdir())


PROMPTS = {
    "shorter than the cache": (lambda ids: ids[:, :8], "at least one more"),
    "as long as the cache": (lambda ids: ids, "at least one more"),
    "with another token": (lambda ids: torch.cat([ids[:, :5], ids[:, :1], ids[:, 6:], ids], 1), "from token 5 on"),
    "of one sequence": (lambda ids: torch.cat([ids, ids], 1)[:1], "at least one more"),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_a_prompt_that_does_not_go_on_from_the_cache_is_refused(case: str, tmp_path: Path) -> None:
    change, message = PROMPTS[case]
    model = made(NAME, "stock")
    cache, ids, _ = filled(model)
    save_cache(cache, tmp_path / "cache", model, input_ids=ids)
    with pytest.raises(CacheMismatchError, match=message):
        load_cache(model, tmp_path / "cache", input_ids=change(ids))
    load_cache(model, tmp_path / "cache", input_ids=torch.cat([ids, ids], 1))


def test_what_is_no_cache_or_cannot_be_saved_is_refused_by_name(tmp_path: Path) -> None:
    model = made("llama", "stock")
    cache, ids, _ = filled(model)
    with pytest.raises(ConfigError, match="no cache in this dict to save"):
        save_cache({}, tmp_path / "cache", model)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="empty"):
        save_cache(DynamicCache(), tmp_path / "cache", model)
    with pytest.raises(ConfigError, match="holds 2 sequences of 12"):
        save_cache(cache, tmp_path / "cache", model, input_ids=ids[:1])
    save_cache(cache, tmp_path / "cache", model)
    with pytest.raises(ConfigError, match="`tokens` is 13"):
        load_cache(model, tmp_path / "cache", tokens=13)
    odd = filled(model)[0]
    odd.layers[0].something = object()
    with pytest.raises(UnsupportedError, match=r"0\.something"):
        save_cache(odd, tmp_path / "odd", model)
    assert not (tmp_path / "odd").exists()


def test_a_quantised_cache_of_transformers_is_refused_by_name(tmp_path: Path) -> None:
    try:
        cache = QuantizedCache("fp8", made("llama", "stock").config)
    except (ImportError, ValueError, TypeError) as error:
        pytest.skip(f"no such cache here: {error}")
    model = made("llama", "stock")
    ids = tiny_batch(model)[0]
    with torch.no_grad():
        model(ids, use_cache=True, **cache_argument(cache))
    with pytest.raises(UnsupportedError, match="cannot be saved"):
        save_cache(cache, tmp_path / "cache", model)


# ------------------------------------------------------------------------------------------------------------- files


@pytest.fixture(name="saved", params=FORMS)
def _saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    model = made(NAME, "packed")
    cache, ids, _ = filled(model)
    save_cache(cache, tmp_path / "cache", model, input_ids=ids, compress=request.param)
    return model, tmp_path / "cache"


def test_no_changed_byte_goes_unnoticed(saved: tuple[Any, Path]) -> None:
    """A thousand files, each with one byte changed, bytes inserted, or an end cut off."""
    model, path = saved
    content, chance = path.read_bytes(), random.Random(0)
    header = int.from_bytes(content[:8], "little") + 8
    for number in range(1000):
        place = chance.randrange(header if number % 2 else len(content))
        kind = number % 5
        if kind == 0:
            changed = content[:place]
        elif kind == 1:
            changed = content[:place] + chance.randbytes(3) + content[place:]
        else:
            changed = content[:place] + bytes([content[place] ^ chance.randrange(1, 256)]) + content[place + 1 :]
        path.write_bytes(changed)
        with pytest.raises(CheckpointError):
            load_cache(model, path)
    path.write_bytes(content)
    load_cache(model, path)


def test_files_that_are_none_are_refused(saved: tuple[Any, Path], tmp_path: Path) -> None:
    model, path = saved
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_cache(model, tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_cache(model, tmp_path)
    save_file({"x": torch.zeros(2, dtype=torch.float32, device="cpu")}, tmp_path / "other")
    with pytest.raises(CheckpointError, match="not the file of a cache"):
        describe_cache(tmp_path / "other")


@pytest.mark.parametrize("form", FORMS)
def test_a_file_of_a_newer_version_is_refused(
    form: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = made(NAME, "packed")
    for version in ("NEWEST_VERSION", "PLAIN_VERSION"):
        monkeypatch.setattr(cache_file, version, 3)
    save_cache(filled(model)[0], tmp_path / "newer", model, compress=form)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="version 3; this release reads up to 2"):
        load_cache(model, tmp_path / "newer")


@pytest.mark.parametrize("form", FORMS)
def test_only_a_file_that_earlier_releases_cannot_read_has_a_newer_version(
    form: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = made(NAME, "packed")
    save_cache(filled(model)[0], tmp_path / "cache", model, compress=form)
    monkeypatch.setattr(cache_file, "NEWEST_VERSION", 1)
    if form is None:
        load_cache(model, tmp_path / "cache")
    else:
        with pytest.raises(CheckpointError, match="version 2; this release reads up to 1"):
            load_cache(model, tmp_path / "cache")


def test_a_full_disk_leaves_what_was_there(saved: tuple[Any, Path]) -> None:
    model, path = saved
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    cache = filled(model)[0]
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limits[1]))
        with pytest.raises(CheckpointError, match="cannot be written"):
            save_cache(cache, path, model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [found.name for found in path.parent.iterdir()] == [path.name]


def test_a_place_that_cannot_be_written_to_is_refused(saved: tuple[Any, Path]) -> None:
    model, path = saved
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_cache(filled(model)[0], path / "below a file", model)
    with pytest.raises(CheckpointError, match="cannot be made"):
        PromptCache(path)


# ------------------------------------------------------------------------------------------------------------- store


class Counted:
    """How many tokens a model was run on."""

    def __init__(self, model: Any) -> None:
        self.tokens = 0
        self._hook = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: Any, kwargs: Any) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        self.tokens += ids.shape[1]

    def close(self) -> int:
        self._hook.remove()
        return self.tokens


def prompt(length: int = 20, seed: int = 0) -> torch.Tensor:
    return tiny_batch(NAME, batch=1, length=length, seed=seed)[0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", [NAME, "llama"])
def test_a_stored_prompt_is_not_computed_again_and_answers_the_same(
    name: str, recipe: str, form: str | None, tmp_path: Path
) -> None:
    model, ids, store = made(name, recipe), prompt(), PromptCache(tmp_path, compress=form)
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5)
    counts = []
    for _ in range(2):
        counted = Counted(model)
        answer = model.generate(**store.prepare(model, ids, keep=15, max_new_tokens=5))
        counts.append(counted.close())
        assert torch.equal(answer, plain)
    assert counts == [15 + 5 + 4, 5 + 4]
    assert [entry.tokens for entry in store.entries()] == [15]
    assert describe_cache(store.entries()[0].path).compress == form


def test_a_store_reads_entries_of_every_form(tmp_path: Path) -> None:
    model, ids = made(NAME, "packed"), prompt()
    plain, smaller = PromptCache(tmp_path), PromptCache(tmp_path, compress="entropy")
    plain.prepare(model, ids, keep=10)
    smaller.prepare(model, ids, keep=15)
    assert {entry.tokens: describe_cache(entry.path).compress for entry in plain.entries()} == {10: None, 15: "entropy"}
    for store in (plain, smaller):
        assert int(store.find(model, ids).get_seq_length()) == 15
        assert int(store.find(model, ids[:, :15]).get_seq_length()) == 10


def test_the_longest_entry_that_a_prompt_begins_with_is_taken(tmp_path: Path) -> None:
    model, ids, store = made(NAME, "packed"), prompt(), PromptCache(tmp_path)
    for keep in (5, 12, 8):
        store.prepare(model, ids, keep=keep)
    assert int(store.find(model, ids).get_seq_length()) == 12
    assert int(store.find(model, ids[:, :12]).get_seq_length()) == 5
    assert store.find(model, prompt(seed=1)) is None
    assert sorted(entry.tokens for entry in store.entries()) == [5, 12]  # 8 were there, in 12


def test_entries_are_those_of_one_model_splice_and_tokenizer(tmp_path: Path) -> None:
    store, ids = PromptCache(tmp_path), prompt()
    model = made(NAME, "packed")
    store.prepare(model, ids)
    assert store.find(model, torch.cat([ids, ids], 1)) is not None
    assert store.find(made(NAME, "stock"), torch.cat([ids, ids], 1)) is None
    assert store.find(other_splice(model), torch.cat([ids, ids], 1)) is None


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    model = made(NAME, "packed")
    size = save_cache(filled(model)[0], tmp_path / "cache", model)
    store = PromptCache(tmp_path / "store", max_bytes=3 * size)
    prompts = [prompt(seed=seed) for seed in range(4)]
    for ids in prompts[:3]:
        store.prepare(model, ids)
    kept = [entry.tokens for entry in store.entries()]
    used = store.entries()
    assert kept == [19] * len(used)
    assert sum(entry.nbytes for entry in used) <= 3 * size
    oldest = used[0].path
    store.prepare(model, prompts[3])
    assert sum(entry.nbytes for entry in store.entries()) <= 3 * size
    assert len(used) < 3 or not oldest.exists()
    with pytest.raises(CheckpointError, match="Raise `max_bytes`"):
        PromptCache(tmp_path / "small", max_bytes=100).prepare(model, prompts[0])
    store.clear()
    assert not store.entries()


@pytest.mark.parametrize("form", FORMS)
def test_a_damaged_entry_is_told_of_removed_and_made_again(
    form: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, ids, store = made(NAME, "packed"), prompt(), PromptCache(tmp_path, compress=form)
    store.prepare(model, ids)
    path = store.entries()[0].path
    path.write_bytes(path.read_bytes()[:-1] + b"\0\1")
    assert store.find(model, torch.cat([ids, ids], 1)) is None
    assert "cannot be read, and is removed" in caplog.text
    assert not store.entries()
    store.prepare(model, ids)
    assert len(store.entries()) == 1


def test_an_entry_that_goes_while_it_is_opened_is_none_and_nothing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, ids, store = made(NAME, "packed"), prompt(), PromptCache(tmp_path)
    store.prepare(model, ids)
    opens = cache_file.safe_open

    def gone(path: Path, framework: str) -> Any:
        path.unlink()
        return opens(path, framework=framework)

    monkeypatch.setattr(cache_file, "safe_open", gone)
    assert store.find(model, torch.cat([ids, ids], 1)) is None
    assert "removed" not in caplog.text


def test_what_a_killed_writer_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    model, store = made(NAME, "packed"), PromptCache(tmp_path)
    store.prepare(model, prompt())
    left = store.entries()[0].path.parent / ".19-x.safetensors.0.tmp"
    left.write_bytes(b"half")
    store.prepare(model, prompt(seed=1))
    assert not left.exists()
    assert len(store.entries()) == 2


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "two sequences": (lambda: prompt().repeat(2, 1), {}, "one by one"),
    "padding": (prompt, {"attention_mask": torch.zeros(1, 20)}, "masked tokens"),
    "more than all": (prompt, {"keep": 20}, "0 to 19 can be kept"),
    "images": (prompt, {"pixel_values": torch.zeros(1, 3, 2, 2)}, "`pixel_values` would change"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_prompts_that_tokens_alone_do_not_name_are_refused(case: str, tmp_path: Path) -> None:
    ids, inputs, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        PromptCache(tmp_path).prepare(made(NAME, "stock"), ids(), **inputs)
    with pytest.raises(ConfigError, match="training mode"):
        PromptCache(tmp_path).prepare(made(NAME, "stock").train(), prompt())
    with pytest.raises(ConfigError, match="max_bytes"):
        PromptCache(tmp_path, max_bytes=0)
    with pytest.raises(ConfigError, match="`compress` is 'smaller'"):
        PromptCache(tmp_path, compress="smaller")
