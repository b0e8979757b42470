"""Whether what a kernel gave is what PyTorch gives, up to what may differ."""

from collections.abc import Callable

import torch

from kvsplice_hf.attend.backend import Attended
from kvsplice_hf.code import trellis
from kvsplice_hf.code.codecs import Codec


# Products of bf16 numbers of the same sign differ by about this much, relative to the largest of them.
_TOLERANCE = 0.03
# Two searches along a trellis may end on rows that are as close as one another: their squared errors, and how many
# bytes are not the same.
_ERROR_TOLERANCE = 1.1
_OTHER_BYTES = 0.3
# A row that takes another path early differs in half of its bytes, which says nothing where it errs no more than this.
_SAME_ERROR = 1.03


def attend_alike(found: Attended, expected: Attended) -> bool:
    # Queries that see no row (padding) have any result.
    sees = expected.lse > torch.finfo(torch.float32).min / 2
    mixed = (found.mixed - expected.mixed).abs().amax(-1)[sees]
    lse = (found.lse - expected.lse).abs()[sees]
    size = expected.mixed.abs().amax()
    return bool((mixed <= _TOLERANCE * size).all() and (lse <= _TOLERANCE * (1 + expected.lse.abs()[sees])).all())


def all_attend_alike(found: list[Attended], expected: list[Attended]) -> bool:
    return all(map(attend_alike, found, expected))


def numbers_alike(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().amax() <= _TOLERANCE * expected.abs().amax())


def both_alike(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> bool:
    return all(map(numbers_alike, found, expected))


def packed_alike(codec: Codec | None, rows: Callable[[], torch.Tensor]) -> Callable[[torch.Tensor, torch.Tensor], bool]:
    """What compares rows; `rows` gives what was packed, which is only asked for along a trellis."""
    if codec is None:
        return numbers_alike
    if not isinstance(codec, trellis.TrellisCodec):
        return bytes_alike
    return lambda found, expected: rows_alike(codec, rows(), found, expected)


def bytes_alike(found: torch.Tensor, expected: torch.Tensor) -> bool:
    # A number between two levels may fall to either for its last digit.
    return found.shape == expected.shape and int((found != expected).sum()) <= max(2, 0.01 * found.numel())


def rows_alike(codec: trellis.TrellisCodec, rows: torch.Tensor, found: torch.Tensor, expected: torch.Tensor) -> bool:
    # Of two paths that are nearly as close, the last digit of a number may decide, and they differ in many bytes.
    if found.shape != expected.shape:
        return False
    scales = codec.scales.detach()
    errors, least = (
        ((codec.unpack(packed) - rows.detach().float()) / scales).square().sum(-1) for packed in (found, expected)
    )
    share = (found != expected).float().mean()
    return as_close(errors, least) and (bool(share <= _OTHER_BYTES) or as_close(errors, least, _SAME_ERROR))


def as_close(errors: torch.Tensor, least: torch.Tensor, tolerance: float = _ERROR_TOLERANCE) -> bool:
    """Whether rows err no more than others, but for those that hold what is not a number."""
    return bool((errors <= tolerance * least + 1e-6)[least.isfinite()].all())
