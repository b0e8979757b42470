"""Rows of published models, unquantised and packed, and the queries that attend to them.

Legend: `M` queries, heads and tokens together, `S` rows, `R` kv_lora_rank, `P` qk_rope_head_dim, `n` numbers of a row.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from kvsplice_hf.attend.backend import CodedKeys, Paging
from kvsplice_hf.attend.triton.blocks import Limits
from kvsplice_hf.attend.triton.launch import (
    Launch,
    Problem,
    attend_launch,
    blocks_for,
    merge_launch,
    pack_launch,
    search_launch,
    splits_for,
)
from kvsplice_hf.bench.geometries import GEOMETRIES
from kvsplice_hf.code.codec import RowCodec
from kvsplice_hf.code.keys import half_pairs, turns_of
from kvsplice_hf.code.trellis import TrellisCodec, TrellisTables
from kvsplice_hf.code.widths import row_bytes


DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
KERNELS = ("attend", "merge", "pack", "search")
# What a cache holds: rows of R + P numbers, of R / 2 + P, and packed rows of a quarter of the stock bytes in bf16, also
# with keys that were coded before their rotation; packed rows of plain levels, and of levels along a trellis. The last
# is the default of calibration: latents that are predicted from their keys, whose code is part of the value then.
CODED_KEYS = "coded keys"
TRELLIS, TRELLIS_KEYS, PREDICTED = "trellis", "trellis, coded keys", "trellis, predicted latents"
KINDS = ("full rank", "half rank", "packed", CODED_KEYS, TRELLIS, TRELLIS_KEYS, PREDICTED)
PACKED_KINDS = ("packed", CODED_KEYS, TRELLIS, TRELLIS_KEYS, PREDICTED)
WITH_CODED_KEYS = (CODED_KEYS, TRELLIS_KEYS, PREDICTED)
ALONG_TRELLIS = (TRELLIS, TRELLIS_KEYS, PREDICTED)
PHASES = ("decode", "prefill")
ROWS = 4096
LONG_CONTEXT = 131072
# For trying things out, and the only one that the interpreter is fast enough for.
TINY = "tiny"
# As wide as the widest rows of dots3_note, whose layers differ: to see that what is chosen for others fits there too.
WIDE = "wide"
# The most queries that kernels are given (`attend.choice`), and those of the tiny shape: so many tokens of a prompt.
_MOST_QUERIES = 1024
_TINY_QUERIES = 20
_PACKED_SHARE = 0.25
# Of an engine: rows of a page, and how many tokens of 16 bits per number it has room for behind them.
_PAGE, _EXACT = 16, 4
# The variance of a coordinate falls with its place to the power of this, its error to a quarter with each bit. SmolLM2
# as MLA comes out with widths like those that calibration gives it.
_SPECTRUM = 1.5


class RowShape(NamedTuple):
    """Sizes of a model's attention: its heads, R (or r, where rows are of lower rank), and P."""

    heads: int
    latent_dim: int
    rope_dim: int

    @property
    def row_dim(self) -> int:
        """n."""
        return self.latent_dim + self.rope_dim


@functools.cache
def row_shapes() -> dict[str, RowShape]:
    """By the name of the geometry; that of MiniCPM3 is the default of its configuration class in transformers 5.24."""
    shapes = {TINY: RowShape(3, 40, 16), WIDE: RowShape(64, 1024, 64)}
    for name, geometry in GEOMETRIES.items():
        config = geometry.config(layers=1)
        if not hasattr(config, "kv_lora_rank"):  # ordinary attention: see `head_shapes`
            continue
        shapes[name] = RowShape(config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim)
    return shapes | {"minicpm3": RowShape(40, 256, 32)}


@functools.cache
def published() -> tuple[str, ...]:
    """Names of geometries, without those for trying things out."""
    return tuple(name for name in row_shapes() if name not in (TINY, WIDE, "mini"))


def calibrated_widths(shape: RowShape) -> torch.Tensor:
    """Widths like those of calibration at a quarter of the stock bytes, int64 [n]: falling, but wide for `k_rot`."""
    budget = _PACKED_SHARE * 2 * shape.row_dim
    place = torch.arange(1, shape.latent_dim + 1, dtype=torch.float64, device="cpu")
    # The rotated key counts like coordinates between the first hundredth and the first fifth.
    rotated = torch.logspace(-2, -0.7, shape.rope_dim, dtype=torch.float64, device="cpu") * shape.latent_dim
    importance = -_SPECTRUM / 2 * torch.log2(torch.cat([place, rotated]))

    def at(bits: float) -> torch.Tensor:
        widths = (importance + bits).round().clamp(min=0)
        return torch.where(widths > 8, 16, widths).long()

    return at(max(step / 64 for step in range(16 * 64) if row_bytes(at(step / 64), shape.latent_dim) <= budget))


