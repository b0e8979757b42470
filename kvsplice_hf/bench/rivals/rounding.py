"""What families of rivals share: numbers in bf16, in groups, and as integers."""

from collections.abc import Callable

import torch


def to_bf16(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.bfloat16().float()


def not_zero(scale: torch.Tensor) -> torch.Tensor:
    """Scales to divide by: where one is 0, all it scales is 0 as well, and any other will do."""
    return torch.where(scale == 0, 1.0, scale)


def in_groups(numbers: torch.Tensor, size: int, quantise: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """`quantise` for [..., groups, size] along the last dimension; the last group may be shorter."""
    width = numbers.shape[-1]
    whole = width // size
    parts = []
    if whole:
        parts.append(quantise(numbers[..., : whole * size].unflatten(-1, (whole, size))).flatten(-2))
    if width > whole * size:
        parts.append(quantise(numbers[..., None, whole * size :]).flatten(-2))
    return torch.cat(parts, dim=-1) if parts else numbers


def affine(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers between the smallest and the largest of a group, with a bf16 scale and zero."""
    low, high, top = numbers.amin(-1, keepdim=True), numbers.amax(-1, keepdim=True), 2**bits - 1
    zero, scale = to_bf16(low), to_bf16((high - low) / top)
    return ((numbers - zero) / not_zero(scale)).round().clamp(0, top) * scale + zero


def symmetric(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Signed integers with one bf16 scale along the last dimension."""
    top = 2 ** (bits - 1) - 1
    scale = to_bf16(numbers.abs().amax(-1, keepdim=True) / top)
    return (numbers / not_zero(scale)).round().clamp(-top, top) * scale


def signed(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """All 2**bits signed integers: the number of a group that is largest by size is the lowest of them (bf16 scale)."""
    half = 2 ** (bits - 1)
    largest = numbers.gather(-1, numbers.abs().argmax(-1, keepdim=True))
    scale = to_bf16(largest / -half)
    return (numbers / not_zero(scale)).round().clamp(-half, half - 1) * scale
