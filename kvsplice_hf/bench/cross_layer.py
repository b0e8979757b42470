"""Layers in groups, the rows of which are predicted from the rows of the earlier layers of the group: a simulation.

The first layer of a group is coded as ever. Of each other one what is left of its numbers is coded, after linear
prediction from the rows of the earlier ones as they read back. All recipes get their bits by one rule, reverse
water-filling over all layers, that of groups of one among them, so that they can be compared. What an error of a number
costs is taken from the bits that calibration gave it: it gives w bits to what costs about 4^w times what nothing does.

Legend: `M` sampled rows, `n` numbers of a row, `D` numbers of all rows of the earlier layers of a group.
"""

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from kvsplice_hf.calibration.allocate import fit_scales
from kvsplice_hf.code.codec import RowCodec
from kvsplice_hf.code.codecs import Codec
from kvsplice_hf.code.heads import PartKey, layer_of
from kvsplice_hf.code.trellis import TrellisCodec
from kvsplice_hf.code.widths import row_bytes
from kvsplice_hf.config import KVSpliceConfig
from kvsplice_hf.errors import UnsupportedError
from kvsplice_hf.patch.state import splice_parts_of


# The squared error of 0 to 7 bits over the variance of a Gaussian coordinate, rounded (Max, 1960).
_ROUNDED = (1.0, 0.3634, 0.1175, 0.03454, 0.009497, 0.002499, 0.000641, 0.000163)
# Rows that the scale of each number is fitted to.
_SCALE_ROWS = 2048
_MOST_BITS = len(_ROUNDED) - 1
_FIRST = KVSpliceConfig.sink_tokens
_RIDGE = 0.003
_LEAST = 1e-12


class _Stub(Codec):
    """A codec in the place of that of a splice, which rows go through without ever being bytes."""

    kind = "simulated"
    saved = ()

    def __init__(self, own: RowCodec) -> None:
        super().__init__()
        self.own, self.row_bytes = own, own.row_bytes

    @property
    def row_dim(self) -> int:
        return self.own.row_dim

    def meaning(self) -> list[torch.Tensor]:
        return self.own.meaning()

    def pack(self, rows: torch.Tensor) -> torch.Tensor:
        raise UnsupportedError("Layers in groups are simulated without a cache: call the model with use_cache=False.")

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        return self.pack(packed)

    @classmethod
    def saved_shapes(cls, row_dim: int, rank: int) -> tuple[torch.Size, ...]:
        return ()

    def behind(self, numbers: torch.Tensor, start: int) -> torch.Tensor:
        return self.own.behind(numbers, start)


class _Recorder(_Stub):
    """Keeps the numbers of rows as they came, and as they read back."""

    def __init__(self, own: RowCodec) -> None:
        super().__init__(own)
        self.came: list[torch.Tensor] = []
        self.read: list[torch.Tensor] = []

    def round_trip(self, rows: torch.Tensor) -> torch.Tensor:
        found = self.own.round_trip(rows)
        for kept, numbers in ((self.came, rows), (self.read, found)):
            kept.append(numbers[..., _FIRST:, :].detach().flatten(0, -2).half().cpu())
        return found


@dataclass
class _Passage:
    """What the layers of a group have read back in the running call, by part; parts of others are forgotten."""

    read: dict[PartKey, torch.Tensor] = field(default_factory=dict)


class _Predicted(_Stub):
    """Codes what prediction leaves."""

    def __init__(
        self,
        own: RowCodec,
        part: PartKey,
        sources: Sequence[PartKey],
        weights: torch.Tensor,
        offset: torch.Tensor,
        passage: _Passage,
    ) -> None:
        super().__init__(own)
        self.part, self.sources, self.passage = part, sources, passage
        self.weights, self.offset = weights, offset

    def _prediction(self) -> torch.Tensor:
        parts = [self.passage.read[source] for source in self.sources]
        return torch.cat(parts, dim=-1) @ self.weights + self.offset if parts else self.offset

    def behind(self, numbers: torch.Tensor, start: int) -> torch.Tensor:
        expected = self._prediction()[..., start:]
        return self.own.behind(numbers - expected, start) + expected

    def round_trip(self, rows: torch.Tensor) -> torch.Tensor:
        expected = self._prediction()
        found = self.own.round_trip(rows - expected) + expected
        self.passage.read[self.part] = found
        return found


