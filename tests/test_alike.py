"""Whether a kernel is kept after its first call does not depend on which token that call was about."""

import copy
from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DynamicCache

from kvsplice_hf import (
    KVSpliceCalibrator,
    KVSpliceConfig,
    LearnedKVSplice,
    TrellisCodec,
    patch_model_with_kvsplice,
)
from kvsplice_hf.attend.alike import numbers_of, packed_alike, rows_alike
from kvsplice_hf.attend.native.backend import NativeBackend
from kvsplice_hf.attend.native.calls import kernels_available, row_codec
from kvsplice_hf.bench.small_model import SMALL_SHAPE
from kvsplice_hf.vllm.splices import turns_at


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
    judged = [rows_alike(codec, lambda _, one=one: one, *token) for one, *token in zip(*by_token, strict=True)]
    assert all(judged), f"{judged.count(False)} of {TOKENS} tokens would give the kernel up"


@torch.no_grad()
def test_rows_of_another_token_give_a_kernel_up() -> None:
    codec, numbers, found, expected = numbers_and_rows(torch.bfloat16)
    assert not rows_alike(codec, lambda _: numbers, found.roll(1, 0), expected)
    wrong = found.clone()
    wrong[7] = found[8]
    assert not rows_alike(codec, lambda _: numbers, wrong, expected)


@pytest.fixture(scope="module")
def coded_tokens() -> tuple[LearnedKVSplice, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The splice of a layer with rows as wide as published ones, and of tokens latents, rotated keys and angles."""
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**SMALL_SHAPE | {"num_hidden_layers": 1})).eval()
    ids = torch.randint(8, 1000, (40, 64))
    config = KVSpliceConfig(bytes_per_token=288, codec="trellis", allocation="layer")
    calibration = KVSpliceCalibrator(model).collect(list(ids))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:1].new_tensor(range(8, 8 + TOKENS))[None], None, None, cache)
    latent, k_rot = cache.layers[0].keys, cache.layers[0].values
    patch_model_with_kvsplice(model, config, calibration=calibration)
    splice = model.model.layers[0].self_attn.kvsplice
    return splice, latent, k_rot, turns_at(model.config, TOKENS, splice.keys, torch.device("cpu"))[None, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_no_single_token_gives_up_the_kernel_that_codes_it(dtype: torch.dtype, coded_tokens: Any) -> None:
    """In bf16 PyTorch rounds what is left of a latent once its key has told a part of it; the kernel does not."""
    if not kernels_available("cpu"):
        pytest.skip("the C++ code could not be compiled here")
    splice, latent, k_rot = (part.to(dtype) for part in copy.deepcopy(coded_tokens[:3]))
    assert splice.predicted_from
    weights, keys, backend = splice.weights(), splice.keys.weights(), NativeBackend()
    given_up = []
    for at in range(TOKENS):
        token = [part[:, :, at : at + 1] for part in (latent, k_rot, coded_tokens[3])]
        found = backend.encode(*token[:2], weights, row_codec(splice.codec), keys, token[2])
        if not packed_alike(splice.codec, numbers_of(splice, *token))(found, splice.rows(*token)):
            given_up.append(at)
    assert not given_up, f"{len(given_up)} of {TOKENS} tokens would give the kernel up"
