"""A monotone, invertible piecewise-linear function of each number of a vector.

Between knots, and beyond the first and the last one, each with a slope of its own. Slopes are bounded away from 0 and
infinity, so that the inverse is as well behaved as the function.

Legend: `d` numbers of a vector, `n` knots.
"""

import math
from collections.abc import Callable

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
        slopes = self.slopes
        return _through(vectors, self.knots, _bent_knots(self.knots, slopes), slopes)

    def inverse(self, bent: torch.Tensor) -> torch.Tensor:
        """What `forward` makes `bent` [..., d] of."""
        slopes = self.slopes
        return _through(bent, _bent_knots(self.knots, slopes), self.knots, 1 / slopes)

    def extra_repr(self) -> str:
        return f"numbers={self.knots.shape[0]}, knots={self.knots.shape[1]}"


class FixedSpline(nn.Module):
    """A spline of each of d numbers as a trained one has left it: nothing of it is trained any more.

    It stays in float32 whatever the model around it is cast to, so that what was stored is read as it was written. It
    is the identity until `set_to`.

    Args:
        size: d.
        knots: n.
        device: of the buffers.

    Attributes:
        knots: [d, n], ascending.
        slopes: of each piece, [d, n + 1], above 0.

    Raises:
        ConfigError: fewer than two knots.
    """

    knots: torch.Tensor
    slopes: torch.Tensor

    def __init__(self, size: int, knots: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        if knots < 2:
            raise ConfigError(f"`knots` is {knots}; a spline needs at least 2.")
        line = torch.arange(knots, dtype=torch.float32, device=device)
        self.register_buffer("knots", line.expand(size, -1).clone())
        self.register_buffer("slopes", torch.ones(size, knots + 1, dtype=torch.float32, device=device))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "FixedSpline":
        before = self.knots, self.slopes
        super()._apply(fn, recurse)
        if self.knots.dtype is not torch.float32:  # moved is right, cast is not
            self.knots, self.slopes = (held.to(self.knots.device) for held in before)
        return self

    @torch.no_grad()
    def set_to(self, knots: torch.Tensor, slopes: torch.Tensor) -> None:
        """Take over knots [d, n] and slopes [d, n + 1].

        Raises:
            ConfigError: they cannot be those of a spline.
        """
        require_spline(knots, slopes)
        self.knots.copy_(knots)
        self.slopes.copy_(slopes)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Bent vectors [..., d], float32."""
        return _through(vectors.float(), self.knots, _bent_knots(self.knots, self.slopes), self.slopes)

    def inverse(self, bent: torch.Tensor) -> torch.Tensor:
        """What `forward` makes `bent` [..., d] of, float32."""
        return _through(bent.float(), _bent_knots(self.knots, self.slopes), self.knots, 1 / self.slopes)

    def extra_repr(self) -> str:
        return f"numbers={self.knots.shape[0]}, knots={self.knots.shape[1]}"


def require_spline(knots: torch.Tensor, slopes: torch.Tensor) -> None:
    """Check what was read or made somewhere else: knots [d, n] and slopes [d, n + 1].

    Raises:
        ConfigError: knots that do not ascend, slopes that are not above 0, or numbers that are not finite.
    """
    if knots.dim() != 2 or knots.shape[1] < 2 or slopes.shape != (knots.shape[0], knots.shape[1] + 1):
        raise ConfigError(
            f"A spline of d numbers has knots [d, n] and slopes [d, n + 1]; got {[*knots.shape]} and {[*slopes.shape]}."
        )
    ascends = bool((knots.diff(dim=1) > 0).all()) and bool(torch.isfinite(knots).all())  # NaN fails both
    if not ascends or not bool(((slopes > 0) & torch.isfinite(slopes)).all()):
        raise ConfigError("The knots of a spline must ascend, its slopes be above 0, and all be finite.")


def _bent_knots(knots: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
    """Where the knots [d, n] go; the first stays where it is."""
    rises = slopes[:, 1:-1] * knots.diff(dim=1)
    first = knots[:, :1]
    return torch.cat([first, first + rises.cumsum(dim=1)], dim=1)


def _through(numbers: torch.Tensor, start: torch.Tensor, to: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
    """Numbers [..., d] of pieces that begin at `start` [d, n] and end up at `to` [d, n]."""
    columns = numbers.reshape(-1, numbers.shape[-1]).T.contiguous()  # [d, M]
    piece = torch.searchsorted(start.detach().contiguous(), columns.detach(), right=True)  # 0 ahead of the first knot
    corner = (piece - 1).clamp_min(0)
    moved = to.gather(1, corner) + slopes.gather(1, piece) * (columns - start.gather(1, corner))
    return moved.T.reshape(numbers.shape)
