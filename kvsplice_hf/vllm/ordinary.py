"""A saved splice of ordinary attention as an engine reads it, and which models and engines it is served with.

Served are models whose module in vLLM hands to its attention what that of transformers does: keys of all key heads,
rotated as halves, unscaled, and values. Whatever else either can do is refused by name.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kvsplice_hf.cache.rows import RowGeometry
from kvsplice_hf.code.files import read_splice_files
from kvsplice_hf.errors import UnsupportedError
from kvsplice_hf.patch.families import AttentionSite
from kvsplice_hf.vllm.heads import ServedHeads
from kvsplice_hf.vllm.splices import splice_of, turns_at


# Types of models whose attention in vLLM and in transformers was compared.
_KNOWN = ("llama", "mistral", "qwen2", "qwen3")
# Kinds of rotation that both make the same keys of; in others the angles or a factor depend on more than the position.
_ROTATIONS = ("default", "linear", "llama3", "yarn")
# Settings that one of the two reads and the other does not, and what they must be.
_SETTINGS = {"llama_4_scaling": None, "dual_chunk_attention_config": None, "is_causal": True}
_INSTEAD = "Unset KVSPLICE_VLLM to serve it as it is, or run it in transformers with load_kvsplice."


def is_of_heads(directory: Path) -> bool:
    """Whether a saved splice is one of ordinary attention, and not of MLA.

    Raises:
        CheckpointError: a file is missing, damaged, or of a newer schema.
        UnsupportedError: it is of both kinds.
    """
    layers = read_splice_files(directory).layers
    heads = sorted(layer for layer, sizes in layers.items() if sizes.get("kv_heads", 0))
    if heads and len(heads) < len(layers):
        raise UnsupportedError(
            f"The splice in {directory} is one of ordinary attention in layers {heads} and of MLA in layers "
            f"{sorted(set(layers) - set(heads))}; vLLM keeps spliced rows of one kind. {_INSTEAD}"
        )
    return bool(heads)


def require_ordinary_model(model: Any) -> None:
    """Check that rows of a model with ordinary attention can be served, by its settings.

    Args:
        model: vLLM's `ModelConfig`.

    Raises:
        UnsupportedError: another kind of model, or settings with which vLLM computes other keys than transformers.
    """
    config = model.hf_text_config
    kind = getattr(config, "model_type", "")
    if kind not in _KNOWN:
        raise UnsupportedError(
            f"vLLM keeps spliced rows of ordinary attention of models of the types {', '.join(_KNOWN)}; this one is "
            f"{kind!r}. {_INSTEAD}"
        )
    whole = getattr(model.hf_config, "model_type", "")
    if whole != kind:
        raise UnsupportedError(
            f"vLLM keeps spliced rows of ordinary attention of models of text; this one is {whole!r}, of which "
            f"{kind!r} is a part. {_INSTEAD}"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    found = {f"rope_type={rope.get('rope_type')!r}": rope.get("rope_type", "default") not in _ROTATIONS}
    partial = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))
    found[f"partial_rotary_factor={partial}"] = partial not in (None, 1.0)
    for name, wanted in _SETTINGS.items():
        found[f"{name}={getattr(config, name, wanted)}"] = getattr(config, name, wanted) not in (wanted, None)
    wrong = [name for name, is_wrong in found.items() if is_wrong]
    if wrong:
        raise UnsupportedError(
            f"This {kind!r} has {', '.join(wrong)}, with which vLLM and transformers do not compute the same, or "
            f"were not compared. {_INSTEAD}"
        )


def require_no_windows(sites: Sequence[AttentionSite]) -> None:
    """Check that all layers attend to all tokens.

    Raises:
        UnsupportedError: some have a sliding window, or chunks: vLLM gives their pages back.
    """
    windows = [site.layer_idx for site in sites if site.sliding_window is not None or site.chunked]
    if windows:
        raise UnsupportedError(
            f"Layers {windows} of this model attend to a window of tokens, and vLLM keeps spliced rows of ordinary "
            f"attention only where layers attend to all. {_INSTEAD}"
        )


def not_for_heads(engine: Any) -> dict[str, bool]:
    """What an engine may be asked for that it cannot do with rows of ordinary attention, and whether it was."""
    model, processes = engine.model_config, engine.parallel_config.tensor_parallel_size
    device = engine.device_config.device_type
    return {
        f"ordinary attention on device {device!r}": device != "cpu",
        f"ordinary attention with tensor_parallel_size={processes}": processes > 1,
        f"ordinary attention with model_impl={model.model_impl!r}": model.model_impl not in ("auto", "vllm"),
    }


def served_heads(directory: Path, layer_idx: int, config: Any, positions: int, dtype: torch.dtype) -> ServedHeads:
    """One layer of a saved splice of ordinary attention.

    Args:
        directory: of the splice.
        layer_idx: of the cache layer.
        config: of the model, as transformers has it.
        positions: how many there may be in a sequence.
        dtype: of the model.

    Raises:
        CheckpointError: a file is missing, damaged, of a newer schema, or without this layer.
    """
    splice, settings = splice_of(directory, layer_idx, dtype)
    heads, first = len(splice.heads), next(iter(splice))
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    geometry = RowGeometry(
        heads * first.latent_dim,
        sum(head.rank for head in splice),
        heads * size,
        settings.sink_tokens,
        sum(splice.row_bytes),
        coded_keys=splice.keys is not None,
        heads=heads,
    )
    turns = turns_at(config, positions, splice.keys, torch.device("cpu"))
    return ServedHeads(splice, splice.identity, geometry, dtype, turns)
