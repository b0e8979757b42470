"""Prefill on a CPU: PyTorch's fused attention, which the head sizes of MLA shut out, computes the same."""

from typing import Any

import pytest
import torch
from tiny_models import build
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvsplice_hf import KVSpliceConfig, patch_model_with_kvsplice, splice_disabled
from kvsplice_hf.call import Call, SpliceState, enter_call
from kvsplice_hf.patch.attention import _sdpa


B, H, T = 2, 3, 11
SCALING = 0.3


class Operators(TorchDispatchMode):
    """Notes the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def module(enabled: bool = True) -> nn.Module:
    patched = nn.Module()
    patched.is_causal = True
    enter_call(Call(patched, SpliceState(enabled=enabled), mask=None, new_tokens=None, reads_cache=False))
    return patched


def states(key_dim: int, value_dim: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(B, H, T, dim, requires_grad=True) for dim in (key_dim, key_dim, value_dim)]


def mask_of(kind: str) -> torch.Tensor | None:
    visible = torch.ones(T, T, dtype=torch.bool).tril().repeat(B, 1, 1, 1)
    visible[0, :, :, :3] = False
    visible[0, :, :3, :3] = torch.eye(3, dtype=torch.bool)
    additive = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    return {"causal": None, "boolean": visible, "additive": additive}[kind]


@pytest.mark.parametrize("kind", ["causal", "boolean", "additive"])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(12, 8), (8, 12), (8, 8)])
def test_output_and_gradients_are_those_of_stock_attention(key_dim: int, value_dim: int, kind: str) -> None:
    mask, weight = mask_of(kind), torch.randn(B, T, H, value_dim)
    results = []
    for attend in (_sdpa, ALL_ATTENTION_FUNCTIONS["sdpa"]):
        inputs = states(key_dim, value_dim)
        output, _ = attend(module(), *inputs, mask, scaling=SCALING)
        assert output.shape == (B, T, H, value_dim)
        results.append([output, *torch.autograd.grad((output * weight).sum(), inputs)])
    for ours, stock in zip(*results, strict=True):
        torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_a_patched_model_prefills_by_fused_attention_and_an_unspliced_one_as_stock(padded: bool) -> None:
    model = build("deepseek_v3")
    ids = torch.randint(1, model.config.vocab_size, (2, 24))
    mask = torch.ones_like(ids)
    mask[0, : 5 * padded] = 0

    def operators() -> set[str]:
        with torch.no_grad(), Operators() as seen:
            model(ids, attention_mask=mask)
        return {name for name in seen.names if "softmax" in name or "dot_product" in name}

    stock = operators()
    assert "_softmax" in stock or "_safe_softmax" in stock  # of all pairs of tokens
    patch_model_with_kvsplice(model, KVSpliceConfig(rank=9))
    assert operators() == {"_scaled_dot_product_flash_attention_for_cpu"}
    with splice_disabled(model):
        assert operators() == stock
