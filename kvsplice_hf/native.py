"""Attention over stored rows in C++, for the CPU. The source is in `csrc`; what it computes is that of `streaming`.

The library knows nothing of PyTorch: it is handed addresses and sizes.

Legend: as in `streaming`.
"""

import contextlib
import ctypes
import functools
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import nn

from kvsplice_hf.codec import RowCodec, gain_factors
from kvsplice_hf.errors import ConfigError, UnsupportedError
from kvsplice_hf.native_library import load_library


_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}
# Parts per thread that the rows are split into, so that a thread that is held up leaves the others something to do; and
# rows below which a part is not worth its share of the work around it.
_PARTS_PER_THREAD = 2
_SMALLEST_PART = 128
# Products that are worth waking another thread for.
_PRODUCTS_PER_THREAD = 1 << 17
# What a number costs that is packed.
_PRODUCTS_PER_LOGARITHM = 64


class _Codec(ctypes.Structure):
    """`Codec` of csrc/packed.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("coded", "raw", "gained", "has_gain", "row_bytes")),
        *((name, ctypes.c_void_p) for name in ("fields", "slopes", "starts", "reaches", "gains")),
        *((name, ctypes.c_void_p) for name in ("index", "scales", "centres", "widths")),
    ]


class _Problem(ctypes.Structure):
    """`Problem` of csrc/attend.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "queries", "rows", "dim", "values", "kind")),
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch_stride", "row_stride")),
        ("query", ctypes.c_void_p),
        ("scaling", ctypes.c_double),
        ("bias", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("bias_queries", "bias_batch_stride", "bias_query_stride")),
        *((name, ctypes.c_int64) for name in ("columns", "mixed")),
        ("codec", _Codec),
        *((name, ctypes.c_int64) for name in ("splits", "threads")),
        ("hidden", ctypes.c_void_p),
        ("hidden_count", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("room", "output", "sizes")),
    ]


class _Numbers(ctypes.Structure):
    """`Numbers` of csrc/decode.h."""

    _fields_ = [("data", ctypes.c_void_p), ("is_bfloat16", ctypes.c_int64)]


class _Decoding(ctypes.Structure):
    """`Decoding` of csrc/decode.h."""

    _fields_ = [
        ("rows", _Problem),
        *((name, ctypes.c_int64) for name in ("latent", "rank", "rotated", "nope", "value")),
        ("query", ctypes.c_void_p),
        *((name, _Numbers) for name in ("keys", "values")),
        ("head_stride", ctypes.c_int64),
        ("expand", _Numbers),
        *((name, ctypes.c_void_p) for name in ("divisors", "offset")),
        ("exact", _Numbers),
        *((name, ctypes.c_void_p) for name in ("sinks", "room", "output")),
    ]


class _Packing(ctypes.Structure):
    """`Packing` of csrc/pack.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("count", "dim")),
        *((name, ctypes.c_void_p) for name in ("rows", "packed")),
        ("codec", _Codec),
        ("sized", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("sigmas", "bends")),
        ("threads", ctypes.c_int64),
    ]


def kernels_available(device: torch.device | str) -> bool:
    """Whether the library serves tensors of this device: on a CPU, where it could be compiled."""
    return torch.device(device).type == "cpu" and load_library() is not None


def reads(tensor: torch.Tensor) -> bool:
    """Whether a tensor has an address, a dtype that the library knows, and anything in it."""
    has_address = type(tensor) in (torch.Tensor, nn.Parameter)  # not sharded, fake or wrapped
    return has_address and tensor.dtype in _KINDS and tensor.numel() > 0


def attend_rows(
    query: torch.Tensor, rows: torch.Tensor, value_dim: int, bias: torch.Tensor | None = None, *, scaling: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of M queries over the same S rows, whose first numbers are the values. Products are taken in float32.

    Args:
        query: [B, M, n], of any float type.
        rows: float32 or bfloat16 [B, S, n], the last dimension contiguous. The others may have any strides.
        value_dim: r.
        bias: added to the scores, float32 [B or 1, T, S] with M = H * T or T = 1: query m reads row m % T.
        scaling: factor on the scores, before the bias.

    Returns:
        What `Attended` holds: float32 [B, M, r] and [B, M].

    Raises:
        ConfigError: shapes, dtypes or strides other than these.
        UnsupportedError: the library is not there.
    """
    if rows.dtype not in (torch.float32, torch.bfloat16) or rows.shape[-1] != query.shape[-1]:
        raise ConfigError(
            f"Got rows of {rows.shape[-1]} numbers, {rows.dtype}; the library reads float32 and bfloat16, and these "
            f"queries have {query.shape[-1]} numbers."
        )
    return _attend(query, rows, None, value_dim, bias, scaling)


