"""The Triton kernels compile for GPUs that are not here, and take no more of them than they have.

A part of what `scripts/measure/kernel_resources.py` compiles. Nothing is run.
"""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch


triton = pytest.importorskip("triton", reason="the kernels need triton, which is not installed")

from kvsplice_hf.attend.triton import blocks  # noqa: E402
from kvsplice_hf.attend.triton.blocks import choose_blocks, choose_splits, limits_of  # noqa: E402
from kvsplice_hf.attend.triton.calls import interpreted  # noqa: E402
from kvsplice_hf.attend.triton.compilation import (  # noqa: E402
    MEASURED_WITH,
    TARGETS,
    Resources,
    compile_launch,
    limit_excesses,
)
from kvsplice_hf.bench.kernels.head_shapes import (  # noqa: E402
    HEAD_KINDS,
    PLAIN_HEADS,
    PREDICTED_HEADS,
    PUBLISHED_HEADS,
    HeadCase,
    head_cases,
    head_codecs,
)
from kvsplice_hf.bench.kernels.resources import compiled_anew, compiled_row, markdown_of, spills_allowed  # noqa: E402
from kvsplice_hf.bench.kernels.shapes import (  # noqa: E402
    CODED_KEYS,
    KINDS,
    PACKED_KINDS,
    PREDICTED,
    TRELLIS,
    TRELLIS_KEYS,
    WIDE,
    Case,
    cases,
    packed_codec,
    published,
    row_shapes,
)
from kvsplice_hf.errors import UnsupportedError  # noqa: E402


PACKED = Case("attend", "v2-lite", "packed", "bfloat16", "decode")
NARROW = Case("attend", "minicpm3", "packed", "float16", "decode")
PROMPT = Case("attend", "v3", "full rank", "bfloat16", "prefill", biased=True)
FLOATS = Case("attend", "mistral-4", "full rank", "float32", "decode")
ODD = Case("attend", "smollm2-mla", "full rank", "bfloat16", "decode", biased=True)
CODED = Case("attend", "v2-lite", CODED_KEYS, "bfloat16", "decode")
# The number of queries is not divisible by 16.
CODED_ODD = Case("attend", "glm-4.7-flash", CODED_KEYS, "bfloat16", "prefill", biased=True)
CODED_FLOATS = Case("attend", "v3", CODED_KEYS, "float32", "prefill", biased=True)
MERGE = Case("merge", "v2-lite", "full rank", "float32", "decode")
PACK = Case("pack", "minicpm3", "packed", "bfloat16", "decode")
PACK_CODED = Case("pack", "v3", CODED_KEYS, "bfloat16", "prefill")
ALONG = Case("attend", "v2-lite", TRELLIS, "bfloat16", "decode")
ALONG_FLOATS = Case("attend", "smollm2-mla", TRELLIS, "float32", "decode")
ALONG_CODED = Case("attend", "v2-lite", TRELLIS_KEYS, "bfloat16", "prefill", biased=True)
ALONG_WHOLE = Case("attend", "v2-lite", PREDICTED, "bfloat16", "decode")
PACK_ALONG = Case("pack", "v3", TRELLIS_KEYS, "bfloat16", "prefill")
PACK_ONE = Case("pack", "minicpm3", TRELLIS, "float32", "decode")
SEARCH = Case("search", "v2-lite", TRELLIS, "float32", "prefill")
# Rows in pages, as an engine has them, without those of exact tokens.
IN_PAGES = PACKED._replace(paged=True)
FULL_IN_PAGES = Case("attend", "v3", "full rank", "bfloat16", "decode", paged=True)
CODED_IN_PAGES = CODED._replace(paged=True)
ALONG_IN_PAGES = Case("attend", "v3", TRELLIS_KEYS, "bfloat16", "decode", paged=True)
WHOLE_IN_PAGES = ALONG_WHOLE._replace(paged=True)
WIDEST = Case("attend", WIDE, "full rank", "bfloat16", "prefill", biased=True)
REPRESENTATIVES = {
    "sm_80": (
        PACKED,
        PROMPT,
        ODD,
        WIDEST,
        CODED,
        CODED_FLOATS,
        ALONG_FLOATS,
        PACK_ALONG,
        IN_PAGES,
        FULL_IN_PAGES,
        WHOLE_IN_PAGES,
    ),
    "sm_90": (
        NARROW,
        PROMPT,
        MERGE,
        PACK,
        CODED_ODD,
        PACK_CODED,
        ALONG,
        ALONG_CODED,
        ALONG_WHOLE,
        PACK_ALONG,
        PACK_ONE,
        SEARCH,
        FULL_IN_PAGES,
        CODED_IN_PAGES,
        ALONG_IN_PAGES,
        WHOLE_IN_PAGES,
    ),
    "sm_100": (NARROW, PROMPT, CODED_ODD, ALONG_CODED, PACK_ALONG, IN_PAGES, ALONG_IN_PAGES, WHOLE_IN_PAGES),
    "gfx942": (
        PACKED,
        FLOATS,
        CODED,
        PACK_CODED,
        ALONG_CODED,
        ALONG_WHOLE,
        PACK_ALONG,
        SEARCH,
        IN_PAGES,
        CODED_IN_PAGES,
    ),
    "gfx1100": (NARROW, ODD, MERGE, PACK, ALONG, PACK_ONE, SEARCH, IN_PAGES),
}


