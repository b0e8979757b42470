"""Do errors add up in a long generation? The divergence of each step under the original's own greedy tokens.

A perplexity is measured on text whose every token is given. In a generation, what was decoded with an error is written
into the cache and read for as long as it runs. So the original writes a continuation, and the spliced model is given
the same tokens one by one, through its cache: were its errors to add up, later steps would diverge more.

Legend: `B` prompts, `N` steps, `K` most likely tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from kvsplice_hf.evaluation.reference import lumped_divergence, most_likely
from kvsplice_hf.patch.state import patched_sites, splice_disabled
from kvsplice_hf.upstream import cache_argument, cache_of


@dataclass(frozen=True)
class Drift:
    """The spliced model beside the original, step by step.

    Attributes:
        tokens: what the original wrote, int64 [B, N].
        divergence: KL(original || spliced) of the prediction of each of them, nats, [B, N].
        agrees: whether the spliced model would have written the same token, bool [B, N].
    """

    tokens: torch.Tensor
    divergence: torch.Tensor
    agrees: torch.Tensor


@torch.no_grad()
def measure_drift(model: nn.Module, prompts: torch.Tensor, steps: int, progress: bool = True) -> Drift:
    """Let the original write, and the spliced model read along.

    Args:
        model: a patched causal language model.
        prompts: token ids, int64 [B, T].
        steps: N, tokens to write. An end-of-text token does not end it.
        progress: show a bar.

    Raises:
        PatchStateError: the model is not patched.
    """
    patched_sites(model)  # refuses a model that is not patched
    top, indices, tokens = [], [], []
    with splice_disabled(model):
        following, cache = prompts, None
        for _ in tqdm(range(steps), "original writes", disable=not progress):
            predicted, cache = _step(model, following, cache)
            best = most_likely(predicted)
            top.append(best.values)
            indices.append(best.indices)
            following = best.indices[:, :1]
            tokens.append(following)
    divergence, agrees = [], []
    following, cache = prompts, None
    for step in tqdm(range(steps), "spliced reads", disable=not progress):
        predicted, cache = _step(model, following, cache)
        divergence.append(lumped_divergence(top[step], predicted.gather(-1, indices[step])))
        following = tokens[step]
        agrees.append(predicted.argmax(-1) == following[:, 0])
    return Drift(torch.cat(tokens, 1), torch.stack(divergence, 1), torch.stack(agrees, 1))


def _step(model: Any, ids: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
    """Log-probabilities of the next token, [B, vocabulary], and the cache with `ids` [B, T] in it."""
    output = model(ids, **cache_argument(cache), use_cache=True, logits_to_keep=1)
    return output.logits[:, -1].float().log_softmax(-1), cache_of(output)
