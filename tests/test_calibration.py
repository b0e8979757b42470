"""Calibration: statistics are right and add up, the solution is the optimum, budgets are kept, and it pays."""

import copy
import math
import os
import re
import socket
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import torch.multiprocessing as mp
from byte_tokenizer import byte_tokenizer, trained_model
from tiny_models import FIRST_ORDINARY_TOKEN, TINY_MODELS, build

from kvsplice_hf import (
    CalibrationError,
    ConfigError,
    KVSpliceCalibrator,
    KVSpliceConfig,
    PatchStateError,
    UnsupportedError,
    calibrate,
    patch_model_with_kvsplice,
    unpatch_model,
)
from kvsplice_hf.calibration import auto
from kvsplice_hf.calibration.allocate import allocate, measure_distortion
from kvsplice_hf.calibration.fit import fit_widths, write_fit_
from kvsplice_hf.calibration.solve import solve_layer
from kvsplice_hf.calibration.statistics import SAMPLED_ROWS, LayerStatistics
from kvsplice_hf.code.projection import LearnedKVSplice
from kvsplice_hf.code.widths import row_bytes
from kvsplice_hf.evaluation import score_windows
from kvsplice_hf.text import load_texts, token_windows


NAME = "deepseek_v3"
SINKS = 4


def random_tokens(model: Any, count: int = 16, length: int = 16, seed: int = 0) -> torch.Tensor:
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    # Not those that stand for images in some models.
    return torch.randint(
        FIRST_ORDINARY_TOKEN, vocabulary, (count, length), generator=torch.Generator().manual_seed(seed)
    )


@pytest.fixture(scope="module")
def english() -> KVSpliceCalibrator:
    """The trained model's calibration. It may be fitted, not added to."""
    texts = load_texts("pydoc", "calibration")
    calibrator = KVSpliceCalibrator(trained_model())
    return calibrator.collect(texts, tokenizer=byte_tokenizer(), max_tokens=8192, window=128, progress=False)


def loss(calibrator: KVSpliceCalibrator, **settings: Any) -> float:
    """Divergence of the trained model with its cache at these settings, nats per token."""
    model = trained_model()
    windows = token_windows(byte_tokenizer(), load_texts("pydoc", "evaluation"), 128, 16)
    patch_model_with_kvsplice(model, KVSpliceConfig(**settings), calibration=calibrator)
    try:
        return score_windows(model, windows, batch_size=8, chunk=None, progress=False).summary()["kl"]
    finally:
        unpatch_model(model)


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


def test_statistics_are_those_of_the_latents_without_sinks_and_padding() -> None:
    model = build(NAME)
    ids = random_tokens(model, 2, 12)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    seen: list[torch.Tensor] = []
    module = model.model.layers[0].self_attn
    module.kv_a_layernorm.register_forward_hook(lambda _, __, output: seen.append(output.detach()))
    calibrator = KVSpliceCalibrator(model, sink_tokens=2)
    calibrator.collect([{"input_ids": ids, "attention_mask": mask}], progress=False)
    latents = torch.cat([seen[0][0, 2:], seen[0][1, 5:]]).double()
    layer = calibrator.statistics[0]
    assert int(layer.count) == len(latents) == calibrator.tokens
    torch.testing.assert_close(layer.mean, latents.mean(0), atol=1e-6, rtol=0)
    torch.testing.assert_close(layer.covariance, torch.cov(latents.T, correction=0), atol=1e-5, rtol=0)
    found = layer.rows[:, : layer.latent_dim].double()
    assert sorted(found[:, 0].tolist()) == pytest.approx(sorted(latents[:, 0].tolist()), abs=1e-6)


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("metric", ["fisher", "readers", "pca"])
def test_calibration_leaves_every_architecture_as_it_was(name: str, metric: str) -> None:
    model = build(name)
    ids = random_tokens(model, 2)
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
    frozen = next(model.parameters()).requires_grad_(False)
    model.train()
    calibrator = KVSpliceCalibrator(model, metric=metric).collect(ids, progress=False)
    assert sorted(calibrator.statistics) == sorted(TINY_MODELS[name].mla_layers)
    strengths = [getattr(layer, "fisher" if metric == "pca" else metric) for layer in calibrator.statistics.values()]
    assert all((strength.diagonal().sum() > 0) == (metric != "pca") for strength in strengths)
    assert model.training
    assert not frozen.requires_grad
    assert sum(parameter.requires_grad for parameter in model.parameters()) == len(list(model.parameters())) - 1
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any("expand_kv" in vars(module) for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model.eval()(ids, use_cache=False).logits, before)


