"""Saves the splices of a patched model, alone: see `code.files`, and docs/checkpoint_format.md."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from kvsplice_hf.code.files import key_of, write_splice_files
from kvsplice_hf.config import KVSpliceConfig
from kvsplice_hf.errors import CheckpointError
from kvsplice_hf.patch.base import BASE_KEY, base_fingerprint
from kvsplice_hf.patch.families import AttentionSite
from kvsplice_hf.patch.site_patch import SitePatch
from kvsplice_hf.patch.state import find_patch, patched_sites
from kvsplice_hf.weights.offload import read_all
from kvsplice_hf.weights.sharding import whole


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
        CheckpointError: a file stands where the folder is to be.

    Examples:
        >>> folder = save_kvsplice(model, "my-splice")
        >>> sorted(path.name for path in folder.iterdir())
        ['kvsplice_config.json', 'kvsplice_model.safetensors']
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
    _require_room(directory)
    base = sites[0][0].module.config.to_dict()
    about = {"base_model_name_or_path": base.get("_name_or_path", ""), "model_type": base["model_type"]} | more
    fingerprint = base_fingerprint(model, sites[0][0].module)
    about |= {BASE_KEY: fingerprint} if fingerprint else {}
    write_splice_files(directory, config, layers, tensors, about)
    return directory


def _require_room(directory: Path) -> None:
    """Refuse a folder that cannot be made because a file has its name, or that of a folder around it."""
    file = next((path for path in (directory, *directory.parents) if path.exists() and not path.is_dir()), None)
    if file is not None:
        raise CheckpointError(
            f"The splice cannot be saved in {directory}: {file} is a file. Give the name of a folder, which is made if "
            "it is not there."
        )


def _describe_layer(site: AttentionSite, patched: SitePatch, config: KVSpliceConfig) -> dict[str, Any]:
    rank = patched.geometry.rank
    if site.kv_heads:
        return {"kv_lora_rank": patched.geometry.kv_lora_rank, "rank": rank, "kv_heads": site.kv_heads}
    sizes: dict[str, Any] = {"kv_lora_rank": site.kv_lora_rank, "rank": rank}
    if not config.is_packed and config.rank_for(site.kv_lora_rank, site.name) != rank:
        sizes["pruned_from"] = config.rank_for(site.kv_lora_rank, site.name)
    return sizes
