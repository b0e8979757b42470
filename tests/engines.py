"""Engines of vLLM, one after the other in this process, for `test_vllm`.

What was asked for is JSON on the command line. The last line of stdout is a JSON object: by splice and mode what the
engine wrote, and what its cache holds.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from kvsplice_hf.attend.native.backend import NativeBackend
from kvsplice_hf.bench.engines import counted, engine, written


# What the engines of tests have in common.
SMALL: dict[str, Any] = {"dtype": "float32", "max_model_len": 128, "max_num_seqs": 8, "kv_cache_memory_bytes": 1 << 22}


def small_engine(base: str, splice: str, **settings: Any) -> AbstractContextManager[Any]:
    """One with little memory on the model in `base`, with the splice of a folder or without one ("")."""
    return engine(Path(base), Path(splice) if splice else None, **(SMALL | settings))


def answers(made: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """What an engine writes when it is asked and asked again, and what it counted meanwhile."""
    row: dict[str, Any] = {name: written(made, asked["prompts"], asked["new_tokens"]) for name in ("first", "again")}
    return row | {counter: counted(made, counter) for counter in ("num_preemptions", "prefix_cache_hits")}


def size_of_cache(made: Any) -> dict[str, int]:
    cache = made.llm_engine.vllm_config.cache_config
    specs = made.llm_engine.engine_core.engine_core.model_executor.get_kv_cache_specs()[0]
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
    stand_in("decode_heads", lambda backend, step, prepared: step.paging is not None)
    return calls


def main() -> None:
    asked = json.loads(sys.argv[1])
    calls = watched_kernels()
    found: dict[str, Any] = {}
    size = {"block_size": asked["block_size"]}
    with small_engine(asked["base"], "", attention_config={"backend": "CPU_MLA"}, **size) as made:
        found["sizes|stock"] = size_of_cache(made)
    for name, folder in asked["splices"].items():
        for mode, settings in asked["modes"].items():
            with small_engine(asked["base"], folder, **(size | settings)) as made:
                found[f"{name}|{mode}"] = answers(made, asked) | {"kernels": dict(calls)}
                if "num_gpu_blocks_override" not in settings:
                    found[f"sizes|{name}"] = size_of_cache(made)
            calls.clear()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