HEADS = [HeadCase("smollm2", PREDICTED_HEADS, dtype) for dtype in ("bfloat16", "float32")]
HEADS += [HeadCase("llama-3-8b", PLAIN_HEADS, "bfloat16", biased=True)]


@pytest.fixture(autouse=True, scope="module")
def _compiler() -> Iterator[None]:
    if interpreted():
        pytest.skip("TRITON_INTERPRET is set for this process: its interpreter compiles nothing")
    with compiled_anew():
        yield


@pytest.mark.parametrize(
    ("target", "case"), [(target, case) for target, chosen in REPRESENTATIVES.items() for case in chosen]
)
def test_a_kernel_takes_no_more_of_a_gpu_than_that_has(target: str, case: Case) -> None:
    above = compiled_row(case, target)["above"]
    if not triton.__version__.startswith(MEASURED_WITH):  # each release of the compiler spills other numbers
        above = [excess for excess in above if "spilled" not in excess]
    assert above == []


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", HEADS, ids=lambda case: f"{case.geometry}, {case.kind}, {case.dtype}")
def test_the_kernel_of_all_heads_takes_no_more_of_a_gpu_than_that_has(target: str, case: HeadCase) -> None:
    above = compiled_row(case, target)["above"]
    if not triton.__version__.startswith(MEASURED_WITH):
        above = [excess for excess in above if "spilled" not in excess]
    assert above == []


def test_rows_without_coded_keys_bring_nothing_of_them_into_a_kernel() -> None:
    target = TARGETS["sm_80"]
    arguments = [
        next(line for line in compile_launch(launch, target).asm["source"].splitlines() if "tt.func public" in line)
        for launch in (case.launch(target.limits) for case in (PACKED, CODED, PACK, PACK_CODED))
    ]
    of_keys = ("%key_", "%pair", "%table", "%slots")
    packed, coded, pack, pack_coded = ([name in line for name in of_keys] for line in arguments)
    assert not any((*packed, *pack))
    assert all(coded)
    assert pack_coded[0]


def test_rows_side_by_side_bring_nothing_of_pages_into_a_kernel() -> None:
    target = TARGETS["sm_80"]
    side_by_side, in_pages = (
        next(line for line in compile_launch(launch, target).asm["source"].splitlines() if "tt.func public" in line)
        for launch in (case.launch(target.limits) for case in (PACKED, IN_PAGES))
    )
    of_pages = ("%pages", "%page_count", "%hidden")
    assert not any(name in side_by_side for name in of_pages)
    assert all(name in in_pages for name in of_pages)


def test_a_gain_of_keys_is_read_only_for_pieces_of_the_value_that_hold_their_code() -> None:
    target = TARGETS["sm_80"]
    flags = [
        [case.launch(target.limits).settings[f"KEY_GAINS{piece}"] for piece in range(3)]
        for case in (ALONG_WHOLE, ALONG_CODED, ALONG)
    ]
    assert flags[0][:2] == [False, True]
    assert not any((*flags[1], *flags[2]))


def test_rows_of_plain_levels_bring_nothing_of_a_trellis_into_a_kernel() -> None:
    target = TARGETS["sm_80"]
    plain, along = (
        compile_launch(case.launch(target.limits), target).asm["source"] for case in (PACK, PACK._replace(kind=TRELLIS))
    )
    plain, along = (text[text.index("tt.func public") :].partition("{\n")[0] for text in (plain, along))
    of_search = ("%columns", "%reaches", "%errors", "%ways")
    assert not any(name in plain for name in of_search)
    assert all(name in along for name in of_search)


def test_what_is_compiled_is_the_variant_that_would_run() -> None:
    """Sizes and addresses that are divisible by 16 are compiled in as such, and only those."""
    launch = PROMPT.launch(TARGETS["sm_80"].limits)
    text = compile_launch(launch, TARGETS["sm_80"]).asm["source"]
    arguments = next(line for line in text.splitlines() if "tt.func public @attend_kernel" in line)
    assert "%query: !tt.ptr<bf16> {tt.divisibility = 16 : i32}" in arguments
    assert "%n: i32 {tt.divisibility = 16 : i32}" in arguments
    assert "%count: i32" in arguments
    assert "%count: i32 {tt.divisibility" not in arguments
    odd = compile_launch(ODD.launch(TARGETS["sm_80"].limits), TARGETS["sm_80"]).asm["source"]
    assert "%n: i32 {tt.divisibility" not in odd


def test_the_interpreter_says_that_it_compiles_nothing() -> None:
    launch = MERGE.launch(TARGETS["sm_80"].limits)._replace(kernel=print)  # what it has is no function of the compiler
    with pytest.raises(UnsupportedError, match="Unset TRITON_INTERPRET"):
        compile_launch(launch, TARGETS["sm_80"])


