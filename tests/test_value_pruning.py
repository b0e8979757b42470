"""Value pruning: all keys stay, the values of tokens that attention does not read go, and softmax runs over the rest.

What is computed is held against a reference that keeps everything and masks what was let go, head by head.
"""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ordinary_models import VOCABULARY, build_ordinary
from tiny_models import FIRST_ORDINARY_TOKEN, build
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel, StaticCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from kvsplice_hf import (
    CacheMismatchError,
    CalibrationError,
    ConfigError,
    KVSpliceCalibrator,
    KVSpliceConfig,
    NotMLAError,
    UnsupportedError,
    UpstreamChangedError,
    cache_nbytes,
    patch_model_with_kvsplice,
)
from kvsplice_hf.bench.expanded_cache import caching_heads, sites_of_heads
from kvsplice_hf.bench.value_trial import Trial, means_of
from kvsplice_hf.calibration.vectors import collect_vectors
from kvsplice_hf.code.heads import HeadKey
from kvsplice_hf.gpt2_mla import GPT2MLAConfig, GPT2MLAForCausalLM
from kvsplice_hf.patch.sites import find_sites
from kvsplice_hf.retention.selection import Budget
from kvsplice_hf.upstream import cache_argument, cache_of
from kvsplice_hf.values import ValuePrunedLayer, ValuePruning, fit_value_geometries
from kvsplice_hf.values.layer import SomeValues


PROMPT, STEPS = 20, 5
KINDS = ["llama", "gpt2", "gpt_bigcode", "gemma2", "gpt_oss", "qwen3"]
BUDGETS = {
    "keep": {"keep": 9, "first": 2, "recent": 3},
    "share": {"share": 0.4, "first": 1, "recent": 2},
    "mean": {"keep": 8, "first": 0, "recent": 1, "scores": "mean"},
}
all_kinds = pytest.mark.parametrize("name", KINDS)


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        FIRST_ORDINARY_TOKEN, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int64
    )


def padded(ids: torch.Tensor, padding: list[int]) -> torch.Tensor:
    mask = torch.ones_like(ids)
    for row, count in enumerate(padding):
        mask[row, :count] = 0
    return mask


