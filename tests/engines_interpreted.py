"""An engine of vLLM on the backend for GPUs, on a CPU: its kernels run in Triton's interpreter. For `test_vllm_cuda`.

What was asked for is JSON on the command line. The last line of stdout is a JSON object.
"""

import json
import os
import sys
from typing import Any


os.environ["TRITON_INTERPRET"] = "1"

from engines import answers, small_engine  # noqa: E402

from kvsplice_hf.attend import choice  # noqa: E402
from kvsplice_hf.vllm import plugin  # noqa: E402


def main() -> None:
    asked: dict[str, Any] = json.loads(sys.argv[1])
    plugin._CPU = plugin._CUDA[0], plugin._CPU[1]  # which is registered in its place
    with small_engine(asked["base"], asked["splice"], block_size=asked["block_size"]) as made:
        row = answers(made, asked)
        runner = made.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        row["layers"] = [type(part.impl).__name__ for part in runner.model.modules() if hasattr(part, "impl")]
    steps = {" ".join(map(str, (kind[0], kind[-1]))): good for kind, good in choice._verdicts.items()}
    print(json.dumps(row | {"steps": steps}))


if __name__ == "__main__":
    main()
