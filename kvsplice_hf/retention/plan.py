"""What retention does with the layers of a model: how many rows stay, and which."""

from typing import Any, NamedTuple

from kvsplice_hf.retention.selection import Budget


# The `LayerPlan` of an attention module, while a model is in the context.
PLAN_ATTRIBUTE = "_kvsplice_retention"
POLICIES = ("window", "attention")


class LayerPlan(NamedTuple):
    """What is done with the rows of a layer.

    Attributes:
        policy: "window" or "attention".
        budget: how many rows stay.
        by: which scores decide where the policy is "attention".
        interval: rows that gather beyond the budget before any are dropped.
    """

    policy: str
    budget: Budget
    by: str
    interval: int

    @property
    def identity(self) -> str:
        """Of what has to be the same in all calls on one cache."""
        scores = f", {self.by} of scores" if self.scored else ""
        return f"policy {self.policy!r}, {self.budget.first} first{scores}"

    @property
    def scored(self) -> bool:
        return self.policy == "attention"

    @property
    def always(self) -> tuple[int, int]:
        """How many first and recent tokens stay whatever their scores."""
        return self.budget.first, self.budget.recent if self.scored else 0

    def limit(self, held: int, seen: int) -> int:
        """How many of the `held` rows of a sequence stay that has seen so many tokens."""
        limit = min(self.budget.of(seen), held)
        return limit if held >= limit + self.interval else held

    def __str__(self) -> str:
        kept = f"{self.budget.keep}" if self.budget.keep is not None else f"{self.budget.share:.0%}"
        which = "the last ones" if not self.scored else f"{self.budget.recent} recent, then those attended to most"
        return f"keeps {kept} tokens: {self.budget.first} first, {which}"


def plan_of(module: Any) -> LayerPlan | None:
    """What is done with the rows of an attention module, or None outside of the context."""
    plan: LayerPlan | None = vars(module).get(PLAN_ATTRIBUTE)
    return plan
