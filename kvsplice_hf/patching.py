"""`patch_model_with_kvsplice` and `unpatch_model`: everything that changes a model, and the way back."""

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from kvsplice_hf import upstream
from kvsplice_hf.cache.layers import RowGeometry
from kvsplice_hf.cache.pages import init_continuous_batching
from kvsplice_hf.calibration.auto import auto_calibrate, own_text
from kvsplice_hf.calibration.calibrator import KVSpliceCalibrator
from kvsplice_hf.calibration.collect import predicts
from kvsplice_hf.calibration.fit import LayerFit, write_fit_
from kvsplice_hf.calibration.holdout import divergence, log_probabilities
from kvsplice_hf.code.projection import LearnedKVSplice, initialise_, normal_tensors
from kvsplice_hf.config import KVSpliceConfig
from kvsplice_hf.errors import ConfigError, FoldingError, PatchStateError, UnsupportedError
from kvsplice_hf.patch.attention import (
    SITE_ATTRIBUTE,
    WRAPPED_ATTENTION,
    PatchedSite,
    carry_state,
    enter_attention,
    expand_spliced_kv,
    foldable_weight,
    leave_attention,
    register_attention,
    unfoldable_message,
    wrapped_name,
)
from kvsplice_hf.patch.layers import MLASite, effective_weight, find_mla_sites
from kvsplice_hf.patch.saving import save_splice_of
from kvsplice_hf.patch.state import ModelPatch, find_patch, is_patched, models_around, patched_modules, patched_sites
from kvsplice_hf.patch.state import splice_disabled as splice_disabled  # where it used to be
from kvsplice_hf.weights.offload import execution_device


logger = logging.getLogger(__name__)

ModelT = TypeVar("ModelT", bound=nn.Module)

# On the decoders and models around the patched layers: what the patch changed there.
_SURROUNDINGS_ATTRIBUTE = "_kvsplice_surroundings"
_SAVE_METHOD = "save_pretrained"
# Arguments of `save_pretrained` that are for the upload.
_HUB_ARGUMENTS = ("commit_message", "create_pr", "max_shard_size", "private", "revision", "token")


@dataclass
class _Surroundings:
    """What the patch changed on a model of transformers around patched layers, kept there.

    Attributes:
        hooks: of the decoder that runs the layers: before its forward, and before weights are loaded into it.
        keys_to_ignore_on_save: `_keys_to_ignore_on_save` before the patch, where it was changed.
    """

    hooks: list[RemovableHandle] = field(default_factory=list)
    keys_to_ignore_on_save: tuple[Any] | None = None


def patch_model_with_kvsplice(
    model: ModelT,
    config: KVSpliceConfig | None = None,
    *,
    compression_ratio: float | None = None,
    rank: int | None = None,
    bytes_per_token: float | None = None,
    bits: float | None = None,
    layers: str | Sequence[int] | None = None,
    layer_pattern: str | None = None,
    use_layernorm: bool = False,
    calibration: Any = None,
    tokenizer: Any = None,
) -> ModelT:
    """Put a KVSplice projection on the MLA layers of a loaded model, in place.

    From then on the cache of those layers holds codes instead of latents, with or without a cache the model computes
    with what is left after the projection, and `layer.self_attn.kvsplice` holds the parameters. Only this instance
    changes; `unpatch_model` undoes it exactly.

    Args:
        model: a model of transformers with Multi-head Latent Attention.
        config: the settings; the keyword arguments below are short for some of its fields and override it.
        compression_ratio: spliced rank over latent rank, in (0, 1].
        rank: the spliced rank.
        bytes_per_token: all bytes per token and layer on average, in packed codes. With no budget given, a quarter of
            what the stock cache takes in bf16.
        bits: the same as bits per number of the stock row.
        layers: "all", "last:n", or a list of cache layer indices.
        layer_pattern: dotted path of the list of layers ("transformer.h").
        use_layernorm: LayerNorm on the code.
        calibration: what the projection is fitted to: a `KVSpliceCalibrator`, the path of its saved statistics, token
            ids, texts, a data set (see `KVSpliceCalibrator.collect`), or "auto": varied text if there is a tokenizer
            (the source "varied" of `kvsplice_hf.text`), otherwise text that the model writes itself. None
            means "auto" for packed codes; for `compression_ratio` and `rank` the weights alone, which is a poor guess.
        tokenizer: for calibration on texts.

    Returns:
        `model` itself.

    Raises:
        NotMLAError: no MLA layer was found, or `layer_pattern` names none.
        TransformersTooOldError: the installed transformers does not cache latents for this model.
        UpstreamChangedError: the installed transformers runs this model in a way that this package does not know.
        PatchStateError: the model is already patched.
        ConfigError: a setting is out of range, or does not fit the model.
        FoldingError: `attention="absorbed"` and a `kv_b_proj` that cannot be folded.
        UnsupportedError: `attention="absorbed"` and an attention function it cannot stand in for.
        CalibrationError: the calibration text or statistics cannot be used, or are too few for the rank.

    Whatever is raised, the model is as it was.

    Example:
        >>> patch_model_with_kvsplice(model, bytes_per_token=193, tokenizer=tokenizer)
        >>> model.generate(**inputs, max_new_tokens=64)
    """
    budget = {"compression_ratio": compression_ratio, "rank": rank, "bytes_per_token": bytes_per_token, "bits": bits}
    config = _with_overrides(config, budget, layers, layer_pattern, use_layernorm)
    sites = _sites_to_patch(model, config)
    fits = _fits(model, sites, config, calibration, tokenizer)
    splices = _make_splices(sites, config, fits)
    _apply(model, sites, splices, config)
    return model


