"""MLA layers of an engine on the rows of a splice: what the backends of all devices share.

vLLM makes a backend by its class path and hands it no folder, so that is asked of the environment again. A layer is
changed when its weights have been loaded: it then asks for pages of the size of spliced rows.

Written against vLLM 0.32.0; docs/serving.md says what of it is relied on.
"""

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention.mla_attention import MLACommonBackend
from vllm.model_executor.layers.quantization.utils.quant_utils import get_and_maybe_dequant_weights
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadata, AttentionMetadataBuilder
from vllm.v1.kv_cache_interface import KVCacheSpec

from kvsplice_hf.errors import UnsupportedError
from kvsplice_hf.vllm.batches import Batch, batch_of
from kvsplice_hf.vllm.heads import ServedHeads
from kvsplice_hf.vllm.pages import ServedLayer, attend_pages, pages_of, store
from kvsplice_hf.vllm.splices import served_layer
from kvsplice_hf.vllm.start import folder_named, unlike_tested


class SplicedBackend(MLACommonBackend):
    """What vLLM is told of a backend. Latents and keys may be of any size."""

    supported_kv_cache_dtypes = ["auto"]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return []

    @staticmethod
    def get_builder_cls() -> type["SplicedMetadataBuilder"]:
        return SplicedMetadataBuilder


@dataclass
class SplicedMetadata(AttentionMetadata):
    """Of one step: where its tokens are. The rest is read by `MLAAttention`: to it, all tokens are of prompts."""

    batch: Batch
    num_actual_tokens: int
    num_prefills: int
    num_decodes: int = 0
    num_decode_tokens: int = 0
    prefill: Any = None
    decode: Any = None


class SplicedMetadataBuilder(AttentionMetadataBuilder[SplicedMetadata]):
    """Makes `SplicedMetadata` once per step, for all layers with pages of one size."""

    # Steps have the shapes of their sequences, and lengths are asked of the device: nothing of that can be replayed.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER

    def __init__(
        self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._page_size = kv_cache_spec.block_size

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> SplicedMetadata:
        given = common_attn_metadata
        if given.causal is not True:
            raise UnsupportedError("vLLM asked for attention that is not causal, which spliced rows do not serve.")
        count = given.num_reqs
        starts, lengths = given.query_start_loc_cpu[: count + 1].tolist(), given.seq_lens[:count].tolist()
        batch = batch_of(starts, lengths, given.block_table_tensor, self._page_size)
        return SplicedMetadata(batch, given.num_actual_tokens, count)


class SplicedLayers:
    """Attention of one layer on the rows of its splice: a part of implementations, ahead of one of vLLM's own."""

    kv_b_proj: Any
    v_head_dim: int
    scale: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._engine = get_current_vllm_config()
        self._layer: ServedLayer | None = None
        self._name = ""
        self._weight: torch.Tensor | None = None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Read the splice of this layer, and have the layer ask for pages of its rows."""
        self._name, attention, folder = place_of(self, self._engine)
        model = self._engine.model_config
        weight = get_and_maybe_dequant_weights(self.kv_b_proj, out_dtype=act_dtype)
        # vLLM's parameters are of classes of their own, which kernels do not take for plain memory.
        self._weight = weight.detach().as_subclass(torch.Tensor)
        self._layer = served_layer(
            folder,
            extract_layer_index(self._name),
            model.hf_text_config,
            model.max_model_len,
            act_dtype,
            self._weight.device,
        )
        attention.get_kv_cache_spec = functools.partial(spec_of_rows, attention, self._layer)

    def do_kv_cache_update(
        self,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        kv_cache_dtype: str,
        k_scale: torch.Tensor,
    ) -> None:
        """Encode and store the new tokens: latents [Q, R], rotated keys [Q, 1, P], slots [Q]."""
        given: Any = get_forward_context().attn_metadata
        if kv_cache.numel() == 0 or given is None:
            return
        assert self._layer is not None
        positions = given[self._name].batch.positions
        count = len(positions)  # what the step is padded with lies behind
        latents, keys = kv_c_normed[:count], k_pe[:count].flatten(1)
        store(pages_of(kv_cache, self._layer), self._layer, latents, keys, slot_mapping.flatten()[:count], positions)

    def forward_mha(
        self,
        q: torch.Tensor,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_c_and_k_pe_cache: torch.Tensor,
        attn_metadata: SplicedMetadata,
        k_scale: torch.Tensor,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
    ) -> None:
        """Attention of all new tokens, [Q, H, N + P], over the rows; into `output` [Q, H * V]."""
        assert self._layer is not None
        assert self._weight is not None
        pages, groups = pages_of(kv_c_and_k_pe_cache, self._layer), attn_metadata.batch.groups
        found = attend_pages(pages, self._layer, q, self._weight, self.v_head_dim, self.scale, groups)
        output.copy_(found.flatten(1))

    def forward_mqa(self, *args: Any, **kwargs: Any) -> Any:
        raise unlike_tested("`MLAAttention` took tokens of a step for decoding, where none were said to be")


def place_of(implementation: Any, engine: Any) -> tuple[str, Any, Path]:
    """The name of the layer that an implementation is of, that layer, and the folder of the splice.

    Raises:
        UpstreamChangedError: nothing says which folder.
    """
    layers = engine.compilation_config.static_forward_context
    name, attention = next(item for item in layers.items() if getattr(item[1], "impl", None) is implementation)
    folder = folder_named()
    if folder is None:
        raise unlike_tested("a worker does not have the environment of the process that started it")
    return name, attention, folder


def spec_of_rows(attention: Any, layer: ServedLayer | ServedHeads, vllm_config: Any) -> KVCacheSpec:
    """What a layer with a splice asks of the cache: pages of its rows, and of what is exact behind them."""
    stock = type(attention).get_kv_cache_spec(attention, vllm_config)
    row, padded = layer.row_bytes, None
    if layer.geometry.sink_tokens:
        padded = layer.page_bytes(stock.block_size)
    return replace(stock, head_size=row, dtype=torch.uint8, state_content_bytes=row, page_size_padded=padded)
