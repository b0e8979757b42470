"""Attention over stored rows, and what makes rows, in C++ for the CPU.

The source is in `csrc`; it computes what `attend.reference`, `patch.absorbed`, `code.projection` and `code.codec` do.

The library knows nothing of PyTorch: it is handed addresses and sizes.

Legend: as in `attend.backend`.
"""

import ctypes
from typing import Any

import torch
from torch import nn

from kvsplice_hf.attend.backend import CodedKeys, Step
from kvsplice_hf.attend.native import types
from kvsplice_hf.attend.native.keys import contiguous_keys, key_coding_of
from kvsplice_hf.attend.native.library import load_library
from kvsplice_hf.attend.native.problems import problem_of, read_in_order, threads_for
from kvsplice_hf.attend.native.tables import packer_of, trellis_of
from kvsplice_hf.code.codec import RowCodec
from kvsplice_hf.code.codecs import Codec
from kvsplice_hf.code.keys import KeyWeights
from kvsplice_hf.code.projection import SpliceWeights
from kvsplice_hf.code.trellis import TrellisTables
from kvsplice_hf.errors import ConfigError, UnsupportedError


# What a number costs that is packed.
_PRODUCTS_PER_LOGARITHM = 64
# Of tables of a trellis: `kColumnsRead` of csrc/trellis.h.
_COLUMNS_READ = 64


def kernels_available(device: torch.device | str) -> bool:
    """Whether the library serves tensors of this device: on a CPU, where it could be compiled."""
    # Each call asks; to make a device of a name takes longer than all else.
    return (device == "cpu" or torch.device(device).type == "cpu") and load_library() is not None


def reads(tensor: torch.Tensor) -> bool:
    """Whether a tensor lies in the memory of the CPU, has a dtype that the library knows, and anything in it."""
    has_address = type(tensor) in (torch.Tensor, nn.Parameter)  # not sharded, fake or wrapped
    return has_address and tensor.is_cpu and tensor.dtype in types.KINDS and tensor.numel() > 0


