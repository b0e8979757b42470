"""vLLM computes on checkpoints of this package what transformers computes: converted models, and those of lower rank.

Each group of engines runs in a process of its own, which is skipped where vLLM is not installed (`make test-vllm`).
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_convert import build
from transformers import AutoModelForCausalLM

from kvsplice_hf import KVSpliceCalibrator, KVSpliceConfig, load_kvsplice, patch_model_with_kvsplice, save_kvsplice
from kvsplice_hf.convert import convert_to_mla, reduce_rank


pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here")

VOCABULARY, NEW_TOKENS = 128, 8
PROMPTS = [list(range(20, 20 + length)) for length in (3, 45, 17, 45, 70, 9)]
REMEDY = {"compilation_config": {"custom_ops": ["-rotary_embedding"]}}
STOCK = {"attention_config": {"backend": "CPU_MLA"}, "enable_prefix_caching": False}
IN_PIECES = {"enable_prefix_caching": True, "max_num_batched_tokens": 32}
# By name: model, whether it is spliced, settings of the engine, and variables of its process.
ENGINES: dict[str, tuple[str, bool, dict[str, Any], dict[str, str]]] = {
    "converted": ("converted", False, STOCK | REMEDY, {}),
    "converted, spliced": ("converted", True, IN_PIECES, {}),
    "reduced, spliced": ("reduced", True, IN_PIECES, {}),
    # The backend of this release for CPUs decodes rows of 512 + 64 numbers alone; that of ordinary attention takes any.
    "reduced": ("reduced", False, REMEDY | {"block_size": 32}, {"VLLM_MLA_DISABLE": "1"}),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with ordinary attention in the plain form, the same with a smaller latent, and a splice of each."""
    folder = tmp_path_factory.mktemp("checkpoints")
    settings = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 64}
    source = build("Llama", vocab_size=VOCABULARY, hidden_size=576, bos_token_id=0, eos_token_id=1, **settings)
    with torch.no_grad():
        source.model.embed_tokens.weight.mul_(50)
    ids = torch.randint(8, VOCABULARY, (24, 100), generator=torch.Generator().manual_seed(0))
    converted = convert_to_mla(source, rope_dim=64, kv_lora_rank=512, calibration=ids, plain=True)
    reduced, _ = reduce_rank(converted, 256, tokens=ids)
    for name, model in (("converted", converted), ("reduced", reduced)):
        model.save_pretrained(folder / name)
        model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
        calibration = KVSpliceCalibrator(model).collect(ids)
        # Many bits: at few, codes at the border of two levels change what a random model writes.
        config = KVSpliceConfig(bits=8.0, sink_tokens=4)
        save_kvsplice(patch_model_with_kvsplice(model, config, calibration=calibration), folder / f"{name}-splice")
    return folder


@pytest.fixture(scope="module")
def engines(checkpoints: Path) -> dict[str, Any]:
    """What all engines write; those with the same environment in one process."""
    found: dict[str, Any] = {}
    program = Path(__file__).parent / "stock_engines.py"
    for variables in ({}, {"VLLM_MLA_DISABLE": "1"}):
        chosen = {
            name: {
                "model": str(checkpoints / model),
                "splice": str(checkpoints / f"{model}-splice") if spliced else "",
                "settings": settings,
            }
            for name, (model, spliced, settings, wanted) in ENGINES.items()
            if wanted == variables
        }
        asked = {"prompts": PROMPTS, "new_tokens": NEW_TOKENS, "engines": chosen}
        command = [sys.executable, str(program), json.dumps(asked)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ | variables)
        assert ended.returncode == 0, ended.stderr[-3000:]
        found |= json.loads(ended.stdout.splitlines()[-1])
    return found


@torch.no_grad()
def expected(checkpoints: Path, name: str, spliced: bool) -> tuple[list[list[int]], list[list[float]]]:
    """Tokens and log-probabilities of transformers."""
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoints / name, dtype=torch.float32).eval()
    if spliced:
        load_kvsplice(model, checkpoints / f"{name}-splice")
    model.generation_config.eos_token_id = None
    tokens, scores = [], []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
        tokens.append(out[0, len(prompt) :].tolist())
        scores.append(model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].tolist())
    return tokens, scores


@torch.no_grad()
def assert_as_likely(checkpoints: Path, name: str, found: list[list[int]], wanted: list[list[int]]) -> None:
    """The first token that an engine with a splice writes otherwise, if any, is as likely to transformers."""
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoints / name, dtype=torch.float32).eval()
    load_kvsplice(model, checkpoints / f"{name}-splice")
    for prompt, one, other in zip(PROMPTS, found, wanted, strict=True):
        assert len(one) == len(other)
        differing = [place for place, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]
        if differing:
            place = differing[0]
            scores = model(torch.tensor([prompt + other[:place]])).logits[0, -1].log_softmax(-1)
            assert scores[other[place]] - scores[one[place]] < 0.1


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_computes_what_transformers_computes(name: str, checkpoints: Path, engines: dict[str, Any]) -> None:
    model, spliced, _, _ = ENGINES[name]
    tokens, scores = expected(checkpoints, model, spliced)
    if spliced:
        assert_as_likely(checkpoints, model, engines[name]["tokens"], tokens)
    else:
        assert engines[name]["tokens"] == tokens
    # The engine's latents differ from those of transformers in their last digit. Where one lies at the border of two
    # levels, its code falls on either side, and all later tokens read that.
    tolerance = 0.1 if spliced else 1e-3
    for found, wanted in zip(engines[name]["scores"], scores, strict=True):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=0, atol=tolerance)
