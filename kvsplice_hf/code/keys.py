"""Keys that are coded before their rotation.

RoPE (Su et al., arXiv 2104.09864) turns each pair of numbers of a key by an angle that depends on the position. After
it the mean of a key and the unequal halves of a pair look random, and bits are paid for them. So rows hold codes of
`R(t)^-1 k_rot`, and give back `R(t) decode(z)`. What is undone is redone, whatever it is: neither direction knows
positions or frequencies, both take the angles that the model's own rotary embedding made for the token.

    turned key (a, b) of a pair  =  (a cos - b sin, a sin + b cos)

As what is undone is redone exactly, any angle would do, and one near the true one leaves as little to code. So angles
are rounded to a 64th of a circle, a byte each: off by at most 2.8 degrees, they mix about a thousandth of the energy of
one number of a pair into the other. A factor on the cosines and sines (of yarn) stays in the key.

Legend: `T` tokens, `P` qk_rope_head_dim, `F` = P / 2 pairs, `p` numbers of a key's code.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import nn

from kvsplice_hf.code.matrix import SpliceMatrix
from kvsplice_hf.weights.offload import read_parameter


# An angle is a byte: how many steps of a circle of so many.
TURN_DTYPE = torch.uint8
TURN_STEPS = 64
# In the place of a column of the cosines.
NOT_TURNED = -1


class Pairs(NamedTuple):
    """Which numbers of a key are turned together, and by which of the angles that a model hands over.

    Attributes:
        first, second: index of the two numbers of each pair, [F]; together each number of the key once.
        columns: index of the pair's angle in the last dimension of the cosines, [F]; -1 where it is not turned.
    """

    first: torch.Tensor
    second: torch.Tensor
    columns: torch.Tensor

    @property
    def order(self) -> torch.Tensor:
        """Where each number of a key is among the first ones and the second ones behind them, [P]."""
        return torch.cat([self.first, self.second]).argsort()


def half_pairs(columns: torch.Tensor) -> torch.Tensor:
    """Number f with number f + r, as `rotate_half` of most models has it; int64 [3, F]. r are turned, mostly F."""
    turned = int((columns >= 0).sum())
    numbers = torch.arange(2 * len(columns), dtype=torch.int64, device=columns.device)
    first, second, rest = numbers[:turned], numbers[turned : 2 * turned], numbers[2 * turned :]
    half = len(rest) // 2
    return torch.stack([torch.cat([first, rest[:half]]), torch.cat([second, rest[half:]]), columns])


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
    if cos is None or rope_dim % 2 or cos.shape[-1] > rope_dim:
        return None
    width, count = cos.shape[-1], rope_dim // 2
    once, half = torch.arange(width, dtype=torch.int64, device="cpu"), width // 2
    # Of partial rotations only the first numbers of a key are turned. (At position 0 all angles look alike.)
    is_partial = width <= count and not torch.equal(cos, cos[..., :1].expand_as(cos))
    if width == rope_dim or is_partial:
        if width % 2 == 0 and torch.equal(cos[..., :half], cos[..., half:]):
            return _filled(once[:half], count)
        if width % 2 == 0 and torch.equal(cos[..., 0::2], cos[..., 1::2]):
            return _filled(2 * once[:half], count)
    return _filled(once, count) if width <= count else None


def _filled(columns: torch.Tensor, count: int) -> torch.Tensor:
    """Columns of so many pairs, the last of which are not turned."""
    return torch.cat([columns, columns.new_full((count - len(columns),), NOT_TURNED)])


def not_turned(columns: torch.Tensor) -> torch.Tensor:
    """Pairs of keys that are coded as they come, in a basis of their own; int64 [3, F]."""
    return half_pairs(torch.full_like(columns, NOT_TURNED))


def one_rotation(embeddings: Any) -> Any:
    """What a model hands to its attention modules, or None where it hands over a rotation for each of several axes.

    Of these the module puts one together itself, in a way that is not known here.
    """
    cos = _cosines(embeddings)
    return None if cos is not None and cos.dim() > 3 else embeddings


def _cosines(embeddings: Any) -> torch.Tensor | None:
    if isinstance(embeddings, torch.Tensor):
        return embeddings if embeddings.is_complex() else None
    if isinstance(embeddings, (tuple, list)) and len(embeddings) == 2:
        return embeddings[0] if all(isinstance(part, torch.Tensor) for part in embeddings) else None
    return None


def turns_of(embeddings: Any, columns: torch.Tensor) -> torch.Tensor:
    """The angles by which the pairs of new tokens are turned: uint8 [B, T, F], each below `TURN_STEPS`.

    Args:
        embeddings, columns: see `angle_columns`.
    """
    if isinstance(embeddings, torch.Tensor):
        cos, sin = embeddings.real, embeddings.imag
    else:
        cos, sin = embeddings
    columns = columns.to(cos.device)
    index = columns.clamp(min=0)
    angle = torch.atan2(sin[..., index].detach().float(), cos[..., index].detach().float())
    steps = (angle * (TURN_STEPS / (2 * math.pi))).round().to(torch.int32)
    return torch.where(columns < 0, 0, steps % TURN_STEPS).to(TURN_DTYPE)


def cosines_and_sines(turns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of angles uint8 [...], float32."""
    angle = turns.float() * (2 * math.pi / TURN_STEPS)
    return angle.cos(), angle.sin()


def undo_turns(k_rot: torch.Tensor, turns: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """Keys before their rotation, float32 [..., P], of rotated keys [..., P] and angles [..., F]."""
    cos, sin = cosines_and_sines(turns)
    first, second = k_rot[..., pairs.first].float(), k_rot[..., pairs.second].float()
    return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1)[..., pairs.order]


def redo_turns(key: torch.Tensor, turns: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """Rotated keys, float32 [..., P], of keys before their rotation [..., P] and angles [..., F]."""
    cos, sin = cosines_and_sines(turns)
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
        return self.from_key(undo_turns(k_rot, turns, Pairs(*self.pairs)))

    def decode(self, codes: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        """Rotated keys [..., P] of codes [..., p], float32."""
        return redo_turns(self.to_key(codes), turns, Pairs(*self.pairs))

    def from_key(self, key: torch.Tensor) -> torch.Tensor:
        """Codes [..., p] of keys before their rotation [..., P], float32."""
        weight = read_parameter(self.compress, "weight").float()
        with torch.autocast(key.device.type, enabled=False):
            return (key - read_parameter(self, "mean").float()) @ weight.T

    def to_key(self, codes: torch.Tensor) -> torch.Tensor:
        """Keys before their rotation [..., P] of codes [..., p], float32."""
        weight = read_parameter(self.expand, "weight").float()
        with torch.autocast(codes.device.type, enabled=False):
            return codes.float() @ weight.T + read_parameter(self, "mean").float()

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
