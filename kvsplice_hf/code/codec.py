"""`RowCodec`: rows `[code | key]` as bytes, each coordinate on a number of bits of its own.

A coordinate of width b > 0 is one of 2^b levels, `centre + gain * scale * level(b)[u]`. The unit levels of a width are
the same for all coordinates: a uniform grid bent by a sinh (fine near the centre, coarse far out), close to the
Lloyd-Max levels of a Gaussian. Width 0 stores nothing and reads the centre; width 16 stores the bf16 number itself.
Scales and centres are fixed by calibration, so that rows are independent of one another: a row is written once, and
cropping, reordering or gathering rows needs no decoding. A gain is one byte per token for all coordinates of the code:
tokens differ in size much more than the coordinates of one token do, and an outlier overflows no grid. The coordinates
of a key may have a second gain of their own.

Where the fields are in a row is the subject of `layout`.

Legend: `n` = r + p coordinates of a row, the first `r` of which share a gain, and the `p` behind them perhaps another.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from kvsplice_hf.code.codecs import Codec, register_codec
from kvsplice_hf.code.fields import BIT_FIELDS, as_bf16, as_bytes, join_fields
from kvsplice_hf.code.layout import RowLayout
from kvsplice_hf.code.levels import sinh_
from kvsplice_hf.code.widths import WIDTHS, check_steps, row_bytes
from kvsplice_hf.config import ROWS_CODEC


# A gain is 2^((byte - 128) / 16): steps of 4.4 %, from 1/256 to 245.
_GAIN_STEPS = 16
_GAIN_ONE = 128
# Rows that are unpacked at once: what this takes in passing should fit into a cache of the processor.
_AT_ONCE = 1024


class Columns(NamedTuple):
    """Packed rows as `RowCodec.read_columns` gives them, float32.

    Attributes:
        columns: [B, m, S].
        gains: of the first `gained_columns` columns, [B, 1, S]; None where rows have none.
        key_gains: of the `key_gained_columns` columns behind them, [B, 1, S]; None where rows have none.
    """

    columns: torch.Tensor
    gains: torch.Tensor | None
    key_gains: torch.Tensor | None


@register_codec
class RowCodec(RowLayout):
    """Packs rows of numbers into bytes, and back.

    Buffers: `widths` uint8 [n], `scales` and `centres` float32 [n]. They stay float32 whatever the model is cast to:
    rows in a cache must decode to what they were.

    Args:
        widths: bits per coordinate, each of `WIDTHS`, [n].
        scales: largest level of each coordinate, [n]; not read at widths 0 and 16.
        centres: middle of the levels, [n]; not read at width 16.
        sigmas: root mean square of the first r coordinates, [r]; a row's gain is the size of its code relative to them.
            Empty: rows have no gain.
        key_sigmas: the same of the p coordinates behind those, [p]. Empty, or None: they have no gain of their own.

    Raises:
        ConfigError: an unknown width, shapes that differ, or scales that are not positive and finite.

    Examples:
        >>> codec = RowCodec(torch.tensor([8, 4, 4, 0]), torch.ones(4), torch.zeros(4), torch.ones(2))
        >>> codec.pack(torch.randn(2, 1, 7, 4)).shape
        torch.Size([2, 1, 7, 3])
    """

    kind = ROWS_CODEC
    saved = ("widths", "scales", "centres", "sigmas")
    saved_if_any = ("key_sigmas",)
    fitted_together = True
    keys_apart = True

    scales: torch.Tensor
    centres: torch.Tensor

    def __init__(
        self,
        widths: torch.Tensor,
        scales: torch.Tensor,
        centres: torch.Tensor,
        sigmas: torch.Tensor,
        key_sigmas: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        key_sigmas = sigmas[:0] if key_sigmas is None else key_sigmas
        check_steps(widths, scales, centres, torch.cat([sigmas, key_sigmas]))
        # Contiguous, because C++ reads them by address.
        self.register_buffer("widths", widths.to(torch.uint8).contiguous())
        self.register_buffer("scales", scales.float().contiguous())
        self.register_buffer("centres", centres.float().contiguous())
        self.register_buffer("sigmas", sigmas.float().contiguous())
        # Files of rows without a second gain are those of before there was one.
        self.register_buffer("key_sigmas", key_sigmas.float().contiguous(), persistent=len(key_sigmas) > 0)
        self._add_tables()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As any module, and the tables with it; rows of another size are refused, for caches are made for this one."""
        widths: Any = state_dict.get(f"{prefix}widths", self.widths)
        known = widths.shape == self.widths.shape and not self.widths.is_meta
        changed = known and not torch.equal(widths.cpu(), self.widths.cpu())
        found = row_bytes(widths.cpu(), len(self.sigmas), len(self.key_sigmas)) if changed else self.row_bytes
        if found != self.row_bytes:
            error_messages = args[-1]
            error_messages.append(
                f"{prefix}widths makes rows of {found} bytes, those of this model "
                f"have {self.row_bytes}. Call unpatch_model(model), then load_kvsplice(model, folder)."
            )
            return
        super()._load_from_state_dict(state_dict, prefix, *args)
        if changed:
            self._add_tables()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "RowCodec":
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        trained = {name: parameter.data for name, parameter in self._parameters.items() if parameter is not None}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            if after is not None and after.dtype != before.dtype:  # moved is right, cast is not
                self._buffers[name] = before.to(after.device)
        for name, before in trained.items():
            parameter = getattr(self, name)
            if parameter.dtype != before.dtype:
                parameter.data = before.to(parameter.device)
        return self

    @property
    def row_dim(self) -> int:
        """n, the coordinates of a row."""
        return len(self.widths)

    @property
    def column_scales(self) -> torch.Tensor:
        """See `read_columns`, [m]. Not kept: scales may be in training."""
        coded, raw = self.column_index.split([len(self.column_reaches), len(self._raw)])
        return torch.cat([self.scales.detach()[coded] / self.column_reaches, torch.ones_like(raw, dtype=torch.float32)])

    @property
    def base(self) -> torch.Tensor:
        """See `read_columns`, [n]."""
        return torch.where(self.widths == 16, 0.0, self.centres.detach())

    @property
    def steps(self) -> tuple[torch.Tensor, ...]:
        """Scales and centres: an optimiser may train them (`train_steps`)."""
        return self.scales, self.centres

    def reads_rows_of(self, other: Codec) -> bool:
        """Where the widths and the gains are the same: all tables follow from them."""
        if type(self) is not type(other) or len(self.key_sigmas) != len(other.key_sigmas):
            return False
        return torch.equal(self.widths, other.widths)

    def become_like(self, other: Codec) -> None:
        for name in ("widths", "sigmas", "key_sigmas"):
            getattr(self, name).copy_(getattr(other, name))
        self._add_tables()

    def without(self, kept: torch.Tensor) -> "RowCodec":
        of_row = torch.ones(self.row_dim, dtype=torch.bool, device=kept.device)
        of_row[: len(kept)] = kept
        smaller = type(self)(
            widths=self.widths[of_row],
            scales=self.scales.detach()[of_row],
            centres=self.centres.detach()[of_row],
            sigmas=self.sigmas[of_row[: len(self.sigmas)]],
            key_sigmas=self.key_sigmas,
        )
        if isinstance(self.scales, nn.Parameter):
            smaller.train_steps()
            smaller.scales.requires_grad_(self.scales.requires_grad)
            smaller.centres.requires_grad_(self.centres.requires_grad)
        return smaller.train(self.training)

    @classmethod
    def error_ratios(cls) -> torch.Tensor:
        return torch.ones(len(WIDTHS), dtype=torch.float64, device="cpu")

    @classmethod
    def saved_shapes(cls, row_dim: int, rank: int) -> tuple[torch.Size, ...]:
        row = torch.Size([row_dim])
        return row, row, row, torch.Size([rank]), torch.Size([row_dim - rank])

    def value_columns(self, value_dim: int) -> int:
        """How many columns, from the first, hold all of the first `value_dim` coordinates; see `read_columns`."""
        nothing_behind = self.gains_all and len(self.sigmas) >= value_dim
        return self.gained_columns if nothing_behind else len(self.column_index)

    def train_steps(self, mode: bool = True) -> "RowCodec":
        """Make the scales and centres parameters, which an optimiser can train through `round_trip`, or undo that."""
        for name in ("scales", "centres"):
            tensor = getattr(self, name)
            delattr(self, name)
            if mode:
                self.register_parameter(name, nn.Parameter(tensor.detach().clone()))
            else:
                self.register_buffer(name, tensor.detach())
        return self

    def gains(self, rows: torch.Tensor) -> torch.Tensor:
        """The bytes of each row's gains, uint8 [..., 2, 1 or 0]: of the first r coordinates, and of those behind."""
        parts, start = [], 0
        for sigmas in (self.sigmas, self.key_sigmas):
            last = start + len(sigmas)
            if len(sigmas):
                relative = (rows[..., start:last].float() - self.centres[start:last]) / sigmas
                size = relative.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-30)
                parts.append((_GAIN_STEPS * size.log2() + _GAIN_ONE).round().clamp(0, 255).to(torch.uint8))
            start = last
        if not parts:
            return torch.empty(*rows.shape[:-1], 0, dtype=torch.uint8, device=rows.device)
        return torch.cat(parts, dim=-1)

    def _row_scales(self, gains: torch.Tensor) -> torch.Tensor:
        """Scales [..., n] of rows with these gains [..., 2, 1 or 0]."""
        if self.gain_bytes == 0:
            return self.scales
        parts, start, gain = [], 0, 0
        factors = gain_factors(gains)
        for sigmas in (self.sigmas, self.key_sigmas):
            last = start + len(sigmas)
            if len(sigmas):
                parts.append(factors[..., gain : gain + 1] * self.scales[start:last])
                gain += 1
            start = last
        return torch.cat([*parts, self.scales[start:].expand(*gains.shape[:-1], -1)], dim=-1)

    def quantise(self, rows: torch.Tensor, gains: torch.Tensor, start: int = 0) -> torch.Tensor:
        """Codes uint8 [..., n] of rows [..., n]: the level each is put on, 0 where the width is 0 or 16.

        Those ahead of `start` are 0 as well; it is 0, or not less than r.
        """
        unit = self._in_units(rows, gains, start)
        bends, widths = self._bends[start:], self.widths[start:]
        bent = bends > 0
        bends = torch.where(bent, bends, 1.0)
        # The inverse of the bend, so that cells are of equal size where levels are equally far apart.
        unit = torch.where(bent, torch.asinh(unit * torch.sinh(bends)) / bends, unit)
        count = 2.0 ** torch.where(widths == 16, 0, widths).float()
        codes = ((unit + 1) * (count / 2)).floor().clamp(min=count.new_zeros(()), max=count - 1).to(torch.uint8)
        return F.pad(codes, (start, 0)) if start else codes

    def _in_units(self, rows: torch.Tensor, gains: torch.Tensor, start: int) -> torch.Tensor:
        """The numbers of rows [..., n] from `start` on as levels have them, float32 [..., n - start]."""
        return (rows[..., start:].float() - self.centres[start:]) / self._row_scales(gains)[..., start:]

    def dequantise(self, codes: torch.Tensor, gains: torch.Tensor, start: int = 0) -> torch.Tensor:
        """The levels [..., n] of codes uint8 [..., n], float32; coordinates of width 16 come out as their centre.

        Those ahead of `start` come out as 0.
        """
        levels = self._unit_levels(codes, start) * self._row_scales(gains)[..., start:] + self.centres[start:]
        return F.pad(levels, (start, 0)) if start else levels

    def _unit_levels(self, codes: torch.Tensor, start: int = 0) -> torch.Tensor:
        """The levels [..., n - start] of codes uint8 [..., n] where all scales are 1."""
        numbers = self.level_numbers(codes, start)[..., start:]
        return self._levels[numbers.int() + self._first_level[start:].int()]

    def level_numbers(self, codes: torch.Tensor, start: int = 0) -> torch.Tensor:
        """Which level of its grid each coordinate is on, uint8 [..., n], for codes uint8 [..., n] of rows.

        Of those ahead of `start` anything; it is 0, or not less than r.
        """
        return codes

    def _numbers_of_lines(self, lines: torch.Tensor) -> torch.Tensor:
        """The same of lines of codes [B, m, S], in the order of columns."""
        return lines

    def behind(self, numbers: torch.Tensor, start: int) -> torch.Tensor:
        ahead = numbers.new_zeros(*numbers.shape[:-1], start)
        return self.round_trip(torch.cat([ahead, numbers], dim=-1), start)[..., start:]

    def round_trip(self, rows: torch.Tensor, start: int = 0) -> torch.Tensor:
        """What packing and unpacking leaves of rows [..., n], in their dtype, without the bytes in between.

        Of numbers ahead of `start` something else, if that is not less than r.

        Gradients are those of learned step sizes (Esser et al., arXiv 1902.08153): rounding passes them on as they are
        (straight-through: Bengio et al., arXiv 1308.3432), beyond the outermost levels they reach scales and centres
        only. The gain of a row counts as a constant.
        """
        trained = torch.is_grad_enabled() and (rows.requires_grad or self.scales.requires_grad)
        with torch.no_grad():
            gains = self.gains(rows)
            codes = self.quantise(rows, gains, start)
        decoded = self._straight_through(rows, codes, gains) if trained else self.dequantise(codes, gains, start)
        raw = rows[..., self._raw]
        stored = raw.to(torch.bfloat16).float()
        decoded[..., self._raw] = raw.float() + (stored - raw.float()).detach() if trained else stored
        return decoded.to(rows.dtype)

    def _straight_through(self, rows: torch.Tensor, codes: torch.Tensor, gains: torch.Tensor) -> torch.Tensor:
        """The levels [..., n] of codes, differentiable in rows, scales and centres."""
        row_scales = self._row_scales(gains)
        unit = (rows.float() - self.centres) / row_scales
        with torch.no_grad():
            level = self._unit_levels(codes)
            within = (unit.abs() < 1) & (self.widths > 0)
            rounding = torch.where(within, level - unit, level)
        return (torch.where(within, unit, 0.0) + rounding) * row_scales + self.centres

    def pack(self, rows: torch.Tensor) -> torch.Tensor:
        """Bytes uint8 [..., row_bytes] of rows [..., n]."""
        gains = self.gains(rows)
        codes = self.quantise(rows, gains)
        parts = [gains, as_bytes(rows[..., self._raw].to(torch.bfloat16))]
        for field in BIT_FIELDS:
            coordinates, shifts = self._plane(field)
            values = (codes[..., coordinates] >> shifts) & (2**field - 1)
            parts.append(join_fields(values, field))
        return torch.cat(parts, dim=-1)

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """Rows float32 [..., n] of bytes uint8 [..., row_bytes].

        Raises:
            ConfigError: the bytes are not those of one row of this codec.
        """
        rows = torch.empty(*packed.shape[:-1], self.row_dim, dtype=torch.float32, device=packed.device)
        pairs = zip(self._flat(packed).split(_AT_ONCE), rows.view(-1, self.row_dim).split(_AT_ONCE), strict=True)
        for stored, out in pairs:
            columns, gains, key_gains = self.read_columns(stored[None])
            gained, key_gained = self.gained_columns, self.gained_columns + self.key_gained_columns
            if gains is not None:
                columns[:, :gained] *= gains
            if key_gains is not None:
                columns[:, gained:key_gained] *= key_gains
            lines = self.base[:, None].repeat(1, len(stored))
            lines.index_add_(0, self.column_index, columns[0].mul_(self.column_scales[:, None]))
            out.copy_(lines.T)
        return rows

    def read_columns(self, packed: torch.Tensor) -> Columns:
        """Packed rows in the form that attention reads fastest: one line per coordinate, scales left to the query.

        Coordinate `column_index[i]` of a row is `base[column_index[i]] + gain * column_scales[i] * column`, where the
        gain is that of the row for the first `gained_columns` columns, that of its key for the next
        `key_gained_columns`, and 1 for the others. Coordinates without a column are their `base`.

        Args:
            packed: uint8 [B, S, row_bytes].
        """
        start, has_gain = self.gain_bytes, int(len(self.sigmas) > 0)
        raw = as_bf16(packed[..., start : start + 2 * len(self._raw)]).transpose(1, 2).float()
        factors = gain_factors(packed[..., :start]).transpose(1, 2)
        numbers = self._numbers_of_lines(self._code_lines(packed)).float()
        columns = sinh_(numbers.mul_(self.column_slopes[:, None]).add_(self.column_starts[:, None]))
        return Columns(
            torch.cat([columns, raw], dim=1) if raw.shape[1] else columns,
            factors[:, :1] if has_gain else None,
            factors[:, has_gain:] if len(self.key_sigmas) else None,
        )

    def extra_repr(self) -> str:
        return f"row_dim={self.row_dim}, row_bytes={self.row_bytes}"


def gain_factors(gains: torch.Tensor) -> torch.Tensor:
    """What gains uint8 multiply by, float32."""
    return torch.exp2((gains.float() - _GAIN_ONE) / _GAIN_STEPS)
