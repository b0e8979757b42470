"""Passkey retrieval: prompts are what they are said to be, verdicts are right, and the script runs."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from byte_tokenizer import byte_tokenizer, trained_model
from programs import load_program, run_program
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import DeepseekV3ForCausalLM, PreTrainedTokenizerFast

from kvsplice_hf import patch_model_with_kvsplice, unpatch_model
from kvsplice_hf.bench.paired import mcnemar_p, paired_interval
from kvsplice_hf.errors import ConfigError
from kvsplice_hf.evaluation import retrieval
from kvsplice_hf.text import load_texts
from kvsplice_hf.upstream import CACHE_NAME, cache_argument


program: Any = load_program("measure/retrieval.py")
LENGTH = 200  # bytes; needle and question take 112 of them


def make_maker(seed: int = 0, **texts: str) -> Any:
    settings = {"needle": retrieval.NEEDLE, "question": retrieval.QUESTION} | texts
    return retrieval.PromptMaker(byte_tokenizer(), load_texts("pydoc"), **settings, seed=seed)


@pytest.fixture(scope="module")
def maker() -> Any:
    return make_maker()


def text_of(prompt: Any) -> str:
    return byte_tokenizer().decode(prompt.ids)


@pytest.mark.parametrize("length", [150, 200, 333])
@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_a_prompt_has_the_wanted_length_and_its_key_at_the_wanted_depth(maker: Any, length: int, depth: float) -> None:
    prompt = maker.make(length, depth, 0)
    assert prompt.ids.shape == (length,)
    assert prompt.length == length
    ahead, needle, rest = re.split(r"\n\n(The pass key is \d{5}\. Remember it\..*?)\n\n", text_of(prompt), maxsplit=1)
    assert needle == retrieval.NEEDLE.format(key=prompt.key)
    behind = rest.removesuffix("\n\n" + retrieval.QUESTION.format(key=prompt.key))
    assert behind != rest, "the prompt has to end in the question and the key"
    assert prompt.needle_start == len(ahead)
    assert len(ahead) == round(depth * (len(ahead) + len(behind)))
    assert ahead + behind in byte_tokenizer().decode(maker.filler)
    assert text_of(prompt)[-prompt.answer :] == prompt.key


def test_a_seed_fixes_the_prompts_and_every_prompt_is_another_one(maker: Any) -> None:
    cells = [(length, depth, number) for length in (180, 200) for depth in (0.2, 0.8) for number in range(3)]
    first = [maker.make(*cell) for cell in cells]
    again = [make_maker().make(*cell) for cell in reversed(cells)][::-1]
    assert all(torch.equal(a.ids, b.ids) and a.key == b.key for a, b in zip(first, again, strict=True))
    assert len({prompt.key for prompt in first}) == len(cells)
    assert make_maker(seed=1).make(*cells[0]).key != first[0].key


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words with the space ahead of them, as GPT-2's, so that the answer's space is not the question's; with BOS."""
    words = ["<s>", "<unk>", "Ġis", "is", *(f"Ġ{digit}" for digit in range(10)), "Ġ", *map(str, range(10))]
    vocabulary = {word: index for index, word in enumerate(words)}
    merges = [("Ġ", str(digit)) for digit in range(10)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def test_a_tokenizer_with_bos_and_with_the_space_in_the_answer() -> None:
    tokenizer = word_tokenizer()
    maker = retrieval.PromptMaker(tokenizer, ["7 " * 100], "{key}", " {key}")
    prompt = maker.make(60, 0.5, 0)
    assert prompt.ids.shape == (60,)
    assert (prompt.ids == tokenizer.bos_token_id).nonzero().flatten().tolist() == [0]
    needle = tokenizer(f"\n\n{prompt.key}\n\n", add_special_tokens=False).input_ids
    assert prompt.ids[prompt.needle_start :][: len(needle)].tolist() == needle
    answer = tokenizer.convert_ids_to_tokens(prompt.ids[-prompt.answer :])
    assert answer == [f"Ġ{prompt.key[0]}", *prompt.key[1:]]


class CopyingModel(nn.Module):
    """Continues with what followed the longest earlier match of the text's end. Its cache is all ids so far."""

    device = torch.device("cpu")

    def forward(
        self, ids: torch.Tensor, use_cache: bool, logits_to_keep: int = 0, **cache: list[int] | None
    ) -> SimpleNamespace:
        past = cache[CACHE_NAME] or []
        seen = past + ids[0].tolist()
        rows = [self.next_token(seen[: end + 1]) for end in range(len(past), len(seen))][-logits_to_keep:]
        logits = 10.0 * nn.functional.one_hot(torch.tensor([rows]), 256)
        return SimpleNamespace(logits=logits, **cache_argument(seen))

    def next_token(self, seen: list[int]) -> int:
        def matching(end: int) -> int:
            return next((n for n in range(end + 1) if seen[end - n] != seen[-1 - n]), end + 1)

        best = max(range(len(seen) - 1), key=matching, default=-1)
        return seen[best + 1]


@pytest.mark.parametrize("chunk", [7, 128, 1000])
def test_a_model_that_copies_finds_every_key_whatever_the_chunks(maker: Any, chunk: int) -> None:
    for depth in (0.0, 0.5, 1.0):
        verdict = retrieval.score(CopyingModel(), maker.make(LENGTH, depth, 0), chunk)
        assert verdict.correct
        assert (
            verdict.logprob > -0.02
        )  # the logit of each token is 10 against 255 of zero: log(1 + 255 / e^10) = 0.0115


def test_a_model_that_copies_misses_a_key_that_is_not_in_the_prompt(maker: Any) -> None:
    prompt = maker.make(LENGTH, 0.5, 0)
    ids = prompt.ids.clone()
    ids[-1] = byte_tokenizer()("x").input_ids[0]
    verdict = retrieval.score(CopyingModel(), replace(prompt, ids=ids), 128)
    assert not verdict.correct
    assert verdict.logprob == pytest.approx(-10 / 5, abs=0.02), "one of five tokens has a logit of 0 instead of 10"


def test_a_random_model_finds_no_key(maker: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DeepseekV3ForCausalLM(trained_model().config).eval()
    patch_model_with_kvsplice(model, compression_ratio=0.5)
    trials = retrieval.compare(model, [maker.make(LENGTH, 0.5, number) for number in range(8)], chunk=128)
    summary = program.summarise(trials)
    assert summary["samples"] == 8
    assert summary["original_accuracy"] == summary["spliced_accuracy"] == 0
    assert summary["difference_points"] == 0
    # Five tokens out of 256, by a model that knows nothing.
    assert summary["original_logprob"] == pytest.approx(-5.55, abs=0.3)


@pytest.mark.parametrize("spliced", [False, True])
def test_the_teacher_forced_verdict_is_that_of_generate(maker: Any, spliced: bool) -> None:
    """On keys that the model gets right (its own continuation), and on the same with one token wrong."""
    model = trained_model()
    if spliced:
        patch_model_with_kvsplice(model, compression_ratio=0.5)
    try:
        for number in range(3):
            prompt = maker.make(LENGTH, 0.3, number)
            asked = prompt.ids[None, : -prompt.answer]
            own = model.generate(asked, max_new_tokens=prompt.answer, do_sample=False)[0]
            wrong = [own.clone() for _ in range(prompt.answer)]
            for place, ids in enumerate(wrong):
                ids[-1 - place] = (ids[-1 - place] + 1) % 256
            for ids, right in [(own, True), *((ids, False) for ids in wrong)]:
                verdict = retrieval.judge(model, replace(prompt, ids=ids), chunk=64, generate=True)
                assert verdict.teacher_forced == verdict.generated == verdict.correct == right
    finally:
        if spliced:
            unpatch_model(model)


def test_the_log_probability_is_that_of_one_forward_without_a_cache(maker: Any) -> None:
    prompt = maker.make(LENGTH, 0.5, 0)
    with torch.no_grad():
        logprobs = trained_model()(prompt.ids[None], use_cache=False).logits[0].log_softmax(-1)
    expected = [logprobs[place - 1, prompt.ids[place]].item() for place in range(LENGTH - 5, LENGTH)]
    assert prompt.answer == 5
    assert retrieval.score(trained_model(), prompt, 48).logprob == pytest.approx(sum(expected) / 5, abs=1e-4)


@pytest.mark.parametrize(
    ("lost", "won", "count", "low", "high"),
    [(0, 0, 4, -0.462, 0.462), (10, 2, 40, -0.356, -0.025), (20, 0, 20, -1.0, -0.735), (0, 20, 20, 0.735, 1.0)],
)
def test_the_interval_holds_the_difference_and_has_a_width(
    lost: int, won: int, count: int, low: float, high: float
) -> None:
    interval = paired_interval(lost, won, count)
    assert interval == pytest.approx((low, high), abs=1e-3)
    assert interval[0] <= (won - lost) / count <= interval[1]


def test_mcnemars_p_counts_disagreements_only() -> None:
    assert mcnemar_p(0, 0) == 1
    assert mcnemar_p(3, 3) == 1
    assert mcnemar_p(5, 0) == mcnemar_p(0, 5) == 2 / 32
    assert mcnemar_p(1, 4) == 2 * (1 + 5) / 32


def test_a_loss_has_a_minus_sign(maker: Any) -> None:
    right, wrong = retrieval.Verdict(True, -0.1), retrieval.Verdict(False, -3.0)
    prompts = [maker.make(length, 0.5, 0) for length in (LENGTH, LENGTH, LENGTH, LENGTH + 1)]
    pairs = [(right, wrong), (right, right), (wrong, wrong), (wrong, right)]
    report = program.report_of([retrieval.Trial(p, *pair) for p, pair in zip(prompts, pairs, strict=True)])
    short, long = report["by_length"]
    assert (short["length"], short["samples"], long["length"], long["samples"]) == (LENGTH, 3, LENGTH + 1, 1)
    assert short["difference_points"] == pytest.approx(-100 / 3)
    assert (short["original_accuracy"], short["spliced_accuracy"]) == pytest.approx((2 / 3, 1 / 3))
    assert long["difference_points"] == 100
    assert report["overall"]["difference_points"] == 0
    assert (report["overall"]["lost"], report["overall"]["won"]) == (1, 1)
    assert report["scoring"] == "teacher_forced"
    columns = [column.header for column in program.table_of(report).columns]
    assert {"original", "spliced", "McNemar p"} <= set(columns)


@pytest.mark.parametrize(
    ("texts", "name"),
    [
        ({"needle": "Nothing."}, "needle"),
        ({"question": "What?"}, "question"),
        ({"question": "Is it {key}? It is {key}"}, "question"),
        ({"question": "{key} it is"}, "question"),
    ],
)
def test_a_template_without_its_key_is_named(texts: dict[str, str], name: str) -> None:
    with pytest.raises(ConfigError, match=f"`{name}`"):
        make_maker(**texts)


def test_too_short_a_length_says_what_it_takes(maker: Any) -> None:
    with pytest.raises(ConfigError, match=r"`lengths` has 60; needle and question alone take (\d+) tokens") as caught:
        maker.make(60, 0.5, 0)
    least = int(re.findall(r"\d+", str(caught.value))[-1])
    assert maker.make(least + 1, 0.5, 0).length == least + 1
    with pytest.raises(ConfigError):
        maker.make(least, 0.5, 0)


def test_the_script_reports_every_cell(model_folder: str, tmp_path: Path) -> None:
    cells = ["--lengths", "160,130", "--depths", "0.2,0.8", "--samples", "1", "--chunk", "64", "--generate"]
    settings = ["--model", model_folder, "--calibration-tokens", "1024", "--output", str(tmp_path)]
    report = run_program("measure/retrieval.py", *cells, *settings)
    assert [(row["length"], row["depth"]) for row in report["results"]] == [
        (130, 0.2),
        (130, 0.8),
        (160, 0.2),
        (160, 0.8),
    ]
    assert [row["samples"] for row in report["by_length"] + report["by_depth"]] == [2, 2, 2, 2]
    assert report["overall"]["samples"] == 4
    assert report["scoring"] == "generate"
    assert (report["verdicts"], report["verdicts_that_differ"]) == (8, 0)
    assert report["overall"]["original_logprob"] != report["overall"]["spliced_logprob"]
    assert 0 < report["bytes_ratio"] < 1
    assert (Path(report["folder"]) / "accuracy.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lengths", "130,513"], ["513", "max_position_embeddings", "512"]),
        (["--lengths", "many"], ["lengths", "many"]),
        (["--depths", "1.5"], ["depths", "1.5"]),
        (["--samples", "0"], ["samples", "0"]),
        (["--compression-ratio", "3"], ["compression_ratio", "3"]),
        (["--dataset", "SHORT", "--lengths", "500"], ["lengths", "500", "more text"]),
    ],
)
def test_a_setting_that_cannot_work_is_named_without_a_traceback(
    arguments: list[str], words: list[str], model_folder: str, tmp_path: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("One line.\n\nAnother line.")
    arguments = [str(short) if argument == "SHORT" else argument for argument in arguments]
    smallest = ["--lengths", "130", "--depths", "0.5", "--samples", "1", "--output", str(tmp_path / "results")]
    with pytest.raises(SystemExit) as caught:
        run_program("measure/retrieval.py", "--model", model_folder, *smallest, *arguments)
    message = caught.value.code
    assert all(word in message for word in ["ConfigError", *words]), message
    assert not (tmp_path / "results").exists()
