"""Rows that are dropped, packed rows, and both, of one model on the same windows and prompts.

A prompt of P tokens runs in one call and sees all of itself. The tokens behind it run in calls of a few tokens each, on
the rows that are left, and are scored beside the full model. Passkeys are asked for in prompts of their own.

Legend: `P` tokens of a prompt, `C` tokens after it, `S` tokens in a cache.
"""

import contextlib
import copy
import functools
import statistics
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from rich.table import Table
from tqdm import tqdm
from transformers import PreTrainedModel

from kvsplice_hf import KVSpliceCalibrator, KVSpliceConfig, cache_nbytes, patch_model_with_kvsplice
from kvsplice_hf.bench import pruned_values
from kvsplice_hf.bench.comparison import Row, loss_text
from kvsplice_hf.bench.pruned_values import Scores, continued, prefilled
from kvsplice_hf.bench.rounds import interleaved, timed
from kvsplice_hf.bench.tables import NOT_MEASURED, number
from kvsplice_hf.bench.texts import spread_windows
from kvsplice_hf.evaluation.retrieval import NEEDLE, QUESTION, Prompt, PromptMaker, score
from kvsplice_hf.retention import Retention
from kvsplice_hf.text import load_texts
from kvsplice_hf.upstream import cache_argument


FULL = "full"
# Steps of one turn of a recipe, the first of which does not count.
_STEPS = 4


class Settings(Protocol):
    """What a trial is told; `scripts/measure/retention.py` says what each means."""

    prompt: int
    continuation: int
    chunk: int
    shares: list[float]
    policies: list[str]
    first: int
    recent: int
    interval: int
    packed_bytes: list[float]
    codec: str
    evaluation: list[str]
    windows: int
    retrieval_chunk: int
    depths: list[float]
    samples: int


class Arm(NamedTuple):
    """A row of the table.

    Attributes:
        name: in tables.
        share: of the tokens of a prompt that stay, or None: all.
        policy: of retention.
        packed: bytes of packed rows, or None: rows as they are.
    """

    name: str
    share: float | None = None
    policy: str = "window"
    packed: float | None = None


