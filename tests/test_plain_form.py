"""The plain form of a converted model has nothing that engines of DeepSeek do not read, and is as good as it can be."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_convert import assert_same, build, divergence, logits, make, tokens
from transformers import AutoModelForCausalLM, DynamicCache

from kvsplice_hf.convert import convert_to_mla
from kvsplice_hf.convert.narrow import narrow
from kvsplice_hf.errors import ConfigError, UnsupportedError
from kvsplice_hf.upstream import cache_argument


CALIBRATION = tokens(8, 64, seed=1)
HIDDEN, HEAD = 48, 12


def plain(model: Any, **settings: Any) -> Any:
    return convert_to_mla(model, **({"rope_dim": HEAD, "calibration": CALIBRATION, "plain": True} | settings))


def large_embeddings(model: Any) -> Any:
    """The model with hidden states so large that what norms add to their mean square is nothing."""
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(100)
    return model


@pytest.mark.parametrize("name", ["llama-mqa", "llama-tied"])
def test_what_the_plain_form_can_hold_it_holds_exactly(name: str) -> None:
    model = large_embeddings(build("Llama", num_key_value_heads=1, tie_word_embeddings=name == "llama-tied"))
    converted = plain(model)
    ids = tokens(seed=3)
    expected = logits(model, ids)
    assert_same(logits(converted, ids), expected, 1e-4)
    cache = DynamicCache(config=converted.config)
    steps = [logits(converted, part, **cache_argument(cache)) for part in ids.split([17, 1, 22], dim=1)]
    assert_same(torch.cat(steps, 1), expected, 1e-4)


def test_the_plain_form_has_no_bias_the_default_frequencies_and_its_own_output_matrix(tmp_path: Any) -> None:
    converted = plain(build("Llama", num_key_value_heads=1, tie_word_embeddings=True), kv_lora_rank=40)
    assert not [name for name in converted.state_dict() if name.endswith("bias")]
    assert not converted.config.attention_bias
    assert converted.config.rope_interleave
    assert not converted.config.tie_word_embeddings
    assert converted.config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    converted.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(again, tokens()), logits(converted, tokens()))
    assert "lm_head.weight" in load_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize("rope_dim", [12, 6, 4, 2])
def test_frequencies_are_those_of_the_source(rope_dim: int) -> None:
    model = make("llama-gqa")
    found = plain(model, rope_dim=rope_dim).model.rotary_emb.inv_freq
    torch.testing.assert_close(found, model.model.rotary_emb.inv_freq[:: HEAD // rope_dim])


def test_wider_latents_and_more_rotation_lose_less() -> None:
    model, held_out = make("llama-gqa"), tokens(8, 64, seed=2)
    by_rank = [divergence(model, plain(model, kv_lora_rank=rank), held_out) for rank in (8, 20, 34, None)]
    assert by_rank == sorted(by_rank, reverse=True)
    assert by_rank[0] > by_rank[-1]
    by_rotation = [divergence(model, plain(model, rope_dim=size), held_out) for size in (2, 12)]
    assert by_rotation[0] > by_rotation[1]


# ---------------------------------------------------------------------------------------------------------------------
# A latent behind a norm


def directions_of_a_sphere(count: int, scales: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Vectors of one length, whose numbers are as large as `scales`."""
    found = torch.randn(count, len(scales), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scales
    return found / found.norm(dim=1, keepdim=True) * len(scales) ** 0.5


@torch.no_grad()
def test_a_direction_that_nobody_reads_is_kept_where_it_makes_up_the_norm() -> None:
    scales = torch.ones(24, dtype=torch.float64)
    scales[20] = 12
    vectors, share = directions_of_a_sphere(2000, scales), torch.full((2000,), 1 / 2000, dtype=torch.float64)
    metric = torch.zeros(24, 24, dtype=torch.float64)
    metric[:8, :8] = torch.eye(8, dtype=torch.float64)
    found = narrow(vectors, share, metric, 12)
    assert found.read == 8
    assert (found.encode[8:, 20].square().sum()) == pytest.approx(1, abs=1e-3)
    assert found.gains.nonzero().flatten().tolist() == list(range(8))  # what is not read is cached as 0
    assert not found.reading(metric)[:, 8:].any()
    assert found.cost < 0.1
    assert narrow(vectors, share, metric, 8).cost > 2 * found.cost


@pytest.mark.parametrize("rank", [6, 12, 24])
def test_a_latent_of_orthonormal_rows_reads_what_it_holds(rank: int) -> None:
    scales = torch.linspace(3, 0.1, 24, dtype=torch.float64)
    vectors, share = directions_of_a_sphere(4000, scales), torch.full((4000,), 1 / 4000, dtype=torch.float64)
    metric = torch.diag(torch.linspace(1, 2, 24, dtype=torch.float64))
    found = narrow(vectors, share, metric, rank)
    torch.testing.assert_close(found.encode @ found.encode.T, torch.eye(rank, dtype=torch.float64))
    others = directions_of_a_sphere(4000, scales, seed=1)
    latent = others @ found.projection.T
    normed = latent / latent.square().mean(-1, keepdim=True).sqrt() * found.gains
    error = others - normed @ found.reading(torch.eye(24, dtype=torch.float64)).T
    cost = ((error @ metric) * error).sum() / ((others @ metric) * others).sum()
    assert cost == pytest.approx(found.cost, rel=0.1, abs=1e-9)
    assert (cost < 1e-9) == (rank == 24)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


def without_a_gain() -> Any:
    model = make("llama-gqa")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = 0
    return model


UNSUITABLE = {
    "biases": (lambda: make("qwen2"), "biases of q_proj, k_proj, v_proj"),
    "bias of the output": (lambda: make("llama-biases"), "o_proj"),
    "frequencies of llama3": (lambda: make("llama-llama3"), "RoPE of type 'llama3'"),
    "yarn": (lambda: make("llama-yarn"), "RoPE of type 'yarn'"),
    "gains of 0": (without_a_gain, "gains of 0"),
}


@pytest.mark.parametrize("case", UNSUITABLE)
def test_models_without_a_plain_form_are_refused_by_what_it_lacks(case: str) -> None:
    builder, phrase = UNSUITABLE[case]
    with pytest.raises(UnsupportedError, match="has no plain form") as caught:
        plain(builder())
    assert phrase in str(caught.value)
    assert "without plain=True" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "phrase"),
    [
        ({"rope_dim": "all"}, "even divisor of the head size 12"),
        ({"rope_dim": 8}, "`rope_dim` is 8"),
        ({"rope_dim": 3}, "`rope_dim` is 3"),
        ({"rope_dim": True}, "`rope_dim` is True"),
        ({"rope_dim": 24}, "`rope_dim` is 24"),
        ({"kv_lora_rank": 49}, "between 2 and the hidden size 48"),
        ({"kv_lora_rank": 1}, "between 2 and the hidden size 48"),
        ({"kv_lora_rank": True}, "`kv_lora_rank` is True"),
        ({"calibration": None}, "and plain=True is an approximation"),
    ],
    ids=str,
)
def test_settings_that_the_plain_form_cannot_have_are_refused(settings: dict[str, Any], phrase: str) -> None:
    with pytest.raises(ConfigError, match=phrase):
        plain(make("llama-gqa"), **settings)
