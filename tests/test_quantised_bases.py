"""Models with quantised weights, by method: patched, calibrated, decoded on codes, saved, loaded and undone.

A method whose package is not installed is skipped, with its name (`make test-quantised` installs them).
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from quantised_models import KINDS, METHODS, build
from transformers import PreTrainedModel

from kvsplice_hf import (
    FoldingError,
    KVSpliceCalibrator,
    KVSpliceConfig,
    explain,
    load_kvsplice,
    materialised_nbytes,
    patch_model_with_kvsplice,
    save_kvsplice,
    unpatch_model,
)
from kvsplice_hf.calibration.fingerprint import model_fingerprint
from kvsplice_hf.manage.explanation import EXPANDED
from kvsplice_hf.patch.sites import find_sites


NEW_TOKENS = 12
BYTES = {"MLA": 64, "ordinary": 200}
every_method = pytest.mark.parametrize("method", METHODS)
every_kind = pytest.mark.parametrize("kind", KINDS)


def quantised(kind: str, method: str) -> PreTrainedModel:
    if METHODS[method].missing:
        pytest.skip(f"{METHODS[method].missing} is not installed (make test-quantised)")
    return METHODS[method].make(build(kind))


def prompts() -> torch.Tensor:
    return torch.randint(8, 128, (2, 24), generator=torch.Generator().manual_seed(1))


def windows() -> list[torch.Tensor]:
    return [torch.randint(8, 128, (1, 128), generator=torch.Generator().manual_seed(seed)) for seed in range(12)]


@torch.no_grad()
def written(model: Any) -> torch.Tensor:
    ids = prompts()
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(prompts(), use_cache=False).logits


def fingerprint(model: Any) -> str:
    return model_fingerprint(model, find_sites(model))


@every_kind
@every_method
def test_the_fingerprint_is_the_same_before_and_after_a_model_runs_and_when_it_is_loaded_again(
    kind: str, method: str
) -> None:
    model = quantised(kind, method)
    before = fingerprint(model)
    written(model)
    assert fingerprint(model) == before
    assert fingerprint(quantised(kind, method)) == before


@every_kind
@every_method
def test_taking_a_fingerprint_changes_nothing(kind: str, method: str) -> None:
    model = quantised(kind, method)
    expected = logits(model)
    fingerprint(model)
    assert torch.equal(logits(model), expected)


@every_method
def test_full_rank_on_codes_writes_the_tokens_of_the_same_model_unpatched(method: str) -> None:
    model, is_matrix = quantised("MLA", method), METHODS[method].is_matrix
    if method == "bitsandbytes-8bit":
        pytest.skip("Linear8bitLt does not take what expand_kv gives kv_b_proj, which is left as it is")
    expected = written(model)
    absorbed = KVSpliceConfig(compression_ratio=1.0, init="identity", attention="absorbed")
    if not is_matrix:
        with pytest.raises(FoldingError, match="its activations are quantised as well"):
            patch_model_with_kvsplice(model, absorbed)
        absorbed = KVSpliceConfig(compression_ratio=1.0, init="identity")
    patch_model_with_kvsplice(model, absorbed)
    assert torch.equal(written(model), expected)
    assert (explain(model).layers[0].decode == EXPANDED) != is_matrix
    assert (materialised_nbytes(model) > 0) == (is_matrix and METHODS[method].stays_packed)
    assert torch.equal(written(unpatch_model(model)), expected)


@every_method
def test_16_bits_keep_ordinary_attention_within_their_rounding(method: str) -> None:
    model = quantised("ordinary", method)
    expected = logits(model)
    calibrator = KVSpliceCalibrator(model).collect(windows(), progress=False)
    patch_model_with_kvsplice(model, KVSpliceConfig(bits=16), calibration=calibrator)
    # Quantised activations turn the smallest difference into a whole level.
    allowed = 0.02 if METHODS[method].is_matrix else 0.1
    assert (logits(model) - expected).norm() < allowed * expected.norm()


@every_kind
@every_method
def test_a_model_that_has_run_is_calibrated_with_gradients_patched_saved_loaded_and_undone(
    kind: str, method: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = quantised(kind, method)
    stock = logits(model)
    calibrator = KVSpliceCalibrator(model).collect(windows(), progress=False)
    assert calibrator.metric == "fisher"
    assert all(layer.fisher.any() for layer in calibrator.statistics.values())
    patch_model_with_kvsplice(model, KVSpliceConfig(bytes_per_token=BYTES[kind]), calibration=calibrator)
    expected = written(model)
    save_kvsplice(model, tmp_path / "splice")
    caplog.clear()
    other = load_kvsplice(quantised(kind, method), tmp_path / "splice")
    assert "other weights" not in caplog.text
    assert torch.equal(written(other), expected)
    assert torch.equal(logits(unpatch_model(model)), stock)


@every_kind
@every_method
def test_a_model_that_has_not_run_is_patched_from_its_weights_or_a_text(kind: str, method: str) -> None:
    """Some libraries put work off to the first forward."""
    model = quantised(kind, method)
    patch_model_with_kvsplice(model, KVSpliceConfig(bytes_per_token=BYTES[kind]), calibration=torch.cat(windows()))
    assert written(model).shape == (2, 24 + NEW_TOKENS)
    if kind == "MLA":
        patch_model_with_kvsplice(quantised(kind, method), KVSpliceConfig(compression_ratio=0.5))
