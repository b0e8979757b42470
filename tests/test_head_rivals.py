"""Rivals on ordinary attention take the bytes they say, and code keys and values head by head without a trace."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from ordinary_models import ORDINARY_MODELS, build_ordinary
from programs import run_program
from tiny_models import build

from kvsplice_hf import patch_model_with_kvsplice
from kvsplice_hf.bench import rivals
from kvsplice_hf.bench.rivals.heads import _with_exact_window
from kvsplice_hf.errors import ConfigError, PatchStateError
from kvsplice_hf.patch.attention import attend_expanded
from kvsplice_hf.patch.sites import find_sites
from kvsplice_hf.patch.tap import Attended, tapped


K, D = 3, 64  # of SmolLM2-135M
EXACT = 4
# Head counts, windows and attention functions that differ: grouped, sliding, soft caps, sinks, learned positions.
MODELS = ("llama", "gemma2", "gpt_oss", "gpt2", "phi", "cohere2")
every_rival = pytest.mark.parametrize("rival", rivals.HEAD_RIVALS.values(), ids=rivals.HEAD_RIVALS.keys())


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, use_cache=False).logits


def read_through(model: Any, rival: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a model whose keys and values a rival has coded."""
    statistics = rivals.collect_head_statistics(model, [ids])
    with rivals.simulated_heads(model, rival, statistics):
        return logits_of(model, ids)


