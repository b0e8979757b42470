"""`vllm serve` on this machine, for programs that ask it: started, waited for, watched, and ended with its engines."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from kvsplice_hf.errors import UnsupportedError
from kvsplice_hf.vllm.start import FOLDER_VARIABLE


LOOPBACK = "127.0.0.1"
# Nothing is looked for on a hub, and nothing is told to anybody.
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
# Of an engine's start on a slow machine, and of its end.
_START_SECONDS, _END_SECONDS = 600, 30
_POLL_SECONDS = 0.25
_TAIL = 30
# How messages begin that say so (attend/choice.py, vllm/pages.py).
_WITHOUT_KERNELS = ("The kernel for ", "Rows are gathered from their pages")


def vllm_command(*words: str) -> list[str]:
    """The command `vllm ...` in the environment of this Python."""
    return [sys.executable, "-m", "kvsplice_hf.vllm.commands", *words]


def environment_of(splice: Path | None) -> dict[str, str]:
    """The environment of an engine with a splice, or without one."""
    return os.environ | _OFFLINE | {FOLDER_VARIABLE: "" if splice is None else str(splice.absolute())}


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as given:
        given.bind((LOOPBACK, 0))
        return int(given.getsockname()[1])


@contextmanager
def api_server(model: str, splice: Path | None, options: Sequence[str], log: Path) -> Iterator[str]:
    """The OpenAI-compatible server of a model, until the block ends.

    Args:
        model: folder or name.
        splice: its folder, or None.
        options: further options of `vllm serve`.
        log: file for what the server says.

    Yields:
        The address that it listens on.

    Raises:
        UnsupportedError: it ended, or does not answer; the message has the last lines of its log.
    """
    port = free_port()
    command = vllm_command("serve", model, "--host", LOOPBACK, "--port", str(port), *options)
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, env=environment_of(splice), stdout=output, stderr=subprocess.STDOUT)
        try:
            url = f"http://{LOOPBACK}:{port}"
            wait_for(url, process, log)
            yield url
        finally:
            end_with_children(process)


def wait_for(url: str, process: subprocess.Popen[Any], log: Path) -> None:
    """Wait until a server answers.

    Args:
        url: of the server.
        process: that it runs in.
        log: file that it writes to.

    Raises:
        UnsupportedError: it ended, or does not answer; the message has the last lines of its log.
    """
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            found = f"ended with {process.returncode}"
            break
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(_POLL_SECONDS)
    else:
        found = f"did not answer within {_START_SECONDS} seconds"
    raise UnsupportedError(f"`vllm serve` {found}. The end of its log, {log}:\n{_tail(log)}")


def slowed_by(log: Path) -> list[str]:
    """What a server said of kernels that do not serve it, each line once: it is slower than it has to be."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    found = (line[line.index(words) :] for line in lines for words in _WITHOUT_KERNELS if words in line)
    return list(dict.fromkeys(found))


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL:])


def end_with_children(process: subprocess.Popen[Any]) -> None:
    """End a server and the engines it has started, which outlive it where it is killed."""
    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    process.terminate()
    _, alive = psutil.wait_procs(family, timeout=_END_SECONDS)
    for left in alive:
        left.kill()
    psutil.wait_procs(alive, timeout=_END_SECONDS)


def asked(url: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """The JSON answer of a server to a GET, or to a POST of a body."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{url}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=_START_SECONDS) as answer:
        return json.loads(answer.read())


def metrics(url: str) -> dict[str, float]:
    """Metrics of a server by name, summed over labels; and how many tokens its cache holds, as `tokens`."""
    from prometheus_client.parser import text_string_to_metric_families

    with urllib.request.urlopen(f"{url}/metrics", timeout=_END_SECONDS) as answer:
        text = answer.read().decode()
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
            if sample.name == "vllm:cache_config_info":
                found["tokens"] = float(int(sample.labels["num_gpu_blocks"]) * int(sample.labels["block_size"]))
                found["block_size"] = float(sample.labels["block_size"])
    return found


class Watch:
    """What a server says of itself while the block runs: the most and the mean of requests that run at once.

    Attributes:
        running: requests that ran, each time it was asked while there were any.
        usage: the most of its cache that was in use, in [0, 1].
    """

    def __init__(self, url: str) -> None:
        self.running: list[float] = []
        self.usage = 0.0
        self._url, self._ended = url, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self._ended.wait(_POLL_SECONDS):
            try:
                now = metrics(self._url)
            except OSError:  # busy; it is asked again
                continue
            if now.get("vllm:num_requests_running"):
                self.running.append(now["vllm:num_requests_running"])
            self.usage = max(self.usage, now.get("vllm:kv_cache_usage_perc", 0.0))

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
