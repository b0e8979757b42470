"""Other ways to make the rows of a cache smaller, simulated: what comes back after quantising, and what it takes.

A row is what one token leaves in the cache of one layer: the latent (R numbers) and the rotated key (P numbers). A
`Rival` says how many bytes its row takes, packed and with all scales, and turns rows into what would be read back.
Constants of a layer (means, bases, codebooks) are not counted, as they do not grow with the context; what belongs to a
sequence is, spread over its tokens.

Every rival has a standardised variant, with the mean and the spread of each channel taken out before and put back
after: MLA latents have channels of very different size, and folding that into the weights is free.

On ordinary attention (`heads`) the same rivals code the keys, after their rotation, and the values of each key head,
as the methods do that they stand for, and are not standardised.

There is a module per family of rivals, and `registry` names them all.

Legend: `B` batch, `T` tokens, `R` kv_lora_rank, `P` qk_rope_head_dim, `r` rank, `N`, `V` head sizes, `H` heads.
"""

from kvsplice_hf.bench.rivals.base import Rival
from kvsplice_hf.bench.rivals.cache_backends import CACHE_BACKENDS, CacheBackend
from kvsplice_hf.bench.rivals.expansion import replaced_expand_kv
from kvsplice_hf.bench.rivals.float_formats import Fp8Rows, NvFp4, Stock, round_to_e2m1, round_to_e4m3
from kvsplice_hf.bench.rivals.heads import HeadStatistics, collect_head_statistics, simulated_heads
from kvsplice_hf.bench.rivals.integers import IntegerPerToken
from kvsplice_hf.bench.rivals.kivi import IntegerPerChannel
from kvsplice_hf.bench.rivals.readers import ReaderRotatedIntegers
from kvsplice_hf.bench.rivals.registry import HEAD_RIVALS, RIVALS
from kvsplice_hf.bench.rivals.rotation import (
    HadamardIntegers,
    HadamardLloydMax,
    RotatedLloydMax,
    hadamard_blocks,
    lloyd_max_levels,
    random_rotation,
)
from kvsplice_hf.bench.rivals.simulation import simulated
from kvsplice_hf.bench.rivals.statistics import EXACT_TOKENS, LayerStatistics, collect_statistics
from kvsplice_hf.bench.rivals.truncation import PcaTruncation, PromptTruncation, Truncation, WeightTruncation


__all__ = [
    "CACHE_BACKENDS",
    "EXACT_TOKENS",
    "HEAD_RIVALS",
    "RIVALS",
    "CacheBackend",
    "Fp8Rows",
    "HadamardIntegers",
    "HadamardLloydMax",
    "HeadStatistics",
    "IntegerPerChannel",
    "IntegerPerToken",
    "LayerStatistics",
    "NvFp4",
    "PcaTruncation",
    "PromptTruncation",
    "ReaderRotatedIntegers",
    "Rival",
    "RotatedLloydMax",
    "Stock",
    "Truncation",
    "WeightTruncation",
    "collect_head_statistics",
    "collect_statistics",
    "hadamard_blocks",
    "lloyd_max_levels",
    "random_rotation",
    "replaced_expand_kv",
    "round_to_e2m1",
    "round_to_e4m3",
    "simulated",
    "simulated_heads",
]
