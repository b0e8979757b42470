"""The tokenizer in what was given as one: itself, or that of a processor of a model of images and text."""

from typing import Any

from torch import nn

from kvsplice_hf.errors import ConfigError


def tokenizer_of(given: Any) -> Any:
    """The tokenizer itself: what was given, or what is in it if that is a processor.

    Args:
        given: a tokenizer of transformers, anything else that is called like one, or a processor that has one.

    Raises:
        ConfigError: there is none, or it is something else.
    """
    if given is None:
        raise ConfigError("Calibration on text needs its `tokenizer`. Pass it, or pass token ids [B, T].")
    is_processor = not hasattr(given, "convert_tokens_to_ids") and hasattr(given, "tokenizer")
    tokenizer = given.tokenizer if is_processor else given
    if callable(tokenizer) and not isinstance(tokenizer, (nn.Module, type)) and _makes_tokens(tokenizer):
        return tokenizer
    name = f"the str {given!r}" if isinstance(given, str) else f"a {type(given).__name__}"
    raise ConfigError(
        f"`tokenizer` is {name}; it must be a tokenizer of transformers, or a processor that has one. Load it with "
        "AutoTokenizer.from_pretrained(...)."
    )


def _makes_tokens(given: Any) -> bool:
    """Whether it makes token ids, as far as it says: what processes images or sound alone names other inputs."""
    names = getattr(given, "model_input_names", None)
    return not isinstance(names, (list, tuple)) or "input_ids" in names
