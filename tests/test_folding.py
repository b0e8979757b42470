"""A merged splice computes what the unmerged one does, in fewer steps, and comes apart again without a trace."""

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from test_contract_models import batch_for, cached_logits, no_cache_logits, rms
from test_packed import assert_same_but_for_flips, calibrated
from tiny_models import TINY_MODELS, build
from torch import nn

from kvsplice_hf import (
    FoldingError,
    KVSpliceConfig,
    PatchStateError,
    load_kvsplice,
    patch_model_with_kvsplice,
    save_kvsplice,
    splice_disabled,
    unpatch_model,
)
from kvsplice_hf.code.files import CONFIG_NAME, WEIGHTS_NAME
from kvsplice_hf.code.projection import LearnedKVSplice
from kvsplice_hf.errors import TrainingError
from kvsplice_hf.manage.merging import merge_kvsplice, unmerge_kvsplice
from kvsplice_hf.upstream import cache_argument, cache_of


NAME = "deepseek_v3"
TOLERANCE = 5e-5
RECIPES = {
    "half the rank": KVSpliceConfig(compression_ratio=0.5, sink_tokens=2),
    "an odd rank": KVSpliceConfig(rank=9, sink_tokens=0),
    "packed bytes": KVSpliceConfig(bits=5.0, sink_tokens=2),
    "layernorm": KVSpliceConfig(rank=12, use_layernorm=True, sink_tokens=2),
}
recipes = pytest.mark.parametrize("recipe", RECIPES)


def spliced(
    recipe: str = "half the rank", name: str = NAME, dtype: torch.dtype = torch.float32, **settings: Any
) -> Any:
    """A patched model with a transform that does something."""
    model = build(name, dtype)
    config = KVSpliceConfig(**{**RECIPES[recipe].to_dict(), **settings})
    patch_model_with_kvsplice(model, config, calibration=calibrated(model) if config.is_packed else None)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for splice in splices(model):
            for parameter in (splice.transform_scale, splice.transform_shift):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def splices(model: nn.Module) -> list[LearnedKVSplice]:
    return [module for module in model.modules() if isinstance(module, LearnedKVSplice)]


def both_logits(model: Any, name: str = NAME) -> tuple[torch.Tensor, torch.Tensor]:
    """Without a cache and with one."""
    batch = batch_for(name)
    return no_cache_logits(model, *batch), cached_logits(model, *batch)[0]


def attributes(model: nn.Module) -> dict[str, set[str]]:
    return {path: {*vars(m), *m._modules, *m._buffers, *m._parameters} for path, m in model.named_modules()}


@pytest.mark.parametrize("attention", ["absorbed", "expanded"])
@pytest.mark.parametrize("name", [NAME, "dots3_note", "mistral_large4"])
@recipes
def test_a_merged_model_gives_the_same_logits(recipe: str, name: str, attention: str) -> None:
    model = spliced(recipe, name, attention=attention)
    with splice_disabled(model):
        stock = no_cache_logits(model, *batch_for(name))
    expected = both_logits(model, name)
    assert merge_kvsplice(model) is model
    for found, before in zip(both_logits(model, name), expected, strict=True):
        if recipe == "packed bytes":
            assert_same_but_for_flips(found, before, before - stock)
        else:
            torch.testing.assert_close(found, before, atol=TOLERANCE, rtol=0)


@recipes
def test_unmerging_gives_back_the_very_same_model(recipe: str) -> None:
    model = spliced(recipe)
    expected, before, state = both_logits(model), attributes(model), copy.deepcopy(model.state_dict())
    merge_kvsplice(model)
    assert list(model.state_dict()) == list(state), "what is folded is not saved"
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert unmerge_kvsplice(model) is model
    assert attributes(model) == before
    assert all(torch.equal(found, same) for found, same in zip(both_logits(model), expected, strict=True))


