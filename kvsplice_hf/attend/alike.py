"""Whether what a kernel gave is what PyTorch gives, up to what may differ."""

import copy
from collections.abc import Callable

import torch

from kvsplice_hf.attend.backend import Attended
from kvsplice_hf.code.codec import RowCodec
from kvsplice_hf.code.codecs import Codec
from kvsplice_hf.code.projection import LearnedKVSplice


# Products of bf16 numbers of the same sign differ by about this much, relative to the largest of them.
_TOLERANCE = 0.03
# Rows of the same tokens may be others that are as close. The last digit of a number decides between two levels, or two
# paths along a trellis, and most bytes behind it differ. The squared error of one row of n numbers is then another one
# by about this over the root of n (300 tokens in bf16: 0.025 where n is 576, 0.05 to 0.08 where it is 111, and 0.7 for
# one of them). So a single row may err several times as much, and the mean of T rows more by so many times that over
# the root of T, or by a fixed part.
_SPREAD, _OF_THE_MEAN = 0.6, 20
_ONE_ROW, _SAME_ERROR = 3.0, 0.03


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


def packed_alike(
    codec: Codec | None, numbers: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[torch.Tensor, torch.Tensor], bool]:
    """What compares rows.

    Args:
        codec: of the rows; None where they are numbers.
        numbers: gives what packed rows stand for. That depends on the rows: where latents are predicted from keys,
            another code of a key leaves another rest.
    """
    if codec is None:
        return numbers_alike
    if not isinstance(codec, RowCodec):
        return bytes_alike
    return lambda found, expected: rows_alike(codec, numbers, found, expected)


def numbers_of(
    splice: LearnedKVSplice, latent: torch.Tensor, k_rot: torch.Tensor, turns: torch.Tensor | None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """What packed rows of these tokens stand for, for `packed_alike`; arguments as of `LearnedKVSplice.rows`.

    In float32 whatever the splice is in. In bf16 PyTorch rounds after each step and a kernel at the end, and both are
    off by as much as fine levels are apart: neither can be the measure of the other.
    """

    def numbers(packed: torch.Tensor) -> torch.Tensor:
        exact = copy.deepcopy(splice).float()
        with torch.autocast(latent.device.type, enabled=False):
            return exact.numbers_to_store(latent.float(), k_rot.float(), turns, packed)

    return numbers


def bytes_alike(found: torch.Tensor, expected: torch.Tensor) -> bool:
    # A number between two levels may fall to either for its last digit.
    return found.shape == expected.shape and int((found != expected).sum()) <= max(2, 0.01 * found.numel())


def rows_alike(
    codec: RowCodec,
    numbers: Callable[[torch.Tensor], torch.Tensor],
    found: torch.Tensor,
    expected: torch.Tensor,
) -> bool:
    if found.shape != expected.shape:
        return False
    stored = codec.widths > 0
    scales = codec.scales.detach()[stored]
    errors, least = (
        ((codec.unpack(packed) - numbers(packed).detach().float())[..., stored] / scales).square().sum(-1)
        for packed in (found, expected)
    )
    return as_close(errors, least, len(scales))


def as_close(errors: torch.Tensor, least: torch.Tensor, numbers: int) -> bool:
    """Whether rows of so many numbers err no more than others of the same tokens, but for what is not a number."""
    ratios = ((errors + 1e-6) / (least + 1e-6))[least.isfinite()]
    if not len(ratios):
        return True
    of_mean = max(_SAME_ERROR, _OF_THE_MEAN * _SPREAD / (numbers * len(ratios)) ** 0.5)
    return bool(ratios.max() <= _ONE_ROW) and bool(ratios.mean() <= 1 + of_mean)
