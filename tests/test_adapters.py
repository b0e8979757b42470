"""Adapters on the attention layers: decode follows at once, whatever is done to them, in the middle of a generation."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from ordinary_models import build_ordinary
from test_ordinary import calibration_of
from tiny_models import build
from torch import nn

from kvsplice_hf import (
    FoldingError,
    KVSpliceConfig,
    explain,
    materialised_nbytes,
    merge_kvsplice,
    patch_model_with_kvsplice,
    unpatch_model,
    upstream,
)
from kvsplice_hf.patch.state import patched_sites
from kvsplice_hf.upstream import cache_argument, cache_of
from kvsplice_hf.weights.changes import LayerState
from kvsplice_hf.weights.materialised import materialise


peft = pytest.importorskip("peft", reason="peft is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

SCALE = 2.0
TARGETS = {
    "deepseek_v3": ["kv_b_proj", "q_proj", "o_proj"],
    "deepseek_v2": ["kv_b_proj", "q_a_proj", "q_b_proj", "o_proj"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "gpt2": ["c_attn", "c_proj"],
}
# Model, attention of the patch, and of the patch that it is held against (None: of the stock model).
WAYS: dict[str, tuple[str, str, str | None]] = {
    "MLA, absorbed": ("deepseek_v3", "absorbed", None),
    "MLA, chosen by cost": ("deepseek_v3", "auto", None),
    "MLA, expanded": ("deepseek_v3", "expanded", None),
    "MLA with small queries, absorbed": ("deepseek_v2", "absorbed", None),
    "ordinary": ("llama", "auto", "expanded"),
    "ordinary, in one matrix": ("gpt2", "auto", "expanded"),
}
TOLERANCE = 1e-4


def adapted(name: str, targets: list[str] | None = None, **settings: Any) -> Any:
    """A tiny model with two adapters, "default" and "other", the first of them active."""
    model = build(name) if name.startswith("deepseek") else build_ordinary(name)
    targets = TARGETS[name] if targets is None else targets
    config = peft.LoraConfig(target_modules=targets, r=2, lora_alpha=8, init_lora_weights=False, **settings)
    torch.manual_seed(0)
    model = peft.get_peft_model(model, config)
    model.add_adapter("other", config)
    return model.eval().requires_grad_(False)


def patch(model: Any, name: str, attention: str) -> Any:
    """Latents at full rank, so that nothing is lost; keys and values in 8 bits."""
    if not name.startswith("deepseek"):
        config = KVSpliceConfig(bits=8, sink_tokens=2, attention=attention)
        return patch_model_with_kvsplice(model, config, calibration=calibration_of(name))
    config = KVSpliceConfig(compression_ratio=1.0, sink_tokens=2, attention=attention)
    return patch_model_with_kvsplice(model, config)


def layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]


def write_everywhere(model: Any, write: Callable[[torch.Tensor], Any]) -> None:
    for layer in layers(model):
        write(layer.lora_B["default"].weight)


def step_of_an_optimiser(model: Any) -> None:
    weights = [layer.lora_B["default"].weight for layer in layers(model)]
    for weight in weights:
        weight.grad = weight.detach().sign()
    torch.optim.SGD(weights, lr=0.2).step()


def other_weights(model: Any) -> None:
    names = [name for name in model.state_dict() if "lora_A.default" in name]
    model.load_state_dict({name: model.state_dict()[name].flip(0) for name in names}, strict=False)


def new_adapter(model: Any) -> None:
    torch.manual_seed(1)
    model.add_adapter("new", model.peft_config["default"])
    model.set_adapter("new")


def replace_parameter(model: Any) -> None:
    for layer in layers(model):
        weight = layer.lora_A["default"].weight
        layer.lora_A["default"].weight = nn.Parameter(-weight, requires_grad=False)


def set_scale(model: Any) -> None:
    for layer in layers(model):
        layer.set_scale("default", SCALE)


def base_weights(model: Any) -> None:
    for layer in layers(model):
        layer.get_base_layer().weight.data.mul_(0.5)


@torch.no_grad()
def in_place(model: Any) -> None:
    write_everywhere(model, lambda weight: weight.mul_(-0.5))


@torch.no_grad()
def uncounted(model: Any) -> None:
    write_everywhere(model, lambda weight: weight.data.mul_(-0.5))


# What is done to the adapters between two steps, one after the other.
OPERATIONS: dict[str, list[Callable[[Any], Any]]] = {
    "swapped, and back": [lambda m: m.set_adapter("other"), lambda m: m.set_adapter("default")],
    "both at once": [lambda m: m.base_model.set_adapter(["default", "other"])],
    "switched off, and on": [
        lambda m: m.base_model.disable_adapter_layers(),
        lambda m: m.base_model.enable_adapter_layers(),
    ],
    "merged, and unmerged": [lambda m: m.merge_adapter(), lambda m: m.unmerge_adapter()],
    "merged safely, and unmerged": [lambda m: m.merge_adapter(safe_merge=True), lambda m: m.unmerge_adapter()],
    "another merged, and switched off": [
        lambda m: m.merge_adapter(["other"]),
        lambda m: m.base_model.disable_adapter_layers(),
    ],
    "scaled": [set_scale, lambda m: [layer.unscale_layer() for layer in layers(m)]],
    "one added, and deleted": [new_adapter, lambda m: (m.set_adapter("default"), m.delete_adapter("new"))],
    "a step of training": [step_of_an_optimiser],
    "weights loaded": [other_weights],
    "a parameter replaced": [replace_parameter],
    "written in place": [in_place],
    "written past the count": [uncounted],
    "the base written past the count": [base_weights],
    "merged and taken off": [lambda m: m.base_model.merge_and_unload()],
}


@torch.no_grad()
def steps(model: Any, operations: list[Callable[[Any], Any]]) -> list[torch.Tensor]:
    """Logits of a step before, and after each operation, on one cache."""
    ids = torch.randint(8, 128, (2, 40), generator=torch.Generator().manual_seed(2))
    cache = cache_of(model(input_ids=ids[:, :20], use_cache=True))
    found = []
    for place, operation in enumerate([lambda m: None, lambda m: None, *operations], start=20):
        operation(model)
        found.append(model(input_ids=ids[:, place : place + 1], **cache_argument(cache)).logits.float())
    return found


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("way", WAYS)
def test_decode_follows_what_is_done_to_adapters_in_the_middle_of_a_generation(way: str, operation: str) -> None:
    name, attention, other_attention = WAYS[way]
    other = adapted(name) if other_attention is None else patch(adapted(name), name, other_attention)
    expected, found = (
        steps(other, OPERATIONS[operation]),
        steps(patch(adapted(name), name, attention), OPERATIONS[operation]),
    )
    for step, (one, two) in enumerate(zip(found, expected, strict=True)):
        assert (one - two).norm() < TOLERANCE * two.norm(), f"step {step}"


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if not name.startswith("merged")])
@pytest.mark.parametrize("name", TARGETS)
def test_each_of_these_operations_changes_what_the_model_says(name: str, operation: str) -> None:
    unmoved, moved = steps(adapted(name), [lambda m: None]), steps(adapted(name), OPERATIONS[operation][:1])
    assert (moved[2] - unmoved[2]).norm() > 50 * TOLERANCE * unmoved[2].norm()


def kept(model: Any) -> list[Any]:
    return [state.materialised._kept for _, state in patched_sites(model)]


def test_a_dense_weight_is_made_once_and_made_again_only_after_a_change() -> None:
    model = patch(adapted("deepseek_v3"), "deepseek_v3", "auto")
    steps(model, [])
    first = kept(model)
    assert all(first)
    steps(model, [lambda m: None, lambda m: m.train(False)])
    assert all(one is two for one, two in zip(kept(model), first, strict=True))
    model.set_adapter("other")
    steps(model, [])
    assert not any(one is two for one, two in zip(kept(model), first, strict=True))
    heads, size = 4 * (16 + 12), 32
    assert materialised_nbytes(model) == 2 * heads * size * 4
    assert "materialised kv_b_proj: 0.0143 MB per layer, 2 layers, 0.0287 MB" in str(explain(model))


@pytest.mark.parametrize("done", ["unpatched", "merged and taken off", "switched off by choice"])
def test_a_dense_weight_is_freed_when_it_is_not_needed(done: str) -> None:
    model = patch(adapted("deepseek_v3"), "deepseek_v3", "auto")
    steps(model, [])
    states = [state for _, state in patched_sites(model)]
    assert materialised_nbytes(model) > 0
    if done == "unpatched":
        unpatch_model(model)
        assert not [name for module in model.modules() for name in vars(module) if "kvsplice" in name]
        return
    if done == "merged and taken off":  # between two steps: no prompt comes that would look at all of it
        steps(model, [lambda m: m.base_model.merge_and_unload()])
        assert [state.materialised.nbytes for state in states] == [0, 0]
        return
    if done == "switched off by choice":
        model = adapted("deepseek_v3")
        config = KVSpliceConfig(compression_ratio=1.0, sink_tokens=2, materialise_weights=False)
        states = [state for _, state in patched_sites(patch_model_with_kvsplice(model, config))]
    steps(model, [])
    assert [state.materialised.nbytes for state in states] == [0, 0]
    assert materialised_nbytes(model) == 0


def reloaded(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, reloaded], ids=["deepcopy", "torch.save"])
def test_copies_and_state_dicts_are_those_without_a_dense_weight(copied: Callable[[Any], Any]) -> None:
    model = patch(adapted("deepseek_v3"), "deepseek_v3", "absorbed")
    names = set(model.state_dict())
    expected = steps(model, [])
    assert set(model.state_dict()) == names
    clone = copied(model)
    assert materialised_nbytes(clone) == 0
    assert materialised_nbytes(model) > 0
    assert all(torch.equal(one, two) for one, two in zip(steps(clone, []), expected, strict=True))
    write_everywhere(clone, lambda weight: weight.data.zero_())
    assert all(torch.equal(one, two) for one, two in zip(steps(model, []), expected, strict=True))


def test_another_dtype_is_another_weight() -> None:
    model = patch(adapted("deepseek_v3"), "deepseek_v3", "absorbed")
    before = steps(model, [])
    in_fp32 = materialised_nbytes(model)
    after = steps(model.bfloat16(), [])
    assert 2 * materialised_nbytes(model) == in_fp32
    assert all((one - two).norm() < 0.1 * two.norm() for one, two in zip(after, before, strict=True))


def test_a_single_number_written_past_the_count_is_seen_by_the_next_generation() -> None:
    model, other = (patch(adapted("deepseek_v3"), "deepseek_v3", way) for way in ("absorbed", "expanded"))
    steps(model, [])
    for changed in (model, other):
        for layer in layers(changed):
            if layer.get_base_layer().weight.shape == (112, 32):
                layer.get_base_layer().weight.data[37, 11] += 50.0
    for one, two in zip(steps(model, []), steps(other, []), strict=True):
        assert (one - two).norm() < TOLERANCE * two.norm()


# ------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("attention", ["auto", "absorbed"])
def test_gradients_through_a_live_cache_are_those_of_the_expanded_path(attention: str) -> None:
    found = []
    for way in (attention, "expanded"):
        model = patch(adapted("deepseek_v3"), "deepseek_v3", way)
        steps(model, [])  # something is kept that must not be used
        for layer in layers(model):
            layer.lora_A["default"].weight.requires_grad_(True)
        ids = torch.randint(8, 128, (2, 26), generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            cache = cache_of(model(input_ids=ids[:, :20], use_cache=True))
        logits = [model(input_ids=ids[:, i : i + 1], **cache_argument(cache)).logits for i in (20, 21)]
        torch.cat(logits, 1).square().mean().backward()
        found.append([layer.lora_A["default"].weight.grad for layer in layers(model)])
    for one, two in zip(*found, strict=True):
        assert two.norm() > 0
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-3)


def test_after_each_step_of_training_decode_is_that_of_the_new_weights() -> None:
    model, other = (patch(adapted("deepseek_v3"), "deepseek_v3", way) for way in ("absorbed", "expanded"))
    ids = torch.randint(8, 128, (2, 16), generator=torch.Generator().manual_seed(3))
    merge_kvsplice(model)
    for trained in (model, other):
        weights = [layer.lora_A["default"].weight.requires_grad_(True) for layer in layers(trained)]
        optimiser = torch.optim.AdamW(weights, lr=0.05)
        for _ in range(2):
            optimiser.zero_grad()
            trained(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimiser.step()
            trained.last = steps(trained, [])
    for one, two in zip(model.last, other.last, strict=True):
        assert (one - two).norm() < 1e-3 * two.norm()


# ------------------------------------------------------------------------------------------------ what cannot be folded


class Rounded(nn.Module):
    """A linear layer that computes on its input in eight bits."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        step = x.abs().amax(-1, keepdim=True).clamp_min(1e-2) / 127
        return self.layer((x / step).round() * step)


