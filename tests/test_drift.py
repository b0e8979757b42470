"""Divergence step by step in a long generation: it is that of the cache, and the script reports every block."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import byte_tokenizer, trained_model
from programs import run_program

from kvsplice_hf import KVSpliceConfig, PatchStateError, patch_model_with_kvsplice
from kvsplice_hf.evaluation.drift import measure_drift


STEPS = 12


def prompts() -> torch.Tensor:
    texts = ["The value of an object", "An expression statement"]
    return torch.tensor([byte_tokenizer()(text)["input_ids"][:20] for text in texts])


def test_with_all_of_the_rank_nothing_drifts_and_the_tokens_are_those_of_generate() -> None:
    model = copy.deepcopy(trained_model())
    greedy = {"do_sample": False, "min_new_tokens": STEPS, "max_new_tokens": STEPS, "pad_token_id": 0}
    expected = model.generate(prompts(), attention_mask=torch.ones_like(prompts()), **greedy)[:, prompts().shape[1] :]
    patch_model_with_kvsplice(model, compression_ratio=1.0)
    drift = measure_drift(model, prompts(), STEPS, progress=False)
    assert torch.equal(drift.tokens, expected)
    assert drift.divergence.shape == (2, STEPS)
    assert drift.divergence.abs().max() < 1e-5
    assert drift.agrees.all()


def test_a_small_rank_diverges_at_every_step_that_reads_its_codes() -> None:
    model = copy.deepcopy(trained_model())
    patch_model_with_kvsplice(model, KVSpliceConfig(compression_ratio=0.25, sink_tokens=0))
    drift = measure_drift(model, prompts(), STEPS, progress=False)
    assert (drift.divergence > 1e-4).all()
    again = measure_drift(model, prompts(), STEPS, progress=False)
    assert torch.equal(drift.divergence, again.divergence), "something of a call was kept"


def test_a_model_that_is_not_patched_is_refused() -> None:
    with pytest.raises(PatchStateError):
        measure_drift(copy.deepcopy(trained_model()), prompts(), STEPS, progress=False)


def test_the_script_reports_every_block_of_steps(model_folder: str, tmp_path: Path) -> None:
    settings: list[Any] = ["--model", model_folder, "--calibration_tokens", "1024", "--output", str(tmp_path)]
    report = run_program("measure/drift.py", *settings, "--prompts", "2", "--steps", "10", "--block", "4")
    spans = [(row["first_step"], row["last_step"]) for row in report["results"]]
    assert spans == [(1, 4), (5, 8), (9, 10)]
    assert report["prompts"] == 2
    assert all(row["kl_nats"] > 0 and row["kl_stderr"] >= 0 for row in report["results"])
    assert (Path(report["folder"]) / "divergence.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "0"], ["--steps", "0"]),
        (["--prompt_tokens", "1"], ["--prompt_tokens", "two"]),
        (["--steps", "500"], ["564", "512", "positions"]),
    ],
)
def test_a_setting_that_cannot_work_is_named(
    arguments: list[str], words: list[str], model_folder: str, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as caught:
        run_program("measure/drift.py", "--model", model_folder, "--output", str(tmp_path / "results"), *arguments)
    message = caught.value.code
    assert all(word in message for word in ["ConfigError", *words]), message
    assert not (tmp_path / "results").exists()
