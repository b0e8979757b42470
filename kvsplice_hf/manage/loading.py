"""Loads saved splices (`code.files`) into a model, patched or not."""

import json
import logging
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from kvsplice_hf.code.bent import BentKeyProjection, new_splice
from kvsplice_hf.code.codecs import Codec, codec_class
from kvsplice_hf.code.files import CONFIG_NAME, SavedSplices, codec_of, key_of, read_splice_files
from kvsplice_hf.code.heads import HeadKey, PartKey, joined
from kvsplice_hf.code.initialise import normal_tensors
from kvsplice_hf.code.keys import KeyProjection
from kvsplice_hf.code.projection import LearnedKVSplice
from kvsplice_hf.config import KVSpliceConfig
from kvsplice_hf.errors import CheckpointError, ConfigError
from kvsplice_hf.patch.apply import apply_splices, sites_to_patch
from kvsplice_hf.patch.base import BASE_KEY, warn_of_other_base
from kvsplice_hf.patch.families import AttentionSite
from kvsplice_hf.patch.sites import find_sites
from kvsplice_hf.patch.state import find_patch, is_patched, patched_sites, splice_parts_of
from kvsplice_hf.weights.offload import execution_device, write_all
from kvsplice_hf.weights.processes import failing_together
from kvsplice_hf.weights.sharding import is_spread, spread_like


logger = logging.getLogger(__name__)

ModelT = TypeVar("ModelT", bound=nn.Module)


def load_kvsplice(model: ModelT, directory: str | Path) -> ModelT:
    """Load a splice saved by `save_kvsplice`.

    An unpatched model is patched with the saved settings. On a patched one the parameters are replaced; it must splice
    the same layers to the same ranks, and keeps its other settings. A warning says where those differ from the saved
    ones, and where the splice was saved on a model with other weights (to see that, all weights are read). Where the
    model is spread over processes, all of them must call this; of a model with ordinary attention each takes its heads.

    Returns:
        `model` itself.

    Raises:
        CheckpointError: a file is missing, damaged, of a newer schema, or for other shapes. The model is as it was.
        NotMLAError: the model has no layer that can be patched.

    Examples:
        >>> model = load_kvsplice(model, "my-splice")
    """
    directory = Path(directory)
    load = _replace if is_patched(model) else _patch
    first = load(model, directory)
    warn_of_other_base(model, first.module, _saved_base(directory), directory)
    return model


def _replace(model: nn.Module, directory: Path) -> AttentionSite:
    """Load the splice in `directory` into a patched model; gives the first of its layers."""
    with failing_together(is_spread(model.modules())):
        saved, sites = read_splice_files(directory), [site for site, _ in patched_sites(model)]
        _require_fit(_shapes_of_patched(model), _of_process(saved, sites), directory)
        codecs = {part: codec_of(saved, part, directory) for site in sites for part in site.parts}
        _require_same_rows(model, codecs, directory)
    with normal_tensors():
        for part, splice in splice_parts_of(model).items():
            _set_parameters(splice, saved.tensors, part, codecs[part])
    _tell_of_replacement(model, saved.config, directory)
    return sites[0]


def _patch(model: nn.Module, directory: Path) -> AttentionSite:
    """Patch a model with the splice in `directory`; gives the first of its layers."""
    with failing_together(is_spread(model.modules())), normal_tensors():
        saved = read_splice_files(directory)
        chosen = _chosen_sites(model, saved.config)
        _require_fit(_shapes_after_patch(model, saved, chosen), _of_process(saved, chosen), directory)
        splices = {}
        for site in chosen:
            parts = {part: _empty_splice(site, part, saved) for part in site.parts}
            for part, splice in parts.items():
                _set_parameters(splice, saved.tensors, part, codec_of(saved, part, directory))
            splices[site.layer_idx] = joined(parts).train(site.module.training)
        apply_splices(model, sites_to_patch(model, saved.config), splices, saved.config)
    return chosen[0]


def require_fit(model: nn.Module, directory: str | Path) -> list[AttentionSite]:
    """Check that the splice in a folder fits a model, which may be without weights (meta device).

    Returns:
        The layers that it is for.

    Raises:
        CheckpointError: a file is missing, damaged, of a newer schema, or for other shapes.
        NotMLAError: the model has no layer that can be patched.
    """
    saved = read_splice_files(Path(directory))
    chosen = _chosen_sites(model, saved.config)
    _require_fit(_shapes_after_patch(model, saved, chosen), _of_process(saved, chosen), Path(directory))
    for site in chosen:
        for part in site.parts:
            codec_of(saved, part, Path(directory))
    return chosen


