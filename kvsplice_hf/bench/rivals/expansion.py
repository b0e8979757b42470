"""A model whose `expand_kv` is another one for a while."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from kvsplice_hf.errors import PatchStateError
from kvsplice_hf.patch.families import AttentionSite
from kvsplice_hf.patch.sites import find_sites


@contextmanager
def replaced_expand_kv(model: nn.Module, make: Callable[[AttentionSite], Callable[..., Any]]) -> Iterator[None]:
    """Inside, `expand_kv` of every MLA module of a model is what `make` gives for its site; then as before.

    Raises:
        PatchStateError: an instance has an `expand_kv` of its own already, as patched models do.
    """
    sites = find_sites(model)
    taken = [site.name for site in sites if "expand_kv" in vars(site.module)]
    if taken:
        raise PatchStateError(f"{', '.join(taken)} has an `expand_kv` of its own. Unpatch the model first.")
    try:
        for site in sites:
            site.module.expand_kv = make(site)
        yield
    finally:
        for site in sites:
            vars(site.module).pop("expand_kv", None)