def patch_with_splices(model: nn.Module, config: KVSpliceConfig, splices: dict[int, LearnedKVSplice]) -> None:
    """Patch with projections that are there already, by cache layer index (a saved splice, say).

    Raises: as `patch_model_with_kvsplice`.
    """
    _apply(model, _sites_to_patch(model, config), splices, config)


def _sites_to_patch(model: nn.Module, config: KVSpliceConfig) -> list[MLASite]:
    """The sites to patch, after all checks that need no calibration."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"`model` is a {type(model).__name__}; it must be a loaded model.")
    if is_patched(model):
        raise PatchStateError(
            "The model is already patched with KVSplice. For other settings, call unpatch_model(model) first."
        )
    upstream.warn_if_newer_than_tested()
    sites = _select_sites(find_mla_sites(model, config.layer_pattern), config)
    for site in sites:
        _read_forward(site, config)
    _check_attention(sites, config)
    return sites


def _read_forward(site: MLASite, config: KVSpliceConfig) -> upstream.ForwardArguments:
    return upstream.read_forward(site.name, site.module, needs_attention_by_name=config.attention != "expanded")


def unpatch_model(model: ModelT) -> ModelT:
    """Undo `patch_model_with_kvsplice`. The model's own tensors were never touched; its logits are bit-identical again.

    Returns:
        `model` itself.

    Raises:
        PatchStateError: the model is not patched.
    """
    find_patch(model)
    for module in model.modules():
        if SITE_ATTRIBUTE in vars(module):
            _restore_module(module)
    _restore_surroundings(model)
    return model


def _with_overrides(config: KVSpliceConfig | None, budget: dict[str, Any], *values: Any) -> KVSpliceConfig:
    layers, layer_pattern, use_layernorm = values
    changes: dict[str, Any] = {"layers": layers, "layer_pattern": layer_pattern, "use_layernorm": use_layernorm or None}
    changes = {name: value for name, value in changes.items() if value is not None}
    if any(value is not None for value in budget.values()):  # replaces the config's budget, whatever form that had
        changes |= budget
    if config is None:
        return KVSpliceConfig(**changes)
    if not isinstance(config, KVSpliceConfig):
        raise ConfigError(f"`config` is a {type(config).__name__}; it must be a KVSpliceConfig.")
    return replace(config, **changes)


def _select_sites(sites: list[MLASite], config: KVSpliceConfig) -> list[MLASite]:
    """The sites to patch: those chosen by `layers`, and those that expand a chosen one's latent."""
    chosen = config.select_layers(tuple(site.layer_idx for site in sites if site.stores_latent))
    return [site for site in sites if (site.source or site).layer_idx in chosen]


