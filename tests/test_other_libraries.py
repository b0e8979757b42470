"""Libraries that wrap a model, or take its layers for their own: the patch belongs to the layers, and is no layer."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build, tiny_batch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from kvsplice_hf import (
    KVSpliceCache,
    KVSpliceConfig,
    PatchStateError,
    explain,
    get_kv_cache_size,
    load_kvsplice,
    merge_kvsplice,
    patch_model_with_kvsplice,
    prune_kvsplice,
    save_kvsplice,
    splice_disabled,
    unmerge_kvsplice,
    unpatch_model,
    upstream,
)
from kvsplice_hf.gpt2_mla import GPT2MLAConfig, GPT2MLAForCausalLM
from kvsplice_hf.patch.state import find_patch, is_patched, patched_sites
from kvsplice_hf.training import freeze_all_but_kvsplice
from kvsplice_hf.upstream import cache_argument, cache_of


peft = pytest.importorskip("peft", reason="peft is not installed")

NAME = "deepseek_v3"
CONFIG = KVSpliceConfig(compression_ratio=0.5, sink_tokens=2)
PREFIX = "kvsplice"


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids, mask = tiny_batch(NAME)
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]


@torch.no_grad()
def stepwise(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of all tokens but the first 20, one step each."""
    cache = cache_of(model(input_ids=ids[:, :20], use_cache=True))
    steps = [model(input_ids=ids[:, i : i + 1], **cache_argument(cache)).logits for i in range(20, ids.shape[1])]
    return torch.cat(steps, 1)


# ----------------------------------------------------------------------- those that look for linear layers


def lora_everywhere(model: Any) -> Any:
    settings = peft.LoraConfig(target_modules="all-linear", r=2, lora_alpha=8, init_lora_weights=False)
    return peft.get_peft_model(model, settings).eval()


def dynamic_quantisation(model: Any) -> Any:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def replaced_linear_layers(model: Any) -> Any:
    """As quantisers of other projects do it: every linear layer becomes something else."""

    class Quantised(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.linear = linear

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x)

    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) or type(module).__name__ == "Linear":
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, Quantised(module))
    return model


def watched_linear_layers(model: Any) -> Any:
    """As calibrators of other projects do it: each linear layer has to be called in a forward pass."""
    called: set[str] = set()
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    handles = [m.register_forward_hook(lambda *_, n=n: called.add(n)) for n, m in linear.items()]
    logits(model)
    for handle in handles:
        handle.remove()
    # (Experts that the router does not choose are not called either.)
    assert {name for name in set(linear) - called if "expert" not in name} == set()
    return model


LOOKING_FOR_LINEAR = [lora_everywhere, dynamic_quantisation, replaced_linear_layers, watched_linear_layers]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("other", LOOKING_FOR_LINEAR, ids=lambda other: other.__name__)
def test_no_library_takes_the_splice_for_a_layer_and_the_model_goes_on(other: Any, tmp_path: Path) -> None:
    model = other(patch_model_with_kvsplice(build(NAME), CONFIG))
    for _, state in patched_sites(model):
        splice = state.splice
        assert {type(part).__module__ for part in splice.modules()} <= {
            "kvsplice_hf.code.keys",
            "kvsplice_hf.code.layout",
            "kvsplice_hf.code.matrix",
            "kvsplice_hf.code.projection",
            "kvsplice_hf.code.codec",
        }
        assert set(splice.state_dict()) == {
            "transform_scale",
            "transform_shift",
            "compress.weight",
            "expand.weight",
        }
    ids = torch.randint(8, 128, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits[:, 20:]
    # Dynamic quantisation takes its ranges from all tokens of a call, so that stock models differ as well.
    tolerance = torch.inf if other is dynamic_quantisation else 1e-3 * float(whole.abs().max())
    assert (stepwise(model, ids) - whole).abs().max() < tolerance
    save_kvsplice(model, tmp_path)
    assert is_patched(load_kvsplice(build(NAME), tmp_path))


@pytest.mark.parametrize("target", ["compress", "expand", r".*\.kvsplice\.expand"])
def test_an_adapter_on_a_matrix_of_the_splice_is_refused_by_the_library(target: str) -> None:
    model = patch_model_with_kvsplice(build(NAME), CONFIG)
    wanted = [target] if "." not in target else target
    with pytest.raises(ValueError, match="not supported"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=wanted, r=2))


def test_a_built_in_splice_is_no_layer_either() -> None:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 128, "kv_lora_rank": 16, "n_positions": 64}
    model = GPT2MLAForCausalLM(GPT2MLAConfig(**sizes, kvsplice={"compression_ratio": 0.5}))
    adapted = lora_everywhere(model)
    assert not [name for name, part in adapted.named_modules() if PREFIX in name and hasattr(part, "lora_A")]


# ------------------------------------------------------------------------------------------ wrappers


