"""Families of attention layers, and what is known of one layer: a site.

A family is a kind of attention that this package can patch: how its modules are recognised, what their sizes are, and
which of their methods the patch replaces. `mla` is the one that there is; `sites.FAMILIES` lists them, and
`docs/how_to_add.md` shows how to write one.

Legend: `R` kv_lora_rank, `P` qk_rope_head_dim, `N` qk_nope_head_dim, `V` v_head_dim, `H` heads, `r` spliced rank.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from kvsplice_hf.cache.rows import RowGeometry
from kvsplice_hf.code.heads import HeadKey, PartKey
from kvsplice_hf.code.projection import LearnedKVSplice
from kvsplice_hf.weights.sharding import HeadShare


@dataclass(frozen=True, eq=False)
class AttentionSite:
    """One attention module of a model, where it is and its sizes. What the patch keeps on it is a `SitePatch`.

    Attributes:
        name: path of the module in the model ("model.layers.0.self_attn").
        module: the attention module.
        layer_idx: index of its layer in the cache.
        kv_lora_rank, qk_rope_head_dim, qk_nope_head_dim, v_head_dim, num_heads: R, P, N, V, H; of the heads in this
            process.
        sliding_window: tokens visible to a query, or None.
        indexer_head_dim: width of the sparse-attention indexer's key (0 without an indexer). It is cached beside the
            latent and not compressed.
        dtype: of the latent, and so of the cache.
        kv_heads: key heads of ordinary attention in this process, for each of which R = V is the size of a value and P
            that of a key; 0 where the layer stores a latent.
        chunked: whether a query sees the tokens of its own chunk of the text only.
        device: where it computes with what it caches.
        share: which part of its heads this process has, where tensor parallelism divides them; None where it is all.
        parts: what of it has a splice of its own in this process: the latent, or each key head.
        all_parts: those of all processes.
        row_dim: numbers of a stock row in this process: R + P, or those of all its keys and values.
        whole_row_dim: in all processes together.
        source: the site whose latent this one expands; itself, unless the layer reuses the cache of an earlier one.
    """

    name: str
    module: Any
    layer_idx: int
    kv_lora_rank: int
    qk_rope_head_dim: int
    qk_nope_head_dim: int
    v_head_dim: int
    num_heads: int
    sliding_window: int | None
    indexer_head_dim: int
    dtype: torch.dtype
    source: "AttentionSite | None" = None
    kv_heads: int = 0
    chunked: bool = False
    device: torch.device = torch.device("cpu")
    share: HeadShare | None = None
    parts: tuple[PartKey, ...] = field(init=False)
    all_parts: tuple[PartKey, ...] = field(init=False)
    row_dim: int = field(init=False)
    whole_row_dim: int = field(init=False)

    @property
    def stores_latent(self) -> bool:
        """Whether this site writes a latent to the cache (False for layers that reuse another layer's)."""
        return self.source is None

    def __post_init__(self) -> None:
        shares, first = (1, 0) if self.share is None else (self.share.size, self.share.rank * self.kv_heads)
        heads = tuple(HeadKey(self.layer_idx, head) for head in range(self.kv_heads * shares))
        row_dim = max(self.kv_heads, 1) * (self.kv_lora_rank + self.qk_rope_head_dim)
        object.__setattr__(self, "all_parts", heads or (self.layer_idx,))
        object.__setattr__(self, "parts", heads[first : first + self.kv_heads] or (self.layer_idx,))
        object.__setattr__(self, "row_dim", row_dim)
        object.__setattr__(self, "whole_row_dim", row_dim * (shares if self.kv_heads else 1))


@dataclass(frozen=True)
class Family:
    """A kind of attention layers.

    Attributes:
        name: in messages.
        recognises: whether a module is of this kind, by what it has and not by its class.
        check: refuses a module that is of this kind, but does not do what is relied on in the installed release; called
            with its path and itself.
        describe: makes the site, from the path of a module, itself, and the sites before it.
        geometry: sizes of the rows of a site with a splice, where so many first tokens are to be kept exactly.
        attend: the attention function of its patched modules, called as transformers calls one, and with the name of
            the one that it stands in for (`base`).
        methods: what the patch puts on a module in the place of its own methods, by name; the first argument is the
            module.
    """

    name: str
    recognises: Callable[[nn.Module], bool]
    check: Callable[[str, Any], None]
    describe: Callable[[str, Any, Sequence[AttentionSite]], AttentionSite]
    geometry: Callable[[AttentionSite, LearnedKVSplice, int], RowGeometry]
    methods: Mapping[str, Callable[..., Any]]
    attend: Callable[..., Any]