def _check_attention(sites: list[MLASite], config: KVSpliceConfig) -> None:
    for site in sites:
        base = site.module.config._attn_implementation
        absorbable = wrapped_name(base) is not None
        if config.attention == "absorbed" and not absorbable:
            raise UnsupportedError(
                f'attention="absorbed" cannot stand in for the attention function {base!r} of {site.name}. Load the '
                f'model with attn_implementation set to one of {WRAPPED_ATTENTION}, or use attention="expanded".'
            )
        if config.attention == "absorbed" and foldable_weight(site.module.kv_b_proj) is None:
            raise FoldingError(f"{site.name}: {unfoldable_message(site.module.kv_b_proj)}")
    base = sites[0].module.config._attn_implementation
    if config.attention == "auto" and wrapped_name(base) is None:
        logger.warning(
            "The model uses the attention function %r, which only the expanded path can feed: the cache is compressed, "
            'but every step decodes all of it. Load the model with attn_implementation="sdpa" to decode on the codes.',
            base,
        )


def _fits(
    model: nn.Module, sites: list[MLASite], config: KVSpliceConfig, calibration: Any, tokenizer: Any
) -> dict[int, LayerFit]:
    """What calibration found for each layer; nothing where the weights alone decide."""
    if calibration is None and not config.is_packed:
        if config.init == "svd" and config.compression_ratio != 1.0:
            logger.warning(
                "No calibration: the projection keeps what the weights of kv_b_proj read most, which says little about "
                "what matters. On real weights half the rank chosen in this way multiplied the perplexity by 97 "
                '(docs/calibration.md). Pass calibration="auto", or text and tokenizer.'
            )
        return {}
    stores = [site for site in sites if site.stores_latent]
    for site in stores:  # weights that are missing or damaged are named before the model is run
        effective_weight(site)
    if isinstance(calibration, (str, Path)) and str(calibration).endswith(".safetensors"):
        calibration = KVSpliceCalibrator.load(calibration)
    if not isinstance(calibration, KVSpliceCalibrator):
        calibrator = KVSpliceCalibrator(model, layer_pattern=config.layer_pattern, sink_tokens=config.sink_tokens)
        if calibration is None or (isinstance(calibration, str) and calibration == "auto"):
            auto_calibrate(model, calibrator, tokenizer, lambda: _own_text(model, config))
        else:
            calibrator.collect(calibration, tokenizer=tokenizer)
        calibration = calibrator
    calibration.require_model(stores, model)
    if config.is_packed and config.allocation == "auto" and calibration.holdout and predicts(model):
        return _better_allocation(model, sites, config, calibration)
    return calibration.fit(config, [site.layer_idx for site in stores])[0]


def _better_allocation(
    model: nn.Module, sites: list[MLASite], config: KVSpliceConfig, calibrator: KVSpliceCalibrator
) -> dict[int, LayerFit]:
    """Bytes that layers compete for, unless giving each the same loses less on text that was held out."""
    layers = [site.layer_idx for site in sites if site.stores_latent]
    stock = log_probabilities(model, calibrator.holdout)
    fits, losses = {}, {}
    for allocation in ("global", "layer"):
        fits[allocation] = calibrator.fit(replace(config, allocation=allocation), layers)[0]
        _apply(model, sites, _make_splices(sites, config, fits[allocation]), config)
        try:
            losses[allocation] = divergence(stock, log_probabilities(model, calibrator.holdout))
        finally:
            unpatch_model(model)
    best = min(losses, key=lambda allocation: losses[allocation])
    logger.info("Divergence on held-out text, nats per token: %s. Taken: %s.", losses, best)
    return fits[best]


def _own_text(model: Any, config: KVSpliceConfig) -> list[dict[str, torch.Tensor]]:
    """Text the model writes, faster than unpatched: at full rank the splice changes nothing but the speed."""
    exact = KVSpliceConfig(compression_ratio=1.0, init="identity", layer_pattern=config.layer_pattern)
    patch_model_with_kvsplice(model, exact)
    try:
        return own_text(model)
    finally:
        unpatch_model(model)


