"""`explain` says what runs: its claims are held against what a step really calls."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_packed import calibrated
from tiny_models import build, tiny_batch
from transformers import PreTrainedModel

from kvsplice_hf import (
    KVSpliceConfig,
    PatchStateError,
    explain,
    patch_model_with_kvsplice,
    splice_disabled,
)
from kvsplice_hf.attend import choice as dispatch
from kvsplice_hf.attend.native import calls as native
from kvsplice_hf.patch import absorbed as absorbed_module
from kvsplice_hf.patch import latents as attention_module
from kvsplice_hf.upstream import cache_argument, cache_of


NAME = "deepseek_v3"


@pytest.fixture(autouse=True)
def fresh_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_verdicts", {})
    monkeypatch.setattr(dispatch, "_reasons", {})


def plain(**settings: Any) -> PreTrainedModel:
    dtype = settings.pop("dtype", torch.float32)
    model = build(settings.pop("name", NAME), dtype)
    config = KVSpliceConfig(compression_ratio=0.5, sink_tokens=2, **settings)
    return patch_model_with_kvsplice(model, config).requires_grad_(False)


def packed() -> PreTrainedModel:
    model, config = build(NAME), KVSpliceConfig(bits=4.0, sink_tokens=2)
    return patch_model_with_kvsplice(model, config, calibration=calibrated(model)).requires_grad_(False)


def with_adapter(**settings: Any) -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = plain(**settings)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["kv_b_proj"])).requires_grad_(False)


def with_other_attention() -> PreTrainedModel:
    model = plain()
    model.config._attn_implementation_internal = "eager"
    return model


def trained(model: PreTrainedModel) -> PreTrainedModel:
    return model.requires_grad_(True)


def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_WITHOUT_KERNELS", True)


# Model, what is done to the process, what decodes, and words of the reason.
CASES: dict[str, tuple[Callable[[], Any], Any, str, str]] = {
    "plain": (plain, None, "C++", ""),
    "packed": (packed, None, "C++", ""),
    "in bf16": (lambda: plain(dtype=torch.bfloat16), None, "C++", ""),
    "in fp16": (lambda: plain(dtype=torch.float16), None, "PyTorch", "torch.float16"),
    "gradients on": (lambda: trained(plain()), None, "PyTorch", "torch.no_grad"),
    "gradients on, packed": (lambda: trained(packed()), None, "expanded", "torch.no_grad"),
    "kernels left out": (plain, without_kernels, "PyTorch", "KVSPLICE_KERNELS"),
    "an adapter on kv_b_proj": (with_adapter, None, "C++", ""),
    "an adapter that is trained": (lambda: trained(with_adapter()), None, "expanded", "torch.no_grad"),
    "an adapter, nothing kept": (
        lambda: with_adapter(materialise_weights=False),
        None,
        "expanded",
        "materialise_weights=False: True keeps its weight dense, 0.0143 MB",
    ),
    "another attention function": (with_other_attention, None, "expanded", "'eager'"),
    "expanded asked for": (lambda: plain(attention="expanded"), None, "expanded", 'attention="expanded"'),
    "sparse attention": (lambda: plain(name="deepseek_v32"), None, "C++", ""),
}


def what_runs(model: Any, tokens: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a step of one token on so many really calls."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    gradients = torch.is_grad_enabled()
    with torch.no_grad():
        ids = torch.randint(8, 128, (1, tokens - 1))
        cache = cache_of(base(ids, use_cache=True))
    called: list[str] = []

    def spy(module: Any, name: str, label: str) -> None:
        function = getattr(module, name)

        def spied(*args: Any, **kwargs: Any) -> Any:
            called.append(label)
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, spied)

    spy(native, "decode", "C++")
    spy(native, "attend_rows", "C++")
    spy(native, "attend_packed", "C++")
    spy(attention_module, "absorbed_attention", "codes")
    with torch.set_grad_enabled(gradients):
        base(ids[:, :1], position_ids=torch.tensor([[tokens - 1]]), **cache_argument(cache))
    monkeypatch.undo()
    return "C++" if "C++" in called else "PyTorch" if "codes" in called else "expanded"


@pytest.mark.parametrize("case", CASES)
def test_what_is_said_is_what_runs(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native.kernels_available("cpu"):
        pytest.skip("no compiler at hand")
    make, change, decode, reason = CASES[case]
    model = make()
    if change is not None:
        change(monkeypatch)
    said = explain(model, tokens=64)
    assert {layer.decode for layer in said.layers} == {decode}
    assert all(reason in " ".join(layer.refused.values()) for layer in said.layers)
    assert all(bool(layer.refused) == bool(reason) for layer in said.layers)
    if change is None:
        assert what_runs(model, 64, monkeypatch) == decode


def wrapped(model: Any) -> Any:
    return torch.compile(model, backend="eager", fullgraph=True)


def in_place(model: Any) -> Any:
    model.compile(backend="eager", fullgraph=True)
    return model


def by_its_forward(model: Any) -> Any:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.forward = torch.compile(base.forward, backend="eager", fullgraph=True)
    return model


@pytest.mark.parametrize("way", [wrapped, in_place, by_its_forward])
@pytest.mark.parametrize(
    ("make", "decode", "reason"),
    [
        (plain, "PyTorch", "inside torch.compile PyTorch serves"),
        (with_adapter, "expanded", "kv_b_proj is a Linear (packed, adapted or sharded), which cannot be folded under"),
    ],
)
def test_a_compiled_model_is_said_to_run_without_kernels_and_to_expand_what_cannot_be_read(
    make: Callable[[], Any], decode: str, reason: str, way: Callable[[Any], Any]
) -> None:
    if not native.kernels_available("cpu"):
        pytest.skip("no compiler at hand")
    said = explain(way(make()), tokens=64)
    assert {layer.decode for layer in said.layers} == {decode}
    assert all(reason in " ".join(layer.refused.values()) for layer in said.layers)


def test_a_layer_that_is_compiled_alone_is_said_alone() -> None:
    model = plain()
    model.model.layers[0].compile(backend="eager")
    first, second = explain(model, tokens=64).layers
    assert first.decode == "PyTorch"
    assert second.decode == explain(plain(), tokens=64).layers[0].decode


@pytest.mark.parametrize(("make", "runs"), [(plain, "codes"), (with_adapter, "expanded")])
def test_compiled_steps_run_as_it_is_said(make: Callable[[], Any], runs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.no_grad():
        ids, _ = tiny_batch(NAME, length=60)
        cache = cache_of(base(ids, use_cache=True))
        called: list[str] = []
        attend = attention_module.absorbed_attention
        monkeypatch.setattr(
            attention_module, "absorbed_attention", lambda *a, **k: called.append("") or attend(*a, **k)
        )
        step = torch.compile(base, backend="eager")
        step(ids[:, :1], position_ids=torch.full((len(ids), 1), 60), **cache_argument(cache))
    assert ("codes" if called else "expanded") == runs


def test_the_table_names_every_layer_and_every_reason() -> None:
    model = plain(attention="expanded", layers="last:1")
    text = str(explain(model))
    assert "model.layers.1.self_attn" in text
    assert "model.layers.0.self_attn" not in text
    assert 'attention="expanded" was asked for' in " ".join(text.split())
    assert "4096" in text


def test_a_disabled_splice_is_said() -> None:
    model = plain()
    with splice_disabled(model):
        assert {layer.decode for layer in explain(model).layers} == {"original"}
    assert {layer.decode for layer in explain(model).layers} != {"original"}


def test_an_unpatched_model_is_refused() -> None:
    with pytest.raises(PatchStateError, match="not patched"):
        explain(build(NAME))


def generate(model: PreTrainedModel, count: int = 3) -> torch.Tensor:
    ids, mask = tiny_batch(NAME, length=60)
    return model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0)


def test_a_kernel_that_is_given_up_is_named_with_its_reason_and_the_warning_points_to_explain(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if not native.kernels_available("cpu"):
        pytest.skip("no compiler at hand")
    model = plain()

    def broken(step: Any) -> torch.Tensor:
        raise RuntimeError("illegal instruction")

    monkeypatch.setattr(native, "decode", broken)
    with caplog.at_level(logging.WARNING):
        generate(model)
    assert "kvsplice_hf.explain(model)" in caplog.text
    said = explain(model)
    assert {layer.decode for layer in said.layers} == {"PyTorch"}
    assert all("illegal instruction" in layer.refused["C++"] for layer in said.layers)
    assert any("illegal instruction" in verdict for verdict in said.verdicts.values())


# --------------------------------------------------------------------- what must not give a kernel up for all


def under_autocast(model: PreTrainedModel) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        generate(model)


def with_numbers_that_are_not_finite(model: PreTrainedModel) -> None:
    ids, _ = tiny_batch(NAME, length=60)
    embeddings = model.get_input_embeddings()(ids)
    embeddings[0, 5] = torch.nan
    with torch.no_grad():
        cache = cache_of(model(inputs_embeds=embeddings, use_cache=True))
        model(ids[:, :1], **cache_argument(cache))


def with_a_damaged_splice(model: PreTrainedModel) -> None:
    weight = model.model.layers[0].self_attn.kvsplice.expand.weight
    before = weight.clone()
    with torch.no_grad():
        weight[0, 0] = torch.inf
        generate(model)
        weight.copy_(before)


def without_memory(model: PreTrainedModel) -> None:
    run = native.run
    native.run = lambda function, given: (_ for _ in ()).throw(MemoryError("no memory"))
    try:
        generate(model)
    finally:
        native.run = run


def with_a_codec_in_fp16(model: PreTrainedModel) -> None:
    codec = model.model.layers[0].self_attn.kvsplice.codec
    if codec is None:
        pytest.skip("rows are numbers")
    before = codec.scales
    codec._buffers["scales"] = before.half()
    generate(model)
    codec._buffers["scales"] = before


UNUSUAL = [
    under_autocast,
    with_numbers_that_are_not_finite,
    with_a_damaged_splice,
    without_memory,
    with_a_codec_in_fp16,
]


@pytest.mark.parametrize("make", [plain, packed], ids=["plain", "packed"])
@pytest.mark.parametrize("first", UNUSUAL, ids=lambda first: first.__name__)
def test_an_unusual_first_call_does_not_give_the_kernels_up_for_the_others(first: Any, make: Any) -> None:
    if not native.kernels_available("cpu"):
        pytest.skip("no compiler at hand")
    model = make()
    first(model)
    generate(model)
    given_up = {kind: verdict for kind, verdict in dispatch.verdicts().items() if verdict != "serves"}
    assert {kind for kind in given_up if "autocast" not in kind} == set(), given_up
    assert {layer.decode for layer in explain(model).layers} == {"C++"}
    assert absorbed_module.decode is dispatch.decode
