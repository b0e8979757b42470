"""Engines of vLLM as they are served: in processes of their own, with parts of the model in each, compiled, by its API.

All of it needs vLLM, and is skipped where that is not installed; `make test-vllm` runs it.
"""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from ordinary_models import build_ordinary
from test_packed import calibrated
from test_vllm import NEW_TOKENS, PAGES_OF_ENGINE, PROMPTS, ROWS, continued, dense_model
from tiny_models import WEIGHT_STD, build
from transformers import AutoModelForCausalLM

from kvsplice_hf import KVSpliceConfig, patch_model_with_kvsplice, save_kvsplice
from kvsplice_hf.bench.api_server import asked, free_port, wait_for
from kvsplice_hf.bench.small_model import save_word_tokenizer


pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here")
TESTS = Path(__file__).parent
SPLICE = "bytes, exact tokens"
PATIENCE = 420
TWO_CORES = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}


@dataclass
class Case:
    """An engine: of which model, asked for what, and how many workers with which layers it has."""

    model: str = "dense"
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    layers: tuple[tuple[int, ...], ...] = ((0, 1),)
    mode: str = "NONE"
    attention: str = "SplicedMLAImpl"


CASES = {
    "one worker, experts": Case("experts"),
    "two workers with half of the heads each": Case(
        settings={"tensor_parallel_size": 2}, environment=TWO_CORES, layers=((0, 1), (0, 1))
    ),
    "compiled": Case(settings={"enforce_eager": False}, mode="DYNAMO_TRACE_ONCE"),
    "two workers with half of the layers each, compiled": Case(
        settings={"enforce_eager": False, "pipeline_parallel_size": 2},
        environment=TWO_CORES,
        layers=((0,), (1,)),
        mode="DYNAMO_TRACE_ONCE",
    ),
    "ordinary attention, two workers with half of the layers each, compiled": Case(
        "llama",
        settings={"enforce_eager": False, "pipeline_parallel_size": 2},
        environment=TWO_CORES,
        layers=((0,), (1,)),
        mode="DYNAMO_TRACE_ONCE",
        attention="SplicedHeadsImpl",
    ),
}


def experts_model() -> Any:
    """A tiny model whose second layer has experts, of sizes that vLLM's code for CPUs takes."""
    tiny = build("deepseek_v3", torch.float32)
    # How transformers chooses experts in any case, and vLLM where the settings say so, as those of published models do.
    tiny.config.topk_method, tiny.config.scoring_func = "noaux_tc", "sigmoid"
    model = type(tiny)(tiny.config).float().eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=WEIGHT_STD)
    return model


def llama_model() -> Any:
    """A tiny model with ordinary attention, two query heads to a key head."""
    return build_ordinary("llama", max_position_embeddings=512)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[list[int]]]]:
    """The folder of models and their splices, and by model what transformers writes."""
    folder = tmp_path_factory.mktemp("models")
    expected = {}
    for name, made in (("dense", dense_model), ("experts", experts_model), ("llama", llama_model)):
        made().save_pretrained(folder / name)
        model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).eval()
        patch_model_with_kvsplice(model, KVSpliceConfig(**ROWS[SPLICE]), calibration=calibrated(model))
        save_kvsplice(model, folder / f"{name}-splice")
        save_word_tokenizer(folder / name, model.config.vocab_size)
        expected[name] = [continued(model, prompt) for prompt in PROMPTS]
    return folder, expected


def ended(command: list[str], environment: dict[str, str]) -> tuple[int, str, str]:
    """Exit code and output of a program. Its processes are ended with it, whatever happens: engines outlive a test."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=PATIENCE)
        return process.returncode, output, errors
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize("name", CASES)
def test_an_engine_in_processes_writes_what_the_patched_model_writes(
    name: str, models: tuple[Path, dict[str, list[list[int]]]]
) -> None:
    folder, expected = models
    case = CASES[name]
    given = {"base": str(folder / case.model), "prompts": PROMPTS, "new_tokens": NEW_TOKENS}
    given |= {"settings": {"block_size": PAGES_OF_ENGINE} | case.settings}
    paths = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths, "KVSPLICE_VLLM": str(folder / f"{case.model}-splice")}
    # What is compiled is compiled here, and not found from an earlier run.
    environment |= {"VLLM_CACHE_ROOT": str(folder / "cache"), "VLLM_CPU_CI_ENV": "0"}
    environment.pop("VLLM_CPU_KVCACHE_SPACE", None)
    program = str(TESTS / "engines_in_processes.py")
    code, output, errors = ended([sys.executable, program, json.dumps(given)], environment | case.environment)
    assert code == 0, errors[-3000:]
    found = json.loads(output.splitlines()[-1])
    assert found["mode"] == case.mode
    assert found["backends"] == [[case.attention]] * len(case.layers)
    assert found["first"] == expected[case.model]
    assert found["again"] == expected[case.model]
    layers = [tuple(f"model.layers.{layer}.self_attn.attn" for layer in of_worker) for of_worker in case.layers]
    assert [tuple(sorted(rows)) for rows in found["rows"]] == layers
    by_layer: dict[str, set[str]] = {}
    for rows in found["rows"]:
        for layer, digest in rows.items():
            by_layer.setdefault(layer, set()).add(digest)
    assert all(len(digests) == 1 for digests in by_layer.values()), "workers with the same layer hold the same rows"


def test_the_server_answers_many_at_once_with_what_the_patched_model_writes(
    models: tuple[Path, dict[str, list[list[int]]]],
) -> None:
    folder, expected = models
    port = free_port()
    engine = "--dtype float32 --enforce-eager --max-model-len 128 --block-size 16 --kv-cache-memory-bytes 4194304"
    command = [sys.executable, str(TESTS.parent / "scripts" / "run" / "serve.py"), "--port", str(port)]
    command += ["--model", str(folder / "dense"), "--splice", str(folder / "dense-splice"), "--engine", engine]
    log = folder / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        wait_for(f"http://127.0.0.1:{port}", process, log)

        def answer(prompt: list[int]) -> list[int]:
            body = {"model": str(folder / "dense"), "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0}
            body |= {"ignore_eos": True, "return_token_ids": True}
            tokens: list[int] = asked(f"http://127.0.0.1:{port}", "/v1/completions", body)["choices"][0]["token_ids"]
            return tokens

        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            assert list(pool.map(answer, PROMPTS)) == expected["dense"]
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
