"""Latents are predicted from the codes of their keys, as these will be read; and whatever is done to a splice fits."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from test_contract_models import batch_for, cached_logits, no_cache_logits, rms
from test_packed import calibrated
from tiny_models import build

from kvsplice_hf import (
    CheckpointError,
    KVSpliceConfig,
    RowCodec,
    TrellisCodec,
    load_kvsplice,
    merge_kvsplice,
    patch_model_with_kvsplice,
    prune_kvsplice,
    save_kvsplice,
    unmerge_kvsplice,
    unpatch_model,
)
from kvsplice_hf.calibration.solve import KindOfRows, solve_layer
from kvsplice_hf.calibration.statistics import LayerStatistics
from kvsplice_hf.code.keys import TURN_STEPS
from kvsplice_hf.patch.state import patched_sites


NAME = "deepseek_v3"
CODECS = {"rounded": RowCodec, "along a trellis": TrellisCodec}
R, P = 12, 6


def random(*sizes: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def packed(bits: float = 5.0, **settings: Any) -> Any:
    model = build(NAME)
    config = KVSpliceConfig(bits=bits, sink_tokens=2, **settings)
    return patch_model_with_kvsplice(model, config, calibration=calibrated(model))


def splices(model: Any) -> list[Any]:
    return [patched.splice for _, patched in patched_sites(model)]


def related_statistics(share: float) -> LayerStatistics:
    """Of latents that follow from their keys but for a share of their size, and of keys that were rotated."""
    statistics = LayerStatistics.empty(R, P)
    statistics.see_columns(torch.arange(P // 2))
    keys = random(4000, P) * torch.tensor([4.0, 2.0, 1.0, 0.1, 0.2, 0.4])  # so that it shows which are pairs
    latents = keys @ random(P, R, seed=1) + share * random(4000, R, seed=2)
    turns = torch.randint(0, TURN_STEPS, (4000, P // 2), generator=torch.Generator().manual_seed(3)).to(torch.uint8)
    angle = turns.double() * (2 * torch.pi / TURN_STEPS)
    first, second = keys[:, : P // 2].double(), keys[:, P // 2 :].double()
    rotated = [first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()]
    statistics.add_rows(latents, torch.cat(rotated, 1).float(), torch.Generator().manual_seed(4), turns)
    statistics.add_gradients(random(4000, R, seed=5))
    statistics.add_rot_gradients(random(4000, P, seed=6), turns)
    return statistics


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_what_follows_from_keys_costs_nothing(share: float) -> None:
    statistics = related_statistics(share)
    alone, predicted = (
        solve_layer(statistics, "pca", rows=KindOfRows(unrotated=True, predicted=mode)) for mode in (False, True)
    )
    assert predicted.predict is not None
    assert alone.predict is None
    # In the metric of "pca" costs are half of variances, and what is left of them is noise of size `share`.
    assert predicted.cost[:R].sum() == pytest.approx(R * share**2 / 2, rel=0.1)
    assert alone.cost[:R].sum() > 10 * predicted.cost[:R].sum()
    # Sampled rows are what is left as well.
    assert predicted.codes[:, :R].square().mean() == pytest.approx(share**2, rel=0.1)


def test_latents_that_do_not_follow_from_keys_lose_nothing() -> None:
    statistics = related_statistics(50.0)
    alone, predicted = (
        solve_layer(statistics, "pca", rows=KindOfRows(unrotated=True, predicted=mode)) for mode in (False, True)
    )
    assert predicted.cost[:R].sum() <= alone.cost[:R].sum()


@pytest.mark.parametrize("kind", CODECS.values(), ids=CODECS)
@pytest.mark.parametrize("key_gain", [False, True])
def test_keys_come_back_the_same_whatever_their_latents_are(kind: type[RowCodec], key_gain: bool) -> None:
    widths = torch.tensor([8, 7, 5, 4, 3, 2, 1, 0, 16] * 5)
    n, start = len(widths), 27
    sigmas = torch.ones(n)
    codec = kind(
        widths, 2 + random(n).abs(), 0.1 * random(n), sigmas[:start], sigmas[start:] if key_gain else sigmas[:0]
    )
    rows = random(50, n, seed=1)
    expected = codec.unpack(codec.pack(rows))[:, start:]
    torch.testing.assert_close(codec.behind(rows[:, start:], start), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("codec", ["rows", "trellis"])
def test_packed_rows_are_predicted_and_the_model_loses_less(codec: str) -> None:
    batch = batch_for(NAME)
    stock = no_cache_logits(build(NAME), *batch)
    model = packed(codec=codec)
    assert all(splice.predicted_from == splice.keys.rank > 0 for splice in splices(model))
    with mock.patch.object(RowCodec, "keys_apart", new=False):
        alone = packed(codec=codec)
    assert all(splice.predicted_from == 0 for splice in splices(alone))
    losses = [rms(no_cache_logits(each, *batch) - stock) for each in (model, alone)]
    assert losses[0] < 1.1 * losses[1]  # latents of random weights say nothing of one another


def test_rotated_keys_and_rows_of_numbers_are_not_predicted_from() -> None:
    assert all(splice.predicted_from == 0 for splice in splices(packed(keys="rotated")))
    model = build(NAME)
    patch_model_with_kvsplice(model, rank=8, calibration=calibrated(model))
    assert all(splice.predicted_from == 0 for splice in splices(model))


def test_a_merged_splice_predicts_as_well() -> None:
    model, batch = packed(), batch_for(NAME)
    expected = no_cache_logits(model, *batch)
    merge_kvsplice(model)
    merged, _ = cached_logits(model, *batch)
    unmerge_kvsplice(model)
    unpatch_model(model)
    loss = rms(expected - no_cache_logits(model, *batch))
    assert rms(merged - expected) < 0.1 * loss


def test_a_pruned_splice_predicts_as_well() -> None:
    model, batch = packed(), batch_for(NAME)
    ranks = [splice.rank for splice in splices(model)]
    prune_kvsplice(model, threshold=0.9)
    assert any(splice.rank < rank for splice, rank in zip(splices(model), ranks, strict=True))
    assert all(splice.expand.weight.shape[1] == splice.value_dim for splice in splices(model))
    alone = no_cache_logits(model, *batch)
    cached, _ = cached_logits(model, *batch)
    unpatch_model(model)
    assert rms(cached - alone) < 0.1 * rms(alone - no_cache_logits(model, *batch))


def test_a_saved_splice_predicts_as_before(tmp_path: Path) -> None:
    model, batch = packed(), batch_for(NAME)
    save_kvsplice(model, tmp_path)
    loaded = load_kvsplice(build(NAME), tmp_path)
    assert [splice.predicted_from for splice in splices(loaded)] == [splice.keys.rank for splice in splices(model)]
    assert torch.equal(no_cache_logits(loaded, *batch), no_cache_logits(model, *batch))
    with mock.patch.object(RowCodec, "keys_apart", new=False):
        alone = packed()
    before = [splice.expand.weight.clone() for splice in splices(alone)]
    with pytest.raises(CheckpointError):
        load_kvsplice(alone, tmp_path)
    assert all(torch.equal(splice.expand.weight, weight) for splice, weight in zip(splices(alone), before, strict=True))


def test_the_prediction_is_trained_with_the_rest() -> None:
    model, (ids, mask) = packed(), batch_for(NAME)[:2]
    weights = [splice.expand.weight for splice in splices(model)]
    for weight in weights:
        weight.requires_grad_()
    model(ids, attention_mask=mask, use_cache=False).logits.square().mean().backward()
    for splice, weight in zip(splices(model), weights, strict=True):
        assert weight.grad is not None
        assert weight.grad[:, splice.rank :].abs().max() > 0
