"""C++ on rows whose keys were coded before their rotation: what PyTorch computes, and nothing beyond them is read."""

import functools
import itertools
import mmap
import os
import platform
import shutil
import subprocess
import sys
from typing import Any, NamedTuple

import pytest
import torch
from native_checks import assert_as_close, assert_same

from kvsplice_hf import LearnedKVSplice, RowCodec, TrellisCodec
from kvsplice_hf.attend import reference
from kvsplice_hf.attend.alike import rows_alike
from kvsplice_hf.attend.backend import CodedKeys, Step
from kvsplice_hf.attend.native import calls as native
from kvsplice_hf.attend.native.backend import NativeBackend
from kvsplice_hf.code.keys import KeyProjection, Pairs, half_pairs, neighbour_pairs, redo_turns
from kvsplice_hf.errors import ConfigError


COMPILER = next((name for name in ("g++", "clang++") if shutil.which(name)), None)
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
LOWEST = torch.finfo(torch.float32).min
DTYPES = [torch.float32, torch.bfloat16]

# Sequences, queries, stored rows, coded numbers of a latent, numbers of a key, numbers of its code: fewer and more than
# any vector, pair of columns, group of pairs, strip or tile holds; and more queries than go together.
SIZES = [
    (1, 1, 1, 1, 2, 1),
    (2, 6, 150, 20, 16, 11),
    (1, 16, 600, 70, 64, 40),
    (3, 5, 65, 33, 6, 7),
    (2, 130, 70, 12, 10, 9),
]
WIDTHS = {
    "coded": [4, 6, 3, 8, 1, 5],
    "some as they are": [16, 4, 0, 5, 7],
    "nothing but numbers": [16],
    "along a trellis": [3, 6, 16, 2, 7, 1, 0, 8, 5],
}


class Case(NamedTuple):
    """Rows, queries that attend to them, and how their keys are read."""

    query: torch.Tensor
    packed: torch.Tensor
    codec: RowCodec
    keys: CodedKeys

    @property
    def rank(self) -> int:
        return len(self.codec.sigmas)

    def unpacked(self) -> torch.Tensor:
        """`[code | rotated key]` [B, S, r + P], in double precision."""
        numbers = self.codec.unpack(self.packed)
        key = numbers[..., self.rank :] @ self.keys.expand.float().T + self.keys.mean.float()
        key = redo_turns(key, self.keys.turns().permute(1, 2, 0), Pairs(*self.keys.pairs))
        return torch.cat([numbers[..., : self.rank], key], dim=-1).double()


def codec_of(named: str | list[int], rank: int, coded: int, key_gain: bool) -> RowCodec:
    widths = WIDTHS[named] if isinstance(named, str) else named
    kind = TrellisCodec if "trellis" in named else RowCodec
    generator = torch.Generator().manual_seed(2)
    dim = rank + coded
    every = torch.tensor([widths[index % len(widths)] for index in range(dim)])
    scales = 1 + torch.rand(dim, generator=generator)
    centres = torch.randn(dim, generator=generator) / 4
    sigmas, key_sigmas = (0.5 + torch.rand(dim, generator=generator)).split([rank, coded])
    return kind(every, scales, centres, sigmas, key_sigmas if key_gain else None)


def slots_of(kind: str, batch: int, count: int, slots: int) -> torch.Tensor:
    if kind == "consecutive":  # up to the last slot there is, where vectors would reach beyond
        return slots - count - torch.arange(batch, dtype=torch.int32)[:, None] + torch.arange(count, dtype=torch.int32)
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, slots, (batch, count), generator=generator, dtype=torch.int32)