@functools.cache
def packed_codec(shape: RowShape, kind: str = "packed") -> RowCodec:
    """The codec of such a model's rows, on the CPU, for coordinates around 0 of size 1.

    Codes of keys are as long as the keys, and have a gain of their own.
    """
    n = shape.row_dim
    scales = torch.full((n,), 3.0, dtype=torch.float32, device="cpu")
    sigmas = torch.ones(shape.latent_dim, dtype=torch.float32, device="cpu")
    key_sigmas = torch.ones(shape.rope_dim, dtype=torch.float32, device="cpu") if kind in WITH_CODED_KEYS else None
    made = TrellisCodec if kind in ALONG_TRELLIS else RowCodec
    return made(calibrated_widths(shape), scales, torch.zeros_like(scales), sigmas, key_sigmas)


def search_tables(shape: RowShape) -> TrellisTables:
    """What the search of the first chain along the trellis of such a model's rows needs, on the CPU."""
    codec = packed_codec(shape, TRELLIS)
    assert isinstance(codec, TrellisCodec)
    return codec.trellis_tables(0)


def coded_keys(shape: RowShape, rows: int, device: str) -> CodedKeys:
    """How the keys of such rows are read: each has a slot of its own, and lies where its position would have it."""
    pairs = shape.rope_dim // 2
    basis = torch.eye(shape.rope_dim, dtype=torch.float32, device="cpu").roll(1, 0)
    mean = torch.ones(shape.rope_dim, dtype=torch.float32, device="cpu")
    frequencies = torch.logspace(0, -4, pairs, dtype=torch.float64, device="cpu")
    angles = torch.arange(rows, dtype=torch.float64, device="cpu")[:, None] * frequencies
    of_key = half_pairs(torch.arange(pairs, dtype=torch.int64, device="cpu"))
    table = turns_of((angles.cos(), angles.sin()), of_key[2]).T.contiguous()
    slots = torch.arange(rows, dtype=torch.int32, device="cpu")[None]
    return CodedKeys(*(tensor.to(device) for tensor in (basis, mean, of_key, table, slots)))


