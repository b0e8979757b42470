"""All key heads of a layer with ordinary attention in one call of the C++ code: their steps, and their new rows.

What is the same at each step is put together once per layer: which tables there are, where they lie, and what is
prepared of the bases of keys. It is made again when a tensor of the splices is another one or lies elsewhere; and what
is prepared of keys, when the C++ code finds that their numbers have changed.

Legend: `B` sequences, `H` query heads, `K` key heads, `S` stored rows, `T` new tokens, `d`, `v` numbers of a key and of
a value.
"""

import ctypes
import weakref
from itertools import accumulate
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn

from kvsplice_hf.attend.backend import HeadsStep
from kvsplice_hf.attend.native import types
from kvsplice_hf.attend.native.calls import contiguous, reads, require_library, room, row_codec, run, transform_of
from kvsplice_hf.attend.native.keys import basis_of, columns_of, key_coding_of, turned_keys
from kvsplice_hf.attend.native.problems import longest_of, pages_of, read_in_order, splits_for, threads_for
from kvsplice_hf.attend.native.tables import packer_of
from kvsplice_hf.code.codec import RowCodec
from kvsplice_hf.code.heads import HeadSplices
from kvsplice_hf.code.projection import LearnedKVSplice
from kvsplice_hf.errors import ConfigError, UnsupportedError


# `kNotPrepared` of csrc/library.cpp.
_NOT_PREPARED = 2
# Products that a number costs that is packed along a trellis.
_PRODUCTS_PER_NUMBER = 1024


class PreparedHeads(NamedTuple):
    """What the C++ code is handed of the splices of a layer at each call.

    Attributes:
        identity: of the splices, and whether they were merged.
        aliases: of all their tensors: what is read stays in memory as long as this does.
        heads: the structures.
        row_bytes: of all heads together.
        sizes: numbers of a value and of a key; one pair, where all heads are alike.
        columns, key_products: how many columns of a row of all heads each query meets or mixes, and how many products
            decoding its keys takes.
        basis: of the first head whose keys are coded before their rotation; or None.
        in_memory: for products of float32, and of bf16 numbers: what is prepared, and the structures as they lie in
            memory. Filled when they are first needed.
        refusal: why the C++ code does not read these heads; or None.
    """

    identity: tuple[str, bool]
    aliases: list[torch.Tensor]
    heads: tuple[types.Head, ...]
    row_bytes: int
    sizes: frozenset[tuple[int, int]]
    columns: int
    key_products: int
    basis: types.Keys | None
    in_memory: dict[bool, tuple[torch.Tensor, torch.Tensor]]
    refusal: str | None


_known: "weakref.WeakKeyDictionary[HeadSplices, PreparedHeads]" = weakref.WeakKeyDictionary()
_PLAIN = frozenset({torch.Tensor, nn.Parameter})


def prepare_heads(splices: HeadSplices, identity: str) -> PreparedHeads:
    """What was put together of the splices of a layer, or is now. `identity` as in `HeadsStep`.

    The identity is all that is looked at: as long as it is the same, the tensors that were there when it was first seen
    hold the same numbers, wherever those of now lie.

    Raises:
        UnsupportedError: the C++ code does not read these heads.
    """
    known, seen = _known.get(splices), (identity or splices.identity, splices.is_merged)
    if known is None or known.identity != seen:
        known = _known[splices] = _look_at(splices, seen)
    if known.refusal is not None:
        raise UnsupportedError(known.refusal)
    return known


def _look_at(splices: HeadSplices, identity: tuple[str, bool]) -> PreparedHeads:
    tensors = [*splices.parameters(), *splices.buffers()]
    refusal = _refusal(splices, tensors)
    if refusal is not None:
        return _refused(identity, refusal)
    heads: list[types.Head] = []
    row_bytes = 0
    try:
        for splice in splices:
            heads.append(_head(splice, row_bytes))
            row_bytes += heads[-1].coding.packer.codec.row_bytes
    except ConfigError as error:  # PyTorch may read them
        return _refused(identity, str(error))
    basis = next((head.keys for head in heads if head.keys.dim), None)
    return PreparedHeads(
        identity=identity,
        aliases=[tensor.detach() for tensor in tensors],
        heads=tuple(heads),
        row_bytes=row_bytes,
        sizes=frozenset((head.coding.latent, head.coding.rotated) for head in heads),
        columns=sum(head.columns + head.mixed for head in heads),
        key_products=sum(head.keys.dim * head.keys.rank for head in heads),
        basis=basis,
        in_memory={},
        refusal=None,
    )


