"""Rival codecs take the bytes they say, read back what they should, and are measured without a trace on the model."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import trained_model
from programs import run_program
from tiny_models import build
from torch import nn

from kvsplice_hf import patch_model_with_kvsplice
from kvsplice_hf.bench import rivals
from kvsplice_hf.errors import ConfigError, PatchStateError
from kvsplice_hf.evaluation.reference import change_of_perplexity, lumped_divergence
from kvsplice_hf.patch.sites import find_sites


R, P, T = 40, 8, 70  # R is no multiple of any group
TRUNCATIONS = (rivals.PcaTruncation, rivals.WeightTruncation, rivals.PromptTruncation)
every_rival = pytest.mark.parametrize("rival", rivals.RIVALS.values(), ids=rivals.RIVALS.keys())
either_variant = pytest.mark.parametrize("is_standardised", [False, True], ids=["plain", "standardised"])


def rows(tokens: int = T, batch: int = 2, latent_dim: int = R) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents whose channels have different means and sizes and are correlated, and rotated keys."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(latent_dim, latent_dim, generator=generator) * torch.logspace(0, -1, latent_dim)
    mean = torch.randn(latent_dim, generator=generator) * 3
    latent = torch.randn(batch, 1, tokens, latent_dim, generator=generator) @ mix + mean
    return latent, torch.randn(batch, 1, tokens, P, generator=generator)


def statistics_of(latent: torch.Tensor, k_rot: torch.Tensor) -> Any:
    flat = latent.flatten(0, -2)
    weight = torch.randn(96, flat.shape[1], generator=torch.Generator().manual_seed(2))
    rot_scale = k_rot.flatten(0, -2).square().mean(0).sqrt()
    return rivals.LayerStatistics(flat.mean(0), torch.cov(flat.T, correction=0), rot_scale, weight)


LATENT, K_ROT = rows()
STATISTICS = statistics_of(LATENT, K_ROT)


def error_of(rival: Any) -> float:
    """Squared error of the latent over its variance."""
    decoded, _ = rival.fit(STATISTICS).round_trip(LATENT, K_ROT)
    return ((decoded - LATENT).square().sum() / (LATENT - STATISTICS.mean).square().sum()).item()


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        "bf16": 1152,
        "fp8-g128": 656,
        "fp8-g64": 672,
        "nvfp4": 256 + 32 + 128,
        "nvfp4-k8": 256 + 32 + 64 + 2,
        "rotated-lloyd4": 256 + 2 + 128,
        "rotated-lloyd3": 192 + 2 + 128,
        "rotated-lloyd2-k8": 128 + 2 + 64 + 2,
        "hadamard-lloyd4": 386,
        "hadamard-lloyd3": 322,
        "hadamard64-int4-k8": 256 + 16 * 2 + 64 + 2,
        "int4-g32": 256 + 16 * 4 + 128,
        "int2-g32-k8": 128 + 16 * 4 + 64 + 2,
        "kivi4-t32": 256 + 64 + 128,
        "pca-0.5": 512 + 128,
        "weight-svd-0.25": 256 + 128,
        "prompt-svd-0.125": 128 + 64 + 128,
    }.items(),
)
def test_a_row_of_deepseek_takes_the_bytes_of_its_packed_form(name: str, expected: float) -> None:
    assert rivals.RIVALS[name].bytes_per_token(512, 64) == expected


def test_what_belongs_to_a_sequence_is_spread_over_its_tokens() -> None:
    kivi = replace(rivals.RIVALS["kivi4-t32"], tokens=40)  # 8 tokens fill no group
    assert kivi.bytes_per_token(512, 64) == (32 * 320 + 8 * 1024) / 40 + 128
    prompt = replace(rivals.RIVALS["prompt-svd-0.125"], tokens=2048)
    assert prompt.bytes_per_token(512, 64) == 128 + 32 + 128


def test_a_last_group_that_is_not_full_has_a_scale_as_well() -> None:
    assert rivals.RIVALS["fp8-g128"].bytes_per_token(321, 64) == 321 + 3 * 4 + 128
    assert rivals.RIVALS["rotated-lloyd3"].bytes_per_token(321, 0) == 121 + 2


@pytest.mark.parametrize("stem", ["rotated-lloyd{}", "int{}-g32", "kivi{}-t32"])
@either_variant
def test_more_bits_read_back_better(stem: str, is_standardised: bool) -> None:
    errors = [error_of(replace(rivals.RIVALS[stem.format(b)], is_standardised=is_standardised)) for b in (2, 4)]
    assert errors[1] < errors[0] / 5


@pytest.mark.parametrize(
    ("kind", "shared"), [(rivals.IntegerPerToken, -1), (rivals.IntegerPerChannel, -2)], ids=["token", "channel"]
)
def test_a_large_number_spoils_its_own_token_or_its_own_channel_alone(kind: Any, shared: int) -> None:
    latent = LATENT.clone()
    latent[..., 7, 3] = 1e3
    before, after = (kind().fit(STATISTICS).round_trip(rows, K_ROT)[0] for rows in (LATENT, latent))
    spoilt = (latent != LATENT).any(dim=shared, keepdim=True).expand_as(latent)
    assert torch.equal(after[~spoilt], before[~spoilt])
    assert not torch.equal(after[spoilt], before[spoilt])


@pytest.mark.parametrize("kind", TRUNCATIONS)
def test_more_rank_reads_back_better_and_all_of_it_is_exact_but_for_bf16(kind: Any) -> None:
    errors = [error_of(kind(share=share)) for share in (0.25, 0.5, 1.0)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-4


def test_pca_leaves_the_smallest_eigenvalues_behind() -> None:
    values = torch.linalg.eigvalsh(STATISTICS.covariance)
    assert error_of(rivals.PcaTruncation(share=0.5)) == pytest.approx(
        (values[: R // 2].sum() / values.sum()).item(), rel=1e-2
    )


def test_random_rotation_reaches_the_known_error_of_gaussian_levels() -> None:
    latent = torch.randn(1, 1, 500, 128, generator=torch.Generator().manual_seed(0))
    fitted = [rivals.RotatedLloydMax(bits=b).fit(statistics_of(latent, K_ROT)) for b in (2, 3, 4)]
    errors = [(fit.round_trip(latent, K_ROT)[0] - latent).square().mean().item() for fit in fitted]
    assert errors == pytest.approx([0.1175, 0.03454, 0.009497], rel=0.05)
    assert rivals.lloyd_max_levels(2).tolist() == pytest.approx([-1.5104, -0.4528, 0.4528, 1.5104], abs=1e-4)


@pytest.mark.parametrize(("size", "largest"), [(512, 512), (321, 321), (321, 64), (1, 64)])
def test_hadamard_blocks_are_orthogonal_with_entries_of_one_size_per_block(size: int, largest: int) -> None:
    matrix = rivals.hadamard_blocks(size, largest)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size), rtol=0, atol=1e-5)
    first = min(largest, 2 ** (size.bit_length() - 1))
    torch.testing.assert_close(matrix[:first, :first].abs(), torch.full((first, first), first**-0.5))


def test_after_a_hadamard_transform_one_large_channel_costs_little() -> None:
    latent = torch.randn(1, 1, 200, 128, generator=torch.Generator().manual_seed(0))
    latent[..., 5] *= 50
    statistics = statistics_of(latent, K_ROT)
    plain, turned = (
        kind.fit(statistics).round_trip(latent, K_ROT)[0] - latent
        for kind in (rivals.IntegerPerToken(bits=4), rivals.HadamardIntegers())
    )
    assert turned.square().mean() < 0.6 * plain.square().mean()


def test_hadamard_and_random_rotations_err_alike_on_gaussian_rows() -> None:
    latent = torch.randn(1, 1, 500, 128, generator=torch.Generator().manual_seed(0))
    fitted = [rivals.HadamardLloydMax(bits=b).fit(statistics_of(latent, K_ROT)) for b in (3, 4)]
    errors = [(fit.round_trip(latent, K_ROT)[0] - latent).square().mean().item() for fit in fitted]
    assert errors == pytest.approx([0.03454, 0.009497], rel=0.05)


def test_the_standardised_variant_is_undone_exactly_at_high_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(rivals.Fp8Rows, "code", lambda self, latent: seen.append(latent) or latent)
    decoded, _ = rivals.Fp8Rows(is_standardised=True).fit(STATISTICS).round_trip(LATENT, K_ROT)
    torch.testing.assert_close(decoded, LATENT, rtol=1e-5, atol=1e-5)
    flat = seen[0].flatten(0, -2)
    torch.testing.assert_close(flat.mean(0), torch.zeros(R), rtol=0, atol=1e-4)
    torch.testing.assert_close(flat.std(0, correction=0), torch.ones(R), rtol=1e-4, atol=0)


def test_statistics_of_standardised_latents_are_those_computed_from_them() -> None:
    standardised = STATISTICS.standardised()
    direct = statistics_of((LATENT - STATISTICS.mean) / STATISTICS.spread, K_ROT)
    torch.testing.assert_close(standardised.covariance, direct.covariance, rtol=1e-3, atol=1e-4)
    read = (LATENT - STATISTICS.mean) @ STATISTICS.kv_b_weight.T
    again = ((LATENT - STATISTICS.mean) / STATISTICS.spread) @ standardised.kv_b_weight.T
    torch.testing.assert_close(again, read, rtol=1e-4, atol=1e-3)


@either_variant
def test_a_channel_that_never_changes_does_not_disturb_the_others(is_standardised: bool) -> None:
    latent = LATENT.clone()
    latent[..., 3] = 0.0
    statistics = statistics_of(latent, K_ROT)
    fitted = replace(rivals.RIVALS["int4-g32"], is_standardised=is_standardised).fit(statistics)
    decoded, _ = fitted.round_trip(latent, K_ROT)
    assert decoded.isfinite().all()
    assert (decoded - latent).square().mean() < 0.02 * statistics.covariance.diagonal().mean()


def test_e2m1_has_eight_sizes_and_rounds_ties_to_even() -> None:
    grid = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    numbers = torch.linspace(-8, 8, 4001)
    assert rivals.round_to_e2m1(numbers).abs().unique().tolist() == grid
    nearest = torch.tensor(sorted({sign * size for size in grid for sign in (-1.0, 1.0)}))
    distance = (numbers[:, None].clamp(-6, 6) - nearest).abs().amin(1)
    torch.testing.assert_close((rivals.round_to_e2m1(numbers) - numbers.clamp(-6, 6)).abs(), distance)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert rivals.round_to_e2m1(ties).tolist() == [0, 1, 1, 2, 2, 4, 4]


def test_e4m3_is_that_of_torch_and_saturates() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    grid = codes[codes.isfinite()]
    assert torch.equal(rivals.round_to_e4m3(grid), grid)
    assert rivals.round_to_e4m3(torch.tensor([1e9, -500.0])).tolist() == [448, -448]


def test_8_bit_rotated_keys_are_close_and_16_bit_ones_are_bf16() -> None:
    _, small = rivals.RIVALS["nvfp4-k8"].fit(STATISTICS).round_trip(LATENT, K_ROT)
    _, large = rivals.RIVALS["nvfp4"].fit(STATISTICS).round_trip(LATENT, K_ROT)
    assert torch.equal(large, K_ROT.bfloat16().float())
    assert ((small - K_ROT).abs() <= K_ROT.abs().amax(-1, keepdim=True) / 127 * 0.51).all()


@every_rival
@either_variant
@pytest.mark.parametrize("tokens", [0, 1, 33], ids=["no token", "one token", "33 tokens"])
def test_any_number_of_sequences_and_tokens_keeps_shape_and_dtype(
    rival: Any, is_standardised: bool, tokens: int
) -> None:
    fitted = replace(rival, is_standardised=is_standardised).fit(STATISTICS)
    latent, k_rot = (tensor[:, :, :tokens].bfloat16() for tensor in (LATENT, K_ROT))
    decoded, decoded_rot = fitted.round_trip(latent, k_rot)
    assert (decoded.shape, decoded_rot.shape) == (latent.shape, k_rot.shape)
    assert decoded.dtype == decoded_rot.dtype == torch.bfloat16
    assert decoded.isfinite().all()


@every_rival
def test_sequences_of_a_batch_do_not_see_each_other(rival: Any) -> None:
    fitted = rival.fit(STATISTICS)
    together, _ = fitted.round_trip(LATENT, K_ROT)
    alone, _ = fitted.round_trip(LATENT[1:], K_ROT[1:])
    # A matrix product may sum a smaller batch in another order, and a number may then round to the next bf16.
    assert ((together[1:] - alone).abs() > 0.02 * LATENT.std()).sum() == 0


@every_rival
def test_a_layer_without_a_rotated_key_can_be_coded(rival: Any) -> None:
    statistics = replace(STATISTICS, rot_scale=torch.zeros(0))
    fitted = replace(rival, is_standardised=True).fit(statistics)
    assert fitted.round_trip(LATENT, K_ROT[..., :0])[1].shape[-1] == 0
    assert fitted.bytes_per_token(R, 0) == fitted.latent_bytes(R)


def test_fitting_leaves_the_table_as_it_is() -> None:
    rival = replace(rivals.RIVALS["pca-0.5"], is_standardised=True)
    rival.fit(STATISTICS)
    assert rival._basis is None
    assert rival._centre == 0.0


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(0))


def recorded_rows(model: nn.Module, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What every `expand_kv` receives."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def make(site: Any) -> Any:
        def expand(latent: torch.Tensor, k_rot: torch.Tensor) -> Any:
            seen.append((latent, k_rot))
            return type(site.module).expand_kv(site.module, latent, k_rot)

        return expand

    with rivals.replaced_expand_kv(model, make), torch.no_grad():
        model(ids, use_cache=False)
    return seen


def test_collected_statistics_are_those_of_all_rows_but_the_first_four(ids: torch.Tensor) -> None:
    model = trained_model()
    collected = rivals.collect_statistics(model, ids.split(1))
    assert list(collected) == [0, 1]
    for site, (latent, k_rot) in zip(find_sites(model), recorded_rows(model, ids), strict=True):
        direct = statistics_of(latent[:, :, 4:].double(), k_rot[:, :, 4:].double())
        statistics = collected[site.layer_idx]
        for name in ("mean", "covariance", "rot_scale"):
            torch.testing.assert_close(getattr(statistics, name), getattr(direct, name).float(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(statistics.kv_b_weight, site.module.kv_b_proj.weight.detach())


def test_a_model_is_afterwards_as_it_was_also_after_an_error(ids: torch.Tensor) -> None:
    model = trained_model()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    logits = model(ids, use_cache=False).logits
    statistics = rivals.collect_statistics(model, [ids])
    with rivals.simulated(model, rivals.RIVALS["rotated-lloyd2"], statistics):
        assert not torch.allclose(model(ids, use_cache=False).logits, logits, atol=1e-2)
    with pytest.raises(KeyError), rivals.simulated(model, rivals.RIVALS["bf16"], statistics):
        raise KeyError
    with pytest.raises(ConfigError, match="more than 4 tokens"):
        rivals.collect_statistics(model, [ids[:, :4]])
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert torch.equal(model(ids, use_cache=False).logits, logits)


def test_a_patched_model_is_refused_and_stays_patched(ids: torch.Tensor) -> None:
    model = type(trained_model())(trained_model().config).eval()
    patch_model_with_kvsplice(model, compression_ratio=0.5)
    logits = model(ids, use_cache=False).logits
    with pytest.raises(PatchStateError, match="Unpatch"):
        rivals.collect_statistics(model, [ids])
    assert torch.equal(model(ids, use_cache=False).logits, logits)


def test_the_first_four_tokens_are_not_touched(ids: torch.Tensor) -> None:
    model = trained_model()
    statistics = rivals.collect_statistics(model, [ids])
    logits = model(ids, use_cache=False).logits
    with rivals.simulated(model, rivals.RIVALS["rotated-lloyd2"], statistics):
        coded = model(ids, use_cache=False).logits
    torch.testing.assert_close(coded[:, :4], logits[:, :4])
    assert (coded[:, 4] - logits[:, 4]).abs().amax() > 1e-3


@pytest.mark.parametrize("name", ["glm5_next", "longcat_flash", "mistral_large4"])
def test_layers_without_rope_with_rescaled_or_with_shared_latents_are_coded(name: str) -> None:
    model = build(name)
    ids = torch.randint(8, 100, (2, 24), generator=torch.Generator().manual_seed(0))
    statistics = rivals.collect_statistics(model, [ids])
    assert list(statistics) == [site.layer_idx for site in find_sites(model) if site.stores_latent]
    with torch.no_grad(), rivals.simulated(model, rivals.RIVALS["rotated-lloyd2-k8"], statistics):
        coded = model(ids, use_cache=False).logits
    with torch.no_grad():
        assert not torch.allclose(coded, model(ids, use_cache=False).logits, atol=1e-2)


def test_loss_and_its_error_come_from_paired_windows() -> None:
    stock = torch.tensor([[1.0, 3.0], [2.0, 2.0]], dtype=torch.float64)
    row = change_of_perplexity(stock + torch.tensor([[0.01], [0.03]]), stock)
    assert row["loss_percent"] == pytest.approx(100 * math.expm1(0.02))
    assert row["loss_stderr_percent"] == pytest.approx(100 * math.exp(0.02) * 0.01)
    broken = change_of_perplexity(stock * math.nan, stock)
    assert broken["loss_percent"] is broken["loss_stderr_percent"] is None
    assert change_of_perplexity(stock[:1], stock[:1])["loss_stderr_percent"] is None


def test_divergence_over_likely_tokens_is_exact_over_all_and_never_above_with_few() -> None:
    p, q = torch.randn(2, 7, 20, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    whole = (p.exp() * (p - q)).sum(-1).double()
    torch.testing.assert_close(lumped_divergence(p, q), whole, rtol=1e-4, atol=1e-6)
    few = lumped_divergence(p[:, :5], q[:, :5])
    assert ((few >= 0) & (few <= whole)).all()


def test_the_script_measures_every_rival_on_every_text(model_folder: str, tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("\n\n".join(f"Line {i} of a text that nobody has calibrated on." for i in range(40)))
    sizes = ["--window", "64", "--calibration-tokens", "512", "--evaluation-tokens", "128", "--ours", "20"]
    texts = ["--calibration", "pydoc", str(notes), "--evaluation", "pydoc", str(notes)]
    settings = ["--model", model_folder, *sizes, *texts]
    report = run_program("measure/codecs.py", *settings, "--output", str(tmp_path / "results"))
    rows = {row["name"]: row for row in report["results"]}
    assert list(rows) == ["ours", *rivals.RIVALS, *rivals.CACHE_BACKENDS]
    assert rows["ours"]["bytes_per_token"] <= 20
    assert rows["ours"]["texts"]["pydoc"]["kl_nats"] < 0.2 * rows["rotated-lloyd2"]["texts"]["pydoc"]["kl_nats"]
    measured = [row for row in rows.values() if "skipped" not in row]
    assert all(set(row["texts"]) == {"pydoc", str(notes)} for row in measured)
    assert all(text["windows"] == 2 for row in measured for text in row["texts"].values())
    assert rows["bf16"]["bytes_per_token"] == 2 * (32 + 8)
    assert rows["rotated-lloyd2"]["texts"]["pydoc"]["kl_nats"] > 10 * rows["bf16"]["texts"]["pydoc"]["kl_nats"]
    assert rows["transformers-fp8"]["texts"]["pydoc"]["kl_nats"] > 0, "the coded rows must have been read"
    assert rows["bf16"]["other_variant"] is None
    assert rows["int2-g32"]["other_variant"]["standardised"] is not rows["int2-g32"]["standardised"]
    assert {path.name for path in Path(report["folder"]).iterdir()} == {"report.json", "loss_against_bytes.png"}


def test_the_script_names_a_rival_that_it_does_not_know() -> None:
    with pytest.raises(SystemExit, match="int5"):  # with a message alone, no traceback
        run_program("measure/codecs.py", "--rivals", "int5")
