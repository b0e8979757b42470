"""Engines of vLLM on checkpoints that this package has written, one after the other, for `test_vllm_checkpoints`.

What was asked for is JSON on the command line: prompts, and by name the folder of a model, that of a splice or nothing,
settings of the engine, and variables of the environment. The last line of stdout is a JSON object: by name the tokens
that were written, and the log-probabilities of those of the prompts.
"""

import gc
import json
import os
import sys
from typing import Any


os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)

from vllm import LLM, SamplingParams  # noqa: E402
from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402

from kvsplice_hf.vllm import plugin, start  # noqa: E402


def asked_of(engine: dict[str, Any], prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    """What one engine writes, and its log-probabilities."""
    plugin.unregister()
    os.environ[start.FOLDER_VARIABLE] = engine["splice"]
    plugin.register()
    llm = LLM(
        engine["model"],
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="float32",
        max_model_len=128,
        max_num_seqs=8,
        kv_cache_memory_bytes=1 << 24,
        disable_log_stats=True,
        **({"block_size": 16} | engine["settings"]),
    )
    given: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    tokens = [list(out.outputs[0].token_ids) for out in llm.generate(given, sampling, use_tqdm=False)]
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    scores = [
        [place[token].logprob for token, place in zip(prompt[1:], out.prompt_logprobs[1:], strict=True)]
        for prompt, out in zip(prompts, llm.generate(given, sampling, use_tqdm=False), strict=True)
    ]
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return {"tokens": tokens, "scores": scores}


def main() -> None:
    asked = json.loads(sys.argv[1])
    found = {name: asked_of(engine, asked["prompts"], asked["new_tokens"]) for name, engine in asked["engines"].items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
