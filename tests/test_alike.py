"""Whether a kernel is kept after its first call does not depend on which token that call was about."""

import pytest
import torch

from kvsplice_hf import LearnedKVSplice, TrellisCodec
from kvsplice_hf.attend.alike import rows_alike


RANK, LATENT, TOKENS = 96, 128, 300


def numbers_and_rows(dtype: torch.dtype) -> tuple[TrellisCodec, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A codec, numbers in a dtype, rows of them, and rows of the same numbers before they were rounded to it."""
    torch.manual_seed(0)
    splice = LearnedKVSplice(LATENT, RANK)
    splice.compress.weight.normal_(0, LATENT**-0.5)
    latent = torch.randn(1, 1, TOKENS, LATENT).to(dtype)
    exact = splice.encode(latent.float()).detach()
    widths = torch.full((RANK,), 3)
    codec = TrellisCodec(widths, exact[0, 0].std(0), exact[0, 0].mean(0), torch.empty(0))
    numbers = splice.to(dtype).encode(latent).detach()
    return codec, numbers[0, 0], codec.pack(exact)[0, 0], codec.pack(numbers)[0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_no_single_token_gives_a_kernel_up_that_is_as_close(dtype: torch.dtype) -> None:
    codec, numbers, found, expected = numbers_and_rows(dtype)
    by_token = (part.split(1) for part in (numbers, found, expected))
    judged = [rows_alike(codec, *token) for token in zip(*by_token, strict=True)]
    assert all(judged), f"{judged.count(False)} of {TOKENS} tokens would give the kernel up"


@torch.no_grad()
def test_rows_of_another_token_give_a_kernel_up() -> None:
    codec, numbers, found, expected = numbers_and_rows(torch.bfloat16)
    assert not rows_alike(codec, numbers, found.roll(1, 0), expected)
    wrong = found.clone()
    wrong[7] = found[8]
    assert not rows_alike(codec, numbers, wrong, expected)