def seen_by(model: Any, ids: torch.Tensor, rival: Any = None) -> list[Attended]:
    """What every attention function gets, behind a rival where one is given."""
    seen: list[Attended] = []

    def note(site: Any, states: Attended) -> Attended:
        seen.append(states)
        return states

    with tapped(find_sites(model), note):
        logits_of(model, ids)
    return seen


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        "bf16": K * 2 * 2 * D,
        "fp8-g128": K * 2 * (D + 4),
        "nvfp4": K * 2 * (D // 2 + D // 16),
        "int4-g32": K * 2 * (D // 2 + 2 * 4),
        "int2-g32": K * 2 * (D // 4 + 2 * 4),
        "kivi4-t32": K * (D // 2 + D * 4 / 32 + D // 2 + 2 * 4),
        "kivi2-t32": K * (D // 4 + D * 4 / 32 + D // 4 + 2 * 4),
        "hadamard64-int4": K * 2 * (D // 2 + 2 * 2),
        "rotated-lloyd4": K * 2 * (D // 2 + 2),
        "rotated-lloyd3": K * 2 * (D * 3 // 8 + 2),
        "rotated-lloyd2": K * 2 * (D // 4 + 2),
        "oscar2": K * 2 * (D // 4 + 4),
        "oscar2-s64-w256": (320 * 768 + 704 * 120) / 1024,
    }.items(),
)
def test_a_row_of_smollm2_takes_the_bytes_of_its_packed_form(name: str, expected: float) -> None:
    assert rivals.HEAD_RIVALS[name].heads_bytes(K, D, D) == expected


def test_bytes_that_belong_to_a_sequence_are_spread_over_its_tokens() -> None:
    oscar = rivals.HEAD_RIVALS["oscar2-s64-w256"]
    assert replace(oscar, tokens=200).heads_bytes(K, D, D) == 768
    assert replace(oscar, tokens=4096).heads_bytes(K, D, D) == (320 * 768 + 3776 * 120) / 4096
    kivi = replace(rivals.HEAD_RIVALS["kivi4-t32"], tokens=40)  # 8 keys fill no group; values need none
    assert kivi.heads_bytes(1, D, D) == (32 * 40 + 8 * 128) / 40 + 40


@pytest.mark.parametrize("name", MODELS)
def test_bf16_keys_and_values_of_a_bf16_model_change_no_bit(name: str, ids: torch.Tensor) -> None:
    model = build_ordinary(name, torch.bfloat16)
    assert torch.equal(read_through(model, rivals.HEAD_RIVALS["bf16"], ids), logits_of(model, ids))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_window_that_holds_all_tokens_changes_nothing(name: str, attention: str, ids: torch.Tensor) -> None:
    model = build_ordinary(name)
    model.set_attn_implementation(attention if model._supports_sdpa else "eager")
    rival = replace(rivals.HEAD_RIVALS["oscar2"], recent=ids.shape[1])
    torch.testing.assert_close(read_through(model, rival, ids), logits_of(model, ids), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(read_through(model, replace(rival, recent=1), ids), logits_of(model, ids), atol=1e-1)


@pytest.mark.parametrize("bias", [False, True], ids=["no mask", "added mask"])
def test_each_query_sees_its_own_window_exactly_and_the_rest_as_it_is_coded(bias: bool) -> None:
    model = build_ordinary("llama")
    module = find_sites(model)[0].module
    generator = torch.Generator().manual_seed(0)
    query, key, value, coded_key, coded_value = (torch.randn(1, n, 12, 8, generator=generator) for n in (4, 2, 2, 2, 2))
    causal = torch.ones(12, 12, dtype=torch.bool).tril()
    mask = torch.zeros(1, 1, 12, 12).masked_fill(~causal, torch.finfo(torch.float32).min) if bias else None
    seen, coded = Attended(query, key, value, mask), Attended(query, coded_key, coded_value, mask)
    found, _ = attend_expanded(module, *_with_exact_window(seen, coded, 2, 3), base="sdpa", scaling=0.5)
    for place in range(12):
        exact = [at < 2 or place - at < 3 for at in range(place + 1)]
        select = torch.tensor(exact)[:, None]
        keys, values = (
            torch.where(select, *pair).repeat_interleave(2, dim=1)
            for pair in ((key[:, :, : place + 1], coded_key[:, :, : place + 1]),
                         (value[:, :, : place + 1], coded_value[:, :, : place + 1]))
        )  # fmt: skip
        weights = (query[:, :, place, None] @ keys.transpose(-1, -2) * 0.5).softmax(-1)
        torch.testing.assert_close(found[:, place], (weights @ values)[:, :, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rival", ["kivi4-t32", "hadamard64-int4", "rotated-lloyd3", "oscar2-s64-w256"])
def test_a_model_is_afterwards_as_it_was_also_after_an_error(name: str, rival: str, ids: torch.Tensor) -> None:
    model = build_ordinary(name)
    before = {path: dict(vars(module)) for path, module in model.named_modules()}
    attention, logits = model.config._attn_implementation, logits_of(model, ids)
    statistics = rivals.collect_head_statistics(model, [ids])
    coder = replace(rivals.HEAD_RIVALS[rival], first=0, recent=0)
    with rivals.simulated_heads(model, coder, statistics):
        assert not torch.allclose(logits_of(model, ids), logits, atol=1e-2)
    with pytest.raises(KeyError), rivals.simulated_heads(model, coder, statistics):
        raise KeyError
    assert {path: dict(vars(module)) for path, module in model.named_modules()} == before
    assert model.config._attn_implementation == attention
    assert torch.equal(logits_of(model, ids), logits)


def test_a_patched_model_is_refused_and_stays_patched(ids: torch.Tensor) -> None:
    model = build_ordinary("llama")
    statistics = rivals.collect_head_statistics(model, [ids])
    patch_model_with_kvsplice(model, bytes_per_token=40, calibration=ids)
    logits = logits_of(model, ids)
    with pytest.raises(PatchStateError, match="Unpatch"):
        rivals.collect_head_statistics(model, [ids])
    with (
        pytest.raises(PatchStateError, match="Unpatch"),
        rivals.simulated_heads(model, rivals.HEAD_RIVALS["bf16"], statistics),
    ):
        pass
    assert torch.equal(logits_of(model, ids), logits)


@pytest.mark.parametrize("name", MODELS)
def test_the_first_four_tokens_are_not_touched(name: str, ids: torch.Tensor) -> None:
    model = build_ordinary(name)
    coded, logits = read_through(model, rivals.HEAD_RIVALS["rotated-lloyd2"], ids), logits_of(model, ids)
    torch.testing.assert_close(coded[:, :EXACT], logits[:, :EXACT], rtol=1e-5, atol=1e-5)
    assert (coded[:, EXACT] - logits[:, EXACT]).abs().amax() > 1e-3
    with pytest.raises(ConfigError, match="more than 4 tokens"):
        rivals.collect_head_statistics(model, [ids[:, :EXACT]])


@pytest.mark.parametrize("stem", ["int{}-g32", "kivi{}-t32", "rotated-lloyd{}"])
def test_more_bits_lose_less(stem: str, ids: torch.Tensor) -> None:
    model = build_ordinary("llama")
    logits = logits_of(model, ids)
    errors = [(read_through(model, rivals.HEAD_RIVALS[stem.format(b)], ids) - logits).square().mean() for b in (2, 4)]
    assert errors[1] < errors[0] / 4


def test_kivi_codes_keys_by_channel_and_values_by_token() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 1, 64, 32, generator=generator)
    kivi = rivals.HEAD_RIVALS["kivi4-t32"]
    for codec, states, shared in ((kivi, keys, -2), (kivi.for_values, values, -1)):
        spoilt = states.clone()
        spoilt[:, 7, 3] = 1e3
        changed = codec.read_back(spoilt) != codec.read_back(states)
        others = ~(spoilt != states).any(dim=shared, keepdim=True).expand_as(states)
        assert not changed[others].any()
        assert changed[~others].sum() > 20


def test_every_key_head_is_coded_with_the_codec_of_keys_and_every_value_with_that_of_values(
    ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_ordinary("llama")
    rival = rivals.HEAD_RIVALS["kivi4-t32"]
    statistics = rivals.collect_head_statistics(model, [ids])
    seen = seen_by(model, ids)[0]
    coded: dict[Any, list[torch.Tensor]] = {}
    for kind in (type(rival), type(rival.for_values)):
        coded[kind] = []
        monkeypatch.setattr(kind, "code", lambda self, x, kind=kind: coded[kind].append(x) or x)
    with rivals.simulated_heads(model, rival, statistics):
        logits = logits_of(model, ids)
    torch.testing.assert_close(logits, logits_of(model, ids))
    for kind, states in ((type(rival), seen.key), (type(rival.for_values), seen.value)):
        assert len(coded[kind]) == 2 * 2  # layers and key heads
        torch.testing.assert_close(torch.stack(coded[kind][:2], dim=1), states[:, :, EXACT:])


def test_statistics_are_those_of_rotated_keys_values_and_queries_behind_the_first_tokens(ids: torch.Tensor) -> None:
    model = build_ordinary("llama")
    collected = rivals.collect_head_statistics(model, ids.split(1))
    assert [(part.layer_idx, part.head) for part in collected] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    seen = seen_by(model, ids)
    for part, found in collected.items():
        query, key, value, _ = seen[part.layer_idx]
        heads = slice(2 * part.head, 2 * part.head + 2)
        queries = query[:, heads, EXACT:].double()
        keys, values = (states[:, part.head, EXACT:].double() for states in (key, value))
        for states, statistics in ((keys, found.keys), (values, found.values)):
            flat = states.flatten(0, 1)
            torch.testing.assert_close(statistics.mean, flat.mean(0).float(), rtol=1e-4, atol=1e-5)
            covariance = torch.cov(flat.T, correction=0).float()
            torch.testing.assert_close(statistics.covariance, covariance, rtol=1e-4, atol=1e-5)
        of_queries = sum(q.flatten(0, 1).T @ q.flatten(0, 1) for q in queries)
        of_values: Any = 0
        for q, k, v in zip(queries, keys, values, strict=True):  # each sequence is weighted by its own queries
            q = q.flatten(0, 1)
            weights = (q @ k.T).square().sum(0)
            of_values = of_values + torch.einsum("t,ti,tj->ij", weights, v, v)
        for weight, expected in ((found.keys.kv_b_weight, of_queries), (found.values.kv_b_weight, of_values)):
            moment = weight.double().T @ weight.double()
            torch.testing.assert_close(moment / moment.trace(), expected / expected.trace(), rtol=1e-3, atol=1e-5)


def test_a_rotation_by_its_readers_errs_less_where_they_read_few_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    mix = torch.linalg.qr(torch.randn(64, 64, generator=generator)).Q
    sizes = torch.logspace(1, -1, 64)
    keys = torch.randn(1, 400, 64, generator=generator) * sizes @ mix
    readers = torch.diag(sizes) @ mix
    flat = keys.flatten(0, 1)
    statistics = rivals.LayerStatistics(flat.mean(0), torch.cov(flat.T), torch.zeros(0), readers)
    errors = [
        ((rival.fit(statistics).read_back(keys) - keys) @ readers.T).square().mean()
        for rival in (rivals.ReaderRotatedIntegers(), rivals.IntegerPerToken(bits=2, group=64))
    ]
    assert errors[0] < 0.75 * errors[1]


@every_rival
@pytest.mark.parametrize("tokens", [EXACT + 1, 38], ids=["one coded token", "34 coded tokens"])
def test_every_rival_reads_any_number_of_tokens_in_half_precision(rival: Any, tokens: int, ids: torch.Tensor) -> None:
    model = build_ordinary("qwen3", torch.bfloat16)
    statistics = rivals.collect_head_statistics(model, [ids])
    with rivals.simulated_heads(model, rival, statistics):
        logits = logits_of(model, ids[:, :tokens])
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()


def test_models_with_latents_have_no_heads_to_code(ids: torch.Tensor) -> None:
    assert rivals.collect_head_statistics(build("deepseek_v3"), [ids]) == {}


@pytest.fixture(scope="module")
def ordinary_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("ordinary")
    build_ordinary("llama", vocab_size=256).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def test_the_script_measures_every_rival_on_ordinary_attention(ordinary_folder: str, tmp_path: Path) -> None:
    sizes = ["--window", "64", "--calibration-tokens", "512", "--evaluation-tokens", "128", "--ours", "40"]
    report = run_program("measure/codecs.py", "--model", ordinary_folder, *sizes, "--output", str(tmp_path))
    rows = {row["name"]: row for row in report["results"]}
    assert list(rows) == ["ours", *rivals.HEAD_RIVALS, *rivals.CACHE_BACKENDS]
    assert rows["bf16"]["bytes_per_token"] == 2 * 2 * (8 + 8)
    assert rows["int2-g32"]["bytes_per_token"] == 2 * 2 * (2 + 4)
    kl = {name: row["texts"]["pydoc"]["kl_nats"] for name, row in rows.items() if "skipped" not in row}
    assert kl["bf16"] < kl["int4-g32"] < kl["int2-g32"]
    assert kl["transformers-fp8"] > 0
    assert kl["ours"] < kl["rotated-lloyd4"]
    assert all(row.get("other_variant") is None for row in rows.values())


def test_the_script_tells_each_row_at_once_and_can_do_without_ours(
    ordinary_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr("builtins.print", lambda *parts, **_: told.append(str(parts[0])))
    sizes = ["--window", "64", "--calibration-tokens", "64", "--evaluation-tokens", "64", "--ours", "0"]
    settings = ["--rivals", "transformers-fp8", "oscar2", "--output", str(tmp_path)]
    with pytest.raises(IndexError):  # the program's own last line went the same way
        run_program("measure/codecs.py", "--model", ordinary_folder, *sizes, *settings)
    *rows, report = map(json.loads, told)
    assert [row["name"] for row in rows] == ["transformers-fp8", "oscar2"]
    assert rows == report["results"]


@pytest.mark.parametrize("name", ["int4-g32-k8", "weight-svd-0.5"])
def test_the_script_refuses_a_rival_that_does_not_suit_the_model(ordinary_folder: str, name: str) -> None:
    with pytest.raises(SystemExit, match=f"--rivals has {name}; it takes bf16"):
        run_program("measure/codecs.py", "--model", ordinary_folder, "--rivals", name)


def test_a_real_cache_of_two_bits_takes_half_the_codes_of_one_of_four() -> None:
    pytest.importorskip("optimum.quanto")
    four, two = (rivals.CACHE_BACKENDS[f"transformers-{name}"] for name in ("quanto", "quanto2"))
    assert four.bytes_per_token(192, 192) == 2 * 192 * (1 / 2 + 4 / 64)
    assert two.bytes_per_token(192, 192) == 2 * 192 * (1 / 4 + 4 / 64)


def test_names_of_models_are_those_of_the_table() -> None:
    assert set(MODELS) <= set(ORDINARY_MODELS)