@torch.no_grad()
def test_merged_projections_are_the_affine_maps_of_the_transform() -> None:
    splice = splices(spliced())[0]
    scale, latents = F.softplus(splice.transform_scale), torch.randn(5, splice.latent_dim)
    codes = (latents * scale + splice.transform_shift) @ splice.compress.weight.T
    splice.merge()
    matrix, offset = splice.fold()
    torch.testing.assert_close(matrix, splice.expand.weight / scale[:, None])
    torch.testing.assert_close(offset, -splice.transform_shift / scale)
    torch.testing.assert_close(splice.encode(latents), codes, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(splice.decode(codes), codes @ matrix.T + offset, atol=1e-5, rtol=1e-5)


def test_a_merged_splice_computes_its_matrices_once() -> None:
    splice = splices(spliced())[0]
    assert splice.fold()[0] is not splice.fold()[0]
    assert not splice.is_merged
    splice.merge()
    assert splice.is_merged
    assert splice.fold()[0] is splice.fold()[0]
    codes = splice.encode(torch.ones(splice.latent_dim))
    with torch.no_grad():  # neither way reads the parameters any more
        for parameter in splice.parameters():
            parameter.zero_()
    assert torch.equal(splice.encode(torch.ones(splice.latent_dim)), codes)
    assert splice.decode(codes).abs().max() > 0


def test_merging_twice_and_unmerging_what_is_not_merged_raise() -> None:
    with pytest.raises(PatchStateError, match="not patched"):
        merge_kvsplice(build(NAME))
    with pytest.raises(PatchStateError, match="not patched"):
        unmerge_kvsplice(build(NAME))
    model = spliced()
    with pytest.raises(PatchStateError, match="not merged"):
        unmerge_kvsplice(model)
    merge_kvsplice(model)
    with pytest.raises(PatchStateError, match=r"layers \[0, 1\] are already merged. Call unmerge_kvsplice"):
        merge_kvsplice(model)
    unmerge_kvsplice(model)
    merge_kvsplice(model)
    splice = splices(model)[0]
    with pytest.raises(PatchStateError, match="already merged"):
        splice.merge()
    splice.unmerge()
    with pytest.raises(PatchStateError, match="not merged"):
        splice.unmerge()


@pytest.mark.parametrize("use_cache", [False, True])
def test_a_merged_model_cannot_be_trained_until_it_is_unmerged(use_cache: bool) -> None:
    model, (ids, _) = merge_kvsplice(spliced()).train(), batch_for(NAME)
    with pytest.raises(TrainingError, match="unmerge_kvsplice"):
        model(ids, labels=ids, use_cache=use_cache)
    with torch.no_grad():
        assert model(ids, use_cache=use_cache).logits.isfinite().all()
    model.eval()
    assert model(ids, use_cache=use_cache).logits.isfinite().all()
    unmerge_kvsplice(model).train()(ids, labels=ids, use_cache=use_cache).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for s in splices(model) for p in s.parameters())


def by_state_dict(model: nn.Module, other: nn.Module, folder: Path) -> None:
    model.load_state_dict(other.state_dict())


def by_file(model: nn.Module, other: nn.Module, folder: Path) -> None:
    load_kvsplice(model, save_kvsplice(other, folder))


@pytest.mark.parametrize("load", [by_state_dict, by_file])
@recipes
def test_loading_other_parameters_leaves_nothing_stale(
    recipe: str, load: Callable[[nn.Module, nn.Module, Path], None], tmp_path: Path
) -> None:
    model, other = merge_kvsplice(spliced(recipe)), spliced(recipe)
    with torch.no_grad():
        for splice in splices(other):
            splice.transform_shift.add_(0.5)
            splice.expand.weight.mul_(0.9)
    load(model, other, tmp_path)
    assert not any(splice.is_merged for splice in splices(model))
    pairs = zip(both_logits(model), both_logits(other), strict=True)
    assert all(torch.equal(found, expected) for found, expected in pairs)


def test_loading_one_layer_unmerges_that_one_and_the_rest_can_follow() -> None:
    model = spliced()
    expected = both_logits(model)
    first, second = splices(merge_kvsplice(model))
    model.load_state_dict({name: t for name, t in model.state_dict().items() if "layers.0." in name}, strict=False)
    assert (first.is_merged, second.is_merged) == (False, True)
    with pytest.raises(PatchStateError, match=r"layers \[1\] are already merged"):
        merge_kvsplice(model)
    assert all(torch.equal(*pair) for pair in zip(both_logits(unmerge_kvsplice(model)), expected, strict=True))


@recipes
def test_a_merged_model_saves_the_files_of_the_unmerged_one(recipe: str, tmp_path: Path) -> None:
    model = spliced(recipe)
    save_kvsplice(model, tmp_path / "before")
    save_kvsplice(merge_kvsplice(model), tmp_path / "after")
    for file in (CONFIG_NAME, WEIGHTS_NAME):
        assert (tmp_path / "before" / file).read_bytes() == (tmp_path / "after" / file).read_bytes()


