"""The codecs: packing is exact on codes, levels are good ones, and nothing depends on the batch or the dtype."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch

from kvsplice_hf import ConfigError, RowCodec, TrellisCodec
from kvsplice_hf.code.levels import GRIDS
from kvsplice_hf.code.widths import WIDTHS, row_bytes


# Mean squared errors of Lloyd-Max quantisers of the unit Gaussian (Max, Quantizing for minimum distortion, 1960).
LLOYD_MAX = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499}

PATTERNS = {
    "one coordinate": [5],
    "every width": list(WIDTHS),
    "nothing but zeros and one bit": [0, 0, 1],
    "whole bytes": [8] * 7,
    "raw numbers": [16] * 3,
    "odd counts of every field": [7, 7, 7, 5, 3, 2, 1, 1, 6],
    "as calibrated": [8] * 3 + [6] * 5 + [5] * 20 + [4] * 41 + [3] * 33 + [2] * 17 + [1] * 9 + [0] * 12 + [7] * 5,
}
KINDS = {"rounded": RowCodec, "along a trellis": TrellisCodec}
SHAPES = [(2, 1, 7), (1, 1, 1), (3,), (), (0, 1, 4), (2, 1, 0)]


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def kind(request: Any) -> type[RowCodec]:
    return request.param


def make(widths: list[int], gained: int | None = None, seed: int = 0, kind: type[RowCodec] = RowCodec) -> RowCodec:
    generator = torch.Generator().manual_seed(seed)
    n = len(widths)
    count = n // 2 if gained is None else gained
    scales, centres = 2 + torch.rand(n, generator=generator), torch.randn(n, generator=generator)
    centres[:count] = 0
    return kind(torch.tensor(widths), scales, centres, 0.5 + torch.rand(count, generator=generator))


def rows_for(codec: RowCodec, shape: tuple[int, ...]) -> torch.Tensor:
    return 2 * torch.randn(*shape, codec.row_dim, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("widths", PATTERNS.values(), ids=PATTERNS)
def test_packing_and_unpacking_are_exact_inverses_on_codes(
    widths: list[int], shape: tuple[int, ...], kind: type[RowCodec]
) -> None:
    codec = make(widths, kind=kind)
    rows = rows_for(codec, shape)
    packed = codec.pack(rows)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*shape, codec.row_bytes)
    assert torch.equal(codec.codes(packed), codec.quantise(rows, codec.gains(rows)))
    torch.testing.assert_close(codec.unpack(packed), codec.round_trip(rows), rtol=2e-6, atol=2e-6)
    assert torch.equal(codec.unpack(packed)[..., codec.widths == 16], rows[..., codec.widths == 16].bfloat16().float())


@pytest.mark.parametrize("gained", [0, None])
@pytest.mark.parametrize("widths", PATTERNS.values(), ids=PATTERNS)
def test_columns_hold_the_numbers_of_the_rows(widths: list[int], gained: int | None, kind: type[RowCodec]) -> None:
    codec = make(widths, gained, kind=kind)
    packed = codec.pack(rows_for(codec, (2, 9)))
    columns, gains, _ = codec.read_columns(packed)
    assert columns.shape == (2, len(codec.column_index), 9)
    assert (gains is None) == (len(codec.sigmas) == 0)
    factors = torch.ones_like(columns)
    if gains is not None:
        factors[:, : codec.gained_columns] = gains
    rows = codec.base.expand(2, 9, -1).clone()
    rows[..., codec.column_index] += (columns * factors * codec.column_scales[:, None]).transpose(1, 2)
    torch.testing.assert_close(rows, codec.unpack(packed), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("widths", PATTERNS.values(), ids=PATTERNS)
def test_a_row_takes_its_bits_and_less_than_four_bytes_more(widths: list[int], kind: type[RowCodec]) -> None:
    codec = make(widths, kind=kind)
    bits = sum(widths)
    assert codec.row_bytes == row_bytes(torch.tensor(widths), len(widths) // 2)
    assert bits / 8 <= codec.row_bytes < bits / 8 + 4
    assert make(widths, gained=0, kind=kind).row_bytes == codec.row_bytes - (len(widths) > 1)


def test_every_code_of_every_width_comes_back() -> None:
    for width in range(1, 9):
        codec = RowCodec(torch.tensor([width]), torch.ones(1), torch.zeros(1), torch.empty(0))
        levels = GRIDS[width].levels()[:, None]
        assert torch.equal(codec.codes(codec.pack(levels))[:, 0], torch.arange(2**width, dtype=torch.uint8))
        torch.testing.assert_close(codec.unpack(codec.pack(levels)), levels)


def test_rows_do_not_depend_on_one_another(kind: type[RowCodec]) -> None:
    codec = make(PATTERNS["as calibrated"], kind=kind)
    rows = rows_for(codec, (2, 1, 9))
    packed = codec.pack(rows)
    for token in range(9):
        assert torch.equal(codec.pack(rows[:, :, token]), packed[:, :, token])
    assert torch.equal(codec.unpack(packed[:, :, 3:5]), codec.unpack(packed)[:, :, 3:5])


@pytest.mark.parametrize("width", LLOYD_MAX)
def test_gaussian_coordinates_lose_little_more_than_with_lloyd_max_levels(width: int) -> None:
    samples = torch.randn(100_000, 1, generator=torch.Generator().manual_seed(0))
    errors = []
    for scale in torch.linspace(1, 5, 41).tolist():
        codec = RowCodec(torch.tensor([width]), torch.tensor([scale]), torch.zeros(1), torch.empty(0))
        errors.append((codec.round_trip(samples) - samples).square().mean().item())
    assert LLOYD_MAX[width] * 0.97 < min(errors) < LLOYD_MAX[width] * 1.07


def test_an_outlier_token_is_coded_as_well_as_any_other(kind: type[RowCodec]) -> None:
    codec = kind(torch.full((64,), 4), torch.full((64,), 3.0), torch.zeros(64), torch.ones(64))
    rows = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    relative = [
        ((codec.round_trip(factor * rows) / factor - rows).square().mean() / rows.square().mean()).item()
        for factor in (1.0, 0.03, 100.0)
    ]
    assert max(relative) < 1.2 * min(relative)
    assert torch.isfinite(codec.round_trip(torch.zeros(1, 64))).all()


def test_numbers_beyond_the_levels_stay_on_the_outermost_one(kind: type[RowCodec]) -> None:
    codec = kind(torch.tensor([3, 8]), torch.ones(2), torch.tensor([0.0, 5.0]), torch.empty(0))
    low, high = (codec.grids[width].levels() for width in (8, 3))
    found = codec.round_trip(torch.tensor([[1e6, -1e6]]))
    torch.testing.assert_close(found[0, 1], 5 + low[0])
    # Along a trellis the bits of columns before say which of the outermost ones a column has.
    outermost = high[-1:] if kind is RowCodec else high[-4:]
    assert (outermost - found[0, 0]).abs().min() < 1e-5


def test_levels_are_symmetric_and_ascend() -> None:
    for width in GRIDS:
        levels = GRIDS[width].levels()
        assert (levels.diff() > 0).all()
        torch.testing.assert_close(levels, -levels.flip(0))
        assert levels[-1] < 1


def test_casts_copies_and_pickles_leave_the_codec_as_it_was(kind: type[RowCodec]) -> None:
    codec = make(PATTERNS["every width"], kind=kind)
    rows = rows_for(codec, (2, 1, 5))
    packed = codec.pack(rows)
    for other in (copy.deepcopy(codec), pickle.loads(pickle.dumps(codec)), copy.deepcopy(codec).to(torch.float16)):
        assert torch.equal(other.pack(rows), packed)
        assert torch.equal(other.unpack(packed), codec.unpack(packed))
    assert set(codec.state_dict()) == {"widths", "scales", "centres", "sigmas"}


def test_gradients_pass_the_rounding_but_not_the_last_level(kind: type[RowCodec]) -> None:
    codec = make([4, 4, 0, 16], gained=0, kind=kind)
    inside, beyond = codec.centres + 0.3 * codec.scales, codec.centres - 7 * codec.scales
    rows = torch.stack([inside, beyond]).requires_grad_()
    codec.round_trip(rows).sum().backward()
    assert rows.grad.tolist() == [[1, 1, 0, 1], [0, 0, 0, 1]]


@pytest.mark.parametrize("gained", [0, None])
def test_steps_in_training_have_the_gradient_of_the_error_that_they_make(
    gained: int | None, kind: type[RowCodec]
) -> None:
    codec = make(PATTERNS["as calibrated"], gained, kind=kind).train_steps()
    rows = rows_for(codec, (200,))
    codec.round_trip(rows).sum().backward()
    with torch.no_grad():
        row_scales = codec._row_scales(codec.gains(rows)).expand_as(rows)
        factors = row_scales / codec.scales
        unit = (rows - codec.centres) / row_scales
        within = (unit.abs() < 1) & (codec.widths > 0)
        level = (codec.round_trip(rows) - codec.centres) / row_scales
    wanted = torch.where(within, level - unit, torch.where(codec.widths > 0, level, 0)) * factors
    torch.testing.assert_close(codec.scales.grad, wanted.sum(0), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(codec.centres.grad, (~within).float().sum(0))


def test_steps_in_training_are_those_that_pack_and_that_are_saved(kind: type[RowCodec]) -> None:
    codec = make(PATTERNS["as calibrated"], kind=kind).train_steps()
    assert {name for name, _ in codec.named_parameters()} == {"scales", "centres"}
    with torch.no_grad():
        codec.scales.mul_(1.3)
        codec.centres.add_(0.1)
    rows = rows_for(codec, (2, 1, 5))
    frozen = kind(codec.widths, codec.scales.detach(), codec.centres.detach(), codec.sigmas)
    for other in (codec.to(torch.bfloat16), codec.train_steps(False)):
        assert torch.equal(other.unpack(other.pack(rows)), frozen.unpack(frozen.pack(rows)))
        assert other.scales.dtype == torch.float32
        assert set(other.state_dict()) == {"widths", "scales", "centres", "sigmas"}
    assert not list(codec.parameters())


NAN = math.nan
WRONG = {
    "unknown width": ([9, 1], [1.0, 1.0], [0.0, 0.0], [], r"Widths \[9\]"),
    "shapes that differ": ([1, 1], [1.0], [0.0, 0.0], [], r"\[2\], \[1\], \[2\]"),
    "a scale of zero": ([1, 1], [1.0, 0.0], [0.0, 0.0], [], "positive and finite"),
    "a scale that is not finite": ([1, 1], [1.0, NAN], [0.0, 0.0], [], "positive and finite"),
    "a centre that is not finite": ([1, 1], [1.0, 1.0], [NAN, 0.0], [], "centres finite"),
    "more sigmas than coordinates": ([1], [1.0], [0.0], [1.0, 1.0], "2 sigmas for 1"),
}


@pytest.mark.parametrize(("widths", "scales", "centres", "sigmas", "phrase"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_a_codec_is_refused(
    widths: list[int], scales: list[float], centres: list[float], sigmas: list[float], phrase: str
) -> None:
    with pytest.raises(ConfigError, match=phrase):
        RowCodec(torch.tensor(widths), torch.tensor(scales), torch.tensor(centres), torch.tensor(sigmas))


def test_rows_of_another_codec_are_refused() -> None:
    codec = make(PATTERNS["whole bytes"])
    with pytest.raises(ConfigError, match="rows are uint8 of 8 bytes"):
        codec.unpack(torch.zeros(2, 1, 3, 9, dtype=torch.uint8))
