"""Scores of two models on the same documents of a task: shares of right answers, and the paired difference.

Documents differ in difficulty far more than two similar models do. So the error of a difference is that of the mean
of the differences per document, and not one of two independent shares.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from kvsplice_hf.bench.paired import mcnemar_p, paired_interval


ALL = "all"


@dataclass(frozen=True)
class Scores:
    """Of one model on the documents of a task, in the order of the documents.

    Attributes:
        right: 1 for a document that was answered rightly, 0 for others.
        nats: log-likelihood of the right answer; empty where answers are generated.
    """

    right: list[float]
    nats: list[float]


@dataclass(frozen=True)
class Mean:
    """A mean and its standard error, which a single value has none of."""

    mean: float
    stderr: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Mean":
        """Of some values, at least one."""
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        return cls(statistics.fmean(values), error)

    def text(self, scale: float = 1.0, sign: str = "", digits: int = 1) -> str:
        """As tables show it."""
        error = "" if self.stderr is None else f" ± {scale * self.stderr:.{digits}f}"
        return f"{scale * self.mean:{sign}.{digits}f}{error}"


def paired_difference(original: Sequence[float], patched: Sequence[float]) -> Mean:
    """Mean over documents of patched minus original.

    Args:
        original: a number per document.
        patched: of the same documents in the same order.
    """
    return Mean.of([new - old for old, new in zip(original, patched, strict=True)])


def summary_of(original: Scores, patched: Scores) -> dict[str, Any]:
    """What a report holds of a patched model on one task."""
    pairs = list(zip(original.right, patched.right, strict=True))
    lost, won = (sum(new < old for old, new in pairs), sum(new > old for old, new in pairs))
    found: dict[str, Any] = {"accuracy": vars(Mean.of(patched.right)), "lost": lost, "won": won}
    found["difference"] = vars(paired_difference(original.right, patched.right))
    found["interval"] = list(paired_interval(lost, won, len(pairs)))
    found["mcnemar_p"] = mcnemar_p(lost, won)
    if original.nats:
        found["nats_difference"] = vars(paired_difference(original.nats, patched.nats))
    return found


def with_all(scores: Mapping[str, Scores]) -> dict[str, Scores]:
    """The scores by task, and all documents of all tasks together as one more."""
    if len(scores) < 2:
        return dict(scores)
    together = Scores(
        [value for one in scores.values() for value in one.right],
        [value for one in scores.values() for value in one.nats],
    )
    return {**scores, ALL: together}


def report_of(original: Mapping[str, Scores], patched: Mapping[str, Mapping[str, Scores]]) -> list[dict[str, Any]]:
    """A row per task, and one of all tasks together.

    Args:
        original: scores of the unpatched model by task.
        patched: the same of each patched one, by a name for its budget.
    """
    totals = {name: with_all(scores) for name, scores in patched.items()}
    return [
        {
            "task": task,
            "documents": len(scores.right),
            "original": {"accuracy": vars(Mean.of(scores.right)), "nats": vars(Mean.of(scores.nats or [0.0]))}
            if scores.nats
            else {"accuracy": vars(Mean.of(scores.right))},
            "patched": {name: summary_of(scores, total[task]) for name, total in totals.items()},
        }
        for task, scores in with_all(original).items()
    ]


def is_noise(summary: Mapping[str, Any]) -> bool:
    """Whether a difference of shares is what chance alone does in one of twenty cases: its interval holds 0."""
    low, high = summary["interval"]
    return low <= 0 <= high


def table_of(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Shares in percent; of patched models the difference in points behind it, and that of the right answer in nats."""
    budgets = list(rows[0]["patched"]) if rows else []
    caption = (
        "Differences are patched minus original, per document, ± their standard error; * its 95 % interval excludes 0. "
        "In brackets: log-likelihood of the right answer, in nats."
    )
    table = Table("task", "documents", "original", *budgets, caption=caption, caption_justify="left")
    for row in rows:
        cells = [_cell(row["patched"][name]) for name in budgets]
        original = Mean(**row["original"]["accuracy"]).text(100)
        table.add_row(row["task"], f"{row['documents']}", original, *cells, end_section=row["task"] != ALL)
    return table


def _cell(summary: Mapping[str, Any]) -> str:
    mark = "" if is_noise(summary) else " *"
    text = f"{100 * summary['accuracy']['mean']:.1f}: {Mean(**summary['difference']).text(100, '+')}{mark}"
    nats = summary.get("nats_difference")
    return text if nats is None else f"{text}\n({Mean(**nats).text(1, '+', 4)})"
