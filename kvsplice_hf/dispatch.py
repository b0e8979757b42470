"""Which code reads and writes rows: Triton kernels on a GPU, C++ on a CPU, PyTorch anywhere else.

Both kinds of kernels serve calls without gradients and dropout that are not being compiled. The first call of each kind
is computed in both ways; where the kernel fails, or disagrees with PyTorch, a warning says so and PyTorch serves from
then on. `KVSPLICE_KERNELS=torch` in the environment, when the package is imported, leaves the kernels out.

Legend: as in `streaming`.
"""

import functools
import logging
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from kvsplice_hf import native
from kvsplice_hf.codec import RowCodec
from kvsplice_hf.streaming import Attended, attend_packed, attend_rows


logger = logging.getLogger(__name__)

# Read once: a lookup in the environment takes as long as some of the calls that would ask for it.
_WITHOUT_KERNELS = os.environ.get("KVSPLICE_KERNELS") == "torch"
_IN_INTERPRETER = "TRITON_INTERPRET" in os.environ
# Products of bf16 numbers of the same sign differ by about this much, relative to the largest of them.
_TOLERANCE = 0.03
# More query rows than these are a prefill, which matrix products serve well.
_MOST_QUERIES = 1024
# More new tokens than these are a prefill as well, when they are encoded.
_MOST_TOKENS = 32
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

    kernels = None if dropout or query.shape[1] > _MOST_QUERIES else _kernels_for(query, rows, *_steps_of(codec))
    if kernels is None:
        return by_torch()

    def by_kernel() -> Attended:
        of_queries = None if bias is None else bias[:, 0]
        if codec is not None:
            return Attended(*kernels.attend_packed(query, rows, codec, value_dim, of_queries, scaling=scaling))
        return Attended(*kernels.attend_rows(query, rows, value_dim, of_queries, scaling=scaling))

    kind = ("attend", codec is None, bias is None, query.dtype, rows.dtype, query.device)
    return _either(kind, by_kernel, by_torch, _attend_alike)


def decode(step: native.Step, by_torch: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The attention output of one new token per sequence, [B, 1, H, V], in the dtype of the query.

    In one call of C++ where that serves, by `by_torch` anywhere else.
    """
    if _kernels_for(*step.numbers, *_steps_of(step.codec)) is not native:
        return by_torch()
    kind = ("decode", step.codec is None, step.bias is None, step.exact is None, step.query.dtype, step.rows.dtype)
    return _either(kind, lambda: native.decode(step).to(step.query.dtype), by_torch, _numbers_alike)


def encode(
    latent: torch.Tensor,
    k_rot: torch.Tensor,
    projection: native.Projection,
    codec: RowCodec | None,
    by_torch: Callable[[], torch.Tensor],
) -> torch.Tensor:
    """The rows that a cache stores of a few new tokens: in one call of C++ where that serves, or by `by_torch`.

    Args:
        latent, k_rot: [..., R] and [..., P].
        projection, codec: of the rows.
    """
    given = [latent, *(tensor for tensor in projection if tensor is not None), *_steps_of(codec)]
    if k_rot.shape[-1]:
        given.append(k_rot)
    if latent.numel() > _MOST_TOKENS * latent.shape[-1] or _kernels_for(*given) is not native:
        return by_torch()
    alike = _numbers_alike if codec is None else _bytes_alike
    kind = ("encode", codec is None, projection.offset is None, latent.dtype, projection.compress.dtype)
    return _either(kind, lambda: native.encode(latent, k_rot, projection, codec), by_torch, alike)


def pack(rows: torch.Tensor, codec: RowCodec) -> torch.Tensor:
    """`codec.pack(rows)`: bytes [..., row_bytes] of rows [..., n]."""
    kernels = _kernels_for(rows, *_steps_of(codec))
    if kernels is None:
        return codec.pack(rows)
    kind = ("pack", rows.dtype, rows.device)
    return _either(kind, lambda: kernels.encode_pack(rows, codec), lambda: codec.pack(rows), _bytes_alike)


def _steps_of(codec: RowCodec | None) -> tuple[torch.Tensor, ...]:
    """What may be in training, or sharded, of a codec."""
    return () if codec is None else (codec.scales, codec.centres)


def _kernels_for(*tensors: torch.Tensor) -> Any:
    """The module whose kernels serve a call with these tensors, or None."""
    if _WITHOUT_KERNELS or torch.compiler.is_compiling():
        return None
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return None
    device = tensors[0].device
    if device.type != "cpu" or _IN_INTERPRETER:
        kernels = _triton_kernels()
        return kernels if kernels is not None and kernels.kernels_available(device) else None
    return native if all(map(native.reads, tensors)) and native.kernels_available(device) else None


@functools.cache
def _triton_kernels() -> ModuleType | None:
    """The module of the Triton kernels, or None where Triton is missing."""
    try:
        from kvsplice_hf import kernels
    except ImportError as error:
        logger.warning(
            "Triton is not installed (%s): PyTorch reads the codes, which is slower. Install kvsplice-hf[gpu].", error
        )
        return None
    return kernels


def _either(
    kind: tuple[Any, ...], by_kernel: Callable[[], Any], by_torch: Callable[[], Any], alike: Callable[[Any, Any], bool]
) -> Any:
    if kind in _verdicts:
        return by_kernel() if _verdicts[kind] else by_torch()
    expected = by_torch()
    try:
        found = by_kernel()
        _verdicts[kind] = alike(found, expected)
        reason = "its result differs from that of PyTorch"
    except Exception as error:  # whatever the compiler or driver of this machine raises
        _verdicts[kind], reason = False, f"{type(error).__name__}: {error}"
    if _verdicts[kind]:
        return found  # as in all later calls, to the last bit
    logger.warning("The kernel for %s is not used: %s. PyTorch serves instead.", kind, reason)
    return expected


def _attend_alike(found: Attended, expected: Attended) -> bool:
    # Queries that see no row (padding) have any result.
    sees = expected.lse > torch.finfo(torch.float32).min / 2
    mixed = (found.mixed - expected.mixed).abs().amax(-1)[sees]
    lse = (found.lse - expected.lse).abs()[sees]
    size = expected.mixed.abs().amax()
    return bool((mixed <= _TOLERANCE * size).all() and (lse <= _TOLERANCE * (1 + expected.lse.abs()[sees])).all())


def _numbers_alike(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().amax() <= _TOLERANCE * expected.abs().amax())


def _bytes_alike(found: torch.Tensor, expected: torch.Tensor) -> bool:
    # A number between two levels may fall to either for its last digit.
    return found.shape == expected.shape and int((found != expected).sum()) <= 0.01 * found.numel()
