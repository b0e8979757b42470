"""Whether what a kernel gave is what PyTorch gives, up to what may differ."""

import copy
from collections.abc import Callable

import torch

from kvsplice_hf.attend.backend import Attended
from kvsplice_hf.code import trellis
from kvsplice_hf.code.codecs import Codec
from kvsplice_hf.code.projection import LearnedKVSplice


# Products of bf16 numbers of the same sign differ by about this much, relative to the largest of them.
_TOLERANCE = 0.03
# Two searches along a trellis may end on rows that are as close as one another: their squared errors, and how many
# bytes are not the same.
_ERROR_TOLERANCE = 1.1
_OTHER_BYTES = 0.3
# Rows that take another path early differ in most of their bytes, which says nothing where they err no more than this
# on average. Those of one token err by 2.5 % more or less than others (rows of 512 numbers in bf16, 300 tokens), so the
# mean of few of them may be further off, by the root of how many they are.
_SAME_ERROR = 0.03


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
            another code of a key leaves another rest. Only asked along a trellis.
    """
    if codec is None:
        return numbers_alike
    if not isinstance(codec, trellis.TrellisCodec):
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
        return exact.numbers_to_store(latent.float(), k_rot.float(), turns, packed)

    return numbers


def bytes_alike(found: torch.Tensor, expected: torch.Tensor) -> bool:
    # A number between two levels may fall to either for its last digit.
    return found.shape == expected.shape and int((found != expected).sum()) <= max(2, 0.01 * found.numel())


def rows_alike(
    codec: trellis.TrellisCodec,
    numbers: Callable[[torch.Tensor], torch.Tensor],
    found: torch.Tensor,
    expected: torch.Tensor,
) -> bool:
    if found.shape != expected.shape:
        return False
    scales = codec.scales.detach()
    errors, least = (
        ((codec.unpack(packed) - numbers(packed).detach().float()) / scales).square().sum(-1)
        for packed in (found, expected)
    )
    ratios = (errors / (least + 1e-6))[least.isfinite()]
    share = (found != expected).float().mean()
    if not len(ratios) or bool(share <= _OTHER_BYTES):
        return as_close(errors, least)
    tolerance = max(_SAME_ERROR, (_ERROR_TOLERANCE - 1) / len(ratios) ** 0.5)
    return as_close(errors, least) and bool(ratios.mean() <= 1 + tolerance)


def as_close(errors: torch.Tensor, least: torch.Tensor) -> bool:
    """Whether rows err no more than others, but for those that hold what is not a number."""
    return bool((errors <= _ERROR_TOLERANCE * least + 1e-6)[least.isfinite()].all())
