"""Keys that are coded before their rotation.

RoPE (Su et al., arXiv 2104.09864) turns each pair of numbers of a key by an angle that depends on the position. After
it the mean of a key and the unequal halves of a pair look random, and bits are paid for them. So rows hold codes of
`R(t)^-1 k_rot`, and give back `R(t) decode(z)`. What is undone is redone, whatever it is: neither direction knows
positions or frequencies, both take the cosines and sines that the model's own rotary embedding made for the token.

    turned key (a, b) of a pair  =  (a c - b s, a s + b c)

Cosines and sines are rounded to bf16 first, in both directions, and undoing divides by `c^2 + s^2`, so that neither
rounding nor an attention factor in them is lost.

Legend: `T` tokens, `P` qk_rope_head_dim, `F` = P / 2 pairs, `p` numbers of a key's code.
"""

from typing import Any, NamedTuple

import torch
from torch import nn

from kvsplice_hf.code.matrix import SpliceMatrix
from kvsplice_hf.weights.offload import read_parameter


TURN_DTYPE = torch.bfloat16


class Pairs(NamedTuple):
    """Which numbers of a key are turned together, and by which of the angles that a model hands over.

    Attributes:
        first, second: index of the two numbers of each pair, [F]; together each number of the key once.
        columns: index of the pair's angle in the last dimension of the cosines, [F].
    """

    first: torch.Tensor
    second: torch.Tensor
    columns: torch.Tensor

    @property
    def order(self) -> torch.Tensor:
        """Where each number of a key is among the first ones and the second ones behind them, [P]."""
        return torch.cat([self.first, self.second]).argsort()


def half_pairs(columns: torch.Tensor) -> torch.Tensor:
    """Number f with number F + f, as `rotate_half` of most models has it; int64 [3, F]."""
    first = torch.arange(len(columns), dtype=torch.int64, device=columns.device)
    return torch.stack([first, first + len(columns), columns])


def neighbour_pairs(columns: torch.Tensor) -> torch.Tensor:
    """Number 2 f with number 2 f + 1, as complex numbers have it; int64 [3, F]."""
    first = 2 * torch.arange(len(columns), dtype=torch.int64, device=columns.device)
    return torch.stack([first, first + 1, columns])


def angle_columns(embeddings: Any, rope_dim: int) -> torch.Tensor | None:
    """Which columns of the cosines hold an angle of their own, int64 [F]; None where they are no angles of such keys.

    Args:
        embeddings: what a model hands to its attention modules: `(cos, sin)`, each angle once [B, T, F] or twice
            [B, T, P]; or complex numbers [B, T, F]; or None.
        rope_dim: P.
    """
    cos = _cosines(embeddings)
    if cos is None or rope_dim % 2 or cos.shape[-1] not in (rope_dim, rope_dim // 2):
        return None
    count = rope_dim // 2
    each = torch.arange(count, dtype=torch.int64, device="cpu")
    if cos.shape[-1] == count or torch.equal(cos[..., :count], cos[..., count:]):
        return each
    return 2 * each if torch.equal(cos[..., 0::2], cos[..., 1::2]) else None


def _cosines(embeddings: Any) -> torch.Tensor | None:
    if isinstance(embeddings, torch.Tensor):
        return embeddings if embeddings.is_complex() else None
    if isinstance(embeddings, (tuple, list)) and len(embeddings) == 2:
        return embeddings[0] if all(isinstance(part, torch.Tensor) for part in embeddings) else None
    return None


def turns_of(embeddings: Any, columns: torch.Tensor) -> torch.Tensor:
    """The cosines of new tokens, and behind them their sines: bf16 [B, T, 2 F], without gradients.

    Args:
        embeddings, columns: see `angle_columns`.
    """
    if isinstance(embeddings, torch.Tensor):
        cos, sin = embeddings.real, embeddings.imag
    else:
        cos, sin = embeddings
    columns = columns.to(cos.device)
    return torch.cat([cos[..., columns], sin[..., columns]], dim=-1).detach().to(TURN_DTYPE)


def undo_turns(k_rot: torch.Tensor, turns: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """Keys before their rotation, float32 [..., P], of rotated keys [..., P] and turns [..., 2 F]."""
    cos, sin = turns.float().chunk(2, dim=-1)
    size = (cos.square() + sin.square()).clamp(min=1e-12)
    first, second = k_rot[..., pairs.first].float(), k_rot[..., pairs.second].float()
    undone = torch.cat([(first * cos + second * sin) / size, (second * cos - first * sin) / size], dim=-1)
    return undone[..., pairs.order]


def redo_turns(key: torch.Tensor, turns: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """Rotated keys, float32 [..., P], of keys before their rotation [..., P] and turns [..., 2 F]."""
    cos, sin = turns.float().chunk(2, dim=-1)
    first, second = key[..., pairs.first].float(), key[..., pairs.second].float()
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)[..., pairs.order]


class KeyWeights(NamedTuple):
    """What coding of keys multiplies by, as it is held.

    Attributes:
        compress, expand: [p, P] and [P, p].
        mean: [P].
        pairs: int64 [3, F].
    """

    compress: torch.Tensor
    expand: torch.Tensor
    mean: torch.Tensor
    pairs: torch.Tensor


class KeyProjection(nn.Module):
    """Between a rotated key and its code: the rotation undone, the mean taken off, and a basis.

    Parameters: `mean` [P], `compress.weight` [p, P] and `expand.weight` [P, p]. Buffer: `pairs`, int64 [3, F], the rows
    of `Pairs`; it is saved, and stays what it is whatever the module is cast to.

    Args:
        rope_dim: P, even.
        rank: p, from 1 to P.
    """

    mean: nn.Parameter
    pairs: torch.Tensor

    def __init__(self, rope_dim: int, rank: int, **factory: Any) -> None:
        super().__init__()
        self.rope_dim, self.rank = rope_dim, rank
        self.mean = nn.Parameter(torch.zeros(rope_dim, **factory))
        self.compress = SpliceMatrix(rank, rope_dim, **factory)
        self.expand = SpliceMatrix(rope_dim, rank, **factory)
        each = torch.arange(rope_dim // 2, dtype=torch.int64, device="cpu")
        self.register_buffer("pairs", half_pairs(each).to(self.mean.device))

    def turns_of(self, embeddings: Any) -> torch.Tensor:
        """See the function of this name."""
        return turns_of(embeddings, self.pairs[2])

    def encode(self, k_rot: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        """Codes [..., p] of rotated keys [..., P], float32."""
        key = undo_turns(k_rot, turns, Pairs(*self.pairs))
        weight = read_parameter(self.compress, "weight").float()
        with torch.autocast(key.device.type, enabled=False):
            return (key - read_parameter(self, "mean").float()) @ weight.T

    def decode(self, codes: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        """Rotated keys [..., P] of codes [..., p], float32."""
        weight = read_parameter(self.expand, "weight").float()
        with torch.autocast(codes.device.type, enabled=False):
            key = codes.float() @ weight.T + read_parameter(self, "mean").float()
        return redo_turns(key, turns, Pairs(*self.pairs))

    def weights(self) -> KeyWeights:
        """What coding multiplies by, as it is held."""
        return KeyWeights(
            read_parameter(self.compress, "weight"),
            read_parameter(self.expand, "weight"),
            read_parameter(self, "mean"),
            self.pairs,
        )

    def extra_repr(self) -> str:
        return f"rope_dim={self.rope_dim}, rank={self.rank}"
