"""Whether a kernel is kept after its first call does not depend on which token that call was about."""

import copy
from typing import Any, NamedTuple

import pytest
import torch
from ordinary_models import build_ordinary
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


class Coded(NamedTuple):
    """Splices of one layer, and tokens: latents or values, keys that are rotated, and their angles [1, 1, T, F].

    Attributes:
        splices: one of MLA, or those of the key heads.
    """

    splices: Any
    states: torch.Tensor
    keys: torch.Tensor
    turns: torch.Tensor

    def some(self, dtype: torch.dtype, start: int, count: int) -> "Coded":
        """Some of the tokens, in a dtype."""
        states, keys, turns = (part[:, :, start : start + count] for part in self[1:])
        return Coded(self.splices.to(dtype), states.to(dtype), keys.to(dtype), turns)

    def judged(self) -> bool:
        """Whether what C++ makes of the tokens is taken for as good as what PyTorch makes of them."""
        backend = NativeBackend()
        if isinstance(self.splices, LearnedKVSplice):
            splice, weights = self.splices, (self.splices.weights(), row_codec(self.splices.codec))
            found = backend.encode(self.states, self.keys, *weights, self.splices.keys.weights(), self.turns)
            heads, parts, widths = [splice], [(self.states, self.keys)], [found.shape[-1]]
        else:
            prepared = backend.prepare_heads(self.splices, "")
            found = backend.encode_heads(prepared, self.states, self.keys, self.turns)
            heads, widths = list(self.splices), list(self.splices.row_bytes)
            parts = list(self.splices.split(self.states, self.keys))
        return all(
            packed_alike(head.codec, numbers_of(head, *part, self.turns))(rows, head.rows(*part, self.turns))
            for head, part, rows in zip(heads, parts, found.split(widths, dim=-1), strict=True)
        )


@pytest.fixture(scope="module", params=[(kind, codec) for kind in ("MLA", "heads") for codec in ("rows", "trellis")])
def coded(request: pytest.FixtureRequest) -> Coded:
    """With rows of about the size of those of published models."""
    kind, codec = request.param
    torch.manual_seed(0)
    if kind == "MLA":
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**SMALL_SHAPE | {"num_hidden_layers": 1})).eval()
    else:
        sizes = {"hidden_size": 256, "head_dim": 64, "max_position_embeddings": TOKENS, "num_hidden_layers": 1}
        model = build_ordinary("llama", torch.float32, **sizes)
    ids = torch.randint(8, 128, (60, 64))
    calibration = KVSpliceCalibrator(model).collect(list(ids))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids.flatten()[None, :TOKENS], None, None, cache)
    states, keys = cache.layers[0].keys, cache.layers[0].values
    states, keys = (states, keys) if kind == "MLA" else (keys, states)
    config = KVSpliceConfig(bits=4, codec=codec, allocation="layer")
    patch_model_with_kvsplice(model, config, calibration=calibration)
    splices = model.model.layers[0].self_attn.kvsplice
    first = splices if kind == "MLA" else next(iter(splices))
    assert first.predicted_from
    turns = turns_at(model.config, TOKENS, first.keys, torch.device("cpu"))
    return Coded(splices, states, keys, turns[None, None])


@pytest.mark.skipif(not kernels_available("cpu"), reason="the C++ code could not be compiled here")
@pytest.mark.parametrize("count", [1, 16, TOKENS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_no_first_call_gives_up_the_kernel_that_codes(dtype: torch.dtype, count: int, coded: Coded) -> None:
    """In bf16 PyTorch rounds what is left of a latent once its key has told a part of it; the kernel does not."""
    coded = copy.deepcopy(coded)
    starts = range(0, TOKENS - count + 1, max(count, 5))
    given_up = [start for start in starts if not coded.some(dtype, start, count).judged()]
    assert not given_up, f"{len(given_up)} of {len(starts)} first calls would give the kernel up"


@torch.no_grad()
def test_rows_that_err_a_little_more_all_over_give_a_kernel_up() -> None:
    codec, numbers, _, expected = numbers_and_rows(torch.float32)
    error = (codec.unpack(expected) - numbers).square().mean().sqrt()
    found = codec.pack(numbers + 0.5 * error * torch.randn(numbers.shape))
    assert not rows_alike(codec, lambda _: numbers, found, expected)