def _geometry(site: MLASite, config: KVSpliceConfig) -> RowGeometry:
    splice, sinks = site.module.kvsplice, config.sink_tokens
    if site.sliding_window is not None:
        # Within the window, how many keys a query sees tells its rank in the sequence only up to the window's size.
        sinks = min(sinks, max(site.sliding_window - 1, 0))
    packed = splice.codec.row_bytes if splice.codec is not None else None
    return RowGeometry(site.kv_lora_rank, splice.rank, site.qk_rope_head_dim, sinks, packed)


def _make_splices(
    sites: list[MLASite], config: KVSpliceConfig, fits: dict[int, LayerFit]
) -> dict[int, LearnedKVSplice]:
    with normal_tensors():
        return {site.layer_idx: _make_splice(site, config, fits) for site in sites if site.stores_latent}


def _make_splice(site: MLASite, config: KVSpliceConfig, fits: dict[int, LayerFit]) -> LearnedKVSplice:
    module, fit = site.module, fits.get(site.layer_idx)
    rank = config.rank_for(site.kv_lora_rank, site.name) if fit is None else fit.rank
    device = execution_device(module.kv_b_proj)
    # The constructors of linear layers draw random numbers, which are overwritten right away. A patch must not change
    # what a seeded program draws next.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        splice = LearnedKVSplice(
            site.kv_lora_rank, rank, use_layernorm=config.use_layernorm, device=device, dtype=site.dtype
        )
    if fit is None:
        weight = effective_weight(site, device) if config.init == "svd" else None
        initialise_(splice, config.init, weight)
    else:
        write_fit_(splice, fit)
    return splice.train(module.training)


def _apply(model: nn.Module, sites: list[MLASite], splices: dict[int, LearnedKVSplice], config: KVSpliceConfig) -> None:
    """Change the model. Everything that can fail on account of the caller has been checked before."""
    register_attention()
    _restore_surroundings(model)  # of a patch whose layers were unpatched without the models around them
    patch = ModelPatch(config)
    for site in sites:
        owner, module = site.source or site, site.module
        if site.stores_latent:
            module.kvsplice = splices[site.layer_idx]
        base = module.config._attn_implementation
        name = None if config.attention == "expanded" else wrapped_name(base)
        state = PatchedSite(
            site.name,
            patch,
            owner.module,
            site.stores_latent,
            _geometry(owner, config),
            site.num_heads,
            config.attention,
            _read_forward(site, config),
            base if name not in (None, base) else None,
            module.config if name is not None else None,
        )
        state.hooks.append(module.register_forward_pre_hook(enter_attention, with_kwargs=True))
        state.hooks.append(module.register_forward_hook(leave_attention))
        setattr(module, SITE_ATTRIBUTE, state)
        # A partial, not a bound method: pickle would look a method up by name on the module, and find the stock one.
        module.expand_kv = functools.partial(expand_spliced_kv, module)
        if name is not None:
            module.config._attn_implementation_internal = name
    _change_surroundings(model, sites, patch)


def _restore_module(module: Any) -> None:
    state: PatchedSite = vars(module).pop(SITE_ATTRIBUTE)
    for hook in state.hooks:
        hook.remove()
    before = state.attention_before
    # A function that was chosen after the patch stays chosen.
    if before is not None and module.config._attn_implementation == wrapped_name(before):
        module.config._attn_implementation_internal = before
    del module.expand_kv
    if "kvsplice" in module._modules:
        del module.kvsplice


def _change_surroundings(model: nn.Module, sites: list[MLASite], patch: ModelPatch) -> None:
    """On the models of transformers around the layers: state for checkpointed layers, saving, continuous batching."""
    decoders = {id(decoder) for decoder in _decoders(model, sites)}
    for around in models_around(model):
        changed = _Surroundings()
        if id(around) in decoders:
            hook = functools.partial(carry_state, patch)
            changed.hooks.append(around.register_forward_pre_hook(hook, with_kwargs=True))
            changed.hooks.append(around.register_load_state_dict_pre_hook(_warn_without_splice))
        keys = {key for key in around.state_dict() if ".kvsplice." in key}
        if keys:  # the base model's folder stays loadable by stock transformers
            changed.keys_to_ignore_on_save = (around._keys_to_ignore_on_save,)
            around._keys_to_ignore_on_save = set(around._keys_to_ignore_on_save or ()) | keys
            setattr(around, _SAVE_METHOD, functools.partial(_save_pretrained, around))
        if hasattr(around, upstream.BATCHING_METHOD):
            setattr(around, upstream.BATCHING_METHOD, functools.partial(_init_continuous_batching, around))
        setattr(around, _SURROUNDINGS_ATTRIBUTE, changed)


