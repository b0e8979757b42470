"""Where two ways of computing a model write other tokens, and whether rounding alone explains it.

Greedy decoding takes the largest logit. Where two are as near to each other as rounding moves them, another order of
addition takes the other one, and everything behind it differs. So it is not enough to count tokens: what counts is how
near the two were, and how far a harmless change of the order moves logits.
"""

from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel


class Written(NamedTuple):
    """What a model has written behind prompts.

    Attributes:
        tokens: int64 [B, count].
        logits: from which they were taken, float32 [B, count, vocabulary], on the CPU.
    """

    tokens: torch.Tensor
    logits: torch.Tensor


@torch.no_grad()
def write(model: PreTrainedModel, prompts: torch.Tensor, count: int) -> Written:
    """So many tokens after each prompt, greedily.

    Args:
        model: the model.
        prompts: int64 [B, T], without padding.
        count: tokens that are written after each.
    """
    settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    kept = {"output_logits": True, "return_dict_in_generate": True}
    mask = torch.ones_like(prompts)
    found: Any = model.generate(prompts, attention_mask=mask, **settings, **kept)  # type: ignore[operator]
    logits = torch.stack([step.float().cpu() for step in found.logits], dim=1)
    return Written(found.sequences[:, prompts.shape[1] :], logits)


def common_tokens(one: Written, other: Written) -> torch.Tensor:
    """How many tokens of each sequence are the same, up to the first that is not: int64 [B]."""
    return (one.tokens == other.tokens).long().cumprod(1).sum(1)


def agreement(one: Written, other: Written) -> str:
    """The same of all sequences together, as tables show it."""
    return f"{int(common_tokens(one, other).sum())} of {one.tokens.numel()}"


def distance(one: Written, other: Written) -> float:
    """How far apart logits are, as long as both have written the same: root of the mean square, in logits."""
    squares = [
        (one.logits[at, : count + 1] - other.logits[at, : count + 1]).square().flatten()
        for at, count in enumerate(common_tokens(one, other).tolist())
    ]
    return float(torch.cat(squares).mean().sqrt())


def first_differences(one: Written, other: Written, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Of each sequence that differs, what the logits were at its first other token.

    Args:
        one: of the model as it was.
        other: of the model computed in another way.
        dtype: in which logits are computed.

    Returns:
        Dictionaries: "sequence" and "token" (where), "gap" (how far the logits of the two tokens were apart in `one`),
        "step" (between neighbouring numbers of the dtype at this size), "moved" (how far the second way moved the two
        against each other), "apart" (root of the mean square of what it changed in all logits of this token).
    """
    found = []
    for at, count in enumerate(common_tokens(one, other).tolist()):
        if count == one.tokens.shape[1]:
            continue
        mine, theirs = one.logits[at, count], other.logits[at, count]
        chosen, instead = int(one.tokens[at, count]), int(other.tokens[at, count])
        gap = float(mine[chosen] - mine[instead])
        size = mine[chosen].abs().clamp_min(torch.finfo(torch.float32).tiny)
        step = torch.finfo(dtype).eps * 2.0 ** float(size.log2().floor())
        moved = gap + float(theirs[instead] - theirs[chosen])
        apart = float((mine - theirs).square().mean().sqrt())
        found.append({"sequence": at, "token": count, "gap": gap, "step": step, "moved": moved, "apart": apart})
    return found
