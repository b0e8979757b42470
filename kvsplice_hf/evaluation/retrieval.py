"""Passkey retrieval: does a model still find a number that was said once, far back in the context?

A prompt is prose with one sentence that names a random five-digit key at a given depth, and ends in a question for
that key. Both models read the same prompts through the cache and in chunks, so that the key has to come out of the
(spliced) cache.

The key need not be generated. Appended to the prompt, it counts as the answer if every token of it is the most likely
one given the prompt and the tokens of the key before it. That is exact match of greedy decoding, at the price of one
prefill. Greedy decoding emits the most likely token and goes on from there: as long as it has been right, its prefix is
the true prefix, and both look at the same distribution. At the first token where the key is not the most likely one,
greedy decoding emits another token, and its answer is wrong whatever follows. (The two sum in another order, so a tie
within rounding can fall either way.)
"""

import itertools
import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kvsplice_hf.errors import ConfigError
from kvsplice_hf.patch.state import splice_disabled
from kvsplice_hf.upstream import cache_argument, cache_of


KEY = "{key}"
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is {key}"


@dataclass(frozen=True)
class Prompt:
    """One question with its answer.

    Attributes:
        ids: token ids, int64 [length]: prose, needle, prose, question, and the key as the last `answer` tokens.
        answer: tokens of the key.
        needle_start: index of the needle's first token.
        key: the five digits.
        depth: share of the prose ahead of the needle, as asked for.
    """

    ids: torch.Tensor
    answer: int
    needle_start: int
    key: str
    depth: float

    @property
    def length(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Verdict:
    """How one model did on one prompt.

    Attributes:
        teacher_forced: every token of the key was the most likely one.
        logprob: mean log-probability of the key's tokens, nats.
        generated: `model.generate` answered with the key's tokens; None if it was not asked.
    """

    teacher_forced: bool
    logprob: float
    generated: bool | None = None

    @property
    def correct(self) -> bool:
        return self.teacher_forced if self.generated is None else self.generated


@dataclass(frozen=True)
class Trial:
    """One prompt and the verdicts on both models."""

    prompt: Prompt
    original: Verdict
    spliced: Verdict


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def _first_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer puts ahead of any text: its begin-of-text token, or nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a").input_ids[:1] == [bos] else []


def _question_tokens(tokenizer: Any, question: str, key: str) -> tuple[list[int], int]:
    """The question with its answer, and how many of the tokens are the answer.

    Question and key are tokenized together, because the space between them may belong to either side.
    """
    whole = _tokens(tokenizer, "\n\n" + question.replace(KEY, key))
    asked = _tokens(tokenizer, "\n\n" + question.removesuffix(KEY))
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(asked, whole, strict=False))
    return whole, len(whole) - len(list(same))


