"""The attention backend of an engine with a splice on CPUs, in the place of vLLM's own for MLA (`mla`)."""

import torch
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLAImpl

from kvsplice_hf.vllm.mla import SplicedBackend, SplicedLayers


class SplicedMLABackend(SplicedBackend):
    """What vLLM is told of it."""

    supported_dtypes = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        return "KVSPLICE_MLA"

    @staticmethod
    def get_impl_cls() -> type["SplicedMLAImpl"]:
        return SplicedMLAImpl


class SplicedMLAImpl(SplicedLayers, CPUMLAImpl):
    """Attention of one layer on the rows of its splice."""

    uses_amx_bmm = False