class InFloat8(Rounded):
    """A linear layer that computes on its input in float8."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        step = x.abs().amax(-1, keepdim=True).clamp_min(1e-2) / 448
        return self.layer((x / step).to(torch.float8_e4m3fn).to(x.dtype) * step)


class Broken(Rounded):
    """A layer that takes one row only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > 4:
            raise ValueError("one row at a time")
        return self.layer(x)


class Damaged(Rounded):
    """A layer that holds a number that is not finite."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * torch.tensor(float("inf"))


class Biased(Rounded):
    """A layer that adds something."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + 0.5


class Dropping(Rounded):
    """A layer that drops numbers at random."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(nn.functional.dropout(x, 0.1, training=True))


def with_bias(layer: nn.Linear) -> nn.Linear:
    biased = nn.Linear(layer.in_features, layer.out_features)
    biased.weight.data.copy_(layer.weight.data)
    biased.bias.data.fill_(0.5)
    return biased


REFUSED: dict[str, tuple[Callable[[nn.Linear], nn.Module], str]] = {
    "activations in eight bits": (Rounded, r"Rounded: what it gives is no matrix times .* \([\d.]+% off\)"),
    "activations in float8": (InFloat8, r"InFloat8: what it gives is no matrix times .* \([\d.]+% off\)"),
    "numbers dropped at random": (Dropping, "dropped at random"),
    "a forward that fails": (Broken, r"its forward of unit vectors fails \(ValueError: one row at a time\)"),
    "not finite": (Damaged, "not finite"),
    "a bias": (Biased, "it adds a bias"),
    "a bias of a plain layer": (with_bias, "it adds a bias"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_folded_is_named_and_expanded(case: str, dtype: torch.dtype) -> None:
    wrap, words = REFUSED[case]

    def wrapped() -> Any:
        model = build("deepseek_v3", dtype).requires_grad_(False)
        for layer in model.model.layers:
            layer.self_attn.kv_b_proj = wrap(layer.self_attn.kv_b_proj).to(dtype).requires_grad_(False)
        return model

    with pytest.raises(FoldingError, match=words):
        patch(wrapped(), "deepseek_v3", "absorbed")
    if case == "not finite":
        return
    stock, model = wrapped(), patch_model_with_kvsplice(wrapped(), KVSpliceConfig(rank=32, init="identity"))
    said = explain(model).layers
    assert {layer.decode for layer in said} == {"expanded"}
    assert all(words.split(" ")[-1].strip("()\\") in layer.refused["codes"] for layer in said)
    if case != "numbers dropped at random":
        for one, two in zip(steps(model, []), steps(stock, []), strict=True):
            assert (one - two).norm() < (1e-4 if dtype is torch.float32 else 0.1) * two.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounding_alone_is_not_taken_for_quantised_activations(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for size in (32, 512):
        layer = nn.Sequential(nn.Linear(size, 4 * size, bias=False))
        config = peft.LoraConfig(target_modules=["0"], r=16, lora_alpha=64, init_lora_weights=False)
        tuned = peft.get_peft_model(layer, config).base_model.model[0].to(dtype)
        for wrap, refused in ((lambda part: part, False), (Rounded, True), (InFloat8, True)):
            assert bool(materialise(wrap(tuned), size, dtype).refused) is refused


def test_a_dropout_of_the_adapter_counts_while_it_is_on() -> None:
    model = patch(adapted("deepseek_v3", lora_dropout=0.5), "deepseek_v3", "auto")
    assert {layer.decode for layer in explain(model).layers} != {"expanded"}
    model.train()
    assert {layer.decode for layer in explain(model).layers} == {"expanded"}
    assert {layer.decode for layer in explain(model.eval()).layers} != {"expanded"}


def test_an_adapter_for_each_sequence_of_a_batch_is_expanded() -> None:
    model = adapted("deepseek_v3")
    ids = torch.randint(8, 128, (2, 20), generator=torch.Generator().manual_seed(2))
    settings = {"adapter_names": ["default", "other"], "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(input_ids=ids, **settings)
    patch(model, "deepseek_v3", "auto")
    steps(model, [])
    assert torch.equal(model.generate(input_ids=ids, **settings), expected)


def test_a_layer_that_is_another_one_at_each_call_is_expanded_until_it_rests() -> None:
    model, stock = patch(adapted("deepseek_v3"), "deepseek_v3", "auto"), adapted("deepseek_v3")
    calls = [replace_parameter] * 9 + [lambda m: None] * 3
    for one, two in zip(steps(model, calls[:6]), steps(stock, calls[:6]), strict=True):
        assert (one - two).norm() < TOLERANCE * two.norm()
    refused = [state.materialised._kept[2].refused for _, state in patched_sites(model)]
    assert all("another one at each call" in reason for reason in refused)
    for one, two in zip(steps(model, []), steps(stock, []), strict=True):
        assert (one - two).norm() < TOLERANCE * two.norm()
    assert materialised_nbytes(model) > 0


def test_weights_that_are_elsewhere_are_named() -> None:
    model = adapted("deepseek_v3", ["kv_b_proj"]).to("meta")
    with pytest.raises(FoldingError, match=r"its weights are not loaded \(meta device\)"):
        patch(model, "deepseek_v3", "absorbed")
    stock = steps(adapted("deepseek_v3"), [])
    model = cpu_offload(patch(adapted("deepseek_v3"), "deepseek_v3", "auto"), execution_device=torch.device("cpu"))
    found = steps(model, [])
    assert all("accelerate offloads its weights" in layer.refused["codes"] for layer in explain(model).layers)
    assert materialised_nbytes(model) == 0
    assert all((one - two).norm() < TOLERANCE * two.norm() for one, two in zip(found, stock, strict=True))


def test_an_offloaded_model_with_adapters_is_patched_as_a_loaded_one() -> None:
    model = cpu_offload(adapted("deepseek_v3"), execution_device=torch.device("cpu"))
    found, expected = (
        steps(patch_model_with_kvsplice(one, KVSpliceConfig(rank=12, sink_tokens=2)), [])
        for one in (model, adapted("deepseek_v3"))
    )
    assert all((one - two).norm() < TOLERANCE * two.norm() for one, two in zip(found, expected, strict=True))


def test_adapters_in_float32_on_a_model_in_bf16_are_folded_in_bf16() -> None:
    def make() -> Any:
        torch.manual_seed(0)
        config = peft.LoraConfig(target_modules=["kv_b_proj"], r=2, lora_alpha=8, init_lora_weights=False)
        return peft.get_peft_model(build("deepseek_v3", torch.bfloat16), config).eval().requires_grad_(False)

    stock, model = make(), patch(make(), "deepseek_v3", "absorbed")
    assert layers(model)[0].lora_A["default"].weight.dtype is torch.float32
    found, expected = steps(model, []), steps(stock, [])
    assert {state.materialised._kept[2].weight.dtype for _, state in patched_sites(model)} == {torch.bfloat16}
    assert all((one - two).norm() < 0.1 * two.norm() for one, two in zip(found, expected, strict=True))
    assert {layer.decode for layer in explain(model).layers} <= {"C++", "PyTorch"}


@pytest.mark.parametrize("name", ["weight", "bias", "steps"])
@torch.no_grad()
def test_a_single_number_written_in_place_is_seen_at_the_next_look(name: str) -> None:
    layer = nn.Sequential(nn.Linear(64, 64))
    layer.register_buffer("steps", torch.ones(4096))
    state = LayerState(layer)
    assert state.holds(layer)
    assert state.holds(layer, thorough=True)
    tensor = layer.steps if name == "steps" else getattr(layer[0], name)
    tensor.view(-1)[37] += 1
    assert not state.holds(layer)


@pytest.mark.skipif(upstream.ContinuousBatchingManager is None, reason="the paged cache is of another kind before 5.23")
def test_continuous_batching_folds_what_generate_folds() -> None:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = patch(adapted("deepseek_v3"), "deepseek_v3", "absorbed")
    prompt = torch.randint(8, 128, (20,), generator=torch.Generator().manual_seed(2)).tolist()
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(input_ids=torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist()
    outputs = model.generate_batch(
        [prompt],
        generation_config=GenerationConfig(**settings, eos_token_id=-1),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=20, page_size=8, max_batch_tokens=64),
        progress_bar=False,
    )
    assert next(iter(outputs.values())).generated_tokens == expected
    assert materialised_nbytes(model) > 0
