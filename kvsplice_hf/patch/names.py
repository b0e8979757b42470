"""Names: of the attention functions of patched modules, and of what the patch keeps on a module."""

from typing import Any


# Attention functions that ours can stand in for; others (flash, flex) are left where they are.
WRAPPED_ATTENTION = ("eager", "sdpa")
NAME_PREFIX = "kvsplice_"
# The `SitePatch` of a module.
PATCH_ATTRIBUTE = "_kvsplice_site"


class AttentionName(str):
    """Our name for the attention function `base`, as the settings of a patched model hold it.

    Settings are copied to where nobody has made our name known: for another model, or pickled for another process. What
    arrives there is the name of the function that ours stands in for. With the model itself our name is copied as well:
    `SitePatch` sees to that.
    """

    base: str

    def __new__(cls, base: str) -> "AttentionName":
        name = super().__new__(cls, NAME_PREFIX + base)
        name.base = base
        return name

    def __reduce__(self) -> tuple[type[str], tuple[str]]:  # for `pickle` and `copy`
        return str, (self.base,)


def wrapped_name(base: str) -> AttentionName | None:
    """Our name for the attention function `base`, or None where we have none."""
    if isinstance(base, AttentionName):  # the settings are shared with a model that is patched
        return base
    base = base.removeprefix(NAME_PREFIX)
    return AttentionName(base) if base in WRAPPED_ATTENTION else None


def is_ours(module: Any) -> bool:
    """Whether a module looks up an attention function of ours."""
    return (module.config._attn_implementation or "").startswith(NAME_PREFIX)
