"""`Retention`: a cache of bounded size, from which whole rows of tokens are dropped while decoding.

The interface is that of `ValuePruning`, and of NVIDIA's kvpress: settings are an object, which is called with a model
and gives a context.
"""

import contextlib
import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from packaging.version import Version
from torch import nn

from kvsplice_hf import upstream
from kvsplice_hf.errors import ConfigError, UnsupportedError
from kvsplice_hf.patch.alone import computes_alone
from kvsplice_hf.patch.families import AttentionSite
from kvsplice_hf.patch.names import NAME_PREFIX, WRAPPED_ATTENTION
from kvsplice_hf.patch.sites import find_sites
from kvsplice_hf.patch.state import find_patch, is_patched
from kvsplice_hf.retention.hooks import enter, leave
from kvsplice_hf.retention.plan import PLAN_ATTRIBUTE, POLICIES, LayerPlan
from kvsplice_hf.retention.recording import RECORDED, RECORDING_PREFIX, register_recording
from kvsplice_hf.retention.selection import SCORES, Budget


logger = logging.getLogger(__name__)

_RECENT = 32
# Models with windows in some layers were compared with the reference on this release of transformers and on 5.15.0.
WINDOWS_SINCE = "5.24.0"


@dataclass(frozen=True)
class Retention:
    """Keep the rows of so many tokens of each sequence in the cache, and drop all others.

    A row is what a layer stores of a token: its keys and values, its latent, or a packed row. The call that brings
    tokens (a prompt, say) sees all rows; what loses is dropped behind it. Tokens keep their positions.

    "window" keeps the first tokens and the last ones, as StreamingLLM (arXiv 2309.17453) does, but for the positions,
    which it counts anew within the cache. "attention" keeps the first ones, the recent ones, and those that attention
    has read most, as H2O (arXiv 2306.14048) does; each layer chooses for itself, all heads together.

    Args:
        keep: rows of each sequence and layer, the first and recent ones among them.
        share: this share of the tokens of each sequence so far, in place of `keep`; then the cache goes on growing.
        policy: "window" or "attention".
        first: tokens at the beginning whose rows stay. Models need a few of them (attention sinks).
        recent: tokens at the end whose rows stay whatever attention says, 32 by default; for "attention" alone.
        scores: "sum", all attention that a token has got; "mean", that over the queries that could see it, which does
            not favour old tokens; for "attention" alone.
        interval: drop rows when so many are too many, and not one by one, which takes less time and `interval` - 1 more
            rows at most.

    Raises:
        ConfigError: a setting that cannot be.

    Examples:
        >>> with Retention(keep=512)(model):
        ...     model.generate(**inputs, max_new_tokens=64)
    """

    keep: int | None = None
    share: float | None = None
    policy: str = "window"
    first: int = 4
    recent: int | None = None
    scores: str = "sum"
    interval: int = 1

    def __post_init__(self) -> None:
        for name, value, known in (("policy", self.policy, POLICIES), ("scores", self.scores, SCORES)):
            if value not in known:
                raise ConfigError(f"`{name}` is {value!r}; retention takes one of {', '.join(known)}.")
        for name in ("keep", "first", "recent", "interval"):
            count = getattr(self, name)
            if count is not None and (not isinstance(count, int) or isinstance(count, bool)):
                raise ConfigError(f"`{name}` is {count!r}; it counts tokens, and takes a whole number.")
        if self.interval < 1:
            raise ConfigError(f"`interval` is {self.interval}; rows are dropped when 1 or more of them are too many.")
        if self.policy == "window" and (self.recent is not None or self.scores != SCORES[0]):
            raise ConfigError(
                f'`recent` is {self.recent} and `scores` {self.scores!r}, which are for policy="attention": a window '
                "keeps the last tokens that there is room for. Leave both out."
            )
        self.plan.budget.check()

    @property
    def plan(self) -> LayerPlan:
        """What is done with the rows of a layer."""
        recent = (_RECENT if self.recent is None else self.recent) if self.policy == "attention" else 1
        return LayerPlan(self.policy, Budget(self.keep, self.share, self.first, recent), self.scores, self.interval)

    @contextlib.contextmanager
    def __call__(self, model: nn.Module) -> Iterator[None]:
        """Within this context the model drops rows from the caches that it fills; afterwards it is as it was.

        It may be patched or not. A cache that was filled in here goes on in here, or in another context with the same
        `policy`, `first` and `scores`. Layers with a sliding window are left as they are.

        Raises:
            NotMLAError: the model has no attention layer that is known.
            UnsupportedError: a layer that cannot do without rows: with a sparse-attention indexer, with windows only,
                or whose rows another layer reads; an attention function that cannot be stood in for; or the model is
                in a context like this one already.
        """
        plan = self.plan
        sites = _sites(model, plan)
        names: list[tuple[Any, str]] = []
        hooks: list[Any] = []
        if plan.scored:
            register_recording()
        try:
            for number, site in enumerate(sites):
                arguments = upstream.read_forward(site.name, site.module, plan.scored, expands=not site.kv_heads)
                before = functools.partial(enter, site, plan, arguments)
                hooks.append(site.module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
                after = functools.partial(leave, site, plan, number == len(sites) - 1)
                hooks.append(site.module.register_forward_hook(after, with_kwargs=True))
                setattr(site.module, PLAN_ATTRIBUTE, plan)
                base = site.module.config._attn_implementation
                if plan.scored and not base.startswith(RECORDING_PREFIX):
                    names.append((site.module.config, base))
                    site.module.config._attn_implementation_internal = RECORDING_PREFIX + base
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for site in sites:
                vars(site.module).pop(PLAN_ATTRIBUTE, None)
            for config, base in names:
                config._attn_implementation_internal = base


def _sites(model: nn.Module, plan: LayerPlan) -> list[AttentionSite]:
    """The layers whose rows can be dropped: all but those with a window."""
    found = find_sites(model, find_patch(model)[1].config.layer_pattern if is_patched(model) else None)
    for site in found:
        reason = _refusal(site, plan)
        if reason is not None:
            raise UnsupportedError(f"Retention cannot run on {site.name} ({type(site.module).__name__}): {reason}")
    sites = [site for site in found if site.sliding_window is None and not site.chunked]
    if not sites:
        raise UnsupportedError(
            f"All layers of {type(model).__name__} have sliding windows, which drop rows by themselves. Retention has "
            "nothing to do."
        )
    if len(sites) < len(found):
        if Version(upstream.INSTALLED) < Version(WINDOWS_SINCE):
            raise UnsupportedError(
                f"{type(model).__name__} has layers with sliding windows, and beside such layers retention is known to "
                f"be right from transformers {WINDOWS_SINCE} on. {upstream.INSTALLED} is installed; on 5.15.0 logits "
                "of gemma2 were wrong. Upgrade transformers."
            )
        logger.info("Layers with a sliding window keep all rows of their window: %d.", len(found) - len(sites))
    return sites


def _refusal(site: AttentionSite, plan: LayerPlan) -> str | None:
    base = str(site.module.config._attn_implementation)
    if PLAN_ATTRIBUTE in vars(site.module):
        return "it is in a context of retention already."
    if site.indexer_head_dim:
        return "its indexer keeps keys of its own and chooses rows by their number, which would be those of others."
    if site.source is not None:
        return f"it reads the rows of {site.source.name}, which would have to keep what both of them need."
    if plan.scored and computes_alone(type(site.module)):
        return 'it computes attention by itself, so that nobody sees which rows it reads. Use policy="window".'
    if base not in RECORDED:
        known = ", ".join(name for name in WRAPPED_ATTENTION)
        return (
            f"its attention function is {base.removeprefix(NAME_PREFIX)!r}, whose masks cannot be taken apart by rows; "
            f"load the model with one of {known}."
        )
    return None
