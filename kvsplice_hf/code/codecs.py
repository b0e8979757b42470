"""What a codec is: how the numbers of a row become bytes. And which codecs there are, by name.

A codec is a file with a subclass of `Codec` in it and a line that registers it (`docs/how_to_add.md`). Settings name it
(`KVSpliceConfig.codec`), saved splices remember it, PyTorch reads its rows at once. Faster backends say which they
read.

Legend: `M` sampled rows, `n` = r + p numbers of a row, `r` of which are the code of the latent.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Self, TypeVar

import torch
from torch import nn

from kvsplice_hf.errors import ConfigError, UnsupportedError


class Codec(nn.Module, ABC):
    """Packs rows of n numbers into bytes, and back. Each row by itself: rows are cropped, gathered and reordered.

    Attributes:
        kind: the name under which it is registered.
        saved: names of the buffers that a saved splice holds; from them `from_saved` makes the codec again.
        saved_if_any: names of further ones, which a splice may lack.
        fitted_together: whether calibration fits all layers at once, which then compete for bytes; otherwise `fit` is
            called for each layer.
        keys_apart: whether the numbers of a key come back the same whatever those of its latent are: `behind` gives
            them. Latents can then be predicted from their keys.
        row_bytes: bytes of a row, the same for all rows.
    """

    kind: ClassVar[str]
    saved: ClassVar[tuple[str, ...]]
    saved_if_any: ClassVar[tuple[str, ...]] = ()
    fitted_together: ClassVar[bool] = False
    keys_apart: ClassVar[bool] = False
    row_bytes: int

    @property
    @abstractmethod
    def row_dim(self) -> int:
        """n, the numbers of a row."""

    @abstractmethod
    def pack(self, rows: torch.Tensor) -> torch.Tensor:
        """Bytes uint8 [..., row_bytes] of rows [..., n]."""

    @abstractmethod
    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """Rows float32 [..., n] of bytes uint8 [..., row_bytes].

        Raises:
            ConfigError: the bytes are not those of one row of this codec.
        """

    def round_trip(self, rows: torch.Tensor) -> torch.Tensor:
        """What packing and unpacking leaves of rows [..., n], in their dtype; gradients pass straight through."""
        kept = self.unpack(self.pack(rows.detach())).to(rows.dtype)
        return rows + (kept - rows).detach() if rows.requires_grad else kept

    def behind(self, numbers: torch.Tensor, start: int) -> torch.Tensor:
        """What packing and unpacking leaves of the numbers from `start` on, [..., n - start]; see `keys_apart`."""
        raise NotImplementedError(f"{type(self).__name__} has no `behind` of its own.")

    @property
    def steps(self) -> tuple[torch.Tensor, ...]:
        """Tensors that an optimiser may train, or that may be spread over processes; none by default."""
        return ()

    def meaning(self) -> list[torch.Tensor]:
        """The tensors that say what bytes mean, as they are held: all saved ones, by default."""
        # Past the lookup of attributes in modules, which is slow: each step of a model asks, once per layer.
        buffers, parameters = self._buffers, self._parameters
        names = (*self.saved, *self.saved_if_any)
        held = [buffers[name] if name in buffers else parameters[name] for name in names]
        return [tensor for tensor in held if tensor is not None]

    def train_steps(self, mode: bool = True) -> Self:
        """Make `steps` parameters, or undo that; for codecs that have some."""
        return self

    def reads_rows_of(self, other: "Codec") -> bool:
        """Whether values of `other` can be written into the tensors of this one, with nothing else to be changed."""
        return False

    def become_like(self, other: "Codec") -> None:
        """Read and write the rows of `other`, of the same sizes, with the tensors of `steps` that there are.

        Raises:
            UnsupportedError: this codec has no such tensors, or cannot change.
        """
        raise UnsupportedError(
            f"The steps of the codec {self.kind!r} are in training, and it cannot take over others. Unpatch, then load."
        )

    def without(self, kept: torch.Tensor) -> Self:
        """The codec of rows with only those of the first r numbers that `kept`, bool [r], marks.

        Raises:
            UnsupportedError: numbers cannot be taken out of these rows.
        """
        raise UnsupportedError(
            f"Rows of the codec {self.kind!r} cannot be pruned. Unpatch, and patch with fewer bytes."
        )

    @classmethod
    def fit(cls, rows: torch.Tensor, rank: int, budget: float) -> Self:
        """The codec of a layer, fitted to rows that calibration has sampled.

        Not called where `fitted_together`.

        Args:
            rows: [M, n], float64.
            rank: r.
            budget: bytes of a row, at most.

        Raises:
            ConfigError: no row of this codec is that small.
        """
        raise NotImplementedError(f"{cls.__name__} has no `fit` of its own.")

    @classmethod
    def error_ratios(cls) -> torch.Tensor:
        """Squared errors over those of rounding each coordinate, by width as in `calibration.allocate`, float64.

        Only asked for where `fitted_together`.
        """
        raise NotImplementedError(f"{cls.__name__} has no `error_ratios` of its own.")

    @classmethod
    def from_saved(cls, tensors: Sequence[torch.Tensor]) -> Self:
        """The codec whose `saved` buffers are these, in that order, and those of `saved_if_any` that there are.

        Raises:
            ConfigError: their values cannot be used.
        """
        return cls(*tensors)

    @classmethod
    @abstractmethod
    def saved_shapes(cls, row_dim: int, rank: int) -> tuple[torch.Size, ...]:
        """The shapes of the `saved` and `saved_if_any` buffers for rows of n numbers, r of which are the code."""


_CodecT = TypeVar("_CodecT", bound=type[Codec])

_registered: dict[str, type[Codec]] = {}


def register_codec(codec: _CodecT) -> _CodecT:
    """Make a class of codecs known by its `kind`. Usable as a decorator.

    Raises:
        ConfigError: another class has that name.
    """
    known = _registered.setdefault(codec.kind, codec)
    if known is not codec:
        raise ConfigError(
            f"A codec called {codec.kind!r} is registered already: {known.__name__}. Choose another name."
        )
    return codec


def codec_class(kind: str) -> type[Codec]:
    """The codecs of that name.

    Raises:
        ConfigError: there are none.
    """
    if kind not in _registered:
        known = ", ".join(map(repr, sorted(_registered)))
        raise ConfigError(f"No codec is called {kind!r}. Known are {known}; import the module that registers yours.")
    return _registered[kind]
