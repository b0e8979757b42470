"""`ValuePruning`: a model keeps the keys of all tokens, and the values of those that attention has read most.

The interface is that of NVIDIA's kvpress: settings are an object, which is called with a model and gives a context.
"""

import contextlib
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.cache_utils import Cache, DynamicLayer

from kvsplice_hf import upstream
from kvsplice_hf.code.heads import PartKey
from kvsplice_hf.errors import CacheMismatchError, ConfigError, UnsupportedError
from kvsplice_hf.geometry import SplinePCA
from kvsplice_hf.patch.alone import computes_alone
from kvsplice_hf.patch.families import AttentionSite
from kvsplice_hf.patch.names import WRAPPED_ATTENTION
from kvsplice_hf.patch.sites import find_sites
from kvsplice_hf.patch.state import is_patched
from kvsplice_hf.retention.selection import SCORES, Budget
from kvsplice_hf.values.compression import geometry_of
from kvsplice_hf.values.function import NAME_PREFIX, register
from kvsplice_hf.values.layer import LayerPlan, ValuePrunedLayer


logger = logging.getLogger(__name__)

STRATEGIES = ("prune_first", "compress_first")


@dataclass(frozen=True)
class ValuePruning:
    """Prune the values in the cache of a model with ordinary attention.

    Each key head of each layer keeps the values of its own tokens: its first ones, its most recent ones, and those that
    its queries have attended to most. Softmax runs over the tokens that have values. The call that brings tokens (a
    prompt, say) sees all their values; those that lose are never written to the cache. As in H2O (arXiv 2306.14048),
    but for the keys, which stay.

    Args:
        keep: so many tokens of each sequence keep their values, the first and recent ones among them.
        share: this share of the tokens of each sequence, in place of `keep`.
        first: tokens at the beginning that always keep their values, and keep them exactly under compression.
        recent: tokens at the end that always keep them.
        scores: "sum", all attention that a token has got; "mean", that over the queries that could see it, which does
            not favour old tokens.
        geometries: code the values that are kept by these, from `fit_value_geometries`; None: as they come.
        strategy: "prune_first" (A): the call that brings a value reads it as it came, and what is left of it is coded.
            "compress_first" (B): the value is coded first, and the call reads what the code says.

    Raises:
        ConfigError: a setting that cannot be.

    Examples:
        >>> with ValuePruning(keep=391)(model):
        ...     model.generate(**inputs, max_new_tokens=64)
    """

    keep: int | None = None
    share: float | None = None
    first: int = 4
    recent: int = 32
    scores: str = "sum"
    geometries: Mapping[PartKey, SplinePCA] | None = None
    strategy: str = "prune_first"

    def __post_init__(self) -> None:
        self.budget.check()
        for name, value, known in (("scores", self.scores, SCORES), ("strategy", self.strategy, STRATEGIES)):
            if value not in known:
                raise ConfigError(f"`{name}` is {value!r}; value pruning takes one of {', '.join(known)}.")
        if self.geometries is None and self.strategy != STRATEGIES[0]:
            raise ConfigError(
                f"`strategy` is {self.strategy!r}, which says when values are coded, and there are no `geometries` to "
                "code them by. Fit some with `fit_value_geometries`, or leave `strategy` out."
            )

    @property
    def budget(self) -> Budget:
        """How many tokens keep their values."""
        return Budget(self.keep, self.share, self.first, self.recent)

    @contextlib.contextmanager
    def __call__(self, model: nn.Module) -> Iterator[None]:
        """Within this context the model prunes the values of the caches that it fills; afterwards it is as it was.

        A cache that was filled in here goes on in here, or in another context with the same `first` and `geometries`.

        Raises:
            ConfigError: `keep` is more than the model has positions, or geometries of another model.
            NotMLAError: the model has no attention layer that is known.
            UnsupportedError: a layer that cannot do without values: of latent attention, with a window only, with
                chunks, with keys and values of another layer, or that computes attention by itself; an attention
                function that cannot be stood in for; or the model is patched or in a context like this one already.
        """
        with self.on(_sites(model)):
            yield

    @contextlib.contextmanager
    def on(self, sites: Sequence[AttentionSite]) -> Iterator[None]:
        """The same for these sites, which are known to cache keys and values of their heads."""
        self._require_room(sites)
        plans = {site: self.plan_of(site) for site in sites}
        register()
        names: list[tuple[Any, str]] = []
        hooks = []
        try:
            for site, plan in plans.items():
                arguments = upstream.read_forward(site.name, site.module, expands=False)
                enter = functools.partial(_enter, site, plan, arguments)
                hooks.append(site.module.register_forward_pre_hook(enter, with_kwargs=True))
                leave = functools.partial(_leave, site)
                hooks.append(site.module.register_forward_hook(leave, with_kwargs=True))
                base = site.module.config._attn_implementation
                if not base.startswith(NAME_PREFIX):
                    names.append((site.module.config, base))
                    site.module.config._attn_implementation_internal = NAME_PREFIX + base
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for config, base in names:
                config._attn_implementation_internal = base

    def _require_room(self, sites: Sequence[AttentionSite]) -> None:
        positions = getattr(sites[0].module.config, "max_position_embeddings", None)
        if self.keep is not None and isinstance(positions, int) and self.keep > positions:
            raise ConfigError(
                f"`keep` is {self.keep}, and the model has {positions} positions, so that no value would ever be "
                "pruned. Give fewer."
            )

    def plan_of(self, site: AttentionSite) -> LayerPlan:
        """What is done with the values of a layer."""
        geometry = None if self.geometries is None else geometry_of(self.geometries, site)
        return LayerPlan(self.budget, self.scores, geometry, self.strategy == "compress_first")