class Wrapper(nn.Module):
    """Something around a model, as training frameworks have it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **kwargs: Any) -> Any:
        return self.module(**kwargs)


def lora(model: Any) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["o_proj"], r=2)).eval()


# What is put around a model, and how it comes off.
WRAPPERS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "peft": (lora, lambda wrapped: wrapped.merge_and_unload()),
    "peft, unloaded": (lora, lambda wrapped: wrapped.unload()),
    "torch.compile": (lambda model: torch.compile(model, backend="eager"), lambda wrapped: wrapped._orig_mod),
    "a module": (Wrapper, lambda wrapped: wrapped.module),
    "two of them": (lambda model: Wrapper(lora(model)), lambda wrapped: wrapped.module.merge_and_unload()),
    "swa": (lambda model: Wrapper(torch.optim.swa_utils.AveragedModel(model)), lambda wrapped: wrapped.module.module),
}


def check_everything(model: Any, folder: Path) -> None:
    """All that the package does with a patched model."""
    expected = logits(model)
    with splice_disabled(model):
        assert not torch.allclose(logits(model), expected)
    with pytest.raises(PatchStateError, match="already patched"):
        patch_model_with_kvsplice(model, CONFIG)
    save_kvsplice(model, folder)
    load_kvsplice(model, folder)
    unmerge_kvsplice(merge_kvsplice(model))
    assert torch.equal(logits(model), expected)
    assert len(KVSpliceCache(model).layers) == len(patched_sites(model)) == 2
    assert get_kv_cache_size(model, 64).compressed_bytes < get_kv_cache_size(model, 64).original_bytes
    assert len(explain(model).layers) == 2
    assert find_patch(model)[1].config == CONFIG
    freeze_all_but_kvsplice(model)
    prune_kvsplice(model, threshold=1e-6)


@pytest.mark.parametrize("order", ["patched, then wrapped", "wrapped, then patched"])
@pytest.mark.parametrize("unwrapped", [False, True], ids=["on the wrapper", "after it came off"])
@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_patch_survives_what_is_put_around_a_model_and_taken_off(
    kind: str, unwrapped: bool, order: str, tmp_path: Path
) -> None:
    wrap, unwrap = WRAPPERS[kind]
    model = build(NAME)
    stock = logits(model)
    if order.startswith("patched"):
        model = wrap(patch_model_with_kvsplice(model, CONFIG))
    else:
        model = patch_model_with_kvsplice(wrap(model), CONFIG)
    if unwrapped:
        model = unwrap(model)
    check_everything(model, tmp_path)
    unpatch_model(model)
    assert not is_patched(model)
    torch.testing.assert_close(logits(model), stock, atol=1e-5, rtol=0)  # an adapter that was merged adds zeros
    for module in model.modules():
        assert not [name for name in vars(module) if name.startswith("_kvsplice") or name == upstream.BATCHING_METHOD]
        assert not module._forward_pre_hooks
    patch_model_with_kvsplice(model, CONFIG)
    check_everything(model, tmp_path / "again")


@pytest.mark.skipif(upstream.ContinuousBatchingManager is None, reason="the paged cache is of another kind before 5.23")
@pytest.mark.parametrize("order", ["patched, then wrapped", "wrapped, then patched"])
def test_continuous_batching_runs_on_the_wrapper(order: str) -> None:
    from transformers import ContinuousBatchingConfig

    first, second = (lambda model: patch_model_with_kvsplice(model, CONFIG)), lora
    model = second(first(build(NAME))) if order.startswith("patched") else first(second(build(NAME)))
    prompt = tiny_batch(NAME)[0][0].tolist()
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(input_ids=torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist()
    outputs = model.generate_batch(
        [prompt],
        generation_config=GenerationConfig(**settings, eos_token_id=-1),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=20, page_size=8, max_batch_tokens=64),
        progress_bar=False,
    )
    assert next(iter(outputs.values())).generated_tokens == expected


def test_a_part_of_a_patched_model_is_patched_too(tmp_path: Path) -> None:
    model = patch_model_with_kvsplice(build(NAME), CONFIG)
    decoder = model.model
    save_kvsplice(decoder, tmp_path)
    with splice_disabled(decoder):
        disabled = logits(model)
    assert not torch.allclose(logits(model), disabled)
    unpatch_model(decoder)
    assert not is_patched(model)
    torch.testing.assert_close(logits(model), disabled, atol=0, rtol=0)
    patch_model_with_kvsplice(model, CONFIG)
    check_everything(model, tmp_path)


def test_a_layer_can_be_copied_without_the_rest_of_the_model() -> None:
    model = patch_model_with_kvsplice(build(NAME), CONFIG)
    layer = copy.deepcopy(model.model.layers[0])
    others = {parameter.data_ptr() for parameter in model.parameters()}
    assert not {parameter.data_ptr() for parameter in layer.parameters()} & others
    reached = {id(part) for part in layer.modules()}
    state = patched_sites(layer)[0][1]
    assert id(state.owner) in reached
    assert not any(isinstance(value, nn.Module) for value in vars(state.patch).values())


def test_layers_of_two_patches_in_one_model_are_disabled_together() -> None:
    model = patch_model_with_kvsplice(build(NAME), CONFIG)
    with splice_disabled(model):
        stock = logits(model)
    model.model.layers[0] = copy.deepcopy(model.model.layers[0])
    with splice_disabled(model):
        assert torch.equal(logits(model), stock)


def test_a_saved_base_model_has_no_splice_in_it_whoever_is_around_it(tmp_path: Path) -> None:
    model = lora(patch_model_with_kvsplice(build(NAME), CONFIG))
    model.merge_and_unload().save_pretrained(tmp_path)
    fresh, report = type(build(NAME)).from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(fresh, PreTrainedModel)
    assert not any(PREFIX in key for keys in report.values() for key in keys)