def test_what_is_above_a_limit_is_named_with_the_limit() -> None:
    assert limit_excesses(Resources(64 << 10, 0, 256, 16), "gfx1100") == []
    assert limit_excesses(Resources((64 << 10) + 1, 513, 257, 17), "gfx1100") == [
        "65537 bytes of shared memory, at most 65536",
        "513 columns of tensor memory, at most 512",
        "257 registers, at most 256",
        "17 spilled bytes, at most 16",
    ]
    assert limit_excesses(Resources(0, 0, 0, 40), "sm_80", spilled=40) == []


# What torch says of an A100, an H100, an MI300X and a W7900.
DEVICES = {
    "sm_80": {"shared_memory_per_block_optin": 163 << 10, "multi_processor_count": 108, "warp_size": 32},
    "sm_90": {"shared_memory_per_block_optin": 227 << 10, "multi_processor_count": 132, "warp_size": 32},
    "gfx942": {"multi_processor_count": 304, "warp_size": 64},
    "gfx1100": {"shared_memory_per_block_optin": 0, "multi_processor_count": 96, "warp_size": 32},
}


@pytest.mark.parametrize("target", DEVICES)
def test_a_device_has_the_limits_that_it_is_compiled_for(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**DEVICES[target]))
    monkeypatch.setattr(torch.version, "hip", "7.0" if target.startswith("gfx") else None)
    limits_of.cache_clear()
    assert limits_of(torch.device("cuda", 0)) == TARGETS[target].limits
    limits_of.cache_clear()


@pytest.mark.parametrize("target", TARGETS)
def test_blocks_shrink_until_they_fit_into_shared_memory(target: str) -> None:
    limits = TARGETS[target].limits
    for n in range(1, 577):
        for dtype in (torch.bfloat16, torch.float32):
            for packed in (False, True):
                chosen = choose_blocks(128, n, dtype, packed, limits)
                width = sum(blocks.pieces_of(n))
                needed = blocks._shared_memory(chosen.queries, chosen.rows, chosen.stages, width, dtype.itemsize)
                assert needed <= limits.shared_memory or (chosen.queries, chosen.stages) == (16, 1)


def test_splits_fill_a_device_but_are_no_smaller_than_a_few_blocks() -> None:
    limits = TARGETS["sm_90"].limits
    assert choose_splits(1 << 20, 1, 32, limits) == 2 * 132
    assert choose_splits(1 << 20, 100, 32, limits) == 2
    assert choose_splits(1 << 20, 1000, 32, limits) == 1
    assert choose_splits(256, 1, 32, limits) == 2
    assert choose_splits(1, 1, 32, limits) == 1


def test_every_published_shape_is_compiled_with_every_kind_of_rows() -> None:
    found = {(case.geometry, case.kind) for case in cases(published()) if case.kernel == "attend"}
    assert found == {(name, kind) for name in published() for kind in KINDS}
    packs = {(case.geometry, case.kind) for case in cases(published()) if case.kernel == "pack"}
    assert packs == {(name, kind) for name in published() for kind in PACKED_KINDS if kind != PREDICTED}
    assert {"v2-lite", "v3", "glm-4.7-flash", "minicpm3", "smollm2-mla"} <= set(published())


@pytest.mark.parametrize("name", published())
def test_packed_rows_take_a_quarter_of_the_stock_bytes(name: str) -> None:
    shape = row_shapes()[name]
    codec = packed_codec(shape)
    assert 0.24 * 2 * shape.row_dim < codec.row_bytes <= 0.25 * 2 * shape.row_dim
    assert len(codec.widths.unique()) > 4
    for coded, plain in ((CODED_KEYS, "packed"), (TRELLIS_KEYS, TRELLIS)):
        assert packed_codec(shape, coded).row_bytes == packed_codec(shape, plain).row_bytes + 1
    assert packed_codec(shape, TRELLIS).row_bytes == codec.row_bytes


def test_every_published_layer_is_compiled_with_every_kind_of_heads() -> None:
    assert {(case.geometry, case.kind) for case in head_cases(PUBLISHED_HEADS)} == {
        (name, kind) for name in PUBLISHED_HEADS for kind in HEAD_KINDS
    }


def test_heads_of_a_layer_differ_in_their_widths() -> None:
    one, other = head_codecs(HeadCase("smollm2", PREDICTED_HEADS, "bfloat16").shape, PREDICTED_HEADS)[:2]
    assert one.row_bytes > other.row_bytes


def test_a_line_of_the_table_holds_the_most_of_its_cases() -> None:
    case = {**PACKED._asdict(), "target": "sm_80", "n": 576, "tensor_memory": 0}
    some = {**case, "shared_memory": 2048, "registers": 99, "spilled": 0}
    other = {**case, "dtype": "float16", "shared_memory": 1024, "registers": 100, "spilled": 8}
    *_, line = markdown_of([some, other], ["sm_80", "sm_90"]).splitlines()
    assert line == "| attend | packed | 576 | 16 bits | decode | 2 / 100 / 8 | not compiled |"


def test_only_attention_is_known_to_spill() -> None:
    assert spills_allowed(PACK, "gfx1100") == spills_allowed(MERGE, "gfx1100") < spills_allowed(PACKED, "gfx1100")
