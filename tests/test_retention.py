"""Retention: whole rows of tokens go, stock or spliced, positions stay, and softmax runs over what is left.

What is computed is held against a reference that keeps everything and masks what was dropped.
"""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import byte_tokenizer, trained_model
from ordinary_models import VOCABULARY, build_ordinary
from packaging.version import Version
from programs import run_program
from test_ordinary import packed as packed_ordinary
from test_packed import SINKS, calibrated
from test_packed import packed as packed_latents
from tiny_models import FIRST_ORDINARY_TOKEN, TINY_MODELS, build
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel, StaticCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from kvsplice_hf import (
    CacheMismatchError,
    ConfigError,
    KVSpliceCache,
    KVSpliceConfig,
    NotMLAError,
    PromptCache,
    UnsupportedError,
    cache_nbytes,
    explain,
    get_kv_cache_size,
    patch_model_with_kvsplice,
    save_cache,
    splice_disabled,
    upstream,
)
from kvsplice_hf.cache.heads import CompressedHeads
from kvsplice_hf.cache.splicing import SplicedLayerMixin
from kvsplice_hf.cache.turns import TurnTable
from kvsplice_hf.call import note_expansion
from kvsplice_hf.retention import Retention
from kvsplice_hf.retention.layer import MOST_TAKEN_BACK, RetainedLayerMixin
from kvsplice_hf.retention.policy import WINDOWS_SINCE
from kvsplice_hf.upstream import cache_argument, cache_of
from kvsplice_hf.values import ValuePruning


PROMPT, STEPS = 18, 6
LATENTS = [name for name, model in TINY_MODELS.items() if not model.is_dsa]
ORDINARY = [
    "llama",
    "qwen3",
    "gemma2",
    "gpt_oss",
    "gpt2",
    "gpt_bigcode",
    "smollm3",
    "mixtral",
    "llama4_text",
    "qwen3_next",
]
# How the rows are stored: as stock transformers does, as numbers of a splice, as packed rows.
MODES = ["stock", "numbers", "packed"]
POLICIES: dict[str, dict[str, Any]] = {
    "window": {"keep": 9, "first": 2},
    "window without first tokens": {"keep": 7, "first": 0},
    "window, a share": {"share": 0.5, "first": 1},
    "window, in lots": {"keep": 8, "first": 2, "interval": 3},
    "attention": {"keep": 9, "policy": "attention", "first": 2, "recent": 3},
    "attention, mean": {"keep": 8, "policy": "attention", "first": 0, "recent": 2, "scores": "mean"},
    "attention, in lots": {"share": 0.5, "policy": "attention", "first": 1, "recent": 2, "interval": 3},
}
PADDING = {"whole": None, "left-padded": [0, 9, 3]}


@functools.cache
def model_of(name: str, mode: str) -> Any:
    """A model, made once: each context leaves it as it was."""
    latents = name in TINY_MODELS
    if mode == "packed":
        return packed_latents(name) if latents else packed_ordinary(name)
    model = build(name) if latents else build_ordinary(name)
    if mode == "stock":
        return model
    assert latents
    config = KVSpliceConfig(rank=24, sink_tokens=SINKS)
    return patch_model_with_kvsplice(model, config, calibration=calibrated(model))


# Stock rows of all architectures, spliced ones of those that differ most.
CASES = [
    *((name, "stock") for name in (*LATENTS, *ORDINARY)),
    *((name, "numbers") for name in ("kimi_linear", "mistral4")),
    *((name, "packed") for name in ("deepseek_v2", "longcat_flash", "gemma2", "gpt_oss", "gpt2", "llama4_text")),
]
# One of each kind of row, for what does not depend on the architecture.
KINDS = [
    ("llama", "stock"),
    ("llama", "packed"),
    ("deepseek_v3", "stock"),
    ("deepseek_v3", "numbers"),
    ("deepseek_v3", "packed"),
]
WITH_WINDOWS = ("cohere2", "exaone4", "gemma2", "gemma3_text", "gpt_oss", "llama4_text")
all_cases = pytest.mark.parametrize(("name", "mode"), CASES, ids=["-".join(case) for case in CASES])
all_kinds = pytest.mark.parametrize(("name", "mode"), KINDS, ids=["-".join(case) for case in KINDS])
all_policies = pytest.mark.parametrize("settings", POLICIES.values(), ids=POLICIES)
both = pytest.mark.parametrize("policy", ["window", "attention"])


@pytest.fixture(autouse=True)
def _known_release(request: pytest.FixtureRequest) -> None:
    name = getattr(getattr(request.node, "callspec", None), "params", {}).get("name")
    if name in WITH_WINDOWS and Version(upstream.INSTALLED) < Version(WINDOWS_SINCE):
        pytest.skip(f"refused on this release: {name} has layers with windows")


def of(policy: str, keep: int = 9, **settings: Any) -> Retention:
    return Retention(keep=keep, policy=policy, first=2, recent=3 if policy == "attention" else None, **settings)


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_ORDINARY_TOKEN, VOCABULARY, shape, generator=generator, dtype=torch.int64)


