"""Compilation of launches for devices that are elsewhere, and what the compiled code takes of a device.

Triton chooses the variant of a kernel as at a start on the device: by dtypes, by which sizes are 1 or divisible by 16,
by the alignment of addresses. Only the driver is another one, which names the device and starts nothing.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from kvsplice_hf.attend.triton.blocks import Limits
from kvsplice_hf.attend.triton.launch import Launch
from kvsplice_hf.errors import UnsupportedError


class Target(NamedTuple):
    """A kind of device.

    Attributes:
        gpu: what the compiler is told.
        limits: what blocks are chosen by.
        registers: that a thread may have.
    """

    gpu: GPUTarget
    limits: Limits
    registers: int


# What a program may take: 163 KB of shared memory on an A100, 227 KB on an H100 and a B200, 64 KB on an MI300X and a
# W7900; and registers of a thread.
TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), Limits(163 << 10, 108, lanes=32), 255),
    "sm_90": Target(GPUTarget("cuda", 90, 32), Limits(227 << 10, 132, lanes=32), 255),
    "sm_100": Target(GPUTarget("cuda", 100, 32), Limits(227 << 10, 148, lanes=32), 255),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), Limits(64 << 10, 304, lanes=64, whole_operands=True), 512),
    "gfx1100": Target(GPUTarget("hip", "gfx1100", 32), Limits(64 << 10, 96, lanes=32, whole_operands=True), 256),
}
# Columns of Blackwell's tensor memory.
TENSOR_MEMORY = 512
# The release of Triton whose compiler the spills below are those of: the one that PyTorch 2.13 asks for.
MEASURED_WITH = "3.7"
# Bytes of a thread that may be spilled where nothing else is known: four numbers.
SPILLED = 16
# What is known to spill more of the attention kernel, by target, rows and bits of the products. (docs/kernels.md)
KNOWN_SPILLS: dict[tuple[str, str, int], int] = {
    # Rows of 576 numbers, with the accumulators of 64 queries, where the number of queries is not divisible by 16.
    ("sm_90", "unquantised", 16): 80,
    ("sm_100", "unquantised", 16): 24,
    # Codes, tables and levels of a tile of packed rows at once.
    ("sm_80", "packed", 16): 144,
    # The same for rows of 385 numbers, in three pieces, with products in float32, which no matrix core takes.
    ("sm_80", "packed", 32): 816,
    ("sm_90", "packed", 32): 688,
    ("sm_100", "packed", 32): 736,
    # The same, and tiles of the keys. On NVIDIA where the value takes two pieces (321 numbers), in 16 bits also where
    # the number of queries is not divisible by 16; on CDNA with rows of 576 numbers.
    ("sm_80", "coded keys", 16): 160,
    ("sm_90", "coded keys", 16): 24,
    ("sm_100", "coded keys", 16): 120,
    ("gfx942", "coded keys", 16): 20,
    ("sm_80", "coded keys", 32): 912,
    ("sm_90", "coded keys", 32): 712,
    ("sm_100", "coded keys", 32): 784,
    # The matrix cores of RDNA 3 want each number in two lanes: 16 queries of 576 numbers alone take 288 registers.
    ("gfx1100", "unquantised", 16): 984,
    ("gfx1100", "packed", 16): 976,
    ("gfx1100", "coded keys", 16): 1704,
    # In float32 it has none, and operands lie in registers as a whole as well.
    ("gfx1100", "unquantised", 32): 2224,
    ("gfx1100", "packed", 32): 2276,
    ("gfx1100", "coded keys", 32): 2756,
    # The same two kinds of rows along a trellis, with the bytes that the lowest bits of neighbours are in. On Blackwell
    # in 16 bits rows of 320 numbers, otherwise the same shapes.
    ("sm_80", "trellis", 16): 144,
    ("sm_100", "trellis", 16): 40,
    ("sm_80", "trellis", 32): 816,
    ("sm_90", "trellis", 32): 728,
    ("sm_100", "trellis", 32): 760,
    ("sm_80", "trellis, coded keys", 16): 112,
    ("sm_90", "trellis, coded keys", 16): 24,
    ("sm_100", "trellis, coded keys", 16): 96,
    ("gfx942", "trellis, coded keys", 16): 20,
    ("sm_80", "trellis, coded keys", 32): 1024,
    ("sm_90", "trellis, coded keys", 32): 832,
    ("sm_100", "trellis, coded keys", 32): 856,
    ("gfx1100", "trellis", 16): 920,
    ("gfx1100", "trellis, coded keys", 16): 1668,
    ("gfx1100", "trellis", 32): 2672,
    ("gfx1100", "trellis, coded keys", 32): 3248,
    # Rows in pages, as far as the tests compile them: a page's number, and which rows are left out, in each step.
    ("sm_80", "packed, in pages", 16): 120,
    ("sm_80", "trellis, predicted latents, in pages", 16): 152,
    ("gfx942", "coded keys, in pages", 16): 48,
    ("gfx1100", "packed, in pages", 16): 916,
    # The kernel of all key heads, by the numbers of a key.
    ("sm_100", "heads of 64", 16): 24,
    ("sm_90", "heads of 64", 32): 32,
    ("sm_100", "heads of 64", 32): 56,
    ("sm_100", "heads of 128", 16): 56,
    ("gfx1100", "heads of 128", 16): 472,
    ("gfx1100", "heads of 128", 32): 432,
    ("sm_100", "heads of 256", 16): 96,
    ("gfx1100", "heads of 256", 16): 3140,
}


class Resources(NamedTuple):
    """What a compiled kernel takes.

    Attributes:
        shared_memory: bytes of a program.
        tensor_memory: columns of a program; 0 where the device has none.
        registers: of a thread.
        spilled: bytes of a thread that found no register and lie in memory.
    """

    shared_memory: int
    tensor_memory: int
    registers: int
    spilled: int


def limit_excesses(resources: Resources, target: str, spilled: int = SPILLED) -> list[str]:
    """Which limits of a target what a kernel takes is above, in words; `spilled` bytes may be."""
    limits = {
        "bytes of shared memory": (resources.shared_memory, TARGETS[target].limits.shared_memory),
        "columns of tensor memory": (resources.tensor_memory, TENSOR_MEMORY),
        "registers": (resources.registers, TARGETS[target].registers),
        "spilled bytes": (resources.spilled, spilled),
    }
    return [f"{found} {what}, at most {most}" for what, (found, most) in limits.items() if found > most]


class _Elsewhere:
    """The driver of a device that is not here: as much of the interface as compiling takes."""

    def __init__(self, gpu: GPUTarget) -> None:
        self.gpu = gpu

    def get_current_device(self) -> str:
        return repr(self.gpu)  # kernels keep what they compiled by device

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.gpu


@contextmanager
def _compiling_for(gpu: GPUTarget) -> Iterator[None]:
    before = driver._active  # `driver.active` would look for a device where none was asked for yet
    driver.set_active(_Elsewhere(gpu))
    try:
        yield
    finally:
        driver.set_active(before)


def compile_launch(launch: Launch, target: Target) -> Any:
    """The compiled kernel of a launch, whose tensors may lie anywhere.

    Raises:
        UnsupportedError: in the interpreter of triton, which compiles nothing.
    """
    if not isinstance(launch.kernel, triton.JITFunction):
        raise UnsupportedError(
            "Triton runs in its interpreter, which compiles nothing. Unset TRITON_INTERPRET and start a new process."
        )
    with _compiling_for(target.gpu):
        return launch.kernel.warmup(*launch.arguments, grid=launch.grid, **launch.settings)


def resources_of(compiled: Any) -> Resources:
    """What a compiled kernel takes."""
    metadata = compiled.metadata
    usage = _nvidia_usage if metadata.target.backend == "cuda" else _amd_usage
    return Resources(metadata.shared, getattr(metadata, "tmem_size", None) or 0, *usage(compiled))


def _nvidia_usage(compiled: Any) -> tuple[int, int]:
    """Registers and spilled bytes of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # The kernels have no variables on the stack but what found no register.
    return _only(r"REG:(\d+)", usage), _only(r"STACK:(\d+)", usage)


def _amd_usage(compiled: Any) -> tuple[int, int]:
    """Registers and spilled bytes of a thread; accumulators of matrix products are among the registers."""
    text = compiled.asm["amdgcn"]
    return _only(r"\.vgpr_count:\s*(\d+)", text), _only(r"\.private_segment_fixed_size:\s*(\d+)", text)


def _only(pattern: str, text: str) -> int:
    (found,) = re.findall(pattern, text)
    return int(found)
