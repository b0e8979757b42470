"""The decode benchmark has a row for every recipe, and its caches are those of a real prefill. No time is judged."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from programs import load_program, run_program
from tiny_models import build
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from kvsplice_hf import cache_nbytes
from kvsplice_hf.bench import memory_limits
from kvsplice_hf.bench.bandwidth import weight_bytes
from kvsplice_hf.bench.filled_caches import Filled, fill, padding_of, rewind, step
from kvsplice_hf.bench.geometries import GEOMETRIES
from kvsplice_hf.bench.recipes import RECIPES, apply_recipe, patched_models, random_tokens, runnable_recipes
from kvsplice_hf.bench.rounds import interleaved
from kvsplice_hf.errors import ConfigError


ROOT = Path(__file__).parent.parent
SHAPE = ["--geometry", "mini", "--layers", "1"]
# Hidden sizes that take no time; everything that concerns attention is as published.
NARROW = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "vocab_size": 4096}
ORDINARY = [name for name, geometry in GEOMETRIES.items() if geometry.family == "Llama"]
RUNNABLE = runnable_recipes()
every_recipe = pytest.mark.parametrize("name", RUNNABLE)


def narrow(name: str, layers: int = 1) -> PreTrainedModel:
    geometry, sizes = GEOMETRIES[name], dict(NARROW)
    if name in ORDINARY:  # a key of 8 numbers
        sizes["hidden_size"] = 8 * geometry.sizes["num_attention_heads"]
    geometry = replace(geometry, sizes={**geometry.sizes, **sizes})
    return geometry.build(geometry.config(layers), torch.float32, "cpu")


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    return patched_models(narrow("mini"), RUNNABLE)


@pytest.fixture
def shared(models: dict[str, PreTrainedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs take models that were patched, and calibrated, once for all tests."""
    for program in ("decode", "prefill", "profile_step"):
        module = load_program(f"measure/{program}.py")
        monkeypatch.setattr(module, "patched_models", lambda model, names: {name: models[name] for name in names})


def test_every_recipe_comes_first_in_turn_and_the_first_round_does_not_count() -> None:
    turns = list(interleaved(["a", "b", "c"], rounds=3))
    assert "".join(turn.name for turn in turns) == "abc" + "bca" + "cab" + "abc"
    assert [turn.counts for turn in turns] == [False] * 3 + [True] * 9


def settings_of(rows: list[dict[str, Any]]) -> list[tuple[int, int, str]]:
    return [(row["batch_size"], row["context"], row["recipe"]) for row in rows]