def padded(ids: torch.Tensor, padding: list[int] | None) -> torch.Tensor | None:
    if padding is None:
        return None
    mask = torch.ones_like(ids)
    for row, count in enumerate(padding):
        mask[row, :count] = 0
    return mask


@torch.no_grad()
def in_calls(
    model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, sizes: tuple[int, ...] = (), cache: Any = None
) -> tuple[torch.Tensor, Any]:
    """Logits of calls of so many tokens, and then of one each; and the cache."""
    if cache is None:
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    past, found, start = cache.get_seq_length(), [], 0
    for size in [*sizes, *[1] * (ids.shape[1] - sum(sizes))]:
        end, more = start + size, {}
        if mask is not None:
            places = (mask.cumsum(-1) - 1).clamp_min(0)
            more = {"attention_mask": mask[:, : past + end], "position_ids": places[:, past + start : past + end]}
        found.append(model(ids[:, start:end], use_cache=True, **cache_argument(cache), **more).logits)
        start = end
    return torch.cat(found, dim=1), cache


CALLS = (PROMPT, 2)


def layers_of(cache: Any) -> list[RetainedLayerMixin]:
    return [layer for layer in cache.layers if isinstance(layer, RetainedLayerMixin)]


# ----------------------------------------------------------------------------------------------------- the reference