def attend_rows(
    query: torch.Tensor, rows: torch.Tensor, value_dim: int, bias: torch.Tensor | None = None, *, scaling: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of M queries over the same S rows, whose first numbers are the values.

    Sums are float32, and so are products; those of bf16 queries are taken in bf16 where the processor has the
    instructions and the rows are packed or in bf16.

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
    return _attend(query, rows, None, value_dim, bias, scaling, None)


def attend_packed(
    query: torch.Tensor,
    packed: torch.Tensor,
    codec: RowCodec,
    value_dim: int,
    bias: torch.Tensor | None = None,
    *,
    scaling: float = 1.0,
    keys: CodedKeys | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend_rows` on rows uint8 [B, S, row_bytes] that `codec` packed. Arguments and result are otherwise those.

    `keys` says how their keys are read, where they were coded before their rotation.

    Raises:
        ConfigError: shapes, dtypes or strides other than these, or rows of another codec.
        UnsupportedError: the library is not there.
    """
    found = (packed.dtype, packed.shape[-1], query.shape[-1])
    dim = codec.row_dim if keys is None else value_dim + len(keys.mean)
    needed = (torch.uint8, codec.row_bytes, dim)
    if found != needed:
        raise ConfigError(f"Got rows {found[:2]} and queries of {found[2]} numbers; this codec needs {needed}.")
    return _attend(query, packed, codec, value_dim, bias, scaling, contiguous_keys(keys))


def decode(step: Step) -> torch.Tensor:
    """The attention output of one new token per sequence, in float32: [B, 1, H, V].

    Raises:
        ConfigError: shapes, dtypes or strides other than those of a `Step`.
        UnsupportedError: the library is not there.
    """
    library = require_library()
    # Kept by name until the library is done: it sees addresses only.
    projection, weight = _contiguous(step.projection), step.weight.contiguous()
    codec = None if step.codec is None else row_codec(step.codec)
    batch, heads, _, width = step.query.shape
    latent_dim, rank = projection.expand.shape
    nope_dim = weight.shape[0] // heads - step.v_dim
    dim = rank + width - nope_dim
    _check_step(step, dim)
    query, bias = step.query.float().contiguous(), read_in_order(step.bias, step.rows, heads)
    sinks = None if step.sinks is None else step.sinks.float().contiguous()
    exact, positions, keys = step.exact, step.positions, contiguous_keys(step.keys)
    if exact is not None and positions is not None:
        exact, positions = exact.contiguous(), positions.contiguous()
    output = room(batch, 1, heads, step.v_dim)
    rows = problem_of(
        step.rows,
        codec,
        batch,
        heads,
        dim,
        rank,
        bias,
        step.scaling,
        in_bf16=step.query.dtype is torch.bfloat16,
        keys=keys,
        hidden=positions,
        paging=step.paging,
        other_products=batch * weight.numel(),
    )
    given = types.Decoding(
        rows=rows,
        latent=latent_dim,
        rank=rank,
        rotated=width - nope_dim,
        nope=nope_dim,
        value=step.v_dim,
        query=types.address(query, torch.float32, batch * heads * width),
        weight=types.numbers_of(weight, heads * (nope_dim + step.v_dim) * latent_dim),
        expand=types.numbers_of(projection.expand, latent_dim * rank),
        transform=transform_of(projection),
        exact=types.numbers_of(exact, 0 if exact is None else exact.numel()),  # its sizes are checked above
        sinks=types.address(sinks, torch.float32, heads),
        output=types.address(output, torch.float32, batch * heads * step.v_dim),
    )
    run(library.kvsplice_decode, given)
    return output


def row_codec(codec: Codec) -> RowCodec:
    """The codec of rows, of the one kind that the library reads.

    Raises:
        ConfigError: it is of another kind.
    """
    if isinstance(codec, RowCodec):
        return codec
    raise ConfigError(f"Got rows of the codec {codec.kind!r}; the library reads those of {RowCodec.kind!r}.")


def _contiguous(weights: SpliceWeights) -> SpliceWeights:
    return SpliceWeights._make(map(contiguous, weights))


def transform_of(weights: SpliceWeights) -> types.Transform:
    count = weights.expand.shape[0]
    scale, shift, offset = (
        types.numbers_of(tensor, count) for tensor in (weights.scale, weights.shift, weights.offset)
    )
    return types.Transform(scale, shift, offset)


def room(*sizes: int) -> torch.Tensor:
    """Where the library writes float32 numbers."""
    return torch.empty(*sizes, dtype=torch.float32, device="cpu")


def _check_step(step: Step, dim: int) -> None:
    """Refuse tensors that the library would read beyond; `dim` numbers are a row."""
    batch, heads, _, width = step.query.shape
    latent_dim, rank = step.projection.expand.shape
    codec = None if step.codec is None else row_codec(step.codec)
    exact, positions = step.exact, step.positions
    row_width = dim if codec is None else codec.row_bytes
    exact_width = latent_dim + (0 if codec is None else dim - rank)
    fits = (
        step.query.shape[2] == 1
        and batch > 0
        and step.rows.shape[-2] > 0
        and step.rows.shape[-1] == row_width
        and step.rows.dtype is (torch.uint8 if codec is not None else step.rows.dtype)
        and (codec is not None or step.rows.dtype in (torch.float32, torch.bfloat16))
        and (codec is None or step.keys is not None or codec.row_dim == dim)
        and step.weight.shape[0] % heads == 0
        and step.weight.shape[1] == latent_dim
        and rank <= dim <= rank + width
        and (step.sinks is None or step.sinks.numel() == heads)
    )
    if exact is not None:
        kept = None if positions is None or positions.dtype is not torch.int64 else positions.shape
        fits = fits and kept is not None and kept[0] == batch and exact.shape == (*kept, exact_width)
    if not fits:
        sizes = {name: list(value.shape) for name, value in step._asdict().items() if isinstance(value, torch.Tensor)}
        raise ConfigError(
            f"Got {sizes} with values of {step.v_dim} numbers, for a projection of {latent_dim} numbers to {rank}"
            + ("." if codec is None else f" and a codec of rows of {codec.row_dim} numbers, {codec.row_bytes} bytes.")
        )


def encode(
    latent: torch.Tensor,
    k_rot: torch.Tensor,
    projection: SpliceWeights,
    codec: RowCodec | None = None,
    keys: KeyWeights | None = None,
    turns: torch.Tensor | None = None,
) -> torch.Tensor:
    """The rows that a cache stores of latents [..., R] and rotated keys [..., P]; see `LearnedKVSplice.rows`.

    Products are taken in float32, and rounded where PyTorch rounds.

    Args:
        latent, k_rot: float32 or bfloat16.
        projection: of the codes.
        codec: packs the rows; or None.
        keys: codes keys before their rotation; or None.
        turns: of the keys, where they are coded: uint8 [..., F], or of one sequence [1, ..., F] those of all.

    Returns:
        Rows [..., r + P] in the dtype of the latents, or [..., r + p] where keys are coded; or packed
        uint8 [..., row_bytes].

    Raises:
        ConfigError: shapes that do not fit, or other dtypes.
        UnsupportedError: the library is not there.
    """
    library = require_library()
    latent, k_rot, projection = latent.contiguous(), k_rot.contiguous(), _contiguous(projection)
    keys = None if keys is None else KeyWeights._make(tensor.contiguous() for tensor in keys)
    turns = contiguous(turns)
    rank, latent_dim = projection.compress.shape
    coding = key_coding_of(keys, turns, k_rot.shape, latent.shape[:-1])
    rotated = k_rot.shape[-1]
    dim, tokens = rank + (coding.rank or rotated), latent.numel() // latent_dim
    predicted = projection.expand.shape[1] - rank
    found, needed = (latent.shape[-1], latent.shape[:-1]), (latent_dim, k_rot.shape[:-1])
    fits = predicted == 0 or (codec is not None and predicted == coding.rank and len(codec.sigmas) == rank)
    if found != needed or (codec is not None and codec.row_dim != dim) or not fits:
        raise ConfigError(
            f"Got latents {list(latent.shape)} and rotated keys {list(k_rot.shape)} for a projection of "
            f"{latent_dim} numbers to {rank}"
            + ("." if codec is None else f" and a codec of rows of {codec.row_dim} numbers.")
        )
    width, dtype = (dim, latent.dtype) if codec is None else (codec.row_bytes, torch.uint8)
    rows = torch.empty(*latent.shape[:-1], width, dtype=dtype, device="cpu")
    given = types.Encoding(
        tokens=tokens,
        latent=latent_dim,
        rank=rank,
        rotated=rotated,
        latents=types.numbers_of(latent, tokens * latent_dim),
        rotations=types.numbers_of(k_rot, tokens * rotated),
        transform=transform_of(projection),
        compress=types.numbers_of(projection.compress, rank * latent_dim),
        expand=types.numbers_of(projection.expand, latent_dim * (rank + predicted)),
        predicted=predicted,
        keys=coding,
        kind=types.KINDS[dtype],
        packer=packer_of(codec),
        rows=types.address(rows, dtype, tokens * width),
        threads=threads_for(tokens * rank * latent_dim),
    )
    run(library.kvsplice_encode, given)
    return rows


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
    count = rows.numel() // codec.row_dim
    packed = torch.empty(*rows.shape[:-1], codec.row_bytes, dtype=torch.uint8, device="cpu")
    packing = types.Packing(
        count_=count,
        dim=codec.row_dim,
        rows=types.address(numbers, torch.float32, count * codec.row_dim),
        packed=types.address(packed, torch.uint8, count * codec.row_bytes),
        packer=packer_of(codec),
        threads=threads_for(_PRODUCTS_PER_LOGARITHM * rows.numel()),
    )
    run(require_library().kvsplice_pack, packing)
    return packed


def search(unit: torch.Tensor, tables: TrellisTables) -> torch.Tensor:
    """`closest_codes(unit, tables)`: uint8 [T, c] of float32 [T, c], nearly always the same.

    Raises:
        ConfigError: other dtypes, or tables that are not filled up.
        UnsupportedError: the library is not there.
    """
    count, columns = unit.shape
    if len(tables.widths) < columns or len(tables.widths) % _COLUMNS_READ:
        raise ConfigError(f"Got tables of {len(tables.widths)} columns for rows of {columns}.")
    numbers = unit.contiguous()
    codes = torch.empty(count, columns, dtype=torch.uint8, device="cpu")
    given = types.Search(
        count_=count,
        units=types.address(numbers, torch.float32, count * columns),
        trellis=trellis_of(tables, columns),
        codes=types.address(codes, torch.uint8, count * columns),
        threads=threads_for(_PRODUCTS_PER_LOGARITHM * unit.numel()),
    )
    run(require_library().kvsplice_search, given)
    return codes


def require_library() -> ctypes.CDLL:
    library = load_library()
    if library is None:
        raise UnsupportedError("The C++ code could not be compiled on this machine; a warning has said why.")
    return library


def _attend(
    query: torch.Tensor,
    rows: torch.Tensor,
    codec: RowCodec | None,
    value_dim: int,
    bias: torch.Tensor | None,
    scaling: float,
    keys: CodedKeys | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    library = require_library()
    batch, queries, dim = query.shape
    if value_dim > dim:
        raise ConfigError(f"Got {value_dim} values in rows of {dim} numbers.")
    if batch * queries * rows.shape[-2] == 0:  # nothing to attend to, or nobody
        return room(batch, queries, value_dim).zero_(), room(batch, queries).fill_(float("-inf"))
    in_bf16 = query.dtype is torch.bfloat16
    query, bias = query.float().contiguous(), read_in_order(bias, rows, queries)
    output, sizes = room(batch, queries, value_dim), room(batch, queries)
    problem = problem_of(
        rows,
        codec,
        batch,
        queries,
        dim,
        value_dim,
        bias,
        scaling,
        in_bf16=in_bf16,
        keys=keys,
        query=types.address(query, torch.float32, batch * queries * dim),
        output=types.address(output, torch.float32, batch * queries * value_dim),
        sizes=types.address(sizes, torch.float32, batch * queries),
    )
    run(library.kvsplice_attend, problem)
    return output, sizes


def contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def run(function: Any, given: Any) -> int:
    """Call the library with a structure; what it returned.

    Raises:
        MemoryError: it got none to work in.
    """
    handed = types.as_bytes(given)
    if getattr(torch.autograd.profiler, "_is_profiler_enabled", False):
        # Under a name of its own, so that a profile shows the time; without a profile the name alone would cost some.
        with torch.profiler.record_function(function.__name__.replace("_", "::", 1)):
            failed = function(handed)
    else:
        failed = function(handed)
    if failed == 1:
        raise MemoryError("The C++ code got no memory to work in.")
    return int(failed)
