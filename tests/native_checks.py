"""What the tests of the C++ kernels share."""

import torch


def assert_same(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...], tolerance: float = 1e-5) -> None:
    """Float32 results of a kernel against a reference of any precision."""
    for ours, wanted in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), wanted.double(), atol=tolerance, rtol=tolerance)
