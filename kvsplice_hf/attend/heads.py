"""Which code serves calls on all key heads of a layer with ordinary attention; see `attend.choice`.

Legend: as in `attend.backend`.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kvsplice_hf.attend.alike import both_alike, numbers_alike, numbers_of, packed_alike
from kvsplice_hf.attend.backend import Backend, HeadsStep
from kvsplice_hf.attend.choice import along, backend_for, claiming, coded, either, encode, refusal
from kvsplice_hf.code.heads import HeadSplices, turns_for
from kvsplice_hf.errors import UnsupportedError


# What rows are read back to.
_READ = (torch.float32, torch.bfloat16)


def decode_heads(step: HeadsStep, by_torch: Callable[[], torch.Tensor]) -> torch.Tensor:
    """As `decode`, of a layer with ordinary attention: [B, 1, H, v]."""
    operation = "decode_heads" if step.paging is None else "decode_heads_pages"
    backend, prepared = _backend_for_heads(operation, step.numbers, step.splices, step.identity)
    if backend is None:
        return by_torch()
    given = (
        step.bias is None,
        step.exact is None,
        step.sinks is None,
        step.query.dtype,
        coded(step.turns is not None),
    )
    kind = (operation, *given, along(step.splices.codec), backend.name)
    return either(kind, lambda: backend.decode_heads(step, prepared).to(step.query.dtype), by_torch, numbers_alike)


def encode_heads(
    splices: HeadSplices, values: torch.Tensor, keys: torch.Tensor, turns: torch.Tensor | None, identity: str = ""
) -> torch.Tensor:
    """The rows [B, 1, T, bytes] that a cache stores of values [B, K, T, v] and keys [B, K, T, d], side by side.

    `turns` uint8 [B or 1, 1, T, F], where keys are coded before their rotation. `identity` as in `HeadsStep`.
    """

    def by_torch() -> torch.Tensor:
        parts = zip(splices, splices.split(values, keys), strict=True)
        return torch.cat([encode(head, *part, turns_for(head, turns)) for head, part in parts], dim=-1)

    def alike(found: torch.Tensor, expected: torch.Tensor) -> bool:
        places = itertools.pairwise([0, *itertools.accumulate(splices.row_bytes)])
        parts = zip(splices, splices.split(values, keys), places, strict=True)
        return all(
            packed_alike(head.codec, numbers_of(head, *part, turns_for(head, turns)))(
                found[..., slice(*place)], expected[..., slice(*place)]
            )
            for head, part, place in parts
        )

    # However many tokens: what takes long is the search along the trellis, which PyTorch cannot do at once.
    backend, prepared = _backend_for_heads("encode_heads", (values, keys), splices, identity)
    if backend is None:
        return by_torch()
    kind = ("encode_heads", keys.dtype, coded(turns is not None), along(splices.codec), backend.name)
    return either(kind, lambda: backend.encode_heads(prepared, values, keys, turns), by_torch, alike)


def read_heads(
    splices: HeadSplices,
    rows: torch.Tensor,
    turns: tuple[torch.Tensor, torch.Tensor] | None,
    dtype: torch.dtype,
    by_torch: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    identity: str = "",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [B, K, S, d] and values [B, K, S, v] of stored rows [B, 1, S, bytes], in `dtype`.

    `turns` as in `HeadsStep`, as is `identity`.
    """
    backend, prepared = _backend_for_heads("read_heads", (rows,), splices, identity)
    if backend is None or dtype not in _READ:
        return by_torch()
    kind = ("read_heads", dtype, coded(turns is not None), along(splices.codec), backend.name)
    return either(kind, lambda: backend.read_heads(prepared, rows, turns, dtype), by_torch, both_alike)


def rounds_trips(splices: HeadSplices, values: torch.Tensor, keys: torch.Tensor) -> bool:
    """Whether a backend serves both `encode_heads` and `read_heads` of such values and keys, without gradients."""
    served = (_backend_for_heads(name, (values, keys), splices, "") for name in ("encode_heads", "read_heads"))
    return values.dtype in _READ and all(backend is not None for backend, _ in served)


def _backend_for_heads(
    operation: str, tensors: Sequence[torch.Tensor], splices: HeadSplices, identity: str
) -> tuple[Backend | None, Any]:
    """As `backend_for`, of a call on the key heads of a layer; and what the backend has prepared of them."""
    if torch.is_grad_enabled():  # parameters may want gradients
        tensors = (*tensors, *splices.parameters())
    backend = backend_for(operation, tensors, None)
    if backend is None:
        return None, None
    try:
        return backend, backend.prepare_heads(splices, identity)
    except UnsupportedError:
        return None, None


def refusal_of_heads(tensors: Sequence[torch.Tensor], splices: HeadSplices) -> str | None:
    """As `refusal`, of steps over all key heads of a layer."""
    reason, backend = refusal(tensors), claiming(tensors)
    if reason is not None or backend is None or "decode_heads" not in backend.operations:
        return reason
    try:
        backend.prepare_heads(splices, "")
    except UnsupportedError as error:
        return str(error)
    return None
