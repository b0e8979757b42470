"""Looks at queries, keys and values where the attention function of a module gets them, and may hand on others."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from kvsplice_hf import upstream
from kvsplice_hf.errors import UnsupportedError
from kvsplice_hf.patch.alone import StandIn, computes_alone
from kvsplice_hf.patch.attention import attend_expanded
from kvsplice_hf.patch.families import AttentionSite
from kvsplice_hf.patch.names import WRAPPED_ATTENTION


_PREFIX = "kvsplice_tap_"
_ATTRIBUTE = "_kvsplice_tap"


class Attended(NamedTuple):
    """What an attention function gets.

    Attributes:
        query: [B, H, T, d]; None where the module computes attention by itself, and only keys and values are seen.
        key, value: [B, K, S, d] and [B, K, S, v].
        mask: bool or added to scores, [B, 1, T, S]; None: causal.
    """

    query: torch.Tensor | None
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None


# Told of a site and what its attention function gets; gives what to go on with.
Tap = Callable[[AttentionSite, Attended], Attended]


@contextlib.contextmanager
def tapped(sites: Sequence[AttentionSite], tap: Tap) -> Iterator[None]:
    """Within this context `tap` sees what the attention functions of these sites get.

    Raises:
        UnsupportedError: a module uses an attention function that cannot be stood in for.
    """
    before: list[tuple[Any, str]] = []
    alone = [site for site in sites if computes_alone(type(site.module))]
    sites = [site for site in sites if site not in alone]
    hooks = []
    for site in sites:
        base = site.module.config._attn_implementation
        if base not in WRAPPED_ATTENTION and not str(base).startswith(_PREFIX):
            raise UnsupportedError(
                f"{site.name} uses the attention function {base!r}, in which keys and values cannot be looked at. Load "
                f"the model with attn_implementation set to one of {WRAPPED_ATTENTION}."
            )
    try:
        for site in alone:
            hook = functools.partial(_stand_in, site, tap)
            hooks.append(site.module.register_forward_pre_hook(hook, with_kwargs=True))
        for site in sites:
            setattr(site.module, _ATTRIBUTE, (site, tap))
            base = site.module.config._attn_implementation
            if not base.startswith(_PREFIX):
                upstream.register_attention_function(_PREFIX + base, _attend, base)
                before.append((site.module.config, base))
                site.module.config._attn_implementation_internal = _PREFIX + base
        yield
    finally:
        for handle in hooks:
            handle.remove()
        for config, base in before:
            config._attn_implementation_internal = base
        for site in sites:
            vars(site.module).pop(_ATTRIBUTE, None)


def _stand_in(site: AttentionSite, tap: Tap, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    cache = upstream.find_cache(args, kwargs)

    def read(key: torch.Tensor, value: torch.Tensor, *rest: Any, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
        _, key, value, _ = tap(site, Attended(None, key, value, None))
        return (key, value) if cache is None else cache.update(key, value, *rest, **more)

    arguments = upstream.read_forward(site.name, module, needs_attention_by_name=False, expands=False)
    return upstream.with_cache(arguments, StandIn(cache, read), args, kwargs)


def _attend(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any) -> Any:
    base = module.config._attn_implementation.removeprefix(_PREFIX)
    seen = Attended(query, key, value, mask)
    tapped_site = vars(module).get(_ATTRIBUTE)
    if tapped_site is not None:
        site, tap = tapped_site
        seen = tap(site, seen)
    assert seen.query is not None
    return attend_expanded(module, seen.query, seen.key, seen.value, seen.mask, base=base, **kwargs)
