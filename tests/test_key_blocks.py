"""`key_block`: how many numbers of a key share a basis."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ordinary_models import build_ordinary
from test_ordinary import SINKS, calibration_of, packed, rms, step_by_step, tokens, uncached

from kvsplice_hf import ConfigError, KVSpliceConfig, load_kvsplice, save_kvsplice
from kvsplice_hf.code.heads import HeadSplices
from kvsplice_hf.patch.state import patched_sites


# Halves turned together, neighbours, a partial rotation, and layers without one.
KINDS = ["llama", "glm4", "gpt_neox", "smollm3"]


def key_bases(model: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each key head its basis [d, p], and its pairs [3, d / 2]."""
    heads = [head for _, patched in patched_sites(model) for head in patched.splice]
    return [(head.keys.expand.weight.detach(), head.keys.pairs) for head in heads if head.keys is not None]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", KINDS)
def test_each_code_of_a_key_is_of_so_many_numbers_of_neighbouring_frequencies(name: str, size: int) -> None:
    bases = key_bases(packed(name, key_block=size))
    assert bases
    for expand, pairs in bases:
        block_of = torch.empty(len(expand), dtype=torch.int64)
        block_of[pairs[0]] = block_of[pairs[1]] = torch.arange(pairs.shape[1]) // (size // 2)
        for column in expand.T:
            assert len(set(block_of[column != 0].tolist())) == 1


@pytest.mark.parametrize("name", KINDS)
def test_a_block_of_all_numbers_is_a_whole_basis(name: str) -> None:
    whole, wide = (uncached(packed(name, key_block=size), tokens()) for size in (None, 1 << 16))
    assert torch.equal(whole, wide)
    assert not torch.equal(whole, uncached(packed(name, key_block=2), tokens()))


@pytest.mark.parametrize("name", KINDS)
def test_with_and_without_a_cache_the_numbers_are_the_same(name: str) -> None:
    model, stock = packed(name, key_block=2), uncached(build_ordinary(name), tokens())
    without, (within, _) = uncached(model, tokens()), step_by_step(model, tokens())
    loss = rms(without - stock)
    assert loss > 0
    assert rms(within - without) < 0.02 * loss


def test_16_bits_are_exact_in_narrow_blocks_too() -> None:
    stock = uncached(build_ordinary("llama"), tokens())
    assert rms(uncached(packed("llama", bits=16.5, key_block=2), tokens()) - stock) < 0.02 * rms(stock)


def test_a_saved_splice_has_the_blocks_it_was_fitted_with(tmp_path: Path) -> None:
    model = packed("llama", key_block=2)
    save_kvsplice(model, tmp_path)
    loaded = load_kvsplice(build_ordinary("llama"), tmp_path)
    assert torch.equal(uncached(loaded, tokens()), uncached(model, tokens()))
    for (found, _), (expected, _) in zip(key_bases(loaded), key_bases(model), strict=True):
        assert torch.equal(found, expected)


def test_solutions_of_other_blocks_are_not_taken_for_one_another() -> None:
    """One calibrator serves them all, and keeps what it has solved."""
    calibrator = calibration_of("llama")
    of_sizes = {}
    for size in (None, 2, 4, None, 2):
        config = KVSpliceConfig(bits=5, sink_tokens=SINKS, key_block=size)
        encode = calibrator.solution(next(iter(calibrator.statistics)), config).key_encode
        assert torch.equal(of_sizes.setdefault(size, encode), encode)
    assert len({float(encode.abs().sum()) for encode in of_sizes.values()}) == 3


@pytest.mark.parametrize("size", [0, 1, 3, -2, 2.0, "2", True])
def test_other_sizes_are_refused(size: Any) -> None:
    with pytest.raises(ConfigError, match="key_block"):
        KVSpliceConfig(key_block=size)


def test_files_of_whole_bases_do_not_name_the_setting() -> None:
    """Releases that do not know it go on reading them."""
    assert "key_block" not in KVSpliceConfig().to_dict()
    config = KVSpliceConfig(key_block=16)
    assert KVSpliceConfig.from_dict(config.to_dict()) == config


def test_all_heads_of_a_layer_are_coded_alike() -> None:
    for _, patched in patched_sites(packed("llama", key_block=2)):
        assert isinstance(patched.splice, HeadSplices)
        assert all(head.keys is not None for head in patched.splice)
