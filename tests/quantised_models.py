"""Tiny random models with quantised weights, one per method, of sizes that all libraries take (multiples of 64).

What transformers quantises as it loads comes from the package's own table. Of the other formats a checkpoint is written
here and loaded, or the layers of the library are put in.
"""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from kvsplice_hf.bench import quantisation
from kvsplice_hf.bench.quantisation import is_installed, quantise


KINDS = ("MLA", "ordinary")
_BLOCK, _GROUP = 64, 32
_BASE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}


class Quantised(NamedTuple):
    """How a method is had.

    Attributes:
        packages: what has to be installed, as modules.
        make: quantises a model.
        is_matrix: whether a packed layer is a matrix: its activations are not quantised.
        stays_packed: whether weights are packed while the model runs.
    """

    packages: tuple[str, ...]
    make: Callable[[PreTrainedModel], PreTrainedModel]
    is_matrix: bool = True
    stays_packed: bool = True

    @property
    def missing(self) -> str:
        """The packages that are not installed, by name; empty where all are."""
        return ", ".join(package for package in self.packages if not is_installed(package))


def build(kind: str) -> PreTrainedModel:
    """A model with plain weights, float32, always the same."""
    torch.manual_seed(0)
    if kind == "MLA":
        model: PreTrainedModel = DeepseekV3ForCausalLM(DeepseekV3Config(**_BASE, **_MLA))
    else:
        model = LlamaForCausalLM(LlamaConfig(**_BASE, num_key_value_heads=2, head_dim=32))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.1)
    return model.eval()


def linear_layers(model: PreTrainedModel) -> list[tuple[str, nn.Linear]]:
    """Those that are quantised: all but the output layer."""
    head = model.get_output_embeddings()
    return [(name, part) for name, part in model.named_modules() if type(part) is nn.Linear and part is not head]


def _load(model: PreTrainedModel, tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> PreTrainedModel:
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"quantization_config": settings}), "utf-8")
        held = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(held, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
        return type(model).from_pretrained(folder, dtype=torch.float32).eval()


def _compressed_tensors(model: PreTrainedModel) -> PreTrainedModel:
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": _GROUP}
    scheme = {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}
    head = "lm_head"
    settings: dict[str, Any] = {"config_groups": {"all": scheme}, "format": "pack-quantized", "ignore": [head]}
    config = QuantizationConfig.model_validate({**settings, "quantization_status": "frozen"})
    apply_quantization_config(model, config)
    for _, layer in linear_layers(model):
        largest = layer.weight.data.unflatten(1, (-1, _GROUP)).abs().amax(-1)
        layer.weight_scale.data.copy_(largest / 7.5)  # type: ignore[union-attr,operator]
    ModelCompressor(quantization_config=config).compress_model(model)
    return _load(model, model.state_dict(), {**config.model_dump(mode="json"), "quant_method": "compressed-tensors"})


def _fp8(model: PreTrainedModel) -> PreTrainedModel:
    """Blocks of numbers in float8 with a scale each, which transformers unpacks as it loads, where there is no GPU."""
    tensors, packed = dict(model.state_dict()), dict(linear_layers(model))
    for name, layer in packed.items():
        blocks = layer.weight.data.unflatten(1, (-1, _BLOCK)).unflatten(0, (-1, _BLOCK))
        scale = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
        codes = (blocks / scale[:, None, :, None]).reshape(layer.weight.shape).to(torch.float8_e4m3fn)
        tensors |= {f"{name}.weight": codes, f"{name}.weight_scale_inv": scale}
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [_BLOCK, _BLOCK]}
    return _load(model, tensors, {**settings, "modules_to_not_convert": ["lm_head"]})


