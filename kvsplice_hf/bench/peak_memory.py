"""Peak memory, one process per recipe: what one recipe has freed must not hide what the next one takes."""

import contextlib
import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from rich.table import Table
from tqdm import tqdm

from kvsplice_hf.bench.command_line import require_known
from kvsplice_hf.bench.grid import Row, ShapeArguments, by_setting, measured, new_rows, stock_of
from kvsplice_hf.bench.grid_tables import new_table, setting_cells
from kvsplice_hf.bench.recipes import RECIPES
from kvsplice_hf.bench.tables import ratio
from kvsplice_hf.errors import ConfigError


# glibc raises its threshold for giving memory back to the system whenever a large block is freed, and keeps what lies
# below it: a peak then disappears in memory that was resident already. A fixed threshold switches that off, so that a
# tensor of 64 KB or more enters the resident set when it is made and leaves it when it is freed. One arena, because
# what lies free in another thread's arena is resident as well.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


@dataclass
class PeakArguments(ShapeArguments):
    """Settings of programs that measure peak memory.

    Raises:
        ConfigError: also where peak memory cannot be read.
    """

    memory_steps: int = field(default=64, metadata={"help": "decode steps"})
    only: str | None = field(
        default=None, metadata={"help": "measure this recipe alone; for the processes that the program starts"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "memory_steps")
        require_known("only", [] if self.only is None else [self.only], RECIPES)
        if not self.is_on_gpu and not Path("/proc/self/clear_refs").exists():
            raise ConfigError(
                "Peak memory of a CPU is read from /proc, which is not there: this takes Linux, or a GPU."
            )


def reset_peak(device: str) -> int:
    """Forget the peak memory so far; bytes in use now."""
    _release()
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return psutil.Process().memory_info().rss


def read_peak(device: str) -> int:
    """Bytes in use at the peak since `reset_peak`."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024


def _release() -> None:
    """Give freed memory back to the system, so that taking it again can be seen."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def measured_apart(args: PeakArguments, measure: Callable[[str, int, int], Row]) -> list[Row] | None:
    """A row per setting and recipe, each from a process of its own: this program again, with `--only`.

    In such a process `measure` (of recipe, batch and context) gives the figures. They are printed as its last line of
    stdout, and there are no rows.
    """
    if args.only is not None:
        print(json.dumps(measure(args.only, *args.settings[0])))
        return None
    rows = []
    jobs = [(*setting, name) for setting in args.settings for name in args.recipes]
    for batch, length, name in tqdm(jobs, desc="peak memory", file=sys.stderr):
        one = ["--only", name, "--batch_sizes", str(batch), "--contexts", str(length)]
        process = subprocess.run(
            [sys.executable, *sys.argv, *one], capture_output=True, text=True, env={**os.environ, **_MALLOC}
        )
        row = new_rows([name], batch, length)[name]
        if process.returncode == 0:
            row |= json.loads(process.stdout.splitlines()[-1])
        else:
            killed = "killed, perhaps for its memory" if process.returncode < 0 else ""
            row["skipped"] = killed or (process.stderr.strip().splitlines() or ["no message"])[-1]
        rows.append(row)
    return rows


def memory_table(rows: list[Row], columns: dict[str, str], compared: str) -> Table:
    """Megabytes of figures by name, and how the figure `compared` relates to that of stock in the same setting."""
    table = new_table(rows, *columns.values(), "this / stock")
    for _, group in by_setting(rows):
        stock = stock_of(group)
        for row in measured(group):
            base = None if stock is None else stock[compared]
            megabytes = (f"{row[key] / 1e6:.1f}" for key in columns)
            table.add_row(*setting_cells(row), *megabytes, ratio(row[compared], base, ".3f"))
    return table
