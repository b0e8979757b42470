"""Which code reads and writes rows: Triton kernels on a GPU, PyTorch anywhere else.

The kernels serve calls without gradients and dropout that are not being compiled. The first call of each kind is
computed in both ways; where the kernel fails, or disagrees with PyTorch, a warning says so and PyTorch serves from then
on. `KVSPLICE_KERNELS=torch` in the environment leaves the kernels out.

Legend: as in `streaming`.
"""

import functools
import logging
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from kvsplice_hf.codec import RowCodec
from kvsplice_hf.streaming import Attended, attend_packed, attend_rows


logger = logging.getLogger(__name__)

# Products of bf16 numbers of the same sign differ by about this much, relative to the largest of them.
_TOLERANCE = 0.03
# More query rows than these are a prefill, which matrix products serve well.
_MOST_QUERIES = 1024
# What each kind of call has shown on its first use: True for the kernel.
_verdicts: dict[tuple[Any, ...], bool] = {}


def attend(
    query: torch.Tensor,
    rows: torch.Tensor,
    codec: RowCodec | None,
    value_dim: int,
    bias: torch.Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
) -> Attended:
    """Attention over stored rows.

    Args:
        query: [B, M, n].
        rows: [B, S, n], or packed uint8 [B, S, row_bytes] of `codec`.
        codec: None where rows are numbers.
        value_dim, bias, scaling, dropout: as in `streaming.attend_rows`.
    """

    def by_torch() -> Attended:
        if codec is not None:
            return attend_packed(query, rows, codec, value_dim, bias, scaling=scaling, dropout=dropout)
        return attend_rows(query, rows, value_dim, bias, scaling=scaling, dropout=dropout)

    if dropout or query.shape[1] > _MOST_QUERIES or not _may_use_kernels(query, rows):
        return by_torch()

    def by_kernel(kernels: ModuleType) -> Attended:
        scaled, of_queries = query * scaling, None if bias is None else bias[:, 0]
        if codec is not None:
            return Attended(*kernels.attend_packed(scaled, rows, codec, value_dim, of_queries))
        return Attended(*kernels.attend_rows(scaled, rows, value_dim, of_queries))

    kind = ("attend", codec is None, bias is None, query.dtype, rows.dtype, query.device)
    return _either(kind, by_kernel, by_torch, _attend_alike)


def pack(rows: torch.Tensor, codec: RowCodec) -> torch.Tensor:
    """`codec.pack(rows)`: bytes [..., row_bytes] of rows [..., n]."""
    if rows.numel() == 0 or not _may_use_kernels(rows):
        return codec.pack(rows)

    def by_kernel(kernels: ModuleType) -> torch.Tensor:
        return kernels.encode_pack(rows, codec)

    return _either(("pack", rows.dtype, rows.device), by_kernel, lambda: codec.pack(rows), _bytes_alike)


def _may_use_kernels(*tensors: torch.Tensor) -> bool:
    if torch.compiler.is_compiling() or torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    kernels = _kernels() if tensors[0].is_cuda or "TRITON_INTERPRET" in os.environ else None
    return kernels is not None and kernels.kernels_available(tensors[0].device)


@functools.cache
def _kernels() -> ModuleType | None:
    """The module of the kernels, or None where they are not wanted or Triton is missing."""
    wanted = os.environ.get("KVSPLICE_KERNELS", "triton")
    if wanted != "triton":
        return None
    try:
        from kvsplice_hf import kernels
    except ImportError as error:
        logger.warning(
            "Triton is not installed (%s): PyTorch reads the codes, which is slower. Install kvsplice-hf[gpu].", error
        )
        return None
    return kernels


def _either(
    kind: tuple[Any, ...],
    by_kernel: Callable[[ModuleType], Any],
    by_torch: Callable[[], Any],
    alike: Callable[[Any, Any], bool],
) -> Any:
    kernels = _kernels()
    assert kernels is not None
    if kind in _verdicts:
        return by_kernel(kernels) if _verdicts[kind] else by_torch()
    expected = by_torch()
    try:
        _verdicts[kind] = alike(by_kernel(kernels), expected)
        reason = "" if _verdicts[kind] else "its result differs from that of PyTorch"
    except Exception as error:  # whatever the compiler or driver of this machine raises
        _verdicts[kind], reason = False, f"{type(error).__name__}: {error}"
    if reason:
        logger.warning("The Triton kernel for %s is not used: %s. PyTorch serves instead.", kind, reason)
    return expected


def _attend_alike(found: Attended, expected: Attended) -> bool:
    # Queries that see no row (padding) have any result.
    sees = expected.lse > torch.finfo(torch.float32).min / 2
    mixed = (found.mixed - expected.mixed).abs().amax(-1)[sees]
    lse = (found.lse - expected.lse).abs()[sees]
    size = expected.mixed.abs().amax()
    return bool((mixed <= _TOLERANCE * size).all() and (lse <= _TOLERANCE * (1 + expected.lse.abs()[sees])).all())


def _bytes_alike(found: torch.Tensor, expected: torch.Tensor) -> bool:
    # A number between two levels may fall to either for its last digit.
    return found.shape == expected.shape and bool((found != expected).float().mean() < 0.01)
