"""What docs/how_to_add.md says works: a codec, a backend and a family are a file and a line each."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_packed import SINKS, calibrated
from tiny_models import build, tiny_batch
from toy_codec import LargestCodec
from transformers import PreTrainedModel

from kvsplice_hf import (
    CheckpointError,
    ConfigError,
    KVSpliceConfig,
    UnsupportedError,
    cache_nbytes,
    explain,
    get_kv_cache_size,
    load_kvsplice,
    patch_model_with_kvsplice,
    prune_kvsplice,
    save_kvsplice,
    unpatch_model,
)
from kvsplice_hf.attend import choice, reference
from kvsplice_hf.attend.backend import Attended, Backend
from kvsplice_hf.code import codecs
from kvsplice_hf.code.codec import RowCodec
from kvsplice_hf.patch import sites
from kvsplice_hf.patch.mla import MLA
from kvsplice_hf.patch.state import patched_sites


NAME = "deepseek_v3"
ROW = 32 + 8 + 2


@pytest.fixture
def codec(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(codecs, "_registered", dict(codecs._registered))
    return codecs.register_codec(LargestCodec).kind


def generated(model: PreTrainedModel, **settings: Any) -> Any:
    ids, mask = tiny_batch(NAME)
    return model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0, **settings)


def patched_with(kind: str, **settings: Any) -> PreTrainedModel:
    model = build(NAME)
    fixed = {"bytes_per_token": 60, "codec": kind, "keys": "rotated", "sink_tokens": SINKS}
    config = KVSpliceConfig(**fixed | settings)
    return patch_model_with_kvsplice(model, config, calibration=calibrated(model))


# ---------------------------------------------------------------------------------------------------------- a codec


@pytest.mark.parametrize("attention", ["auto", "expanded", "absorbed"])
def test_a_registered_codec_runs_with_and_without_a_cache(codec: str, attention: str) -> None:
    model = patched_with(codec, attention=attention)
    assert torch.equal(generated(model), generated(model, use_cache=False))
    assert not torch.equal(generated(model), generated(build(NAME))), "eight bits of a random model cost something"


def test_its_rows_have_the_bytes_that_it_says(codec: str) -> None:
    model = patched_with(codec)
    output = generated(model, return_dict_in_generate=True)
    assert {patched.geometry.packed_bytes for _, patched in patched_sites(model)} == {ROW}
    tokens = output.sequences.shape[1] - 1
    assert cache_nbytes(output) == get_kv_cache_size(model, tokens, len(output.sequences)).compressed_bytes


def test_a_model_with_it_is_saved_loaded_and_unpatched(codec: str, tmp_path: Path) -> None:
    model = patched_with(codec)
    expected = generated(model)
    save_kvsplice(model, tmp_path)
    assert torch.equal(generated(load_kvsplice(build(NAME), tmp_path)), expected)
    assert torch.equal(generated(load_kvsplice(model, tmp_path)), expected), "also into the patched model"
    assert torch.equal(generated(unpatch_model(model)), generated(build(NAME)))


def test_where_it_is_not_registered_its_files_are_refused_by_its_name(
    codec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_kvsplice(patched_with(codec), tmp_path)
    monkeypatch.delitem(codecs._registered, codec)
    model = build(NAME)
    with pytest.raises(CheckpointError, match="No codec is called 'largest'"):
        load_kvsplice(model, tmp_path)
    assert torch.equal(generated(model), generated(build(NAME)))


def test_explain_says_that_the_faster_backends_do_not_read_it(codec: str) -> None:
    with torch.no_grad():
        found = explain(patched_with(codec, attention="absorbed")).layers
    assert {layer.decode for layer in found} == {"PyTorch"}
    assert all("does not read rows of the codec 'largest'" in str(layer.refused) for layer in found)


def test_what_a_codec_cannot_do_is_refused_by_its_name(codec: str) -> None:
    with pytest.raises(ConfigError, match="take 42 bytes in layer 0; the budget is"):
        patched_with(codec, bytes_per_token=20)
    with pytest.raises(ConfigError, match=r"No codec is called 'smallest'. Known are 'largest', 'rows'"):
        patched_with("smallest")
    with pytest.raises(UnsupportedError, match="'largest' cannot be pruned"):
        prune_kvsplice(patched_with(codec), threshold=10.0)
    with pytest.raises(ConfigError, match="registered already"):
        codecs.register_codec(type("Another", (LargestCodec,), {}))


def test_gradients_pass_straight_through_a_codec_that_says_nothing_of_them(codec: str) -> None:
    rows = torch.randn(3, 5, requires_grad=True)
    LargestCodec(torch.zeros(5)).round_trip(rows).sum().backward()
    assert torch.equal(rows.grad, torch.ones(3, 5))  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------- a backend


class ToyBackend(Backend):
    """Computes by PyTorch, and counts."""

    name = "toy"
    operations = frozenset({"attend"})
    codecs = frozenset({RowCodec.kind, LargestCodec.kind})

    def __init__(self) -> None:
        self.calls = 0

    def claims(self, tensors: Any) -> bool:
        return tensors[0].is_cpu

    def refusal(self, tensors: Any) -> str | None:
        return None

    def attend(
        self, query: torch.Tensor, rows: torch.Tensor, codec: Any, value_dim: int, bias: Any, *, scaling: float
    ) -> Attended:
        self.calls += 1
        by_query = None if bias is None else bias[:, None]
        return reference.attend(query, rows, codec, value_dim, by_query, scaling=scaling)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> ToyBackend:
    toy = ToyBackend()
    monkeypatch.setattr(choice, "BACKENDS", [toy, *choice.BACKENDS])
    monkeypatch.setattr(choice, "_verdicts", {})
    return toy


@pytest.mark.parametrize("kind", ["rows", "largest"])
def test_a_registered_backend_serves_what_it_has_and_pytorch_the_rest(
    codec: str, kind: str, backend: ToyBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = patched_with(kind, attention="absorbed")
    found = generated(model)
    assert backend.calls > 0
    assert set(choice.verdicts()) == {title for title in choice.verdicts() if title.startswith("attend")}
    monkeypatch.setattr(choice, "_WITHOUT_KERNELS", True)
    assert torch.equal(found, generated(model))


def test_explain_names_the_backend_that_serves(codec: str, backend: ToyBackend) -> None:
    with torch.no_grad():
        assert {layer.decode for layer in explain(patched_with("rows", attention="absorbed")).layers} == {"toy"}


# --------------------------------------------------------------------------------------------------------- a family


def test_a_family_says_what_its_modules_are_and_how_rows_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_exact_tokens(site: Any, splice: Any, exact_tokens: int) -> Any:
        return MLA.geometry(site, splice, 0)

    toy = replace(MLA, name="toy", recognises=lambda module: hasattr(module, "is_toy"), geometry=without_exact_tokens)
    monkeypatch.setattr(sites, "FAMILIES", [toy, MLA])
    model = build(NAME)
    first = model.model.layers[0].self_attn
    first.is_toy = True
    patch_model_with_kvsplice(model, compression_ratio=1.0)
    assert [patched.geometry.sink_tokens for _, patched in patched_sites(model)] == [0, 4]
    assert torch.equal(generated(model), generated(build(NAME)))
    monkeypatch.setattr(sites, "FAMILIES", [MLA])  # what was patched is undone all the same
    del first.is_toy
    assert "expand_kv" not in vars(unpatch_model(model).model.layers[0].self_attn)
