"""The reciprocal options of GPT-2 with Multi-head Latent Attention, beyond what all its variants have in common.

That caches, generation, saving, gradients and patches work with them is in `test_gpt2_mla.py`, as for other variants.
"""

from typing import Any

import pytest
import torch
from test_contract_models import no_cache_logits, rms
from test_gpt2_mla import BASE, build
from tiny_models import tiny_batch

from kvsplice_hf import ConfigError
from kvsplice_hf.gpt2_mla import GPT2MLAConfig, GPT2MLAForCausalLM


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
        ({"reciprocal_mlp": 0.001}, "that is 0 of the MLP's 256 hidden units"),
        ({"reciprocal_mlp": 0.999}, "that is 256 of the MLP's 256 hidden units"),
    ],
)
def test_reciprocal_settings_that_cannot_work_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GPT2MLAConfig(**(BASE | settings))
