"""The attention backend of an engine with a splice of ordinary attention, in the place of its own one for CPUs.

Written against vLLM 0.32.0; docs/serving.md says what of it is relied on.
"""

import functools
from dataclasses import replace
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionType
from vllm.v1.kv_cache_interface import KVCacheLayout, KVCacheSpec

from kvsplice_hf.errors import UnsupportedError
from kvsplice_hf.vllm.heads import ServedHeads, attend_heads_in_pages, store_heads
from kvsplice_hf.vllm.mla import SplicedMetadata, SplicedMetadataBuilder, place_of, spec_of_rows
from kvsplice_hf.vllm.ordinary import served_heads
from kvsplice_hf.vllm.pages import pages_of
from kvsplice_hf.vllm.start import FOLDER_VARIABLE, unlike_tested


class SplicedHeadsBackend(AttentionBackend):
    """What vLLM is told of the backend. Heads and pages may be of any size."""

    supported_dtypes = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes = ["auto"]
    forward_includes_kv_cache_update = False

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # One piece of memory for each layer, and in it page after page.
        return (KVCacheLayout.LBHNC,)

    @staticmethod
    def get_name() -> str:
        # Layers look their backend up by this name: it is the one that was replaced.
        return "CPU_ATTN"

    @staticmethod
    def get_impl_cls() -> type["SplicedHeadsImpl"]:
        return SplicedHeadsImpl

    @staticmethod
    def get_builder_cls() -> type[SplicedMetadataBuilder]:
        return SplicedMetadataBuilder


class SplicedHeadsImpl(AttentionImpl):
    """Attention of one layer on the rows of its splice.

    Args:
        num_heads, head_size, scale, num_kv_heads: H, d, the factor on the scores, and K.
        alibi_slopes, sliding_window, kv_cache_dtype, logits_soft_cap, attn_type, kv_sharing_target_layer_name: what
            else vLLM's layers may ask of attention.
        further: the same, by name.

    Raises:
        UnsupportedError: the layer asks for something that rows do not serve.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **further: Any,
    ) -> None:
        asked = {
            "ALiBi": alibi_slopes is not None,
            f"a sliding window of {sliding_window} tokens": sliding_window is not None,
            f"a cache of {kv_cache_dtype}": kv_cache_dtype != "auto",
            f"a soft cap of {logits_soft_cap}": bool(logits_soft_cap),
            f"attention of the type {attn_type!r}": attn_type != AttentionType.DECODER,
            "keys and values of another layer": kv_sharing_target_layer_name is not None,
        }
        asked |= {f"`{name}`": value is not None for name, value in further.items()}
        found = [name for name, is_asked in asked.items() if is_asked]
        if found:
            raise UnsupportedError(
                f"A layer of this model asks vLLM for {', '.join(found)}, which spliced rows of ordinary attention do "
                f"not serve. Unset {FOLDER_VARIABLE} to serve the model without its splice (docs/serving.md)."
            )
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads, self.kv_cache_dtype = num_kv_heads or num_heads, kv_cache_dtype
        self._engine = get_current_vllm_config()
        self._layer: ServedHeads | None = None
        self._name = ""

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Read the splice of this layer, and have the layer ask for pages of its rows."""
        self._name, attention, folder = place_of(self, self._engine)
        model = self._engine.model_config
        index = extract_layer_index(self._name)
        self._layer = served_heads(folder, index, model.hf_text_config, model.max_model_len, act_dtype)
        if self._layer.geometry.heads != self.num_kv_heads:
            raise unlike_tested(
                f"layer {index} has {self.num_kv_heads} key heads, and its splice {self._layer.geometry.heads}"
            )
        attention.get_kv_cache_spec = functools.partial(_spec, attention, self._layer)

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Encode and store the new tokens: rotated keys [Q, K, d], values [Q, K, v], slots [Q]."""
        given: Any = get_forward_context().attn_metadata
        if kv_cache.numel() == 0 or given is None:
            return
        assert self._layer is not None
        positions = given[self._name].batch.positions
        count = len(positions)  # what the step is padded with lies behind
        pages = pages_of(kv_cache.squeeze(1), self._layer)
        store_heads(pages, self._layer, key[:count], value[:count], slot_mapping.flatten()[:count], positions)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: SplicedMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of all new tokens, [Q, H, d], over the rows; into `output` [Q, H, v]."""
        if output_scale is not None or output_block_scale is not None:
            raise unlike_tested("a quantised output was asked of attention")
        if attn_metadata is None:  # vLLM warms up before it has a cache
            return output
        assert self._layer is not None
        pages, batch = pages_of(kv_cache.squeeze(1), self._layer), attn_metadata.batch
        count = len(batch.positions)
        output[:count] = attend_heads_in_pages(pages, self._layer, query[:count], self.scale, batch.groups)
        return output


def _spec(attention: Any, layer: ServedHeads, vllm_config: Any) -> KVCacheSpec:
    """As `spec_of_rows`, with one row for all key heads."""
    return replace(spec_of_rows(attention, layer, vllm_config), num_head_slots=1, head_size_v=layer.row_bytes)
