"""Engines of vLLM, one after the other in this process, for `test_vllm`.

What was asked for is JSON on the command line. The last line of stdout is a JSON object: by splice and mode what the
engine wrote, and what its cache holds.
"""

import gc
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any


os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)

from vllm import LLM, SamplingParams  # noqa: E402
from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402

from kvsplice_hf.attend.native.backend import NativeBackend  # noqa: E402
from kvsplice_hf.vllm import plugin, start  # noqa: E402


def made(asked: dict[str, Any], splice: str, **settings: Any) -> LLM:
    plugin.unregister()
    os.environ[start.FOLDER_VARIABLE] = splice
    plugin.register()
    return LLM(
        asked["base"],
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="float32",
        max_model_len=128,
        max_num_seqs=8,
        block_size=asked["block_size"],
        disable_log_stats=False,
        **({"kv_cache_memory_bytes": 1 << 22} | settings),
    )


def dropped(engine: LLM) -> None:
    engine.llm_engine.engine_core.shutdown()
    del engine
    gc.collect()
    cleanup_dist_env_and_memory()


def counted(engine: LLM, name: str) -> int:
    return int(sum(metric.value for metric in engine.get_metrics() if metric.name == f"vllm:{name}"))


def written(asked: dict[str, Any], engine: LLM) -> list[list[int]]:
    sampling = SamplingParams(temperature=0, max_tokens=asked["new_tokens"], ignore_eos=True, detokenize=False)
    given: Any = [{"prompt_token_ids": prompt} for prompt in asked["prompts"]]
    return [list(out.outputs[0].token_ids) for out in engine.generate(given, sampling, use_tqdm=False)]


def size_of_cache(engine: LLM) -> dict[str, int]:
    cache = engine.llm_engine.vllm_config.cache_config
    specs = engine.llm_engine.engine_core.engine_core.model_executor.get_kv_cache_specs()[0]
    pages = sum(spec.page_size_bytes for spec in specs.values())
    return {"tokens": cache.num_gpu_blocks * cache.block_size, "page_bytes": pages}


def watched_kernels() -> Counter[str]:
    """Counts the calls of C++ that code new tokens, and those of decode steps that read rows in their pages."""
    calls: Counter[str] = Counter()

    def stand_in(name: str, counts: Callable[..., bool]) -> None:
        function = getattr(NativeBackend, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            calls[name] += counts(*args)
            return function(*args, **kwargs)

        setattr(NativeBackend, name, watched)

    stand_in("encode", lambda *args: True)
    stand_in("decode", lambda backend, step: step.paging is not None)
    stand_in("encode_heads", lambda *args: True)
    stand_in("decode_heads", lambda *args: True)
    return calls


def main() -> None:
    asked = json.loads(sys.argv[1])
    calls = watched_kernels()
    found: dict[str, Any] = {}
    engine = made(asked, "", attention_config={"backend": "CPU_MLA"})
    found["sizes|stock"] = size_of_cache(engine)
    dropped(engine)
    for name, folder in asked["splices"].items():
        for mode, settings in asked["modes"].items():
            engine = made(asked, folder, **settings)
            row: dict[str, Any] = {"first": written(asked, engine), "again": written(asked, engine)}
            row |= {counter: counted(engine, counter) for counter in ("num_preemptions", "prefix_cache_hits")}
            row["kernels"] = dict(calls)
            calls.clear()
            found[f"{name}|{mode}"] = row
            if "num_gpu_blocks_override" not in settings:
                found[f"sizes|{name}"] = size_of_cache(engine)
            dropped(engine)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