def expand_of(kind: str, rope_dim: int, coded: int) -> torch.Tensor:
    """A basis of whole columns, or one of blocks of neighbouring frequencies, in no order."""
    generator = torch.Generator().manual_seed(4)
    expand = torch.randn(rope_dim, coded, generator=generator) / coded**0.5
    if kind == "whole":
        return expand
    of_number = torch.arange(rope_dim) % (rope_dim // 2) // 3
    return expand * (of_number[:, None] == torch.randint(0, rope_dim // 6 + 1, (coded,), generator=generator))


def case_of(
    size: tuple[int, ...],
    widths: str = "coded",
    key_gain: bool = True,
    slots: str = "consecutive",
    basis: str = "whole",
    dtype: torch.dtype = torch.float32,
) -> Case:
    batch, queries, count, rank, rope_dim, coded = size
    generator = torch.Generator().manual_seed(0)
    codec = codec_of(widths, rank, coded, key_gain)
    sizes = 0.5 + torch.rand(batch, count, 1, generator=generator)
    packed = codec.pack(sizes * torch.randn(batch, count, rank + coded, generator=generator))
    angles = 64 * torch.rand(rope_dim // 2, count + 130, generator=generator)
    keys = CodedKeys(
        expand=expand_of(basis, rope_dim, coded).to(dtype),
        mean=torch.randn(rope_dim, generator=generator).to(dtype) / 4,
        pairs=(half_pairs if slots == "consecutive" else neighbour_pairs)(torch.arange(rope_dim // 2)),
        table=angles.to(torch.uint8),
        slots=slots_of(slots, batch, count, count + 130),
    )
    query = torch.randn(batch, queries, rank + rope_dim, generator=generator) / (rank + rope_dim) ** 0.5
    return Case(query.to(dtype), packed, codec, keys)


def bias_of(kind: str, batch: int, queries: int, count: int) -> torch.Tensor | None:
    """None, or a bias [B, T, S] that hides some rows, but never the last."""
    if kind == "none":
        return None
    tokens = next(n for n in (5, 3, 2, 1) if queries % n == 0)
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(batch, tokens, count, generator=generator)
    bias[torch.rand(bias.shape, generator=generator) < 0.3] = LOWEST
    bias[..., : count // 2] = LOWEST
    bias[..., -1] = 0
    return bias


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", ["none", "by token"])
@pytest.mark.parametrize("slots", ["consecutive", "scattered"])
@pytest.mark.parametrize("key_gain", [True, False])
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_coded_keys_are_attended_to(
    size: tuple[int, ...], widths: str, key_gain: bool, slots: str, bias: str, dtype: torch.dtype, threads: int
) -> None:
    basis = "blocks" if slots == "scattered" else "whole"
    case = case_of(size, widths, key_gain, slots, basis, dtype)
    query, packed, codec, keys = case
    added = bias_of(bias, size[0], size[1], size[2])
    found = native.attend_packed(query, packed, codec, case.rank, added, scaling=0.7, keys=keys)
    rows = case.unpacked()
    scores = 0.7 * query.double() @ rows.transpose(1, 2)
    if added is not None:
        scores = scores + added.double().repeat(1, size[1] // added.shape[1], 1)
    expected = scores.softmax(-1) @ rows[..., : case.rank], scores.logsumexp(-1)
    assert_same(found, expected, 3e-5 if dtype == torch.float32 else 0.02)
    if dtype == torch.float32:
        by_torch = reference.attend(
            query, packed, codec, case.rank, None if added is None else added[:, None], scaling=0.7, keys=keys
        )
        assert_same(found, by_torch, 3e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slots", ["consecutive", "scattered"])
@pytest.mark.parametrize("exact", [0, 3])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("size", [(1, 2, 9, 5, 4, 3), (2, 4, 140, 17, 8, 6), (1, 16, 300, 33, 32, 20)], ids=str)
@torch.no_grad()
def test_a_step_on_coded_keys_is_that_on_their_rotated_keys_as_numbers(
    size: tuple[int, ...], sinks: bool, exact: int, slots: str, dtype: torch.dtype, threads: int
) -> None:
    batch, heads, count, rank, rope_dim, _ = size
    latent_dim, nope_dim, value_dim = 40, 12, 10
    torch.manual_seed(0)
    case = case_of(size, "some as they are", slots=slots, dtype=dtype)
    splice = LearnedKVSplice(latent_dim, rank)
    splice.expand.weight.normal_(0, latent_dim**-0.5)
    weights = splice.to(dtype).weights()
    weight = (torch.randn(heads * (nope_dim + value_dim), latent_dim) / 8).to(dtype)
    tokens = torch.randn(batch, exact, latent_dim + rope_dim).to(dtype) if exact else None
    hidden = torch.stack([torch.randperm(count)[:exact] for _ in range(batch)]) if exact else None
    bias = bias_of("by token", batch, 1, count)
    given: dict[str, Any] = {"weight": weight, "v_dim": value_dim, "projection": weights, "bias": bias}
    given |= {"positions": hidden, "scaling": 0.3, "sinks": torch.randn(heads).to(dtype) if sinks else None}
    query = torch.randn(batch, heads, 1, nope_dim + rope_dim).to(dtype)
    step = Step(query=query, rows=case.packed[:, None], codec=case.codec, exact=tokens, keys=case.keys, **given)
    found = native.decode(step)
    # Of rows of numbers, what exact tokens add to the latent is all that is kept of them: their keys are in the rows.
    rows = case.unpacked().float()[:, None]
    if tokens is not None and hidden is not None:
        of_tokens = rows.new_empty(batch, 1, exact, rank + rope_dim)
        of_tokens[..., rank:] = tokens[:, None, :, latent_dim:].float()
        of_tokens[..., :rank] = 0
        rows = rows.scatter(2, hidden[:, None, :, None].expand_as(of_tokens), of_tokens)
        tokens = tokens[..., :latent_dim].float()
    given |= {"weight": weight.float(), "projection": splice.float().weights()}
    given["sinks"] = None if given["sinks"] is None else given["sinks"].float()
    expected = native.decode(Step(query=query.float(), rows=rows, codec=None, exact=tokens, **given))
    tolerance = 1e-4 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(found, expected, atol=tolerance * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", ["numbers", "packed", "packed without a second gain", "along a trellis"])
@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, repeat=2)), ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 5, 1, 2, 1), (2, 3, 33, 17, 8, 5), (2, 2, 321, 160, 64, 40)], ids=str)
@torch.no_grad()
def test_keys_of_new_tokens_are_coded_as_pytorch_codes_them(
    sizes: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype], kind: str, shared: bool, threads: int
) -> None:
    batch, tokens, latent_dim, rank, rope_dim, coded = sizes
    of_latents, of_weights = dtypes
    torch.manual_seed(0)
    splice = LearnedKVSplice(latent_dim, rank)
    splice.compress.weight.normal_(0, latent_dim**-0.5)
    splice.keys = keys = KeyProjection(rope_dim, coded)
    keys.mean.normal_(0, 0.3)
    keys.compress.weight.normal_(0, rope_dim**-0.5)
    keys.pairs.copy_(neighbour_pairs(torch.arange(rope_dim // 2)))
    splice.to(of_weights)
    if kind != "numbers":
        widths = kind if kind in WIDTHS else "some as they are"
        splice.codec = codec_of(widths, rank, coded, key_gain=kind == "packed")
    latent = torch.randn(batch, 1, tokens, latent_dim).to(of_latents)
    k_rot = torch.randn(batch, 1, tokens, rope_dim).to(of_latents)
    angles = 64 * torch.rand(1 if shared else batch, 1, tokens, rope_dim // 2)
    turns = angles.to(torch.uint8)
    found = NativeBackend().encode(latent, k_rot, splice.weights(), splice.codec, keys.weights(), turns)
    expected = splice.rows(latent, k_rot, turns)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    if kind == "numbers":
        exact = dtypes == (torch.float32, torch.float32)
        torch.testing.assert_close(found, expected, atol=1e-5 if exact else 1e-2, rtol=0 if exact else 2**-7)
        # Keys are coded in float32 whatever the weights are, so that sums in another order differ in their last digit.
        assert ((found - expected).abs() > 1e-5).float().mean() <= 0.02
    elif "trellis" in kind:
        numbers = functools.partial(splice.numbers_to_store, latent, k_rot, turns)
        assert rows_alike(splice.codec, numbers, found, expected)
    else:
        assert (found != expected).sum() <= 0.02 * found.numel()


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_with_a_second_gain_are_packed_into_the_same_bytes(widths: str, dtype: torch.dtype) -> None:
    codec = codec_of(widths, 12, 9, key_gain=True)
    torch.manual_seed(0)
    rows = torch.randn(3, 500, 21) * torch.logspace(-3, 3, 500)[:, None]
    rows[..., 12:] *= torch.logspace(2, -2, 500)[:, None]
    rows[0, 0], rows[1, 0], rows[2, 0, 0] = 0, 1e30, -1e30
    rows = rows.to(dtype)
    found, expected = native.encode_pack(rows, codec), codec.pack(rows)
    assert found.shape == expected.shape
    if "trellis" in widths:
        assert_as_close(codec, rows, found, expected)
    else:
        assert (found != expected).sum() <= 1e-4 * found.numel()


def test_codes_flip_at_borders_only() -> None:
    codec = codec_of([6, 5, 4, 3], 60, 40, key_gain=True)
    rows = torch.randn(20_000, 100, generator=torch.Generator().manual_seed(0))
    found, expected = native.encode_pack(rows, codec), codec.pack(rows)
    same_gains = (found[:, :2] == expected[:, :2]).all(-1)
    assert (~same_gains).sum() <= 2  # where all codes of a row may be others
    assert (codec.codes(found) != codec.codes(expected))[same_gains].sum() <= 4  # of two million


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slots_and_pairs_that_there_are_not_are_taken_for_others(dtype: torch.dtype) -> None:
    case = case_of((2, 3, 150, 20, 16, 11), dtype=dtype)
    slots = case.keys.slots.clone()
    slots[0, 3], slots[0, 70], slots[1, 5], slots[1, 149] = -1, 2**31 - 1, -(2**31), 10**6
    clamped = slots.clamp(0, case.keys.table.shape[1] - 1)

    def attend(**changed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys = case.keys._replace(**changed)
        return native.attend_packed(case.query, case.packed, case.codec, case.rank, keys=keys)

    assert_same(attend(slots=slots), attend(slots=clamped), 0)
    attend(pairs=case.keys.pairs + 10**9)
    attend(pairs=case.keys.pairs - 10**9)


def test_what_does_not_fit_is_refused() -> None:
    query, packed, codec, keys = case_of((2, 3, 40, 12, 8, 5))
    weights = LearnedKVSplice(19, 12).weights()
    projection, turns = KeyProjection(8, 5).weights(), torch.ones(2, 1, 3, 4, dtype=torch.uint8)
    latent, k_rot = torch.randn(2, 1, 3, 19), torch.randn(2, 1, 3, 8)

    def attend(**changed: Any) -> Any:
        return native.attend_packed(query, packed, codec, 12, keys=keys._replace(**changed))

    def encode(**changed: Any) -> Any:
        given: dict[str, Any] = {"k_rot": k_rot, "keys": projection, "turns": turns, "codec": codec}
        return native.encode(latent, projection=weights, **(given | changed))

    attend()
    encode()
    wrong: list[Any] = [
        lambda: native.attend_packed(query, packed, codec, 11, keys=keys),
        lambda: native.attend_packed(query[..., 1:], packed, codec, 12, keys=keys),
        lambda: native.attend_packed(query[..., :17], packed, codec, 12),
        lambda: native.attend_packed(query, packed, codec_of([4], 13, 4, True), 12, keys=keys),
        lambda: attend(expand=keys.expand[:, 1:]),
        lambda: attend(expand=keys.expand.half()),
        lambda: attend(mean=keys.mean[1:]),
        lambda: attend(mean=keys.mean.double()),
        lambda: attend(pairs=keys.pairs[:, 1:]),
        lambda: attend(pairs=keys.pairs.int()),
        lambda: attend(table=keys.table[1:]),
        lambda: attend(table=keys.table.float()),
        lambda: attend(table=keys.table[:, :0]),
        lambda: attend(table=keys.table.T.contiguous().T),
        lambda: attend(slots=keys.slots[:1]),
        lambda: attend(slots=keys.slots[:, 1:]),
        lambda: attend(slots=keys.slots.long()),
        lambda: attend(slots=keys.slots.T.contiguous().T),
        lambda: encode(turns=None),
        lambda: encode(turns=turns.float()),
        lambda: encode(turns=turns[..., 1:]),
        lambda: encode(turns=turns[:, :, 1:]),
        lambda: encode(k_rot=k_rot[..., 1:]),
        lambda: encode(keys=projection._replace(pairs=projection.pairs[:, 1:])),
        lambda: encode(keys=projection._replace(mean=projection.mean[1:])),
        lambda: encode(codec=codec_of([4], 12, 6, True)),
    ]
    for call in wrong:
        with pytest.raises(ConfigError):
            call()


_AT_THE_END_OF_MEMORY = """
import ctypes, mmap, sys
import torch
from test_native_keys import SIZES, case_of, native

torch.set_num_threads(1)
libc = ctypes.CDLL(None, use_errno=True)
kept = []

def at_the_end(tensor):
    # A copy that ends where a page begins that nobody may read.
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    kept.append(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(start + pages), mmap.PAGESIZE, 0) == 0
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=pages - size).view(tensor.shape)
    return copy.copy_(tensor)

for size in SIZES:
    for slots in ("consecutive", "scattered"):
        for dtype in (torch.float32, torch.bfloat16):
            query, packed, codec, keys = case_of(size, "some as they are", slots=slots, dtype=dtype)
            keys = keys._replace(**{name: at_the_end(tensor) for name, tensor in keys._asdict().items()})
            found = native.attend_packed(query, at_the_end(packed), codec, size[3], keys=keys)
            expected = native.attend_packed(query, packed, codec, size[3], keys=keys)
            assert all(map(torch.equal, found, expected))
print("read")
"""


@pytest.mark.skipif(not hasattr(mmap, "PAGESIZE") or sys.platform != "linux", reason="protects pages by mprotect")
def test_tensors_may_end_where_memory_ends() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    result = subprocess.run(
        [sys.executable, "-c", _AT_THE_END_OF_MEMORY], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.stdout == "read\n", result.stderr


@pytest.mark.skipif("KVSPLICE_TEST_VECTORS" in os.environ, reason="this is the process that it starts")
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the flags are those of x86-64")
@pytest.mark.parametrize(
    "flags", ["-march=x86-64", "-march=x86-64-v3", "-mno-avx512vbmi", "-mno-avx512bf16", "-mno-amx-tile"]
)
def test_coded_keys_are_the_same_on_processors_with_fewer_instructions(flags: str) -> None:
    environment = {**os.environ, "CXXFLAGS": flags, "KVSPLICE_TEST_VECTORS": flags, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-x", "-q", __file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
