"""The bytes that a decode step has to read, and how fast this machine moves bytes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kvsplice_hf.bench.rounds import timed
from kvsplice_hf.weights.changes import plain_parts


def copy_bandwidth(megabytes: int, device: str, attempts: int = 5) -> float:
    """Bytes per second at which a large tensor is copied, reads and writes counted, best of several.

    A decode step hardly writes, and memory may be read faster than it is copied (a processor that fetches a line before
    it writes one moves three bytes per byte copied, of which two are counted). So a step can come below this bound, the
    more so where its weights fit into the cache of the processor.
    """
    source = torch.ones(megabytes * 10**6 // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    target.copy_(source)  # the first one also takes the memory from the system
    seconds = min(timed(lambda: target.copy_(source), device) for _ in range(attempts))
    return 2 * source.nbytes / seconds


@torch.no_grad()
def weight_bytes(model: PreTrainedModel, step: Callable[[], object]) -> int:
    """Bytes of the parameters and buffers that `step` reads, each counted once.

    Of the routed experts those count that `step` chooses, of an embedding that is not the output head as well none (it
    reads one row per sequence).
    """
    chosen: dict[nn.Module, int] = {}

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        chosen[module] = inputs[1].unique().numel()  # hidden states, indices of the experts, their weights

    experts = [module for module in model.modules() if _holds_experts(module)]
    hooks = [module.register_forward_pre_hook(note) for module in experts]
    try:
        step()
    finally:
        for hook in hooks:
            hook.remove()
    total = sum(part.nbytes for held in (*model.parameters(), *model.buffers()) for part in plain_parts(held))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is not embedding.weight:
        total -= sum(weight.nbytes for weight in embedding.parameters())
    for module in experts:
        share = chosen.get(module, 0) / int(module.num_experts)  # type: ignore[arg-type]
        total -= round((1 - share) * sum(weight.nbytes for weight in module.parameters()))
    return total


def _holds_experts(module: nn.Module) -> bool:
    """Whether all routed experts of a layer are stacked in this module's own parameters."""
    return hasattr(module, "num_experts") and any(weight.dim() == 3 for weight in module.parameters(recurse=False))
