"""Which code reads and writes rows: Triton kernels on a GPU, C++ on a CPU, PyTorch anywhere else.

Kernels serve calls without gradients and dropout that are not being compiled. The first call of each kind is computed
in both ways; where the kernel fails, or disagrees with PyTorch, a warning says so and PyTorch serves from then on. A
call that says nothing about the kernel is not judged by: one with numbers that are not finite, or with tensors that the
kernel refuses by name. Calls under autocast are kinds of their own. `KVSPLICE_KERNELS=torch` in the environment, when
the package is imported, leaves the kernels out. `explain` tells what serves a model, and why.

Legend: as in `reference`.
"""

import functools
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kvsplice_hf.attend import reference
from kvsplice_hf.attend.alike import all_attend_alike, as_close, attend_alike, numbers_alike, numbers_of, packed_alike
from kvsplice_hf.attend.backend import Attended, Backend, CodedKeys, HeadRows, Step
from kvsplice_hf.attend.native.backend import NativeBackend
from kvsplice_hf.attend.triton.backend import TritonBackend
from kvsplice_hf.code import trellis
from kvsplice_hf.code.codecs import Codec
from kvsplice_hf.code.projection import LearnedKVSplice
from kvsplice_hf.errors import KVSpliceError


logger = logging.getLogger(__name__)

# In the order in which they are asked. To add a backend is to add it here.
BACKENDS: list[Backend] = [TritonBackend(), NativeBackend()]
# Read once: a lookup in the environment takes as long as some of the calls that would ask for it.
_WITHOUT_KERNELS = os.environ.get("KVSPLICE_KERNELS") == "torch"
# More query rows than these are a prefill, which matrix products serve well.
_MOST_QUERIES = 1024
# More new tokens than these are a prefill as well, when they are encoded.
_MOST_TOKENS = 32
# What each kind of call has shown on its first use: True for the kernel. And what was against it.
_verdicts: dict[tuple[Any, ...], bool] = {}
_reasons: dict[tuple[Any, ...], str] = {}


def attend(
    query: torch.Tensor,
    rows: torch.Tensor,
    codec: Codec | None,
    value_dim: int,
    bias: torch.Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    keys: CodedKeys | None = None,
) -> Attended:
    """Attention over stored rows.

    Args:
        query: [B, M, n].
        rows: [B, S, n], or packed uint8 [B, S, row_bytes] of `codec`.
        codec: None where rows are numbers.
        value_dim, bias, scaling, dropout: as in `reference.attend_rows`.
        keys: how the keys of packed rows are read, where they were coded before their rotation.
    """

    def by_torch() -> Attended:
        return reference.attend(query, rows, codec, value_dim, bias, scaling=scaling, dropout=dropout, keys=keys)

    backend = None
    if not dropout and query.shape[1] <= _MOST_QUERIES:
        tensors = (query, rows) if keys is None else (query, rows, keys.expand, keys.mean)
        backend = backend_for("attend", tensors, codec, coded_keys=keys is not None)
    if backend is None:
        return by_torch()

    def by_kernel() -> Attended:
        of_queries = None if bias is None else bias[:, 0]
        more = {} if keys is None else {"keys": keys}  # which only some backends take
        return backend.attend(query, rows, codec, value_dim, of_queries, scaling=scaling, **more)

    more_of_rows = (coded(keys is not None), along(codec))
    given = (codec is None, bias is None, query.dtype, rows.dtype, query.device, *more_of_rows)
    kind = ("attend", *given, backend.name)
    return either(kind, by_kernel, by_torch, attend_alike)


def attend_heads(
    query: torch.Tensor,
    heads: Sequence[HeadRows],
    bias: torch.Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
) -> list[Attended]:
    """Attention of one token per sequence over the keys of all heads of a layer; values only get mixed.

    Args:
        query: rotated, [B, H, d]; query heads of one key head side by side.
        heads: the rows of each of K key heads.
        bias: added to the scores of all heads, float32 [B or 1, S]; or None.
        scaling: factor on the scores, before the bias.
        dropout: probability of dropping a weight.

    Returns:
        Of each key head the weighted means of what values are decoded from, [B, G, value_dim], and the logarithms of
        the sums of exponentiated scores, [B, G].
    """
    by_torch = functools.partial(reference.attend_heads, query, heads, bias, scaling=scaling, dropout=dropout)
    first, backend = heads[0], None
    if not dropout and all(head.keys is not None for head in heads):
        tensors = [query, first.rows, *(step for head in heads for step in head.codec.steps)]
        tensors += [tensor for head in heads if head.keys is not None for tensor in (head.keys.expand, head.keys.mean)]
        backend = backend_for("attend_heads", tensors, first.codec, coded_keys=True)
    if backend is None:
        return by_torch()
    kind = ("attend_heads", bias is None, query.dtype, query.device, along(first.codec), backend.name)
    by_kernel = functools.partial(backend.attend_heads, query, heads, bias, scaling=scaling)
    return either(kind, by_kernel, by_torch, all_attend_alike)