class PromptMaker:
    """Makes prompts of exact token lengths. The same seed, length, depth and number give the same prompt."""

    def __init__(self, tokenizer: Any, texts: list[str], needle: str, question: str, seed: int = 0) -> None:
        """
        Args:
            tokenizer: a tokenizer of transformers.
            texts: the prose, as documents.
            needle: the sentence to hide, with `{key}` at least once.
            question: the end of the prompt, with `{key}` once and last.
            seed: chooses keys and prose.

        Raises:
            ConfigError: `{key}` is not where it has to be.
        """
        if KEY not in needle:
            raise ConfigError(f"`needle` is {needle!r}; it must hold {KEY}.")
        if question.count(KEY) != 1 or not question.endswith(KEY):
            raise ConfigError(f"`question` is {question!r}; it must end in {KEY} and hold it once, as the answer.")
        self.tokenizer, self.needle, self.question, self.seed = tokenizer, needle, question, seed
        self.start = _first_tokens(tokenizer)
        self.filler = _tokens(tokenizer, "\n\n".join(texts))

    def make(self, length: int, depth: float, number: int) -> Prompt:
        """The prompt with that number, `length` tokens long with the key at its end.

        Raises:
            ConfigError: needle and question leave no room for prose, or there is less prose than that.
        """
        # Seeded by a string, which is hashed the same in every process; by the cell, so that no cell depends on which
        # others are measured.
        draw = random.Random(f"{self.seed}/{length}/{depth}/{number}")
        key = str(draw.randrange(10_000, 100_000))
        needle = _tokens(self.tokenizer, f"\n\n{self.needle.replace(KEY, key)}\n\n")
        question, answer = _question_tokens(self.tokenizer, self.question, key)
        count = length - len(self.start) - len(needle) - len(question)
        if count < 1:
            raise ConfigError(f"`lengths` has {length}; needle and question alone take {length - count} tokens.")
        if count > len(self.filler):
            raise ConfigError(
                f"`lengths` has {length}, which takes {count} tokens of prose; the texts have {len(self.filler)}. Give "
                "more text or shorter lengths."
            )
        first = draw.randrange(len(self.filler) - count + 1)
        prose = self.filler[first : first + count]
        ahead = round(depth * count)
        ids = self.start + prose[:ahead] + needle + prose[ahead:] + question
        return Prompt(torch.tensor(ids, dtype=torch.int64, device="cpu"), answer, len(self.start) + ahead, key, depth)


@torch.no_grad()
def score(model: Any, prompt: Prompt, chunk: int) -> Verdict:
    """Teacher-forced verdict: the prompt goes through the cache in chunks, then the key in one forward.

    Args:
        model: a causal language model.
        prompt: what to ask.
        chunk: tokens per forward of the prefill.
    """
    ids = prompt.ids[None].to(model.device)
    # The last token of the prompt predicts the first of the key, and the last token of the key predicts nothing that
    # is known.
    asked = prompt.length - prompt.answer - 1
    cache = None
    for part in ids[:, :asked].split(chunk, dim=1):
        cache = cache_of(model(part, **cache_argument(cache), use_cache=True, logits_to_keep=1))
    logits = model(ids[:, asked:-1], **cache_argument(cache), use_cache=True).logits[0].float()
    key = ids[0, asked + 1 :]
    logprobs = logits.log_softmax(-1).gather(-1, key[:, None])
    return Verdict(bool((logits.argmax(-1) == key).all()), logprobs.mean().item())


@torch.no_grad()
def generates_key(model: Any, prompt: Prompt, chunk: int) -> bool:
    """Whether the greedy continuation is the key, token by token.

    Args:
        model: a causal language model.
        prompt: what to ask.
        chunk: tokens per forward of the prefill.
    """
    ids = prompt.ids[None].to(model.device)
    asked = ids[:, : -prompt.answer]
    # Whatever the model's own generation settings ask for, this is plain greedy decoding.
    greedy = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "max_new_tokens": prompt.answer}
    output = model.generate(
        asked, attention_mask=torch.ones_like(asked), prefill_chunk_size=chunk, pad_token_id=0, **greedy
    )
    return torch.equal(output, ids)


def judge(model: Any, prompt: Prompt, chunk: int, generate: bool) -> Verdict:
    """The teacher-forced verdict, with that of `model.generate` beside it where `generate` is asked for."""
    verdict = score(model, prompt, chunk)
    if not generate:
        return verdict
    return Verdict(verdict.teacher_forced, verdict.logprob, generates_key(model, prompt, chunk))


def compare(model: nn.Module, prompts: Iterable[Prompt], chunk: int, generate: bool = False) -> list[Trial]:
    """Ask a patched model, and itself with the splice disabled, the same questions.

    Args:
        model: a patched causal language model.
        prompts: what to ask.
        chunk: tokens per forward of the prefill.
        generate: let `model.generate` answer as well.

    Raises:
        PatchStateError: the model is not patched.
    """
    trials = []
    for prompt in prompts:
        with splice_disabled(model):
            original = judge(model, prompt, chunk, generate)
        trials.append(Trial(prompt, original, judge(model, prompt, chunk, generate)))
    return trials
