"""What a backend is: code that computes on rows faster than PyTorch does, and what it is handed.

A backend serves whole calls without gradients and dropout. PyTorch (`reference`) computes the same, serves wherever no
backend does, and is what the first calls of every backend are compared with (`choice`).

Legend: as in `reference`, and `R` kv_lora_rank, `P` qk_rope_head_dim, `N` qk_nope_head_dim, `V` v_head_dim,
`K` exact tokens; of ordinary attention `K` key heads, `G` query heads of each, `H` = K G, `d` numbers of a key.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch

from kvsplice_hf.code.codec import RowCodec
from kvsplice_hf.code.codecs import Codec
from kvsplice_hf.code.heads import HeadSplices
from kvsplice_hf.code.keys import KeyWeights
from kvsplice_hf.code.projection import SpliceWeights
from kvsplice_hf.code.trellis import TrellisTables


class Attended(NamedTuple):
    """Attention over some of the keys.

    Attributes:
        mixed: weighted mean of their values, float32 [B, M, r].
        lse: logarithm of the sum of their exponentiated scores, float32 [B, M].
    """

    mixed: torch.Tensor
    lse: torch.Tensor


class CodedKeys(NamedTuple):
    """How to read the keys of packed rows that were coded before their rotation (`code.keys`).

    A row is `[code | key code]`, r + p numbers; its rotated key is `R(slot) (expand @ key_code + mean)`, P numbers.
    R turns the two numbers (a, b) of pair f into `(a cos - b sin, a sin + b cos)` of the angle `table[f, slot]`, which
    counts in 64ths of a circle (`TURN_STEPS`).

    Attributes:
        expand: [P, p], float32 or bf16.
        mean: [P], float32 or bf16.
        pairs: int64 [3, F], F = P / 2: index of the two numbers of each pair, and a line that is not read here.
        table: uint8 [F, slots], each line side by side.
        slots: int32 [B, S], of each stored row.
    """

    expand: torch.Tensor
    mean: torch.Tensor
    pairs: torch.Tensor
    table: torch.Tensor
    slots: torch.Tensor

    def start(self, codec: Codec) -> int:
        """r, where in a row the code of its key begins."""
        return codec.row_dim - self.expand.shape[1]

    def turns(self, block: slice = slice(None)) -> torch.Tensor:
        """The angles of some rows, line by line: uint8 [F, B, s]."""
        return self.table[:, self.slots[:, block].long()]


class HeadRows(NamedTuple):
    """The stored rows of one key head of ordinary attention, `[code of the value | key]`.

    Attributes:
        rows: packed, uint8 [B, S, bytes]; a view of the layer's rows, in which those of its heads lie side by side.
        codec: of the rows.
        value_dim: r + q, how many numbers of a row, from the first, its value is decoded from: those of the value's
            code, and of the key's where values are predicted from that.
        keys: how keys that were coded before their rotation are read. None: the numbers behind `value_dim` are the
            rotated key.
    """

    rows: torch.Tensor
    codec: Codec
    value_dim: int
    keys: CodedKeys | None


class Paging(NamedTuple):
    """Which rows are whose, where those of all sequences lie in pages.

    Attributes:
        table: pages of each sequence, int64 [B, n], n being enough for the longest.
        lengths: rows of each sequence, int64 [B], 1 or more.
    """

    table: torch.Tensor
    lengths: torch.Tensor


class Step(NamedTuple):
    """A decode step of one layer: one new query per sequence and head, and what it attends to.

    Attributes:
        query: [B, H, 1, N + P], the last P numbers rotated.
        rows: the stored rows, [B, 1, S, r + P], or packed [B, 1, S, row_bytes].
        keys: how the keys in packed rows are read, where they were coded before their rotation; or None.
        codec: of the rows, or None where they are numbers.
        weight: that of `kv_b_proj`, [H * (N + V), R].
        v_dim: V.
        projection: of the codes in the rows.
        exact: latents of exact tokens [B, K, R], and where rows are packed their P rotated numbers behind; or None.
        positions: which rows are those, [B, K]; outside [0, S) where there is none.
        bias: added to the scores, float32 [B or 1, 1, S]; or None.
        sinks: one logit per head, [H], that carries no value; or None.
        scaling: factor on the scores.
        paging: where each sequence has its rows, if `rows` are those of all pages, [pages, tokens of a page,
            row_bytes]; or of numbers, for backends that read such. Sequences may be of different lengths then, and
            there is no bias. None otherwise.
    """

    query: torch.Tensor
    rows: torch.Tensor
    codec: Codec | None
    weight: torch.Tensor
    v_dim: int
    projection: SpliceWeights
    exact: torch.Tensor | None
    positions: torch.Tensor | None
    bias: torch.Tensor | None
    sinks: torch.Tensor | None
    scaling: float
    keys: CodedKeys | None = None
    paging: Paging | None = None

    @property
    def numbers(self) -> list[torch.Tensor]:
        """All tensors but the positions."""
        keys = () if self.keys is None else (self.keys.expand, self.keys.mean)
        given = (self.query, self.rows, self.weight, self.exact, self.bias, self.sinks, *self.projection, *keys)
        return [tensor for tensor in given if tensor is not None]


class HeadsStep(NamedTuple):
    """A decode step of a layer with ordinary attention: one new query per sequence and query head.

    With `K` key heads, and `d`, `v` numbers of a key and of a value.

    Attributes:
        query: rotated, [B, H, 1, d].
        rows: of all key heads side by side, uint8 [B, 1, S, bytes].
        splices: of the key heads.
        identity: of those, as it is now; or "" where it was not looked up in this call.
        turns: how the keys were rotated, a table uint8 [d / 2, slots] and the slots int32 [B, S]; or None.
        exact: of each exact token the value and key of each head, [B, E, K (v + d)]; or None.
        positions, bias, sinks, scaling: as in `Step`.
        paging: as in `Step`; rows are then [pages, tokens of a page, bytes].
    """

    query: torch.Tensor
    rows: torch.Tensor
    splices: HeadSplices
    identity: str
    turns: tuple[torch.Tensor, torch.Tensor] | None
    exact: torch.Tensor | None
    positions: torch.Tensor | None
    bias: torch.Tensor | None
    sinks: torch.Tensor | None
    scaling: float
    paging: Paging | None = None

    @property
    def numbers(self) -> list[torch.Tensor]:
        """The tensors of numbers that come with each call."""
        return [part for part in (self.query, self.exact, self.bias, self.sinks) if part is not None]


class Backend(ABC):
    """The interface. `docs/how_to_add.md` shows how to write one; `choice.BACKENDS` names those that there are.

    Attributes:
        name: in messages, and in the tables of `explain`.
        operations: which of the methods below it has: "attend", "attend_heads", "decode", "decode_heads", "encode",
            "encode_heads", "read_heads", "pack", "search"; and "decode_pages" and "decode_heads_pages", which are the
            same of steps with pages. PyTorch does the others.
        reads_coded_keys: whether those methods take keys that were coded before their rotation.
        reads_numbers_in_pages: whether pages may hold rows of numbers; packed rows they may anyhow.
        codecs: the kinds of codec whose rows it reads and writes.
    """

    name: ClassVar[str]
    operations: ClassVar[frozenset[str]]
    codecs: ClassVar[frozenset[str]] = frozenset({RowCodec.kind})
    reads_coded_keys: ClassVar[bool] = False
    reads_numbers_in_pages: ClassVar[bool] = False

    @abstractmethod
    def claims(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether calls with these tensors are for this backend, by where they lie. The first to claim has them."""

    @abstractmethod
    def refusal(self, tensors: Sequence[torch.Tensor]) -> str | None:
        """Why it does not serve calls with these tensors, which it claims; or None where it does."""

    def attend(
        self,
        query: torch.Tensor,
        rows: torch.Tensor,
        codec: Codec | None,
        value_dim: int,
        bias: torch.Tensor | None,
        *,
        scaling: float,
        keys: CodedKeys | None = None,
    ) -> Attended:
        """Attention over stored rows; arguments as in `choice.attend`, but bias float32 [B or 1, T or 1, S]."""
        raise NotImplementedError

    def attend_heads(
        self, query: torch.Tensor, heads: Sequence[HeadRows], bias: torch.Tensor | None, *, scaling: float
    ) -> list[Attended]:
        """Attention over the keys of all heads of a layer; arguments as in `choice.attend_heads`."""
        raise NotImplementedError

    def decode(self, step: Step) -> torch.Tensor:
        """The attention output of a step, [B, 1, H, V], of any float type."""
        raise NotImplementedError

    def encode(
        self,
        latent: torch.Tensor,
        k_rot: torch.Tensor,
        weights: SpliceWeights,
        codec: Codec | None,
        keys: KeyWeights | None = None,
        turns: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The rows of latents [B, 1, T, R] and rotated keys [B, 1, T, P]: what `LearnedKVSplice.rows` gives.

        Where keys are coded before their rotation, with `keys`, and angles uint8 [B or 1, 1, T, F].
        """
        raise NotImplementedError

    def prepare_heads(self, splices: HeadSplices, identity: str) -> Any:
        """What the next three are handed of the key heads of a layer, kept from call to call.

        `identity` as in `HeadsStep`.

        Raises:
            UnsupportedError: it does not serve these heads; the message says why.
        """
        raise NotImplementedError

    def decode_heads(self, step: HeadsStep, prepared: Any) -> torch.Tensor:
        """The attention output of a step over all key heads, [B, 1, H, v], of any float type."""
        raise NotImplementedError

    def encode_heads(
        self, prepared: Any, values: torch.Tensor, keys: torch.Tensor, turns: torch.Tensor | None
    ) -> torch.Tensor:
        """The rows uint8 [B, 1, T, bytes] of values [B, K, T, v] and keys [B, K, T, d]: those of heads side by side.

        Where keys are coded before their rotation, with angles uint8 [B or 1, 1, T, d / 2].
        """
        raise NotImplementedError

    def read_heads(
        self,
        prepared: Any,
        rows: torch.Tensor,
        turns: tuple[torch.Tensor, torch.Tensor] | None,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [B, K, S, d] and values [B, K, S, v] of rows uint8 [B, 1, S, bytes], in float32 or bf16.

        `turns` as in `HeadsStep`.
        """
        raise NotImplementedError

    def pack(self, rows: torch.Tensor, codec: Codec) -> torch.Tensor:
        """`codec.pack(rows)`: bytes [..., row_bytes] of rows [..., n]."""
        raise NotImplementedError

    def search(self, unit: torch.Tensor, tables: TrellisTables) -> torch.Tensor:
        """`code.trellis.closest_codes(unit, tables)`: uint8 [T, c] of float32 [T, c]."""
        raise NotImplementedError
