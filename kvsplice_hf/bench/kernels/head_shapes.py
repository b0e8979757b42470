"""Layers with ordinary attention of published models: packed rows of all key heads, and the queries of one token.

Legend: `K` key heads, `G` queries of each, `d` numbers of a key and of a value, `S` rows.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from kvsplice_hf.attend.backend import CodedKeys, HeadRows
from kvsplice_hf.attend.triton.blocks import Limits
from kvsplice_hf.attend.triton.head_launch import (
    HeadProblem,
    attend_heads_launch,
    head_blocks_for,
    head_problem,
    head_splits_for,
)
from kvsplice_hf.attend.triton.launch import Launch
from kvsplice_hf.attend.triton.pieces import WIDEST_KEY
from kvsplice_hf.bench.kernels.shapes import DTYPES, ROWS, TINY, RowShape, calibrated_widths, coded_keys
from kvsplice_hf.code.codec import RowCodec
from kvsplice_hf.code.trellis import TrellisCodec


HEAD_KERNEL = "attend heads"
# Plain levels; and the default of calibration: levels along a trellis, a second gain, and values that are predicted
# from the codes of their keys.
PLAIN_HEADS, PREDICTED_HEADS = "heads", "heads, trellis, predicted values"
HEAD_KINDS = (PLAIN_HEADS, PREDICTED_HEADS)


class HeadShape(NamedTuple):
    """K, G and d of a layer."""

    key_heads: int
    group: int
    size: int

    @property
    def row_dim(self) -> int:
        """Numbers of the row of a key head."""
        return 2 * self.size


# As their configurations have it; the first for trying things out.
HEAD_SHAPES = {
    TINY: HeadShape(2, 3, 16),
    "smollm2": HeadShape(3, 3, 64),
    "pythia-410m": HeadShape(16, 1, 64),
    "llama-3-8b": HeadShape(8, 4, 128),
    "gemma-2-9b": HeadShape(8, 2, 256),
}
PUBLISHED_HEADS = tuple(name for name in HEAD_SHAPES if name != TINY)


@functools.cache
def head_codecs(shape: HeadShape, kind: str) -> tuple[RowCodec, ...]:
    """Of each key head, on the CPU; every other one has a bit less in each number."""
    widths = calibrated_widths(RowShape(shape.group, shape.size, shape.size))
    fewer = torch.where(widths > 8, widths, (widths - 1).clamp(min=0))
    scales = torch.full((shape.row_dim,), 3.0, dtype=torch.float32, device="cpu")
    sigmas = torch.ones(shape.size, dtype=torch.float32, device="cpu")
    second, made = (sigmas, TrellisCodec) if kind == PREDICTED_HEADS else (None, RowCodec)
    return tuple(
        made(fewer if head % 2 else widths, scales, torch.zeros_like(scales), sigmas, second)
        for head in range(shape.key_heads)
    )


class HeadCase(NamedTuple):
    """One launch of the kernel; see `shapes.Case`."""

    geometry: str
    kind: str
    dtype: str
    biased: bool = False
    rows: int = ROWS
    kernel: str = HEAD_KERNEL
    phase: str = "decode"

    @property
    def shape(self) -> HeadShape:
        """Of the layer."""
        return HEAD_SHAPES[self.geometry]

    def problem(self, device: str = "cpu", empty: bool = True) -> HeadProblem:
        """What attention is asked for, of tensors that hold nothing, or random numbers, always the same."""
        (key_heads, group, size), dtype = self.shape, DTYPES[self.dtype]
        generator = torch.Generator("cpu").manual_seed(0)

        def numbers(*sizes: int) -> torch.Tensor:
            if empty:
                return torch.empty(sizes, dtype=torch.float32, device=device)
            return torch.randn(sizes, generator=generator, dtype=torch.float32, device="cpu").to(device)

        query = (numbers(1, key_heads * group, size) / size**0.5).to(dtype)
        bias = numbers(1, self.rows) if self.biased else None
        # Moved, codecs would be those of another device for whoever asks next.
        codecs = [_on(codec, device) for codec in head_codecs(self.shape, self.kind)]
        sizes = [codec.row_bytes for codec in codecs]
        rows = torch.zeros(1, self.rows, sum(sizes), dtype=torch.uint8, device=device)
        one = coded_keys(RowShape(group, size, size), self.rows, device)
        heads = []
        for codec, part in zip(codecs, rows.split(sizes, dim=-1), strict=True):
            if not empty:
                part.copy_(codec.pack(numbers(1, self.rows, codec.row_dim)))
            keys = CodedKeys(numbers(size, size) / size**0.5, numbers(size), one.pairs, one.table, one.slots)
            heads.append(HeadRows(part, codec, 2 * size if self.kind == PREDICTED_HEADS else size, keys))
        return head_problem(query, heads, bias, dtype)

    def launch(self, limits: Limits) -> Launch:
        """Its launch on a device with such limits, of tensors on the CPU that hold nothing."""
        problem = self.problem()
        blocks = head_blocks_for(problem, limits)
        sizes = (1, problem.query.shape[1], head_splits_for(problem, blocks, limits))
        parts = torch.empty(*sizes, problem.tables.mixed_width, dtype=torch.float32, device="cpu")
        lse = torch.empty(sizes, dtype=torch.float32, device="cpu")
        return attend_heads_launch(problem, blocks, limits, parts, lse)


def _on(codec: RowCodec, device: str) -> RowCodec:
    if device == "cpu":
        return codec
    tables = (codec.widths, codec.scales, codec.centres, codec.sigmas, codec.key_sigmas)
    return type(codec)(*tables).to(device)


def head_cases(names: Sequence[str], rows: int = ROWS) -> Iterator[HeadCase]:
    """All cases of some layers: with and without a bias, but for float16, which takes what bfloat16 takes."""
    for name, kind, dtype in itertools.product(names, HEAD_KINDS, DTYPES):
        if dtype == "float32" and HEAD_SHAPES[name].size > WIDEST_KEY:
            continue  # refused
        yield HeadCase(name, kind, dtype, rows=rows)
        if dtype != "float16":
            yield HeadCase(name, kind, dtype, biased=True, rows=rows)
