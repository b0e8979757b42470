"""Saves the splices of a patched model, alone: see `code.files`, and docs/checkpoint_format.md."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from kvsplice_hf.code.files import key_of, write_splice_files
from kvsplice_hf.code.heads import HeadSplices, identity_of
from kvsplice_hf.config import KVSpliceConfig
from kvsplice_hf.errors import CheckpointError, UnsupportedError
from kvsplice_hf.patch.base import BASE_KEY, base_fingerprint
from kvsplice_hf.patch.families import AttentionSite
from kvsplice_hf.patch.site_patch import SitePatch
from kvsplice_hf.patch.state import find_patch, patched_sites
from kvsplice_hf.weights.offload import read_all
from kvsplice_hf.weights.processes import failing_together, gathered, process_rank
from kvsplice_hf.weights.sharding import is_spread, whole


def save_kvsplice(model: nn.Module, directory: str | Path, *, is_main_process: bool = True) -> Path:
    """Write the splice of a patched model to `directory` (made if needed); the base model is not copied.

    Args:
        model: a patched model. Where its parameters are spread over processes (FSDP, tensor parallelism), all of them
            must call this.
        directory: where to.
        is_main_process: whether this process writes. Of several that run one model together, one does.

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
    spread, sites = is_spread(model.modules()), patched_sites(model)
    tensors: dict[str, torch.Tensor] = {}
    for site, patched in sites:
        own = {key_of(site.layer_idx, name): whole(held) for name, held in read_all(patched.splice).items()}
        tensors |= _of_all_heads(site, {key: tensor.contiguous().cpu() for key, tensor in own.items()})
    more: dict[str, Any] = {}
    if is_main_process or spread:
        more["identities"] = {str(site.layer_idx): _identity(site, patched.splice) for site, patched in sites}
    more |= {BASE_KEY: base_fingerprint(model, sites[0][0].module, gathers=True)} if spread else {}
    writers = gathered(is_main_process) if spread else [is_main_process]
    with failing_together(spread):  # and nobody goes on before the files are there
        if is_main_process and (not spread or writers.index(True) == process_rank()):
            _write(model, Path(directory), tensors, more)
    return Path(directory)


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
    tensors: dict[str, torch.Tensor] = {}
    for site, patched in patched_sites(model):
        names = {name: f"{site.name}.kvsplice.{name}" for name in patched.splice.state_dict()}
        if not all(name in weights for name in names.values()):
            return
        _require_all_heads(site)
        own = {key_of(site.layer_idx, name): whole(weights[full]) for name, full in names.items()}
        tensors |= {key: tensor.contiguous().cpu() for key, tensor in own.items()}
    if is_main_process:
        _write(model, Path(directory), tensors, {})


def _write(model: nn.Module, directory: Path, tensors: dict[str, torch.Tensor], more: dict[str, Any]) -> None:
    """Write the splices with the parameters `tensors`, of all heads; `more` goes into the description."""
    sites, config = patched_sites(model), find_patch(model)[1].config
    layers = {str(site.layer_idx): _describe_layer(site, patched, config, tensors) for site, patched in sites}
    _require_room(directory)
    base = sites[0][0].module.config.to_dict()
    about = {"base_model_name_or_path": base.get("_name_or_path", ""), "model_type": base["model_type"]} | more
    if BASE_KEY not in about:
        about[BASE_KEY] = base_fingerprint(model, sites[0][0].module)
    about = {name: value for name, value in about.items() if name != BASE_KEY or value}
    write_splice_files(directory, config, layers, tensors, about)


def _of_all_heads(site: AttentionSite, own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a layer, those included that are in other processes with their heads."""
    if site.parts == site.all_parts:
        return own
    assert site.share is not None
    parts = gathered(own, site.share.mesh.get_group())
    return {name: tensor for part in parts for name, tensor in part.items()}


def _require_all_heads(site: AttentionSite) -> None:
    if site.parts != site.all_parts:
        raise UnsupportedError(
            f"The key heads of {site.name} are divided among processes by tensor parallelism, and the weights that "
            "were handed to `save_pretrained` hold those of one of them. Call save_kvsplice(model, folder) in all "
            "processes, or save_pretrained without `state_dict`."
        )


def _identity(site: AttentionSite, splice: Any) -> str:
    """The identity of the splice of a layer, that of all heads."""
    if site.parts == site.all_parts:
        return str(splice.identity)
    assert site.share is not None
    assert isinstance(splice, HeadSplices)
    parts = gathered([head.identity for head in splice], site.share.mesh.get_group())
    return identity_of(identity for part in parts for identity in part)


def _require_room(directory: Path) -> None:
    """Refuse a folder that cannot be made because a file has its name, or that of a folder around it."""
    file = next((path for path in (directory, *directory.parents) if path.exists() and not path.is_dir()), None)
    if file is not None:
        raise CheckpointError(
            f"The splice cannot be saved in {directory}: {file} is a file. Give the name of a folder, which is made if "
            "it is not there."
        )


def _describe_layer(
    site: AttentionSite, patched: SitePatch, config: KVSpliceConfig, tensors: dict[str, torch.Tensor]
) -> dict[str, Any]:
    rank = patched.geometry.rank
    if site.kv_heads:
        heads = site.all_parts
        rank = sum(len(tensors[key_of(part, "compress.weight")]) for part in heads)
        return {"kv_lora_rank": len(heads) * site.kv_lora_rank, "rank": rank, "kv_heads": len(heads)}
    sizes: dict[str, Any] = {"kv_lora_rank": site.kv_lora_rank, "rank": rank}
    if not config.is_packed and config.rank_for(site.kv_lora_rank, site.name) != rank:
        sizes["pruned_from"] = config.rank_for(site.kv_lora_rank, site.name)
    return sizes
