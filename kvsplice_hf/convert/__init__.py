"""`convert_to_mla`: a RoPE model with grouped-query attention becomes a stock `DeepseekV3ForCausalLM`.

The rooms, in the order in which a conversion walks through them:

- `source`: reads the model, and refuses what cannot be carried over;
- `sampling`: query-key pairs of the calibration text, drawn as often as attention reads them;
- `rotation`: which parts of the keys go on rotating, and how queries read the others;
- `lowrank`: a narrower latent, if one is asked for;
- `target`: weights and configuration of the new model; `plain`: the same in a form that engines take.

`reduce_rank` gives a stock MLA model a smaller latent (`reduction`). It and the plain form share `narrow`: a latent of
few channels behind a norm.

Legend: `B` batch, `T` tokens, `D` hidden size, `H` query heads, `G` key heads, `d` head size, `F` = d/2 frequencies,
`P` = qk_rope_head_dim, `N` = qk_nope_head_dim, `V` = v_head_dim, `R` = kv_lora_rank. A pair of dimensions that RoPE
rotates is one complex number.
"""

from kvsplice_hf.convert.conversion import convert_to_mla
from kvsplice_hf.convert.reduction import ReducedLayer, reduce_rank


__all__ = ["ReducedLayer", "convert_to_mla", "reduce_rank"]