def test_adapters_are_on_all_models_of_a_run(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    quick = [*SHAPE, "--repeats", "1", "--steps", "1", "--bandwidth_mb", "4", "--context", "96"]
    settings = ["--recipes", "stock", "rank R/2", "--adapter_rank", "4", "--output", str(tmp_path)]
    stock, spliced = run_program("measure/decode.py", *quick, *settings)["rows"]
    assert stock["materialised_bytes"] == 0
    assert spliced["materialised_bytes"] == 16 * (128 + 128) * 512 * 4  # heads, nope and value, latent, float32


def test_every_setting_has_a_row_for_every_recipe(shared: None, tmp_path: Path) -> None:
    quick = [*SHAPE, "--repeats", "1", "--steps", "1", "--bandwidth_mb", "4"]
    settings = ["--contexts", "64", "96", "--batch_sizes", "1", "2", "--recipes", "all", "--padded"]
    report = run_program("measure/decode.py", *quick, *settings, "--output", str(tmp_path))
    rows = report["rows"]
    assert settings_of(rows) == [
        (batch, context, name) for batch in (1, 2) for context in (64, 96) for name in RUNNABLE
    ]
    assert not [row for row in rows if "skipped" in row]
    assert report["bandwidth_gb_s"] > 0
    for row in rows:
        assert len(row["decode_s"]) == len(row["decode_stock_over_this"]) == len(row["times_bound"]) == 1
        assert row["moved_bytes"] == row["cache_bytes"] + row["weight_bytes"]
    for context in (64, 96):
        sizes = {row["recipe"]: row["cache_bytes"] for row in rows if row["context"] == context}
        assert sizes["stock"] == sizes["stock static"] == 2 * context * 576 * 4
        assert sizes["stock fp8"] == 2 * context * 576
        assert sizes["packed 4x"] < sizes["rank R/2"] < sizes["stock"] <= sizes["full rank"]
    folder = Path(report["folder"])
    assert {path.name for path in folder.iterdir()} == {"report.json", "step_time.png"}


def test_prompts_of_every_length_are_timed_beside_stock(shared: None, tmp_path: Path) -> None:
    settings = ["--contexts", "16", "24", "--batch_sizes", "2", "--recipes", "all", "--padded", "--repeats", "2"]
    report = run_program("measure/prefill.py", *SHAPE, *settings, "--output", str(tmp_path))
    rows = report["rows"]
    assert settings_of(rows) == [(2, context, name) for context in (16, 24) for name in RUNNABLE]
    assert all(len(row["prefill_s"]) == len(row["prefill_this_over_stock"]) == 2 for row in rows)
    assert {path.name for path in Path(report["folder"]).iterdir()} == {"report.json", "prefill_time.png"}


def test_where_stock_did_not_run_no_ratio_is_given(shared: None, tmp_path: Path) -> None:
    settings = ["--contexts", "16", "--repeats", "1", "--recipes", "rank R/2", "--output", str(tmp_path)]
    for program, extra in (("decode", ["--steps", "1", "--bandwidth_mb", "4"]), ("prefill", [])):
        row = run_program(f"measure/{program}.py", *SHAPE, *settings, *extra)["results"]["rank R/2"]
        assert not [name for name in row if "stock" in name or "ratio" in name]


@pytest.mark.parametrize(
    "program", [("decode", "--bandwidth_mb", "4"), ("prefill",), ("profile_step",)], ids=lambda program: program[0]
)
def test_where_nothing_fitted_into_memory_no_figure_is_drawn(
    shared: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: tuple[str, ...]
) -> None:
    monkeypatch.setattr(memory_limits, "free_memory", lambda device: 0)
    name, *settings = program
    report = run_program(f"measure/{name}.py", *SHAPE, *settings, "--output", str(tmp_path))
    assert all("GB" in row["skipped"] for row in report["rows"])
    assert [path.name for path in Path(report["folder"]).iterdir()] == ["report.json"]


@every_recipe
def test_a_quickly_filled_cache_is_that_of_a_real_prefill(models: dict[str, PreTrainedModel], name: str) -> None:
    recipe, model = RECIPES[name], models[name]
    length = 50
    real = Filled(recipe.make_cache(model.config, length + 2), length, padding_of(2, length, model.device), None)
    step(model, real, random_tokens(model, 2, length), grow=0)
    quick = fill(model, recipe, 2, length, 2, padded=True)
    (one,), (other,) = real.cache.layers, quick.cache.layers
    assert type(one) is type(other)
    assert int(one.get_seq_length()) == int(other.get_seq_length()) == length
    assert cache_nbytes(real.cache) == cache_nbytes(quick.cache)
    if recipe.is_spliced:
        assert one.keys.dtype == other.keys.dtype
        # The longest padding is half of the length; the exact tokens follow it.
        assert other.exact.positions.tolist() == one.exact.positions.tolist() == [[0, 1, 2, 3], [25, 26, 27, 28]]


@every_recipe
def test_a_cache_that_was_rewound_gives_the_same_step_again(models: dict[str, PreTrainedModel], name: str) -> None:
    model = models[name]
    filled = fill(model, RECIPES[name], 2, 40, 4, padded=True)
    logits: list[torch.Tensor] = []
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: logits.append(output))
    for _ in range(2):
        size = cache_nbytes(filled.cache)
        step(model, filled)
        step(model, filled)
        assert cache_nbytes(filled.cache) > size
        rewind(filled, 2)
        # How tokens are rotated that were taken back stays known.
        assert 0 <= cache_nbytes(filled.cache) - size < 100
    hook.remove()
    assert all(step.isfinite().all() for step in logits)
    assert torch.equal(logits[0], logits[2])
    assert torch.equal(logits[1], logits[3])


