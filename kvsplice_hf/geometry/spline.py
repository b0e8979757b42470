"""A monotone, invertible piecewise-linear function of each number of a vector.

Between knots, and beyond the first and the last one, each with a slope of its own. Slopes are bounded away from 0 and
infinity, so that the inverse is as well behaved as the function.

Legend: `d` numbers of a vector, `n` knots.
"""

import math

import torch
from torch import nn

from kvsplice_hf.errors import ConfigError


# No slope is above this one, and none below one over it.
LARGEST_SLOPE = 8.0
# Of the range of a number's quantiles: knots are at least this far apart, however many samples are equal.
_LEAST_GAP = 1e-3


class MonotoneSpline(nn.Module):
    """A spline for each of d numbers; the identity until it is trained.

    The slope of a piece is `exp(log(LARGEST_SLOPE) tanh(theta))`, and the first knot stays where it is.

    Args:
        knots: where the pieces meet, ascending, [d, n].

    Attributes:
        knots: the same, a buffer.
        bends: theta of each piece, [d, n + 1]; 0 is a slope of 1.

    Raises:
        ConfigError: fewer than two knots, or knots that do not ascend.
    """

    knots: torch.Tensor

    def __init__(self, knots: torch.Tensor) -> None:
        super().__init__()
        if knots.dim() != 2 or knots.shape[1] < 2:
            raise ConfigError(f"A spline needs at least 2 knots for each number, [d, n]; got {list(knots.shape)}.")
        if not bool((knots.diff(dim=1) > 0).all()):  # NaN fails as well
            raise ConfigError("The knots of a spline must ascend, and be finite. Take them from `MonotoneSpline.over`.")
        self.register_buffer("knots", knots.contiguous())
        pieces = (knots.shape[0], knots.shape[1] + 1)
        self.bends = nn.Parameter(torch.zeros(pieces, dtype=knots.dtype, device=knots.device))

    @classmethod
    def over(cls, vectors: torch.Tensor, knots: int) -> "MonotoneSpline":
        """With knots at quantiles of vectors [M, d], evenly spread from the 2nd to the 98th percentile.

        Raises:
            ConfigError: fewer than two knots.
        """
        if knots < 2:
            raise ConfigError(f"`knots` is {knots}; a spline needs at least 2.")
        shares = torch.linspace(0.02, 0.98, knots, dtype=torch.float64, device="cpu")
        ordered = vectors.sort(dim=0).values  # `torch.quantile` refuses more than 2^24 numbers
        places = (shares * (len(vectors) - 1)).round().long().to(vectors.device)
        found = ordered[places].T
        spread = (ordered[-1] - ordered[0]).clamp_min(torch.finfo(vectors.dtype).tiny)
        steps = torch.arange(knots, dtype=vectors.dtype, device=vectors.device)
        # Equal quantiles are moved apart: the n-th knot is at least n gaps behind where the first one is.
        gaps = _LEAST_GAP * spread[:, None] * steps
        return cls((found - gaps).cummax(dim=1).values + gaps)

    @property
    def slopes(self) -> torch.Tensor:
        """Of each piece, [d, n + 1]."""
        return torch.exp(math.log(LARGEST_SLOPE) * torch.tanh(self.bends))

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Bent vectors [..., d]."""
        slopes, (knots, bent) = self.slopes, self._corners()
        return _through(vectors, knots, bent, slopes)

    def inverse(self, bent: torch.Tensor) -> torch.Tensor:
        """What `forward` makes `bent` [..., d] of."""
        slopes, (knots, corners) = self.slopes, self._corners()
        return _through(bent, corners, knots, 1 / slopes)

    def _corners(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The knots, and where they go."""
        rises = self.slopes[:, 1:-1] * self.knots.diff(dim=1)
        first = self.knots[:, :1]
        return self.knots, torch.cat([first, first + rises.cumsum(dim=1)], dim=1)

    def extra_repr(self) -> str:
        return f"numbers={self.knots.shape[0]}, knots={self.knots.shape[1]}"


def _through(numbers: torch.Tensor, start: torch.Tensor, to: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
    """Numbers [..., d] of pieces that begin at `start` [d, n] and end up at `to` [d, n]."""
    columns = numbers.reshape(-1, numbers.shape[-1]).T.contiguous()  # [d, M]
    piece = torch.searchsorted(start.detach().contiguous(), columns.detach(), right=True)  # 0 ahead of the first knot
    corner = (piece - 1).clamp_min(0)
    moved = to.gather(1, corner) + slopes.gather(1, piece) * (columns - start.gather(1, corner))
    return moved.T.reshape(numbers.shape)