@contextlib.contextmanager
def _codecs_replaced(model: Any, codecs: Mapping[PartKey, Codec]) -> Iterator[None]:
    splices = splice_parts_of(model)
    before = {part: splices[part].codec for part in codecs}
    try:
        for part in codecs:
            splices[part].codec = codecs[part]
        yield
    finally:
        for part in codecs:
            splices[part].codec = before[part]


@dataclass
class Sample:
    """Rows of calibration text, by part [M, n].

    Attributes:
        came: as they came.
        read: as the codec of the splice reads them back.
    """

    came: dict[PartKey, torch.Tensor]
    read: dict[PartKey, torch.Tensor]


@torch.no_grad()
def sampled(model: Any, windows: torch.Tensor) -> Sample:
    """The rows of windows of token ids [W, T], without the first tokens of each.

    Args:
        model: patched, with packed rows of this package's codecs.
        windows: of calibration text.
    """
    recorders = {part: _Recorder(_row_codec(splice)) for part, splice in splice_parts_of(model).items()}
    with _codecs_replaced(model, recorders):
        for window in tqdm(windows, desc="rows of text", file=sys.stderr):
            model(window[None].to(model.device), use_cache=False)
    return Sample(
        {part: torch.cat(recorder.came) for part, recorder in recorders.items()},
        {part: torch.cat(recorder.read) for part, recorder in recorders.items()},
    )


def _row_codec(splice: Any) -> RowCodec:
    if not isinstance(splice.codec, RowCodec):
        raise UnsupportedError("Layers in groups are simulated of packed rows only. Give a budget of bytes.")
    return splice.codec


