"""What the attention kernel takes: shapes, dtypes and strides."""

import torch

from kvsplice_hf.attend.backend import CodedKeys, Paging
from kvsplice_hf.attend.triton.pieces import PIECES, WIDEST, WIDEST_KEY
from kvsplice_hf.code.codec import RowCodec
from kvsplice_hf.code.keys import TURN_DTYPE
from kvsplice_hf.errors import ConfigError


# The attention kernel takes bit 30 of a row's index for 0.
MOST_ROWS = 1 << 30


def check_shapes(
    query: torch.Tensor,
    rows: torch.Tensor,
    row_size: int,
    value_dim: int,
    bias: torch.Tensor | None,
    splits: int | None,
    lengths: torch.Tensor | None,
    input_precision: str,
    paging: Paging | None = None,
    hidden: torch.Tensor | None = None,
) -> None:
    """Refuse what the attention kernel does not take; `row_size` is n, or the bytes of a packed row.

    Raises:
        ConfigError: shapes, dtypes or strides other than those of `calls.attend_rows`.
    """
    batch, queries, n = query.shape
    if rows.dim() != 3 or (paging is None and rows.shape[0] != batch) or rows.shape[2] != row_size:
        first = batch if paging is None else "pages"
        raise ConfigError(
            f"Got rows {list(rows.shape)} for queries {list(query.shape)}; needed [{first}, S, {row_size}]."
        )
    _check_places(rows, batch, bias, lengths, paging, hidden)
    if rows.shape[1] > MOST_ROWS:
        raise ConfigError(f"Got {rows.shape[1]} rows per sequence; the kernels read at most {MOST_ROWS}.")
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


def _check_places(
    rows: torch.Tensor,
    batch: int,
    bias: torch.Tensor | None,
    lengths: torch.Tensor | None,
    paging: Paging | None,
    hidden: torch.Tensor | None,
) -> None:
    """Refuse tables of pages, and indices of rows that are left out, that the kernel does not read.

    What the tables hold is not looked at, which a GPU would have to be waited for: the kernel reads the nearest page.
    """
    if paging is not None:
        table, ends = paging
        fits = table.dim() == 2 and table.dtype in (torch.int32, torch.int64) and table.shape[1] > 0
        fits = fits and ends.dtype in (torch.int32, torch.int64) and ends.is_contiguous()
        fits = fits and ends.shape == table.shape[:1] == (batch,) and (table.stride(1) == 1 or table.shape[1] == 1)
        fits = fits and bias is None and lengths is None and rows.shape[0] * rows.shape[1] > 0
        if not fits or {table.device, ends.device} != {rows.device}:
            raise ConfigError(
                f"Got pages {list(rows.shape)} on {rows.device} with a table {table.dtype} {list(table.shape)} on "
                f"{table.device} and lengths {ends.dtype} {list(ends.shape)} on {ends.device}; needed integers "
                f"[{batch}, n] and [{batch}] there, each line of the table side by side, and neither bias nor lengths "
                "beside them."
            )
        if table.shape[1] * rows.shape[1] > MOST_ROWS:
            raise ConfigError(
                f"Got {table.shape[1]} pages of {rows.shape[1]} rows per sequence; the kernels read at most "
                f"{MOST_ROWS} rows."
            )
    if hidden is not None:
        fits = hidden.dtype == torch.int64 and hidden.dim() == 2 and hidden.shape[0] == batch and hidden.shape[1] > 0
        if not fits or not hidden.is_contiguous() or hidden.device != rows.device:
            raise ConfigError(
                f"Got hidden rows {hidden.dtype} {list(hidden.shape)} on {hidden.device}; needed int64 [{batch}, K] on "
                f"{rows.device}, contiguous."
            )


def check_keys(
    keys: CodedKeys | None,
    rows: torch.Tensor,
    codec: RowCodec,
    value_dim: int,
    widest: int = WIDEST_KEY,
    paging: Paging | None = None,
) -> None:
    """Refuse keys that the attention kernel does not read from packed rows, whose shape is checked already.

    Keys have `widest` numbers at most. With pages, slots are as many as the longest sequence has rows.

    Raises:
        ConfigError: shapes, dtypes, strides or devices other than those of `CodedKeys`, or gains of other coordinates.
    """
    if keys is None:
        if len(codec.key_sigmas):
            raise ConfigError("Got rows whose keys have a gain of their own; those were coded before their rotation.")
        return
    expand, mean, pairs, table, slots = keys
    if expand.dim() != 2 or not 0 < expand.shape[1] <= expand.shape[0] <= widest or expand.shape[0] % 2:
        raise ConfigError(f"Got expand {list(expand.shape)}; needed [P, p], 0 < p <= P <= {widest}, P even.")
    rope_dim, numbers = expand.shape
    if mean.shape != (rope_dim,) or not (expand.is_floating_point() and mean.is_floating_point()):
        raise ConfigError(
            f"Got expand {expand.dtype}, mean {mean.dtype} {list(mean.shape)}; needed floats [{rope_dim}]."
        )
    if pairs.dtype != torch.int64 or pairs.shape != (3, rope_dim // 2) or not pairs.is_contiguous():
        raise ConfigError(
            f"Got pairs {pairs.dtype} {list(pairs.shape)}; needed int64 [3, {rope_dim // 2}], contiguous."
        )
    if table.dtype != TURN_DTYPE or table.dim() != 2 or table.shape[0] != rope_dim // 2 or table.shape[1] == 0:
        raise ConfigError(
            f"Got a table {table.dtype} {list(table.shape)}; needed {TURN_DTYPE} [{rope_dim // 2}, slots]."
        )
    if table.stride(1) != 1 and table.shape[1] > 1:
        raise ConfigError(f"Got a table of strides {table.stride()}; each line must lie side by side.")
    if paging is not None:
        needed, fits = f"[{len(paging.table)}, S]", slots.dim() == 2 and len(slots) == len(paging.table)
    else:
        needed, fits = str(list(rows.shape[:2])), slots.shape == rows.shape[:2]
    if slots.dtype != torch.int32 or not fits:
        raise ConfigError(f"Got slots {slots.dtype} {list(slots.shape)}; needed int32 {needed}.")
    devices = {tensor.device for tensor in (rows, *keys)}
    if len(devices) > 1:
        raise ConfigError(f"Got rows and keys on {sorted(map(str, devices))}; they must be on one device.")
    _check_gains(codec, value_dim, numbers)


def _check_gains(codec: RowCodec, value_dim: int, numbers: int) -> None:
    start = codec.row_dim - numbers
    if value_dim not in (start, codec.row_dim):
        raise ConfigError(
            f"Got rows of {codec.row_dim} numbers; needed {value_dim} of a value and {numbers} of a key, or values of "
            f"all {codec.row_dim}."
        )
    gained, key_gained = len(codec.sigmas), len(codec.key_sigmas)
    if gained > start or (key_gained and gained != start):
        raise ConfigError(
            f"Got gains of {gained} and {key_gained} coordinates; the first must not reach behind the {start} ahead of "
            "the key, and must reach over all of them where keys have a gain of their own."
        )


def _bias_fits(bias: torch.Tensor, batch: int, queries: int, count: int) -> bool:
    if bias.dtype != torch.float32 or bias.dim() != 3 or bias.shape[0] not in (1, batch) or bias.shape[2] != count:
        return False
    return queries == 0 or (bias.shape[1] > 0 and queries % bias.shape[1] == 0)
