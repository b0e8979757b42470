"""The decode benchmark has a row for every recipe, and its caches are those of a real prefill. No time is judged."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import load_program
from tiny_models import build
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from kvsplice_hf import cache_nbytes
from kvsplice_hf.errors import ConfigError


ROOT = Path(__file__).parent.parent
geometries: Any = importlib.import_module("kvsplice_hf.bench.geometries")
decode: Any = load_program("measure/decode.py")

SCRIPT = str(ROOT / "scripts" / "measure" / "decode.py")
QUICK = ["--geometry", "mini", "--layers", "1", "--repeats", "1", "--steps", "1", "--bandwidth_mb", "4"]
# Hidden sizes that take no time; everything that concerns attention is as published.
NARROW = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "vocab_size": 4096}
every_recipe = pytest.mark.parametrize("name", decode.RECIPES)


def narrow(name: str, layers: int = 1) -> PreTrainedModel:
    geometry = geometries.GEOMETRIES[name]
    geometry = replace(geometry, sizes={**geometry.sizes, **NARROW})
    return geometry.build(geometry.config(layers), torch.float32, "cpu")


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    return decode.patched_models(narrow("mini"), list(decode.RECIPES))


def run(monkeypatch: pytest.MonkeyPatch, capsys: Any, *arguments: str) -> dict[str, Any]:
    """The script in this process; its last line of stdout."""
    monkeypatch.setattr(sys, "argv", [SCRIPT, *arguments])
    decode.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture
def shared(models: dict[str, PreTrainedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibrated once for all tests."""
    monkeypatch.setattr(decode, "patched_models", lambda model, names: {name: models[name] for name in names})


def test_every_setting_has_a_row_for_every_recipe(
    shared: None, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    settings = ["--contexts", "64", "96", "--batch_sizes", "1", "2", "--prefill", "16", "--recipes", "all"]
    report = run(monkeypatch, capsys, *QUICK, *settings, "--padded", "--output", str(tmp_path))
    found = [(row["batch_size"], row["context"], row["recipe"]) for row in report["rows"]]
    assert found == [(batch, context, name) for batch in (1, 2) for context in (64, 96) for name in decode.RECIPES]
    assert not [row for row in report["rows"] if "skipped" in row]
    assert report["bandwidth_gb_s"] > 0
    for row in report["rows"]:
        assert len(row["decode_s"]) == len(row["decode_stock_over_this"]) == len(row["times_bound"]) == 1
        assert len(row["prefill_s"]) == (row["context"] == 64), "once per batch size"
        assert row["moved_bytes"] == row["cache_bytes"] + row["weight_bytes"]
    for context in (64, 96):
        sizes = {row["recipe"]: row["cache_bytes"] for row in report["rows"] if row["context"] == context}
        assert sizes["stock"] == sizes["stock static"] == 2 * context * 576 * 4
        assert sizes["stock fp8"] == 2 * context * 576
        assert sizes["packed 4x"] < sizes["rank R/2"] < sizes["stock"] <= sizes["full rank"]
    folder = Path(report["folder"])
    assert {path.name for path in folder.iterdir()} == {"report.json", "step_time.png"}


@every_recipe
def test_a_quickly_filled_cache_is_that_of_a_real_prefill(models: dict[str, PreTrainedModel], name: str) -> None:
    recipe, model = decode.RECIPES[name], models[name]
    length = 50
    real = decode.Filled(
        recipe.make_cache(model.config, length + 2), length, decode.padding_of(2, length, model.device), None
    )
    decode.step(model, real, decode.random_tokens(model, 2, length), grow=0)
    quick = decode.fill(model, recipe, 2, length, 2, padded=True)
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
    filled = decode.fill(model, decode.RECIPES[name], 2, 40, 4, padded=True)
    logits: list[torch.Tensor] = []
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: logits.append(output))
    for _ in range(2):
        size = cache_nbytes(filled.cache)
        decode.step(model, filled)
        decode.step(model, filled)
        assert cache_nbytes(filled.cache) > size
        decode.rewind(filled, 2)
        assert cache_nbytes(filled.cache) == size
    hook.remove()
    assert all(step.isfinite().all() for step in logits)
    assert torch.equal(logits[0], logits[2])
    assert torch.equal(logits[1], logits[3])


@pytest.mark.parametrize("name", geometries.GEOMETRIES)
def test_every_geometry_decodes(name: str) -> None:
    model = narrow(name)
    for recipe in (decode.RECIPES["stock"], decode.RECIPES["rank R/2"]):
        filled = decode.fill(decode.apply(model, recipe), recipe, 1, 24, 1, padded=False)
        decode.step(model, filled)
        numbers = sum(layer.keys.shape[-1] + layer.values.shape[-1] for layer in filled.cache.layers)
        rank = model.config.kv_lora_rank if not recipe.is_spliced else round(model.config.kv_lora_rank / 2)
        assert numbers == rank + model.config.qk_rope_head_dim


