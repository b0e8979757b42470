"""What the attention kernel takes: shapes, dtypes and strides."""

import torch

from kvsplice_hf.attend.triton.pieces import PIECES, WIDEST
from kvsplice_hf.errors import ConfigError


# The attention kernel takes bit 30 of a row's index for 0.
_MOST_ROWS = 1 << 30


def check_shapes(
    query: torch.Tensor,
    rows: torch.Tensor,
    row_size: int,
    value_dim: int,
    bias: torch.Tensor | None,
    splits: int | None,
    lengths: torch.Tensor | None,
    input_precision: str,
) -> None:
    """Refuse what the attention kernel does not take; `row_size` is n, or the bytes of a packed row.

    Raises:
        ConfigError: shapes, dtypes or strides other than those of `calls.attend_rows`.
    """
    batch, queries, n = query.shape
    if rows.dim() != 3 or rows.shape[0] != batch or rows.shape[2] != row_size:
        raise ConfigError(
            f"Got rows {list(rows.shape)} for queries {list(query.shape)}; needed [{batch}, S, {row_size}]."
        )
    if rows.shape[1] > _MOST_ROWS:
        raise ConfigError(f"Got {rows.shape[1]} rows per sequence; the kernels read at most {_MOST_ROWS}.")
    if rows.stride(2) != 1 and row_size > 1:
        raise ConfigError(f"Got rows of strides {rows.stride()}; the numbers of a row must lie side by side.")
    if not query.is_floating_point() or not 0 < value_dim <= n <= PIECES * WIDEST:
        raise ConfigError(
            f"Got {query.dtype} queries of {n} numbers and value_dim {value_dim}; needed floats, at most "
            f"{PIECES * WIDEST} numbers and value_dim from 1 to {n}."
        )
    if bias is not None and not _bias_fits(bias, batch, queries, rows.shape[1]):
        raise ConfigError(
            f"Got a bias {bias.dtype} {list(bias.shape)}; needed float32 [{batch} or 1, T, {rows.shape[1]}] with T a "
            f"divisor of the {queries} queries."
        )
    if lengths is not None and (lengths.dtype != torch.int32 or lengths.shape != (batch,)):
        raise ConfigError(f"Got lengths {lengths.dtype} {list(lengths.shape)}; needed int32 [{batch}].")
    if splits is not None and splits < 1:
        raise ConfigError(f"Got {splits} splits; at least one is needed.")
    if input_precision not in ("ieee", "tf32"):
        raise ConfigError(f"Got input_precision {input_precision!r}; it must be 'ieee' or 'tf32'.")


def _bias_fits(bias: torch.Tensor, batch: int, queries: int, count: int) -> bool:
    if bias.dtype != torch.float32 or bias.dim() != 3 or bias.shape[0] not in (1, batch) or bias.shape[2] != count:
        return False
    return queries == 0 or (bias.shape[1] > 0 and queries % bias.shape[1] == 0)
