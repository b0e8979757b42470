"""`HeadSplices`: the projections of a layer with ordinary attention, one for each of its key heads.

A key head is coded like an MLA layer of its own, whose latent is the value and whose rotated key is the key. One row of
the layer is the rows of its heads side by side.

Legend: `B` batch, `T` tokens, `K` key heads, `d` numbers of a key, `v` of a value, `F` = d / 2 pairs.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn

from kvsplice_hf.code.codecs import Codec
from kvsplice_hf.code.keys import KeyProjection
from kvsplice_hf.code.projection import LearnedKVSplice


class HeadKey(NamedTuple):
    """A key head of a layer, by cache layer index and number."""

    layer_idx: int
    head: int

    def __str__(self) -> str:
        return f"{self.layer_idx}, key head {self.head}"


# What has a splice, and statistics, of its own: the latent of a layer, or one of its key heads.
PartKey: TypeAlias = int | HeadKey


def layer_of(part: PartKey) -> int:
    """The cache layer index of a part."""
    return part.layer_idx if isinstance(part, HeadKey) else part


class HeadSplices(nn.Module):
    """The splices of the key heads of one layer, all with packed rows.

    Args:
        heads: of each key head that is in this process, by number.
        first: number of the first one. Tensor parallelism leaves the others to other processes.
    """

    heads: nn.ModuleDict

    def __init__(self, heads: Iterable[LearnedKVSplice], first: int = 0) -> None:
        super().__init__()
        # By their number in the layer, so that a parameter has the same name however heads are divided.
        self.heads = nn.ModuleDict({str(first + index): head for index, head in enumerate(heads)})
        # What `identity` was made of, and what it was.
        self._known_identity: tuple[list[str], str] = ([], "")

    def __iter__(self) -> Iterator[LearnedKVSplice]:
        # Past the lookup of attributes in modules, which is slow.
        modules: Any = self._modules["heads"]
        return iter(modules._modules.values())

    @property
    def identity(self) -> str:
        """See `LearnedKVSplice.identity`."""
        identities = [head.identity for head in self]
        if self._known_identity[0] != identities:
            self._known_identity = identities, identity_of(identities)
        return self._known_identity[1]

    def forget_identity(self) -> None:
        """See `LearnedKVSplice.forget_identity`."""
        for head in self:
            head.forget_identity()

    @property
    def codec(self) -> Codec | None:
        """That of the first head; all are of one kind."""
        return next(iter(self)).codec

    @property
    def keys(self) -> KeyProjection | None:
        """That of a head whose keys are coded before their rotation, or None where there is no such head."""
        return next((head.keys for head in self if head.keys is not None), None)

    @property
    def row_bytes(self) -> list[int]:
        """Of the row of each head."""
        codecs = [head.codec for head in self]
        return [codec.row_bytes for codec in codecs if codec is not None]

    @property
    def is_affine(self) -> bool:
        """See `LearnedKVSplice.is_affine`; all heads are of one kind."""
        return next(iter(self)).is_affine

    @property
    def is_merged(self) -> bool:
        return any(head.is_merged for head in self)

    def merge(self) -> None:
        """See `LearnedKVSplice.merge`; all heads or none."""
        done: list[LearnedKVSplice] = []
        try:
            for head in self:
                head.merge()
                done.append(head)
        except Exception:
            for head in done:
                head.unmerge()
            raise

    def unmerge(self) -> None:
        """See `LearnedKVSplice.unmerge`."""
        for head in self:
            head.unmerge()

    def require_codec_here(self) -> None:
        """See `LearnedKVSplice.require_codec_here`."""
        for head in self:
            head.require_codec_here()

    def round_trip(
        self, values: torch.Tensor, keys: torch.Tensor, turns: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the cache would give back of values [B, K, T, v] and keys [B, K, T, d], without a cache.

        `turns` uint8 [B or 1, 1, T, F] as in `LearnedKVSplice.rows`.
        """
        parts = self.split(values, keys)
        read = [head.round_trip(*part, turns_for(head, turns)) for head, part in zip(self, parts, strict=True)]
        return torch.cat([value for value, _ in read], dim=1), torch.cat([key for _, key in read], dim=1)

    def split(self, values: torch.Tensor, keys: torch.Tensor) -> Sequence[tuple[torch.Tensor, torch.Tensor]]:
        """Values [B, 1, T, v] and keys [B, 1, T, d] of each head."""
        return list(zip(values.split(1, dim=1), keys.split(1, dim=1), strict=True))

    def extra_repr(self) -> str:
        return f"heads={len(self.heads)}"


def identity_of(heads: Iterable[str]) -> str:
    """The identity of a layer, of those of its heads."""
    return hashlib.sha256(" ".join(heads).encode()).hexdigest()


def turns_for(head: LearnedKVSplice, turns: torch.Tensor | None) -> torch.Tensor | None:
    """How the keys of a head were rotated, if its splice is to know."""
    return None if head.keys is None else turns


def joined(parts: Mapping[PartKey, LearnedKVSplice]) -> nn.Module:
    """The splice of a layer of its parts: the only one, or those of its key heads."""
    splices, first = list(parts.values()), next(iter(parts))
    return HeadSplices(splices, first.head) if isinstance(first, HeadKey) else splices[0]