def decode(step: Step, by_torch: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The attention output of one new token per sequence, [B, 1, H, V], in the dtype of the query.

    In one call where a backend serves that, by `by_torch` anywhere else.
    """
    operation = "decode" if step.paging is None else "decode_pages"
    backend = backend_for(operation, step.numbers, step.codec, coded_keys=step.keys is not None)
    if backend is None or (step.paging is not None and step.codec is None and not backend.reads_numbers_in_pages):
        return by_torch()
    missing = tuple(part is None for part in (step.codec, step.bias, step.exact, step.paging))
    given = (*missing, step.query.dtype, step.rows.dtype)
    kind = ("decode", *given, coded(step.keys is not None), along(step.codec), backend.name)
    return either(kind, lambda: backend.decode(step).to(step.query.dtype), by_torch, numbers_alike)


def encode(
    splice: LearnedKVSplice, latent: torch.Tensor, k_rot: torch.Tensor, turns: torch.Tensor | None = None
) -> torch.Tensor:
    """`splice.rows(latent, k_rot, turns)`: the rows that a cache stores.

    Args:
        splice: the projection.
        latent, k_rot: latents [B, 1, T, R] and rotated keys [B, 1, T, P].
        turns: uint8 [B or 1, 1, T, F], where keys are coded before their rotation.

    Raises:
        UnsupportedError: as `LearnedKVSplice.rows`.
    """
    splice.require_codec_here()
    codec = splice.codec

    def by_torch() -> torch.Tensor:
        rows = splice.numbers_to_store(latent, k_rot, turns)
        return rows if codec is None else pack(rows, codec)

    if splice.code_norm is not None or not splice.is_affine or latent.numel() > _MOST_TOKENS * latent.shape[-1]:
        return by_torch()
    weights, keys = splice.weights(), None if splice.keys is None else splice.keys.weights()
    given = [latent, *(tensor for tensor in weights if tensor is not None)]
    if k_rot.shape[-1]:
        given.append(k_rot)
    if keys is not None:
        given += [keys.compress, keys.mean]
    backend = backend_for("encode", given, codec, coded_keys=keys is not None)
    if backend is None:
        return by_torch()
    alike = packed_alike(codec, numbers_of(splice, latent, k_rot, turns))
    of_weights = (weights.offset is None, latent.dtype, weights.compress.dtype, coded(keys is not None))
    kind = ("encode", codec is None, *of_weights, along(codec), backend.name)
    more = () if keys is None else (keys, turns)  # which only some backends take
    return either(kind, lambda: backend.encode(latent, k_rot, weights, codec, *more), by_torch, alike)


def pack(rows: torch.Tensor, codec: Codec) -> torch.Tensor:
    """`codec.pack(rows)`: bytes [..., row_bytes] of rows [..., n]."""
    backend = backend_for("pack", (rows,), codec)
    if backend is None:
        return codec.pack(rows)
    kind = ("pack", rows.dtype, rows.device, along(codec), backend.name)
    alike = packed_alike(codec, lambda _: rows)
    return either(kind, lambda: backend.pack(rows, codec), lambda: codec.pack(rows), alike)


def search(unit: torch.Tensor, tables: trellis.TrellisTables) -> torch.Tensor:
    """`code.trellis.closest_codes(unit, tables)`: uint8 [T, c] of float32 [T, c]."""
    by_torch = functools.partial(trellis.closest_codes, unit, tables)
    backend = backend_for("search", (unit, tables.levels), None)
    if backend is None:
        return by_torch()

    def alike(found: torch.Tensor, expected: torch.Tensor) -> bool:
        errors, least = (trellis.squared_error(unit, codes, tables) for codes in (found, expected))
        return found.shape == expected.shape and as_close(errors, least, unit.shape[-1])

    return either(("search", unit.device, backend.name), lambda: backend.search(unit, tables), by_torch, alike)


trellis.search_by(search)


def along(codec: Codec | None) -> str | None:
    """In the kind of a call: whether levels were chosen along a trellis."""
    return "trellis" if isinstance(codec, trellis.TrellisCodec) else None


def coded(keys: bool) -> str | None:
    """In the kind of a call: whether keys were coded before their rotation."""
    return "coded keys" if keys else None


def backend_for(
    operation: str, tensors: Sequence[torch.Tensor], codec: Codec | None, coded_keys: bool = False
) -> Backend | None:
    """The backend that serves a call with these tensors, or None where PyTorch does."""
    if torch.compiler.is_compiling():  # before anything that dynamo would have to look into
        return None
    backend = claiming(tensors)
    if backend is None or operation not in backend.operations:
        return None
    return backend if _refusal_of(backend, tensors, codec, coded_keys) is None else None


def claiming(tensors: Sequence[torch.Tensor]) -> Backend | None:
    """The backend whose calls with these tensors are, whether it serves them or not."""
    return next((backend for backend in BACKENDS if backend.claims(tensors)), None)


def refusal(tensors: Sequence[torch.Tensor], codec: Codec | None = None, coded_keys: bool = False) -> str | None:
    """Why PyTorch serves calls with these tensors, or None where a backend does.

    Args:
        tensors: of the call.
        codec: of the rows.
        coded_keys: whether keys were coded before their rotation.
    """
    backend = claiming(tensors)
    return "no backend serves this device" if backend is None else _refusal_of(backend, tensors, codec, coded_keys)


def _refusal_of(backend: Backend, tensors: Sequence[torch.Tensor], codec: Codec | None, coded_keys: bool) -> str | None:
    if _WITHOUT_KERNELS:
        return "KVSPLICE_KERNELS=torch leaves the kernels out"
    if torch.compiler.is_compiling():
        return "inside torch.compile PyTorch serves"
    if codec is not None:
        tensors = (*tensors, *codec.steps)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "gradients are on, and the kernels have none: run under torch.no_grad()"
    if codec is not None and codec.kind not in backend.codecs:
        return f"{backend.name} does not read rows of the codec {codec.kind!r}"
    if coded_keys and not backend.reads_coded_keys:
        return f"{backend.name} does not read keys that were coded before their rotation"
    return backend.refusal(tensors)


def verdicts() -> dict[str, str]:
    """By kind of call: "serves", or why the kernel was given up for it."""
    return {_title(kind): "serves" if good else _reasons.get(kind, "") for kind, good in _verdicts.items()}


def _title(kind: tuple[Any, ...]) -> str:
    return ", ".join(str(part) for part in kind if part not in (None, False))


def either(
    kind: tuple[Any, ...], by_kernel: Callable[[], Any], by_torch: Callable[[], Any], alike: Callable[[Any, Any], bool]
) -> Any:
    """What the kernel computes, or PyTorch.

    Args:
        kind: of the call. The first one of a kind is computed in both ways.
        by_kernel, by_torch: the two ways.
        alike: whether what the kernel gave is as good as what PyTorch did.
    """
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        kind = (*kind, "autocast")  # PyTorch computes other numbers there
    if kind in _verdicts:
        return _judged(kind, by_kernel, by_torch)
    expected = by_torch()
    if not _all_finite(expected):  # of what nobody can compare, nothing is learned
        return expected
    try:
        found = by_kernel()
        _verdicts[kind] = alike(found, expected)
        reason = "its result differs from that of PyTorch"
    except (KVSpliceError, MemoryError) as error:  # this call, not the kernel
        _warn_once(kind, f"{type(error).__name__}: {error}")
        return expected
    except Exception as error:  # whatever the compiler or driver of this machine raises
        _verdicts[kind], reason = False, f"{type(error).__name__}: {error}"
    if _verdicts[kind]:
        return found  # as in all later calls, to the last bit
    _reasons[kind] = reason
    logger.warning(
        "The kernel for %s is not used: %s. PyTorch serves instead, in this process. kvsplice_hf.explain(model) tells "
        "what that concerns.",
        _title(kind),
        reason,
    )
    return expected


def _judged(kind: tuple[Any, ...], by_kernel: Callable[[], Any], by_torch: Callable[[], Any]) -> Any:
    if not _verdicts[kind]:
        return by_torch()
    try:
        return by_kernel()
    except (KVSpliceError, MemoryError) as error:
        _warn_once(kind, f"{type(error).__name__}: {error}")
        return by_torch()


@functools.cache
def _warn_once(kind: tuple[Any, ...], reason: str) -> None:
    logger.warning(
        "The kernel for %s did not serve a call: %s. PyTorch has; others are not concerned.", _title(kind), reason
    )


def _all_finite(result: Any) -> bool:
    if isinstance(result, list):
        return all(map(_all_finite, result))
    tensors = result if isinstance(result, tuple) else (result,)
    # Sums over no row at all are the logarithm of nothing, and no sign of damage.
    return all(bool((torch.isfinite(t) | (t == -torch.inf)).all()) for t in tensors if t.is_floating_point())
