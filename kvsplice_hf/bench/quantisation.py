"""Models with quantised weights, made from loaded ones, for programs and tests.

Transformers quantises as it loads, so a model is written to a temporary folder and loaded from there.
"""

import importlib
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm
from transformers import BitsAndBytesConfig, PreTrainedModel, QuantoConfig, TorchAoConfig

from kvsplice_hf.errors import ConfigError, UnsupportedError
from kvsplice_hf.weights.packed import is_plain


# The model as it is, among the methods that an option takes.
UNQUANTISED = "none"


class Method(NamedTuple):
    """How weights are quantised.

    Attributes:
        package: the module to import, and what pip calls it.
        settings: of `from_pretrained`, for a model; None where the layers are replaced in place (`in_place`).
        in_place: replaces the layers of a model.
        quantises_activations: whether what goes into a layer is quantised as well: then it is no matrix.
    """

    package: tuple[str, str]
    settings: Callable[[PreTrainedModel], Any] | None = None
    in_place: Callable[[PreTrainedModel], None] | None = None
    quantises_activations: bool = False


def _in_4_bits(model: PreTrainedModel) -> Any:
    # On some processors it runs layers with such numbers of inputs and outputs only.
    odd = {
        name.rpartition(".")[2]
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and (layer.in_features % 64 or layer.out_features % 32)
    }
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=model.dtype,
        llm_int8_skip_modules=["lm_head", *sorted(odd - {"lm_head"})],
    )


def _in_8_bits(model: PreTrainedModel) -> Any:
    # Of MLA, kv_b_proj gets tensors of four dimensions, which Linear8bitLt does not take.
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0, llm_int8_skip_modules=["lm_head", "kv_b_proj"])


def _int8(model: PreTrainedModel) -> Any:
    return TorchAoConfig(importlib.import_module("torchao.quantization").Int8WeightOnlyConfig())


def _int4(model: PreTrainedModel) -> Any:
    torchao = importlib.import_module("torchao.quantization")
    groups = importlib.import_module("torchao.quantization.granularity").PerGroup(32)
    int4: Any = getattr(torch, "int4")  # noqa: B009  which the type stubs of torch do not know
    return TorchAoConfig(torchao.IntxWeightOnlyConfig(int4, groups))


def _int8_of_both(model: PreTrainedModel) -> Any:
    return TorchAoConfig(importlib.import_module("torchao.quantization").Int8DynamicActivationInt8WeightConfig())


def _hqq_in_4_bits(model: PreTrainedModel) -> None:
    hqq = importlib.import_module("hqq.core.quantize")
    head = model.get_output_embeddings()
    for name, layer in list(model.named_modules()):
        # It packs two groups of 64 weights together, and fails where one is left over.
        whole = isinstance(layer, nn.Linear) and layer.weight.numel() % 128 == 0
        if isinstance(layer, nn.Linear) and whole and is_plain(layer) and layer is not head:
            parent, _, own = name.rpartition(".")
            settings = hqq.BaseQuantizeConfig(nbits=4, group_size=64)
            packed = hqq.HQQLinear(layer, settings, compute_dtype=model.dtype, device=str(model.device))
            setattr(model.get_submodule(parent), own, packed)


_BITSANDBYTES, _TORCHAO = ("bitsandbytes", "bitsandbytes"), ("torchao", "torchao")
_QUANTO = ("optimum.quanto", "optimum-quanto")
METHODS: Mapping[str, Method] = {
    "bitsandbytes-4bit": Method(_BITSANDBYTES, _in_4_bits),
    "bitsandbytes-8bit": Method(_BITSANDBYTES, _in_8_bits, quantises_activations=True),
    "torchao-int8": Method(_TORCHAO, _int8),
    "torchao-int4": Method(_TORCHAO, _int4),
    "torchao-int8-dynamic": Method(_TORCHAO, _int8_of_both, quantises_activations=True),
    "quanto-int8": Method(_QUANTO, lambda model: QuantoConfig(weights="int8")),
    "quanto-int4": Method(_QUANTO, lambda model: QuantoConfig(weights="int4")),
    "hqq-4bit": Method(("hqq", "hqq"), in_place=_hqq_in_4_bits),
}


def is_installed(package: str) -> bool:
    """Whether a module can be imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # a part of what is not there
        return False


def quantise(model: PreTrainedModel, method: str) -> PreTrainedModel:
    """Another model: with the weights of this one, quantised by one of `METHODS`. "none" gives the model itself.

    Raises:
        ConfigError: there is no such method.
        UnsupportedError: its package is missing.
    """
    if method == UNQUANTISED:
        return model
    if method not in METHODS:
        raise ConfigError(f"--quantisation has {method!r}; it takes {', '.join((UNQUANTISED, *METHODS))}.")
    (module, package), settings, in_place, _ = METHODS[method]
    if not is_installed(module):
        raise UnsupportedError(f"--quantisation {method} needs {package}: pip install {package}.")
    steps = tqdm(total=2, desc=f"quantising ({method})", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder, steps:
        model.save_pretrained(folder)
        steps.update()
        how = {"dtype": model.dtype, "attn_implementation": model.config._attn_implementation}
        if settings is not None:
            how["quantization_config"] = settings(model)
        quantised: PreTrainedModel = type(model).from_pretrained(folder, **how).eval()
        if in_place is not None:
            in_place(quantised)
        steps.update()
    return quantised
