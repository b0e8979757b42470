"""Layers of quantisation libraries, imitated: those whose gradients, weights or form are not what they seem."""

import logging
from typing import Any

import pytest
import torch
from quantised_models import KINDS, build, linear_layers
from torch import nn

from kvsplice_hf import KVSpliceCalibrator, KVSpliceConfig, patch_model_with_kvsplice, unpatch_model
from kvsplice_hf.calibration.fingerprint import model_fingerprint
from kvsplice_hf.patch.sites import find_sites


every_kind = pytest.mark.parametrize("kind", KINDS)


class ForInferenceOnly(nn.Module):
    """A layer whose kernel has no gradient."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("codes", layer.weight.data.clone())

    @torch.no_grad()
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs @ self.codes.T


class _NotDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        return inputs @ codes.T

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise NotImplementedError("no backward")


class WithoutBackward(ForInferenceOnly):
    """A layer that says so in the backward pass only."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return _NotDifferentiable.apply(inputs, self.codes)


class AddsInPlace(ForInferenceOnly):
    """As bitsandbytes in 4 bits of one token: its forward fails where gradients are asked for and it has a bias."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        self.register_buffer("bias", torch.zeros(layer.out_features))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and inputs.requires_grad:
            raise RuntimeError("a view of a leaf Variable that requires grad is being used in an in-place operation.")
        return (inputs @ self.codes.T).add_(self.bias)


class Rearranged(nn.Linear):
    """As bitsandbytes in 4 bits on a CPU: weights are put in another order at the first step, and back to be saved."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False)
        self.weight.data = layer.weight.data.clone()
        self.rearranged = False

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if not self.rearranged:
            self.weight.data, self.rearranged = self.weight.data.flip(0), True
        return inputs @ self.weight.data.flip(0).T

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.rearranged:
            self.weight.data, self.rearranged = self.weight.data.flip(0), False
        super()._save_to_state_dict(destination, prefix, keep_vars)


def packed(kind: str, layer_class: type[nn.Module]) -> Any:
    model = build(kind)
    for name, layer in linear_layers(model):
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer_class(layer))
    return model.eval()


def windows() -> list[torch.Tensor]:
    return [torch.randint(8, 128, (1, 64), generator=torch.Generator().manual_seed(seed)) for seed in range(6)]


def collected(model: Any) -> KVSpliceCalibrator:
    return KVSpliceCalibrator(model).collect(windows(), holdout=0, progress=False)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(windows()[0], use_cache=False).logits


@every_kind
@pytest.mark.parametrize("layer_class", [ForInferenceOnly, WithoutBackward, AddsInPlace])
def test_gradients_pass_layers_that_have_none_as_they_pass_the_matrix_they_are(
    kind: str, layer_class: type[nn.Module]
) -> None:
    expected, found = collected(build(kind)), collected(packed(kind, layer_class))
    assert found.metric == "fisher"
    for part, layer in expected.statistics.items():
        mine = found.statistics[part]
        assert layer.fisher.any()
        torch.testing.assert_close(mine.fisher, layer.fisher, rtol=1e-3, atol=1e-3 * float(layer.fisher.abs().max()))


@every_kind
def test_nothing_stays_on_packed_layers_after_calibration(kind: str) -> None:
    model = packed(kind, ForInferenceOnly)
    collected(model)
    assert not any(module._forward_hooks or "forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(("kind", "metric"), [("MLA", "readers"), ("ordinary", "pca")])
def test_where_no_gradients_pass_another_metric_is_chosen_and_said(
    kind: str, metric: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = packed(kind, ForInferenceOnly)

    class Detached(nn.Module):
        """What stops gradients, and is no linear layer."""

        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.norm = norm

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.norm(hidden).detach()

    model.model.norm = Detached(model.model.norm)
    with caplog.at_level(logging.WARNING):
        calibrator = collected(model)
    assert calibrator.metric == metric
    assert f"metric='{metric}'" in caplog.text
    assert "No gradients pass the quantised layers" in caplog.text


def test_a_plain_model_is_not_run_to_choose_the_metric() -> None:
    model, calls = build("MLA"), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    assert KVSpliceCalibrator(model).metric == "fisher"
    assert not calls


@every_kind
def test_a_fingerprint_is_of_the_weights_as_they_are_saved_and_leaves_them_as_they_run(kind: str) -> None:
    model = packed(kind, Rearranged)
    sites = find_sites(model)
    before = model_fingerprint(model, sites)
    logits(model)
    assert model_fingerprint(model, sites) == before
    layers = [module for module in model.modules() if isinstance(module, Rearranged)]
    assert sum(layer.rearranged for layer in layers) >= len(layers) - 12  # experts that nothing was sent to
    layers[0].weight.data.add_(1.0)
    assert model_fingerprint(model, sites) != before


@every_kind
def test_patching_does_not_ask_for_a_state_dict(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes 0.50.2 damages its layers when it is asked for one after they have run on a CPU."""
    model = packed(kind, Rearranged)
    calibrator = collected(model)

    def refuse(self: Rearranged, *_: Any) -> None:
        raise AssertionError("state_dict was asked for")

    monkeypatch.setattr(nn.Module, "state_dict", refuse)
    patch_model_with_kvsplice(model, KVSpliceConfig(bytes_per_token=150), calibration=calibrator)
    unpatch_model(model)


@every_kind
def test_weights_that_are_unpacked_at_the_first_forward_are_unpacked_before_they_are_asked_for(kind: str) -> None:
    """As compressed-tensors does it."""
    model, held = build(kind), {}
    for name, layer in linear_layers(model):
        held[name] = layer._parameters.pop("weight")

    def unpack(module: Any, _: Any) -> None:
        for name, weight in held.items():
            module.get_submodule(name).register_parameter("weight", weight)
        module.ct_decompress_hook.remove()
        del module.ct_decompress_hook

    model.ct_decompress_hook = model.register_forward_pre_hook(unpack)
    found = collected(model).fingerprint
    assert model_fingerprint(model, find_sites(model)) == found
    torch.testing.assert_close(logits(model), logits(build(kind)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_key_heads_of_packed_layers_have_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    model = build("ordinary").to(dtype)
    for name, layer in linear_layers(model):
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, ForInferenceOnly(layer))
    model.config.dtype = dtype
    assert {site.dtype for site in find_sites(model)} == {dtype}
