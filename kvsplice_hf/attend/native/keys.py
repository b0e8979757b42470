"""Keys that were coded before their rotation, as the C++ code takes them.

Legend: as in `attend.backend`, and `p` numbers of a key's code, `F` = P / 2 pairs.
"""

import torch

from kvsplice_hf.attend.backend import CodedKeys
from kvsplice_hf.attend.native import types
from kvsplice_hf.code.codec import RowCodec
from kvsplice_hf.code.keys import TURN_DTYPE, KeyWeights
from kvsplice_hf.errors import ConfigError


def contiguous_keys(keys: CodedKeys | None) -> CodedKeys | None:
    """The same with the numbers of a table side by side; the tables of rotations stay as they are."""
    if keys is None:
        return None
    expand, mean, pairs = keys.expand.contiguous(), keys.mean.contiguous(), keys.pairs.contiguous()
    return keys._replace(expand=expand, mean=mean, pairs=pairs)


def keys_of(
    keys: CodedKeys | None, codec: RowCodec | None, batch: int, rows: int, dim: int, value_dim: int
) -> types.Keys:
    """How keys in `batch` times `rows` rows are read, against queries of `dim` numbers; or none.

    Whatever slots and pairs say, nothing beyond the tables is read: the library takes the nearest there is.

    Raises:
        ConfigError: shapes, dtypes or strides other than those of `CodedKeys`, or rows that hold no such keys.
    """
    if keys is None:
        if codec is not None and len(codec.key_sigmas):
            raise ConfigError("Got rows with a gain for their keys, and nothing that says how those are read.")
        return types.NO_KEYS
    rope_dim = dim - value_dim
    basis = basis_of(keys, codec, rope_dim, value_dim)
    turned = turned_keys(basis, keys.table, keys.slots, batch, rows)
    if turned is None:
        sizes = {name: [tensor.dtype, *tensor.shape] for name, tensor in keys._asdict().items()}
        raise ConfigError(
            f"Got keys by {sizes}, for {rows} rows of {batch} sequences and queries of {dim} numbers with values of "
            f"{value_dim}; the library reads tables of which each line lies side by side, of rows of which all that is "
            "ahead of the key, and nothing else, shares a gain."
        )
    return turned


def basis_of(keys: CodedKeys | KeyWeights, codec: RowCodec | None, rope_dim: int, value_dim: int) -> types.Keys | None:
    """How keys are read, but for their table and slots; None where the library does not read such keys."""
    rank = keys.expand.shape[1]
    start = 0 if codec is None else codec.row_dim - rank
    fits = (
        codec is not None
        and len(codec.sigmas) == start
        # Codes of keys that are values as well have no gain.
        and (value_dim == start or (value_dim == codec.row_dim and len(codec.key_sigmas) == 0))
        and rank > 0
        and rope_dim > 0
        and rope_dim % 2 == 0
        and keys.pairs.shape == (3, rope_dim // 2)
        and keys.expand.shape == (rope_dim, rank)
        and keys.mean.shape == (rope_dim,)
    )
    if not fits:
        return None
    return types.NO_KEYS._replace(
        dim=rope_dim,
        rank=rank,
        start=start,
        expand=types.numbers_of(keys.expand, rope_dim * rank),
        mean=types.numbers_of(keys.mean, rope_dim),
        pairs=types.address(keys.pairs, torch.int64, 3 * (rope_dim // 2)),
    )


def turned_keys(
    basis: types.Keys | None, table: torch.Tensor, slots: torch.Tensor, batch: int, rows: int
) -> types.Keys | None:
    """The same keys with the table and the slots of `batch` times `rows` rows; None where these are not such."""
    fits = (
        basis is not None
        and _lies_in_lines(table, (basis.dim // 2, table.shape[-1]), TURN_DTYPE)
        and table.shape[-1] > 0
        and _lies_in_lines(slots, (batch, rows), torch.int32)
    )
    if basis is None or not fits:
        return None
    return basis._replace(
        table=table.data_ptr(),
        table_stride=table.stride(0),
        table_slots=table.shape[1],
        slots=slots.data_ptr(),
        slots_stride=slots.stride(0),
    )


def _lies_in_lines(tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    side_by_side = tensor.dim() == 2 and (tensor.stride(1) == 1 or tensor.shape[1] == 1)
    return tensor.is_cpu and tensor.dtype is dtype and tensor.shape == shape and side_by_side


def columns_of(codec: RowCodec, keys: CodedKeys | KeyWeights | None, value_dim: int) -> tuple[int, int]:
    """How many columns of packed rows queries score, and how many of those, from the first, hold their values."""
    if keys is None:
        return len(codec.column_index), codec.value_columns(value_dim)
    latents = codec.gained_columns + codec.gained_raw
    if value_dim == codec.row_dim:  # the code of a key is among them
        latents = len(codec.column_index)
    return latents + keys.expand.shape[0], latents


def key_coding_of(
    weights: KeyWeights | None, turns: torch.Tensor | None, rotated: torch.Size, tokens: torch.Size
) -> types.KeyCoding:
    """How keys of a shape, of so many tokens, are coded; or none.

    Args:
        weights: contiguous, or None.
        turns: uint8 [B or 1, 1, T, F], contiguous.
        rotated: shape of the keys, [B, 1, T, P].
        tokens: shape of what comes once for each of them, [B, 1, T].

    Raises:
        ConfigError: shapes or dtypes that do not fit.
    """
    if weights is None:
        return types.NO_KEY_CODING
    (rank, rope_dim), shape = weights.compress.shape, None if turns is None else turns.shape
    pairs = rope_dim // 2
    fits = (
        turns is not None
        and rotated == (*tokens, rope_dim)
        and shape in ((*tokens, pairs), (1, *tokens[1:], pairs))
        and rope_dim % 2 == 0
        and weights.pairs.shape == (3, pairs)
    )
    if turns is None or not fits:
        raise ConfigError(
            f"Got keys {list(rotated)} of tokens {list(tokens)} with turns {None if shape is None else list(shape)}, "
            f"for a code of {rank} numbers of keys of {rope_dim}."
        )
    turned = turns.numel() // pairs
    return types.KeyCoding(
        rank=rank,
        compress=types.numbers_of(weights.compress, rank * rope_dim),
        mean=types.numbers_of(weights.mean, rope_dim),
        pairs=types.address(weights.pairs, torch.int64, 3 * (rope_dim // 2)),
        turns=types.address(turns, TURN_DTYPE, turned * pairs),
        turned=turned,
    )