def test_memory_does_not_grow_with_the_tokens() -> None:
    layer = LayerStatistics.empty(4, 2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        rows = torch.randn(1500, 6, generator=generator)
        layer.add_rows(rows[:, :4], rows[:, 4:], generator)
    assert int(layer.count) == 7500
    assert layer.rows.shape == (SAMPLED_ROWS, 6)


def test_two_halves_merged_are_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(900, 6)
    whole, first, second = (LayerStatistics.empty(4, 2) for _ in range(3))
    for layer, part in ((whole, rows), (first, rows[:300]), (second, rows[300:])):
        layer.add_rows(part[:, :4], part[:, 4:], generator)
        layer.add_gradients(part[:, :4])
        layer.add_rot_gradients(part[:, 4:])
    first.merge(second)
    for name in ("count", "latent_sum", "latent_outer", "fisher", "rot_sum", "rot_outer", "rot_fisher"):
        found, expected = getattr(first, name), getattr(whole, name)  # products are summed in fp32
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert len(first.rows) == 900


def test_half_precision_models_are_calibrated() -> None:
    model = build(NAME, torch.bfloat16)
    reference = KVSpliceCalibrator(build(NAME)).collect(random_tokens(model), progress=False)
    calibrator = KVSpliceCalibrator(model).collect(random_tokens(model), progress=False)
    for mine, other in zip(calibrator.statistics.values(), reference.statistics.values(), strict=True):
        assert mine.latent_outer.dtype == torch.float64
        error = (mine.covariance - other.covariance).norm() / other.covariance.norm()
        assert error < 0.05


def test_saved_statistics_fit_the_same_splice(english: KVSpliceCalibrator, tmp_path: Path) -> None:
    path = tmp_path / "statistics.safetensors"
    english.save(path)
    loaded = KVSpliceCalibrator.load(path, trained_model())
    config = KVSpliceConfig(bytes_per_token=14)
    for mine, other in zip(loaded.fit(config)[0].values(), english.fit(config)[0].values(), strict=True):
        assert torch.equal(mine.compress, other.compress)
        assert torch.equal(mine.codec.widths, other.codec.widths)  # type: ignore[union-attr]
    with pytest.raises(CalibrationError, match="loaded from a file"):
        loaded.collect(torch.ones(1, 8, dtype=torch.long))


def _count_in_process(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    model = build(NAME)
    calibrator = KVSpliceCalibrator(model).collect(list(random_tokens(model, 5)), progress=False)
    calibrator.collect(list(random_tokens(model, 2, seed=1)), progress=False)
    calibrator.save(Path(folder) / f"{rank}.safetensors")
    torch.distributed.destroy_process_group()


def test_two_processes_count_what_one_counts(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_count_in_process, args=(port, str(tmp_path)), nprocs=2)
    model = build(NAME)
    alone = KVSpliceCalibrator(model).collect(list(random_tokens(model, 5)), progress=False)
    alone.collect(list(random_tokens(model, 2, seed=1)), progress=False)
    for rank in range(2):
        together = KVSpliceCalibrator.load(tmp_path / f"{rank}.safetensors", model)
        for mine, other in zip(together.statistics.values(), alone.statistics.values(), strict=True):
            assert torch.equal(mine.count, other.count)
            torch.testing.assert_close(mine.latent_outer, other.latent_outer, rtol=1e-4, atol=1e-3)
            assert len(mine.rows) == len(other.rows)


# ---------------------------------------------------------------------------------------------------------------------
# The solution


def statistics_of(rows: torch.Tensor, gradients: torch.Tensor, rope_dim: int) -> LayerStatistics:
    R = rows.shape[1] - rope_dim
    layer = LayerStatistics.empty(R, rope_dim)
    layer.add_rows(rows[:, :R], rows[:, R:], torch.Generator().manual_seed(0))
    layer.add_gradients(gradients[:, :R])
    layer.add_rot_gradients(gradients[:, R:])
    return layer


def correlated(count: int, dim: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator) * torch.logspace(0, -1.5, dim)
    return torch.randn(count, dim, generator=generator) @ mixing.T + torch.randn(dim, generator=generator)


def test_truncation_costs_what_the_dropped_coordinates_say_and_less_than_any_other_basis() -> None:
    rows, gradients = correlated(4000, 12, 0), correlated(4000, 12, 1)
    layer = statistics_of(rows, gradients, rope_dim=0)
    solution = solve_layer(layer, "fisher", shrinkage=0.0)
    metric = layer.fisher / layer.count
    centred = rows.double() - layer.mean

    def cost(projection: torch.Tensor) -> float:
        error = centred - centred @ projection.T
        return ((error @ metric) * error).sum(1).mean().item() / 2

    for rank in (2, 5, 9):
        ours = cost(solution.decode[:, :rank] @ solution.encode[:rank])
        # The covariance is shrunk a little, so that what is left at last costs a little more than nothing.
        expected = solution.cost[rank:].sum().item()
        assert ours == pytest.approx(expected, rel=0.05, abs=1e-4 * solution.cost.sum().item())
        basis = torch.linalg.eigh(layer.covariance).eigenvectors[:, -rank:]
        assert ours < cost(basis @ basis.T)
    torch.testing.assert_close(solution.decode @ solution.encode, torch.eye(12, dtype=torch.float64))


def test_bits_go_where_they_save_most_and_the_budget_is_kept() -> None:
    layers = [statistics_of(correlated(2000, 24, seed), correlated(2000, 24, seed + 9), 8) for seed in range(3)]
    layers[1].fisher *= 100  # a layer that matters more
    layers[1].rot_fisher *= 100
    solutions = [solve_layer(layer, "fisher") for layer in layers]
    distortions = [measure_distortion(solution) for solution in solutions]

    def predicted(widths: list[torch.Tensor]) -> float:
        steps = [torch.where(width == 16, 9, width) for width in widths]
        rates = [d.relative.gather(1, s[:, None])[:, 0] for d, s in zip(distortions, steps, strict=True)]
        return sum(float((s.cost * rate).sum()) for s, rate in zip(solutions, rates, strict=True))

    for budget in (6.0, 10.0, 14.5):
        together = [bits.widths for bits in allocate(solutions, distortions, budget)]
        apart = [bits.widths for bits in allocate(solutions, distortions, budget, layers=range(len(solutions)))]
        sizes = [row_bytes(widths, 16) for widths in together]
        assert budget - 1.5 < sum(sizes) / 3 <= budget
        assert sizes[1] == max(sizes)
        assert all(row_bytes(widths, 16) <= budget for widths in apart)
        flat = [torch.full((24,), int(budget * 8 / 24)) for _ in range(3)]
        assert predicted(together) < predicted(apart) < predicted(flat)


def test_what_few_tokens_have_far_out_is_not_clipped() -> None:
    """A number that is far out for one token in a hundred: clipped, all those would err to the same side."""
    rows = torch.randn(4000, 128, generator=torch.Generator().manual_seed(0))
    rows[:, 0] *= 0.05
    far = torch.arange(4000) % 100 == 0
    rows[far, 0] += 10
    gradients = torch.randn(4000, 128, generator=torch.Generator().manual_seed(1))
    gradients[:, 0] *= 3  # it matters, and is a coordinate of its own
    layer = statistics_of(rows, gradients, rope_dim=0)
    solution = solve_layer(layer, "fisher")
    (bits,) = allocate([solution], [measure_distortion(solution)], 50)
    fit = fit_widths(layer, solution, bits)
    splice = LearnedKVSplice(128, fit.rank)
    write_fit_(splice, fit)
    decoded, _ = splice.round_trip(rows[far], rows[far][:, :0])
    error = (decoded - rows[far])[:, 0]
    assert error.mean().abs() < 0.02 * 10
    assert error.abs().max() < 0.1 * 10


def test_a_calibrated_codec_at_a_quarter_of_the_bytes_loses_next_to_nothing(english: KVSpliceCalibrator) -> None:
    """Bounds are about three times what was measured: an allocation, basis or scale gone wrong exceeds them."""
    assert loss(english, bytes_per_token=20) < 3e-4  # 80 bytes in bf16; measured 1e-5
    tight = loss(english, bytes_per_token=10)
    assert tight < 3e-3


@pytest.mark.parametrize("worse", ["weights", "orthogonal"])
def test_calibration_beats_the_weights_at_the_same_rank(english: KVSpliceCalibrator, worse: str) -> None:
    model = trained_model()
    windows = token_windows(byte_tokenizer(), load_texts("pydoc", "evaluation"), 128, 8)
    init = "svd" if worse == "weights" else worse
    patch_model_with_kvsplice(model, KVSpliceConfig(rank=6, init=init))
    try:
        other = score_windows(model, windows, batch_size=8, chunk=None, progress=False).summary()["kl"]
    finally:
        unpatch_model(model)
    assert loss(english, rank=6) < 0.5 * other


def test_a_report_says_what_was_chosen(english: KVSpliceCalibrator, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    fits, report = english.fit(KVSpliceConfig(bytes_per_token=20))
    assert report.layers == sorted(fits)
    assert report.ranks == [fit.rank for fit in fits.values()]
    assert report.row_bytes == [fit.codec.row_bytes for fit in fits.values()]  # type: ignore[union-attr]
    assert report.mean_row_bytes <= 20
    assert all(math.isfinite(value) and value >= 0 for value in report.summary()["predicted_loss_nats"])
    report.draw(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 5000


# ---------------------------------------------------------------------------------------------------------------------
# Data


def test_every_kind_of_data_is_read(tmp_path: Path) -> None:
    model, tokenizer = trained_model(), byte_tokenizer()
    text = "\n\n".join(load_texts("pydoc", "calibration"))[:6000]
    (tmp_path / "notes.txt").write_text(text)
    ids = tokenizer(text, return_tensors="pt").input_ids
    data: dict[str, Any] = {
        "one text": text,
        "texts": [text[:3000], text[3000:]],
        "a data set": datasets.Dataset.from_dict({"text": [text[:3000], text[3000:]]}),
        "a generator": (part for part in (text[:3000], text[3000:])),
        "tokens": ids[:, :2048].view(8, 256),
        "a list of tokens": list(ids[0, :2048].view(8, 256)),
        "batches": [{"input_ids": ids[:, :1024], "attention_mask": torch.ones(1, 1024)}],
        "a path": tmp_path / "notes.txt",
        "a source": "pydoc",
    }
    for what, value in data.items():
        calibrator = KVSpliceCalibrator(model)
        calibrator.collect(value, tokenizer=tokenizer, max_tokens=1024, window=128, progress=False)
        assert 900 < calibrator.tokens <= 2048, what


WRONG_DATA: dict[str, tuple[Any, type[Exception], str]] = {
    "nothing": ([], CalibrationError, "empty"),
    "a number": (7, CalibrationError, "type int cannot be read"),
    "numbers": ([1, 2], CalibrationError, "hold a int"),
    "float tokens": (torch.rand(2, 8), CalibrationError, "torch.float32"),
    "single tokens": (torch.ones(3, 1, dtype=torch.long), CalibrationError, r"\[3, 1\]"),
    "rows without text": ([{"title": "x"}], CalibrationError, r"\['title'\]"),
    "text without a tokenizer": (["some text"], ConfigError, "`tokenizer`"),
    "a missing file": (Path("/no/such/file.txt"), ConfigError, "Unknown text"),
}


@pytest.mark.parametrize("what", WRONG_DATA)
def test_data_that_cannot_be_read_are_named(what: str) -> None:
    data, error, phrase = WRONG_DATA[what]
    with pytest.raises(error, match=phrase):
        KVSpliceCalibrator(build(NAME)).collect(data)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


def test_too_few_tokens_for_the_rank_are_refused() -> None:
    model = build(NAME)
    with pytest.raises(CalibrationError, match=r"saw 12 tokens; 32 dimensions need 128"):
        patch_model_with_kvsplice(model, bytes_per_token=20, calibration=random_tokens(model, 1))
    with pytest.raises(CalibrationError, match="was given 0 calibration tokens"):
        KVSpliceCalibrator(model).fit(KVSpliceConfig(bytes_per_token=20))


def test_latents_that_are_constant_or_not_finite_are_refused() -> None:
    model = build(NAME)
    constant = KVSpliceCalibrator(model, metric="pca")
    for layer in constant.statistics.values():
        layer.add_rows(torch.ones(200, 32), torch.ones(200, layer.rope_dim), torch.Generator())
    with pytest.raises(CalibrationError, match="the same for all"):
        constant.fit(KVSpliceConfig(bytes_per_token=20))
    with torch.no_grad():
        model.model.layers[0].self_attn.kv_a_layernorm.weight[0] = math.nan
    with pytest.raises(CalibrationError, match="not finite"):
        KVSpliceCalibrator(model).collect(random_tokens(model), progress=False)


def test_a_budget_below_the_smallest_row_is_refused(english: KVSpliceCalibrator) -> None:
    with pytest.raises(ConfigError, match="below the"):
        patch_model_with_kvsplice(trained_model(), bytes_per_token=0.5, calibration=english)


def test_statistics_of_other_weights_are_used_with_a_warning(
    english: KVSpliceCalibrator, caplog: pytest.LogCaptureFixture
) -> None:
    same, other = copy.deepcopy(trained_model()), copy.deepcopy(trained_model())
    patch_model_with_kvsplice(same.bfloat16(), bytes_per_token=20, calibration=english)
    assert not caplog.records
    with torch.no_grad():
        other.model.layers[0].self_attn.kv_b_proj.weight.mul_(1.5)
    patch_model_with_kvsplice(other, bytes_per_token=20, calibration=english)
    assert "with other weights" in caplog.text


def test_calibrate_collects_and_holds_out_what_it_is_told_to() -> None:
    model = build(NAME)
    sequences = list(random_tokens(model))
    statistics = calibrate(model, sequences, metric="pca", max_tokens=200, holdout=3)
    whole = calibrate(model, sequences, metric="pca", max_tokens=200, holdout=0)
    assert statistics.metric == "pca"
    assert (len(statistics.holdout), len(whole.holdout)) == (3, 0)
    assert statistics.tokens < whole.tokens <= 200
    with pytest.raises(CalibrationError, match="at least one to fit to"):
        calibrate(model, sequences, holdout=len(sequences))


def test_statistics_of_another_model_are_refused(english: KVSpliceCalibrator, tmp_path: Path) -> None:
    other = build("dots3_note") if TINY_MODELS["dots3_note"].available else build("deepseek_v2")
    with pytest.raises(CalibrationError, match="another model"):
        patch_model_with_kvsplice(other, bytes_per_token=20, calibration=english)
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors here")
    with pytest.raises(CalibrationError, match="Cannot read"):
        patch_model_with_kvsplice(other, bytes_per_token=20, calibration=tmp_path / "broken.safetensors")


def test_a_model_without_an_output_layer_needs_another_metric() -> None:
    bare = build(NAME).model
    ids = random_tokens(bare)
    with pytest.raises(CalibrationError, match=r'use metric="readers"'):
        KVSpliceCalibrator(bare).collect(ids)
    for metric in ("readers", "pca"):
        calibrator = KVSpliceCalibrator(bare, metric=metric).collect(ids, progress=False)
        patch_model_with_kvsplice(bare, bytes_per_token=20, calibration=calibrator)
        unpatch_model(bare)


def test_layers_compete_for_bytes_unless_held_out_text_says_otherwise(
    english: KVSpliceCalibrator, caplog: pytest.LogCaptureFixture
) -> None:
    assert len(english.holdout) == 2
    model = trained_model()
    with caplog.at_level("INFO", logger="kvsplice_hf"):
        patch_model_with_kvsplice(model, bytes_per_token=14, calibration=english)
    sizes = [layer.self_attn.kvsplice.codec.row_bytes for layer in model.model.layers]
    unpatch_model(model)
    (message,) = [record.getMessage() for record in caplog.records if "held-out" in record.message]
    losses = [float(part) for part in re.findall(r": ([0-9.e-]+)", message)[-2:]]
    assert (sizes[0] == sizes[1]) == (losses[1] < losses[0])


def test_a_patched_model_is_not_calibrated() -> None:
    model = patch_model_with_kvsplice(build(NAME), compression_ratio=1.0)
    with pytest.raises(PatchStateError, match="Calibrate before patching"):
        KVSpliceCalibrator(model).collect(random_tokens(model))


# ---------------------------------------------------------------------------------------------------------------------
# Without data


@pytest.fixture
def small_auto(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("KVSPLICE_CACHE", str(tmp_path))
    monkeypatch.setattr(auto, "AUTO_TOKENS", 1024)
    monkeypatch.setattr(auto, "OWN_TOKENS", 1024)
    monkeypatch.setattr(auto, "WINDOW", 64)
    return tmp_path / "statistics"


def test_with_no_budget_the_model_calibrates_itself_to_a_quarter_of_the_bytes(small_auto: Path) -> None:
    model = copy.deepcopy(trained_model())
    torch.manual_seed(3)
    expected_next = torch.rand(1)
    torch.manual_seed(3)
    patch_model_with_kvsplice(model)
    assert torch.equal(torch.rand(1), expected_next), "the global generator is not touched"
    rows = [layer.self_attn.kvsplice.codec.row_bytes for layer in model.model.layers]
    assert 15 <= sum(rows) / 2 <= 20  # (32 + 8) numbers of 2 bytes, a quarter of them
    (kept,) = small_auto.iterdir()
    stamp = kept.stat().st_mtime_ns
    again = patch_model_with_kvsplice(copy.deepcopy(trained_model()))
    assert kept.stat().st_mtime_ns == stamp, "the second time it is read, not made"
    widths = [m.model.layers[0].self_attn.kvsplice.codec.widths for m in (model, again)]
    assert torch.equal(*widths)
    kept.write_bytes(kept.read_bytes()[:100])
    patch_model_with_kvsplice(copy.deepcopy(trained_model()))
    assert kept.stat().st_size > 1000, "a damaged file is replaced"


def test_with_a_tokenizer_varied_text_is_used_and_nothing_is_sampled(
    small_auto: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = copy.deepcopy(trained_model())
    monkeypatch.setattr(model, "generate", None)
    patch_model_with_kvsplice(model, tokenizer=byte_tokenizer())
    assert not caplog.records
    assert [layer.self_attn.kvsplice.codec is not None for layer in model.model.layers] == [True, True]
    patch_model_with_kvsplice(copy.deepcopy(trained_model()))
    assert "Pass `tokenizer`" in caplog.text
    assert len(list(small_auto.iterdir())) == 2, "the two are kept apart"


def test_a_model_that_cannot_write_says_what_to_give_it(small_auto: Path) -> None:
    with pytest.raises(UnsupportedError, match="cannot write text"):
        patch_model_with_kvsplice(build(NAME).model)


def test_a_low_rank_without_calibration_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        patch_model_with_kvsplice(build(NAME), compression_ratio=1.0)
    assert not caplog.records
    with caplog.at_level("WARNING"):
        patch_model_with_kvsplice(build(NAME), compression_ratio=0.5)
    assert len([record for record in caplog.records if "No calibration" in record.message]) == 1
