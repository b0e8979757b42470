"""What would not fit into memory: on a CPU the system kills what takes too much, without an error."""

from collections.abc import Sequence

import psutil
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from kvsplice_hf.bench.recipes import RECIPES, STOCK, row_numbers, text_config


# Of the memory that is free when a setting starts, how much it may take.
_SHARE = 0.9


def free_memory(device: str | torch.device) -> int:
    """Bytes that can be taken on the device."""
    if torch.device(device).type == "cuda":
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + unused
    return psutil.virtual_memory().available


def cache_estimate(config: PreTrainedConfig, itemsize: int, batch: int, length: int) -> int:
    """About the bytes of a stock cache."""
    return batch * length * config.num_hidden_layers * row_numbers(config) * itemsize


def _step_estimate(config: PreTrainedConfig, itemsize: int, batch: int, length: int) -> int:
    """About the bytes that a stock step takes for a moment: keys and values of all heads, of one layer."""
    if not getattr(config, "kv_lora_rank", None):  # stored like that; put together in new tensors
        return batch * length * row_numbers(config) * itemsize
    expanded = config.qk_nope_head_dim + config.v_head_dim  # what kv_b_proj gives
    keys = config.qk_nope_head_dim + config.qk_rope_head_dim  # put together in a new tensor, and scaled into another
    return batch * length * config.num_attention_heads * (expanded + 2 * keys) * itemsize


def _prefill_estimate(model: PreTrainedModel, batch: int, length: int) -> int:
    """About the bytes that a prefill takes for a moment, spliced or not."""
    config, itemsize = text_config(model), model.dtype.itemsize
    estimate = _step_estimate(config, itemsize, batch, length)
    if model.device.type == "cpu" and getattr(config, "kv_lora_rank", None):
        # The fused attention of torch on a CPU wants keys and values of one head size, which MLA does not have. Without
        # it a layer holds all pairs of tokens: their products, and what softmax makes of them.
        estimate += 3 * batch * config.num_attention_heads * length**2 * itemsize
    return estimate


def too_large(model: PreTrainedModel, names: Sequence[str], batch: int, length: int) -> dict[str, str]:
    """Why recipes cannot decode side by side with so many tokens in each cache, for those that cannot."""
    config, itemsize = text_config(model), model.dtype.itemsize
    caches = len(names) * cache_estimate(config, itemsize, batch, length)
    in_step, free = _step_estimate(config, itemsize, batch, length), _SHARE * free_memory(model.device)
    if caches > free:
        return dict.fromkeys(names, f"the caches take {caches / 1e9:.1f} GB and {free / 1e9:.1f} GB are free")
    if caches + in_step <= free:
        return {}
    reason = f"a step takes {in_step / 1e9:.1f} GB beside {caches / 1e9:.1f} GB of caches, {free / 1e9:.1f} GB are free"
    return {name: reason for name in names if not RECIPES[name].is_spliced}


def prefill_too_large(model: PreTrainedModel, batch: int, length: int) -> str | None:
    """Why no prompt of this length can run, or None."""
    needed, free = _prefill_estimate(model, batch, length), _SHARE * free_memory(model.device)
    return None if needed <= free else f"a prefill takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory was what it lacked, on a GPU or on a CPU."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or "allocate memory" in str(error).lower()


def reason_to_skip(name: str, error: Exception) -> str:
    """Why a recipe is left out after an error.

    Raises:
        Exception: the error itself, where the recipe has to work and memory was not what it lacked. (Whether the other
            caches of transformers work with MLA depends on its release; ours have to.)
    """
    if (name == STOCK or RECIPES[name].is_spliced) and not is_out_of_memory(error):
        raise error
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
