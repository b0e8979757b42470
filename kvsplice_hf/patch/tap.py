"""Looks at keys and values where the attention function of a module gets them, without changing anything else."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from kvsplice_hf import upstream
from kvsplice_hf.errors import UnsupportedError
from kvsplice_hf.patch.attention import attend_expanded
from kvsplice_hf.patch.families import AttentionSite
from kvsplice_hf.patch.names import WRAPPED_ATTENTION


_PREFIX = "kvsplice_tap_"
_ATTRIBUTE = "_kvsplice_tap"
# Told of a site, its keys [B, K, T, d] and values [B, K, T, v]; gives those to go on with.
Tap = Callable[[AttentionSite, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


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
    tapped_site = vars(module).get(_ATTRIBUTE)
    if tapped_site is not None:
        site, tap = tapped_site
        key, value = tap(site, key, value)
    return attend_expanded(module, query, key, value, mask, base=base, **kwargs)