def test_published_sizes() -> None:
    def sizes(name: str) -> tuple[int, ...]:
        config = geometries.GEOMETRIES[name].config(2)
        fields = ("hidden_size", "num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_rope_head_dim")
        return tuple(getattr(config, field) for field in (*fields, "qk_nope_head_dim", "v_head_dim", "vocab_size"))

    assert sizes("v2-lite") == (2048, 16, None, 512, 64, 128, 128, 102400 * 2 // 27)
    assert sizes("v3") == (7168, 128, 1536, 512, 64, 128, 128, 129280 * 2 // 61)
    assert sizes("glm-4.7-flash") == (2048, 20, 768, 512, 64, 192, 256, 154880 * 2 // 47)
    assert sizes("mistral-4") == (4096, 32, 1024, 256, 64, 64, 128, 131072 * 2 // 36)
    assert sizes("smollm2-mla") == (576, 9, None, 321, 64, 64, 64, 49152 * 2 // 30)
    assert geometries.GEOMETRIES["v3"].config(2, whole_vocabulary=True).vocab_size == 129280


def test_a_step_reads_the_chosen_experts_and_no_embedding() -> None:
    model = narrow("v2-lite", layers=2)  # one dense layer, one with eight experts of which six run
    token = torch.zeros(1, 1, dtype=torch.long)
    total = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    experts = sum(weight.nbytes for weight in model.model.layers[1].mlp.experts.parameters())
    embedding = model.get_input_embeddings().weight.nbytes
    assert geometries.weight_bytes(model, lambda: model(token)) == total - embedding - experts // 4
    tied = narrow("smollm2-mla")
    total = sum(tensor.nbytes for tensor in (*tied.parameters(), *tied.buffers()))
    assert geometries.weight_bytes(tied, lambda: tied(token)) == total


def test_recipes_share_the_weights(models: dict[str, PreTrainedModel]) -> None:
    heads = {model.lm_head.weight.data_ptr() for model in models.values()}
    assert len(heads) == 1
    assert not hasattr(models["stock"].model.layers[0].self_attn, "kvsplice")


def test_the_profile_names_operators(
    shared: None, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    settings = ["--contexts", "64", "--recipes", "stock", "rank R/2", "--profile", "--operators", "3"]
    report = run(monkeypatch, capsys, *QUICK, *settings, "--output", str(tmp_path))
    assert list(report["results"]) == ["stock", "rank R/2"]
    for row in report["rows"]:
        assert row["operators_ms"]["aten::mm"] > 0
        assert row["total_ms"] == pytest.approx(sum(row["operators_ms"].values()))


def test_generate_times_the_tokens_after_the_first(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    mla = build("deepseek_v3")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    original = LlamaForCausalLM(LlamaConfig(vocab_size=mla.config.vocab_size, num_key_value_heads=1, **sizes)).eval()
    monkeypatch.setattr(decode, "load_model", lambda name, dtype: (mla, None))
    monkeypatch.setattr(decode, "load_original_demo_model", lambda dtype: (original, None))
    settings = ["--generate", "4", "--contexts", "32", "--repeats", "1", "--output", str(tmp_path)]
    report = run(monkeypatch, capsys, *settings)
    assert list(report["results"]) == ["stock", "rank R/2", "packed 4x", "original GQA"]
    assert all(len(row["decode_s"]) == len(row["prefill_s"]) == 1 for row in report["rows"])
    with pytest.raises(SystemExit, match="positions"):
        run(monkeypatch, capsys, *settings, "--contexts", "510")


@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory from /proc")
def test_memory_of_decode_steps_holds_the_cache_and_the_temporaries(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    settings = ["--contexts", "512", "--memory_decode", "--memory_steps", "2", "--recipes", "stock"]
    (row,) = run(monkeypatch, capsys, *QUICK, *settings, "--output", str(tmp_path))["rows"]
    expanded = 512 * 16 * (128 + 128 + 128 + 64) * 4
    assert row["temporary_bytes"] > expanded, "keys and values of all heads, as stock attention makes them"
    assert row["total_bytes"] == row["cache_allocated_bytes"] + row["temporary_bytes"]


def test_what_does_not_fit_into_memory_is_skipped_with_its_reason(
    models: dict[str, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models["stock"]
    cache = decode.cache_estimate(model.config, 4, 1, 64)
    monkeypatch.setattr(decode, "free_memory", lambda device: 4 * cache)
    reasons = decode.too_large(model, ["stock", "rank R/2"], 1, 64, "cpu")
    assert list(reasons) == ["stock"], "only stock expands keys and values"
    monkeypatch.setattr(decode, "free_memory", lambda device: cache)
    assert list(decode.too_large(model, ["stock", "rank R/2"], 1, 64, "cpu")) == ["stock", "rank R/2"]
    assert decode.prefill_too_large(model, 1, 64, "cpu")


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"geometry": "v9"}, "v9.*v2-lite"),
        ({"recipes": ["packed 9x"]}, "packed 9x.*packed 4x"),
        ({"contexts": [64, 0]}, "contexts"),
        ({"repeats": 0}, "repeats"),
        ({"dtype": "float7"}, "float7"),
        ({"device": "tpu7"}, "tpu7"),
        ({"generate": 1}, "generate"),
        ({"memory": True, "profile": True}, "memory.*profile"),
        ({"only": "stock"}, "only"),
    ],
)
def test_a_wrong_setting_is_named(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        decode.check(decode.Arguments(**wrong))


def test_a_wrong_recipe_ends_the_script_without_a_traceback() -> None:
    process = subprocess.run(
        [sys.executable, SCRIPT, *QUICK, "--recipes", "packed 9x"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.returncode == 1
    assert "'packed 9x'" in process.stderr
    assert "Traceback" not in process.stderr