@torch.no_grad()
def in_calls(
    model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None = None, prompt: int = PROMPT, cache: Any = None
) -> tuple[torch.Tensor, Any]:
    """Logits of a prompt, of two tokens at once, and of single ones; and the cache."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    past, found = cache.get_seq_length(), []
    edges = sorted({0, prompt, min(prompt + 2, ids.shape[1]) if prompt else 0, *range(prompt + 3, ids.shape[1] + 1)})
    edges = edges if prompt else list(range(ids.shape[1] + 1))
    for start, end in zip(edges, edges[1:], strict=False):
        more: dict[str, Any] = {}
        if mask is not None:
            places = mask.cumsum(-1) - 1
            more = {
                "attention_mask": mask[:, : past + end],
                "position_ids": places[:, past + start : past + end].clamp_min(0),
            }
        out = model(ids[:, start:end], use_cache=True, **cache_argument(cache), **more)
        found.append(out.logits)
    return torch.cat(found, dim=1), cache


def layers_of(cache: Any) -> list[ValuePrunedLayer]:
    return [layer for layer in cache.layers if isinstance(layer, ValuePrunedLayer)]


# ----------------------------------------------------------------------------------------------------- the reference


class Reference:
    """Attention that keeps all values, and masks those that value pruning would have let go."""

    def __init__(self, keep: int = 0, share: float = 0.0, first: int = 0, recent: int = 0, scores: str = "sum") -> None:
        self.keep, self.share, self.first, self.recent, self.by_mean = keep, share, first, recent, scores == "mean"
        self.scores: dict[Any, torch.Tensor] = {}
        self.gone: dict[Any, torch.Tensor] = {}

    def __call__(
        self, module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        (B, H, T, _), (K, S) = query.shape, key.shape[1:3]
        group = H // K
        scores = query @ key.repeat_interleave(group, dim=1).transpose(2, 3) * scaling
        if kwargs.get("softcap"):
            scores = torch.tanh(scores / kwargs["softcap"]) * kwargs["softcap"]
        prunes = kwargs.get("sliding_window") is None
        old = self.gone.get(module, torch.zeros(B, K, 0, dtype=torch.bool))
        gone = torch.cat([old, torch.zeros(B, K, S - old.shape[2], dtype=torch.bool)], dim=2) if prunes else None
        scores = scores + mask
        if gone is not None:
            scores = scores.masked_fill(gone.repeat_interleave(group, dim=1)[:, :, None], -1e30)
        if kwargs.get("s_aux") is not None:
            sink = kwargs["s_aux"].view(1, -1, 1, 1).expand(B, -1, T, 1)
            shares = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
        else:
            shares = scores.softmax(-1)
        output = (shares @ value.repeat_interleave(group, dim=1)).transpose(1, 2)
        if gone is not None:
            self._prune(module, shares.unflatten(1, (K, group)).sum(2), mask, gone)
        return output, None

    def _prune(self, module: Any, shares: torch.Tensor, mask: torch.Tensor, gone: torch.Tensor) -> None:
        B, K, T, S = shares.shape
        real = mask[:, 0, -1].expand(B, -1) > -1.0
        total = torch.zeros(B, K, S)
        if module in self.scores:
            total[..., : self.scores[module].shape[-1]] = self.scores[module]
        total += (shares * real[:, None, S - T :, None]).sum(2)
        self.scores[module], self.gone[module] = total, gone
        for b in range(B):
            there = real[b].nonzero()[:, 0].tolist()
            limit = self.keep or max(-int(-self.share * len(there) // 1), self.first + self.recent)
            always = {*there[: self.first], *there[-self.recent :]}
            for k in range(K):
                others = [place for place in there if place not in always and not gone[b, k, place]]
                rank = {place: total[b, k, place] / (S - place if self.by_mean else 1) for place in others}
                others.sort(key=lambda place: rank[place], reverse=True)  # noqa: B023
                gone[b, k, others[max(limit - len(always), 0) :]] = True


def by_reference(model: PreTrainedModel, reference: Reference, run: Callable[[], Any]) -> Any:
    """What `run` gives on a model whose attention is the reference."""
    AttentionInterface.register("reference", reference)
    AttentionMaskInterface.register("reference", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    before = model.config._attn_implementation
    model.config._attn_implementation_internal = "reference"
    try:
        return run()
    finally:
        model.config._attn_implementation_internal = before


@all_kinds
@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize("padding", [None, [0, 7, 3]], ids=["whole", "left-padded"])
def test_logits_are_those_of_attention_without_what_was_let_go(
    name: str, budget: dict[str, Any], padding: list[int] | None
) -> None:
    model, ids = build_ordinary(name), tokens(3, PROMPT + 2 + STEPS)
    mask = None if padding is None else padded(ids, padding)
    expected, _ = by_reference(model, Reference(**budget), lambda: in_calls(model, ids, mask))
    full, _ = in_calls(model, ids, mask)
    with ValuePruning(**budget)(model):
        found, cache = in_calls(model, ids, mask)
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    assert torch.allclose(found[real], expected[real], atol=2e-5)
    assert not torch.allclose(found[:, PROMPT:], full[:, PROMPT:], atol=1e-3)
    assert cache.get_seq_length() == ids.shape[1]


@all_kinds
def test_a_model_that_keeps_all_values_gives_stock_logits_and_is_as_it_was_afterwards(name: str) -> None:
    model, ids = build_ordinary(name), tokens(2, PROMPT + 4)
    before = {key: dict(vars(module)) for key, module in model.named_modules()}
    stock, _ = in_calls(model, ids)
    implementation = model.config._attn_implementation
    with ValuePruning(keep=40, recent=2)(model):
        found, _ = in_calls(model, ids)
    assert torch.allclose(found, stock, atol=2e-5)
    assert model.config._attn_implementation == implementation
    after = {key: dict(vars(module)) for key, module in model.named_modules()}
    assert {key: set(held) for key, held in after.items()} == {key: set(held) for key, held in before.items()}
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert torch.equal(in_calls(model, ids)[0], stock)


def test_the_model_is_as_it_was_after_an_error_inside_the_context() -> None:
    model = build_ordinary("llama")
    with pytest.raises(RuntimeError, match="of the caller"), ValuePruning(keep=8, recent=2)(model):
        raise RuntimeError("of the caller")
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


# ------------------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("budget", [{"keep": 10}, {"share": 0.5}], ids=["keep", "share"])
def test_values_that_were_let_go_take_no_memory(budget: dict[str, Any]) -> None:
    model, ids = build_ordinary("llama"), tokens(2, PROMPT)
    with ValuePruning(**budget, first=2, recent=3)(model), torch.no_grad():
        cache = cache_of(model(ids, use_cache=True))
        sizes = [cache_nbytes(cache)]
        model(ids[:, :1], use_cache=True, **cache_argument(cache))
        sizes.append(cache_nbytes(cache))
    heads, width, count = 2, 8, 2
    for length, found in zip((PROMPT, PROMPT + 1), sizes, strict=True):
        kept = Budget(budget.get("keep"), budget.get("share"), 2, 3).of(length)
        keys, values = length * width * 4, kept * width * 4
        slots = (kept - 2) * (4 + 4)  # a position and a score
        assert found == count * len(ids) * (heads * (keys + values + slots) + 2 * 4)
    assert cache_nbytes(cache, allocated=True) == sizes[-1]


def test_each_key_head_keeps_tokens_of_its_own_and_always_the_recent_ones() -> None:
    model, ids = build_ordinary("llama"), tokens(2, PROMPT)
    with ValuePruning(keep=10, first=2, recent=3)(model):
        _, cache = in_calls(model, ids, prompt=PROMPT - 2)
    for layer in layers_of(cache):
        kept = [[set(head.tolist()) for head in sequence] for sequence in layer.positions]
        assert kept[0][0] != kept[0][1]
        assert kept[0] != kept[1]
        for head in (head for sequence in kept for head in sequence):
            assert len(head) == 8
            assert {PROMPT - 3, PROMPT - 2, PROMPT - 1} <= head
            assert not {0, 1} & head
        assert layer.first_positions.tolist() == [[0, 1], [0, 1]]


# ----------------------------------------------------------------------------------------- what is done with caches


def test_a_sequence_in_a_left_padded_batch_is_as_alone() -> None:
    model, ids = build_ordinary("llama"), tokens(3, PROMPT + 6)
    mask = padded(ids, [0, 9, 4])
    pruning = ValuePruning(share=0.45, first=2, recent=3)
    with pruning(model):
        together, _ = in_calls(model, ids, mask)
        for row, padding in enumerate([0, 9, 4]):
            alone, _ = in_calls(model, ids[row : row + 1, padding:], prompt=PROMPT - padding)
            assert torch.allclose(together[row, padding:], alone[0], atol=2e-5)


@pytest.mark.parametrize("by", ["reorder_cache", "batch_select_indices", "batch_repeat_interleave"])
def test_sequences_can_be_reordered_selected_and_repeated(by: str) -> None:
    model, ids, rest = build_ordinary("llama"), tokens(3, PROMPT), tokens(3, 4, seed=1)
    order = {"batch_repeat_interleave": [0, 0, 1, 1, 2, 2]}.get(by, [2, 0, 0])
    rest = rest.repeat(2, 1)[: len(order)]
    with ValuePruning(keep=9, first=2, recent=2)(model):
        _, cache = in_calls(model, ids)
        getattr(cache, by)(2 if by == "batch_repeat_interleave" else torch.tensor(order))
        found, _ = in_calls(model, rest, prompt=0, cache=cache)
        for row, source in enumerate(order):
            _, own = in_calls(model, ids[source : source + 1])
            expected, _ = in_calls(model, rest[row : row + 1], prompt=0, cache=own)
            assert torch.allclose(found[row], expected[0], atol=2e-5)


def test_a_crop_takes_back_tokens_that_nothing_was_let_go_for() -> None:
    model, ids, rest = build_ordinary("llama"), tokens(2, PROMPT), tokens(2, 4, seed=1)
    with ValuePruning(keep=PROMPT + 4, first=2, recent=2)(model):
        _, cache = in_calls(model, ids)
        cache.crop(-3)
        expected, _ = in_calls(model, torch.cat([ids[:, :-3], rest], dim=1))
        found, _ = in_calls(model, rest, prompt=0, cache=cache)
    assert cache.get_seq_length() == PROMPT - 3 + 4
    assert torch.allclose(found, expected[:, PROMPT - 3 :], atol=2e-5)


def test_after_a_crop_no_value_is_left_of_the_tokens_that_went() -> None:
    model, ids = build_ordinary("llama"), tokens(2, PROMPT)
    with ValuePruning(keep=9, first=2, recent=3)(model):
        _, cache = in_calls(model, ids, prompt=PROMPT - 4)
        cache.crop(-5)
        assert all(int(layer.positions.max()) < PROMPT - 5 for layer in layers_of(cache))
        found, _ = in_calls(model, ids[:, -5:], prompt=0, cache=cache)
        assert torch.isfinite(found).all()
        assert all(int((layer.positions[0, 0] >= 0).sum()) == 7 for layer in layers_of(cache))
        cache.crop(-PROMPT)
        again, _ = in_calls(model, ids, prompt=PROMPT - 4, cache=cache)
        fresh, _ = in_calls(model, ids, prompt=PROMPT - 4)
    assert torch.allclose(again, fresh, atol=2e-5)


def test_a_copied_cache_goes_on_by_itself() -> None:
    model, ids, rest = build_ordinary("llama"), tokens(2, PROMPT), tokens(2, 4, seed=1)
    with ValuePruning(keep=9, first=2, recent=2)(model):
        _, cache = in_calls(model, ids)
        copied = copy.deepcopy(cache)
        first, _ = in_calls(model, rest, prompt=0, cache=cache)
        second, _ = in_calls(model, rest, prompt=0, cache=copied)
    assert torch.equal(first, second)


def test_a_cache_that_was_reset_begins_anew() -> None:
    model, ids = build_ordinary("llama"), tokens(2, PROMPT)
    with ValuePruning(keep=9, first=2, recent=2)(model):
        expected, cache = in_calls(model, ids)
        cache.reset()
        found, _ = in_calls(model, ids, cache=cache)
    assert torch.equal(found, expected)


MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
    "offloaded": {"do_sample": False, "cache_implementation": "offloaded"},
}


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("mode", MODES)
def test_generate_runs_in_its_modes(name: str, mode: str) -> None:
    if mode == "offloaded" and not torch.cuda.is_available():
        pytest.skip("transformers offloads from a GPU")
    if (name, mode) == ("gemma2", "prompt lookup"):
        pytest.skip("windows that record their past are those of transformers; full layers alone are looked at")
    model, ids = build_ordinary(name), tokens(1 if mode == "prompt lookup" else 2, PROMPT)
    with ValuePruning(keep=9, first=2, recent=3)(model):
        torch.manual_seed(0)
        written = model.generate(
            ids, max_new_tokens=8, min_new_tokens=8, pad_token_id=0, return_dict_in_generate=True, **MODES[mode]
        )
    assert written.sequences.shape[1] == PROMPT + 8
    for layer in layers_of(cache_of(written)):
        assert int((layer.positions >= 0).sum(-1).max()) <= 7


def test_greedy_generation_writes_the_most_likely_tokens_of_single_calls() -> None:
    model, ids = build_ordinary("llama"), tokens(2, PROMPT)
    with ValuePruning(keep=9, first=2, recent=3)(model), torch.no_grad():
        written = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
        cache, part = DynamicCache(config=model.config), ids
        for place in range(PROMPT, PROMPT + 6):
            logits = model(part, use_cache=True, **cache_argument(cache)).logits[:, -1]
            logits[:, 2] = -torch.inf  # the end, which generation was told to wait with
            part = logits.argmax(-1, keepdim=True)
            assert torch.equal(part[:, 0], written[:, place])


def test_eager_attention_gives_weights_that_are_zero_where_values_went() -> None:
    model, ids = build_ordinary("llama", attn_implementation="eager"), tokens(2, PROMPT + 1)
    model.set_attn_implementation("eager")
    with ValuePruning(keep=9, first=2, recent=3)(model), torch.no_grad():
        cache = cache_of(model(ids[:, :PROMPT], use_cache=True))
        output = model(ids[:, PROMPT:], use_cache=True, output_attentions=True, **cache_argument(cache))
    for weights in output.attentions:
        assert weights.shape == (2, 4, 1, PROMPT + 1)
        assert torch.allclose(weights.sum(-1), torch.ones(2, 4, 1))
        assert ((weights > 0).sum(-1) <= 10).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_single(dtype: torch.dtype) -> None:
    ids = tokens(2, PROMPT + 4)
    found = []
    for each in (torch.float32, dtype):
        model = build_ordinary("llama", each)
        with ValuePruning(keep=40, recent=3)(model):
            logits, cache = in_calls(model, ids)
        found.append(logits.float())
        assert layers_of(cache)[0].values.dtype == each
    assert (found[0] - found[1]).abs().mean() < 0.05 * found[0].std()


# ------------------------------------------------------------------------------------------------------- compression


def geometries_of(model: PreTrainedModel, k: int, **settings: Any) -> Any:
    batches = [tokens(4, 40, seed=seed) for seed in range(4)]
    return fit_value_geometries(model, batches, k, progress=False, **settings)


@pytest.mark.parametrize("strategy", ["prune_first", "compress_first"])
@pytest.mark.parametrize("epochs", [0, 2], ids=["components", "spline"])
def test_codes_of_all_numbers_lose_nothing(strategy: str, epochs: int) -> None:
    model, ids = build_ordinary("llama"), tokens(2, PROMPT + 4)
    settings = {"keep": 9, "first": 2, "recent": 3}
    geometries = geometries_of(model, 8, epochs=epochs, learning_rate=0.05)
    with ValuePruning(**settings)(model):
        expected, _ = in_calls(model, ids)
    with ValuePruning(**settings, geometries=geometries, strategy=strategy)(model):
        found, _ = in_calls(model, ids)
    assert torch.allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("epochs", [0, 2], ids=["components", "spline"])
def test_strategies_store_codes_and_differ_in_what_a_prompt_reads(epochs: int) -> None:
    model, ids = build_ordinary("llama"), tokens(2, PROMPT + 4)
    stock, _ = in_calls(model, ids)
    found = {}
    for strategy in ("prune_first", "compress_first"):
        pruning = ValuePruning(
            keep=9, first=2, recent=3, geometries=geometries_of(model, 2, epochs=epochs), strategy=strategy
        )
        with pruning(model):
            found[strategy], cache = in_calls(model, ids)
        for layer in layers_of(cache):
            assert layer.values.shape == (2, 2, 7, 2)
            assert layer.first_values.shape == (2, 2, 2, 8)
    assert torch.allclose(found["prune_first"][:, :PROMPT], stock[:, :PROMPT], atol=2e-5)
    assert not torch.allclose(found["compress_first"][:, :PROMPT], stock[:, :PROMPT], atol=1e-3)
    assert not torch.allclose(found["prune_first"], found["compress_first"], atol=1e-3)


def test_a_mixture_of_codes_is_the_mixture_of_what_they_stand_for() -> None:
    model, ids = build_ordinary("llama"), tokens(2, PROMPT + 4)
    geometries = geometries_of(model, 3, epochs=0)
    pruning = ValuePruning(keep=9, first=0, recent=3, geometries=geometries)
    with pruning(model):
        found, _ = in_calls(model, ids)
    with torch.no_grad():
        for geometry in geometries.values():
            geometry.spline.bends[0, 0] = 1e-9  # no longer linear by name, though it hardly bends anything
    with pruning(model):
        expanded, _ = in_calls(model, ids)
    assert torch.allclose(found, expanded, atol=1e-4)


def test_geometries_are_fitted_to_all_values_or_to_those_that_pruning_leaves() -> None:
    model = build_ordinary("llama")
    everything = geometries_of(model, 2, epochs=0)
    left = geometries_of(model, 2, epochs=0, pruning=ValuePruning(keep=9, first=2, recent=3))
    assert set(everything) == set(left) == {HeadKey(layer, head) for layer in range(2) for head in range(2)}
    assert not torch.allclose(everything[HeadKey(0, 0)].mean, left[HeadKey(0, 0)].mean, atol=1e-3)
    drawn = collect_vectors(model, [tokens(4, 40, seed=seed) for seed in range(4)], progress=False)
    assert len(drawn[HeadKey(0, 0)]) == 4 * 4 * (40 - 4)


# ------------------------------------------------------------------------------------------------------- bad input

BAD_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "neither": ({}, "give one of them"),
    "both": ({"keep": 50, "share": 0.5}, "give one of them"),
    "keep below first and recent": ({"keep": 30}, "fewer than the 4 first and 32 recent"),
    "share of nothing": ({"share": 0.0}, "above 0, and 1 at most"),
    "share above all": ({"share": 1.5}, "above 0, and 1 at most"),
    "share that is no number": ({"share": float("nan")}, "above 0, and 1 at most"),
    "no recent tokens": ({"keep": 50, "recent": 0}, "has no score"),
    "negative first": ({"keep": 50, "first": -1}, "0 or more first tokens"),
    "unknown scores": ({"keep": 50, "scores": "max"}, "sum, mean"),
    "unknown strategy": ({"keep": 50, "strategy": "C"}, "prune_first, compress_first"),
    "strategy without geometries": ({"keep": 50, "strategy": "compress_first"}, "fit_value_geometries"),
}


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ValuePruning(**settings)


REFUSED_MODELS: dict[str, tuple[Callable[[], PreTrainedModel], type[Exception], str]] = {
    "latent attention": (lambda: build("deepseek_v3", torch.float32), UnsupportedError, "from the same latent"),
    "windows only": (lambda: build_ordinary("mistral"), UnsupportedError, "All layers of .* have sliding windows"),
    "chunks": (lambda: build_ordinary("llama4_text"), UnsupportedError, "own chunk"),
    "shared keys": (lambda: build_ordinary("gemma4_text"), UnsupportedError, "reads the keys and values of"),
    "attention by itself": (lambda: build_ordinary("falcon"), UnsupportedError, "computes attention by itself"),
    "unknown attention": (lambda: build_ordinary("bloom"), NotMLAError, "no attention layer"),
}


@pytest.mark.parametrize(("make", "kind", "message"), REFUSED_MODELS.values(), ids=REFUSED_MODELS)
def test_models_that_cannot_do_without_values_are_refused_by_name(
    make: Callable[[], PreTrainedModel], kind: type[Exception], message: str
) -> None:
    model = make()
    with pytest.raises(kind, match=message), ValuePruning(keep=40)(model):
        pass
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_patched_model_is_refused() -> None:
    model = build_ordinary("llama")
    patch_model_with_kvsplice(model, KVSpliceConfig(bits=6), calibration=[tokens(4, 40)])
    with pytest.raises(UnsupportedError, match="patched model"), ValuePruning(keep=40)(model):
        pass


def test_a_context_within_a_context_is_refused() -> None:
    model, pruning = build_ordinary("llama"), ValuePruning(keep=40)
    with pruning(model), pytest.raises(UnsupportedError, match="in a context of value pruning"), pruning(model):
        pass


def test_keep_above_the_positions_of_the_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="the model has 64 positions"), ValuePruning(keep=65)(build_ordinary("gpt2")):
        pass


def call_without_cache(model: PreTrainedModel) -> None:
    model(tokens(1, 6), use_cache=False)


def call_with_static_cache(model: PreTrainedModel) -> None:
    model(tokens(1, 6), **cache_argument(StaticCache(config=model.config, max_cache_len=16)))


def call_with_filled_cache(model: PreTrainedModel) -> None:
    cache = DynamicCache(config=model.config)
    cache.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), 0)
    model(tokens(1, 6), **cache_argument(cache))


def call_in_training(model: PreTrainedModel) -> None:
    model.train()(tokens(1, 6))


def call_with_mask_of_heads(model: PreTrainedModel) -> None:
    model(tokens(1, 6), attention_mask=torch.zeros(1, 4, 6, 6))


CALLS = {
    "no cache": (call_without_cache, UnsupportedError, "got no cache"),
    "a static cache": (call_with_static_cache, UnsupportedError, "a StaticLayer of StaticCache"),
    "a filled cache": (call_with_filled_cache, CacheMismatchError, "all their values already"),
    "training": (call_in_training, UnsupportedError, "for inference"),
    "a mask for each head": (call_with_mask_of_heads, UnsupportedError, "one for all heads"),
}


@pytest.mark.parametrize(("call", "kind", "message"), CALLS.values(), ids=CALLS)
def test_calls_that_prune_nothing_are_refused(call: Any, kind: type[Exception], message: str) -> None:
    model = build_ordinary("llama")
    with ValuePruning(keep=40)(model), pytest.raises(kind, match=message):
        call(model)


def test_continuous_batching_is_refused() -> None:
    model = build_ordinary("llama")
    layer = model.model.layers[0].self_attn
    with ValuePruning(keep=40)(model), pytest.raises(UnsupportedError, match="generate_batch"):
        layer(torch.zeros(1, 4, 32), (None, None), None, **cache_argument(object()))


def test_a_cache_with_pruned_values_is_refused_outside_of_value_pruning_and_stays_as_it_is() -> None:
    model, ids = build_ordinary("llama"), tokens(2, PROMPT)
    pruning = ValuePruning(keep=9, first=2, recent=3)
    with pruning(model):
        _, cache = in_calls(model, ids)
    with pytest.raises(CacheMismatchError, match="outside of value pruning"):
        in_calls(model, ids[:, :2], prompt=0, cache=cache)
    assert cache.get_seq_length() == PROMPT
    with pruning(model):
        in_calls(model, ids[:, :2], prompt=0, cache=cache)


def test_a_cache_whose_last_call_failed_is_refused() -> None:
    model, ids = build_ordinary("llama"), tokens(1, PROMPT)
    with ValuePruning(keep=9, first=2, recent=3)(model):
        _, cache = in_calls(model, ids)
        with pytest.raises(UnsupportedError):
            model(ids[:, :1], attention_mask=torch.zeros(1, 4, 1, PROMPT + 1), use_cache=True, **cache_argument(cache))
        with pytest.raises(CacheMismatchError, match="An earlier call on this cache ended with an error"):
            in_calls(model, ids[:, :1], prompt=0, cache=cache)


def test_a_cache_of_other_geometries_is_refused() -> None:
    model, ids = build_ordinary("llama"), tokens(2, PROMPT)
    with ValuePruning(keep=9, first=2, recent=3)(model):
        _, cache = in_calls(model, ids)
    other = ValuePruning(keep=9, first=2, recent=3, geometries=geometries_of(model, 2, epochs=0))
    with other(model), pytest.raises(CacheMismatchError, match="pruned with other settings"):
        in_calls(model, ids[:, :1], prompt=0, cache=cache)


def test_geometries_of_another_model_are_refused() -> None:
    model, other = build_ordinary("llama"), build_ordinary("llama", head_dim=16)
    pruning = ValuePruning(keep=40, geometries=geometries_of(other, 2, epochs=0))
    with pytest.raises(ConfigError, match="vectors of 16 numbers"), pruning(model):
        pass
    missing = ValuePruning(keep=40, geometries={})
    with pytest.raises(ConfigError, match="is missing"), missing(model):
        pass


def test_geometries_are_not_fitted_to_what_is_compressed_already_or_to_too_few_values() -> None:
    model = build_ordinary("llama")
    pruning = ValuePruning(keep=40, geometries=geometries_of(model, 2, epochs=0))
    with pytest.raises(ConfigError, match="has geometries already"):
        geometries_of(model, 2, pruning=pruning)
    with pytest.raises(ConfigError, match="above the 8 numbers"):
        geometries_of(model, 9)
    with pytest.raises(CalibrationError):
        fit_value_geometries(model, [], 2, progress=False)


def test_a_module_that_reads_values_before_its_attention_function_gets_an_error() -> None:
    values = SomeValues(ValuePrunedLayer(), None, torch.zeros(1, 2, 3, 4))  # type: ignore[arg-type]
    for read in (lambda: values[0], lambda: torch.cat([values]), lambda: values.transpose(1, 2)):
        with pytest.raises(UpstreamChangedError, match="pruned values"):
            read()


# ------------------------------------------------------------------------------------------------ how it is measured


@torch.no_grad()
def test_latent_attention_that_caches_its_heads_is_the_same_and_can_be_pruned() -> None:
    settings = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    torch.manual_seed(0)
    model = GPT2MLAForCausalLM(GPT2MLAConfig(**settings, kv_lora_rank=64)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.2)
    ids, sites = tokens(2, PROMPT + 4), sites_of_heads(model)
    stock, _ = in_calls(model, ids)
    with caching_heads(sites):
        found, cache = in_calls(model, ids)
    assert torch.allclose(found, stock, atol=2e-5)
    assert cache.layers[0].values.shape == (2, 4, PROMPT + 4, 8)
    with ValuePruning(keep=9, first=2, recent=3).on(sites), caching_heads(sites):
        pruned, cache = in_calls(model, ids)
    assert layers_of(cache)[0].values.shape == (2, 4, 7, 8)
    assert torch.allclose(pruned[:, :PROMPT], stock[:, :PROMPT], atol=2e-5)
    assert not torch.allclose(pruned, stock, atol=1e-3)
    assert torch.equal(in_calls(model, ids)[0], stock)


def test_pruning_a_filled_cache_leaves_what_pruning_a_prompt_does() -> None:
    model, ids = build_ordinary("llama"), tokens(2, PROMPT)
    pruning = ValuePruning(keep=9, first=2, recent=3, geometries=geometries_of(model, 3, epochs=0))
    with ValuePruning(share=1.0, first=2, recent=3)(model):
        _, cache = in_calls(model, ids)
    with pruning(model):
        _, expected = in_calls(model, ids)
    for site in find_sites(model):
        found, layer = cache.layers[site.layer_idx], expected.layers[site.layer_idx]
        found.prune(pruning.plan_of(site))
        assert torch.equal(found.positions.sort(dim=-1).values, layer.positions.sort(dim=-1).values)
        assert torch.allclose(found.values.sum(2), layer.values.sum(2), atol=1e-4)
        assert found.identity == layer.identity


class _Words:
    """A tokenizer of single characters."""

    def __call__(self, text: Any, **kwargs: Any) -> Any:
        texts = [text] if isinstance(text, str) else text
        found = [[FIRST_ORDINARY_TOKEN + ord(letter) % 100 for letter in each] for each in texts]
        return {"input_ids": found[0] if isinstance(text, str) else found}


def test_a_trial_measures_each_step_of_the_research_and_packed_rows_beside_it() -> None:
    model = build_ordinary("llama")
    calibrator = KVSpliceCalibrator(model).collect([tokens(4, 60, seed=seed) for seed in range(4)], progress=False)
    args = SimpleNamespace(prompt=40, continuation=8, chunk=4, keep=16, first=2, recent=4, components=2, epochs=1)
    vars(args).update(evaluation=["pydoc"], windows=2, calibration=["pydoc"], calibration_windows=2)
    trial = Trial(model, _Words(), args, calibrator)
    arms = trial.arms()
    sizes = trial.sizes(arms)
    arms += trial.packed_arms([sizes["V19: pruned"]["bytes"], 40.0], "trellis")
    rows = {row["name"]: row for row in trial.scores(arms)}
    sizes |= trial.packed_sizes([arm for arm in arms if arm.packed is not None])
    assert len(rows) == len(arms) == 10
    assert sizes["V19: pruned"]["value_bytes"] == 16 / 40 * sizes["full"]["value_bytes"]
    for name, row in rows.items():
        assert row["texts"]["pydoc"]["kl_nats"] > 0
        if name.startswith("packed, "):
            assert sizes[name]["bytes"] <= sizes["V19: pruned"]["bytes"]
    assert set(trial.step_times([*arms[:2]], 1)) == {"V19: pruned", "V19 with mean scores"}
    assert len(means_of([list(rows.values())] * 2, ["pydoc"]).rows) == 10
    args.keep = 41
    with pytest.raises(ConfigError, match="nothing would be pruned"):
        Trial(model, _Words(), args, None)
