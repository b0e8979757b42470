"""A codec in thirty lines, as docs/how_to_add.md shows it: whole numbers relative to the largest of a row."""

from typing import Self

import torch

from kvsplice_hf.code.codecs import Codec


class LargestCodec(Codec):
    """Each number of a row in 8 bits, as a share of the largest of that row, which takes 16 bits.

    Args:
        mean: taken off before, [n].
    """

    kind = "largest"
    saved = ("mean",)
    mean: torch.Tensor

    def __init__(self, mean: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.float())
        self.row_bytes = 2 + len(mean)

    @property
    def row_dim(self) -> int:
        return len(self.mean)

    def pack(self, rows: torch.Tensor) -> torch.Tensor:
        centred = rows.float() - self.mean
        largest = centred.abs().amax(-1, keepdim=True).clamp(min=1e-4).bfloat16()
        shares = (127 * centred / largest.float()).round().clamp(-127, 127).to(torch.int8)
        return torch.cat([largest.contiguous().view(torch.uint8), shares.view(torch.uint8)], dim=-1)

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        largest = packed[..., :2].contiguous().view(torch.bfloat16).float()
        return packed[..., 2:].contiguous().view(torch.int8).float() / 127 * largest + self.mean

    @classmethod
    def fit(cls, rows: torch.Tensor, rank: int, budget: float) -> Self:
        return cls(rows.mean(0))

    @classmethod
    def saved_shapes(cls, row_dim: int, rank: int) -> tuple[torch.Size, ...]:
        return (torch.Size([row_dim]),)
