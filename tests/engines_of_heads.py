"""Engines of vLLM on models with ordinary attention, one after the other in this process, for `test_vllm_heads`.

What was asked for is JSON on the command line: prompts, rotations, what layers may ask of the backend, and by name the
folder of a model, that of a splice or nothing, and settings of the engine. The last line of stdout is a JSON object: by
name what the engine wrote, the log-probabilities of the prompts, what its cache holds and whose attention it has; and
how far keys that vLLM rotates are from those that transformers rotates; and what the backend says to each layer.
"""

import json
import sys
from collections import Counter
from typing import Any

import torch
from engines import answers, size_of_cache, small_engine, watched_kernels
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope

from kvsplice_hf.bench.engines import log_probabilities
from kvsplice_hf.errors import UnsupportedError
from kvsplice_hf.vllm.heads_backend import SplicedHeadsImpl


HEADS, SIZE, POSITIONS = 2, 32, 256


def asked_of(asked: dict[str, Any], wanted: dict[str, Any], calls: Counter[str]) -> dict[str, Any]:
    settings = {"block_size": wanted["block_size"]} | wanted["settings"]
    with small_engine(wanted["model"], wanted["splice"], **settings) as made:
        of_engine = made.llm_engine.vllm_config
        layers = of_engine.compilation_config.static_forward_context.values()
        row: dict[str, Any] = {"attention": sorted({type(layer.impl).__name__ for layer in layers})}
        row |= {"size": size_of_cache(made), "blocks": of_engine.cache_config.num_gpu_blocks}
        if wanted["writes"]:
            row |= answers(made, asked) | {"kernels": dict(calls)}
            calls.clear()
        if not wanted["splice"]:
            row["scores"] = log_probabilities(made, asked["prompts"])
    return row


def difference(rotation: dict[str, Any]) -> float:
    """The largest one between keys rotated by either, as vLLM's models hand them over: parts of longer ones."""
    random = torch.Generator().manual_seed(0)
    whole, positions = torch.randn(POSITIONS, 3 * HEADS * SIZE, generator=random), torch.arange(POSITIONS)
    query, key, _ = whole.clone().split(HEADS * SIZE, dim=-1)
    with set_current_vllm_config(VllmConfig()):
        rope = get_rope(SIZE, POSITIONS, True, dict(rotation))
    found = torch.stack(rope.forward_cpu(positions, query, key))
    config = LlamaConfig(
        hidden_size=HEADS * SIZE,
        num_attention_heads=HEADS,
        max_position_embeddings=POSITIONS,
        rope_parameters=dict(rotation),
    )
    parts = [part.view(1, POSITIONS, HEADS, SIZE).transpose(1, 2) for part in whole.split(HEADS * SIZE, dim=-1)[:2]]
    angles = LlamaRotaryEmbedding(config)(whole, positions[None])
    expected = torch.stack([part[0].transpose(0, 1).flatten(1) for part in apply_rotary_pos_emb(*parts, *angles)])
    return float((found - expected).abs().max())


def answer(layer: dict[str, Any]) -> str:
    """What the backend says to a layer that asks for something."""
    try:
        SplicedHeadsImpl(HEADS, SIZE, 1.0, **layer)
    except UnsupportedError as error:
        return str(error)
    return "made"


def main() -> None:
    asked = json.loads(sys.argv[1])
    calls = watched_kernels()
    found: dict[str, Any] = {name: asked_of(asked, wanted, calls) for name, wanted in asked["engines"].items()}
    found["rotations"] = {name: difference(rotation) for name, rotation in asked["rotations"].items()}
    found["layers"] = {name: answer(layer) for name, layer in asked["layers"].items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