@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_geometry_decodes(name: str) -> None:
    model = narrow(name)
    if name in ORDINARY:
        for recipe in (RECIPES["stock"], RECIPES["packed 4x, key blocks of 2"]):
            filled = fill(apply_recipe(model, recipe), recipe, 1, 24, 1, padded=False)
            step(model, filled)
            assert filled.length == 25
            assert cache_nbytes(filled.cache) > 0
        return
    for recipe in (RECIPES["stock"], RECIPES["rank R/2"]):
        filled = fill(apply_recipe(model, recipe), recipe, 1, 24, 1, padded=False)
        step(model, filled)
        numbers = sum(layer.keys.shape[-1] + layer.values.shape[-1] for layer in filled.cache.layers)
        rank = model.config.kv_lora_rank if not recipe.is_spliced else round(model.config.kv_lora_rank / 2)
        assert numbers == rank + model.config.qk_rope_head_dim


def test_published_sizes() -> None:
    def sizes(name: str) -> tuple[int, ...]:
        config = GEOMETRIES[name].config(2)
        fields = ("hidden_size", "num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_rope_head_dim")
        return tuple(getattr(config, field) for field in (*fields, "qk_nope_head_dim", "v_head_dim", "vocab_size"))

    assert sizes("v2-lite") == (2048, 16, None, 512, 64, 128, 128, 102400 * 2 // 27)
    assert sizes("v3") == (7168, 128, 1536, 512, 64, 128, 128, 129280 * 2 // 61)
    assert sizes("glm-4.7-flash") == (2048, 20, 768, 512, 64, 192, 256, 154880 * 2 // 47)
    assert sizes("mistral-4") == (4096, 32, 1024, 256, 64, 64, 128, 131072 * 2 // 36)
    assert sizes("smollm2-mla") == (576, 9, None, 321, 64, 64, 64, 49152 * 2 // 30)
    assert GEOMETRIES["v3"].config(2, whole_vocabulary=True).vocab_size == 129280


def test_a_step_reads_the_chosen_experts_and_no_embedding() -> None:
    model = narrow("v2-lite", layers=2)  # one dense layer, one with eight experts of which six run
    token = torch.zeros(1, 1, dtype=torch.long)
    total = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    experts = sum(weight.nbytes for weight in model.model.layers[1].mlp.experts.parameters())
    embedding = model.get_input_embeddings().weight.nbytes
    assert weight_bytes(model, lambda: model(token)) == total - embedding - experts // 4
    tied = narrow("smollm2-mla")
    total = sum(tensor.nbytes for tensor in (*tied.parameters(), *tied.buffers()))
    assert weight_bytes(tied, lambda: tied(token)) == total


def test_recipes_share_the_weights(models: dict[str, PreTrainedModel]) -> None:
    heads = {model.lm_head.weight.data_ptr() for model in models.values()}
    assert len(heads) == 1
    assert not hasattr(models["stock"].model.layers[0].self_attn, "kvsplice")


def test_the_profile_names_operators(shared: None, tmp_path: Path) -> None:
    settings = ["--contexts", "64", "--recipes", "stock", "rank R/2", "--steps", "1", "--operators", "3"]
    report = run_program("measure/profile_step.py", *SHAPE, *settings, "--output", str(tmp_path))
    assert list(report["results"]) == ["stock", "rank R/2"]
    for row in report["rows"]:
        assert row["operators_ms"]["aten::mm"] > 0
        assert row["total_ms"] == pytest.approx(sum(row["operators_ms"].values()))


def test_generate_times_the_tokens_after_the_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mla = build("deepseek_v3")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    original = LlamaForCausalLM(LlamaConfig(vocab_size=mla.config.vocab_size, num_key_value_heads=1, **sizes)).eval()
    generation = load_program("measure/generation.py")
    monkeypatch.setattr(generation, "load_model", lambda name, dtype: (mla, None))
    monkeypatch.setattr(generation, "load_original_demo_model", lambda dtype: (original, None))
    settings = ["--generate", "4", "--repeats", "1", "--output", str(tmp_path)]
    report = run_program("measure/generation.py", *settings, "--contexts", "32")
    assert list(report["results"]) == ["stock", "rank R/2", "packed 4x", "original GQA"]
    assert all(len(row["decode_s"]) == len(row["prefill_s"]) == 1 for row in report["rows"])
    with pytest.raises(SystemExit, match="positions"):
        run_program("measure/generation.py", *settings, "--contexts", "510")


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory from /proc")


@linux
def test_memory_of_decode_steps_holds_the_cache_and_the_temporaries(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # of the process that measures
    settings = ["--contexts", "512", "--memory_steps", "2", "--recipes", "stock"]
    (row,) = run_program("measure/step_memory.py", *SHAPE, *settings, "--output", str(tmp_path))["rows"]
    expanded = 512 * 16 * (128 + 128 + 128 + 64) * 4
    assert row["temporary_bytes"] > expanded, "keys and values of all heads, as stock attention makes them"
    assert row["total_bytes"] == row["cache_allocated_bytes"] + row["temporary_bytes"]


@linux
def test_peak_memory_of_generate_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    settings = ["--contexts", "96", "--memory_steps", "2", "--recipes", "rank R/2"]
    (row,) = run_program("measure/memory.py", *SHAPE, *settings, "--output", str(tmp_path))["rows"]
    assert row["peak_bytes"] > 0


@linux
def test_every_recipe_has_a_process_of_its_own_and_one_that_ends_early_is_skipped_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run(command: list[str], env: dict[str, str], **settings: Any) -> CompletedProcess[str]:
        assert env["MALLOC_ARENA_MAX"] == "1"
        name, _, batch, _, context = command[-5:]
        measured = json.dumps({"peak_bytes": int(batch) * int(context)})
        return {
            "stock": CompletedProcess(command, 0, f"other output\n{measured}\n", ""),
            "full rank": CompletedProcess(command, 1, "", "a warning\nConfigError: too large\n"),
            "rank R/2": CompletedProcess(command, -9, "", ""),
        }[name]

    monkeypatch.setattr(subprocess, "run", run)
    settings = ["--contexts", "32", "64", "--batch_sizes", "2", "--output", str(tmp_path)]
    rows = run_program("measure/memory.py", *SHAPE, *settings)["rows"]
    assert settings_of(rows) == [(2, n, name) for n in (32, 64) for name in ("stock", "full rank", "rank R/2")]
    assert [row["peak_bytes"] for row in rows if row["recipe"] == "stock"] == [64, 128]
    assert rows[1]["skipped"] == "ConfigError: too large"
    assert "killed" in rows[2]["skipped"]


def test_what_does_not_fit_into_memory_is_skipped_with_its_reason(
    models: dict[str, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models["stock"]
    cache = memory_limits.cache_estimate(model.config, 4, 1, 64)
    monkeypatch.setattr(memory_limits, "free_memory", lambda device: 4 * cache)
    reasons = memory_limits.too_large(model, ["stock", "rank R/2"], 1, 64)
    assert list(reasons) == ["stock"], "only stock expands keys and values"
    monkeypatch.setattr(memory_limits, "free_memory", lambda device: cache)
    assert list(memory_limits.too_large(model, ["stock", "rank R/2"], 1, 64)) == ["stock", "rank R/2"]
    assert memory_limits.prefill_too_large(model, 1, 64)


@pytest.mark.parametrize(
    ("program", "wrong", "named"),
    [
        ("decode", {"geometry": "v9"}, "v9.*v2-lite"),
        ("decode", {"recipes": ["packed 9x"]}, "packed 9x.*packed 4x"),
        ("decode", {"contexts": [64, 0]}, "contexts"),
        ("decode", {"repeats": 0}, "repeats"),
        ("decode", {"dtype": "float7"}, "float7"),
        ("decode", {"device": "tpu7"}, "tpu7"),
        ("prefill", {"batch_sizes": [0]}, "batch_sizes"),
        ("generation", {"generate": 1}, "generate"),
        ("profile_step", {"operators": 0}, "operators"),
        ("memory", {"memory_steps": 0}, "memory_steps"),
        ("step_memory", {"only": "packed 9x"}, "packed 9x"),
    ],
)
def test_a_wrong_setting_is_named(program: str, wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load_program(f"measure/{program}.py").Arguments(**wrong)


def test_a_wrong_recipe_ends_the_script_with_a_message_alone() -> None:
    with pytest.raises(SystemExit, match="packed 9x"):  # its code is the message; there is no traceback
        run_program("measure/decode.py", *SHAPE, "--recipes", "packed 9x")
