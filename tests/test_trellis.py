"""`TrellisCodec`: rows obey the code, err as is known of it, and whoever searches for them finds the closest ones."""

import copy
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build

from kvsplice_hf import (
    CheckpointError,
    KVSpliceCalibrator,
    KVSpliceConfig,
    RowCodec,
    TrellisCodec,
    load_kvsplice,
    patch_model_with_kvsplice,
    save_kvsplice,
)
from kvsplice_hf.attend import choice
from kvsplice_hf.attend.native import calls as native
from kvsplice_hf.calibration.allocate import fit_scales
from kvsplice_hf.code import trellis
from kvsplice_hf.code.codec import gain_factors
from kvsplice_hf.code.codecs import codec_class
from kvsplice_hf.code.files import CONFIG_NAME
from kvsplice_hf.code.trellis import TRELLIS_GRIDS, closest_codes, squared_error
from kvsplice_hf.patch.state import patched_sites


WIDTHS = {
    "one bit": [1] * 12,
    "three bits": [3] * 12,
    "narrow": [4, 2, 1, 3, 1, 2] * 2,
    "every width": [8, 7, 6, 5, 4, 3, 2, 1, 0, 16] * 4,
    "more than a vector": [5, 1, 2] * 50,
    "a single column": [3],
}


BEHIND = 1  # the chain of columns that share no gain


def gaussian(*sizes: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def make(widths: list[int], gained: int = 0) -> TrellisCodec:
    n = len(widths)
    return TrellisCodec(torch.tensor(widths), torch.full((n,), 2.5), torch.zeros(n), torch.ones(gained))


def searches() -> dict[str, Any]:
    return {"PyTorch": closest_codes, "C++": native.search}


@pytest.fixture(params=searches())
def search(request: Any) -> Any:
    if request.param == "C++" and not native.kernels_available("cpu"):
        pytest.skip("needs a C++ compiler")
    return searches()[request.param]


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_rows_are_read_as_the_page_of_the_code_says(widths: list[int], share: float) -> None:
    """Level `4 * upper + 2 * (u_i ^ u_(i-1) ^ u_(i-6)) + (u_(i-2) ^ u_(i-4))`, counted over columns of up to 7 bits.

    The count begins anew behind the coordinates that share the gain.
    """
    gained = int(share * len(widths))
    codec = make(widths, gained)
    packed = codec.pack(gaussian(40, len(widths)))
    factors = gain_factors(packed[:, : codec.gain_bytes])
    for token, (codes, row) in enumerate(zip(codec.codes(packed), codec.unpack(packed), strict=True)):
        u = {True: [0] * 6, False: [0] * 6}
        for number in codec.column_index[: len(codec.column_slopes)].tolist():
            code, width, before = int(codes[number]), widths[number], u[number < gained]
            assert code < 2**width
            if width <= trellis.LARGEST_WIDTH:
                lowest = code & 1
                level = 4 * (code >> 1) + 2 * (lowest ^ before[-1] ^ before[-6]) + (before[-2] ^ before[-4])
                before.append(lowest)
            else:
                level = code
            scale = 2.5 * (factors[token, 0] if number < gained else 1)
            torch.testing.assert_close(row[number], scale * TRELLIS_GRIDS[width].levels()[level], rtol=1e-5, atol=1e-5)


def test_the_code_of_a_key_does_not_depend_on_its_latent() -> None:
    codec, rows = make([4, 3, 2, 1] * 10, gained=25), gaussian(30, 40)
    other = torch.cat([gaussian(30, 25, seed=1), rows[:, 25:]], dim=1)
    found, expected = (codec.codes(codec.pack(numbers)) for numbers in (other, rows))
    assert torch.equal(found[:, 25:], expected[:, 25:])
    assert not torch.equal(found[:, :25], expected[:, :25])


def test_the_row_found_is_the_closest_of_all(search: Any) -> None:
    codec = make([1, 2, 1, 1, 1, 1, 2])
    tables = codec.trellis_tables(BEHIND)
    units = 0.5 * gaussian(16, 7)
    of_widths = [range(2**width) for width in codec.widths[codec.column_index].tolist()]
    every = torch.tensor(list(itertools.product(*of_widths)), dtype=torch.uint8)
    least = torch.stack([squared_error(unit.expand(len(every), -1), every, tables).min() for unit in units])
    torch.testing.assert_close(squared_error(units, search(units, tables), tables), least)


@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_both_searches_find_the_same_rows(widths: list[int]) -> None:
    if not native.kernels_available("cpu"):
        pytest.skip("needs a C++ compiler")
    codec = make(widths)
    tables, units = codec.trellis_tables(BEHIND), 0.4 * gaussian(300, len(codec.in_chain))
    found, expected = native.search(units, tables), closest_codes(units, tables)
    assert (found != expected).any(1).float().mean() <= 0.01  # where one digit decides
    torch.testing.assert_close(squared_error(units, found, tables), squared_error(units, expected, tables))


@pytest.mark.parametrize("far", [math.nan, math.inf, -math.inf, 1e30])
def test_what_is_no_number_or_far_out_spoils_neither_the_row_nor_others(search: Any, far: float) -> None:
    codec = make([3, 2, 1, 1] * 5)
    tables, units = codec.trellis_tables(BEHIND), 0.4 * gaussian(9, 20)
    expected = search(units, tables)
    units[4, 7] = far
    found = search(units, tables)
    others = torch.arange(9) != 4
    assert torch.equal(found[others], expected[others])
    assert (found[4] < 2 ** tables.widths[:20]).all()


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 6, 7])
def test_gaussian_coordinates_err_less_than_by_rounding(width: int) -> None:
    rows = gaussian(60, 256)
    scale, error = fit_scales(rows.view(-1, 1), torch.ones(rows.numel(), 1), width)
    every = [width] * 256
    codec = TrellisCodec(torch.tensor(every), scale.expand(256), torch.zeros(256), torch.empty(0))
    ratio = (codec.round_trip(rows) - rows).square().mean() / error.item()
    assert ratio == pytest.approx(float(TrellisCodec.error_ratios()[width]), rel=0.04)
    units = rows / scale
    tables = codec.trellis_tables(BEHIND)
    mean = squared_error(units, closest_codes(units, tables), tables).mean() / 256
    assert mean == pytest.approx(1.0, rel=0.2)  # what weights are there for: every column counts as much


