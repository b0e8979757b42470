"""Continuous batching of a patched model: the manager of transformers, with blocks in the size of spliced rows.

Legend: as in `pages`.
"""

import copy
from collections.abc import Sequence
from math import ceil
from typing import Any

from transformers import GenerationConfig

from kvsplice_hf import upstream
from kvsplice_hf.cache.pages import ROWS_ATTRIBUTE, PagedRows, token_bytes, turn_bytes
from kvsplice_hf.call import current_state
from kvsplice_hf.errors import UnsupportedError
from kvsplice_hf.upstream import MIN_TRANSFORMERS_PAGED


def init_continuous_batching(
    model: Any,
    sites: Sequence[tuple[Any, Any]],
    generation_config: GenerationConfig | None = None,
    continuous_batching_config: Any = None,
    workload_hints: Any = None,
) -> Any:
    """Stands in for `model.init_continuous_batching`, through which `generate_batch` and the context manager go too.

    Args:
        model: the patched model.
        sites: its patched layers, as `patched_sites` gives them.
        generation_config, continuous_batching_config, workload_hints: as in transformers.

    Returns:
        The manager: a `ContinuousBatchingManager` of transformers.

    Raises:
        UnsupportedError: the model, the patch or the settings do not allow it.
    """
    _require_supported(model, sites)
    persistent = upstream.persistent_manager(model)
    if isinstance(persistent, SplicedBatchingManager):
        if persistent.identities == _identities(sites):
            return persistent
        upstream.drop_persistent_manager(model)  # its pages hold prefixes coded by another splice
    generation_config = copy.deepcopy(generation_config or model.generation_config)
    if generation_config.eos_token_id is None:
        generation_config.eos_token_id = -1  # how the manager spells "none"
    return SplicedBatchingManager(model, sites, generation_config, continuous_batching_config, workload_hints)


def _identities(sites: Sequence[tuple[Any, Any]]) -> list[str]:
    return [state.splice.identity for _, state in sites]


def _require_supported(model: Any, sites: Sequence[tuple[Any, Any]]) -> None:
    problem = None
    count = model.config.get_text_config().num_hidden_layers
    others = sorted(set(range(count)) - {site.layer_idx for site, _ in sites})
    if upstream.ContinuousBatchingManager is None:
        problem = f"it needs transformers>={MIN_TRANSFORMERS_PAGED}"
    elif others:
        problem = f"layers {others} are not patched, or store nothing of their own"
    elif any(site.indexer_head_dim or (site.sliding_window is not None and not site.kv_heads) for site, _ in sites):
        problem = "the paged cache has no room for the keys of a sparse-attention indexer, and no window of latents"
    elif any(site.chunked for site, _ in sites):
        problem = "in its chunked layers a token sees those of its own chunk only, which no page tells"
    elif not all(current_state(state.patch).enabled for _, state in sites):
        problem = "the splice is disabled (splice_disabled), and its pages hold spliced rows"
    elif not all(str(site.module.config._attn_implementation).startswith("kvsplice_") for site, _ in sites):
        problem = (
            'it needs attention="auto" or "absorbed", and a model loaded with attn_implementation "sdpa" or "eager"'
        )
    if problem is not None:
        raise UnsupportedError(
            f"Continuous batching (generate_batch) cannot run on this patched model: {problem}. Use model.generate "
            "with a padded batch instead."
        )


def block_bytes(sites: Sequence[tuple[Any, Any]], tokens: int) -> int:
    """Bytes of a block of `tokens` tokens of all layers."""
    sizes = [(*token_bytes(state.geometry, site.dtype), state.geometry.sink_tokens) for site, state in sites]
    return sum(tokens * row + sinks * exact for row, exact, sinks in sizes) + tokens * turn_bytes(sites)


class _Overlay:
    """`base` with some attributes replaced. Unlike a changed copy of a config, it is not validated."""

    def __init__(self, base: Any, **replaced: Any) -> None:
        vars(self).update(replaced, _base=base)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)


class SplicedBatchingManager(upstream.ContinuousBatchingManager or object):  # type: ignore[misc]
    """The manager of transformers, with a cache whose blocks have the size of spliced rows.

    Args:
        model: the patched model.
        sites: its patched layers.
        generation_config, continuous_batching_config, workload_hints: as in transformers.

    Raises:
        UnsupportedError: CUDA graphs or compilation were asked for.
    """

    def __init__(
        self,
        model: Any,
        sites: Sequence[tuple[Any, Any]],
        generation_config: GenerationConfig,
        continuous_batching_config: Any,
        workload_hints: Any,
    ) -> None:
        self.model: Any = model
        self._sites = sites
        self.identities = _identities(sites)
        super().__init__(
            model, generation_config, continuous_batching_config or upstream.ContinuousBatchingConfig(), workload_hints
        )
        settings = self.continuous_batching_config
        compiled = settings.varlen_compile_config is not None or settings.decode_compile_config is not None
        if compiled or any(settings.cuda_graph_booleans):
            raise UnsupportedError(
                "Continuous batching on a patched model splits each batch by request, which no CUDA graph can record: "
                "leave use_cuda_graph, the padding intervals and compilation off."
            )
        sinks, page_size = max(state.geometry.sink_tokens for _, state in sites), settings.page_size
        if sinks > page_size:
            raise UnsupportedError(f"page_size ({page_size}) must not be smaller than sink_tokens ({sinks}).")

    def switch_to_cb_friendly_attn(self, model: Any, auto_switch_to_flash: bool = True) -> None:
        """Nothing to switch: the attention function of the patch reads the pages."""

    def _create_batch_processor(self) -> Any:
        model, text_config = self.model, self.model.config.get_text_config()
        tokens = self.continuous_batching_config.page_size
        # The stock cache gives a block `2 * heads * head_dim` numbers per token and layer: one head, and a head_dim to
        # match the mean size of our rows, which are those of this process. Where the plan of tensor parallelism divides
        # key heads, transformers leaves each process its share of as many as the settings say.
        helper = self.distributed_helper
        heads = helper.tp_size if helper.tp_size > 1 and helper.are_kv_heads_tp_ed() else 1
        numbers = 2 * len(self._sites) * tokens * model.dtype.itemsize
        config = _Overlay(
            text_config,
            num_key_value_heads=heads,
            head_dim=ceil(block_bytes(self._sites, tokens) / numbers),
            layer_types=None,
            sliding_window=None,
            # Only its name is read, to plan memory: like flash attention, ours needs no mask over all requests, and
            # repeats no heads.
            _attn_implementation="kvsplice_flash",
        )
        self.model = _Overlay(model, config=_Overlay(model.config, get_text_config=lambda: config))
        try:
            processor = super()._create_batch_processor()
        finally:
            self.model = model
        if not hasattr(processor.cache, ROWS_ATTRIBUTE):  # a persistent manager hands out the same one again
            setattr(processor.cache, ROWS_ATTRIBUTE, PagedRows(processor.cache, self._sites))
        return processor
