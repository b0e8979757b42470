"""Which model a cache was computed by (its weights, settings, adapters and dtype), and whose tokens it stands for."""

import hashlib
import json
import re
import weakref
from typing import Any

from torch import nn

from kvsplice_hf.calibration.fingerprint import tokenizer_fingerprint
from kvsplice_hf.errors import UnsupportedError
from kvsplice_hf.patch.base import stamp_of_weights
from kvsplice_hf.patch.state import is_patched, patched_sites
from kvsplice_hf.text import tokenizer_of
from kvsplice_hf.weights.adapters import adapter_states
from kvsplice_hf.weights.fingerprint import decoder_around, digest, modules_of_splices
from kvsplice_hf.weights.packed import decompress


# Settings that change what a layer computes from the same weights: positions, windows, scales, activations.
_SETTINGS = re.compile(r"rope|rotary|position|sliding|window|chunk|layer_types|eps|cap|scal|multiplier|act|norm|heads")
# The digest of the weights of a model, with what it was made of, while the model lives: reading all of them takes long.
_KNOWN: "weakref.WeakKeyDictionary[nn.Module, tuple[Any, str]]" = weakref.WeakKeyDictionary()
# What is told of each, in a message.
WORDS = {
    "weights": "with other weights",
    "settings": "with other settings (of positions, windows or scales)",
    "adapters": "with other adapters in force",
    "dtype": "in another dtype",
}


def model_identity(model: nn.Module) -> dict[str, Any]:
    """What the numbers in a cache depend on beside the tokens: two models that agree in it compute the same ones.

    Returns:
        Digests of weights and settings of the decoder, the adapters in force, the dtype, and the name of the class.

    Raises:
        UnsupportedError: the weights are spread over processes.
    """
    inner: Any = _decoder(model)
    config = inner.config.get_text_config(decoder=True) if hasattr(inner, "config") else None
    weights = _weights(inner)
    if not weights:
        raise UnsupportedError(
            f"The weights of this {type(model).__name__} are spread over several processes, or are nowhere, so that "
            "its caches cannot be told from those of another model. They are neither saved nor loaded."
        )
    return {
        "class": type(inner).__name__,
        "weights": weights,
        "settings": _settings(config),
        "adapters": adapter_states(inner),
        "dtype": str(getattr(inner, "dtype", "")).removeprefix("torch."),
    }


def text_identity(tokenizer: Any) -> str:
    """What tokens stand for; empty without a tokenizer.

    Raises:
        ConfigError: a tokenizer was given that is none, and has none.
    """
    return "" if tokenizer is None else tokenizer_fingerprint(tokenizer_of(tokenizer))


def _decoder(model: nn.Module) -> nn.Module:
    if is_patched(model):
        return decoder_around(model, patched_sites(model)[0][0].module)
    get_decoder: Any = getattr(model, "get_decoder", None)
    found = get_decoder() if callable(get_decoder) else None
    return found if isinstance(found, nn.Module) else model


def _weights(decoder: nn.Module) -> str:
    decompress(decoder)
    splices = modules_of_splices(decoder)
    stamp = stamp_of_weights(decoder, splices)
    known = _KNOWN.get(decoder)
    if known is None or known[0] != stamp:
        known = _KNOWN[decoder] = stamp, digest(decoder, splices, needs_all=True, gathers=False)
    return known[1]


def _settings(config: Any) -> str:
    settings = {} if config is None else config.to_dict()
    chosen = {name: value for name, value in settings.items() if _SETTINGS.search(name)}
    return hashlib.sha256(json.dumps(chosen, sort_keys=True, default=str).encode()).hexdigest()
