"""`reduce_rank` writes a stock model with a smaller latent, as good as the norm lets it be; `heal` makes it better."""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from byte_tokenizer import byte_tokenizer
from programs import load_program
from test_convert import assert_same, divergence, logits
from tiny_models import FIRST_ORDINARY_TOKEN, TINY_MODELS, sharpen
from tiny_models import build as build_tiny
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache

from kvsplice_hf import KVSpliceCalibrator, KVSpliceConfig, patch_model_with_kvsplice
from kvsplice_hf.convert import reduce_rank
from kvsplice_hf.convert.reduction import REDUCED_MODULES
from kvsplice_hf.errors import CalibrationError, ConfigError, PatchStateError, TrainingError, UnsupportedError
from kvsplice_hf.patch.sites import find_sites
from kvsplice_hf.training import heal
from kvsplice_hf.upstream import cache_argument


MODELS = ("deepseek_v2", "deepseek_v3")
RANK = 32  # of the tiny models


def ids(rows: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(FIRST_ORDINARY_TOKEN, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


TOKENS = ids(16, 48, 0)


def build(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A tiny model, of which some settings are others."""
    if not changes:
        return build_tiny(name, dtype)
    spec = TINY_MODELS[name]
    config = getattr(transformers, spec.config_class)(**(copy.deepcopy(spec.kwargs) | changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, spec.causal_lm)(config)
        sharpen(model)
    return model.to(dtype).eval()


@torch.no_grad()
def with_flat_latents(name: str, dimensions: int, bias: bool = False) -> Any:
    """A model whose latents lie in so many dimensions."""
    model = build(name, torch.float32, **({"attention_bias": True} if bias else {}))
    random = torch.Generator().manual_seed(3)
    for site in find_sites(model):
        projection = site.module.kv_a_proj_with_mqa
        mix = torch.randn(RANK, dimensions, generator=random)
        projection.weight[:RANK] = mix @ projection.weight[:dimensions]
        if bias:
            projection.bias.copy_(torch.randn(len(projection.bias), generator=random))
            projection.bias[:RANK] = mix @ projection.bias[:dimensions]
        site.module.kv_a_layernorm.weight.uniform_(0.5, 1.5, generator=random)
    return model


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biases"])
@pytest.mark.parametrize("name", MODELS)
def test_latents_that_lie_in_few_dimensions_are_kept_exactly(name: str, bias: bool) -> None:
    model = with_flat_latents(name, 10, bias)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    smaller, layers = reduce_rank(model, 10, tokens=TOKENS)
    held_out = ids(2, 40, 1)
    expected = logits(model, held_out, use_cache=False)
    assert_same(logits(smaller, held_out, use_cache=False), expected, 1e-3)
    cache = DynamicCache(config=smaller.config)
    steps = [logits(smaller, part, **cache_argument(cache)) for part in held_out.split([17, 1, 22], dim=1)]
    assert_same(torch.cat(steps, 1), expected, 1e-3)
    assert cache.layers[0].keys.shape[-1] == smaller.config.kv_lora_rank == 10
    assert all(layer.cost < 1e-4 and layer.unsteadiness < 1e-3 for layer in layers)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.config.kv_lora_rank == RANK


def test_the_reduced_model_has_an_output_matrix_of_its_own(tmp_path: Path) -> None:
    model = build("deepseek_v3", tie_word_embeddings=True)
    reduced, _ = reduce_rank(model, RANK // 2, tokens=TOKENS)
    assert model.config.tie_word_embeddings
    assert not reduced.config.tie_word_embeddings
    with torch.no_grad():
        reduced.get_input_embeddings().weight.mul_(2)
    assert not torch.equal(reduced.lm_head.weight, reduced.get_input_embeddings().weight)
    reduced.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(again, TOKENS[:1]), logits(reduced, TOKENS[:1]))


@pytest.mark.parametrize("name", MODELS)
def test_the_result_is_a_stock_model(name: str, tmp_path: Path) -> None:
    smaller, _ = reduce_rank(build(name, torch.float32), 20, tokens=TOKENS)
    smaller.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(again) is type(smaller)
    assert {key: value.shape for key, value in again.state_dict().items()} == {
        key: value.shape for key, value in smaller.state_dict().items()
    }
    assert torch.equal(logits(again, TOKENS[:2]), logits(smaller, TOKENS[:2]))
    generated = again.generate(TOKENS[:2, :9], max_new_tokens=8, do_sample=False)
    assert torch.equal(generated, smaller.generate(TOKENS[:2, :9], max_new_tokens=8, do_sample=False))


def test_a_smaller_latent_loses_more() -> None:
    model, held_out = build("deepseek_v3", torch.float32), ids(8, 48, 1)
    calibration = KVSpliceCalibrator(model).collect(TOKENS)
    losses = [
        divergence(model, reduce_rank(model, rank, tokens=TOKENS, calibration=calibration)[0], held_out)
        for rank in (6, 12, 20, 28)
    ]
    assert losses == sorted(losses, reverse=True)


def test_dtype_mode_and_gradients_are_those_of_the_model() -> None:
    model = build("deepseek_v3", torch.bfloat16).train()
    model.model.layers[0].self_attn.kv_b_proj.weight.requires_grad_(False)
    smaller, _ = reduce_rank(model, 20, tokens=TOKENS)
    assert smaller.training
    assert model.training
    assert {parameter.dtype for parameter in smaller.parameters()} == {torch.bfloat16}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert flags == {name: parameter.requires_grad for name, parameter in smaller.named_parameters()}
    assert not model.model.layers[0].self_attn.kv_a_layernorm._forward_pre_hooks


def test_a_reduced_model_can_be_spliced() -> None:
    smaller, _ = reduce_rank(build("deepseek_v3", torch.float32), 20, tokens=TOKENS)
    expected = logits(smaller, TOKENS[:2], use_cache=False)
    patched = patch_model_with_kvsplice(smaller, KVSpliceConfig(rank=20, sink_tokens=0))
    assert_same(logits(patched, TOKENS[:2], use_cache=False), expected, 1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Healing


def test_healing_comes_closer_and_changes_nothing_but_the_latent() -> None:
    model = build("deepseek_v3", torch.float32)
    smaller, _ = reduce_rank(model, 12, tokens=TOKENS)
    smaller.lm_head.weight.requires_grad_(False)
    before = {key: value.clone() for key, value in smaller.state_dict().items()}
    held_out = ids(8, 48, 1)
    start = divergence(model, smaller, held_out)
    found = heal(smaller, model, ids(64, 48, 2), steps=40, learning_rate=1e-2, batch_size=8)
    assert len(found) == 40
    assert divergence(model, smaller, held_out) < 0.95 * start
    changed = {key for key, value in smaller.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {key for key in before if key.split(".")[-2] in REDUCED_MODULES}
    for layer, site in enumerate(find_sites(smaller)):
        name = f"model.layers.{layer}.self_attn.kv_a_proj_with_mqa.weight"
        assert torch.equal(smaller.state_dict()[name][12:], before[name][12:]), site.name
    flags = {name: parameter.requires_grad for name, parameter in smaller.named_parameters()}
    assert [name for name, flag in flags.items() if not flag] == ["lm_head.weight"]
    assert not smaller.training
    assert all(parameter.grad is None for parameter in smaller.parameters())


@pytest.mark.parametrize(
    ("windows", "steps", "phrase"),
    [(TOKENS, 0, "one step at least"), (TOKENS[:0], 3, r"\[0, 48\]"), (TOKENS[0], 3, "it needs token ids")],
    ids=["no step", "no window", "no windows"],
)
def test_healing_without_text_or_steps_is_refused(windows: torch.Tensor, steps: int, phrase: str) -> None:
    model = build("deepseek_v3", torch.float32)
    with pytest.raises(TrainingError, match=phrase):
        heal(model, model, windows, steps=steps)


def test_healing_beside_another_model_or_of_broken_weights_is_refused() -> None:
    model, other = build("deepseek_v3", torch.float32), build("deepseek_v3", torch.float32, vocab_size=96)
    with pytest.raises(TrainingError, match="vocabulary of 128 with one of 96"):
        heal(model, other, TOKENS, steps=1)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="The divergence is nan at step 0"):
        heal(model, build("deepseek_v3", torch.float32), TOKENS, steps=1)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


def patched() -> Any:
    return patch_model_with_kvsplice(build("deepseek_v3", torch.float32), compression_ratio=0.5)


def adapted() -> Any:
    model = build("deepseek_v3", torch.float32)
    model.model.layers[1].self_attn.kv_b_proj = nn.Sequential(model.model.layers[1].self_attn.kv_b_proj)
    return model


def unloaded() -> Any:
    model = build("deepseek_v3", torch.float32)
    model.model.layers[0].self_attn.kv_a_proj_with_mqa.to("meta")
    return model


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "patched": (patched, PatchStateError, "unpatch_model"),
    "another type": (lambda: build("minicpm3", torch.float32), UnsupportedError, "type 'minicpm3'"),
    "no model": (lambda: nn.Linear(2, 2), UnsupportedError, "type 'Linear'"),
    "adapted": (adapted, UnsupportedError, "kv_b_proj is a Sequential"),
    "not loaded": (unloaded, UnsupportedError, "not loaded"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_whose_rank_cannot_be_reduced_are_refused(case: str) -> None:
    builder, error, phrase = REFUSED[case]
    with pytest.raises(error, match=phrase):
        reduce_rank(builder(), 12, tokens=TOKENS)


@pytest.mark.parametrize(
    ("settings", "error", "phrase"),
    [
        ({"rank": 32}, ConfigError, "from 2 to 31, less than the 32"),
        ({"rank": 1}, ConfigError, "`rank` is 1"),
        ({"rank": True}, ConfigError, "`rank` is True"),
        ({"tokens": "text"}, CalibrationError, "`tokens` are str"),
        ({"tokens": TOKENS.float()}, CalibrationError, r"float32 \[16, 48\]"),
        ({"tokens": TOKENS[:1]}, CalibrationError, "`tokens` are 48, and a latent of 20 channels is fitted to 80"),
        ({"tokens": TOKENS + 100}, CalibrationError, "from 108 to 227, outside the vocabulary of 128"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], error: type[Exception], phrase: str) -> None:
    given = {"rank": 20, "tokens": TOKENS} | settings
    with pytest.raises(error, match=phrase):
        reduce_rank(build("deepseek_v3", torch.float32), given.pop("rank"), **given)


def test_tokens_that_the_model_does_not_know_are_refused_with_statistics_too() -> None:
    model = build("deepseek_v3", torch.float32)
    calibration = KVSpliceCalibrator(model).collect(TOKENS)
    with pytest.raises(CalibrationError, match="from 108 to 227, outside the vocabulary of 128"):
        reduce_rank(model, 20, tokens=TOKENS + 100, calibration=calibration)


def test_statistics_of_another_model_are_refused() -> None:
    calibration = KVSpliceCalibrator(build("minicpm3", torch.float32)).collect(TOKENS)
    with pytest.raises(CalibrationError, match="is of another model"):
        reduce_rank(build("deepseek_v3", torch.float32, kv_lora_rank=24), 12, tokens=TOKENS, calibration=calibration)


# ---------------------------------------------------------------------------------------------------------------------
# The program


def test_the_program_writes_a_model_and_reports_before_and_after_healing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build("deepseek_v3", torch.float32, vocab_size=256).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Paragraph {n} of a text about {n * n} things." for n in range(80)))
    texts = [argument for name in ("calibration", "evaluation", "heal_text") for argument in (f"--{name}", str(text))]
    sizes = ["--calibration_window", "64", "--window", "64", "--heal_window", "64", "--evaluation_tokens", "128"]
    command = ["reduce_rank.py", "--model", str(tmp_path / "model"), "--rank", "20", "--heal_steps", "2"]
    statistics = ["--statistics", str(tmp_path / "statistics.safetensors")]
    main = load_program("run/reduce_rank.py").main
    for output in ("first", "second"):  # the second reads the statistics
        monkeypatch.setattr(sys, "argv", [*command, "--output", str(tmp_path / output), *texts, *sizes, *statistics])
        main()
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["row_numbers_before"], report["row_numbers_after"]) == (32 + 8, 20 + 8)
    assert len(report["layers"]) == 2
    assert len(report["divergences"]) == 2
    assert report["closed_form"][str(text)]["kl_nats"] > 0
    assert report["healed"][str(text)]["perplexity_after"] > 0
    assert {"command", "machine", "versions"} <= set(report)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "second").config.kv_lora_rank == 20
    with pytest.raises(SystemExit, match="not an empty folder"):
        main()
