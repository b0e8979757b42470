"""Runs a function in several processes that form one group of `torch.distributed` (gloo, on the CPU)."""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers.utils import logging


# A process that waits for one that has given up must not keep the suite: it is a failure of its own.
PATIENCE = 300
needs_gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")


def in_processes(function: Callable[..., Any], folder: Path, *args: Any, processes: int = 2) -> list[Any]:
    """What `function(folder, *args)` returns in each process, by rank.

    Args:
        function: of a module, by which the processes find it.
        folder: where they meet, and leave what they return.
        args: as further arguments.
        processes: how many.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = mp.spawn(_run, (function, str(folder), processes, args), nprocs=processes, join=False)
    end = time.monotonic() + PATIENCE
    while not context.join(timeout=5):
        if time.monotonic() > end:
            for process in context.processes:
                process.kill()
            pytest.fail(f"{function.__name__} hangs in {processes} processes")
    return [torch.load(folder / f"returned_{rank}", weights_only=False) for rank in range(processes)]


def _run(rank: int, function: Callable[..., Any], folder: str, processes: int, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost"}
    where = f"file://{folder}/rendezvous"
    patience = timedelta(seconds=PATIENCE - 30)
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=processes, timeout=patience)
    try:
        torch.save(function(Path(folder), *args), Path(folder) / f"returned_{rank}")
        dist.barrier()
    finally:
        dist.destroy_process_group()