class Case(NamedTuple):
    """One kernel at one shape.

    Attributes:
        kernel: one of `KERNELS`.
        geometry: a name of `row_shapes`.
        kind: of rows, one of `KINDS`.
        dtype: of queries, and of rows that are not packed; a name of `DTYPES`.
        phase: one of `PHASES`.
        biased: whether scores get a bias, as those of padded batches and of prompts do.
        rows: S.
        paged: whether the rows lie in pages, as those of an engine do, with a gap behind each, and first ones are left
            out as those of exact tokens.
    """

    kernel: str
    geometry: str
    kind: str
    dtype: str
    phase: str
    biased: bool = False
    rows: int = ROWS
    paged: bool = False

    @property
    def shape(self) -> RowShape:
        """Of the rows as stored: at half rank with half of the latent."""
        shape = row_shapes()[self.geometry]
        return shape._replace(latent_dim=shape.latent_dim // 2) if self.kind == "half rank" else shape

    @property
    def queries(self) -> int:
        """M: one token of all heads, or as many tokens as a kernel is given."""
        heads, most = self.shape.heads, _TINY_QUERIES if self.geometry == TINY else _MOST_QUERIES
        return heads if self.phase == "decode" else most // heads * heads

    @property
    def searched(self) -> tuple[int, int]:
        """How many rows are searched along a trellis, and how many columns its first chain has."""
        codec = packed_codec(self.shape, self.kind)
        assert isinstance(codec, TrellisCodec)
        return 1 if self.phase == "decode" else self.rows, codec.chains[0].stop

    def problem(self, device: str = "cpu", empty: bool = True) -> Problem:
        """What attention is asked for, of tensors that hold nothing, or random numbers, always the same."""
        n, dtype = self.shape.row_dim, DTYPES[self.dtype]
        generator = torch.Generator("cpu").manual_seed(0)

        def numbers(*sizes: int) -> torch.Tensor:
            if empty:
                return torch.empty(sizes, dtype=torch.float32, device=device)
            return torch.randn(sizes, generator=generator, dtype=torch.float32, device="cpu").to(device)

        is_whole = self.kind == PREDICTED
        query_dim = n + self.shape.rope_dim if is_whole else n
        query, rows = (numbers(1, self.queries, query_dim) / query_dim**0.5).to(dtype), numbers(1, self.rows, n)
        bias = numbers(1, self.queries // self.shape.heads, self.rows) if self.biased else None
        value_dim = n if is_whole else self.shape.latent_dim
        if self.kind not in PACKED_KINDS:
            return self._placed(Problem(query, rows.to(dtype), None, value_dim, bias, None, dtype))
        codec = packed_codec(self.shape, self.kind).to(device)
        packed = rows.new_empty(1, self.rows, codec.row_bytes, dtype=torch.uint8) if empty else codec.pack(rows)
        keys = coded_keys(self.shape, self.rows, device) if self.kind in WITH_CODED_KEYS else None
        return self._placed(Problem(query, packed, codec, value_dim, bias, None, dtype, keys=keys))

    def _placed(self, problem: Problem) -> Problem:
        """The same with its rows in pages, if this case has such."""
        if not self.paged:
            return problem
        rows, generator = problem.rows[0], torch.Generator("cpu").manual_seed(1)
        width, device, pages = rows.shape[1], rows.device, -(-self.rows // _PAGE)
        behind = _EXACT * self.shape.row_dim * (1 if self.kind not in PACKED_KINDS else 2)
        stride = _PAGE * width + behind
        memory = torch.zeros(pages * stride, dtype=rows.dtype, device=device)
        placed = memory.as_strided((pages, _PAGE, width), (stride, width, 1))
        table = torch.randperm(pages, generator=generator, dtype=torch.int64, device="cpu").to(device)
        place = torch.arange(self.rows, dtype=torch.int64, device=device)
        placed[table[place // _PAGE], place % _PAGE] = rows
        lengths = torch.full((1,), self.rows, dtype=torch.int64, device=device)
        hidden = torch.arange(_EXACT, dtype=torch.int64, device=device)[None]
        return problem._replace(rows=placed, paging=Paging(table[None], lengths), hidden=hidden)

    def launch(self, limits: Limits) -> Launch:
        """Its launch on a device with such limits, of tensors on the CPU that hold nothing."""
        if self.kernel == "pack":
            codec = packed_codec(self.shape, self.kind)
            count = 1 if self.phase == "decode" else self.rows
            rows = torch.empty(count, codec.row_dim, dtype=DTYPES[self.dtype], device="cpu")
            return pack_launch(rows, rows.new_empty(count, codec.row_bytes, dtype=torch.uint8), codec)
        if self.kernel == "search":
            tables = search_tables(self.shape)
            codes = torch.empty(self.searched, dtype=torch.uint8, device="cpu")
            return search_launch(torch.empty_like(codes, dtype=torch.float32), tables, codes)
        problem = self.problem()
        blocks = blocks_for(problem, limits)
        sizes = (1, self.queries, splits_for(problem, blocks, limits))
        parts = torch.empty(*sizes, problem.value_dim, dtype=torch.float32, device="cpu")
        lse = torch.empty(sizes, dtype=torch.float32, device="cpu")
        if self.kernel == "attend":
            return attend_launch(problem, blocks, parts, lse)
        return merge_launch(parts, lse, parts[:, :, 0].contiguous(), lse[:, :, 0].contiguous())


def cases(names: Sequence[str], rows: int = ROWS) -> Iterator[Case]:
    """All cases of some geometries.

    Prompts have a bias, their causal mask; decode steps have one where a batch is padded, and rows in pages in an
    engine. What float16 takes is what bfloat16 takes, but for the conversions: one case each shows that.
    """
    for name, kind, dtype in itertools.product(names, KINDS, DTYPES):
        yield Case("attend", name, kind, dtype, "decode", rows=rows)
        if dtype != "float16":
            yield Case("attend", name, kind, dtype, "decode", biased=True, rows=rows)
            yield Case("attend", name, kind, dtype, "decode", rows=rows, paged=True)
            yield Case("attend", name, kind, dtype, "prefill", biased=True, rows=rows)
    for name, kind, count in itertools.product(names, ("full rank", "half rank"), (rows, LONG_CONTEXT)):
        yield Case("merge", name, kind, "float32", "decode", rows=count)
    for name, phase in itertools.product(names, PHASES):
        yield Case("search", name, TRELLIS, "float32", phase, rows=rows)
    # What is packed of a predicted latent is packed like a latent.
    for name, kind, dtype, phase in itertools.product(names, PACKED_KINDS[:-1], DTYPES, PHASES):
        yield Case("pack", name, kind, dtype, phase, rows=rows)
