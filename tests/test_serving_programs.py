"""The programs that start servers of vLLM: what they refuse, what they say of a server that ended, what they write.

Nothing here needs vLLM; servers themselves are in `test_vllm_processes`.
"""

import contextlib
import http.server
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import load_program
from tiny_models import build
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kvsplice_hf import ConfigError, KVSpliceConfig, UnsupportedError, patch_model_with_kvsplice, save_kvsplice
from kvsplice_hf.attend import choice
from kvsplice_hf.bench import api_server
from kvsplice_hf.bench.small_model import FIRST_WORD, STOCK_ROW_BYTES, save_small_model, save_small_splice
from kvsplice_hf.manage.loading import read_splices
from kvsplice_hf.vllm import pages as vllm_pages
from kvsplice_hf.vllm.start import FOLDER_VARIABLE


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a model without a splice": ("run/serve.py", {"model": "m"}, "--model was given without --splice"),
    "a splice without a model": ("run/serve.py", {"splice": "s"}, "--splice was given without --model"),
    "a folder that is not there": ("run/serve.py", {"model": "./none", "splice": "./none"}, "is not there"),
    "half of a pair": ("measure/serving_load.py", {"model": "m"}, "--model and --splice go together"),
    "rows of a folder that is not there": (
        "measure/serving_rows.py",
        {"model": "./none", "splice": "./none"},
        "is not there",
    ),
    "no requests": ("measure/serving_load.py", {"requests": 0}, "--requests is 0; it must be at least 1"),
    "lengths below nothing": ("measure/serving_load.py", {"spread": 1.0}, "--spread is 1.0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_is_refused_before_anything_is_started(case: str) -> None:
    path, settings, words = REFUSED[case]
    program = load_program(path)
    with pytest.raises(ConfigError, match=words):
        program.check(program.Arguments(**settings))


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"prompts": 0}, "--prompts is 0"), ({"tokens": 0}, "--tokens is 0"), ({}, "is not one of packed latents")],
    ids=["no prompts", "no tokens", "rows of numbers"],
)
def test_rows_that_cannot_be_compared_are_refused_before_anything_is_started(
    settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    program = load_program("measure/serving_rows.py")
    save_kvsplice(patch_model_with_kvsplice(build("deepseek_v3", torch.float32), KVSpliceConfig(rank=8)), tmp_path)
    args = program.Arguments(**({"model": str(tmp_path), "splice": str(tmp_path)} | settings))
    with pytest.raises(ConfigError, match=words):
        program.check(args)


def test_the_longest_request_fits_into_what_the_server_is_told() -> None:
    program = load_program("measure/serving_load.py")
    args = program.Arguments(input_tokens=100, output_tokens=20, spread=0.5)
    assert program.longest(args) >= 150 + 30


def test_a_server_that_ended_is_reported_with_the_end_of_its_log(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_text("\n".join(["early", *(f"line {index}" for index in range(60)), "the reason"]))
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    process.wait()
    with pytest.raises(UnsupportedError, match="`vllm serve` ended with 3") as found:
        api_server.wait_for(f"http://{api_server.LOOPBACK}:{api_server.free_port()}", process, log)
    assert str(found.value).endswith("the reason")
    assert "early" not in str(found.value)


def test_what_slows_a_server_is_told_once(tmp_path: Path) -> None:
    log, kernel = tmp_path / "server.log", "The kernel for encode, C++ is not used: its result differs."
    pages = "Rows are gathered from their pages and read by PyTorch, which takes longer: no compiler."
    log.write_text("\n".join(["start", f"(EngineCore pid=7) {kernel}", kernel, f"WARNING {pages}", "end"]))
    assert api_server.slowed_by(log) == [kernel, pages]
    sources = [Path(module.__file__).read_text("utf-8") for module in (choice, vllm_pages) if module.__file__]
    assert all(any(words in source for source in sources) for words in api_server._WITHOUT_KERNELS)


def test_a_server_is_ended_with_the_processes_that_it_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_server, "_END_SECONDS", 1)
    child = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
    process = subprocess.Popen([sys.executable, "-c", f"{child} print('up', flush=True); time.sleep(60)"], stdout=-1)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    family = api_server.psutil.Process(process.pid).children(recursive=True)
    assert len(family) == 1
    api_server.end_with_children(process)
    process.wait(timeout=10)
    assert not any(found.is_running() and found.status() != "zombie" for found in family)
    process.stdout.close()


@contextlib.contextmanager
def answering(text: str) -> Iterator[str]:
    """The address of a server that answers everything with a text."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer((api_server.LOOPBACK, 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://{api_server.LOOPBACK}:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


METRICS = """# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0"} 5.0
vllm:num_requests_running{engine="1"} 2.0
# TYPE vllm:num_preemptions counter
vllm:num_preemptions_total{engine="0"} 3.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0"} 0.5
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="256",num_gpu_blocks="10",engine="0"} 1.0
"""


def test_metrics_are_summed_over_engines_and_the_cache_is_counted_in_tokens() -> None:
    pytest.importorskip("prometheus_client", reason="it comes with vLLM")
    with answering(METRICS) as url:
        found = api_server.metrics(url)
        with api_server.Watch(url) as watch:
            threading.Event().wait(1)
    assert (found["vllm:num_requests_running"], found["vllm:num_preemptions_total"]) == (7.0, 3.0)
    assert (found["tokens"], found["block_size"]) == (2560.0, 256.0)
    assert set(watch.running) == {7.0}
    assert watch.usage == 0.5


def test_a_splice_of_the_environment_reaches_no_server_that_was_given_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, "of somebody else")
    assert api_server.environment_of(None)[FOLDER_VARIABLE] == ""
    assert api_server.environment_of(Path("mine"))[FOLDER_VARIABLE] == str(Path("mine").absolute())


def test_the_small_model_and_its_splice_are_what_an_engine_reads(tmp_path: Path) -> None:
    save_small_model(tmp_path / "model", layers=1, positions=128)
    row = save_small_splice(tmp_path / "model", tmp_path / "splice", STOCK_ROW_BYTES / 4, sink_tokens=4)
    config = AutoConfig.from_pretrained(tmp_path / "model")
    assert (config.model_type, config.kv_lora_rank, config.qk_rope_head_dim) == ("deepseek_v3", 512, 64)
    assert 2 * (config.kv_lora_rank + config.qk_rope_head_dim) == STOCK_ROW_BYTES
    assert row <= STOCK_ROW_BYTES / 4
    assert sorted(read_splices(tmp_path / "splice")) == [0]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = list(range(FIRST_WORD, 40))
    assert tokenizer(tokenizer.decode(ids), add_special_tokens=False)["input_ids"] == ids
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert model.dtype == torch.bfloat16
