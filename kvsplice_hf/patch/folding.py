"""Which weight of `kv_b_proj` absorbed attention folds: as it is held, or made dense and kept; or why there is none.

Legend: `H` heads, `R` kv_lora_rank, `N` qk_nope_head_dim, `V` v_head_dim.
"""

from typing import Any

import torch
from torch import nn

from kvsplice_hf.config import KVSpliceConfig
from kvsplice_hf.errors import FoldingError
from kvsplice_hf.weights.linear import probe
from kvsplice_hf.weights.materialised import Materialised, materialise
from kvsplice_hf.weights.offload import read_parameter
from kvsplice_hf.weights.sharding import part_of_process


def read_weight(module: Any) -> torch.Tensor | None:
    """The weight of a plain linear layer, or None where it is not what the layer multiplies by.

    Packed (bitsandbytes, fp8) and adapted (LoRA) layers have a forward of their own. Of a layer that tensor parallelism
    has spread over processes, it is the rows of this one's heads.
    """
    if type(module).forward is not nn.Linear.forward or module._parameters.get("bias") is not None:
        return None
    weight: Any = module._parameters.get("weight", getattr(module, "weight", None))
    if type(weight) in (nn.Parameter, torch.Tensor):
        return read_parameter(module, "weight") if weight.is_floating_point() else None
    return part_of_process(module)


def weight_to_fold(module: Any, patched: Any, dtype: torch.dtype) -> Materialised:
    """What `kv_b_proj` of a patched attention module multiplies by in this call, [H * (N + V), R], or why not.

    Where its weight cannot be read, a dense one is made when it is first needed, and made again when the layer has
    changed. While the layer is trained nothing is kept: with `attention="absorbed"` it is asked at each call, so that
    its gradients are right; "auto" expands.

    Args:
        module: the attention module.
        patched: what the patch knows of it, a `SitePatch`.
        dtype: of the latents.
    """
    layer = module.kv_b_proj
    plain = read_weight(layer)
    if plain is not None:
        patched.materialised.forget()
        return Materialised(plain, "")
    kind, size = f"kv_b_proj is a {type(layer).__name__}", patched.geometry.kv_lora_rank
    if torch.compiler.is_compiling():
        return Materialised(None, compiled_refusal(layer))
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in layer.parameters()):
        if patched.mode != "absorbed":
            return Materialised(None, f"{kind} that is trained, and gradients are on: run under torch.no_grad()")
        found = probe(layer, size, dtype)
        biased = bool(found.offset.detach().any())
        return Materialised(None, f"{kind}: it adds a bias") if biased else Materialised(found.weight, "")
    refused = _switched_off(module, patched.patch.config, patched.num_heads, size, dtype)
    if refused:
        return Materialised(None, f"{kind} {refused}")
    made: Materialised = patched.materialised.of(layer, size, dtype)
    return made._replace(refused=f"{kind}: {made.refused}") if made.refused else made


def compiled_refusal(layer: nn.Module) -> str:
    """Why `kv_b_proj` is not folded inside torch.compile; empty where it is.

    Whether a dense weight that is kept is still the right one is told by looking at the layer at each step, of which a
    compiled graph would keep the answer of the first.
    """
    if read_weight(layer) is not None:
        return ""
    kind = f"kv_b_proj is a {type(layer).__name__}"
    return f"{kind} (packed, adapted or sharded), which cannot be folded under torch.compile"


def _switched_off(module: Any, config: KVSpliceConfig, heads: int, size: int, dtype: torch.dtype) -> str:
    if config.materialise_weights:
        return ""
    nbytes = heads * (module.qk_nope_head_dim + module.v_head_dim) * size * dtype.itemsize
    return (
        "(packed, adapted or sharded) and materialise_weights=False: True keeps its weight dense, "
        f"{megabytes(nbytes)} for this layer"
    )


def megabytes(nbytes: int) -> str:
    """A size for messages, in units of 10^6 bytes."""
    return f"{nbytes / 1e6:.{1 if nbytes < 1e7 else 0}f} MB" if nbytes >= 1e5 else f"{nbytes / 1e6:.4f} MB"


def require_foldable(name: str, module: Any, config: KVSpliceConfig, heads: int, size: int, dtype: torch.dtype) -> None:
    """Check that `kv_b_proj` of an attention module that is not patched can be folded.

    Raises:
        FoldingError: it cannot.
    """
    layer = module.kv_b_proj
    if read_weight(layer) is not None:
        return
    refused = _switched_off(module, config, heads, size, dtype)
    if not refused:
        with torch.no_grad():
            refused = materialise(layer, size, dtype).refused
    if refused:
        raise FoldingError(f"{name}: {unfoldable_message(f'kv_b_proj is a {type(layer).__name__}: {refused}')}")


def unfoldable_message(reason: str) -> str:
    """That absorbed attention was asked for in vain, why, and what to do."""
    return (
        f'attention="absorbed" folds what kv_b_proj multiplies by, but {reason}. Use attention="auto" or "expanded", '
        "merge the adapter, or leave kv_b_proj out of the quantisation."
    )
