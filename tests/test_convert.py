"""`convert_to_mla` gives a stock MLA model: exact where every rotation is kept, close and checked where it is not."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from byte_tokenizer import byte_tokenizer
from programs import load_program
from torch import nn
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM, DynamicCache, PreTrainedModel

from kvsplice_hf import KVSpliceConfig, patch_model_with_kvsplice
from kvsplice_hf.convert import convert_to_mla
from kvsplice_hf.convert.rotation import choose_slots, virtual_heads
from kvsplice_hf.convert.sampling import activations, capture_inputs, draw_pairs
from kvsplice_hf.convert.source import read_source
from kvsplice_hf.convert.target import CONSTANT
from kvsplice_hf.errors import ConfigError, UnsupportedError
from kvsplice_hf.upstream import cache_argument


VOCABULARY = 97
PAD = 0
BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
# name: (kind of model, what differs from BASE)
CONVERTIBLE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-mha": ("Llama", {"num_key_value_heads": 4}),
    "llama-gqa": ("Llama", {}),
    "llama-mqa": ("Llama", {"num_key_value_heads": 1}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True}),
    "llama-head-dim": ("Llama", {"head_dim": 20}),
    "llama-llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-idle-window": ("Mistral", {"sliding_window": 256, "head_dim": 16}),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
}
# Of the largest logit. What is left is fp32 rounding: products are associated in another way.
TOLERANCE = 2e-5


def build(kind: str, **changes: Any) -> PreTrainedModel:
    """A random model whose attention is selective and whose norms and biases are not the trivial ones."""
    config = getattr(transformers, f"{kind}Config")(**copy.deepcopy(BASE | changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    nn.init.normal_(parameter, std=0.5)
                elif parameter.dim() == 1:
                    nn.init.uniform_(parameter, 0.5, 1.5)
                elif ".self_attn." in name or name.startswith("lm_head"):
                    nn.init.normal_(parameter, std=0.25)
    return model.eval()


def make(name: str) -> PreTrainedModel:
    kind, changes = CONVERTIBLE[name]
    return build(kind, **changes)


def tokens(batch: int = 2, length: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return model(ids, **kwargs).logits


def assert_same(found: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * expected.abs().max().item())


@torch.no_grad()
def divergence(model: PreTrainedModel, other: PreTrainedModel, ids: torch.Tensor) -> float:
    """Mean KL of the next-token distributions, nats."""
    first, second = logits(model, ids).log_softmax(-1), logits(other, ids).log_softmax(-1)
    return (first.exp() * (first - second)).sum(-1).mean().item()


@pytest.fixture(scope="module")
def gqa() -> PreTrainedModel:
    """A model to look at, not to change."""
    return make("llama-gqa")


# ---------------------------------------------------------------------------------------------------------------------
# Exactness


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_with_every_rotation_kept_the_logits_are_the_same(name: str) -> None:
    model = make(name)
    converted = convert_to_mla(model, rope_dim="all")
    assert type(converted) is DeepseekV3ForCausalLM
    ids = tokens()
    expected = logits(model, ids)
    assert_same(logits(converted, ids, use_cache=False), expected)

    cache = DynamicCache(config=converted.config)
    steps = [logits(converted, part, **cache_argument(cache)) for part in ids.split([17, 1, 22], dim=1)]
    assert_same(torch.cat(steps, 1), expected)

    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    padded = logits(converted, ids, attention_mask=mask)
    assert_same(padded[mask.bool()], logits(model, ids, attention_mask=mask)[mask.bool()])


@pytest.mark.parametrize("name", ["llama-gqa", "mistral", "qwen2"])
def test_with_every_rotation_kept_greedy_text_is_the_same(name: str) -> None:
    model = make(name)
    converted = convert_to_mla(model, rope_dim="all")
    ids = tokens(length=12)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 32, "do_sample": False}
    assert torch.equal(converted.generate(ids, **settings), model.generate(ids, **settings))


@pytest.mark.parametrize("name", ["llama-gqa", "llama-llama3", "llama-yarn"])
def test_frequencies_are_carried_to_the_last_bit(name: str) -> None:
    model = make(name)
    wanted = model.model.rotary_emb.inv_freq.repeat_interleave(model.config.num_key_value_heads)
    found = convert_to_mla(model, rope_dim="all").model.rotary_emb.inv_freq
    if name == "llama-gqa":
        assert torch.equal(found, wanted)
    # Scaled frequencies need not be the reciprocal of any float32 number.
    assert torch.all((found - wanted).abs() <= 1.2e-7 * wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama-gqa", "qwen2"])
def test_half_precision_loses_no_more_than_the_original_does(name: str, dtype: torch.dtype) -> None:
    model, ids = make(name), tokens(4, 64)
    low = copy.deepcopy(model).to(dtype)
    converted = convert_to_mla(low, rope_dim="all")
    assert converted.dtype == dtype
    # Queries with a bias go through one more projection, and are rounded once more.
    bound = (4 if name == "qwen2" else 2) * divergence(model, low, ids)
    assert divergence(model, converted, ids) < bound
    # Converted in fp32 and rounded afterwards, as a loaded checkpoint would be.
    assert divergence(model, convert_to_mla(model, rope_dim="all").to(dtype), ids) < bound


def test_the_constant_channel_makes_the_norm_a_constant(gqa: PreTrainedModel) -> None:
    converted = convert_to_mla(gqa, rope_dim="all")
    attention = converted.model.layers[0].self_attn
    seen: list[torch.Tensor] = []
    hook = attention.kv_a_layernorm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    cache = DynamicCache(config=converted.config)
    logits(converted, tokens(), **cache_argument(cache))
    hook.remove()
    assert torch.all(seen[0][..., -1] >= CONSTANT)
    root_mean_square = seen[0].double().square().mean(-1).sqrt()
    assert (root_mean_square / root_mean_square.mean() - 1).abs().max() < 1e-6
    assert not cache.layers[0].keys[..., -1].any()  # and nothing of it is in the cache


# ---------------------------------------------------------------------------------------------------------------------
# What the result is


def test_the_result_is_saved_and_loaded_by_stock_code(gqa: PreTrainedModel, tmp_path: Path) -> None:
    converted = convert_to_mla(gqa, rope_dim=12, calibration=tokens())
    converted.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    assert type(loaded) is DeepseekV3ForCausalLM
    assert torch.equal(logits(loaded, tokens()), logits(converted, tokens()))


def test_a_fresh_process_without_this_package_computes_the_same(gqa: PreTrainedModel, tmp_path: Path) -> None:
    converted = convert_to_mla(gqa, rope_dim="all")
    converted.save_pretrained(tmp_path)
    code = (
        "import sys, torch, transformers\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}).eval()\n"
        f"print(model(torch.tensor({tokens(1, 6).tolist()})).logits[0, -1].argmax().item())\n"
        "assert not any(name.startswith('kvsplice') for name in sys.modules)\n"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert int(output.stdout.split()[-1]) == logits(gqa, tokens(1, 6))[0, -1].argmax().item()


def test_the_source_is_left_alone_and_shares_nothing() -> None:
    model = make("llama-tied").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    converted = convert_to_mla(model, rope_dim=8, calibration=tokens())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert converted.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["llama-gqa", "llama-tied"])
def test_embeddings_stay_tied_or_untied(name: str) -> None:
    model = make(name)
    converted = convert_to_mla(model, rope_dim="all")
    tied = converted.lm_head.weight is converted.model.embed_tokens.weight
    assert tied == converted.config.tie_word_embeddings == model.config.tie_word_embeddings


def test_the_result_can_be_trained() -> None:
    converted = convert_to_mla(make("qwen2"), rope_dim=8, calibration=tokens())
    converted(tokens(), labels=tokens()).loss.backward()
    attention = converted.model.layers[1].self_attn
    for module in (attention.q_a_proj, attention.q_b_proj, attention.kv_a_proj_with_mqa, attention.kv_b_proj):
        assert torch.isfinite(module.weight.grad).all()
        assert module.weight.grad.any()


def test_settings_of_generation_come_along(gqa: PreTrainedModel) -> None:
    model = copy.deepcopy(gqa)
    model.generation_config.max_new_tokens = 7
    assert convert_to_mla(model, rope_dim="all").generate(tokens(1, 5)).shape == (1, 12)


@pytest.mark.parametrize("rope_dim", [8, "all"])
def test_the_result_can_be_spliced(gqa: PreTrainedModel, rope_dim: int | str) -> None:
    converted = convert_to_mla(gqa, rope_dim=rope_dim, calibration=tokens())
    expected = converted.generate(tokens(), max_new_tokens=8, do_sample=False)
    patch_model_with_kvsplice(converted, KVSpliceConfig(compression_ratio=1.0))
    assert torch.equal(converted.generate(tokens(), max_new_tokens=8, do_sample=False), expected)


# ---------------------------------------------------------------------------------------------------------------------
# Fewer rotations


@pytest.mark.parametrize("name", ["llama-mha", "llama-biases", "qwen2"])
def test_more_rotations_lose_less(name: str) -> None:
    model = make(name)
    everything = model.config.num_key_value_heads * 12
    calibration, held_out = tokens(8, 64, seed=1), tokens(8, 64, seed=2)
    losses = [
        divergence(model, convert_to_mla(model, rope_dim=rope_dim, calibration=calibration), held_out)
        for rope_dim in (2, everything // 2, everything - 4, everything)
    ]
    assert losses[0] > losses[1] > losses[2] > losses[3]
    assert losses[3] < 1e-6


@torch.no_grad()
def test_key_heads_that_are_turned_copies_of_one_need_its_rotations_only() -> None:
    # Every frequency must matter within 40 tokens, or its cost drowns in rounding.
    model = build("Llama", rope_parameters={"rope_type": "default", "rope_theta": 10.0})
    frequencies = model.config.head_dim // 2
    for layer in model.model.layers:
        first, second = layer.self_attn.k_proj.weight.view(2, 2, frequencies, -1)
        turn = torch.polar(torch.linspace(0.5, 2, frequencies), torch.linspace(0, 3, frequencies))[:, None]
        copied = torch.complex(first[0], first[1]) * turn
        second[0], second[1] = copied.real, copied.imag
    converted = convert_to_mla(model, rope_dim=2 * frequencies, calibration=tokens())
    assert_same(logits(converted, tokens(seed=3)), logits(model, tokens(seed=3)), 1e-4)


@torch.no_grad()
def test_virtual_heads_are_key_heads_rewritten_ordered_by_cost(gqa: PreTrainedModel) -> None:
    source = read_source(gqa)
    sequences = activations(source, source.layers[0], capture_inputs(source, list(tokens()))[0])
    virtual = virtual_heads(source, sequences, torch.Generator().manual_seed(0))
    identity = torch.eye(2, dtype=torch.complex128).expand_as(virtual.mix)
    torch.testing.assert_close(virtual.mix @ virtual.unmix, identity)
    assert torch.all(virtual.cost[:, :-1] >= virtual.cost[:, 1:])
    assert torch.all(virtual.cost >= 0)
    # Nothing that turns slowly within 40 tokens costs much, however large its keys are.
    assert virtual.cost[-1].sum() < 1e-3 * virtual.cost[0].sum()
    assert torch.all(virtual.mean_turn.abs() <= 1 + 1e-5)


def test_slots_are_the_costliest_pairs_over_all_layers() -> None:
    costs = [torch.tensor([[5.0, 1.0], [4.0, 0.0]]), torch.tensor([[0.0, 0.0], [4.0, 3.0]])]
    assert choose_slots(costs, 2) == [(0, 0), (1, 0)]
    assert choose_slots(costs, 3) == [(0, 0), (1, 0), (1, 1)]


def test_fitted_queries_err_less_than_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("qwen2")
    calibration, held_out = tokens(8, 64, seed=1), tokens(8, 64, seed=2)
    fitted = convert_to_mla(model, rope_dim=8, calibration=calibration)
    monkeypatch.setattr("kvsplice_hf.convert.rotation.RIDGE", 1e9)  # leaves the start as it is
    start = convert_to_mla(model, rope_dim=8, calibration=calibration)
    assert divergence(model, fitted, held_out) < 0.97 * divergence(model, start, held_out)


@torch.no_grad()
def test_drawn_pairs_are_causal_and_weighted_like_attention(gqa: PreTrainedModel) -> None:
    source = read_source(gqa)
    sequence = activations(source, source.layers[1], capture_inputs(source, list(tokens(1)))[1])[0]
    sample = draw_pairs(source, sequence, 3, 39, torch.Generator().manual_seed(0))
    assert torch.all(sample.distance >= 0)
    assert sorted(sample.query_index.tolist()) == list(range(1, 40))
    ids = tokens(1)
    attention = copy.deepcopy(gqa)
    attention.set_attn_implementation("eager")
    expected = attention(ids, output_attentions=True).attentions[1][0, 3]
    found = torch.zeros_like(expected).index_put_(
        (sample.query_index[:, None].expand_as(sample.key_index), sample.key_index), sample.weight, accumulate=True
    )
    assert (found - expected)[1:].abs().sum(-1).mean() < 0.15
    # Softmax does not see what all keys of a query share.
    shifted = sample.centred(sample.logits + torch.randn(39, 1))
    torch.testing.assert_close(shifted, sample.centred(sample.logits), atol=1e-4, rtol=0)


def test_the_same_text_gives_the_same_model(gqa: PreTrainedModel) -> None:
    text = tokens(6, 20)
    first = convert_to_mla(gqa, rope_dim=8, calibration=text).state_dict()
    second = convert_to_mla(gqa, rope_dim=8, calibration=[text[:2], text[2:]]).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_frequencies_may_be_read_at_unequal_lengths(gqa: PreTrainedModel) -> None:
    text = [tokens(1, 30), tokens(2, 17), tokens(1, 2)]
    assert divergence(gqa, convert_to_mla(gqa, rope_dim=20, calibration=text), tokens(4, 30)) < 0.5


# ---------------------------------------------------------------------------------------------------------------------
# A narrower latent


@pytest.mark.parametrize("rank", [5, 20])
def test_a_narrower_latent_narrows_the_cache(gqa: PreTrainedModel, rank: int) -> None:
    converted = convert_to_mla(gqa, rope_dim=12, kv_lora_rank=rank, calibration=tokens())
    cache = DynamicCache(config=converted.config)
    logits(converted, tokens(), **cache_argument(cache))
    assert cache.layers[0].keys.shape[-1] == converted.config.kv_lora_rank == rank
    assert cache.layers[0].values.shape[-1] == 12


@pytest.mark.parametrize("name", ["llama-gqa", "qwen2"])
def test_a_wider_latent_loses_less(name: str) -> None:
    model = make(name)
    calibration, held_out = tokens(8, 64, seed=1), tokens(8, 64, seed=2)
    full = 2 * (12 - 8) + 25
    losses = [
        divergence(model, convert_to_mla(model, rope_dim=16, kv_lora_rank=rank, calibration=calibration), held_out)
        for rank in (8, 16, 28, full, None)
    ]
    assert losses[0] > losses[1] > losses[2] > losses[3]
    assert losses[3] == losses[4]


@torch.no_grad()
def test_values_of_low_rank_fit_a_narrow_latent_exactly() -> None:
    model = make("llama-biases")
    for layer in model.model.layers:
        value = layer.self_attn.v_proj.weight
        value.copy_(torch.randn(24, 5, generator=torch.Generator().manual_seed(0)) @ value[:5])
    converted = convert_to_mla(model, rope_dim="all", kv_lora_rank=6, calibration=tokens())
    assert_same(logits(converted, tokens(seed=3)), logits(model, tokens(seed=3)), 1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


def with_window() -> PreTrainedModel:
    return build("Mistral", sliding_window=16)


def with_some_windows() -> PreTrainedModel:
    return build("Qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=1)


def with_meta_weights() -> PreTrainedModel:
    with torch.device("meta"):
        return make("llama-gqa")


def with_packed_weights() -> PreTrainedModel:
    model = make("llama-gqa")
    model.model.layers[0].self_attn.v_proj.weight = nn.Parameter(torch.ones(24, 48).to(torch.int8), requires_grad=False)
    return model


class Unpacked(nn.Parameter):
    """A weight as torchao keeps it: of a class of its own, that says it is in the dtype of the model."""


def with_weights_of_a_class_of_their_own() -> PreTrainedModel:
    model = make("llama-gqa")
    model.model.layers[0].self_attn.v_proj.weight = Unpacked(torch.ones(24, 48))
    return model


def with_adapter() -> PreTrainedModel:
    model = make("llama-gqa")
    model.model.layers[1].self_attn.q_proj = nn.Sequential(model.model.layers[1].self_attn.q_proj)
    return model


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "sliding window": (with_window, "sliding window of 16 tokens, less than the context of 256"),
    "some sliding windows": (with_some_windows, "sliding window of 16"),
    "softcapping": (lambda: build("Gemma2", head_dim=12), "attn_logit_softcapping"),
    "norms on queries and keys": (lambda: build("Qwen3", head_dim=12), "q_norm"),
    "dynamic": (
        lambda: build("Llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        "RoPE of type 'dynamic'",
    ),
    "longrope": (
        lambda: build(
            "Llama",
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 6,
                "long_factor": [2.0] * 6,
                "original_max_position_embeddings": 64,
                "factor": 4.0,
            },
        ),
        "RoPE of type 'longrope'",
    ),
    "partial": (
        lambda: build(
            "Llama", rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
        ),
        "partial RoPE",
    ),
    "mlp biases": (lambda: build("Llama", mlp_bias=True), "the MLP has biases"),
    "experts": (lambda: build("Mixtral", num_local_experts=2), "mixture of experts"),
    "already MLA": (lambda: convert_to_mla(make("llama-gqa"), rope_dim="all"), "Multi-head Latent Attention already"),
    "fused projections": (lambda: build("Phi3", original_max_position_embeddings=256), "has no q_proj"),
    "unknown type": (lambda: build("Granite"), "'granite'"),
    "no rope": (lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2)), "gpt2"),
    "no head": (lambda: make("llama-gqa").model, "no causal language model"),
    "no model": (lambda: nn.Linear(2, 2), "no causal language model"),
    "meta": (with_meta_weights, "not loaded"),
    "packed": (with_packed_weights, "quantised"),
    "packed by torchao": (
        with_weights_of_a_class_of_their_own,
        "weight of v_proj is a Unpacked (packed",
    ),
    "adapter": (with_adapter, "merge_and_unload"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_stock_mla_cannot_hold_is_refused_by_name(case: str) -> None:
    builder, phrase = REFUSED[case]
    with pytest.raises(UnsupportedError) as caught:
        convert_to_mla(builder(), rope_dim="all")
    assert phrase in str(caught.value)
    assert "llama, mistral, qwen2" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "phrase"),
    [
        ({"rope_dim": 8}, "Pass token ids"),
        ({"rope_dim": "all", "kv_lora_rank": 9}, "`calibration` is None"),
        ({"rope_dim": 7}, "even number from 2 to 24"),
        ({"rope_dim": 0}, "even number from 2 to 24"),
        ({"rope_dim": 26}, "even number from 2 to 24"),
        ({"rope_dim": "some"}, "'some'"),
        ({"rope_dim": True}, "True"),
        ({"rope_dim": "all", "kv_lora_rank": 26}, "between 2 and 25"),
        ({"rope_dim": 8, "kv_lora_rank": 1}, "between 2 and 41"),
        ({"calibration": torch.ones(3, 9)}, "float32"),
        ({"calibration": torch.ones(9, dtype=torch.long)}, r"\[9\]"),
        ({"calibration": ["text"]}, "str"),
        ({"calibration": torch.ones(3, 1, dtype=torch.long)}, "two tokens at least"),
        ({"calibration": torch.full((1, 9), VOCABULARY)}, f"outside the vocabulary of {VOCABULARY}"),
        ({"calibration": []}, "Pass token ids"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(gqa: PreTrainedModel, settings: dict[str, Any], phrase: str) -> None:
    with pytest.raises(ConfigError, match=phrase):
        convert_to_mla(gqa, **{"rope_dim": 8} | settings)


# ---------------------------------------------------------------------------------------------------------------------
# The script


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Runs scripts/run/convert_to_mla.py in this process on a byte model and a text file."""
    build("Llama", vocab_size=256).save_pretrained(tmp_path / "llama")
    byte_tokenizer().save_pretrained(tmp_path / "llama")
    (tmp_path / "text.txt").write_text("\n\n".join(f"Paragraph {n} of a text about {n * n} things." for n in range(60)))
    main = load_program("run/convert_to_mla.py").main

    def run(output: Path, *arguments: str) -> None:
        command = ["convert_to_mla.py", "--model", str(tmp_path / "llama"), "--output", str(output)]
        texts = ["--calibration", str(tmp_path / "text.txt"), "--evaluation", str(tmp_path / "text.txt")]
        monkeypatch.setattr(sys, "argv", [*command, *texts, "--window", "64", "--calibration-window", "64", *arguments])
        main()

    return run


def test_the_script_writes_a_model_and_reports_in_json(
    script: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script(tmp_path / "mla", "--rope-dim", "12", "--kv-lora-rank", "20", "--evaluation-tokens", "256")
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    # Two layers of 2 x 2 x 12 numbers before, of 20 + 12 after, 4 bytes each.
    assert (report["bytes_per_token_before"], report["bytes_per_token_after"]) == (384, 256)
    assert report["evaluation_tokens"] == 256
    assert report["calibration_tokens"] > 0
    assert 0 < report["kl_nats"] < 0.5
    assert {"command", "machine", "versions"} <= set(report)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "mla")
    assert loaded.config.kv_lora_rank == 20


def test_the_script_overwrites_nothing_and_passes_errors_on(script: Callable[..., None], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="not an empty folder"):
        script(tmp_path / "llama")
    with pytest.raises(SystemExit, match="even number"):
        script(tmp_path / "new", "--rope-dim", "many")
    with pytest.raises(SystemExit, match=r"ConfigError: `rope_dim` is 13"):
        script(tmp_path / "new", "--rope-dim", "13")
    assert not (tmp_path / "new").exists()
