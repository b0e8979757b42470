"""Engines of vLLM on checkpoints that this package has written, one after the other, for `test_vllm_checkpoints`.

What was asked for is JSON on the command line: prompts, and by name the folder of a model, that of a splice or nothing,
settings of the engine, and variables of the environment. The last line of stdout is a JSON object: by name the tokens
that were written, and the log-probabilities of those of the prompts.
"""

import json
import sys
from typing import Any

from engines import small_engine

from kvsplice_hf.bench.engines import log_probabilities, written


def asked_of(engine: dict[str, Any], prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    """What one engine writes, and its log-probabilities."""
    settings = {"block_size": 16, "kv_cache_memory_bytes": 1 << 24} | engine["settings"]
    with small_engine(engine["model"], engine["splice"], **settings) as made:
        return {"tokens": written(made, prompts, new_tokens), "scores": log_probabilities(made, prompts)}


def main() -> None:
    asked = json.loads(sys.argv[1])
    found = {name: asked_of(engine, asked["prompts"], asked["new_tokens"]) for name, engine in asked["engines"].items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
