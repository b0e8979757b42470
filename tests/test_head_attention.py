"""A step of a layer with ordinary attention where no kernel does all of it: all heads in one call."""

import importlib
from typing import Any

import pytest
import torch
from ordinary_models import build_ordinary
from test_ordinary import KINDS, SINKS, calibrated, calibration_of, packed, step_by_step, tokens

from kvsplice_hf import KVSpliceConfig, patch_model_with_kvsplice
from kvsplice_hf.attend import choice as dispatch
from kvsplice_hf.cache.heads import CompressedHeads
from kvsplice_hf.cache.turns import Turns
from kvsplice_hf.upstream import cache_argument, cache_of


head_attention = importlib.import_module("kvsplice_hf.patch.head_attention")
# Keys of GPT-2 are coded number by number, and the scores of Gemma 2 are capped.
SERVED = [name for name in KINDS if name != "gemma2"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """No backend serves; how many key heads each call of all heads of a layer had."""
    found: list[int] = []
    attend_heads = head_attention.attend_heads

    def counted(query: torch.Tensor, heads: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(len(heads))
        return attend_heads(query, heads, *args, **kwargs)

    monkeypatch.setattr(dispatch, "_WITHOUT_KERNELS", True)
    monkeypatch.setattr(head_attention, "attend_heads", counted)
    return found


@pytest.mark.parametrize("name", SERVED)
def test_all_heads_of_a_layer_are_attended_to_in_one_call(name: str, calls: list[int]) -> None:
    model = packed(name)
    on_rows, _ = step_by_step(model, tokens())
    key_heads = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
    assert calls == [key_heads] * model.config.num_hidden_layers * 8  # of 20 tokens, 12 are the prompt
    decoded, _ = step_by_step(packed(name, attention="expanded"), tokens())
    torch.testing.assert_close(on_rows, decoded, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["gemma2"])  # which caps its scores
def test_what_that_call_does_not_serve_goes_another_way(name: str, calls: list[int]) -> None:
    on_rows, _ = step_by_step(packed(name), tokens())
    decoded, _ = step_by_step(packed(name, attention="expanded"), tokens())
    torch.testing.assert_close(on_rows, decoded, atol=1e-4, rtol=1e-4)
    assert calls == []


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss"])
@pytest.mark.parametrize("pad", [0, 4])
def test_weights_are_those_of_attention_on_decoded_keys(name: str, pad: int, calls: list[int]) -> None:
    """With padding on the left, windows, exact tokens and learned sinks."""
    ids, found = tokens(2, 14), []
    mask = torch.ones_like(ids)
    mask[0, :pad] = 0
    known = calibration_of(name)
    for attention in ("on_codes", "expanded"):
        model = build_ordinary(name)
        model.set_attn_implementation("eager")
        settings = {} if attention == "on_codes" else {"attention": attention}
        patch_model_with_kvsplice(model, KVSpliceConfig(bits=5, sink_tokens=SINKS, **settings), calibration=known)
        with torch.no_grad():
            cache = cache_of(model(ids[:, :13], attention_mask=mask[:, :13], use_cache=True))
            last = {"attention_mask": mask, "use_cache": True, "output_attentions": True, **cache_argument(cache)}
            found.append(model(ids[:, 13:], **last))
    assert calls == [2, 2]
    for one, other in zip(found[0].attentions, found[1].attentions, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[0].logits, found[1].logits, atol=1e-4, rtol=1e-4)


def test_gradients_reach_the_query_and_the_splice_of_every_head(calls: list[int]) -> None:
    model = packed("llama")
    with torch.no_grad():
        cache = cache_of(model(tokens(1, 12), use_cache=True))
    gradients = []
    for way in ("rows", "decoded"):
        model.zero_grad()
        query = torch.randn(1, 4, 1, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        latents = compressed(model, cache, 0)
        if way == "rows":
            output, _ = head_attention.attention_on_heads(query, latents.heads, None, 0.5)
        else:
            keys, values = (states.repeat_interleave(2, dim=1) for states in latents.keys_and_values())
            output = (torch.softmax(0.5 * query @ keys.transpose(2, 3), -1) @ values).transpose(1, 2)
        output.square().sum().backward()
        gradients.append([query.grad, *(head.splice.expand.weight.grad.clone() for head in latents.heads)])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)


def compressed(model: Any, cache: Any, layer: int) -> Any:
    """What `update` of a layer hands to the attention function, without a new token."""
    held = cache.layers[layer]
    slots = held.values[:, 0, :, 0]
    turns = Turns(held.table.lines, slots)
    return CompressedHeads(held.keys, held.splice, held.exact, 1, 11, torch.float32, None, turns)


def test_dropped_weights_count_in_the_denominator(calls: list[int]) -> None:
    model = packed("llama")
    with torch.no_grad():
        cache = cache_of(model(tokens(1, 12), use_cache=True))
        latents, query = compressed(model, cache, 0), torch.randn(1, 4, 1, 8)
        whole, _ = head_attention.attention_on_heads(query, latents.heads, None, 0.5)
        nothing, _ = head_attention.attention_on_heads(query, latents.heads, None, 0.5, dropout=0.999999)
        torch.manual_seed(0)
        mean = torch.stack(
            [head_attention.attention_on_heads(query, latents.heads, None, 0.5, dropout=0.3)[0] for _ in range(2000)]
        ).mean(0)
    assert nothing.abs().max() < whole.abs().max()
    torch.testing.assert_close(mean, whole, atol=0.1 * whole.abs().max().item(), rtol=0.1)


def test_half_precision_stays_what_it_is(calls: list[int]) -> None:
    model = build_ordinary("llama")
    known = calibrated(model)
    patch_model_with_kvsplice(model.to(torch.bfloat16), KVSpliceConfig(bits=5, sink_tokens=SINKS), calibration=known)
    logits, _ = step_by_step(model, tokens())
    assert logits.dtype == torch.bfloat16
    assert calls
