"""Trellis-coded quantisation, simulated: rows obey the code, err as is known of it, and never more than by rounding."""

import itertools

import pytest
import torch

from kvsplice_hf.bench.trellis import GRIDS, trellis_levels, trellis_rounded
from kvsplice_hf.calibration.allocate import fit_scales


def gaussian(*sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("widths", [[1] * 12, [3] * 12, [4, 2, 1, 3, 1, 2] * 2], ids=["1", "3", "mixed"])
def test_the_decoder_of_the_page_gives_the_rows_that_the_search_found(widths: list[int]) -> None:
    """Level `4 * upper + 2 * (u_i ^ u_(i-1) ^ u_(i-3)) + u_(i-2)`: each row is one of those, for some bits."""
    found = trellis_rounded(0.4 * gaussian(40, len(widths)), widths, torch.ones(len(widths)))
    for row in found:
        bits: list[int] = []
        for level, width in zip(row, widths, strict=True):
            at = int((trellis_levels(width) == level).nonzero())
            before = [*reversed(bits[-3:]), 0, 0, 0]
            assert at & 1 == before[1], "a level that the bits before do not lead to"
            bits.append(at >> 1 & 1 ^ before[0] ^ before[2])
            assert at >> 2 < 2 ** (width - 1), "more than `width` bits"


def test_the_row_found_is_the_closest_of_all() -> None:
    widths, weight = [1] * 6, torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0, 1.0])
    rows = 0.5 * gaussian(8, 6)
    levels, every = trellis_levels(1), []
    for bits in itertools.product((0, 1), repeat=6):
        u = [0, 0, 0, *bits]
        every.append([levels[2 * (u[i] ^ u[i - 1] ^ u[i - 3]) + u[i - 2]] for i in range(3, 9)])
    errors = (weight * (rows[:, None] - torch.tensor(every)).square()).sum(-1)
    found = (weight * (rows - trellis_rounded(rows, widths, weight)).square()).sum(-1)
    torch.testing.assert_close(found, errors.amin(1))


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_gaussian_coordinates_err_less_than_by_rounding(width: int) -> None:
    rows = gaussian(60, 256)
    scale, error = fit_scales(rows.view(-1, 1), torch.ones(rows.numel(), 1), width)
    found = trellis_rounded(rows / scale, [width] * 256, torch.ones(256)) * scale
    assert (rows - found).square().mean() / error.item() == pytest.approx(GRIDS[width].ratio, rel=0.04)
