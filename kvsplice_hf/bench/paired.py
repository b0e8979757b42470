"""Two models on the same questions: the difference of their shares of right answers, and whether it is chance."""

import math
import statistics

from scipy.stats import binomtest


def paired_interval(lost: int, won: int, count: int) -> tuple[float, float]:
    """95 % interval of the difference of two paired shares, (won - lost) / count.

    The adjusted Wald interval of Bonett and Price (2012): one imagined pair is added to each of the two kinds of
    disagreement. Unlike the plain one it keeps a width where the models never disagree, as two similar models do over
    few samples.

    Args:
        lost: prompts that only the original answers.
        won: prompts that only the spliced model answers.
        count: prompts.
    """
    lost_share, won_share = (lost + 1) / (count + 2), (won + 1) / (count + 2)
    centre = won_share - lost_share
    error = math.sqrt((lost_share + won_share - centre**2) / (count + 2))
    half = statistics.NormalDist().inv_cdf(0.975) * error
    return max(centre - half, -1.0), min(centre + half, 1.0)


def mcnemar_p(lost: int, won: int) -> float:
    """Exact two-sided p-value of McNemar's test: were disagreements to fall either way by a fair coin."""
    return binomtest(lost, lost + won).pvalue if lost + won else 1.0