def test_unpatching_a_merged_model_restores_the_stock_one() -> None:
    model = build(NAME)
    expected, before = both_logits(model), attributes(model)
    unpatch_model(merge_kvsplice(patch_model_with_kvsplice(model, RECIPES["half the rank"])))
    assert attributes(model) == before
    assert all(torch.equal(*pair) for pair in zip(both_logits(model), expected, strict=True))


def reloaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, reloaded], ids=["deepcopy", "torch.save"])
def test_a_copy_of_a_merged_model_is_merged_and_unmerges_by_itself(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = spliced()
    unmerged = both_logits(model)
    merged = both_logits(merge_kvsplice(model))
    clone = copied(model)
    assert all(torch.equal(*pair) for pair in zip(both_logits(clone), merged, strict=True))
    unmerge_kvsplice(clone)
    assert all(torch.equal(*pair) for pair in zip(both_logits(clone), unmerged, strict=True))
    assert all(splice.is_merged for splice in splices(model))


def test_casting_takes_what_is_folded_along() -> None:
    model = merge_kvsplice(spliced())
    expected = both_logits(model)[0]
    model.to(torch.bfloat16)
    for splice in splices(model):
        assert {tensor.dtype for tensor in splice.fold()} == {torch.bfloat16}
        assert splice.encode(torch.ones(splice.latent_dim, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert rms(both_logits(model)[0] - expected) < 0.1 * rms(expected)


@pytest.mark.parametrize("merge_first", [True, False])
def test_weights_offloaded_by_accelerate_give_the_same_logits(merge_first: bool) -> None:
    expected = both_logits(merge_kvsplice(spliced()))
    model = spliced()
    if merge_first:
        merge_kvsplice(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    if not merge_first:
        merge_kvsplice(model)
    assert splices(model)[0].compress.weight.is_meta
    assert all(torch.equal(*pair) for pair in zip(both_logits(model), expected, strict=True))


@pytest.mark.compiles
def test_compiled_models_trace_without_graph_breaks() -> None:
    model, (ids, _) = merge_kvsplice(spliced()), batch_for(NAME)

    @torch.no_grad()
    def logits(run: Any) -> torch.Tensor:
        first = run(ids[:, :-1], use_cache=True)
        return torch.cat([first.logits, run(ids[:, -1:], **cache_argument(cache_of(first))).logits], dim=1)

    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), logits(model), atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_in_bf16_a_mean_far_above_the_spread_costs_merged_codes_no_more_than_others() -> None:
    R, r, generator = 64, 32, torch.Generator().manual_seed(0)
    mean = (20 * torch.randn(R, generator=generator)).round()  # so that bf16 holds it exactly
    splice = LearnedKVSplice(R, r, dtype=torch.bfloat16)
    splice.transform_scale.fill_(32.0)  # which is its own softplus
    splice.transform_shift.copy_(-mean)
    splice.compress.weight.copy_(torch.linalg.qr(torch.randn(R, r, generator=generator)).Q.T)
    latents = ((mean + torch.randn(500, R, generator=generator)) / 32).bfloat16()
    exact = copy.deepcopy(splice).double().encode(latents.double())
    unmerged = rms(splice.encode(latents).double() - exact)
    splice.merge()
    assert rms(splice.encode(latents).double() - exact) < 1.2 * unmerged


@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 1e4), (torch.float32, float("nan"))], ids=str)
def test_what_overflows_or_is_damaged_is_not_merged(dtype: torch.dtype, value: float) -> None:
    model = spliced(dtype=dtype)
    last = splices(model)[-1]
    with torch.no_grad():
        last.transform_scale.fill_(value)
        last.compress.weight.fill_(100.0)
    with pytest.raises(FoldingError, match=rf"Layer 1: .*not finite in {dtype}"):
        merge_kvsplice(model)
    assert not any(splice.is_merged for splice in splices(model))


@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_architecture_generates_the_same_tokens_merged(name: str) -> None:
    model, (ids, mask) = spliced(name=name), batch_for(name)
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, **settings)
    assert torch.equal(merge_kvsplice(model).generate(ids, **settings), expected)