def _refused(identity: tuple[str, bool], reason: str) -> PreparedHeads:
    return PreparedHeads(identity, [], (), 0, frozenset(), 0, 0, None, {}, reason)


def _refusal(splices: HeadSplices, tensors: list[Any]) -> str | None:
    unread = next((tensor for tensor in tensors if not (type(tensor) in _PLAIN and tensor.is_cpu)), None)
    if unread is not None:
        return f"the C++ code does not read {type(unread).__name__}s on {unread.device}"
    weights = [tensor for head in splices for tensor in head.weights() if tensor is not None]
    odd = next((tensor for tensor in weights if not (reads(tensor) and tensor.is_contiguous())), None)
    if odd is not None:
        return f"the C++ code does not read projections in {odd.dtype} that lie like this"
    if not all(isinstance(head.codec, RowCodec) for head in splices):
        return f"the C++ code does not read rows of the codec {splices.codec.kind if splices.codec else None!r}"
    if any(head.code_norm is not None for head in splices):
        return "the C++ code does not normalise codes"
    if not splices.is_affine:
        return "the C++ code does not bend numbers by splines"
    return None


def _head(splice: LearnedKVSplice, first_byte: int) -> types.Head:
    """One head, from what its splice holds.

    Raises:
        ConfigError: it holds something else than `calibration` makes.
    """
    assert splice.codec is not None
    codec, weights = row_codec(splice.codec), splice.weights()
    keys = None if splice.keys is None else splice.keys.weights()
    rank, latent_dim = weights.compress.shape
    rotated = codec.row_dim - rank if keys is None else len(keys.mean)
    basis = types.NO_KEYS if keys is None else basis_of(keys, codec, rotated, splice.value_dim)
    fits = basis is not None and (splice.predicted_from == 0 or len(codec.sigmas) == rank)
    if basis is None or not fits:
        raise ConfigError(
            f"Got a key head of {latent_dim} numbers, coded by {rank}, with keys of {rotated}, and a codec of rows of "
            f"{codec.row_dim} numbers; the library reads heads of which all that is ahead of the key, and nothing "
            "else, shares a gain."
        )
    one_token = torch.Size((1, 1, 1))
    turns = None if keys is None else torch.empty(1, 1, 1, rotated // 2, dtype=torch.uint8, device="cpu")
    columns, mixed = columns_of(codec, keys, splice.value_dim)
    coding = types.Encoding(
        tokens=1,
        latent=latent_dim,
        rank=rank,
        rotated=rotated,
        latents=types.NO_NUMBERS,
        rotations=types.NO_NUMBERS,
        transform=transform_of(weights),
        compress=types.numbers_of(weights.compress, rank * latent_dim),
        expand=types.numbers_of(weights.expand, latent_dim * splice.value_dim),
        predicted=splice.predicted_from,
        keys=key_coding_of(keys, turns, torch.Size((*one_token, rotated)), one_token)._replace(turns=0, turned=0),
        kind=types.KINDS[torch.uint8],
        packer=packer_of(codec),
        rows=0,
        threads=1,
    )
    return types.Head(coding, basis, columns, mixed, first_byte)


def heads_in_memory(known: PreparedHeads, in_bf16: bool) -> int:
    """Where the structures of the heads lie, with what is prepared of them for products of one kind."""
    if in_bf16 not in known.in_memory:
        _prepare(known, in_bf16)
    return known.in_memory[in_bf16][1].data_ptr()


def _prepare(known: PreparedHeads, in_bf16: bool) -> None:
    library = require_library()
    sizes = [library.kvsplice_prepared_size(types.as_bytes(head)) for head in known.heads]
    starts = list(accumulate(sizes, initial=0))
    numbers = torch.empty(starts[-1], dtype=torch.float32, device="cpu")
    heads = [
        head._replace(prepared=numbers.data_ptr() + numbers.itemsize * start)
        for head, start in zip(known.heads, starts, strict=False)
    ]
    for head in heads:
        library.kvsplice_prepare(types.as_bytes(head), ctypes.c_int64(in_bf16))
    packed = torch.frombuffer(bytearray(b"".join(map(types.as_bytes, heads))), dtype=torch.uint8)
    # Put in place when it is done: another thread may be in the middle of a call with those of before.
    known.in_memory[in_bf16] = numbers, packed


_OnHeads: TypeAlias = types.HeadsDecoding | types.HeadsEncoding | types.HeadsReading


def run_heads(function: Any, known: PreparedHeads, in_bf16: bool, given: _OnHeads) -> None:
    """Call the library with the structures of `heads_in_memory`.

    Where somebody has written to the parameters since, prepare once more.
    """
    if run(function, given) == _NOT_PREPARED:
        _prepare(known, in_bf16)
        run(function, _with_heads(given, heads_in_memory(known, in_bf16)))


def _with_heads(given: _OnHeads, heads: int) -> _OnHeads:
    if isinstance(given, types.HeadsReading):
        return given._replace(stored=given.stored._replace(heads=heads))
    return given._replace(heads=heads)


def decode_heads(step: HeadsStep, known: PreparedHeads) -> torch.Tensor:
    """The attention output of one new token per sequence, in float32: [B, 1, H, v].

    Raises:
        ConfigError: shapes, dtypes or strides other than those of a `HeadsStep`.
        UnsupportedError: the library is not there.
    """
    library = require_library()
    _check(step, known)
    (batch, heads, _, key), count = step.query.shape, len(known.heads)
    value, rows = known.heads[0].coding.latent, step.rows
    # Kept by name until the library is done: it sees addresses only.
    query, bias = step.query.float().contiguous(), read_in_order(step.bias, rows, 1)
    sinks = None if step.sinks is None else step.sinks.float().contiguous()
    exact, positions = contiguous(step.exact), contiguous(step.positions)
    stored = rows.shape[-2] if step.paging is None else longest_of(step.paging, rows, step.bias, batch)
    output, keys = room(batch, 1, heads, value), keys_of_rows(batch, stored, step.turns, known)
    queries, in_bf16 = heads // count, step.query.dtype is torch.bfloat16
    threads = threads_for(batch * stored * (queries * known.columns + known.key_products))
    of_exact = types.numbers_of(exact, 0 if exact is None else exact.numel())  # its sizes are checked above
    given = types.HeadsDecoding(
        count_=count,
        heads=heads_in_memory(known, in_bf16),
        in_bf16=in_bf16,
        batch=batch,
        queries=queries,
        rows=stored,
        value=value,
        key=key,
        data=rows.data_ptr(),
        batch_stride=rows.stride(0),
        row_stride=rows.stride(-2),
        **pages_of(rows, step.paging),
        query=query.data_ptr(),
        scaling=step.scaling,
        bias=0 if bias is None else bias.data_ptr(),
        bias_batch_stride=0 if bias is None or bias.shape[0] == 1 else bias.stride(0),
        table=keys.table,
        table_stride=keys.table_stride,
        table_slots=keys.table_slots,
        slots=keys.slots,
        slots_stride=keys.slots_stride,
        splits=splits_for(threads, batch, count * stored),
        threads=threads,
        hidden=0 if positions is None else positions.data_ptr(),
        hidden_count=0 if positions is None else positions.shape[1],
        exact=of_exact.data,
        exact_is_bfloat16=of_exact.is_bfloat16,
        sinks=0 if sinks is None else sinks.data_ptr(),
        output=output.data_ptr(),
    )
    run_heads(library.kvsplice_decode_heads, known, in_bf16, given)
    return output


def keys_of_rows(
    batch: int, stored: int, turns: tuple[torch.Tensor, torch.Tensor] | None, known: PreparedHeads
) -> types.Keys:
    """The table and the slots of the keys of S rows of each of B sequences.

    Raises:
        ConfigError: these are not those of the rows.
    """
    if known.basis is None:
        return types.NO_KEYS
    keys = turns and turned_keys(known.basis, *turns, batch, stored)
    if keys is None:
        found = turns and [[tensor.dtype, *tensor.shape] for tensor in turns]
        raise ConfigError(f"Got {found} for the rotations of {stored} rows of {batch} sequences each.")
    return keys


def lie_as_rows(rows: torch.Tensor, known: PreparedHeads) -> bool:
    """Whether these are rows of the heads, uint8 [B, 1, S, bytes], each in one piece."""
    return (
        rows.dim() == 4
        and rows.shape[1] == 1
        and rows.shape[2] > 0
        and rows.shape[3] == known.row_bytes
        and rows.stride(3) == 1
        and rows.dtype is torch.uint8
        and rows.is_cpu
    )


def _check(step: HeadsStep, known: PreparedHeads) -> None:
    """Refuse tensors that the library would read beyond."""
    batch, heads, tokens, width = step.query.shape
    value = known.heads[0].coding.latent
    fits = (
        tokens == 1
        and batch > 0
        and heads % len(known.heads) == 0
        and known.sizes == {(value, width)}
        and (step.rows.shape[0] == batch or step.paging is not None)
        and lie_as_rows(step.rows if step.paging is None else step.rows[:, None], known)
        and (step.sinks is None or step.sinks.numel() == heads)
    )
    if step.exact is not None:
        kept = None if step.positions is None or step.positions.dtype is not torch.int64 else step.positions.shape
        exact_width = len(known.heads) * (value + width)
        fits = fits and kept is not None and kept[0] == batch and step.exact.shape == (*kept, exact_width)
    if not fits:
        found = {name: list(part.shape) for name, part in step._asdict().items() if isinstance(part, torch.Tensor)}
        raise ConfigError(
            f"Got {found} for {len(known.heads)} key heads of {sorted(known.sizes)} numbers (values, keys) in rows of "
            f"{known.row_bytes} bytes, side by side."
        )


def encode_heads(
    known: PreparedHeads, values: torch.Tensor, keys: torch.Tensor, turns: torch.Tensor | None
) -> torch.Tensor:
    """Rows uint8 [B, 1, T, bytes] of values [B, K, T, v] and keys [B, K, T, d], with angles [B or 1, 1, T, d / 2].

    Raises:
        ConfigError: shapes or dtypes other than these.
        UnsupportedError: the library is not there.
    """
    library = require_library()
    batch, count, tokens, width = keys.shape
    values, keys, turns = _in_lines(values), _in_lines(keys), contiguous(turns)
    pairs, shape = width // 2, None if turns is None else turns.shape
    turned = shape in ((batch, 1, tokens, pairs), (1, 1, tokens, pairs))
    fits = (
        count == len(known.heads) and known.sizes == {(values.shape[-1], width)} and values.shape[:3] == keys.shape[:3]
    )
    if not fits or (known.basis is not None and not turned):
        raise ConfigError(
            f"Got values {list(values.shape)} and keys {list(keys.shape)}, turned by {shape and list(shape)}, for "
            f"{len(known.heads)} key heads of {sorted(known.sizes)} numbers (values, keys)."
        )
    in_bf16 = keys.dtype is torch.bfloat16
    rows = torch.empty(batch, 1, tokens, known.row_bytes, dtype=torch.uint8, device="cpu")
    given = types.HeadsEncoding(
        count_=count,
        heads=heads_in_memory(known, in_bf16),
        in_bf16=in_bf16,
        batch=batch,
        tokens=tokens,
        values=values.data_ptr(),
        values_are_bfloat16=values.dtype is torch.bfloat16,
        keys=keys.data_ptr(),
        keys_are_bfloat16=keys.dtype is torch.bfloat16,
        values_from_sequence=values.stride(0),
        values_from_head=values.stride(1),
        values_from_token=values.stride(2),
        keys_from_sequence=keys.stride(0),
        keys_from_head=keys.stride(1),
        keys_from_token=keys.stride(2),
        turns=0 if turns is None else turns.data_ptr(),
        turns_stride=0 if turns is None or turns.shape[0] == 1 else turns.stride(0),
        rows=rows.data_ptr(),
        row_bytes=known.row_bytes,
        threads=min(batch * count * tokens, threads_for(_PRODUCTS_PER_NUMBER * (keys.numel() + values.numel()))),
    )
    run_heads(library.kvsplice_encode_heads, known, in_bf16, given)
    return rows


def _in_lines(tensor: torch.Tensor) -> torch.Tensor:
    """With the numbers of a token side by side.

    Raises:
        ConfigError: the library does not read such numbers.
    """
    if not reads(tensor):
        raise ConfigError(
            f"Got values or keys in {tensor.dtype} on {tensor.device}; the library reads float32 and bf16."
        )
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
