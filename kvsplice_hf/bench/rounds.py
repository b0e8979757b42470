"""Time of recipes side by side: in every round each of them has its turn, and ratios are taken within a round."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
from tqdm import tqdm


Name = TypeVar("Name")


class Turn(NamedTuple, Generic[Name]):
    """One turn of a recipe.

    Attributes:
        name: of the recipe.
        counts: whether what is measured is kept; the first round warms up.
    """

    name: Name
    counts: bool


def interleaved(names: Sequence[Name], rounds: int) -> Iterator[Turn[Name]]:
    """The turns of so many rounds that count, after one that does not.

    A slow moment of the machine hits all recipes alike, and each comes first, second and last in turn.
    """
    for number in tqdm(range(rounds + 1), desc="repeats", file=sys.stderr):
        first = number % max(len(names), 1)
        for name in (*names[first:], *names[:first]):
            yield Turn(name, counts=number > 0)


def synchronise(device: str | torch.device) -> None:
    """Wait for what a GPU has been told to do."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def timed(run: Callable[[], object], device: str | torch.device) -> float:
    """Seconds of one call."""
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start


def paired_ratios(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """Of two recipes, round by round: the speed of the machine drifts from one to the next."""
    return [a / b for a, b in zip(one, other, strict=True)]