class Reference:
    """Eager attention that keeps all rows, and masks those that retention would have dropped."""

    def __init__(self, retention: Retention) -> None:
        self.retention = retention
        self.scores: dict[Any, torch.Tensor] = {}
        self.gone: dict[Any, torch.Tensor] = {}

    def __call__(
        self, module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        note_expansion()
        if isinstance(key, CompressedHeads):
            key, value = key.keys_and_values()
        (B, H, T, _), (K, S) = query.shape, key.shape[1:3]
        scores = query @ key.repeat_interleave(H // K, dim=1).transpose(2, 3) * scaling
        if kwargs.get("softcap"):
            scores = torch.tanh(scores / kwargs["softcap"]) * kwargs["softcap"]
        scores = scores + mask
        drops = mask.shape[-1] == S and self._is_full(module)
        if drops:
            old = self.gone.get(module, torch.zeros(B, 0, dtype=torch.bool))
            gone = torch.cat([old, torch.zeros(B, S - old.shape[1], dtype=torch.bool)], dim=1)
            scores = scores.masked_fill(gone[:, None, None], -1e30)
        if kwargs.get("s_aux") is not None:
            sink = kwargs["s_aux"].view(1, -1, 1, 1).expand(B, -1, T, 1)
            shares = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
        else:
            shares = scores.softmax(-1)
        if drops:
            self._drop(module, shares.sum(1), mask, gone)
        return (shares @ value.repeat_interleave(H // K, dim=1)).transpose(1, 2), None

    def _is_full(self, module: Any) -> bool:
        kinds = getattr(module.config, "layer_types", None)
        return kinds is None or kinds[module.layer_idx] == "full_attention" or module.layer_idx >= len(kinds)

    def _drop(self, module: Any, shares: torch.Tensor, mask: torch.Tensor, gone: torch.Tensor) -> None:
        B, T, S = shares.shape
        plan = self.retention
        real = mask[:, 0, -1].expand(B, -1) > -1.0
        total = torch.zeros(B, S)
        if module in self.scores:
            total[:, : self.scores[module].shape[-1]] = self.scores[module]
        total += (shares * real[:, S - T :, None]).sum(1)
        self.scores[module], self.gone[module] = total, gone
        recent = plan.recent if plan.policy == "attention" else 0
        for b in range(B):
            there = real[b].nonzero()[:, 0].tolist()
            held = [place for place in there if not gone[b, place]]
            limit = plan.keep or max(-int(-plan.share * len(there) // 1), plan.first + max(recent, 1))
            if len(held) < min(limit, len(held)) + plan.interval:
                continue
            always = {*there[: plan.first], *there[len(there) - recent :]}
            others = [place for place in held if place not in always]
            if plan.policy == "window":
                rank = {place: float(place) for place in others}
            else:
                rank = {place: total[b, place].item() / (S - place if plan.scores == "mean" else 1) for place in others}
            others.sort(key=lambda place: rank[place], reverse=True)  # noqa: B023
            gone[b, others[max(limit - len(always), 0) :]] = True


def by_reference(model: Any, reference: Reference, run: Callable[[], Any]) -> Any:
    """What `run` gives on a model whose attention is the reference."""
    AttentionInterface.register("reference", reference)
    AttentionMaskInterface.register("reference", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    config = model.config.get_text_config(decoder=True)
    before = config._attn_implementation
    config._attn_implementation_internal = "reference"
    try:
        return run()
    finally:
        config._attn_implementation_internal = before


def compare(name: str, mode: str, settings: dict[str, Any], padding: list[int] | None) -> None:
    model, ids = model_of(name, mode), tokens(3, PROMPT + 2 + STEPS)
    mask = padded(ids, padding)
    retention = Retention(**settings)
    expected, _ = by_reference(model, Reference(retention), lambda: in_calls(model, ids, mask, CALLS))
    full, _ = in_calls(model, ids, mask, CALLS)
    with retention(model):
        found, cache = in_calls(model, ids, mask, CALLS)
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    scale = full[real].std()
    assert ((found - expected)[real].abs().max() / scale) < 1e-4
    assert ((found - full)[:, PROMPT:].abs().max() / scale) > 1e-3
    assert cache.get_seq_length() == ids.shape[1]
    for layer in layers_of(cache):
        assert layer.row_count < ids.shape[1]


@all_cases
def test_logits_are_those_of_attention_without_what_was_dropped(name: str, mode: str) -> None:
    for settings in ({"keep": 7, "first": 0}, POLICIES["attention"]):
        compare(name, mode, settings, [0, 9, 3])


@all_policies
@all_kinds
@pytest.mark.parametrize("padding", PADDING.values(), ids=PADDING)
def test_each_policy_drops_what_it_says(
    name: str, mode: str, settings: dict[str, Any], padding: list[int] | None
) -> None:
    compare(name, mode, settings, padding)


def test_falcon_drops_rows_of_a_window_though_it_computes_attention_by_itself() -> None:
    model, ids = build_ordinary("falcon"), tokens(2, PROMPT + STEPS)
    seen = torch.ones(PROMPT + STEPS, PROMPT + STEPS, dtype=torch.bool).tril()
    for query in range(PROMPT, PROMPT + STEPS):
        seen[query, 2 : query - 6] = False  # 2 first tokens, and 6 of the 8 that are kept are before the query's own
    seen[PROMPT:, 2:PROMPT] &= torch.ones(STEPS, PROMPT - 2, dtype=torch.bool)
    with torch.no_grad():
        cache, parts = DynamicCache(config=model.config), []
        for start, end in [(0, PROMPT), *((at, at + 1) for at in range(PROMPT, PROMPT + STEPS))]:
            bias = torch.zeros(end - start, end).masked_fill(~seen[start:end, :end], -1e30)
            given = {"attention_mask": bias[None, None].expand(2, -1, -1, -1), **cache_argument(cache)}
            parts.append(model(ids[:, start:end], use_cache=True, **given).logits)
    with Retention(keep=8, first=2)(model):
        found, _ = in_calls(model, ids, sizes=(PROMPT,))
    assert torch.allclose(found, torch.cat(parts, dim=1), atol=1e-4)


@pytest.mark.parametrize(("name", "mode"), [*KINDS, ("gemma2", "stock"), ("gpt2", "packed"), ("kimi_linear", "stock")])
@both
def test_a_model_that_keeps_all_rows_computes_the_same_bits(name: str, mode: str, policy: str) -> None:
    model, ids = model_of(name, mode), tokens(2, PROMPT + 4)
    for mask in (None, padded(ids, [0, 5])):
        expected, stock = in_calls(model, ids, mask, (PROMPT, 2))
        with of(policy, keep=PROMPT + 4)(model):
            found, cache = in_calls(model, ids, mask, (PROMPT, 2))
        assert torch.equal(found, expected)
        assert cache.get_seq_length() == stock.get_seq_length()


@all_kinds
@both
def test_afterwards_the_model_is_as_it_was(name: str, mode: str, policy: str) -> None:
    model, ids = model_of(name, mode), tokens(2, PROMPT)
    before = {key: dict(vars(module)) for key, module in model.named_modules()}
    hooks = {key: (list(m._forward_pre_hooks), list(m._forward_hooks)) for key, m in model.named_modules()}
    implementation, expected = model.config._attn_implementation, in_calls(model, ids, sizes=(PROMPT,))[0]
    with of(policy)(model):
        in_calls(model, ids, sizes=(PROMPT,))
    with pytest.raises(RuntimeError, match="of the caller"), of(policy)(model):
        raise RuntimeError("of the caller")
    assert model.config._attn_implementation is implementation
    assert {key: set(vars(module)) for key, module in model.named_modules()} == {k: set(v) for k, v in before.items()}
    assert {k: (list(m._forward_pre_hooks), list(m._forward_hooks)) for k, m in model.named_modules()} == hooks
    assert torch.equal(in_calls(model, ids, sizes=(PROMPT,))[0], expected)


# ----------------------------------------------------------------------------------------------------- rows and bytes


@all_kinds
@both
def test_memory_falls_behind_the_prompt_and_stays_while_decoding(name: str, mode: str, policy: str) -> None:
    model, ids = model_of(name, mode), tokens(2, 60)
    _, full = in_calls(model, ids[:, :40], sizes=(40,))
    with of(policy, keep=10)(model):
        _, cache = in_calls(model, ids[:, :40], sizes=(39,))
        sizes = [cache_nbytes(cache)]
        for at in range(40, 60):
            in_calls(model, ids[:, at : at + 1], cache=cache)
            sizes.append(cache_nbytes(cache))
            assert all(layer.row_count == 10 for layer in layers_of(cache))
    assert sizes[0] < 0.75 * cache_nbytes(full)
    # A table of rotations may hold some more than is needed; rows may not.
    assert max(sizes) <= sizes[0] + 64 * 8


@all_kinds
@both
@pytest.mark.parametrize("length", [8, 40])
def test_the_formula_counts_the_rows_that_are_kept(name: str, mode: str, policy: str, length: int) -> None:
    model, ids = model_of(name, mode), tokens(2, length)
    stock = get_kv_cache_size(model, length, 2)
    with of(policy, keep=10)(model):
        _, cache = in_calls(model, ids, sizes=(length - 1,))
        size = get_kv_cache_size(model, length, 2)
    found = cache_nbytes(cache)
    turned = isinstance(getattr(cache.layers[0], "table", None), TurnTable)
    # Angles, 4 of a token here, may be held of tokens that have no row any more.
    assert abs(found - size.compressed_bytes) <= (4 * length if turned else 0)
    assert size.original_bytes == stock.original_bytes
    if length < 10:
        scores = 4 * length * 2 * len(layers_of(cache)) if policy == "attention" else 0
        assert size.compressed_bytes == stock.compressed_bytes + scores


def test_each_layer_keeps_tokens_of_its_own_and_always_first_and_recent_ones() -> None:
    model, ids = model_of("llama", "stock"), tokens(2, PROMPT)
    with of("attention")(model):
        _, cache = in_calls(model, ids, sizes=(PROMPT - 2,))
    kept = [[set(row.tolist()) for row in layer.positions] for layer in layers_of(cache)]
    assert kept[0] != kept[1]
    for row in (row for layer in kept for row in layer):
        assert len(row) == 9
        assert {0, 1, PROMPT - 3, PROMPT - 2, PROMPT - 1} <= row


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_the_table_of_rotations_forgets_tokens_without_rows(name: str) -> None:
    model = model_of(name, "packed")
    with of("attention", keep=8)(model):
        _, cache = in_calls(model, tokens(2, 400), sizes=(200, 100, 80))
    table = cache.layers[0].table
    assert table is cache.layers[1].table
    assert table.used <= 2 * 2 * 8 + 80 + 64


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_numbers_stay_right_when_the_table_of_rotations_is_compacted_at_every_step(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvsplice_hf.cache.turns._FEW_DEAD", 0)
    monkeypatch.setattr("kvsplice_hf.cache.turns._MOST_DEAD", 10**9)
    for settings in ({"keep": 7, "first": 0}, POLICIES["attention"]):
        for padding in PADDING.values():
            compare(name, "packed", settings, padding)


# ----------------------------------------------------------------------------------------- what is done with caches


@all_kinds
@both
def test_a_sequence_in_a_left_padded_batch_is_as_alone(name: str, mode: str, policy: str) -> None:
    model, ids, paddings = model_of(name, mode), tokens(3, PROMPT + 6), [0, 9, 4]
    with of(policy)(model):
        together, cache = in_calls(model, ids, padded(ids, paddings), (PROMPT,))
        for row, padding in enumerate(paddings):
            alone, own = in_calls(model, ids[row : row + 1, padding:], sizes=(PROMPT - padding,))
            assert torch.allclose(together[row, padding:], alone[0], atol=1e-3)
            for one, other in zip(layers_of(cache), layers_of(own), strict=True):
                assert torch.equal(one.positions[row] - padding, other.positions[0])


@both
def test_a_share_is_of_tokens_and_not_of_padding(policy: str) -> None:
    model, ids = model_of("llama", "stock"), tokens(2, PROMPT + 9)
    recent = 3 if policy == "attention" else None
    with Retention(share=0.5, first=2, policy=policy, recent=recent)(model):
        _, cache = in_calls(model, ids, padded(ids, [8, 8]), (PROMPT,))
        _, alone = in_calls(model, ids[:, 8:], sizes=(PROMPT - 8,))
    for one, other in zip(layers_of(cache), layers_of(alone), strict=True):
        assert torch.equal(one.positions - 8, other.positions)


@all_kinds
@both
@pytest.mark.parametrize("by", ["reorder_cache", "batch_select_indices", "batch_repeat_interleave"])
def test_sequences_can_be_reordered_selected_and_repeated(name: str, mode: str, policy: str, by: str) -> None:
    model, ids, rest = model_of(name, mode), tokens(3, PROMPT + 2), tokens(3, 4, seed=1)
    order = {"batch_repeat_interleave": [0, 0, 1, 1, 2, 2]}.get(by, [2, 0, 0])
    rest = rest.repeat(2, 1)[: len(order)]
    with of(policy)(model):
        _, cache = in_calls(model, ids, sizes=CALLS)  # the last call of which is not settled
        getattr(cache, by)(2 if by == "batch_repeat_interleave" else torch.tensor(order))
        found, _ = in_calls(model, rest, cache=cache)
        for row, source in enumerate(order):
            _, own = in_calls(model, ids[source : source + 1], sizes=CALLS)
            expected, _ = in_calls(model, rest[row : row + 1], cache=own)
            assert torch.allclose(found[row], expected[0], atol=1e-3)
            for one, other in zip(layers_of(cache), layers_of(own), strict=True):
                assert torch.equal(one.positions[row], other.positions[0])


@all_kinds
@both
def test_tokens_of_the_last_call_are_taken_back_as_if_they_had_never_been(name: str, mode: str, policy: str) -> None:
    model, ids, rest = model_of(name, mode), tokens(2, PROMPT + 4), tokens(2, 4, seed=1)
    with of(policy)(model):
        _, cache = in_calls(model, ids, sizes=(PROMPT, 4))
        cache.crop(-3)
        found, _ = in_calls(model, rest, cache=cache)
        _, other = in_calls(model, ids[:, : PROMPT + 1], sizes=(PROMPT,))
        expected, _ = in_calls(model, rest, cache=other)
    assert cache.get_seq_length() == PROMPT + 5
    assert torch.allclose(found, expected, atol=1e-4)


@all_kinds
@both
def test_tokens_whose_removal_would_need_dropped_rows_cannot_be_taken_back(name: str, mode: str, policy: str) -> None:
    model, ids = model_of(name, mode), tokens(2, PROMPT + 4)
    with of(policy)(model):
        _, cache = in_calls(model, ids, sizes=(PROMPT, 3))
        with pytest.raises(CacheMismatchError, match="cannot be taken out"):
            cache.crop(-1)
        cache.crop(-PROMPT - 4)  # everything
        again, _ = in_calls(model, ids, sizes=(PROMPT,), cache=cache)
        fresh, _ = in_calls(model, ids, sizes=(PROMPT,))
    assert torch.equal(again, fresh)


def test_a_number_of_tokens_to_be_left_is_refused_or_means_that() -> None:
    model, ids = model_of("llama", "stock"), tokens(1, PROMPT)
    with of("window", keep=PROMPT + 4)(model):
        _, cache = in_calls(model, ids, sizes=(PROMPT,))
        try:  # early releases of transformers take it
            cache.crop(PROMPT - 2)
        except ValueError:
            cache.crop(-2)
        found, _ = in_calls(model, ids[:, -2:], cache=cache)
        expected, _ = in_calls(model, ids, sizes=(PROMPT - 2,))
    assert cache.get_seq_length() == PROMPT
    assert torch.allclose(found, expected[:, -2:], atol=1e-5)


@both
def test_a_prompt_is_dropped_at_once_and_not_taken_back(policy: str) -> None:
    model, ids = model_of("llama", "stock"), tokens(1, MOST_TAKEN_BACK + 1)
    with of(policy)(model):
        _, cache = in_calls(model, ids, sizes=(MOST_TAKEN_BACK + 1,))
        with pytest.raises(CacheMismatchError, match="cannot be taken out"):
            cache.crop(-1)
    assert layers_of(cache)[0].row_count == 9


def test_a_window_that_has_dropped_nothing_gives_any_token_back() -> None:
    model, ids, rest = model_of("llama", "packed"), tokens(2, PROMPT), tokens(2, 4, seed=1)
    with of("window", keep=PROMPT + 4)(model):
        _, cache = in_calls(model, ids, sizes=(PROMPT - 2,))
        cache.crop(-5)
        found, _ = in_calls(model, rest, cache=cache)
    expected, _ = in_calls(model, torch.cat([ids[:, :-5], rest], dim=1), sizes=(PROMPT - 5,))
    assert torch.allclose(found, expected[:, PROMPT - 5 :], atol=1e-4)


@all_kinds
@both
def test_a_copied_cache_goes_on_by_itself_and_one_that_was_reset_anew(name: str, mode: str, policy: str) -> None:
    model, ids, rest = model_of(name, mode), tokens(2, PROMPT), tokens(2, 4, seed=1)
    with of(policy)(model):
        expected, cache = in_calls(model, ids, sizes=(PROMPT - 3,))
        copied = copy.deepcopy(cache)
        first, _ = in_calls(model, rest, cache=cache)
        second, _ = in_calls(model, rest, cache=copied)
        assert torch.equal(first, second)
        cache.reset()
        assert cache.get_seq_length() == 0
        found, _ = in_calls(model, ids, sizes=(PROMPT - 3,), cache=cache)
    assert torch.equal(found, expected)


@all_kinds
def test_a_window_begins_on_a_cache_that_was_filled_before(name: str, mode: str) -> None:
    model, ids = model_of(name, mode), tokens(3, PROMPT + 5)
    for padding in PADDING.values():
        mask = padded(ids, padding)
        _, cache = in_calls(model, ids[:, :PROMPT], None if mask is None else mask[:, :PROMPT], (PROMPT,))
        with of("window")(model):
            found, _ = in_calls(model, ids[:, PROMPT:], mask, cache=cache)
            whole, other = in_calls(model, ids, mask, (PROMPT,))
        # The first step still sees the whole prompt; behind it both hold the same rows.
        for one, two in zip(layers_of(cache), layers_of(other), strict=True):
            assert torch.equal(one.positions, two.positions)
        assert torch.isfinite(found).all()


def test_a_spliced_cache_of_the_caller_drops_rows() -> None:
    model, ids = model_of("deepseek_v3", "packed"), tokens(2, PROMPT)
    with of("window")(model):
        _, cache = in_calls(model, ids, sizes=(PROMPT,), cache=KVSpliceCache(model))
        expected, other = in_calls(model, ids, sizes=(PROMPT,))
    assert all(isinstance(layer, SplicedLayerMixin) for layer in layers_of(cache))
    assert cache_nbytes(cache) == cache_nbytes(other)


def test_with_the_splice_disabled_rows_are_stock_ones_and_drop_as_well() -> None:
    model, ids = model_of("llama", "packed"), tokens(2, PROMPT + 4)
    with of("window")(model), splice_disabled(model):
        found, cache = in_calls(model, ids, sizes=(PROMPT,))
    stock = model_of("llama", "stock")
    with of("window")(stock):
        expected, _ = in_calls(stock, ids, sizes=(PROMPT,))
    assert torch.allclose(found, expected, atol=1e-5)
    assert not any(isinstance(layer, SplicedLayerMixin) for layer in cache.layers)


# ---------------------------------------------------------------------------------------------------------- generate


GENERATION: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
    "prompt in chunks": {"do_sample": False, "prefill_chunk_size": 5},
}


@pytest.mark.parametrize("generation", GENERATION)
@pytest.mark.parametrize(("name", "mode"), [*KINDS, ("gemma2", "stock"), ("kimi_linear", "packed")])
@both
def test_generate_runs_in_its_modes(name: str, mode: str, policy: str, generation: str) -> None:
    if generation == "prompt lookup" and name in ("gemma2", "kimi_linear"):
        pytest.skip("windows and linear attention that record their past are those of transformers")
    model, ids = model_of(name, mode), tokens(1 if generation == "prompt lookup" else 2, PROMPT)
    chosen = GENERATION[generation]
    with of(policy)(model):
        torch.manual_seed(0)
        written = model.generate(
            ids, max_new_tokens=8, eos_token_id=None, pad_token_id=0, return_dict_in_generate=True, **chosen
        )
    assert written.sequences.shape[1] == PROMPT + 8
    cache = cache_of(written)
    assert cache.get_seq_length() == PROMPT + 7
    for layer in layers_of(cache):
        assert layer.row_count <= 9 + 4


@all_kinds
@both
def test_generation_writes_the_most_likely_tokens_of_single_calls_and_goes_on_in_a_second_turn(
    name: str, mode: str, policy: str
) -> None:
    model, ids = model_of(name, mode), tokens(2, PROMPT)
    mask = padded(ids, [0, 6])
    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "return_dict_in_generate": True}
    with of(policy)(model):
        first = model.generate(ids, attention_mask=mask, max_new_tokens=4, **settings)
        text = torch.cat([first.sequences, tokens(2, 3, seed=2)], dim=1)
        both_turns = torch.cat([mask, torch.ones(2, 7, dtype=torch.int64)], dim=1)
        second = model.generate(
            text, attention_mask=both_turns, max_new_tokens=4, **settings, **cache_argument(cache_of(first))
        ).sequences
        full = torch.cat([both_turns, torch.ones(2, 4, dtype=torch.int64)], dim=1)
        logits, _ = in_calls(model, second[:, :-1], full[:, :-1], (PROMPT, 1, 1, 1, 4))
    chosen = logits.argmax(-1)
    assert torch.equal(chosen[:, PROMPT - 1 : PROMPT + 3], second[:, PROMPT : PROMPT + 4])
    assert torch.equal(chosen[:, PROMPT + 6 :], second[:, PROMPT + 7 :])


@both
def test_eager_attention_and_half_precision_run(policy: str) -> None:
    ids = tokens(2, PROMPT + 4)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = build_ordinary("llama", dtype, attn_implementation="eager")
        model.set_attn_implementation("eager")
        with of(policy, keep=40)(model):
            found.append(in_calls(model, ids, sizes=(PROMPT,))[0].float())
    assert (found[0] - found[1]).abs().mean() < 0.05 * found[0].std()


@both
def test_explain_says_that_rows_are_dropped(policy: str) -> None:
    model = model_of("deepseek_v3", "packed")
    assert "keeps" not in str(explain(model))
    with of(policy)(model):
        explanation = explain(model)
    assert all("9 tokens" in layer.retention for layer in explanation.layers)
    assert "keeps 9 tokens" in str(explanation)


# --------------------------------------------------------------------------------------------------------- bad input


BAD_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "neither": ({}, "give one of them"),
    "both": ({"keep": 50, "share": 0.5}, "give one of them"),
    "keep below first": ({"keep": 4}, "fewer than the 4 first and 1 recent"),
    "keep below first and recent": ({"keep": 30, "policy": "attention"}, "fewer than the 4 first and 32 recent"),
    "negative keep": ({"keep": -5}, "fewer than"),
    "no whole number": ({"keep": 0.5}, "takes a whole number"),
    "negative first": ({"keep": 50, "first": -1}, "0 or more first tokens"),
    "no recent tokens": ({"keep": 50, "recent": 0, "policy": "attention"}, "has no score"),
    "share of nothing": ({"share": 0.0}, "above 0, and 1 at most"),
    "share above all": ({"share": 1.5}, "above 0, and 1 at most"),
    "unknown policy": ({"keep": 50, "policy": "random"}, "window, attention"),
    "unknown scores": ({"keep": 50, "policy": "attention", "scores": "max"}, "sum, mean"),
    "recent of a window": ({"keep": 50, "recent": 10}, 'for policy="attention"'),
    "scores of a window": ({"keep": 50, "scores": "mean"}, 'for policy="attention"'),
    "no interval": ({"keep": 50, "interval": 0}, "1 or more"),
}


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Retention(**settings)


def test_more_rows_than_there_will_be_are_fine() -> None:
    model, ids = model_of("gpt2", "stock"), tokens(1, 10)
    with Retention(keep=10**6)(model):
        found, _ = in_calls(model, ids, sizes=(10,))
    assert torch.equal(found, in_calls(model, ids, sizes=(10,))[0])


REFUSED_MODELS: dict[str, tuple[Callable[[], PreTrainedModel], type[Exception], str]] = {
    "windows only": (lambda: build_ordinary("mistral"), UnsupportedError, "All layers of .* have sliding windows"),
    "shared keys": (lambda: build_ordinary("gemma4_text"), UnsupportedError, "it reads the rows of"),
    "unknown attention": (lambda: build_ordinary("bloom"), NotMLAError, "no attention layer"),
    "an indexer": (lambda: build("glm_moe_dsa"), UnsupportedError, "its indexer"),
    "shared latents": (lambda: build("mistral_large4"), UnsupportedError, "its indexer"),
}


@pytest.mark.parametrize(("make", "kind", "message"), REFUSED_MODELS.values(), ids=REFUSED_MODELS)
def test_models_that_cannot_do_without_rows_are_refused_by_name(
    make: Callable[[], PreTrainedModel], kind: type[Exception], message: str
) -> None:
    model = make()
    with pytest.raises(kind, match=message), Retention(keep=40)(model):
        pass
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_modules_that_compute_attention_by_themselves_are_refused_where_attention_decides() -> None:
    model = build_ordinary("falcon")
    with pytest.raises(UnsupportedError, match="computes attention by itself"), of("attention")(model):
        pass


def test_an_attention_function_whose_masks_are_unknown_is_refused() -> None:
    model = build_ordinary("llama")
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(UnsupportedError, match="'flash_attention_2'"), of("window")(model):
        pass


def test_a_context_within_a_context_is_refused() -> None:
    model = build_ordinary("llama")
    with of("window")(model), pytest.raises(UnsupportedError, match="in a context of retention"), of("window")(model):
        pass
    ids = tokens(1, 6)
    with of("window")(model), ValuePruning(keep=40)(model), pytest.raises(UnsupportedError, match="it needs one that"):
        in_calls(model, ids)


def call_without_cache(model: PreTrainedModel) -> None:
    model(tokens(1, 6), use_cache=False)


def call_with_static_cache(model: PreTrainedModel) -> None:
    model(tokens(1, 6), **cache_argument(StaticCache(config=model.config, max_cache_len=16)))


def call_in_training(model: PreTrainedModel) -> None:
    try:
        model.train()(tokens(1, 6))
    finally:
        model.eval()


def call_with_mask_of_heads(model: PreTrainedModel) -> None:
    model(tokens(1, 6), attention_mask=torch.zeros(1, 4, 6, 6))


def call_compiled(model: PreTrainedModel) -> None:
    torch.compile(model, backend="eager")(tokens(1, 6), use_cache=True)


CALLS_REFUSED = {
    "no cache": (call_without_cache, "got no cache"),
    "a static cache": (call_with_static_cache, "a StaticLayer of StaticCache"),
    "training": (call_in_training, "for inference"),
    "a mask for each head": (call_with_mask_of_heads, "one for all heads"),
}


@pytest.mark.parametrize(("call", "message"), CALLS_REFUSED.values(), ids=CALLS_REFUSED)
@both
def test_calls_that_drop_nothing_are_refused(call: Any, message: str, policy: str) -> None:
    model = model_of("llama", "stock")
    with of(policy)(model), pytest.raises(UnsupportedError, match=message):
        call(model)


@all_kinds
def test_continuous_batching_is_refused(name: str, mode: str) -> None:
    model = model_of(name, mode)
    layer = model.model.layers[0].self_attn
    with of("window")(model), pytest.raises(UnsupportedError, match="generate_batch"):
        layer(torch.zeros(1, 4, model.config.hidden_size), None, attention_mask=None, **cache_argument(object()))


@all_kinds
def test_a_cache_with_dropped_rows_is_refused_outside_and_stays_as_it_is(name: str, mode: str) -> None:
    model, ids = model_of(name, mode), tokens(2, PROMPT)
    with of("window")(model):
        _, cache = in_calls(model, ids, sizes=(PROMPT,))
    with pytest.raises(CacheMismatchError, match="outside of retention"):
        in_calls(model, ids[:, :1], cache=cache)
    assert cache.get_seq_length() == PROMPT
    with of("window")(model):
        in_calls(model, ids[:, :2], cache=cache)


def test_a_cache_goes_on_with_other_sizes_but_not_with_another_policy() -> None:
    model, ids = model_of("llama", "stock"), tokens(2, PROMPT)
    with of("window")(model):
        _, cache = in_calls(model, ids, sizes=(PROMPT,))
    with of("window", keep=5)(model):
        in_calls(model, ids[:, :1], cache=cache)
    assert layers_of(cache)[0].row_count == 5
    for other in (of("attention"), Retention(keep=9, first=3)):
        with other(model), pytest.raises(CacheMismatchError, match="kept by other settings"):
            in_calls(model, ids[:, :1], cache=cache)


def test_a_filled_cache_is_refused_where_attention_decides() -> None:
    model, ids = model_of("llama", "stock"), tokens(2, PROMPT)
    _, cache = in_calls(model, ids, sizes=(PROMPT,))
    with of("attention")(model), pytest.raises(CacheMismatchError, match="holds 18 tokens already"):
        in_calls(model, ids[:, :1], cache=cache)


def test_a_cache_whose_last_call_failed_or_that_somebody_has_changed_is_refused() -> None:
    model, ids = model_of("llama", "stock"), tokens(1, PROMPT)
    with of("window")(model):
        _, cache = in_calls(model, ids, sizes=(PROMPT,))
        layers_of(cache)[0].is_running = True
        with pytest.raises(CacheMismatchError, match="An earlier call on this cache ended with an error"):
            in_calls(model, ids[:, :1], cache=cache)
        _, cache = in_calls(model, ids, sizes=(PROMPT,))
        layer = layers_of(cache)[0]
        layer.keys, layer.values = layer.keys[:, :, 1:], layer.values[:, :, 1:]
        with pytest.raises(CacheMismatchError, match="somebody else has taken rows out"):
            in_calls(model, ids[:, :1], cache=cache)


@all_kinds
def test_a_cache_with_dropped_rows_is_not_saved(name: str, mode: str, tmp_path: Path) -> None:
    model, ids = model_of(name, mode), tokens(1, PROMPT)
    with of("window")(model):
        _, cache = in_calls(model, ids, sizes=(PROMPT,))
        with pytest.raises(UnsupportedError, match="cannot be saved"):
            save_cache(cache, tmp_path / "cache.safetensors", model)
        with pytest.raises(UnsupportedError, match="cannot be saved"):
            PromptCache(tmp_path / "prompts").prepare(model, input_ids=ids)


# ------------------------------------------------------------------------------------------------ how it is measured


def test_the_program_measures_dropped_rows_packed_rows_and_both(tmp_path: Path) -> None:
    trained_model(1).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    sizes = ["--prompt", "192", "--continuation", "8", "--chunk", "4", "--windows", "1", "--samples", "1"]
    few = ["--depths", "0.5", "--first", "2", "--recent", "4", "--packed_bytes", "40", "--rounds", "1"]
    calibration = ["--calibration", "pydoc", "--calibration_tokens", "4096", "--dtype", "float32", "--codec", "rows"]
    where = ["--model", str(tmp_path / "model"), "--output", str(tmp_path)]
    report = run_program("measure/retention.py", *where, *sizes, *few, *calibration)
    rows = {row["name"]: row for row in report["rows"]}
    whole, half, quarter = (rows[name]["bytes"] for name in ("full", "50% of rows, window", "25% of rows, window"))
    assert 0.5 < half / whole < 0.6
    assert 0.25 < quarter / whole < 0.35
    packed = rows["all packed rows of 40 bytes"]["bytes"]
    assert rows["25% of packed rows of 40 bytes, attention"]["bytes"] < 0.6 * packed
    assert rows[f"all packed rows, {quarter:.0f} bytes"]["dropped"] is False
    for name, row in rows.items():
        assert row["step_s"] > 0
        assert 0 <= row["retrieval"]["found"] <= 1
        assert name == "full" or row["texts"]["pydoc"]["kl_nats"] >= 0


def test_layers_with_windows_are_refused_on_releases_where_nobody_has_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "INSTALLED", "5.23.0")
    with (
        pytest.raises(UnsupportedError, match=r"right from transformers 5\.24\.0 on"),
        of("window")(build_ordinary("gemma2")),
    ):
        pass
    with of("window")(build_ordinary("llama")):
        pass
