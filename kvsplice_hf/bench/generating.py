"""`generate` of a recipe, and when each of its tokens was there."""

import time
from typing import Any

import torch
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from kvsplice_hf.bench.recipes import Recipe, text_config
from kvsplice_hf.bench.rounds import synchronise
from kvsplice_hf.upstream import cache_argument


class TokenClock(StoppingCriteria):
    """Notes when each token is there, and stops nothing.

    Attributes:
        times: seconds, one per token.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        synchronise(self.device)
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def run_generate(
    model: PreTrainedModel,
    recipe: Recipe,
    prompt: torch.Tensor,
    mask: torch.Tensor,
    new_tokens: int,
    clock: TokenClock | None = None,
) -> None:
    """Greedy `generate` of exactly so many tokens.

    Args:
        model: patched by the recipe.
        recipe: makes the cache.
        prompt: token ids [B, T].
        mask: attention mask [B, T].
        new_tokens: how many.
        clock: is told of each token.
    """
    cache: dict[str, Any] = {}
    if not recipe.has_default_cache:
        # Compiled, the static cache would be another benchmark.
        made = recipe.make_cache(text_config(model), prompt.shape[1] + new_tokens)
        cache = {"disable_compile": True, **cache_argument(made)}
    generate: Any = model.generate  # of a mixin, which the type does not show
    generate(
        prompt,
        attention_mask=mask,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([] if clock is None else [clock]),
        **cache,
    )
