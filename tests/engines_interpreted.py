"""An engine of vLLM on the backend for GPUs, on a CPU: its kernels run in Triton's interpreter. For `test_vllm_cuda`.

What was asked for is JSON on the command line. The last line of stdout is a JSON object.
"""

import json
import os
import sys
from typing import Any


os.environ["TRITON_INTERPRET"] = "1"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)

from vllm import LLM, SamplingParams  # noqa: E402

from kvsplice_hf.attend import choice  # noqa: E402
from kvsplice_hf.vllm import plugin, start  # noqa: E402


def main() -> None:
    asked: dict[str, Any] = json.loads(sys.argv[1])
    os.environ[start.FOLDER_VARIABLE] = asked["splice"]
    plugin._CPU = plugin._CUDA[0], plugin._CPU[1]  # which vLLM registers when it makes the engine
    engine = LLM(
        asked["base"],
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="float32",
        max_model_len=128,
        max_num_seqs=8,
        block_size=asked["block_size"],
        kv_cache_memory_bytes=1 << 22,
        disable_log_stats=False,
    )
    sampling = SamplingParams(temperature=0, max_tokens=asked["new_tokens"], ignore_eos=True, detokenize=False)
    given: Any = [{"prompt_token_ids": prompt} for prompt in asked["prompts"]]
    runs = [[list(out.outputs[0].token_ids) for out in engine.generate(given, sampling, use_tqdm=False)] for _ in "12"]
    model = engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model
    layers = [type(part.impl).__name__ for part in model.modules() if hasattr(part, "impl")]
    steps = {" ".join(map(str, (kind[0], kind[-1]))): good for kind, good in choice._verdicts.items()}
    print(json.dumps({"first": runs[0], "again": runs[1], "layers": layers, "steps": steps}))


if __name__ == "__main__":
    main()
