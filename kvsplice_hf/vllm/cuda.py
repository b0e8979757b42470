"""The attention backend of an engine with a splice on NVIDIA GPUs, in the place of vLLM's own for MLA (`mla`).

New rows are packed, and decode steps read, by the Triton kernels; prompts are attended to by PyTorch. **Not run on a
GPU yet**: docs/serving.md says what was done instead. It can be imported anywhere.
"""

from typing import Any

import torch
from vllm.model_executor.layers.attention.mla_attention import MLACommonImpl

from kvsplice_hf.vllm.mla import SplicedBackend, SplicedLayers, SplicedMetadata


# What the kernels are compiled for begins with Ampere (`attend.triton.compilation`).
_FIRST_CAPABILITY = 8


class SplicedCudaMLABackend(SplicedBackend):
    """What vLLM is told of it."""

    # In float32 vLLM has nothing for prompts of MLA on a GPU, which it makes ready whether it is used or not.
    supported_dtypes = [torch.float16, torch.bfloat16]

    @staticmethod
    def get_name() -> str:
        return "KVSPLICE_CUDA_MLA"

    @staticmethod
    def get_impl_cls() -> type["SplicedCudaMLAImpl"]:
        return SplicedCudaMLAImpl

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return bool(capability.major >= _FIRST_CAPABILITY)


class SplicedCudaMLAImpl(SplicedLayers, MLACommonImpl[SplicedMetadata]):
    """Attention of one layer on the rows of its splice."""
