"""Looks at queries, keys and values where the attention function of a module gets them, and may hand on others."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from kvsplice_hf import upstream
from kvsplice_hf.errors import UnsupportedError
from kvsplice_hf.patch.attention import attend_expanded
from kvsplice_hf.patch.families import AttentionSite
from kvsplice_hf.patch.names import WRAPPED_ATTENTION


_PREFIX = "kvsplice_tap_"
_ATTRIBUTE = "_kvsplice_tap"


class Attended(NamedTuple):
    """What an attention function gets.

    Attributes:
        query, key, value: [B, H, T, d], [B, K, S, d] and [B, K, S, v].
        mask: bool or added to scores, [B, 1, T, S]; None: causal.
    """

    query: torch.Tensor
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
    for site in sites:
        base = site.module.config._attn_implementation
        if base not in WRAPPED_ATTENTION and not str(base).startswith(_PREFIX):
            raise UnsupportedError(
                f"{site.name} uses the attention function {base!r}, in which keys and values cannot be looked at. Load "
                f"the model with attn_implementation set to one of {WRAPPED_ATTENTION}."
            )
    try:
        for site in sites:
            setattr(site.module, _ATTRIBUTE, (site, tap))
            base = site.module.config._attn_implementation
            if not base.startswith(_PREFIX):
                upstream.register_attention_function(_PREFIX + base, _attend, base)
                before.append((site.module.config, base))
                site.module.config._attn_implementation_internal = _PREFIX + base
        yield
    finally:
        for config, base in before:
            config._attn_implementation_internal = base
        for site in sites:
            vars(site.module).pop(_ATTRIBUTE, None)


def _attend(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any) -> Any:
    base = module.config._attn_implementation.removeprefix(_PREFIX)
    seen = Attended(query, key, value, mask)
    tapped_site = vars(module).get(_ATTRIBUTE)
    if tapped_site is not None:
        site, tap = tapped_site
        seen = tap(site, seen)
    return attend_expanded(module, *seen, base=base, **kwargs)
