"""A cache as a model fills it, to count its bytes."""

import torch
from transformers import Cache, PreTrainedModel

from kvsplice_hf.upstream import cache_of


@torch.no_grad()
def filled_cache(model: PreTrainedModel, tokens: int) -> Cache:
    """The cache of all layers after so many tokens of one sequence."""
    ids = torch.zeros(1, tokens, dtype=torch.long, device=model.device)
    return cache_of(model(ids, use_cache=True, logits_to_keep=1))