def _of_process(saved: SavedSplices, sites: list[AttentionSite]) -> dict[str, torch.Tensor]:
    """The saved tensors, but for those of heads that tensor parallelism leaves to other processes."""
    elsewhere = tuple(key_of(part, "") for site in sites for part in set(site.all_parts) - set(site.parts))
    return {name: tensor for name, tensor in saved.tensors.items() if not name.startswith(elsewhere)}


def _saved_base(directory: Path) -> str:
    """The fingerprint of the base model in a folder that was read before; empty in those of earlier releases."""
    return str(json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8")).get(BASE_KEY, ""))


def _tell_of_replacement(model: nn.Module, saved: KVSpliceConfig, directory: Path) -> None:
    """Say what was replaced on a patched model, and warn of saved settings that are not in force."""
    layers = [site.layer_idx for site, _ in patched_sites(model)]
    logger.info("The splices of layers %s were replaced by those in %s.", layers, directory)
    ours, theirs = find_patch(model)[1].config.to_dict(), saved.to_dict()
    names = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if names:
        logger.warning(
            "The model was patched already: it has the splice in %s now, but keeps its own settings, %s, where %s were "
            "saved. For the saved ones, call unpatch_model(model) first, then load.",
            directory,
            ", ".join(f"{name}={ours.get(name)!r}" for name in names),
            ", ".join(f"{name}={theirs.get(name)!r}" for name in names),
        )


def read_splices(directory: str | Path) -> dict[int, Any]:
    """The projections of a splice saved by `save_kvsplice`, by cache layer index, without the model.

    Raises:
        CheckpointError: a file is missing, damaged, or of a newer schema.
    """
    directory = Path(directory)
    saved = read_splice_files(directory)
    layers = saved.layers
    splices = {}
    for layer_idx, sizes in sorted(layers.items()):
        heads = sizes.get("kv_heads", 0)
        parts: list[PartKey] = [HeadKey(layer_idx, head) for head in range(heads)] if heads else [layer_idx]
        try:
            found = {part: _read_part(saved, part, directory) for part in parts}
        except (ConfigError, KeyError, RuntimeError) as error:
            raise CheckpointError(f"The splice of layer {layer_idx} in {directory} is damaged: {error}") from error
        splices[layer_idx] = joined(found).eval()
    return splices


def _read_part(saved: SavedSplices, part: PartKey, directory: Path) -> LearnedKVSplice:
    codec, weight = codec_of(saved, part, directory), saved.tensors[key_of(part, "compress.weight")]
    rank, latent_dim = weight.shape
    if not isinstance(part, HeadKey):
        sizes = saved.layers[part]
        if (rank, latent_dim) != (sizes["rank"], sizes["kv_lora_rank"]):
            raise ConfigError(f"its weights have the sizes {(rank, latent_dim)}, its description says {sizes}.")
    with torch.random.fork_rng(devices=[]):  # constructors draw random numbers
        keys = _empty_keys(saved, part, None, dtype=weight.dtype, device="cpu")
        predicted_from = _predicted_from(saved, part, rank, keys)
        splice = new_splice(saved.config, latent_dim, rank, predicted_from=predicted_from, dtype=weight.dtype)
        splice.keys = keys
    _set_parameters(splice, saved.tensors, part, codec)
    return splice


def _set_parameters(
    splice: LearnedKVSplice, tensors: dict[str, torch.Tensor], part: PartKey, codec: Codec | None
) -> None:
    before = splice.codec
    device = execution_device(splice.compress)
    splice.codec = None if codec is None else codec.to(device)
    if before is not None and splice.codec is not None:
        trained = any(isinstance(step, nn.Parameter) for step in before.steps)
        if before.reads_rows_of(splice.codec):  # an optimiser may hold its parameters
            splice.codec = before
        elif trained:  # and FSDP looks after those it knows
            before.become_like(splice.codec)
            splice.codec = before
    if splice.is_merged:  # what is folded would go on with the parameters of before
        splice.unmerge()
    held = splice.state_dict()
    write_all(splice, {name: spread_like(tensors[key_of(part, name)], old) for name, old in held.items()})
    splice.forget_identity()


def _require_same_rows(model: nn.Module, codecs: dict[PartKey, Codec | None], directory: Path) -> None:
    for site, patched in patched_sites(model):
        saved = [codecs[part] for part in site.parts]
        codec = saved[0]
        found = None if codec is None else sum(part.row_bytes for part in saved if part is not None)
        held = patched.splice.codec
        if codec is not None and held is not None and codec.kind != held.kind:
            raise CheckpointError(
                f"The splice in {directory} packs rows by the codec {codec.kind!r}, the patched model by "
                f"{held.kind!r}. Call unpatch_model(model) first, then load."
            )
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


def _chosen_sites(model: nn.Module, config: KVSpliceConfig) -> list[AttentionSite]:
    """The sites that store a latent and that the settings choose.

    Raises:
        CheckpointError: the settings do not fit the model.
    """
    sites = {site.layer_idx: site for site in find_sites(model, config.layer_pattern) if site.stores_latent}
    try:
        return [sites[layer_idx] for layer_idx in config.select_layers(tuple(sites))]
    except ConfigError as error:
        raise CheckpointError(f"The saved splice does not fit this {type(model).__name__}: {error}") from error


def _rank(site: AttentionSite, part: PartKey, saved: SavedSplices) -> int:
    """r of a part: from the settings, or, where rows are packed or were pruned, from the file."""
    sizes = saved.layers.get(site.layer_idx, {})
    if "pruned_from" in sizes:
        return sizes["rank"]
    if not saved.config.is_packed:
        return saved.config.rank_for(site.kv_lora_rank, site.name)
    weight = saved.tensors.get(key_of(part, "compress.weight"))
    return min(max(1, len(weight)), site.kv_lora_rank) if weight is not None and weight.dim() == 2 else 1


def _empty_splice(
    site: AttentionSite, part: PartKey, saved: SavedSplices, device: torch.device | str | None = None
) -> LearnedKVSplice:
    device = site.device if device is None else device
    rank = _rank(site, part, saved)
    with torch.random.fork_rng(devices=[]), torch.device(device):  # constructors draw random numbers
        keys = _empty_keys(saved, part, site.qk_rope_head_dim, dtype=site.dtype, device=device)
        predicted_from = _predicted_from(saved, part, rank, keys)
        splice = new_splice(
            saved.config, site.kv_lora_rank, rank, predicted_from=predicted_from, device=device, dtype=site.dtype
        )
        splice.keys = keys
    return splice


def _predicted_from(saved: SavedSplices, part: PartKey, rank: int, keys: KeyProjection | None) -> int:
    """How many numbers of a key's code latents are predicted from: all of them, or none."""
    weight = saved.tensors.get(key_of(part, "expand.weight"))
    predicts = keys is not None and weight is not None and weight.dim() == 2 and weight.shape[1] == rank + keys.rank
    return keys.rank if keys is not None and predicts else 0


def _empty_keys(
    saved: SavedSplices, part: PartKey, rope_dim: int | None, dtype: torch.dtype, device: torch.device | str
) -> KeyProjection | None:
    """A projection of keys of the saved rank, or None where the saved rows hold rotated keys.

    Args:
        saved: the splices.
        part: of the splices.
        rope_dim: P of the model, or None for that of the file.
        dtype, device: of the projection.
    """
    weight = saved.tensors.get(key_of(part, "keys.compress.weight"))
    if weight is None or weight.dim() != 2:
        return None
    size = weight.shape[1] if rope_dim is None else rope_dim
    knots = saved.tensors.get(key_of(part, "keys.bending.knots"))
    if knots is None:
        return KeyProjection(size, len(weight), dtype=dtype, device=device)
    return BentKeyProjection(size, len(weight), knots=saved.config.knots, dtype=dtype, device=device)


def _shapes_after_patch(model: nn.Module, saved: SavedSplices, chosen: list[AttentionSite]) -> dict[str, torch.Size]:
    """The shapes that patching `model` with the saved settings would make.

    Raises:
        CheckpointError: the settings do not fit the model.
    """
    shapes: dict[str, torch.Size] = {}
    try:
        for site, part in [(one, part) for one in chosen for part in one.parts]:
            splice = _empty_splice(site, part, saved, device="meta")
            shapes |= {key_of(part, name): tensor.shape for name, tensor in splice.state_dict().items()}
            if saved.config.is_packed or site.kv_heads:
                key_dim = site.qk_rope_head_dim if splice.keys is None else splice.keys.rank
                kind, row_dim = codec_class(saved.config.row_codec), splice.rank + key_dim
                names = (*kind.saved, *kind.saved_if_any)
                gained = splice.rank if saved.config.is_packed else 0  # plain numbers need none
                for name, size in zip(names, kind.saved_shapes(row_dim, gained), strict=True):
                    key = key_of(part, f"codec.{name}")
                    if name in kind.saved or key in saved.tensors:
                        shapes[key] = size
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
