"""Flex attention on a patched model: its mask is an object with a function of indices, and is read as any other mask.

Flex attention runs uncompiled here: compiled, it cannot decode on a CPU (torch 2.13), and compiling takes long.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_contract_models import FP32_TOLERANCE, cached_logits, no_cache_logits
from tiny_models import TINY_MODELS, build, tiny_batch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import StaticCache

from kvsplice_hf import KVSpliceConfig, patch_model_with_kvsplice
from kvsplice_hf.cache import exact


pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture(autouse=True)
def _uncompiled() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


def pair(name: str, **settings: Any) -> tuple[Any, Any]:
    """The same patched model under SDPA and under flex attention."""
    models = []
    for attention in ("sdpa", "flex_attention"):
        model = build(name)
        try:
            model.set_attn_implementation(attention)
            with torch.no_grad():
                model(tiny_batch(name)[0], use_cache=False)
        except (ValueError, ImportError, RuntimeError, NotImplementedError) as error:
            pytest.skip(f"{name} of this transformers does not run under {attention} here: {error}"[:200])
        models.append(patch_model_with_kvsplice(model, KVSpliceConfig(sink_tokens=3, **settings)))
    return models[0], models[1]


def batch_of(name: str, padded: bool) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = tiny_batch(name)
    return (ids, mask) if padded else (ids[:1], mask[:1])


padded_or_not = pytest.mark.parametrize("padded", [True, False], ids=["padded", "unpadded"])


@padded_or_not
@pytest.mark.parametrize("name", TINY_MODELS)
def test_logits_under_flex_attention_are_those_under_sdpa(name: str, padded: bool) -> None:
    sdpa, flex = pair(name, compression_ratio=0.5)
    batch = batch_of(name, padded)
    torch.testing.assert_close(no_cache_logits(flex, *batch), no_cache_logits(sdpa, *batch), atol=1e-4, rtol=0)
    torch.testing.assert_close(cached_logits(flex, *batch)[0], cached_logits(sdpa, *batch)[0], atol=1e-4, rtol=0)


@padded_or_not
def test_generated_tokens_under_flex_attention_are_those_under_sdpa(padded: bool) -> None:
    models = pair("deepseek_v3", compression_ratio=0.5)
    ids, mask = batch_of("deepseek_v3", padded)
    found = [m.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0) for m in models]
    assert torch.equal(*found)


def test_a_static_cache_under_flex_attention_keeps_the_same_tokens_exactly() -> None:
    sdpa, flex = pair("deepseek_v3", compression_ratio=0.5)
    batch = batch_of("deepseek_v3", padded=True)
    caches = [StaticCache(config=model.config, max_cache_len=16) for model in (sdpa, flex)]
    logits, cache = cached_logits(flex, *batch, cache=caches[1])
    torch.testing.assert_close(logits, cached_logits(sdpa, *batch, cache=caches[0])[0], atol=FP32_TOLERANCE, rtol=0)
    assert [layer.exact.positions.tolist() for layer in cache.layers] == [[[0, 1, 2], [3, 4, 5]]] * 2


@pytest.mark.parametrize("pairs", [1, 40, 2**24])
def test_a_block_mask_says_what_the_same_mask_of_four_dimensions_says(
    pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left padding, and two sequences packed into one row; in parts of any size."""
    monkeypatch.setattr(exact, "_PAIRS", pairs)
    starts = torch.tensor([[0] * 12, [3] * 12, [0] * 5 + [5] * 7])

    def visible(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (k <= q) & (k >= starts[b, q])

    block = create_block_mask(visible, 3, None, 12, 12, device="cpu")
    assert isinstance(block, BlockMask)
    places = torch.arange(12)
    dense = ((places <= places[:, None]) & (places >= starts[:, :, None]))[:, None]
    for tokens in (12, 1, 5):
        assert torch.equal(exact.real_tokens(block, tokens), exact.real_tokens(dense, tokens))
    found, needed = (exact.exact_in_full_sequence(m, 12, 2, torch.device("cpu")) for m in (block, dense))
    assert torch.equal(found, needed)
    assert found.nonzero().tolist() == [[0, 0], [0, 1], [1, 3], [1, 4], [2, 0], [2, 1], [2, 5], [2, 6]]
