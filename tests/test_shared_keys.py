"""Layers that read keys and values of an earlier layer follow it: one splice, one place in the cache."""

import pytest
import torch
from ordinary_models import WINDOW, build_ordinary
from test_ordinary import packed, rms, step_by_step, tokens, uncached
from torch import nn

from kvsplice_hf import NotMLAError, explain, get_kv_cache_size
from kvsplice_hf.cache.splicing import SplicedLayerMixin
from kvsplice_hf.patch.sites import find_sites
from kvsplice_hf.patch.state import all_patched_sites, patched_sites


sharing_models = pytest.mark.parametrize("name", ["gemma3n_text", "gemma4_text"])


@sharing_models
def test_a_layer_that_reads_keys_of_another_has_its_splice_and_none_of_its_own(name: str) -> None:
    model = packed(name)
    layers = all_patched_sites(model)
    assert [site.layer_idx for site, _ in layers] == [0, 1, 2, 3]
    assert [site.layer_idx for site, _ in patched_sites(model)] == [0, 1]
    (first, _), (second, _), (third, window), (fourth, full) = layers
    assert [site.source and site.source.name for site, _ in layers] == [None, None, first.name, second.name]
    assert window.splice is first.module.kvsplice
    assert full.splice is second.module.kvsplice
    assert not [site.name for site in (third, fourth) if "kvsplice" in site.module._modules]
    with torch.no_grad():
        assert {layer.decode for layer in explain(model).layers} <= {"C++", "PyTorch"}


@sharing_models
def test_a_cache_holds_the_layers_that_store_and_no_others(name: str) -> None:
    model = packed(name)
    _, cache = step_by_step(model, tokens(1))
    assert [isinstance(layer, SplicedLayerMixin) for layer in cache.layers[:2]] == [True, True]
    assert all(layer.keys is None for layer in cache.layers[2:])
    first, second = (site for site, _ in patched_sites(model))
    stock = 4 * ((WINDOW - 1) * first.row_dim + 40 * second.row_dim)
    assert get_kv_cache_size(model, seq_len=40).original_bytes == stock


@sharing_models
@pytest.mark.parametrize("chosen", [(0,), (1,)])
def test_where_some_layers_are_patched_their_readers_are(name: str, chosen: tuple[int, ...]) -> None:
    model = packed(name, layers=chosen)
    assert [site.layer_idx for site, _ in all_patched_sites(model)] == [chosen[0], chosen[0] + 2]
    stock, without, (within, _) = (
        uncached(build_ordinary(name), tokens()),
        uncached(model, tokens()),
        step_by_step(model, tokens()),
    )
    assert 0 < rms(within - without) < 0.02 * rms(without - stock)


@sharing_models
def test_a_reader_loses_by_the_splice_of_its_source_alone(name: str) -> None:
    """Without the layer that stores, the layer that reads would have to be exact: it is not."""
    model = packed(name, bits=3.0)
    kept: list[torch.Tensor] = []
    reader = all_patched_sites(model)[2][0].module
    hook = reader.register_forward_hook(lambda module, args, output: kept.append(output[0]))
    uncached(model, tokens())
    step_by_step(model, tokens())
    hook.remove()
    whole, prompt, *steps = kept
    torch.testing.assert_close(torch.cat([prompt, *steps], dim=1), whole, atol=1e-3, rtol=1e-3)


@sharing_models
def test_readers_without_their_source_are_refused_by_name(name: str) -> None:
    layers = build_ordinary(name).model.layers
    with pytest.raises(NotMLAError, match=r"2\.self_attn \(Gemma\w+\) reads keys and values of another layer"):
        find_sites(nn.ModuleDict({str(index): layers[index] for index in (2, 3)}))