def _sites(model: nn.Module) -> list[AttentionSite]:
    """The layers whose values can be pruned: all but those with a window."""
    if is_patched(model):
        raise UnsupportedError(
            "Value pruning cannot run on a patched model: a packed row holds keys and values of all heads side by "
            "side, and each head would let go of other ones. Call unpatch_model(model), and give `geometries` to "
            "compress the values that are kept."
        )
    found = find_sites(model)
    for site in found:
        reason = _refusal(site)
        if reason is not None:
            raise UnsupportedError(
                f"Value pruning cannot run on {site.name} ({type(site.module).__name__}): {reason} "
                "Models with ordinary attention that looks its function up by name can be pruned."
            )
    sites = [site for site in found if site.sliding_window is None]
    if not sites:
        raise UnsupportedError(
            f"All layers of {type(model).__name__} have sliding windows, which let go of keys and values by "
            "themselves. There is nothing to prune."
        )
    if len(sites) < len(found):
        logger.info("Layers with a sliding window keep all values of their window: %d.", len(found) - len(sites))
    return sites


def _refusal(site: AttentionSite) -> str | None:
    base = site.module.config._attn_implementation
    if not site.kv_heads:
        return "its keys and values are made from the same latent, so that one cannot go without the other."
    if computes_alone(type(site.module)):
        return "it computes attention by itself, so that no head can let go of values of its own."
    if site.chunked:
        return "its queries see the tokens of their own chunk only, which are not those with the highest scores."
    if site.source is not None:
        return f"it reads the keys and values of {site.source.name}, which would have to keep what both of them need."
    if str(base).startswith(NAME_PREFIX):
        return "it is in a context of value pruning already."
    if base not in WRAPPED_ATTENTION:
        return f"its attention function {base!r} cannot be stood in for; load it with one of {WRAPPED_ATTENTION}."
    return None


def _enter(
    site: AttentionSite,
    plan: LayerPlan,
    arguments: upstream.ForwardArguments,
    module: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Forward pre-hook of an attention module: put a layer of ours into its cache, and say what the call is to do."""
    if module.training:
        raise UnsupportedError("Value pruning is for inference, and the model is in training. Call model.eval().")
    cache = upstream.find_cache(args, kwargs)
    if cache is None:
        found = upstream.other_cache(arguments, args, kwargs)
        what = "no cache" if found is None else f"a {type(found).__name__}"
        raise UnsupportedError(
            f"Value pruning got {what} at {site.name}; there are values to prune in a `DynamicCache` only. Call the "
            "model with use_cache=True, or model.generate; generate_batch (continuous batching) cannot prune values."
        )
    layer = _layer_of(cache, site.layer_idx)
    if layer.identity not in ("", plan.identity):
        raise CacheMismatchError(
            f"Cache layer {site.layer_idx} holds values pruned with other settings ({layer.identity}; now "
            f"{plan.identity}). Start from an empty cache."
        )
    layer.plan = plan


def _leave(site: AttentionSite, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook of an attention module: the values that came must have been stored."""
    cache = upstream.find_cache(args, kwargs)
    assert cache is not None
    layer: Any = cache.layers[site.layer_idx]
    if layer.plan is not None or layer.awaits_scores:
        raise upstream.changed(
            f"{site.name} ({type(module).__name__})",
            "its forward ended without a call of `update` of the cache and of the attention function under its name "
            "in the config.",
        )


def _layer_of(cache: Cache, layer_idx: int) -> ValuePrunedLayer:
    """The layer of a cache that holds pruned values, put there in the place of an empty stock one if need be."""
    while len(cache.layers) <= layer_idx and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    stock: Any = cache.layers[layer_idx] if len(cache.layers) > layer_idx else None
    if isinstance(stock, ValuePrunedLayer):
        return stock
    if type(stock) is not DynamicLayer:
        raise UnsupportedError(
            f"Value pruning cannot put pruned values into cache layer {layer_idx}, a {type(stock).__name__} of "
            f"{type(cache).__name__}: it needs one that grows. Pass a DynamicCache, or nothing."
        )
    if stock.get_seq_length():
        raise CacheMismatchError(
            f"Cache layer {layer_idx} holds {stock.get_seq_length()} tokens with all their values already. Begin with "
            "an empty cache inside the context of value pruning."
        )
    layer = ValuePrunedLayer()
    upstream.carry_layer_settings(stock, layer)
    cache.layers[layer_idx] = layer
    return layer
