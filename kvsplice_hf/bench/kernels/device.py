"""The kernels on the device that is here: whether they agree with PyTorch, and how fast they read rows."""

import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
import triton

from kvsplice_hf.attend import reference
from kvsplice_hf.attend.triton import calls
from kvsplice_hf.attend.triton.blocks import Blocks, limits_of
from kvsplice_hf.attend.triton.calls import interpreted as interpreted  # for the programs that use this module
from kvsplice_hf.attend.triton.compilation import TARGETS
from kvsplice_hf.attend.triton.launch import Problem, attend_launch, splits_for
from kvsplice_hf.bench.kernels.head_shapes import HeadCase
from kvsplice_hf.bench.kernels.shapes import DTYPES, Case, packed_codec, search_tables
from kvsplice_hf.bench.rounds import timed
from kvsplice_hf.code.trellis import TrellisCodec, TrellisTables, closest_codes, squared_error


Row = dict[str, Any]

# Largest difference from PyTorch in float32, relative to the largest number: products of the kernels are taken in the
# dtype of the queries, and attention weights are rounded to it.
TOLERANCE = {"bfloat16": 3e-2, "float16": 4e-3, "float32": 1e-4}
# Codes at the border of two cells may come out as the other one.
_CODES_OFF = 1e-3
# Of two paths along a trellis that are nearly as close, the last digit of a number decides: so errors are compared, the
# mean squared ones of all rows.
_ERRORS_OFF = 1e-3
# Of the rows: the kernel that merges splits has its turn, whatever the device would choose.
_SPLITS = 3
# Beside those that are chosen: the ones that spill registers when they are compiled, and may be faster all the same.
ALTERNATIVES = (
    Blocks(16, 16, 8, 1),
    Blocks(16, 16, 4, 1),
    Blocks(16, 32, 8, 1),
    Blocks(16, 32, 8, 2),
    Blocks(32, 32, 8, 1),
    Blocks(64, 16, 8, 1),
    Blocks(64, 32, 8, 1),
    Blocks(64, 32, 8, 2),
)