class Groups:
    """Groups of so many layers, fitted to a sample; `with_budget` gives the codecs.

    Attributes:
        size: layers of a group.
        deviations: of what prediction leaves of each part, [n].
    """

    def __init__(self, size: int, sample: Sample, codecs: Mapping[PartKey, RowCodec]) -> None:
        self.size, self._codecs = size, dict(codecs)
        self._layers = sorted({layer_of(part) for part in codecs})
        self.deviations: dict[PartKey, torch.Tensor] = {}
        self._weights: dict[PartKey, tuple[torch.Tensor, torch.Tensor]] = {}
        self._unit: dict[PartKey, tuple[torch.Tensor, torch.Tensor]] = {}
        self._costs = {part: _costs(sample.came[part], codec) for part, codec in codecs.items()}
        for layer in tqdm(self._layers, desc=f"groups of {size}", file=sys.stderr):
            self._fit(layer, sample)

    def sources(self, layer: int) -> list[PartKey]:
        """The parts that a layer is predicted from."""
        place = self._layers.index(layer)
        earlier = self._layers[place - place % self.size : place]
        return [part for part in self._codecs if layer_of(part) in earlier]

    def _fit(self, layer: int, sample: Sample) -> None:
        own, sources = [part for part in self._codecs if layer_of(part) == layer], self.sources(layer)
        target = torch.cat([sample.came[part] for part in own], dim=1).double()
        known = torch.cat([sample.read[part].float() for part in sources] or [target[:, :0].float()], dim=1).double()
        mean, centre = known.mean(0), target.mean(0)
        moments = (known - mean).T @ (known - mean)
        moments.diagonal().mul_(1 + _RIDGE)
        weights = (
            torch.linalg.solve(moments, (known - mean).T @ (target - centre)) if sources else moments.new_zeros(0, 1)
        )
        expected = (known - mean) @ weights + centre if sources else centre
        rest = target - expected
        start = 0
        for part in own:
            place = slice(start, start + self._codecs[part].row_dim)
            start = place.stop
            of_part = weights[:, place] if sources else weights
            offset = centre[place] - mean @ of_part if sources else centre[place]
            self._weights[part] = of_part.float(), offset.float()
            self.deviations[part] = rest[:, place].std(0).clamp_min(_LEAST).float()
            some = rest[:: max(1, len(rest) // _SCALE_ROWS), place].float()
            self._unit[part] = _without_gains(some, self.deviations[part], self._codecs[part])

    def bits_saved(self, ordinary: "Groups") -> float:
        """Bits per number at equal squared error in which these groups differ from those of one layer, on average."""
        ratios = [self.deviations[part] / ordinary.deviations[part] for part in self._codecs]
        return float(-torch.cat(ratios).log2().mean())

    def with_budget(self, nbytes: float) -> tuple[dict[PartKey, Codec], float]:
        """Codecs with rows of so many bytes per layer, at most, and the bytes that they have on average."""
        low, high = -80.0, 20.0
        for _ in range(40):
            middle = (low + high) / 2
            if self._bytes(self._widths(2.0**middle)) > nbytes:
                low = middle
            else:
                high = middle
        widths = self._widths(2.0**high)
        passage = _Passage()
        codecs: dict[PartKey, Codec] = {
            part: _Predicted(self._made(part, own), part, self.sources(layer_of(part)), *self._weights[part], passage)
            for part, own in widths.items()
        }
        return codecs, self._bytes(widths)

    def _bytes(self, widths: Mapping[PartKey, torch.Tensor]) -> float:
        gained = {part: (len(codec.sigmas), len(codec.key_sigmas)) for part, codec in self._codecs.items()}
        return sum(row_bytes(own, *gained[part]) for part, own in widths.items()) / len(self._layers)

    def _widths(self, least_gain: float) -> dict[PartKey, torch.Tensor]:
        """Bits of numbers, each of which takes off at least so much of what errors cost."""
        ratios = TrellisCodec.error_ratios().tolist()
        expected = [error * ratio for error, ratio in zip(_ROUNDED, ratios, strict=False)]
        errors = torch.tensor(expected, dtype=torch.float64, device="cpu")
        gains = errors[:-1] - errors[1:]
        return {
            part: ((self._costs[part] * deviations.double().square())[:, None] * gains >= least_gain).sum(1)
            for part, deviations in self.deviations.items()
        }

    def _made(self, part: PartKey, widths: torch.Tensor) -> RowCodec:
        own, deviations = self._codecs[part], self.deviations[part]
        first, last = len(own.sigmas), len(own.sigmas) + len(own.key_sigmas)
        unit, weight = self._unit[part]
        scales = torch.ones_like(deviations)
        for width in widths.unique().tolist():
            if width:
                chosen = widths == width
                scales[chosen] = fit_scales(unit[:, chosen], weight[:, chosen], width)[0]
        return TrellisCodec(
            widths, scales * deviations, torch.zeros_like(deviations), deviations[:first], deviations[first:last]
        )


def _costs(rows: torch.Tensor, codec: RowCodec) -> torch.Tensor:
    """What a squared error of each number of rows [M, n] costs, up to a factor that all share; float64 [n].

    Numbers of one width do not cost the same, and how much is not kept: each lies somewhere within its half bit, at a
    place that is drawn once, the same for all sizes of groups.
    """
    drawn = torch.rand(
        rows.shape[1], generator=torch.Generator("cpu").manual_seed(0), dtype=torch.float64, device="cpu"
    )
    bits = codec.widths.cpu().double().clamp(max=float(_MOST_BITS)) + drawn - 0.5
    return 4.0**bits / rows.double().var(0).clamp_min(_LEAST**2)


def _without_gains(rows: torch.Tensor, deviations: torch.Tensor, own: RowCodec) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [M, n] around 0 over their deviations and the gains of each, and the squares of these gains, [M, n]."""
    first, last = len(own.sigmas), len(own.sigmas) + len(own.key_sigmas)
    relative, gains = rows / deviations, torch.ones_like(rows)
    for start, stop in ((0, first), (first, last)):
        if stop > start:
            gains[:, start:stop] = relative[:, start:stop].square().mean(1, keepdim=True).sqrt().clamp_min(_LEAST)
    return relative / gains, gains.square()


@contextlib.contextmanager
def in_groups(model: Any, codecs: Mapping[PartKey, Codec]) -> Iterator[None]:
    """Inside, a patched model that runs without a cache reads rows back as these codecs leave them."""
    with _codecs_replaced(model, codecs):
        yield
