"""The levels that a coordinate is put on: a uniform grid bent by a sinh, fine near the centre and coarse far out."""

import math

import torch


# How much the grid of each width is bent (0: uniform), fitted to Gaussian and Laplacian coordinates: few levels sit
# where the samples are, many levels are bounded by the tails.
BEND = {1: 0.0, 2: 0.7, 3: 1.3, 4: 1.7, 5: 2.0, 6: 2.2, 7: 2.4, 8: 2.6}
# sinh(x) / x as a polynomial in x^2, for |x| up to the largest bend: a Chebyshev fit with a relative error below 5e-7.
# Several times faster than the sinh of the library, which keeps its precision for any x.
_SINH = (1.0000004732391539, 0.16666250581334213, 0.00833884425232733, 0.00019595608535080897, 3.1881204272216436e-06)


def unit_levels(width: int) -> torch.Tensor:
    """The 2^width levels of a coordinate with scale 1, ascending within (-1, 1), float32."""
    grid = (2 * torch.arange(2**width, dtype=torch.float64, device="cpu") + 1) / 2**width - 1
    bend = BEND[width]
    return (grid if bend == 0 else torch.sinh(bend * grid) / math.sinh(bend)).float()


def sinh_(x: torch.Tensor) -> torch.Tensor:
    """sinh in place, for |x| up to the largest bend."""
    square = x * x
    sum_ = square * _SINH[-1]
    for coefficient in _SINH[-2:0:-1]:
        sum_.add_(coefficient).mul_(square)
    return x.mul_(sum_.add_(_SINH[0]))


def reaches_of(bends: torch.Tensor) -> torch.Tensor:
    """The sinh at the end of a grid bent so much."""
    return torch.where(bends > 0, torch.sinh(bends), 1.0)
