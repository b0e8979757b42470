"""The Triton kernels as a backend. Triton itself is imported when the first call comes."""

import functools
import itertools
import logging
import os
from collections.abc import Sequence
from types import ModuleType

import torch

from kvsplice_hf.attend.backend import Attended, Backend, CodedKeys, HeadRows, Step
from kvsplice_hf.code.codec import RowCodec
from kvsplice_hf.code.codecs import Codec
from kvsplice_hf.code.trellis import TrellisCodec, TrellisTables


logger = logging.getLogger(__name__)

# Read once: a lookup in the environment takes as long as some of the calls that would ask for it.
_IN_INTERPRETER = "TRITON_INTERPRET" in os.environ


class TritonBackend(Backend):
    """Triton on a GPU, and anywhere in its interpreter. It attends to rows, packs them, and searches trellises."""

    name = "Triton"
    operations = frozenset({"attend", "attend_heads", "decode_pages", "pack", "search"})
    codecs = frozenset({RowCodec.kind, TrellisCodec.kind})
    reads_coded_keys = True
    reads_numbers_in_pages = True

    def claims(self, tensors: Sequence[torch.Tensor]) -> bool:
        return _IN_INTERPRETER or not tensors[0].is_cpu

    def refusal(self, tensors: Sequence[torch.Tensor]) -> str | None:
        kernels = _triton_kernels()
        if kernels is None:
            return "Triton is not installed: pip install kvsplice-hf[gpu]"
        return None if kernels.kernels_available(tensors[0].device) else "the Triton kernels do not serve this device"

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
        kernels = _loaded()
        if codec is None:
            return Attended(*kernels.attend_rows(query, rows, value_dim, bias, scaling=scaling))
        return Attended(*kernels.attend_packed(query, rows, codec, value_dim, bias, scaling=scaling, keys=keys))

    def attend_heads(
        self, query: torch.Tensor, heads: Sequence[HeadRows], bias: torch.Tensor | None, *, scaling: float
    ) -> list[Attended]:
        return list(itertools.starmap(Attended, _loaded().attend_heads(query, heads, bias, scaling=scaling)))

    def decode(self, step: Step) -> torch.Tensor:
        from kvsplice_hf.attend.triton import steps  # which needs Triton, as all calls do

        return steps.decode(step)

    def pack(self, rows: torch.Tensor, codec: Codec) -> torch.Tensor:
        packed: torch.Tensor = _loaded().encode_pack(rows, codec)
        return packed

    def search(self, unit: torch.Tensor, tables: TrellisTables) -> torch.Tensor:
        codes: torch.Tensor = _loaded().search_codes(unit, tables)
        return codes


def _loaded() -> ModuleType:
    kernels = _triton_kernels()
    assert kernels is not None  # or the call would have been refused
    return kernels


@functools.cache
def _triton_kernels() -> ModuleType | None:
    """The module of the Triton kernels, or None where Triton is missing."""
    try:
        from kvsplice_hf.attend.triton import calls
    except ImportError as error:
        logger.warning(
            "Triton is not installed (%s): PyTorch reads the codes, which is slower. Install kvsplice-hf[gpu].", error
        )
        return None
    return calls
