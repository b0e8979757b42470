"""The C++ code as a backend."""

from collections.abc import Sequence

import torch

from kvsplice_hf.attend.backend import Attended, Backend, CodedKeys, HeadsStep, Step
from kvsplice_hf.attend.native import calls, heads, reading
from kvsplice_hf.code.codec import RowCodec
from kvsplice_hf.code.codecs import Codec
from kvsplice_hf.code.heads import HeadSplices
from kvsplice_hf.code.keys import KeyWeights
from kvsplice_hf.code.projection import SpliceWeights
from kvsplice_hf.code.trellis import TrellisCodec, TrellisTables


class NativeBackend(Backend):
    """C++ on a CPU, for all operations."""

    name = "C++"
    operations = frozenset(
        {"attend", "decode", "decode_pages", "encode", "pack", "search"}
        | {"decode_heads", "decode_heads_pages", "encode_heads", "read_heads"}
    )
    codecs = frozenset({RowCodec.kind, TrellisCodec.kind})
    reads_coded_keys = True

    def claims(self, tensors: Sequence[torch.Tensor]) -> bool:
        return tensors[0].is_cpu

    def refusal(self, tensors: Sequence[torch.Tensor]) -> str | None:
        if not all(map(calls.reads, tensors)):
            unread = next(tensor for tensor in tensors if not calls.reads(tensor))
            return f"the C++ code does not read {type(unread).__name__}s in {unread.dtype} on {unread.device}"
        if not calls.kernels_available("cpu"):
            return "the C++ code could not be compiled; a warning has said why"
        return None

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
        if codec is None:
            return Attended(*calls.attend_rows(query, rows, value_dim, bias, scaling=scaling))
        packed = calls.row_codec(codec)
        return Attended(*calls.attend_packed(query, rows, packed, value_dim, bias, scaling=scaling, keys=keys))

    def decode(self, step: Step) -> torch.Tensor:
        return calls.decode(step)

    def encode(
        self,
        latent: torch.Tensor,
        k_rot: torch.Tensor,
        weights: SpliceWeights,
        codec: Codec | None,
        keys: KeyWeights | None = None,
        turns: torch.Tensor | None = None,
    ) -> torch.Tensor:
        packer = None if codec is None else calls.row_codec(codec)
        return calls.encode(latent, k_rot, weights, packer, keys, turns)

    def prepare_heads(self, splices: HeadSplices, identity: str) -> heads.PreparedHeads:
        return heads.prepare_heads(splices, identity)

    def decode_heads(self, step: HeadsStep, prepared: heads.PreparedHeads) -> torch.Tensor:
        return heads.decode_heads(step, prepared)

    def encode_heads(
        self, prepared: heads.PreparedHeads, values: torch.Tensor, keys: torch.Tensor, turns: torch.Tensor | None
    ) -> torch.Tensor:
        return heads.encode_heads(prepared, values, keys, turns)

    def read_heads(
        self,
        prepared: heads.PreparedHeads,
        rows: torch.Tensor,
        turns: tuple[torch.Tensor, torch.Tensor] | None,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return reading.read_heads(prepared, rows, turns, dtype)

    def pack(self, rows: torch.Tensor, codec: Codec) -> torch.Tensor:
        return calls.encode_pack(rows, calls.row_codec(codec))

    def search(self, unit: torch.Tensor, tables: TrellisTables) -> torch.Tensor:
        return calls.search(unit, tables)