class RetentionTrial:
    """One model, its texts and its arms.

    Args:
        model: unpatched.
        tokenizer: of the model.
        args: see `Settings`.
        calibrator: for packed rows; None: without them.

    Raises:
        ConfigError: a text that is not there.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, args: Settings, calibrator: KVSpliceCalibrator | None
    ) -> None:
        self.model, self.tokenizer, self.args, self.calibrator = model, tokenizer, args, calibrator
        self.protocol = pruned_values.Protocol(args.prompt, args.continuation, args.chunk)
        window = args.prompt + args.continuation
        self.windows = {
            text: spread_windows(tokenizer, text, "evaluation", window, args.windows * window)
            for text in args.evaluation
        }
        self._packed: dict[float, PreTrainedModel] = {}

    def arms(self) -> list[Arm]:
        """All but packed rows of the bytes of dropped ones, which have to be known first."""
        packed: list[float | None] = [None, *(self.args.packed_bytes if self.calibrator is not None else [])]
        found = []
        for size in packed:
            rows = "rows" if size is None else f"packed rows of {size:.0f} bytes"
            if size is not None:
                found.append(Arm(f"all {rows}", packed=size))
            for share in self.args.shares:
                for policy in self.args.policies:
                    found.append(Arm(f"{share:.0%} of {rows}, {policy}", share, policy, size))
        return found

    def arms_of_same_bytes(self, rows: list[Row]) -> list[Arm]:
        """Packed rows of all tokens that take no more bytes than each arm that drops rows as they are."""
        if self.calibrator is None:
            return []
        sizes = sorted({round(row["bytes"]) for row in rows if row["dropped"] and not row["packed"]}, reverse=True)
        return [Arm(f"all packed rows, {size} bytes", packed=float(size)) for size in sizes]

    def retention(self, arm: Arm, tokens: int) -> Retention | None:
        """What an arm does with prompts of so many tokens."""
        if arm.share is None:
            return None
        args = self.args
        settings: dict[str, Any] = {"first": args.first, "interval": args.interval, "policy": arm.policy}
        if arm.policy == "attention":
            settings["recent"] = args.recent
        return Retention(keep=max(round(arm.share * tokens), args.first + args.recent), **settings)

    @contextlib.contextmanager
    def inside(self, arm: Arm, tokens: int) -> Iterator[Any]:
        """The model as the arm has it, for prompts of so many tokens."""
        model = self.model if arm.packed is None else self._packed_model(arm.packed)
        retention = self.retention(arm, tokens)
        with contextlib.nullcontext() if retention is None else retention(model):
            yield model

    def _packed_model(self, size: float) -> Any:
        """Another model on the same weights, patched."""
        if size not in self._packed:
            model: Any = copy.deepcopy(self.model, {id(weight): weight for weight in self.model.parameters()})
            config = KVSpliceConfig(bytes_per_token=size, codec=self.args.codec)
            self._packed[size] = patch_model_with_kvsplice(model, config, calibration=self.calibrator)
        return self._packed[size]

    @torch.no_grad()
    def rows(self, arms: list[Arm]) -> list[Row]:
        """A row of each arm with the bytes of its cache behind a prompt, per token and layer."""
        window = next(iter(self.windows.values()))[0]
        found = []
        for arm in tqdm(arms, desc="bytes", file=sys.stderr):
            with self.inside(arm, self.args.prompt) as model:
                cache = prefilled(model, window, self.protocol)
            nbytes = cache_nbytes(cache) / (self.args.prompt * len(cache.layers))
            dropped = arm.share is not None
            found.append({"name": arm.name, "bytes": nbytes, "dropped": dropped, "packed": arm.packed is not None})
        return found

    @torch.no_grad()
    def losses(self, arms: list[Arm]) -> dict[str, dict[str, Row]]:
        """Scores of each arm on each text, by its name."""
        found: dict[str, dict[str, Row]] = {arm.name: {} for arm in arms}
        for text, windows in self.windows.items():
            scores = {arm.name: Scores() for arm in arms}
            for window in tqdm(windows, desc=text, file=sys.stderr):
                cache = prefilled(self.model, window, self.protocol)
                full = continued(self.model, window, cache, self.protocol)
                for arm in arms:
                    with self.inside(arm, self.args.prompt) as model:
                        cache = prefilled(model, window, self.protocol)
                        log_probabilities = continued(model, window, cache, self.protocol)
                    scores[arm.name].add(log_probabilities, full, window[self.args.prompt + 1 :])
            for arm in arms:
                found[arm.name][text] = scores[arm.name].row()
        return found

    def prompts(self) -> list[Prompt]:
        """Prompts of P tokens that ask for a passkey."""
        texts = load_texts(self.args.evaluation[0], "evaluation")
        maker = PromptMaker(self.tokenizer, texts, NEEDLE, QUESTION)
        cells = [(depth, number) for depth in self.args.depths for number in range(self.args.samples)]
        return [maker.make(self.args.prompt, depth, number) for depth, number in cells]

    def retrieval(self, arms: list[Arm]) -> dict[str, dict[str, float]]:
        """Share of passkeys that each arm finds, by its name, and mean log-probability of their tokens."""
        prompts, found = self.prompts(), {}
        for arm in tqdm(arms, desc="passkeys", file=sys.stderr):
            with self.inside(arm, self.args.prompt) as model:
                verdicts = [score(model, prompt, self.args.retrieval_chunk) for prompt in prompts]
            found[arm.name] = {
                "found": statistics.fmean(verdict.correct for verdict in verdicts),
                "logprob": statistics.fmean(verdict.logprob for verdict in verdicts),
            }
        return found

    @torch.no_grad()
    def step_times(self, arms: list[Arm], rounds: int) -> dict[str, float]:
        """Median seconds of a step of one token behind a prompt, each arm in turn in every round."""
        window = next(iter(self.windows.values()))[0]
        caches: dict[str, Any] = {}
        seconds: dict[str, list[float]] = {arm.name: [] for arm in arms}
        for arm in tqdm(arms, desc="prompts", file=sys.stderr):
            with self.inside(arm, self.args.prompt) as model:
                caches[arm.name] = prefilled(model, window, self.protocol)
        by_name = {arm.name: arm for arm in arms}
        for turn in interleaved(list(by_name), rounds):
            with self.inside(by_name[turn.name], self.args.prompt) as model:
                cache = cache_argument(caches[turn.name])
                step = functools.partial(model, window[None, -1:].to(model.device), use_cache=True, **cache)
                taken = [timed(step, model.device) for _ in range(_STEPS)]
            if turn.counts:
                seconds[turn.name] += taken[1:]
        return {name: statistics.median(found) for name, found in seconds.items()}


def table_of(rows: list[Row], texts: list[str]) -> Table:
    """Rows as they come."""
    names = ("", "bytes", "keys found", "step", *(f"{text}: loss" for text in texts))
    table = Table(*names, *(f"{text}: KL" for text in texts))
    for row in rows:
        scores = [row.get("texts", {}).get(text) for text in texts]
        losses = [NOT_MEASURED if each is None else loss_text(each) for each in scores]
        divergences = [NOT_MEASURED if each is None else number(each["kl_nats"], ".4f") for each in scores]
        found = number((row.get("retrieval") or {}).get("found"), ".0%")
        step = row.get("step_s")
        table.add_row(row["name"], number(row["bytes"], ".1f"), found, _ms(step), *losses, *divergences)
    return table


def _ms(seconds: float | None) -> str:
    return NOT_MEASURED if seconds is None else number(1000 * seconds, ".1f")
