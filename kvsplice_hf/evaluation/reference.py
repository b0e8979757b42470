"""Many variants of a model against the same text: the original model runs over it once, and little of that is kept.

`score_windows` compares one patched model with itself and keeps nothing of the original, so each further variant costs
another pass of it. Here its log-likelihoods and its most likely tokens are kept, which is enough for perplexity and
agreement, and for a divergence that is never too large.

Legend: `W` windows, `T` tokens of a window, `K` most likely tokens.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm


# Most likely tokens of the original whose probabilities are kept; all others count as one token in the divergence.
_TOP_TOKENS = 64

# Logits [T, vocabulary] of a window of token ids [T].
Forward = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class ReferenceScores:
    """What is kept of the original model on one text.

    Attributes:
        windows: token ids, [W, T].
        nll: negative log-likelihoods of the tokens after the first, nats, [W, T - 1].
        top: log-probabilities of the most likely tokens at each place, [W, T - 1, K].
        tokens: which tokens these are, [W, T - 1, K].
    """

    windows: torch.Tensor
    nll: torch.Tensor
    top: torch.Tensor
    tokens: torch.Tensor

    def some(self, count: int) -> "ReferenceScores":
        """Of so many windows, spread over the text; of all where there are not twice as many."""
        every = len(self.windows) // count
        parts = (self.windows, self.nll, self.top, self.tokens)
        return ReferenceScores(*(part[::every][:count] for part in parts)) if every > 1 else self


@torch.no_grad()
def score_reference(forward: Forward, windows: torch.Tensor, label: str) -> ReferenceScores:
    """Run the original model.

    Args:
        forward: of the original model.
        windows: token ids, int64 [W, T].
        label: of the progress bar.
    """
    nll, top, tokens = [], [], []
    for window in tqdm(windows, desc=label, file=sys.stderr):
        log_probabilities = _log_probabilities(forward, window)
        best = most_likely(log_probabilities)
        nll.append(_nll(log_probabilities, window))
        top.append(best.values.cpu())
        tokens.append(best.indices.int().cpu())
    return ReferenceScores(windows, *map(torch.stack, (nll, top, tokens)))


@torch.no_grad()
def score_against(forward: Forward, reference: ReferenceScores, label: str) -> dict[str, Any]:
    """Run a variant over the windows of the reference: what `change_of_perplexity` gives, divergence and agreement.

    Args:
        forward: of the variant.
        reference: the original model on the same windows.
        label: of the progress bar.
    """
    nll, divergence, agrees = [], [], []
    for window, top, tokens in tqdm(
        zip(reference.windows, reference.top, reference.tokens, strict=True),
        label,
        len(reference.windows),
        file=sys.stderr,
    ):
        log_probabilities = _log_probabilities(forward, window)
        nll.append(_nll(log_probabilities, window))
        indices = tokens.long().to(log_probabilities.device)
        divergence.append(lumped_divergence(top, log_probabilities.gather(-1, indices).cpu()).mean())
        agrees.append((log_probabilities.argmax(-1) == indices[:, 0]).double().mean())
    row = change_of_perplexity(torch.stack(nll), reference.nll)
    row["kl_nats"] = _finite(torch.stack(divergence).mean().item())
    row["top1_agreement"] = torch.stack(agrees).mean().item()
    return row


def _log_probabilities(forward: Forward, window: torch.Tensor) -> torch.Tensor:
    """Of the tokens after each but the last of a window [T], [T - 1, vocabulary]."""
    return forward(window)[:-1].float().log_softmax(-1)


def _nll(log_probabilities: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
    targets = window[1:, None].to(log_probabilities.device)
    return -log_probabilities.gather(-1, targets)[:, 0].cpu().double()


def most_likely(log_probabilities: torch.Tensor) -> torch.return_types.topk:
    """The tokens whose probabilities `lumped_divergence` needs, most likely first: values and indices [..., K]."""
    return log_probabilities.topk(min(_TOP_TOKENS, log_probabilities.shape[-1]), dim=-1)


def lumped_divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) in nats from log-probabilities [..., K] of some tokens, all others taken as one token: [...].

    Never above the divergence over the whole vocabulary.
    """
    p, q = p.double(), q.double()
    known = (p.exp() * (p - q)).sum(-1)
    # Where the known tokens hold all the probability, rounding may leave a remainder just below 0.
    rest_p, rest_q = ((1 - side.exp().sum(-1)).clamp_min(1e-12) for side in (p, q))
    return known + rest_p * (rest_p / rest_q).log()


def change_of_perplexity(nll: torch.Tensor, reference: torch.Tensor) -> dict[str, Any]:
    """Change of the perplexity in percent, and its standard error from the windows' differences (None for one).

    Args:
        nll: of the variant, [W, T - 1].
        reference: of the original model, the same windows.
    """
    change = (nll - reference).mean(1)
    factor = change.mean().exp()
    stderr = 100 * (factor * change.std() / math.sqrt(len(change))).item() if len(change) > 1 else None
    return {
        "perplexity": _finite(nll.mean().exp().item()),
        "stock_perplexity": reference.mean().exp().item(),
        "loss_percent": _finite(100 * change.mean().expm1().item()),
        "loss_stderr_percent": _finite(stderr),
        "windows": len(change),
    }


def _finite(value: float | None) -> float | None:
    """JSON has neither NaN nor infinity."""
    return value if value is not None and math.isfinite(value) else None
