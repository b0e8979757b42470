"""How large the blocks of a program are, and into how many splits the rows are divided: functions of shape and device.

Nothing here asks for a device, so that a kernel can be compiled as it would run on a device that is elsewhere.
"""

import functools
from typing import NamedTuple

import torch

from kvsplice_hf.attend.triton.pieces import WIDEST, pieces_of, side_of


# Programs per multiprocessor that the splits should make: a second one works while the first waits for memory.
_PROGRAMS_PER_PROCESSOR = 2
# Fewer blocks of rows than this are not worth a split, whose result is written and read again.
_BLOCKS_PER_SPLIT = 4
# Wider rows leave 64 queries too little of shared memory and registers, and of the tensor memory of Blackwell. Decoded,
# they leave eight warps of 64 lanes too few registers.
_WIDEST_FOR_64 = 576
# Bytes of shared memory that the kernel of ordinary attention takes beside what makes keys of their codes.
_BESIDE_WEIGHTS = 1 << 15
# What devices have that do not say, AMD's among them.
_SHARED_MEMORY = 1 << 16


class Limits(NamedTuple):
    """What blocks and splits depend on, of a device.

    Attributes:
        shared_memory: bytes that a program may take.
        processors: multiprocessors or compute units.
        lanes: threads of a warp.
        whole_operands: whether a matrix product takes its operands into registers as a whole, as Triton has it on AMD.
    """

    shared_memory: int
    processors: int
    lanes: int
    whole_operands: bool = False


# It has no such limits.
INTERPRETER = Limits(shared_memory=0, processors=0, lanes=0)


class Blocks(NamedTuple):
    """Sizes of a program: its queries, the rows of a step, warps, and steps whose loads are under way."""

    queries: int
    rows: int
    warps: int
    stages: int


@functools.cache
def limits_of(device: torch.device) -> Limits:
    """The limits of a device; those of the interpreter anywhere but on CUDA and ROCm."""
    if device.type != "cuda":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", 0) or _SHARED_MEMORY
    return Limits(shared, properties.multi_processor_count, properties.warp_size, torch.version.hip is not None)


def choose_blocks(queries: int, n: int, dtype: torch.dtype, packed: bool, limits: Limits) -> Blocks:
    """Sizes that shared memory and registers hold.

    The more queries a program takes, the less often a row is read, but what finds no register is slow. The sizes are
    those with which the compiled kernels spill least (docs/kernels.md).

    Args:
        queries: M.
        n: numbers of a row, and of its key where that is coded apart from them: what a query has.
        dtype: of the products.
        packed: whether rows are decoded.
        limits: of the device.
    """
    if limits == INTERPRETER:
        return Blocks(16, 64, 4, 1)  # it pays for steps, not for numbers
    size, width = dtype.itemsize, sum(pieces_of(n))
    # Numbers that are read one by one, as those of rows at odd addresses, have an address each.
    needs_registers = packed or size == 4 or n % 16 > 0 or (limits.whole_operands and limits.lanes == 32)
    tall = 16 if queries <= 16 or needs_registers or width > _WIDEST_FOR_64 else 64
    rows = 16 if packed or limits.whole_operands else 64 // size
    stages = 1 if packed else 2
    while _shared_memory(tall, rows, stages, width, size) > limits.shared_memory and tall + stages > 17:
        tall, stages = (tall, stages - 1) if stages > 1 else (tall // 2, stages)
    # Four warps of 64 lanes may have twice the registers of eight.
    if limits.lanes == 64:
        few = size == 4 or (packed and n > _WIDEST_FOR_64)
    else:
        few = not needs_registers and tall == 16 and width <= 256
    return Blocks(tall, rows, 4 if few else 8, stages)


def choose_head_blocks(widest: int, dtype: torch.dtype, limits: Limits) -> Blocks:
    """The same of the kernel of ordinary attention, whose programs read one key head.

    Args:
        widest: the room for the numbers of a value's code, or of a key's.
        dtype: of the products.
        limits: of the device.
    """
    if limits == INTERPRETER:
        return Blocks(16, 64, 4, 1)
    # As many rows as leave nothing to spill; two programs per multiprocessor where heads are narrow.
    rows = 32 if dtype.itemsize == 2 and 64 < widest <= 128 and not limits.whole_operands else 16
    return Blocks(16, rows, 4 if limits.lanes == 64 else 8, 1)


def keeps_weights(pair_count: int, key_numbers: int, dtype: torch.dtype, limits: Limits) -> bool:
    """Whether what makes keys of their codes may lie in shared memory from the first row to the last.

    Where operands are taken into registers as a whole it would lie in these, and be spilled.
    """
    size = 2 * side_of(pair_count) * side_of(key_numbers) * dtype.itemsize
    return not limits.whole_operands and size + _BESIDE_WEIGHTS <= limits.shared_memory


def _shared_memory(queries: int, rows: int, stages: int, width: int, size: int) -> int:
    """Bytes of shared memory: queries and rows while products are taken, the widest piece of means in the end."""
    return max((queries + stages * rows) * width * size, queries * min(width, WIDEST) * 4) + 4096


def choose_splits(count: int, programs: int, rows: int, limits: Limits) -> int:
    """So many splits that all programs run at once, of a few blocks of rows each.

    Args:
        count: S.
        programs: those that there are without splits.
        rows: of a block.
        limits: of the device.
    """
    slots = _PROGRAMS_PER_PROCESSOR * limits.processors
    return max(1, min(slots // programs, count // (_BLOCKS_PER_SPLIT * rows)))