def _restore_surroundings(model: nn.Module) -> None:
    around: Any
    for around in model.modules():
        changed: _Surroundings | None = vars(around).pop(_SURROUNDINGS_ATTRIBUTE, None)
        if changed is None:
            continue
        for hook in changed.hooks:
            hook.remove()
        save_splice_with_model(around, changed)
        vars(around).pop(upstream.BATCHING_METHOD, None)
        upstream.drop_persistent_manager(around)  # it has pages of our rows


def save_splice_with_model(around: Any, changed: _Surroundings | None = None) -> None:
    """Let `save_pretrained` of a model around patched layers write the splice like any other part of it."""
    changed = vars(around)[_SURROUNDINGS_ATTRIBUTE] if changed is None else changed
    if changed.keys_to_ignore_on_save is not None:
        (around._keys_to_ignore_on_save,) = changed.keys_to_ignore_on_save
        changed.keys_to_ignore_on_save = None
        vars(around).pop(_SAVE_METHOD, None)


def _save_pretrained(
    around: Any,
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: dict[str, torch.Tensor] | None = None,
    push_to_hub: bool = False,
    *rest: Any,
    **kwargs: Any,
) -> None:
    """`save_pretrained` around patched layers: the base model, as stock transformers loads it, and the splice.

    The splice is written beside it, in the files of `save_kvsplice`. A folder with the name that the `Trainer` gives
    its checkpoints gets the splice among the weights as well: those are all that it resumes from.
    """
    # Of a file in the place of the folder, and of a model whose layers were unpatched alone, transformers sees to it.
    spliced = is_patched(around) and not Path(save_directory).is_file()
    if spliced:
        save_splice_of(around, save_directory, state_dict, is_main_process=is_main_process)
    before = around._keys_to_ignore_on_save
    if spliced and Path(save_directory).name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"):
        (around._keys_to_ignore_on_save,) = vars(around)[_SURROUNDINGS_ATTRIBUTE].keys_to_ignore_on_save
    try:
        type(around).save_pretrained(
            around, save_directory, is_main_process, state_dict, push_to_hub and not spliced, *rest, **kwargs
        )
    finally:
        around._keys_to_ignore_on_save = before
    if push_to_hub and spliced and is_main_process:  # all of a folder, and not only what transformers wrote itself
        hub = {name: value for name, value in kwargs.items() if name in _HUB_ARGUMENTS}
        around.push_to_hub(kwargs.get("repo_id", Path(save_directory).name), **hub)


def _warn_without_splice(decoder: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Before weights are loaded into a decoder with patched layers: say so if they are the base model's alone."""
    paths = [name for (name, _), _ in patched_modules(decoder)]
    loaded = [name for name in paths if f"{prefix}{name}.kv_b_proj.weight" in state_dict]
    if loaded and not any(".kvsplice." in key for key in state_dict):
        logger.warning(
            "Weights that hold no splice are loaded into a patched model (%s and %d more layers): the splice in memory "
            "stays as it is, trained or not. If one was saved with them, load it as well: load_kvsplice(model, "
            "folder).",
            loaded[0],
            len(loaded) - 1,
        )


def _decoders(model: nn.Module, sites: list[MLASite]) -> list[nn.Module]:
    """The innermost models of transformers around the sites: what runs their layers one after the other."""
    modules = [(path, module) for path, module in model.named_modules() if isinstance(module, PreTrainedModel)]
    found = {}
    for site in sites:
        around = [(len(path), module) for path, module in modules if not path or site.name.startswith(f"{path}.")]
        if around:
            decoder = max(around, key=lambda item: item[0])[1]
            found[id(decoder)] = decoder
    return list(found.values())


def _init_continuous_batching(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return init_continuous_batching(model, patched_sites(model), *args, **kwargs)
