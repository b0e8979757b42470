"""Loads the splice alone: `kvsplice_config.json` and `kvsplice_model.safetensors`. `splice_files` writes them.

The format is described in docs/checkpoint_format.md.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from kvsplice_hf.code.codec import RowCodec
from kvsplice_hf.code.projection import LearnedKVSplice, normal_tensors
from kvsplice_hf.config import SCHEMA_VERSION, KVSpliceConfig
from kvsplice_hf.errors import CheckpointError, ConfigError
from kvsplice_hf.patch.layers import MLASite, find_mla_sites
from kvsplice_hf.patch.saving import CONFIG_NAME, FORMAT, WEIGHTS_NAME, key_of
from kvsplice_hf.patch.saving import save_kvsplice as save_kvsplice
from kvsplice_hf.patch.state import is_patched, patched_sites
from kvsplice_hf.patching import patch_with_splices
from kvsplice_hf.weights.offload import execution_device, write_all
from kvsplice_hf.weights.sharding import spread_like


_CODEC_BUFFERS = ("widths", "scales", "centres", "sigmas")

ModelT = TypeVar("ModelT", bound=nn.Module)


class _Saved(NamedTuple):
    """What a folder of `save_kvsplice` holds. `layers`: the sizes of each, as `_describe_layer` writes them."""

    config: KVSpliceConfig
    layers: dict[int, dict[str, Any]]
    tensors: dict[str, torch.Tensor]


def load_kvsplice(model: ModelT, directory: str | Path) -> ModelT:
    """Load a splice saved by `save_kvsplice`.

    An unpatched model is patched with the saved settings. On a patched one the parameters are replaced; it must splice
    the same layers to the same ranks, and keeps its other settings.

    Returns:
        `model` itself.

    Raises:
        CheckpointError: a file is missing, damaged, of a newer schema, or for other shapes. The model is as it was.
        NotMLAError: the model has no MLA layer.
    """
    directory = Path(directory)
    saved = _read(directory)
    config, tensors = saved.config, saved.tensors
    if is_patched(model):
        _require_fit(_shapes_of_patched(model), tensors, directory)
        codecs = {site.layer_idx: _codec(tensors, site.layer_idx, directory) for site, _ in patched_sites(model)}
        _require_same_rows(model, codecs, directory)
        with normal_tensors():
            for site, patched in patched_sites(model):
                _set_parameters(patched.splice, tensors, site.layer_idx, codecs[site.layer_idx])
        return model
    chosen = _chosen_sites(model, config)
    _require_fit(_shapes_after_patch(model, saved, chosen), tensors, directory)
    splices = {}
    with normal_tensors():
        for site in chosen:
            splice = _empty_splice(site, saved)
            _set_parameters(splice, tensors, site.layer_idx, _codec(tensors, site.layer_idx, directory))
            splices[site.layer_idx] = splice.train(site.module.training)
    patch_with_splices(model, config, splices)
    return model


def read_splices(directory: str | Path) -> dict[int, LearnedKVSplice]:
    """The projections of a splice saved by `save_kvsplice`, by cache layer index, without the model.

    Raises:
        CheckpointError: a file is missing, damaged, or of a newer schema.
    """
    directory = Path(directory)
    config, layers, tensors = _read(directory)
    splices = {}
    for layer_idx, sizes in sorted(layers.items()):
        codec = _codec(tensors, layer_idx, directory)
        try:
            dtype = tensors[key_of(layer_idx, "compress.weight")].dtype
            with torch.random.fork_rng(devices=[]):  # constructors draw random numbers
                splice = LearnedKVSplice(
                    sizes["kv_lora_rank"], sizes["rank"], use_layernorm=config.use_layernorm, dtype=dtype
                )
            _set_parameters(splice, tensors, layer_idx, codec)
        except (ConfigError, KeyError, RuntimeError) as error:
            raise CheckpointError(f"The splice of layer {layer_idx} in {directory} is damaged: {error}") from error
        splices[layer_idx] = splice.eval()
    return splices


def _set_parameters(
    splice: LearnedKVSplice, tensors: dict[str, torch.Tensor], layer_idx: int, codec: RowCodec | None
) -> None:
    before = splice.codec
    device = execution_device(splice.compress)
    splice.codec = None if codec is None else codec.to(device)
    if before is not None and splice.codec is not None:
        if torch.equal(before.widths, splice.codec.widths):  # an optimiser may hold its parameters
            splice.codec = before
        else:
            splice.codec.train_steps(before.scales.requires_grad)
    if splice.is_merged:  # what is folded would go on with the parameters of before
        splice.unmerge()
    held = splice.state_dict()
    write_all(splice, {name: spread_like(tensors[key_of(layer_idx, name)], old) for name, old in held.items()})
    splice.forget_identity()


def _codec(tensors: dict[str, torch.Tensor], layer_idx: int, directory: Path) -> RowCodec | None:
    """The codec that the file holds for a layer.

    Raises:
        CheckpointError: its values cannot be used.
    """
    values = [tensors.get(key_of(layer_idx, f"codec.{name}")) for name in _CODEC_BUFFERS]
    found = [value for value in values if value is not None]
    if len(found) < len(_CODEC_BUFFERS):
        return None
    try:
        return RowCodec(*found)
    except ConfigError as error:
        raise CheckpointError(f"The codec of layer {layer_idx} in {directory} cannot be used: {error}") from error


def _require_same_rows(model: nn.Module, codecs: dict[int, RowCodec | None], directory: Path) -> None:
    for site, patched in patched_sites(model):
        codec = codecs[site.layer_idx]
        found = None if codec is None else codec.row_bytes
        if found != patched.geometry.packed_bytes:
            raise CheckpointError(
                f"The splice in {directory} stores rows of {found} bytes in layer {site.layer_idx}, the patched model "
                f"rows of {patched.geometry.packed_bytes}. Call unpatch_model(model) first, then load."
            )


def _shapes_of_patched(model: nn.Module) -> dict[str, torch.Size]:
    return {
        key_of(site.layer_idx, name): tensor.shape
        for site, patched in patched_sites(model)
        for name, tensor in patched.splice.state_dict().items()
    }


def _chosen_sites(model: nn.Module, config: KVSpliceConfig) -> list[MLASite]:
    """The sites that store a latent and that the settings choose.

    Raises:
        CheckpointError: the settings do not fit the model.
    """
    sites = {site.layer_idx: site for site in find_mla_sites(model, config.layer_pattern) if site.stores_latent}
    try:
        return [sites[layer_idx] for layer_idx in config.select_layers(tuple(sites))]
    except ConfigError as error:
        raise CheckpointError(f"The saved splice does not fit this {type(model).__name__}: {error}") from error


def _rank(site: MLASite, saved: _Saved) -> int:
    """r of a layer: from the settings, or, where rows are packed or were pruned, from the file."""
    sizes = saved.layers.get(site.layer_idx, {})
    if "pruned_from" in sizes:
        return sizes["rank"]
    if not saved.config.is_packed:
        return saved.config.rank_for(site.kv_lora_rank, site.name)
    weight = saved.tensors.get(key_of(site.layer_idx, "compress.weight"))
    return min(max(1, len(weight)), site.kv_lora_rank) if weight is not None and weight.dim() == 2 else 1


def _empty_splice(site: MLASite, saved: _Saved, device: torch.device | str | None = None) -> LearnedKVSplice:
    device = execution_device(site.module.kv_b_proj) if device is None else device
    rank, use_layernorm = _rank(site, saved), saved.config.use_layernorm
    with torch.random.fork_rng(devices=[]), torch.device(device):  # constructors draw random numbers
        return LearnedKVSplice(site.kv_lora_rank, rank, use_layernorm=use_layernorm, device=device, dtype=site.dtype)


def _shapes_after_patch(model: nn.Module, saved: _Saved, chosen: list[MLASite]) -> dict[str, torch.Size]:
    """The shapes that patching `model` with the saved settings would make.

    Raises:
        CheckpointError: the settings do not fit the model.
    """
    shapes: dict[str, torch.Size] = {}
    try:
        for site in chosen:
            splice = _empty_splice(site, saved, device="meta")
            shapes |= {key_of(site.layer_idx, name): tensor.shape for name, tensor in splice.state_dict().items()}
            if saved.config.is_packed:
                row = torch.Size([splice.rank + site.qk_rope_head_dim])
                sizes = {"widths": row, "scales": row, "centres": row, "sigmas": torch.Size([splice.rank])}
                shapes |= {key_of(site.layer_idx, f"codec.{name}"): size for name, size in sizes.items()}
    except ConfigError as error:
        raise CheckpointError(f"The saved splice does not fit this {type(model).__name__}: {error}") from error
    return shapes


def _require_fit(needed: dict[str, torch.Size], tensors: dict[str, torch.Tensor], directory: Path) -> None:
    found = {name: tensor.shape for name, tensor in tensors.items()}
    wrong = [
        f"{name}: saved {tuple(found[name]) if name in found else 'nothing'}, "
        f"the model needs {tuple(needed[name]) if name in needed else 'nothing'}"
        for name in sorted(needed.keys() | found.keys())
        if needed.get(name) != found.get(name)
    ]
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise CheckpointError(
            f"The splice in {directory} was made for other shapes than this model's: {'; '.join(wrong[:3])}{more}. "
            "Load it into the base model it was made for."
        )


def _read(directory: Path) -> _Saved:
    """What the two files of a folder hold, checked against each other.

    Raises:
        CheckpointError: a file is missing, damaged, or of a newer schema.
    """
    description = _read_description(directory / CONFIG_NAME)
    config = _read_config(directory / CONFIG_NAME, description)
    layers = _read_layers(directory / CONFIG_NAME, description)
    return _Saved(config, layers, _read_weights(directory / WEIGHTS_NAME, description["weights_sha256"]))


def _read_description(path: Path) -> dict[str, Any]:
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"No saved splice at {path.parent}: {error}. It takes the files of save_kvsplice."
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: it is not JSON ({error}). Save the splice again.") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise CheckpointError(f'{path} is not a saved splice: "format" should be "{FORMAT}".')
    version = description.get("schema_version")
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise CheckpointError(
            f"{path} has schema version {version!r}; this release reads up to {SCHEMA_VERSION}. Upgrade kvsplice_hf."
        )
    missing = sorted({"config", "layers", "model_type", "weights_sha256"} - set(description))
    if missing:
        raise CheckpointError(f"{path} is damaged: it lacks {missing}. Save the splice again.")
    return description


def _read_config(path: Path, description: dict[str, Any]) -> KVSpliceConfig:
    try:
        return KVSpliceConfig.from_dict(description["config"])
    except (ConfigError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} holds settings that cannot be used: {error}") from error


def _read_layers(path: Path, description: dict[str, Any]) -> dict[int, dict[str, Any]]:
    try:
        layers = {int(layer_idx): dict(sizes) for layer_idx, sizes in description["layers"].items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f'{path} is damaged: "layers" cannot be read ({error}). Save the splice again.'
        ) from error
    for layer_idx, sizes in layers.items():
        if any(type(sizes.get(name)) is not int for name in ("kv_lora_rank", "rank")):
            raise CheckpointError(f"{path} is damaged: the sizes of layer {layer_idx} are {sizes}. Save it again.")
    return layers


def _read_weights(path: Path, sha256: str) -> dict[str, torch.Tensor]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"The weights of the splice cannot be read: {error}.") from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise CheckpointError(
            f"{path} is truncated or was changed: its SHA-256 is {found}, {CONFIG_NAME} says {sha256}. "
            "Copy both files again."
        )
    try:
        return safetensors.torch.load(content)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}. Save the splice again.") from error
