"""`patch_model_with_kvsplice`: settings, then layers, then splices, then the patch."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from kvsplice_hf.calibration.layers import choose_layers
from kvsplice_hf.calibration.splices import splices_for
from kvsplice_hf.code.heads import HeadSplices
from kvsplice_hf.config import KVSpliceConfig
from kvsplice_hf.errors import ConfigError
from kvsplice_hf.patch.apply import apply_splices, sites_to_patch
from kvsplice_hf.patch.families import AttentionSite
from kvsplice_hf.weights.processes import failing_together
from kvsplice_hf.weights.sharding import is_spread


logger = logging.getLogger(__name__)

ModelT = TypeVar("ModelT", bound=nn.Module)


def patch_model_with_kvsplice(
    model: ModelT,
    config: KVSpliceConfig | None = None,
    *,
    compression_ratio: float | None = None,
    rank: int | None = None,
    bytes_per_token: float | None = None,
    bits: float | None = None,
    compression: float | None = None,
    keys: str | None = None,
    values: str | None = None,
    layers: str | Sequence[int] | None = None,
    layer_pattern: str | None = None,
    use_layernorm: bool = False,
    calibration: Any = None,
    tokenizer: Any = None,
) -> ModelT:
    """Put KVSplice projections on the attention layers of a loaded model, in place.

    From then on the cache of those layers holds codes instead of latents, or of keys and values. With or without a
    cache the model computes with what is left after the projection, and `layer.self_attn.kvsplice` holds the
    parameters. Only this instance changes; `unpatch_model` undoes it exactly.

    Args:
        model: a model of transformers with Multi-head Latent Attention, or with ordinary attention, whose budgets are
            bytes or bits. Where it is spread over processes, all of them must call this, with the same arguments.
        config: the settings; the keyword arguments below are short for some of its fields and override it.
        compression_ratio: spliced rank over latent rank, in (0, 1].
        rank: the spliced rank.
        bytes_per_token: all bytes per token and layer on average, in packed codes.
        bits: the same as bits per number of the stock row.
        compression: the same as how many times smaller than the stock cache in bf16. With no budget given, 4.
        keys: "unrotated", "rotated", or "exact", see `KVSpliceConfig`.
        values: "coded" or "exact", of ordinary attention.
        layers: "all", "last:n", "fisher:n" (the n that cost least by calibration), or a list of cache layer indices.
        layer_pattern: dotted path of the list of layers ("transformer.h").
        use_layernorm: LayerNorm on the code.
        calibration: what the projection is fitted to: a `KVSpliceCalibrator`, the path of its saved statistics, token
            ids, texts, a data set (see `KVSpliceCalibrator.collect`), or "auto": varied text if there is a tokenizer
            (the source "varied" of `kvsplice_hf.text`), otherwise text that the model writes itself. None
            means "auto" for packed codes and for splines; otherwise, with `compression_ratio` or `rank`, the weights
            alone, which is a poor guess. For splines also a `ModelGeometry`, or the path of its file.
        tokenizer: for calibration on texts.

    Returns:
        `model` itself.

    Raises:
        NotMLAError: no layer that can be patched was found, or `layer_pattern` names none.
        TransformersTooOldError: the installed transformers does not cache latents for this model.
        UpstreamChangedError: the installed transformers runs this model in a way that this package does not know.
        PatchStateError: the model is already patched.
        ConfigError: a setting is out of range, or does not fit the model.
        FoldingError: `attention="absorbed"` and a `kv_b_proj` that cannot be folded.
        UnsupportedError: an attention function that cannot be stood in for, with `attention="absorbed"` or ordinary
            attention.
        CalibrationError: the calibration text or statistics cannot be used, or are too few for the rank.
        CheckpointError: the file of a geometry cannot be used, or is of another model.

    Whatever is raised, the model is as it was.

    Examples:
        >>> patch_model_with_kvsplice(model, bytes_per_token=193, tokenizer=tokenizer)
        >>> model.generate(**inputs, max_new_tokens=64)
    """
    budget = {"compression_ratio": compression_ratio, "rank": rank, "bytes_per_token": bytes_per_token, "bits": bits}
    budget |= {"compression": compression}
    others = {"layers": layers, "layer_pattern": layer_pattern, "use_layernorm": use_layernorm or None}
    config = _with_overrides(config, budget, others | {"keys": keys, "values": values})
    with failing_together(isinstance(model, nn.Module) and is_spread(model.modules())):
        sites = sites_to_patch(model, config)
    if config.cheapest_layers is not None:
        config, calibration = choose_layers(model, sites, config, calibration, tokenizer)
        sites = sites_to_patch(model, config)
    splices = splices_for(model, sites, config, calibration, tokenizer)
    apply_splices(model, sites, splices, config)
    _warn_of_unused_budget(sites, splices, config)
    return model


def _warn_of_unused_budget(sites: list[AttentionSite], splices: dict[int, Any], config: KVSpliceConfig) -> None:
    """Say so where more bytes were given than rows can take: no number is stored in more than bf16."""
    if config.bytes_per_token is None and config.bits is None:
        return
    stores = [site for site in sites if site.stores_latent]
    dims = [site.whole_row_dim for site in stores]
    # Where heads are divided among processes, those of the others take about as much as those here.
    shares = [len(site.all_parts) / len(site.parts) for site in stores]
    rows = [n * size for n, site in zip(shares, stores, strict=True) for size in _row_sizes(splices[site.layer_idx])]
    # Every number in bf16, and two gains of each head.
    largest = 2 * max(dims) + 2 * max(len(site.all_parts) for site in stores)
    if not rows or config.row_budget(max(dims)) <= largest:
        return
    taken = sum(rows) / len(rows) + sum(map(config.exact_bytes, dims)) / len(dims)
    logger.warning(
        "The budget of %s is more than rows can take: with every number in bf16, a row has at most %d bytes. Rows "
        "take %.1f bytes per token and layer now, %.1f with the exact first tokens. To compress, give less.",
        f"bytes_per_token={config.bytes_per_token}" if config.bits is None else f"bits={config.bits}",
        largest,
        sum(rows) / len(rows),
        taken,
    )


def _row_sizes(splice: Any) -> list[int]:
    """Bytes of the rows of a layer, if they are packed."""
    if isinstance(splice, HeadSplices):
        return [sum(splice.row_bytes)]
    return [] if splice.codec is None else [splice.codec.row_bytes]


def _with_overrides(config: KVSpliceConfig | None, budget: dict[str, Any], others: dict[str, Any]) -> KVSpliceConfig:
    changes = {name: value for name, value in others.items() if value is not None}
    if any(value is not None for value in budget.values()):  # replaces the config's budget, whatever form that had
        changes |= budget
    if config is None:
        return KVSpliceConfig(**changes)
    if not isinstance(config, KVSpliceConfig):
        raise ConfigError(f"`config` is a {type(config).__name__}; it must be a KVSpliceConfig.")
    return replace(config, **changes)
