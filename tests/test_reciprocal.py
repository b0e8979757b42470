"""The reciprocal options of GPT-2 with Multi-head Latent Attention, beyond what all its variants have in common.

That caches, generation, saving, gradients and patches work with them is in `test_gpt2_mla.py`, as for other variants.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_contract_models import cached_logits, no_cache_logits, rms
from test_gpt2_mla import BASE, HALF, assert_close, build
from tiny_models import tiny_batch
from transformers import DynamicCache

from kvsplice_hf import ConfigError, cache_nbytes, explain
from kvsplice_hf.gpt2_mla import GPT2MLAConfig, GPT2MLAForCausalLM
from kvsplice_hf.upstream import cache_argument


RECIPROCAL: dict[str, Any] = {"queries_from_latent": True, "reciprocal_layers": "all"}


# ------------------------------------------------------------------------------------------------ reciprocal attention


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"reciprocal_weight": 0.3}, {"qk_rope_head_dim": 8}], ids=str)
def test_a_head_attends_again_with_the_roles_of_queries_and_keys_exchanged(settings: dict[str, Any]) -> None:
    attention = build("shared latent", **RECIPROCAL, reciprocal_heads=3, **settings).transformer.h[0].attn
    latents, P = torch.randn(1, 7, 32), attention.qk_rope_head_dim
    expansion = attention.kv_b_proj
    query = expansion.queries(latents).unflatten(-1, (4, 16 + P)).transpose(1, 2)
    key, value = expansion.expansion(latents).unflatten(-1, (4, 32)).transpose(1, 2).split(16, dim=-1)
    k_rot = torch.randn(1, 1, 7, P).expand(-1, 4, -1, -1)
    positions = query[..., 16:] @ k_rot.transpose(-1, -2)
    causal = torch.full((7, 7), -torch.inf).triu(1)

    def attended(asking: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
        scores = (asking @ asked.transpose(-1, -2) + positions) * (16 + P) ** -0.5 + causal
        return (scores.softmax(-1) @ value).transpose(1, 2)

    own, exchanged = attended(query[..., :16], key), attended(key, query[..., :16])[:, :, :3]
    weight = settings.get("reciprocal_weight")
    if weight is None:
        gate = attention.reciprocal.gate
        assert gate.abs().min() > 0
        exchanged = own[:, :, :3] + gate.tanh()[:, None] * F.rms_norm(exchanged, (16,), eps=1e-5)
    else:
        exchanged = (1 - weight) * own[:, :, :3] + weight * exchanged
    expected = attention.o_proj(torch.cat([exchanged, own[:, :, 3:]], dim=2).flatten(2))

    asking = attention._with_exchanged(query, latents[:, None])
    keys, values = attention.expand_kv(latents[:, None], k_rot[:, :1])
    found = F.scaled_dot_product_attention(asking, keys, values, is_causal=True, scale=attention.scaling)
    assert_close(attention.o_proj(attention.reciprocal(found.transpose(1, 2)).flatten(2)), expected)


def test_training_starts_from_attention_without_the_branch() -> None:
    model, plain = build("shared latent", **RECIPROCAL), build("shared latent", queries_from_latent=True)
    state = {name.replace("kv_b_proj.queries", "q_proj"): tensor for name, tensor in model.state_dict().items()}
    state = {name.replace("kv_b_proj.expansion", "kv_b_proj"): tensor for name, tensor in state.items()}
    plain.load_state_dict({name: tensor for name, tensor in state.items() if "reciprocal" not in name})
    batch = tiny_batch(model)
    expected = no_cache_logits(plain, *batch)
    assert rms(no_cache_logits(model, *batch) - expected) > 0.1
    fresh = GPT2MLAForCausalLM(model.config)
    assert all(not block.attn.reciprocal.gate.any() for block in fresh.transformer.h)
    fresh.load_state_dict(model.state_dict())
    for block in fresh.transformer.h:
        block.attn.reciprocal.gate.data.zero_()
    assert_close(no_cache_logits(fresh.eval(), *batch), expected)


def test_the_branch_shares_its_parameters_with_the_heads_it_belongs_to() -> None:
    plain, model = build("shared latent", queries_from_latent=True), build("shared latent", **RECIPROCAL)
    assert model.num_parameters() == plain.num_parameters() + 2 * 4
    assert plain.transformer.h[0].attn.q_proj.weight.shape == (64, 32)


@torch.no_grad()
def test_one_latent_serves_both_roles_at_a_sixth_and_a_twelfth_of_the_cache_of_gpt2() -> None:
    # The shapes of GPT-2 124M, one layer of them, as in `test_gpt2_mla`: 3072 bytes per token and layer in half.
    shapes = {"vocab_size": 16, "n_positions": 64, "n_embd": 768, "n_layer": 1, "n_head": 12, "n_inner": 8}
    ids = torch.ones(1, 64, dtype=torch.long)
    for splice, times in ((None, 6), (HALF, 12)):
        config = GPT2MLAConfig(**shapes, kv_lora_rank=256, kvsplice=splice, **RECIPROCAL)
        model = GPT2MLAForCausalLM(config).half().eval()
        cache = DynamicCache(config=model.config)
        model(ids, **cache_argument(cache), use_cache=True)
        assert cache_nbytes(cache) * times == 64 * 2 * 768 * 2


def test_a_built_in_splice_attends_on_codes_in_both_roles() -> None:
    model = build("shared latent", **RECIPROCAL, kvsplice=HALF)
    with torch.no_grad():
        assert not {path.decode for path in explain(model).layers} & {"expanded", "original"}
    batch = tiny_batch(model)
    assert_close(cached_logits(model, *batch)[0], no_cache_logits(model, *batch))


# ------------------------------------------------------------------------------------------------- the reciprocal MLP


def test_a_reciprocal_mlp_of_share_0_is_gpt2s_to_the_last_bit() -> None:
    def model(**settings: Any) -> GPT2MLAForCausalLM:
        torch.manual_seed(0)
        return GPT2MLAForCausalLM(GPT2MLAConfig(**BASE, **settings)).eval()

    plain, none = model(), model(reciprocal_mlp=0)
    batch = tiny_batch(plain)
    assert list(none.state_dict()) == list(plain.state_dict())
    assert torch.equal(no_cache_logits(none, *batch), no_cache_logits(plain, *batch))


def test_a_share_of_the_mlp_reads_the_attention_output_and_costs_no_parameter_but_a_norm() -> None:
    plain, model = build("shared latent"), build("shared latent", reciprocal_mlp=0.25)
    mlp = model.transformer.h[0].mlp
    assert mlp.c_fc.weight.shape == (64, 192)
    assert mlp.c_attention.weight.shape == (64, 64)
    assert model.num_parameters() == plain.num_parameters() + 2 * 2 * 64
    hidden, attended = torch.randn(2, 1, 3, 64)
    before = mlp(hidden, attended)
    assert rms(mlp(hidden, attended + 1) - before) > 1e-3
    with torch.no_grad():
        mlp.c_attention.weight.zero_()
    assert torch.equal(mlp(hidden, attended + 1), mlp(hidden, attended))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reciprocal_mlp": 1.0}, "`reciprocal_mlp` is 1.0; it must be the share"),
        ({"reciprocal_mlp": -0.1}, "`reciprocal_mlp` is -0.1"),
        ({"reciprocal_mlp": True}, "`reciprocal_mlp` is True"),
        ({"reciprocal_mlp": "half"}, "`reciprocal_mlp` is 'half'"),
        ({"reciprocal_mlp": float("nan")}, "`reciprocal_mlp` is nan"),
        ({"queries_from_latent": 1}, "`queries_from_latent` is 1"),
        ({"queries_from_latent": True, "q_lora_rank": 8}, "`q_lora_rank` is 8; it must be None"),
        ({"reciprocal_layers": "all"}, "`reciprocal_layers` needs `queries_from_latent`"),
        (RECIPROCAL | {"reciprocal_layers": "last:3"}, "with n from 1 to 2"),
        (RECIPROCAL | {"reciprocal_layers": "first:1"}, "`reciprocal_layers` is 'first:1'"),
        (RECIPROCAL | {"reciprocal_layers": "fisher:1"}, "`reciprocal_layers` is 'fisher:1'"),
        (RECIPROCAL | {"reciprocal_layers": [0]}, "`reciprocal_layers` is"),
        (RECIPROCAL | {"reciprocal_heads": 5}, "`reciprocal_heads` is 5; it must be from 1 to `n_head` .4."),
        (RECIPROCAL | {"reciprocal_heads": 0}, "`reciprocal_heads` is 0"),
        (RECIPROCAL | {"reciprocal_weight": 0.0}, "`reciprocal_weight` is 0.0"),
        (RECIPROCAL | {"reciprocal_weight": 1.5}, "`reciprocal_weight` is 1.5"),
        ({"reciprocal_heads": 2}, "works with `reciprocal_layers`"),
        ({"reciprocal_weight": 0.5}, "works with `reciprocal_layers`"),
        ({"reciprocal_mlp": 0.001}, "that is 0 of the MLP's 256 hidden units"),
        ({"reciprocal_mlp": 0.999}, "that is 256 of the MLP's 256 hidden units"),
    ],
)
def test_reciprocal_settings_that_cannot_work_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GPT2MLAConfig(**(BASE | settings))


def test_runs_from_before_the_reciprocal_settings_can_be_resumed() -> None:
    from kvsplice_hf.bench.pretraining.run import parse, settings_of

    plain, reciprocal = settings_of(*parse([])), settings_of(*parse([], **RECIPROCAL, reciprocal_mlp=0.25))
    assert not any("reciprocal" in name or name == "queries_from_latent" for name in plain)
    added = {name: value for name, value in reciprocal.items() if name not in plain}
    assert added == RECIPROCAL | {"reciprocal_mlp": 0.25}
