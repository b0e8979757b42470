"""What the tests of the C++ kernels share."""

import torch

from kvsplice_hf import RowCodec


def assert_same(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...], tolerance: float = 1e-5) -> None:
    """Float32 results of a kernel against a reference of any precision."""
    for ours, wanted in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), wanted.double(), atol=tolerance, rtol=tolerance)


def assert_as_close(codec: RowCodec, rows: torch.Tensor, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Packed rows of a search along a trellis: nearly all the same, and the others as close to what was packed."""
    other = (found != expected).any(-1)
    assert other.float().mean() <= 0.02
    errors, least = (
        ((codec.unpack(packed) - rows.float()) / codec._row_scales(codec.gains(rows))).square().sum(-1)
        for packed in (found, expected)
    )
    # Along the path errors count by the widths of their coordinates, here they do not.
    assert (errors[other] <= 1.2 * least[other] + 1e-6).all()