def describe(device: str) -> Row:
    """What the choice of blocks takes the device for, and what it was compiled for in its stead."""
    limits = limits_of(torch.device(device, 0) if device == "cuda" else torch.device(device))
    row: Row = {"limits": limits._asdict()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        name = f"sm_{properties.major}{properties.minor}"
        if torch.version.hip is not None:  # on CUDA the attribute is the name of the device
            name = properties.gcnArchName.partition(":")[0]
        expected = TARGETS[name].limits._asdict() if name in TARGETS else None
        row |= {"target": name, "expected_limits": expected}
    return row


def agreement_of(case: Case | HeadCase, device: str) -> Row:
    """How far the kernel is from PyTorch: relative to the largest number, or as a share of codes or of errors."""
    row: Row = {**case._asdict(), "n": case.shape.row_dim}
    if isinstance(case, HeadCase):
        return row | _heads_off(case, device)
    compare = {"attend": _attention_off, "pack": _codes_off, "search": _search_off}[case.kernel]
    return row | compare(case, device)


def _attention_off(case: Case, device: str) -> Row:
    problem = case.problem(device, empty=False)
    query, rows, codec, value_dim, bias = problem[:5]
    if problem.paging is not None and problem.hidden is not None:
        # The same rows side by side, those that are left out masked.
        rows = rows[problem.paging.table].flatten(1, 2)[:, : case.rows]
        bias = torch.zeros(1, 1, case.rows, dtype=torch.float32, device=rows.device)
        bias[..., problem.hidden[0]] = torch.finfo(torch.float32).min
    numbers = rows if codec is not None else rows.float()
    of_heads = None if bias is None else bias[:, None]
    expected = reference.attend(query.float(), numbers, codec, value_dim, of_heads, keys=problem.keys)
    off = 0.0
    for splits in (None, _SPLITS):
        mixed, lse = _attend(problem, splits)
        off = max(off, _relative(mixed, expected.mixed), _relative(lse, expected.lse))
    return {"off": off, "allowed": TOLERANCE[case.dtype], "agrees": off <= TOLERANCE[case.dtype]}


def _heads_off(case: HeadCase, device: str) -> Row:
    query, heads, bias = case.problem(device, empty=False)[:3]
    expected, off = reference.attend_heads(query.float(), heads, bias), 0.0
    for splits in (None, _SPLITS):
        for found, other in zip(calls.attend_heads(query, heads, bias, splits), expected, strict=True):
            off = max(off, *map(_relative, found, other))
    return {"off": off, "allowed": TOLERANCE[case.dtype], "agrees": off <= TOLERANCE[case.dtype]}


def _attend(problem: Problem, splits: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    query, rows, codec, value_dim, bias = problem[:5]
    paging, hidden, keys = problem.paging, problem.hidden, problem.keys
    if codec is None:
        return calls.attend_rows(query, rows, value_dim, bias, splits, paging=paging, hidden=hidden)
    return calls.attend_packed(query, rows, codec, value_dim, bias, splits, keys=keys, paging=paging, hidden=hidden)


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    off = (found - expected).abs().max() / expected.abs().max()
    return float(off) if bool(off.isfinite()) else float("inf")


def _codes_off(case: Case, device: str) -> Row:
    codec = packed_codec(case.shape, case.kind).to(device)
    count = 1 if case.phase == "decode" else case.rows
    generator = torch.Generator("cpu").manual_seed(0)
    rows = torch.randn(count, codec.row_dim, generator=generator, dtype=torch.float32, device="cpu")
    rows = rows.to(DTYPES[case.dtype]).to(device)
    both = calls.encode_pack(rows, codec), codec.pack(rows)
    if isinstance(codec, TrellisCodec):
        return _errors_off(*((codec.unpack(packed) - rows.float()).square().mean() for packed in both))
    found, expected = (codec.codes(packed).int() for packed in both)
    off = float((found != expected).float().mean())
    return {"off": off, "allowed": _CODES_OFF, "agrees": off <= _CODES_OFF and int((found - expected).abs().max()) <= 1}


def _search_off(case: Case, device: str) -> Row:
    tables = TrellisTables(*(table.to(device) for table in search_tables(case.shape)))
    generator = torch.Generator("cpu").manual_seed(0)
    unit = (torch.randn(case.searched, generator=generator, dtype=torch.float32, device="cpu") / 3).to(device)
    both = calls.search_codes(unit, tables), closest_codes(unit, tables)
    return _errors_off(*(squared_error(unit, codes, tables).mean() for codes in both))


def _errors_off(found: torch.Tensor, expected: torch.Tensor) -> Row:
    off = float(found / expected - 1)
    return {"off": off, "allowed": _ERRORS_OFF, "agrees": abs(off) <= _ERRORS_OFF}


def bandwidth_of(case: Case, device: str, copy: float, alternatives: bool = False) -> list[Row]:
    """Bytes of rows that attention reads per second, with the blocks that are chosen, and with others.

    Args:
        case: of attention.
        device: "cuda", or "cpu" in the interpreter.
        copy: bytes per second of a copy, reads and writes counted.
        alternatives: whether to time `ALTERNATIVES`.
    """
    problem = case.problem(device, empty=False)
    runs: dict[str, Callable[[], object]] = {"chosen": functools.partial(_attend, problem)}
    if alternatives:
        runs |= {" x ".join(map(str, blocks)): _with_blocks(problem, blocks, device) for blocks in ALTERNATIVES}
    return _timed_rows(case, runs, problem.rows.nbytes, device, copy)


def bandwidth_of_heads(case: HeadCase, device: str, copy: float) -> list[Row]:
    """The same of all key heads of a layer, with the blocks that are chosen."""
    problem = case.problem(device, empty=False)
    run = functools.partial(calls.attend_heads, problem.query, problem.heads, problem.bias)
    return _timed_rows(case, {"chosen": run}, sum(head.rows.nbytes for head in problem.heads), device, copy)


def _timed_rows(
    case: Case | HeadCase, runs: dict[str, Callable[[], object]], size: int, device: str, copy: float
) -> list[Row]:
    rows = []
    for name, run in runs.items():
        row: Row = {**case._asdict(), "n": case.shape.row_dim, "blocks": name, "bytes": size}
        try:
            row["seconds"] = _seconds(run, device)
        except Exception as error:  # whatever the compiler or driver raises: it stands in the report
            row["skipped"] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            row["bytes_per_second"] = row["bytes"] / row["seconds"]
            row["of_copy"] = row["bytes_per_second"] / copy
        rows.append(row)
    return rows


def _with_blocks(problem: Problem, blocks: Blocks, device: str) -> Callable[[], object]:
    """Attention without the merging of splits."""
    splits = splits_for(problem, blocks, limits_of(problem.query.device))
    sizes = (*problem.query.shape[:2], splits)
    parts = torch.empty(*sizes, problem.value_dim, dtype=torch.float32, device=device)
    lse = torch.empty(sizes, dtype=torch.float32, device=device)
    return attend_launch(problem, blocks, parts, lse).run


def _seconds(run: Callable[[], object], device: str) -> float:
    """Median seconds of a call, with a cold L2 cache on a GPU."""
    run()  # compiles
    if device == "cpu":
        return statistics.median(timed(run, device) for _ in range(3))
    return float(triton.testing.do_bench(run, return_mode="median")) / 1e3
