"""An engine of vLLM with workers in processes of their own, for `test_vllm_processes`.

What was asked for is JSON on the command line. The last line of stdout is a JSON object: what the engine wrote when it
was asked and asked again, and which rows each of its workers held in between. vLLM adds `EngineRows` to its workers,
which find this module on their path.
"""

import hashlib
import json
import sys
from typing import Any

from kvsplice_hf.bench.engines import written


class EngineRows:
    """Methods of a worker of vLLM, in its process (`worker_extension_cls`)."""

    def _layers(self) -> dict[str, Any]:
        layers = self.model_runner.compilation_config.static_forward_context  # type: ignore[attr-defined]
        return {name: layer for name, layer in layers.items() if hasattr(layer, "impl")}

    def digests_of_rows(self) -> dict[str, str]:
        """By layer a digest of the rows in its pages, without those of page 0, which belongs to nobody."""
        caches = {name: layer.kv_cache[1:].numpy() for name, layer in self._layers().items()}
        return {name: hashlib.sha256(cache.tobytes()).hexdigest() for name, cache in caches.items()}

    def backends(self) -> list[str]:
        """Names of the classes that compute attention."""
        return sorted({type(layer.impl).__name__ for layer in self._layers().values()})


def main() -> None:
    from vllm import LLM

    asked = json.loads(sys.argv[1])
    engine = LLM(
        asked["base"],
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=128,
        max_num_seqs=8,
        kv_cache_memory_bytes=1 << 22,
        worker_extension_cls="engines_in_processes.EngineRows",
        **({"enforce_eager": True} | asked["settings"]),
    )
    prompts, new_tokens = asked["prompts"], asked["new_tokens"]
    found: dict[str, Any] = {"first": written(engine, prompts, new_tokens)}
    found |= {"rows": engine.collective_rpc("digests_of_rows"), "again": written(engine, prompts, new_tokens)}
    found["backends"] = engine.collective_rpc("backends")
    found["mode"] = engine.llm_engine.vllm_config.compilation_config.mode.name
    engine.llm_engine.engine_core.shutdown()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
