"""Bits per coordinate of a packed row: which widths there are, and how many bytes they make."""

import torch

from kvsplice_hf.code.fields import BIT_FIELDS
from kvsplice_hf.errors import ConfigError


WIDTHS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 16)


def row_bytes(widths: torch.Tensor, gained: int, key_gained: int = 0) -> int:
    """Bytes of a row whose coordinates have these widths, [n].

    With a gain if `gained` > 0 of them share one, and a second one if `key_gained` > 0 others do.
    """
    total = 2 * int((widths == 16).sum()) + int(gained > 0) + int(key_gained > 0)
    small = torch.where(widths == 16, 0, widths.to(torch.int64))
    return total + sum(-(-int((small & field > 0).sum()) * field // 8) for field in BIT_FIELDS)


def check_steps(widths: torch.Tensor, scales: torch.Tensor, centres: torch.Tensor, sigmas: torch.Tensor) -> None:
    """Check what a `RowCodec` is made of.

    Raises:
        ConfigError: an unknown width, shapes that differ, or scales that are not positive and finite.
    """
    if widths.dim() != 1 or widths.shape != scales.shape or widths.shape != centres.shape:
        shapes = [list(tensor.shape) for tensor in (widths, scales, centres)]
        raise ConfigError(f"Widths, scales and centres have shapes {shapes}; they must all be [n].")
    unknown = sorted(set(widths.tolist()) - set(WIDTHS))
    if unknown:
        raise ConfigError(f"Widths {unknown} are not among {WIDTHS}.")
    coded = (widths > 0) & (widths < 16)
    if not (torch.isfinite(scales[coded]).all() and (scales[coded] > 0).all() and torch.isfinite(centres).all()):
        raise ConfigError("Scales must be positive and finite, and centres finite.")
    if len(sigmas) > len(widths) or not (torch.isfinite(sigmas).all() and (sigmas > 0).all()):
        raise ConfigError(f"Got {len(sigmas)} sigmas for {len(widths)} coordinates; they must be positive and finite.")
