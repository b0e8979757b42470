"""`SpliceMatrix`: a weight that is folded into other products."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from kvsplice_hf.weights.offload import read_parameter


class SpliceMatrix(nn.Module):
    """One of the two matrices of a splice: `weight` [rows, columns].

    Not an `nn.Linear`: it is folded into other products, and its forward is not called while a model runs. Libraries
    that put adapters on linear layers, replace them by quantised ones or watch their inputs would be wrong about it.
    """

    def __init__(self, rows: int, columns: int, **factory: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, **factory))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        """The product [..., rows] with numbers [..., columns]."""
        return F.linear(numbers, read_parameter(self, "weight"))

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]} x {self.weight.shape[1]}"
