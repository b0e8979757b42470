"""Writes the splice alone: `kvsplice_config.json` and `kvsplice_model.safetensors`.

The format is described in docs/checkpoint_format.md. `checkpoint` reads it.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from torch import nn

from kvsplice_hf import folders
from kvsplice_hf.config import SCHEMA_VERSION, KVSpliceConfig
from kvsplice_hf.patch.attention import PatchedSite
from kvsplice_hf.patch.layers import MLASite
from kvsplice_hf.patch.state import find_patch, patched_sites
from kvsplice_hf.weights.offload import read_all
from kvsplice_hf.weights.sharding import whole


CONFIG_NAME = "kvsplice_config.json"
WEIGHTS_NAME = "kvsplice_model.safetensors"
FORMAT = "kvsplice"


def save_kvsplice(model: nn.Module, directory: str | Path, *, is_main_process: bool = True) -> Path:
    """Write the splice of a patched model to `directory` (made if needed); the base model is not copied.

    Args:
        model: a patched model. Where FSDP has spread its parameters over processes, all of them must call this.
        directory: where to.
        is_main_process: whether this process writes.

    Returns:
        The directory.

    Raises:
        PatchStateError: the model is not patched.
    """
    states = {site.layer_idx: read_all(patched.splice) for site, patched in patched_sites(model)}
    more: dict[str, Any] = {}
    if is_main_process:
        more["identities"] = {str(site.layer_idx): patched.splice.identity for site, patched in patched_sites(model)}
    return _write(model, Path(directory), states, more, is_main_process)


def save_splice_of(
    model: nn.Module, directory: str | Path, weights: dict[str, torch.Tensor] | None, *, is_main_process: bool = True
) -> None:
    """As `save_kvsplice`, but from weights that were gathered before, where there are some; nothing if they lack it.

    Args:
        model: a patched model.
        directory: where to.
        weights: by name, as `state_dict` has them; None for those in memory.
        is_main_process: whether this process writes.
    """
    if weights is None:
        save_kvsplice(model, directory, is_main_process=is_main_process)
        return
    states: dict[int, dict[str, torch.Tensor]] = {}
    for site, patched in patched_sites(model):
        names = {name: f"{site.name}.kvsplice.{name}" for name in patched.splice.state_dict()}
        if not all(name in weights for name in names.values()):
            return
        states[site.layer_idx] = {name: weights[full] for name, full in names.items()}
    _write(model, Path(directory), states, {}, is_main_process)


def _write(
    model: nn.Module,
    directory: Path,
    states: dict[int, dict[str, torch.Tensor]],
    more: dict[str, Any],
    is_main_process: bool,
) -> Path:
    """Write the splices with the parameters `states`, by cache layer index; `more` goes into the description."""
    sites, config = patched_sites(model), find_patch(model)[1].config
    tensors: dict[str, torch.Tensor] = {}
    layers: dict[str, dict[str, Any]] = {}
    for site, patched in sites:
        state = states[site.layer_idx]
        tensors |= {key_of(site.layer_idx, name): whole(tensor).contiguous().cpu() for name, tensor in state.items()}
        layers[str(site.layer_idx)] = _describe_layer(site, patched, config)
    if not is_main_process:
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    weights = safetensors.torch.save(tensors, metadata={"format": "pt"})
    base = sites[0][0].module.config.to_dict()
    description = {
        "base_model_name_or_path": base.get("_name_or_path", ""),
        "config": config.to_dict(),
        "format": FORMAT,
        "layers": layers,
        "model_type": base["model_type"],
        "schema_version": SCHEMA_VERSION,
        "transformers_version": transformers.__version__,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    } | more
    # Each whole or not at all. A process that is killed between the two leaves files that do not fit; loading says so.
    folders.write_bytes(directory / WEIGHTS_NAME, weights)
    folders.write_bytes(directory / CONFIG_NAME, (json.dumps(description, indent=2, sort_keys=True) + "\n").encode())
    return directory


def _describe_layer(site: MLASite, patched: PatchedSite, config: KVSpliceConfig) -> dict[str, Any]:
    rank = patched.geometry.rank
    sizes: dict[str, Any] = {"kv_lora_rank": site.kv_lora_rank, "rank": rank}
    if not config.is_packed and config.rank_for(site.kv_lora_rank, site.name) != rank:
        sizes["pruned_from"] = config.rank_for(site.kv_lora_rank, site.name)
    return sizes


def key_of(layer_idx: int, name: str) -> str:
    # By cache layer, not by path: a splice trained on `...ForCausalLM` fits the bare model as well.
    return f"layers.{layer_idx}.kvsplice.{name}"
