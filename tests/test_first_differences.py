"""Where two ways of computing write other tokens: the logits between which they chose, and a dry run of the script."""

from pathlib import Path

import pytest
import torch
from byte_tokenizer import byte_tokenizer, trained_model
from programs import load_program, run_program
from tiny_models import FIRST_ORDINARY_TOKEN, build

from kvsplice_hf import KVSpliceConfig, patch_model_with_kvsplice, save_kvsplice
from kvsplice_hf.bench.first_differences import Written, agreement, distance, first_differences, write


def test_what_is_written_is_what_generate_writes_and_is_the_largest_of_its_logits() -> None:
    model = build("deepseek_v3")
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(FIRST_ORDINARY_TOKEN, model.config.vocab_size, (2, 7), generator=generator)
    found = write(model, prompts, 5)
    settings = {"attention_mask": torch.ones_like(prompts), "do_sample": False, "pad_token_id": 0}
    expected = model.generate(prompts, max_new_tokens=5, min_new_tokens=5, **settings)
    assert torch.equal(found.tokens, expected[:, 7:])
    assert torch.equal(found.logits.argmax(-1), found.tokens)


def as_written(logits: list[list[list[float]]]) -> Written:
    numbers = torch.tensor(logits)
    return Written(numbers.argmax(-1), numbers)


def test_the_first_other_token_of_each_sequence_is_named_with_its_logits() -> None:
    one = as_written([[[9.0, 1.0], [6.0, 5.9]], [[8.0, 0.0], [0.0, 8.0]]])
    other = as_written([[[9.0, 1.0], [6.0, 6.2]], [[8.0, 0.0], [0.0, 8.0]]])
    assert agreement(one, other) == "3 of 4"
    (found,) = first_differences(one, other, torch.bfloat16)
    assert (found["sequence"], found["token"]) == (0, 1)
    assert found["step"] == 4 * 2.0**-7  # numbers from 4 to 8
    assert found["gap"] == pytest.approx(0.1, abs=1e-6)
    assert found["moved"] == pytest.approx(0.3, abs=1e-6)
    assert found["apart"] == pytest.approx(0.3 / 2**0.5, abs=1e-6)
    assert first_differences(one, one, torch.bfloat16) == []


def test_logits_are_compared_as_long_as_the_same_was_written() -> None:
    one = as_written([[[9.0, 1.0], [6.0, 5.0], [1.0, 7.0]]])
    other = as_written([[[9.0, 1.0], [6.0, 7.0], [90.0, 7.0]]])
    assert distance(one, other) == pytest.approx(1.0)  # of four numbers one has changed, by 2
    assert distance(one, one) == 0.0


def test_the_script_compares_full_rank_with_a_model_as_it_is(tmp_path: Path) -> None:
    trained_model().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    sizes = ["--prompts", "2", "--prompt_tokens", "16", "--new_tokens", "4", "--bytes_per_token", "0"]
    options = ["--models", str(tmp_path / "model"), "--methods", "none", "--dtype", "float32", *sizes]
    (row,) = run_program("measure/quantised.py", *options, "--output", str(tmp_path / "results"))["rows"]
    assert row["exact"] == row["other_order"]["tokens"] == "8 of 8"
    assert row["exact_apart"] < 1e-3
    assert row["first_differences"] == []


def test_a_saved_splice_is_loaded_instead_of_calibrated(tmp_path: Path) -> None:
    model = patch_model_with_kvsplice(build("deepseek_v3"), KVSpliceConfig(compression_ratio=0.5))
    save_kvsplice(model, tmp_path / "splice")
    program = load_program("measure/quantised.py")
    prompts = torch.randint(FIRST_ORDINARY_TOKEN, 128, (2, 7), generator=torch.Generator().manual_seed(0))
    stock = write(build("deepseek_v3"), prompts, 4)
    row = program.with_saved_splice(build("deepseek_v3"), stock, prompts, str(tmp_path / "splice"))
    assert row["undone"] == "8 of 8"
    assert row["packed"].endswith(" of 8")
    assert row["packed_decoded_by"]
