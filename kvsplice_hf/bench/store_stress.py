"""Several processes at one `PromptCache`, and writers that are killed.

    python -m kvsplice_hf.bench.store_stress FOLDER SEED SECONDS MAX_BYTES

is one of the processes: it stores prompts of a tiny random model and reads them back, and prints what it did.
"""

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvsplice_hf.errors import CheckpointError
from kvsplice_hf.rest.saving import describe_cache
from kvsplice_hf.rest.store import PromptCache


_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
_PROMPTS, _LENGTH = 24, 160
# For about half of the prompts, so that processes make room for each other's.
_ROOM = 1_000_000


def tiny_model() -> Any:
    """A model of random weights, the same in every process."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**_SIZES)).eval()


def prompt(number: int) -> torch.Tensor:
    """Prompt `number`, int64 [1, T]."""
    chance = torch.Generator().manual_seed(number)
    return torch.randint(8, 64, (1, _LENGTH), generator=chance, dtype=torch.int64, device="cpu")


def work(folder: str, seed: int, seconds: float, max_bytes: int | None = None) -> dict[str, int]:
    """Store and read prompts for a while; every cache that is found is compared with one that is computed."""
    model: Any = tiny_model()
    chance = random.Random(seed)
    store = PromptCache(folder, max_bytes=max_bytes)
    done = {"written": 0, "read": 0, "wrong": 0}
    # Those that may be killed write all the time, and so have prompts of their own.
    first = seed * _PROMPTS if max_bytes is None else 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ids = prompt(first + chance.randrange(_PROMPTS))
        found = store.find(model, ids)
        if found is None:
            store.prepare(model, ids)
            done["written"] += 1
            continue
        done["read"] += 1
        with torch.no_grad():
            expected = model(ids[:, :-1], use_cache=True)
        kept = next(value for value in expected.values() if hasattr(value, "layers"))
        pairs: Any = zip(found.layers, kept.layers, strict=True)
        same = all(torch.equal(one.keys, two.keys) for one, two in pairs)
        done["wrong"] += not same
    return done


def side_by_side(folder: Path, processes: int, seconds: float) -> list[dict[str, int]]:
    """What each of several processes did at one folder.

    Raises:
        subprocess.CalledProcessError: one of them failed.
    """
    running = [_started(folder, seed, seconds, _ROOM) for seed in range(processes)]
    outputs = [process.communicate()[0] for process in running]
    for process in running:
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, process.args)
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def killed(folder: Path, kills: int) -> dict[str, int]:
    """Kill writers at random moments; entries that were whole before and are damaged after, and what cannot be read."""
    chance, found = random.Random(0), {"kills": kills, "entries": 0, "lost": 0, "damaged": 0}
    before: set[Path] = set()
    for seed in range(kills):
        process = _started(folder, seed, 3600)
        assert process.stdout is not None
        process.stdout.readline()  # it has begun
        time.sleep(chance.uniform(0, 0.4))
        process.kill()
        process.wait()
        now = {entry.path for entry in PromptCache(folder).entries()}
        found["lost"] += len(before - now)
        for path in now:
            try:
                describe_cache(path)
            except CheckpointError:
                found["damaged"] += 1
        before = now
    found["entries"] = len(before)
    return found


def _started(folder: Path, seed: int, seconds: float, max_bytes: int = 0) -> "subprocess.Popen[str]":
    numbers = [str(seed), str(seconds), str(max_bytes)]
    command = [sys.executable, "-m", "kvsplice_hf.bench.store_stress", str(folder), *numbers]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


if __name__ == "__main__":
    tiny_model()
    print("begun", flush=True)
    print(json.dumps(work(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]) or None)))