def test_rows_are_read_by_their_own_codec_only() -> None:
    codec = make([4] * 6)
    rounding = RowCodec(codec.widths, codec.scales, codec.centres, codec.sigmas)
    assert not codec.reads_rows_of(rounding)
    assert not rounding.reads_rows_of(codec)
    assert type(codec.without(torch.tensor([True] * 5 + [False]))) is TrellisCodec


def test_a_search_that_finds_worse_rows_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    if not native.kernels_available("cpu"):
        pytest.skip("needs a C++ compiler")
    monkeypatch.setattr(choice, "_verdicts", {})
    monkeypatch.setattr(native, "search", lambda unit, tables: torch.zeros_like(unit, dtype=torch.uint8))
    codec, rows = make([3] * 9), gaussian(20, 9)
    monkeypatch.setattr(choice, "_WITHOUT_KERNELS", True)
    expected = codec.quantise(rows, codec.gains(rows))
    monkeypatch.setattr(choice, "_WITHOUT_KERNELS", False)
    assert torch.equal(codec.quantise(rows, codec.gains(rows)), expected)
    assert list(choice.verdicts().values()) == ["its result differs from that of PyTorch"]


def test_a_compiler_takes_the_search_as_one_operator() -> None:
    codec, rows = make([3, 2, 1] * 4, gained=5), gaussian(6, 12)
    explained = torch._dynamo.explain(codec.pack)(rows)
    assert explained.graph_break_count == 0
    (graph,) = explained.graphs
    assert sum("closest_codes" in str(node.target) for node in graph.graph.nodes) == 2  # one for each chain
    assert len(graph.graph.nodes) < 300
    assert torch.equal(torch.compile(codec.pack, backend="eager", fullgraph=True)(rows), codec.pack(rows))


def packed_model(codec: str, seed: int = 0) -> Any:
    model = build("deepseek_v3")
    ids = torch.randint(1, 90, (16, 16), generator=torch.Generator().manual_seed(seed))
    settings = KVSpliceConfig(bits=5, codec=codec, sink_tokens=2)
    known = KVSpliceCalibrator(model, sink_tokens=2).collect(list(ids), progress=False)
    return patch_model_with_kvsplice(model, settings, calibration=known)


def test_rows_of_a_trellis_are_the_default() -> None:
    assert KVSpliceConfig(bits=5).codec == KVSpliceConfig().codec == "trellis"


@pytest.mark.parametrize("codec", ["rows", "trellis"])
def test_a_saved_splice_says_its_codec_and_files_without_one_are_of_rounded_rows(codec: str, tmp_path: Path) -> None:
    model, ids = packed_model(codec), torch.arange(1, 25)[None]
    save_kvsplice(model, tmp_path)
    config = json.loads((tmp_path / CONFIG_NAME).read_text())["config"]
    assert config.get("codec") == (None if codec == "rows" else codec)  # releases up to 0.2 know no other
    loaded = load_kvsplice(build("deepseek_v3"), tmp_path)
    assert {patched.splice.codec.kind for _, patched in patched_sites(loaded)} == {codec}
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize(("saved", "held"), [("rows", "trellis"), ("trellis", "rows")])
def test_a_splice_of_the_other_codec_is_not_loaded_into_a_patched_model(saved: str, held: str, tmp_path: Path) -> None:
    model = packed_model(saved)
    save_kvsplice(model, tmp_path)
    for _, patched in patched_sites(model):  # nothing else tells them apart
        codec = patched.splice.codec
        patched.splice.codec = codec_class(held)(*(getattr(codec, name) for name in codec.saved))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=f"by the codec '{saved}', the patched model by '{held}'"):
        load_kvsplice(model, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {patched.splice.codec.kind for _, patched in patched_sites(model)} == {held}


def test_rows_of_the_same_numbers_and_another_codec_are_of_another_identity() -> None:
    splice = next(patched.splice for _, patched in patched_sites(packed_model("trellis")))
    held = splice.codec
    identity = splice.identity
    splice.codec = RowCodec(*(getattr(held, name) for name in RowCodec.saved))
    assert splice.identity != identity
    splice.codec = held
    assert splice.identity == identity
