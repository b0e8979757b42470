"""Attention over stored rows, block by block: a running softmax, and never more than a block of rows unpacked.

The softmax of all keys is put together from blocks as in online softmax (Milakov and Gimelshein, arXiv 1805.02867).
What comes back is normalised over these rows alone, with the logarithm of what they sum up to, so that attention over
other keys can be merged with it exactly.

Legend: `B` batch, `M` query rows (heads times queries, all reading the same rows), `S` stored rows, `H` heads,
`T` queries, `r` numbers of a row that are its value, `n` = r + P numbers of a row. Of ordinary attention: `K` key
heads, `G` query heads of each, `d` numbers of a key.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F

from kvsplice_hf.attend.backend import Attended, CodedKeys, HeadRows
from kvsplice_hf.code.codec import RowCodec
from kvsplice_hf.code.codecs import Codec
from kvsplice_hf.code.keys import Pairs, cosines_and_sines, redo_turns


# Scores held in memory at once: at most this many numbers (for at least _SMALLEST_BLOCK rows).
_MAX_SCORES = 1 << 22
# Numbers of unpacked rows held in memory at once: what fits into the second-level caches of two cores.
_MAX_UNPACKED = 1 << 18
# Unpacking takes a few bytes per number for a moment. This share of all rows keeps that below an eighth of what stock
# transformers would hold.
_SMALLEST_SHARE = 32
_SMALLEST_BLOCK = 128


class _Running:
    """Softmax and weighted sum over the blocks seen so far."""

    def __init__(self, dropout: float) -> None:
        self.dropout = dropout
        self.peak: torch.Tensor | None = None  # [B, M, 1]
        self.total: torch.Tensor | None = None  # [B, M, 1]
        self.sums: torch.Tensor | None = None  # [B, r, M]

    def add(self, scores: torch.Tensor, mix: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """One more block.

        Args:
            scores: float32 [B, M, s].
            mix: from weights [B, M, s] to sums of values [B, r, M].
        """
        peak = scores.amax(-1, keepdim=True)
        if self.peak is not None:
            peak = torch.maximum(peak, self.peak)
        # No gradient: the peak cancels. And no -inf, where a mask hides a whole block in that way.
        peak = peak.detach().clamp(min=torch.finfo(scores.dtype).min)
        weights = torch.exp(scores - peak)
        total = weights.sum(-1, keepdim=True)
        # Dropped weights still count in the denominator, as where weights are dropped after the softmax.
        sums = mix(F.dropout(weights, self.dropout) if self.dropout else weights).float()
        if self.peak is not None:
            assert self.total is not None
            assert self.sums is not None
            faded = torch.exp(self.peak - peak)
            total, sums = total + faded * self.total, sums + faded.transpose(1, 2) * self.sums
        self.peak, self.total, self.sums = peak, total, sums

    def result(self) -> Attended:
        assert self.peak is not None
        assert self.total is not None
        assert self.sums is not None
        total = self.total.clamp(min=torch.finfo(self.total.dtype).tiny)
        mixed = (self.sums / total.transpose(1, 2)).transpose(1, 2)
        return Attended(mixed, (self.peak + total.log())[..., 0])


def attend(
    query: torch.Tensor,
    rows: torch.Tensor,
    codec: Codec | None,
    value_dim: int,
    bias: torch.Tensor | None = None,
    *,
    scaling: float = 1.0,
    dropout: float = 0.0,
    keys: CodedKeys | None = None,
) -> Attended:
    """Attention over rows of numbers [B, S, n], or over rows [B, S, row_bytes] of any codec; see `attend_rows`.

    `keys` says how the keys of packed rows are read, where they were coded before their rotation.
    """
    if codec is None:
        return attend_rows(query, rows, value_dim, bias, scaling=scaling, dropout=dropout)
    if isinstance(codec, RowCodec):
        if keys is not None and len(codec.sigmas) == keys.start(codec):
            return attend_packed_keys(query, rows, codec, value_dim, bias, keys, scaling=scaling, dropout=dropout)
        if keys is None:
            return attend_packed(query, rows, codec, value_dim, bias, scaling=scaling, dropout=dropout)
    return attend_unpacked(query, rows, codec, value_dim, bias, scaling=scaling, dropout=dropout, keys=keys)


def attend_heads(
    query: torch.Tensor,
    heads: Sequence[HeadRows],
    bias: torch.Tensor | None = None,
    *,
    scaling: float = 1.0,
    dropout: float = 0.0,
) -> list[Attended]:
    """Attention over the keys of all heads of a layer; arguments and result as in `choice.attend_heads`."""
    biases = None if bias is None else bias[:, None, None]
    found = []
    for part, (rows, codec, value_dim, keys) in zip(query.chunk(len(heads), dim=1), heads, strict=True):
        if keys is None or not isinstance(codec, RowCodec) or len(codec.sigmas) != keys.start(codec):
            # Code for rows of any kind: what does not meet the value is 0 there.
            part = F.pad(part, (value_dim, 0))
        found.append(attend(part, rows, codec, value_dim, biases, scaling=scaling, dropout=dropout, keys=keys))
    return found


def attend_rows(
    query: torch.Tensor,
    rows: torch.Tensor,
    value_dim: int,
    bias: torch.Tensor | None = None,
    *,
    scaling: float = 1.0,
    dropout: float = 0.0,
) -> Attended:
    """Attention over rows of numbers.

    Args:
        query: [B, M, n], in the dtype of the rows.
        rows: [B, S, n].
        value_dim: r.
        bias: added to the scores, float32 [B or 1, 1, T or 1, S], for M = H * T; or None.
        scaling: factor on the scores, before the bias.
        dropout: probability of dropping a weight.
    """
    size = _MAX_SCORES // (query.shape[0] * query.shape[1])
    blocks = ((block, rows[:, block]) for block in _blocks(rows.shape[1], size))
    return _attend_blocks(query, blocks, value_dim, bias, scaling, dropout)


def _attend_blocks(
    query: torch.Tensor,
    blocks: Iterable[tuple[slice, torch.Tensor]],
    value_dim: int,
    bias: torch.Tensor | None,
    scaling: float,
    dropout: float,
) -> Attended:
    """`attend_rows` over rows of numbers that come block by block, [B, s, n] each."""
    running = _Running(dropout)
    turned = query.transpose(1, 2)
    for block, part in blocks:
        # This way round and back: the long side first is what the CPU's matrix product is fastest at.
        scores = (part @ turned).transpose(1, 2).float() * scaling
        running.add(_biased(scores, bias, block), functools.partial(_mix_rows, part[..., :value_dim]))
    return running.result()


def _mix_rows(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return values.transpose(1, 2) @ weights.transpose(1, 2).to(values.dtype)


def attend_packed(
    query: torch.Tensor,
    packed: torch.Tensor,
    codec: RowCodec,
    value_dim: int,
    bias: torch.Tensor | None = None,
    *,
    scaling: float = 1.0,
    dropout: float = 0.0,
) -> Attended:
    """Attention over packed rows. Their scales are folded into the query and the result, their gains into the scores.

    Args:
        query: [B, M, n].
        packed: uint8 [B, S, row_bytes], of `codec`.
        codec, value_dim: see `attend_rows`; the first r numbers of a row.
        bias, scaling, dropout: as in `attend_rows`.
    """
    query = query.float() * scaling
    index, gained = codec.column_index, codec.gained_columns
    scaled = query[..., index] * codec.column_scales
    base = (query @ codec.base)[..., None]  # [B, M, 1]
    back_has_values = codec.value_columns(value_dim) > gained
    running = _Running(dropout)
    batch, rows = packed.shape[:2]
    size = max(rows // _SMALLEST_SHARE, _SMALLEST_BLOCK)
    size = min(size, _MAX_UNPACKED // (batch * len(index) + 1), _MAX_SCORES // (batch * query.shape[1]))
    for block in _blocks(rows, size):
        columns, gains, _ = codec.read_columns(packed[:, block])
        if gains is None:
            scores = scaled @ columns + base
            mix = functools.partial(_mix_columns, columns)
        else:
            front, back = columns[:, :gained], columns[:, gained:]
            scores = torch.addcmul(base + scaled[..., gained:] @ back, scaled[..., :gained] @ front, gains)
            mix = functools.partial(_mix_gained, front, back, gains, back_has_values)
        running.add(_biased(scores, bias, block), mix)
    sums, lse = running.result()
    mixed = codec.base.expand(*sums.shape[:2], -1).index_add(-1, index, sums * codec.column_scales)
    return Attended(mixed[..., :value_dim], lse)


class _KeyScores:
    """What queries score on keys that were coded before their rotation, a block of rows at a time.

    Keys are decoded and turned once for all queries, their two numbers of a pair apart.

    Args:
        query: against rotated keys, their factor applied, float32 [B, M, P].
        keys: how they are read.
        codec: of the rows, whose first r coordinates all have its gain.
        rank: r.
    """

    def __init__(self, query: torch.Tensor, keys: CodedKeys, codec: RowCodec, rank: int) -> None:
        self.keys, coded = keys, len(codec.column_slopes)
        first, second, _ = keys.pairs
        self.query = query[..., first], query[..., second]
        self.coded, self.raw = slice(codec.gained_columns, coded), slice(coded + codec.gained_raw, None)
        expand, index = keys.expand.float(), codec.column_index
        mean = keys.mean.float() + expand @ codec.base[rank:]
        scales = codec.column_scales
        coded_weight, raw_weight = (expand[:, index[part] - rank] * scales[part] for part in (self.coded, self.raw))
        self.weights = [(coded_weight[one], raw_weight[one], mean[one, None]) for one in (first, second)]

    def of(self, columns: torch.Tensor, key_gains: torch.Tensor | None, block: slice) -> torch.Tensor:
        """Scores [B, M, s] on the rows of a block, read as `columns`."""
        cos, sin = cosines_and_sines(self.keys.turns(block).transpose(0, 1))
        first, second = (self._decoded(columns, key_gains, *weights) for weights in self.weights)
        turned = first * cos - second * sin, first * sin + second * cos
        return self.query[0] @ turned[0] + self.query[1] @ turned[1]

    def _decoded(
        self,
        columns: torch.Tensor,
        key_gains: torch.Tensor | None,
        coded: torch.Tensor,
        raw: torch.Tensor,
        mean: torch.Tensor,
    ) -> torch.Tensor:
        """One number of each pair before the rotation, [B, F, s]."""
        numbers = coded @ columns[:, self.coded]
        if key_gains is not None:
            numbers = numbers * key_gains
        if raw.shape[1]:
            numbers = numbers + raw @ columns[:, self.raw]
        return numbers + mean


def attend_packed_keys(
    query: torch.Tensor,
    packed: torch.Tensor,
    codec: RowCodec,
    value_dim: int,
    bias: torch.Tensor | None,
    keys: CodedKeys,
    *,
    scaling: float = 1.0,
    dropout: float = 0.0,
) -> Attended:
    """Attention over packed rows `[code | key code]`, whose keys were coded before their rotation.

    Args:
        query: [B, M, value_dim + P], the last P numbers rotated; or those P alone, and values do not score.
        packed: uint8 [B, S, row_bytes], of `codec`, whose first r coordinates all have its gain.
        codec, value_dim: see `attend_rows`; the first r numbers of a row, or all of them, the key's code as well.
        bias, scaling, dropout: as in `attend_rows`.
        keys: how the keys are read.
    """
    query = query.float() * scaling
    of_value, of_key = query.tensor_split([query.shape[-1] - keys.expand.shape[0]], dim=-1)
    on_keys = _KeyScores(of_key, keys, codec, keys.start(codec))
    gained = codec.gained_columns
    behind = _value_columns_behind(codec, value_dim)
    index = torch.cat([codec.column_index[:gained], codec.column_index[behind]])
    scales = torch.cat([codec.column_scales[:gained], codec.column_scales[behind]])
    scaled = of_value[..., index] * scales if of_value.shape[-1] else None
    base = (of_value @ codec.base[: of_value.shape[-1]])[..., None]
    running = _Running(dropout)
    batch, rows = packed.shape[:2]
    size = max(rows // _SMALLEST_SHARE, _SMALLEST_BLOCK)
    unpacked = len(codec.column_index) + keys.expand.shape[0]
    size = min(size, _MAX_UNPACKED // (batch * unpacked + 1), _MAX_SCORES // (batch * query.shape[1]))
    for block in _blocks(rows, size):
        columns, gains, key_gains = codec.read_columns(packed[:, block])
        assert gains is not None
        front, back = columns[:, :gained], columns[:, behind]
        if key_gains is not None and value_dim == codec.row_dim:
            back[:, : codec.key_gained_columns] *= key_gains
        scores = base + on_keys.of(columns, key_gains, block)
        if scaled is not None:
            if back.shape[1]:
                scores = scores + scaled[..., gained:] @ back
            scores = torch.addcmul(scores, scaled[..., :gained] @ front, gains)
        running.add(_biased(scores, bias, block), functools.partial(_mix_gained, front, back, gains, True))
    sums, lse = running.result()
    mixed = codec.base[:value_dim].expand(*sums.shape[:2], -1).index_add(-1, index, sums * scales)
    return Attended(mixed, lse)


def _value_columns_behind(codec: RowCodec, value_dim: int) -> torch.Tensor:
    """Which columns without the gain hold numbers of the value, int64: those of raw numbers, or all of the rest."""
    gained, coded = codec.gained_columns, len(codec.column_slopes)
    first, last = (gained, len(codec.column_index)) if value_dim == codec.row_dim else (coded, coded + codec.gained_raw)
    return torch.arange(first, last, dtype=torch.int64, device=codec.widths.device)


def attend_unpacked(
    query: torch.Tensor,
    packed: torch.Tensor,
    codec: Codec,
    value_dim: int,
    bias: torch.Tensor | None = None,
    *,
    scaling: float = 1.0,
    dropout: float = 0.0,
    keys: CodedKeys | None = None,
) -> Attended:
    """Attention over rows of any codec, a block of rows unpacked at a time. Arguments as in `attend_packed`."""
    batch, rows = packed.shape[:2]
    size = min(_MAX_UNPACKED // (batch * query.shape[2] + 1), _MAX_SCORES // (batch * query.shape[1]))

    def read(block: slice) -> torch.Tensor:
        numbers = codec.unpack(packed[:, block])
        if keys is None:
            return numbers
        key = numbers[..., keys.start(codec) :] @ keys.expand.float().T + keys.mean.float()
        key = redo_turns(key, keys.turns(block).permute(1, 2, 0), Pairs(*keys.pairs))
        return torch.cat([numbers[..., :value_dim], key], dim=-1)

    blocks = ((block, read(block)) for block in _blocks(rows, size))
    return _attend_blocks(query.float(), blocks, value_dim, bias, scaling, dropout)


def _mix_columns(columns: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sums [B, m, M] of columns."""
    return columns @ weights.transpose(1, 2)


def _mix_gained(
    front: torch.Tensor, back: torch.Tensor, gains: torch.Tensor, back_has_values: bool, weights: torch.Tensor
) -> torch.Tensor:
    """Sums [B, m, M] of columns, those in front with their gains; of those behind only where they hold values."""
    weights = weights.transpose(1, 2)
    of_back = back @ weights if back_has_values else back.new_zeros(*back.shape[:2], weights.shape[2])
    return torch.cat([front @ (weights * gains.transpose(1, 2)), of_back], dim=1)


def _blocks(rows: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` rows, of nearly the same size."""
    count = math.ceil(rows / max(size, _SMALLEST_BLOCK))
    step = math.ceil(rows / count)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _biased(scores: torch.Tensor, bias: torch.Tensor | None, block: slice) -> torch.Tensor:
    """Scores [B, H * T, s] with their part of the bias."""
    if bias is None:
        return scores
    batch, flat, keys = scores.shape
    by_head = scores.reshape(batch, flat // bias.shape[2], bias.shape[2], keys) + bias[..., block]
    return by_head.view(batch, flat, keys)
