"""Token ids of whatever kind as batches: tensors, arrays, lists of one length or of several, with masks or without.

Legend: `B` batch, `T` tokens.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Number
from typing import Any

import numpy as np
import torch

from kvsplice_hf.calibration.collect import Batch
from kvsplice_hf.calibration.items import NO_NUMBERS, as_plain, first_present, is_missing, tensor_or_list
from kvsplice_hf.errors import CalibrationError


# Fewer tokens than this are a mistake: a name that was mistyped, say.
FEWEST_TOKENS = 16

# A text, a token batch, or None for a row that holds nothing.
Piece = str | Batch | None


def one_sequence(ids: Sequence[Any]) -> Iterator[Piece]:
    """A list of numbers as all of the data."""
    if len(ids) < FEWEST_TOKENS:
        raise CalibrationError(
            f"Calibration data hold a {type(first_present(ids)).__name__} at each of {len(ids)} places. As token "
            f"ids of one sequence they are too few: {FEWEST_TOKENS} are needed at least, 8,000 to 20,000 to be good."
        )
    return token_pieces(ids)


def token_pieces(ids: Any, mask: Any = None) -> Iterator[Piece]:
    """Token ids [B, T] or [T] as one batch; in lists that are not of one length, one batch for each."""
    ids, mask = as_plain(ids), as_plain(mask)
    if isinstance(ids, (list, tuple)) and ids:
        tensor = _as_tensor(ids)
        if tensor is None:
            masks = [None] * len(ids) if mask is None else mask
            if len(masks) != len(ids):
                raise CalibrationError(f"`attention_mask` has {len(masks)} rows, `input_ids` has {len(ids)}.")
            for row, its_mask in zip(ids, masks, strict=True):
                yield from token_pieces(row, its_mask)
            return
        ids = tensor
    if is_missing(ids) or (isinstance(ids, (list, tuple)) and not ids):
        yield None
    elif isinstance(ids, torch.Tensor):
        yield _token_batch(ids, mask)
    else:
        raise CalibrationError(
            f"`input_ids` hold a {type(ids).__name__}; they must be token ids: a tensor, an array or lists of integers."
        )


def with_images(pieces: Iterator[Piece], images: Batch, row: Mapping[str, Any]) -> Iterator[Piece]:
    """The token batch of a mapping with the tensors of its images.

    Args:
        pieces: what was read of its token ids.
        images: the tensors; where there are none, the pieces go through.
        row: the mapping.

    Raises:
        CalibrationError: the token ids are no one batch, so that nobody can tell which images belong to which.
    """
    if not images:
        yield from pieces
        return
    found = list(pieces)
    whole = found[0] if len(found) == 1 else None
    if not isinstance(whole, dict) or whole["input_ids"].numel() != _count(row["input_ids"]):
        raise CalibrationError(
            f"Calibration data hold {', '.join(images)} beside token ids that are no batch of sequences of one length, "
            'each with a real token. Call the processor with padding=True and return_tensors="pt".'
        )
    yield {**whole, **images}


def _count(ids: Any) -> int:
    """How many token ids there are, padding and all."""
    ids = as_plain(ids)
    return ids.numel() if isinstance(ids, torch.Tensor) else sum(1 for _ in _leaves(ids))


def _as_tensor(ids: Sequence[Any]) -> torch.Tensor | None:
    """Numbers, or rows of them, as one tensor; None where the rows are not all there and of one length."""
    rows = [as_plain(row) for row in ids]
    if all(isinstance(row, torch.Tensor) for row in rows):
        return torch.stack(rows) if rows[0].dim() == 1 and len({row.shape for row in rows}) == 1 else None
    if not isinstance(first_present(rows), Number) and not all(isinstance(row, (list, tuple)) and row for row in rows):
        return None
    try:
        array = np.asarray(rows)
    except ValueError:
        return None
    if array.dtype.kind in NO_NUMBERS:
        odd = [type(leaf).__name__ for leaf in _leaves(rows) if not isinstance(leaf, Integral)]
        name = odd[0] if odd else "number of more than 64 bits"
        raise CalibrationError(f"Calibration data hold a {name} among token ids; these must be integers.")
    return tensor_or_list(array)


def _leaves(rows: Iterable[Any]) -> Iterator[Any]:
    for row in rows:
        if isinstance(row, (list, tuple)):
            yield from _leaves(row)
        else:
            yield row


def _token_batch(ids: torch.Tensor, mask: Any) -> Batch | None:
    """A batch as models take it; None for a single sequence of fewer than two tokens."""
    found = f"Calibration tokens are {ids.dtype} {list(ids.shape)}"
    if ids.is_meta:
        raise CalibrationError(f"{found} on the meta device, where they have no values. Give them on another device.")
    if ids.dim() == 1:
        ids = ids[None]
    is_integer = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    too_short = ids.dim() == 2 and ids.shape[1] < 2
    if ids.dim() != 2 or not is_integer or (too_short and len(ids) > 1):
        raise CalibrationError(f"{found}; they must be int64 [B, T], with two tokens in each sequence at least.")
    if too_short:
        return None
    if mask is None:
        return {"input_ids": ids.long()}
    real = _real_tokens(mask, ids)
    rows = real.any(-1)
    return {"input_ids": ids[rows].long(), "attention_mask": real[rows].long()} if rows.any() else None


def _real_tokens(mask: Any, ids: torch.Tensor) -> torch.Tensor:
    """Which tokens of ids [B, T] are no padding, bool [B, T]."""
    mask = _as_tensor(mask) if isinstance(mask, (list, tuple)) else mask
    found = list(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
    if isinstance(mask, torch.Tensor) and mask.dim() == 1:
        mask = mask[None]
    if not isinstance(mask, torch.Tensor) or mask.shape != ids.shape or (mask < 0).any():
        raise CalibrationError(
            f"`attention_mask` is {found} for tokens {list(ids.shape)}; it must be of the same shape, with 1 at real "
            "tokens and 0 at padding."
        )
    return mask.to(ids.device) != 0
