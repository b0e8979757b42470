"""Fisher information layer by layer: its figures, layers chosen by it, and the program that holds it against costs."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ordinary_models import build_ordinary
from test_contract_models import no_cache_logits
from test_packed import SINKS, calibrated
from tiny_models import build, tiny_batch
from torch import nn

from kvsplice_hf import (
    CalibrationError,
    ConfigError,
    KVSpliceConfig,
    load_kvsplice,
    patch_model_with_kvsplice,
    save_kvsplice,
    unpatch_model,
)
from kvsplice_hf.bench.fisher import LayerCosts, attention_fisher, latent_fisher, rank_correlation, spectrum_of
from kvsplice_hf.calibration.layers import predicted_losses
from kvsplice_hf.gpt2_mla import GPT2MLAConfig, GPT2MLAForCausalLM
from kvsplice_hf.patch.sites import find_sites


ROOT = Path(__file__).parent.parent
MODELS: dict[str, Any] = {"latents": lambda: build("deepseek_v3"), "ordinary": lambda: build_ordinary("llama")}
both_families = pytest.mark.parametrize("family", MODELS)


def spliced_layers(model: nn.Module) -> list[int]:
    return [site.layer_idx for site in find_sites(model) if hasattr(site.module, "kvsplice")]


def parts_of(model: nn.Module) -> list[Any]:
    return [part for site in find_sites(model) for part in site.all_parts]


# ------------------------------------------------------------------------------------------------- layers="fisher:n"


@both_families
def test_the_layers_that_cost_least_by_calibration_are_compressed(family: str, tmp_path: Path) -> None:
    model = MODELS[family]()
    calibrator, config = calibrated(model), KVSpliceConfig(bits=5.0, sink_tokens=SINKS, layers="fisher:1")
    losses = predicted_losses(calibrator, parts_of(model), config)
    cheapest = min(losses, key=lambda layer: losses[layer])
    patch_model_with_kvsplice(model, config, calibration=calibrator)
    assert spliced_layers(model) == [cheapest]
    batch = tiny_batch(model)
    expected = no_cache_logits(model, *batch)
    save_kvsplice(model, tmp_path)
    saved = json.loads((tmp_path / "kvsplice_config.json").read_text())
    assert list(saved["layers"]) == [str(cheapest)]
    loaded = load_kvsplice(unpatch_model(model), tmp_path)
    assert torch.equal(no_cache_logits(loaded, *batch), expected)


@both_families
def test_the_choice_follows_the_statistics_and_not_the_place_of_a_layer(family: str) -> None:
    for dear in (0, 1):
        model = MODELS[family]()
        calibrator = calibrated(model)
        for part, layer in calibrator.statistics.items():
            layer_idx = part if isinstance(part, int) else part.layer_idx
            layer.fisher.mul_(1e4 if layer_idx == dear else 1e-4)
            layer.rot_fisher.mul_(1e4 if layer_idx == dear else 1e-4)
        patch_model_with_kvsplice(
            model, KVSpliceConfig(bits=5.0, sink_tokens=SINKS, layers="fisher:1"), calibration=calibrator
        )
        assert spliced_layers(model) == [1 - dear]


def test_layers_are_chosen_for_ranks_as_well_and_by_keyword() -> None:
    model = build("deepseek_v3")
    calibrator = calibrated(model)
    patch_model_with_kvsplice(model, compression_ratio=0.5, layers="fisher:1", calibration=calibrator)
    assert len(spliced_layers(model)) == 1


@pytest.mark.parametrize(
    ("settings", "metric", "error", "message"),
    [
        ({"bits": 5.0, "layers": "fisher:3"}, "fisher", ConfigError, "`layers` is 'fisher:3', but only 2 layers"),
        ({"bits": 5.0, "layers": "fisher:1"}, "pca", CalibrationError, "these statistics are of metric 'pca'"),
        ({"compression_ratio": 0.5, "layers": "fisher:1"}, None, CalibrationError, "and there are none"),
    ],
)
def test_a_choice_that_cannot_be_made_is_named_and_leaves_the_model(
    settings: dict[str, Any], metric: str | None, error: type[Exception], message: str
) -> None:
    model = build("deepseek_v3")
    calibrator = None if metric is None else calibrated(model, metric=metric)
    with pytest.raises(error, match=message):
        patch_model_with_kvsplice(model, KVSpliceConfig(sink_tokens=SINKS, **settings), calibration=calibrator)
    assert not spliced_layers(model)


# ------------------------------------------------------------------------------------------------------- its figures


def test_a_spectrum_is_told_by_its_trace_its_top_directions_and_its_effective_rank() -> None:
    even, single = spectrum_of(torch.eye(32)), spectrum_of(torch.outer(torch.ones(32), torch.ones(32)))
    assert even == pytest.approx((32, 32, 0.5, 32))
    assert single == pytest.approx((32, 32, 1.0, 1.0))
    assert spectrum_of(torch.zeros(4, 4)) == pytest.approx((4, 0, 0, 1))


@torch.no_grad()
@both_families
def test_the_fisher_information_of_attention_is_that_of_its_scores(family: str) -> None:
    model = MODELS[family]()
    before = model.config._attn_implementation
    windows = tiny_batch(model, pad=0)[0]
    found = attention_fisher(model, windows)
    assert model.config._attn_implementation == before
    assert len(found) == 2
    model.set_attn_implementation("eager")
    p = model(windows, output_attentions=True).attentions[1].double()
    # The second derivative of the log-partition function is the same matrix.
    heads, tokens = p.shape[1], p.shape[2]
    expected = torch.zeros(heads, tokens, tokens, dtype=torch.float64)
    for row in p.transpose(0, 1).flatten(1, 2).unbind(1):
        expected += torch.stack([torch.diag(head) - torch.outer(head, head) for head in row])
    torch.testing.assert_close(found[1].double(), expected / (p.shape[0] * tokens), atol=1e-6, rtol=1e-4)
    assert torch.linalg.eigvalsh(found[1].double()).min() > -1e-6


def test_the_fisher_information_of_latents_is_that_of_calibration() -> None:
    calibrator = calibrated(build("deepseek_v3"))
    for part, matrix in latent_fisher(calibrator).items():
        assert torch.equal(matrix, calibrator.statistics[part].fisher / calibrator.statistics[part].count)
    with pytest.raises(ConfigError, match="of metric 'pca' and hold no Fisher information"):
        latent_fisher(calibrated(build("deepseek_v3"), metric="pca"))


def test_rank_correlations_are_of_order_and_not_of_size() -> None:
    assert rank_correlation([1, 2, 3, 4], [1, 10, 100, 1000]).rho == pytest.approx(1.0)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]).rho == pytest.approx(-1.0)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) == (None, None)
    # Two of the 24 orders of four layers agree as much as that, one of them the other way round.
    assert rank_correlation([1, 2, 3, 4], [1, 2, 3, 4]).p_value == pytest.approx(2 / 24)
    assert rank_correlation(range(20), range(20)).p_value < 1e-6


@both_families
def test_a_layer_is_compressed_alone_and_the_model_is_as_before(family: str) -> None:
    model = MODELS[family]()
    batch = tiny_batch(model, pad=0)
    stock = no_cache_logits(model, *batch)
    config = KVSpliceConfig(bits=3.0, sink_tokens=SINKS)
    costs = LayerCosts(model, calibrated(model), config, batch[0])
    found = costs.one_by_one()
    assert set(found.predicted) == set(found.measured) == {0, 1}
    assert min(found.measured.values()) > 0
    assert torch.equal(no_cache_logits(model, *batch), stock)
    assert costs.of([0, 1]) > min(found.measured.values())
    stock_bytes = costs.stock_bytes[0]
    assert costs.bytes_with([]) == stock_bytes
    assert costs.bytes_with([1]) == pytest.approx((stock_bytes + 3.0 * stock_bytes / 16) / 2)


# --------------------------------------------------------------------------------------------------------- the program


def program() -> Any:
    spec = importlib.util.spec_from_file_location("analyze_fisher", ROOT / "scripts" / "analyze_fisher.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["analyze_fisher"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_program_reports_each_layer_the_correlations_and_the_choices(tmp_path: Path) -> None:
    from byte_tokenizer import byte_tokenizer

    module = program()
    torch.manual_seed(0)
    settings = {"vocab_size": 320, "n_positions": 32, "n_embd": 32, "n_layer": 3, "n_head": 2, "kv_lora_rank": 24}
    GPT2MLAForCausalLM(GPT2MLAConfig(**settings, bos_token_id=None, eos_token_id=None)).save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    args = module.Arguments(model=str(tmp_path / "m"), window=16, windows=2, calibration_tokens=1024, choices=[1, 2])
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Ship {n} left harbour {n * n % 97} with {n % 13} sailors." for n in range(200)))
    args.calibration, args.texts, args.compression = str(text), [str(text)], 8.0
    report = module.run(args)
    assert [row["layer"] for row in report["layers"]] == [0, 1, 2]
    assert all(len(row["attention_heads"]) == 2 and len(row["latent_heads"]) == 1 for row in report["layers"])
    assert set(report["rank_correlations"]) == set(module.PREDICTORS)
    names = ["fisher:1", "last:1", "measured:1", "all, water-filling"]
    assert [row["layers"] for row in report["choices"]] == names + [name.replace(":1", ":2") for name in names]
    assert len(module.tables_of(report["layers"], report["rank_correlations"], report["choices"])) == 3
    module.draw(report["layers"], report["choices"], tmp_path / "fisher.png")
    assert (tmp_path / "fisher.png").stat().st_size > 0
    json.dumps(report)
    args.choices = [4]
    with pytest.raises(ConfigError, match="--choices has 4; it takes from 1 to the 3 layers of"):
        module.run(args)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"windows": 0}, "--windows is 0"),
        ({"window": 1}, "--window is 1"),
        ({"choices": [0]}, "--choices has 0"),
        ({"calibration": "none"}, "there are no --statistics"),
        ({"calibration": "none", "statistics": "nowhere.safetensors"}, "there are no --statistics"),
    ],
)
def test_settings_of_the_program_that_cannot_work_are_named(settings: dict[str, Any], message: str) -> None:
    module = program()
    with pytest.raises(ConfigError, match=message):
        module.check(module.Arguments(**settings))