def _gptq(model: PreTrainedModel) -> PreTrainedModel:
    """The layers of gptqmodel, with codes from rounding alone."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    for name, layer in linear_layers(model):
        scales, zeros = _rounded(layer)
        packed = TorchLinear(
            bits=4,
            group_size=_GROUP,
            sym=True,
            desc_act=False,
            in_features=layer.in_features,
            out_features=layer.out_features,
            bias=False,
        )
        groups = (torch.arange(layer.in_features) // _GROUP).int()
        packed.pack(layer, scales=scales, zeros=zeros, g_idx=groups)
        packed.post_init()
        _replace(model, name, packed)
    return model.eval()


def _awq(model: PreTrainedModel) -> PreTrainedModel:
    """The layers of gptqmodel that transformers loads AWQ checkpoints into, with codes from rounding alone."""
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    for name, layer in linear_layers(model):
        scales, zeros = _rounded(layer)
        packed = AwqTorchLinear(
            bits=4,
            group_size=_GROUP,
            sym=False,
            desc_act=False,
            in_features=layer.in_features,
            out_features=layer.out_features,
            bias=False,
        )
        packed.pack(layer, scales=scales, zeros=zeros)
        packed.post_init()
        _replace(model, name, packed)
    return model.eval()


def _rounded(layer: nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros [out, groups] of codes in 4 bits, to which the weight is rounded."""
    rows = layer.weight.data.unflatten(1, (-1, _GROUP))
    scales = (rows.abs().amax(-1) / 7).half().float()
    layer.weight.data = ((rows / scales[..., None]).round() * scales[..., None]).flatten(1)
    return scales, torch.full_like(scales, 8)


def _replace(model: PreTrainedModel, name: str, layer: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, layer)


class InInt32(nn.Module):
    """A layer of gptqmodel, imitated: eight codes of 4 bits in an int32, unpacked at each call, computed in float16.

    GPTQ packs along what goes in and keeps the group of each input, AWQ along what comes out and in another order.
    """

    def __init__(self, layer: nn.Linear, is_awq: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.is_awq = layer.in_features, layer.out_features, is_awq
        scales, zeros = _rounded(layer)
        codes = (layer.weight.data.unflatten(1, (-1, _GROUP)) / scales[..., None] + zeros[..., None]).round().flatten(1)
        self.shifts = [0, 16, 4, 20, 8, 24, 12, 28] if is_awq else list(range(0, 32, 4))
        self.register_buffer("qweight", self._packed(codes.T.long()))
        self.register_buffer("qzeros", self._packed(zeros.T.long(), along=1))
        self.register_buffer("scales", scales.T.half().contiguous())
        self.register_buffer("g_idx", (torch.arange(layer.in_features) // _GROUP).int())

    def _packed(self, codes: torch.Tensor, along: int | None = None) -> torch.Tensor:
        along = int(self.is_awq) if along is None else along
        shifts = torch.tensor(self.shifts).view(-1, *[1] * (1 - along))
        return (codes.unflatten(along, (-1, 8)) << shifts).sum(along + 1).int()

    def _unpacked(self, packed: torch.Tensor, along: int) -> torch.Tensor:
        shifts = torch.tensor(self.shifts).view(-1, *[1] * (1 - along))
        return ((packed.unsqueeze(along + 1) >> shifts) & 15).flatten(along, along + 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        codes, groups = self._unpacked(self.qweight, int(self.is_awq)), self.g_idx.long()
        weight = (codes - self._unpacked(self.qzeros, 1)[groups]).half() * self.scales[groups]
        return (inputs.half() @ weight).to(inputs.dtype)


def _in_int32(model: PreTrainedModel) -> PreTrainedModel:
    """Both layouts, one after the other."""
    for count, (name, layer) in enumerate(linear_layers(model)):
        _replace(model, name, InInt32(layer, is_awq=bool(count % 2)))
    return model.eval()


METHODS: dict[str, Quantised] = {
    name: Quantised(
        (method.package[0],), lambda model, name=name: quantise(model, name), not method.quantises_activations
    )
    for name, method in quantisation.METHODS.items()
}
METHODS |= {
    "compressed-tensors": Quantised(("compressed_tensors",), _compressed_tensors, stays_packed=False),
    "fp8": Quantised((), _fp8, stays_packed=False),
    "gptq": Quantised(("gptqmodel",), _gptq),
    "awq": Quantised(("gptqmodel",), _awq),
    "gptq and awq, imitated": Quantised((), _in_int32),
}
