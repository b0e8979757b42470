"""All rivals by name, those of latents and those of the keys and values of ordinary attention."""

from collections.abc import Mapping
from dataclasses import replace

from kvsplice_hf.bench.rivals.base import Rival
from kvsplice_hf.bench.rivals.float_formats import Fp8Rows, NvFp4, Stock
from kvsplice_hf.bench.rivals.integers import IntegerPerToken
from kvsplice_hf.bench.rivals.kivi import IntegerPerChannel
from kvsplice_hf.bench.rivals.readers import ReaderRotatedIntegers
from kvsplice_hf.bench.rivals.rotation import HadamardIntegers, HadamardLloydMax, RotatedLloydMax
from kvsplice_hf.bench.rivals.truncation import PcaTruncation, PromptTruncation, WeightTruncation


def _table() -> dict[str, Rival]:
    small = [
        NvFp4(),
        *(RotatedLloydMax(bits=bits) for bits in (4, 3, 2)),
        *(HadamardLloydMax(bits=bits) for bits in (4, 3)),
        HadamardIntegers(),
        *(IntegerPerToken(bits=bits) for bits in (4, 2)),
        *(IntegerPerChannel(bits=bits) for bits in (4, 2)),
    ]
    rivals = [
        Stock(),
        Fp8Rows(group=128),
        Fp8Rows(group=64),
        *small,
        # The rotated key in bf16 would be half of what is left, so that every small rival may store it in 8 bits.
        *(replace(rival, rot_bits=8) for rival in small),
        *(PcaTruncation(share=share) for share in (0.75, 0.5, 0.25)),
        *(WeightTruncation(share=share) for share in (0.75, 0.5, 0.25)),
        *(PromptTruncation(share=share) for share in (0.5, 0.25, 0.125)),
    ]
    return {rival.name: rival for rival in rivals}


def _table_of_heads() -> dict[str, Rival]:
    # Not those that differ from others in a rotated key beside the latent, or that look at the weights of MLA.
    shared = [rival for rival in RIVALS.values() if rival.rot_bits == 16 and not isinstance(rival, WeightTruncation)]
    rivals = [*shared, ReaderRotatedIntegers(), ReaderRotatedIntegers(first=64, recent=256)]
    return {rival.name: rival for rival in rivals}


RIVALS: Mapping[str, Rival] = _table()
# Of the keys and values of ordinary attention.
HEAD_RIVALS: Mapping[str, Rival] = _table_of_heads()