def attend_packed(
    query: torch.Tensor,
    packed: torch.Tensor,
    codec: RowCodec,
    value_dim: int,
    bias: torch.Tensor | None = None,
    *,
    scaling: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend_rows` on rows uint8 [B, S, row_bytes] that `codec` packed. Arguments and result are otherwise those.

    Raises:
        ConfigError: shapes, dtypes or strides other than these, or rows of another codec.
        UnsupportedError: the library is not there.
    """
    found = (packed.dtype, packed.shape[-1], query.shape[-1])
    needed = (torch.uint8, codec.row_bytes, codec.row_dim)
    if found != needed:
        raise ConfigError(f"Got rows {found[:2]} and queries of {found[2]} numbers; this codec needs {needed}.")
    return _attend(query, packed, codec, value_dim, bias, scaling)


class Step(NamedTuple):
    """One new query per sequence and head, and what it is to attend to. See `absorbed` for the letters.

    Attributes:
        query: [B, H, N + P], the last P numbers rotated.
        rows: the stored rows, [B, S, r + P], or packed [B, S, row_bytes].
        codec: of the rows, or None where they are numbers.
        keys, values: the halves of `kv_b_proj`, [H, N, R] and [H, V, R].
        expand: [R, r], with `divisors` [R] or None, and `offset` [R]: a latent is `expand z / divisors + offset`.
        exact: latents of exact tokens [B, K, R], and where rows are packed their P rotated numbers behind; or None.
        positions: which rows are those, [B, K]; outside [0, S) where there is none.
        bias: added to the scores, float32 [B or 1, 1, S]; or None.
        sinks: one logit per head, [H], that carries no value; or None.
        scaling: factor on the scores.
    """

    query: torch.Tensor
    rows: torch.Tensor
    codec: RowCodec | None
    keys: torch.Tensor
    values: torch.Tensor
    expand: torch.Tensor
    divisors: torch.Tensor | None
    offset: torch.Tensor
    exact: torch.Tensor | None
    positions: torch.Tensor | None
    bias: torch.Tensor | None
    sinks: torch.Tensor | None
    scaling: float

    @property
    def numbers(self) -> list[torch.Tensor]:
        """All tensors but the positions."""
        return [tensor for name, tensor in self._asdict().items() if name != "positions" and _is_tensor(tensor)]


def _is_tensor(value: object) -> TypeGuard[torch.Tensor]:
    return isinstance(value, torch.Tensor)


def decode(step: Step) -> torch.Tensor:
    """The attention output of one new token per sequence, in float32: [B, 1, H, V].

    Raises:
        ConfigError: shapes, dtypes or strides other than those of a `Step`.
        UnsupportedError: the library is not there.
    """
    library = _require_library()
    batch, heads, width = step.query.shape
    latent_dim, rank = step.expand.shape
    nope_dim = step.keys.shape[1]
    query, bias = step.query.float().contiguous(), _read_in_order(step.bias, step.rows, heads)
    rows = _problem(step.rows, step.codec, batch, heads, rank + width - nope_dim, rank, bias, step.scaling)
    output = torch.empty(batch, 1, heads, step.values.shape[1])
    # Kept by name until the library is done: it sees addresses only.
    keys, values = step.keys, step.values
    if keys.stride() != values.stride() or keys.stride()[1:] != (latent_dim, 1) or keys.dtype != values.dtype:
        keys, values = _one_after_the_other(keys, values)
    expand, offset = step.expand.contiguous(), step.offset.float().contiguous()
    divisors, sinks = _floats(step.divisors), _floats(step.sinks)
    exact, positions = step.exact, step.positions
    if exact is not None and positions is not None:
        exact, positions = exact.contiguous(), positions.contiguous()
        rows.hidden, rows.hidden_count = positions.data_ptr(), positions.shape[1]
    rows.threads = max(rows.threads, _threads(batch * (keys.numel() + values.numel())))
    given = _Decoding(
        rows=rows,
        latent=latent_dim,
        rank=rank,
        rotated=width - nope_dim,
        nope=nope_dim,
        value=values.shape[1],
        query=query.data_ptr(),
        keys=_numbers(keys),
        values=_numbers(values),
        head_stride=keys.stride(0),
        expand=_numbers(expand),
        divisors=_address(divisors),
        offset=offset.data_ptr(),
        exact=_numbers(exact),
        sinks=_address(sinks),
        output=output.data_ptr(),
    )
    room = torch.empty(library.kvsplice_decode_room(ctypes.byref(given)))
    given.room = room.data_ptr()
    _run(library.kvsplice_decode, given)
    return output


def _one_after_the_other(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same halves as views of one contiguous tensor."""
    together = torch.cat([keys, values.to(keys.dtype)], dim=1)
    return together[:, : keys.shape[1]], together[:, keys.shape[1] :]


def _floats(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _numbers(tensor: torch.Tensor | None) -> _Numbers:
    if tensor is not None and tensor.dtype not in (torch.float32, torch.bfloat16):
        raise ConfigError(f"Got {tensor.dtype}; the library reads float32 and bfloat16.")
    return _Numbers(_address(tensor), tensor is not None and tensor.dtype == torch.bfloat16)


def encode_pack(rows: torch.Tensor, codec: RowCodec) -> torch.Tensor:
    """`codec.pack(rows)`: uint8 [..., row_bytes] of rows [..., n], of any float type.

    Its logarithms are not those of torch to the last bit, so about one code in a million, at the border of two cells,
    comes out as the other.

    Raises:
        ConfigError: rows of other than n numbers.
        UnsupportedError: the library is not there.
    """
    if rows.shape[-1] != codec.row_dim:
        raise ConfigError(f"Got rows of {rows.shape[-1]} numbers; this codec packs rows of {codec.row_dim}.")
    numbers = rows.detach().float().contiguous()
    packed = torch.empty(*rows.shape[:-1], codec.row_bytes, dtype=torch.uint8)
    packing = _Packing(
        count=rows.numel() // codec.row_dim,
        dim=codec.row_dim,
        rows=numbers.data_ptr(),
        packed=packed.data_ptr(),
        codec=_described(codec),
        sized=len(codec.sigmas),
        sigmas=codec.sigmas.data_ptr(),
        bends=codec._bends.data_ptr(),
        threads=_threads(_PRODUCTS_PER_LOGARITHM * rows.numel()),
    )
    _run(_require_library().kvsplice_pack, packing)
    return packed


def _require_library() -> ctypes.CDLL:
    library = load_library()
    if library is None:
        raise UnsupportedError("The C++ code could not be compiled on this machine; a warning has said why.")
    return library


def _described(codec: RowCodec) -> _Codec:
    has_gain = len(codec.sigmas) > 0
    return _Codec(
        coded=len(codec.column_starts),
        raw=len(codec.column_index) - len(codec.column_starts),
        gained=codec.gained_columns if has_gain else 0,
        has_gain=has_gain,
        row_bytes=codec.row_bytes,
        fields=codec.column_fields.data_ptr(),
        slopes=codec.column_slopes.data_ptr(),
        starts=codec.column_starts.data_ptr(),
        reaches=codec.column_reaches.data_ptr(),
        gains=_gains().data_ptr(),
        index=codec.column_index.data_ptr(),
        scales=codec.scales.data_ptr(),
        centres=codec.centres.data_ptr(),
        widths=codec.widths.data_ptr(),
    )


@functools.cache
def _gains() -> torch.Tensor:
    return gain_factors(torch.arange(256))


def _attend(
    query: torch.Tensor,
    rows: torch.Tensor,
    codec: RowCodec | None,
    value_dim: int,
    bias: torch.Tensor | None,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    library = _require_library()
    batch, queries, dim = query.shape
    query, bias = query.float().contiguous(), _read_in_order(bias, rows, queries)
    problem = _problem(rows, codec, batch, queries, dim, value_dim, bias, scaling)
    output, sizes = torch.empty(batch, queries, value_dim), torch.empty(batch, queries)
    room = torch.empty(library.kvsplice_attend_room(ctypes.byref(problem)))
    problem.query, problem.output, problem.sizes = query.data_ptr(), output.data_ptr(), sizes.data_ptr()
    problem.room = room.data_ptr()
    _run(library.kvsplice_attend, problem)
    return output, sizes


def _run(function: Any, given: ctypes.Structure) -> None:
    # Under a name of its own, so that a profile shows the time; without a profile the name alone would cost some.
    profiled = getattr(torch.autograd.profiler, "_is_profiler_enabled", False)
    name = function.__name__.replace("_", "::", 1)
    with torch.profiler.record_function(name) if profiled else contextlib.nullcontext():
        failed = function(ctypes.byref(given))
    if failed:
        raise MemoryError("The C++ code got no memory for the rows that it unpacks.")


def _problem(
    rows: torch.Tensor,
    codec: RowCodec | None,
    batch: int,
    queries: int,
    dim: int,
    value_dim: int,
    bias: torch.Tensor | None,
    scaling: float,
) -> _Problem:
    """All but what is computed and where: `query`, `output`, `sizes` and `room`."""
    if rows.stride(-1) != 1 or rows.shape[0] != batch:
        raise ConfigError(f"Got rows {list(rows.shape)} with strides {rows.stride()} for {batch} sequences of queries.")
    columns, mixed = dim, value_dim
    if codec is not None:
        columns, mixed = len(codec.column_index), codec.value_columns(value_dim)
    threads = _threads(batch * queries * rows.shape[1] * (columns + mixed))
    return _Problem(
        batch=batch,
        queries=queries,
        rows=rows.shape[1],
        dim=dim,
        values=value_dim,
        kind=_KINDS[rows.dtype],
        data=rows.data_ptr(),
        batch_stride=rows.stride(0) * rows.itemsize,
        row_stride=rows.stride(1) * rows.itemsize,
        scaling=scaling,
        bias=_address(bias),
        bias_queries=1 if bias is None else bias.shape[1],
        bias_batch_stride=0 if bias is None or bias.shape[0] == 1 else bias.stride(0),
        bias_query_stride=0 if bias is None else bias.stride(1),
        columns=columns,
        mixed=mixed,
        codec=_Codec() if codec is None else _described(codec),
        splits=max(1, min(-(-_PARTS_PER_THREAD * threads // batch), rows.shape[1] // _SMALLEST_PART)),
        threads=threads,
    )


def _threads(products: int) -> int:
    return max(1, min(torch.get_num_threads(), products // _PRODUCTS_PER_THREAD))


def _read_in_order(bias: torch.Tensor | None, rows: torch.Tensor, queries: int) -> torch.Tensor | None:
    """The bias with its keys side by side.

    Raises:
        ConfigError: it does not fit.
    """
    if bias is None:
        return None
    if bias.dim() != 3 or bias.shape[0] not in (1, rows.shape[0]) or bias.shape[2] != rows.shape[1]:
        raise ConfigError(f"Got a bias {list(bias.shape)} for rows {list(rows.shape[:2])}; it must be [B or 1, T, S].")
    if queries % bias.shape[1]:
        raise ConfigError(f"Got a bias for {bias.shape[1]} tokens and {queries} queries; these must be a multiple.")
    bias = bias.float()
    return bias if bias.stride(-1) == 1 else bias.contiguous()
