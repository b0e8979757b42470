"""What the patch keeps on one attention module."""

from collections.abc import Callable
from typing import Any

from torch.utils.hooks import RemovableHandle

from kvsplice_hf import upstream
from kvsplice_hf.cache.rows import RowGeometry
from kvsplice_hf.patch.attention import register_attention
from kvsplice_hf.patch.names import PATCH_ATTRIBUTE, AttentionName
from kvsplice_hf.weights.materialised import MaterialisedWeight


# Why no step runs on codes behind a spline.
SPLINE_REFUSAL = 'transform="spline" was asked for, and a spline does not fold into the weights: each step decodes'


class SitePatch:
    """What the patch knows of one attention module, kept on it as a plain attribute. Nothing of it belongs to a call.

    Args:
        name: path of the module in the model that was patched, for messages.
        patch: the patch that it belongs to, a `ModelPatch`; the same one for all modules of a model.
        owner: the attention module whose latent this one reads: itself, unless it reuses an earlier layer's.
        stores_latent: whether the module writes to the cache.
        geometry: sizes of the rows.
        num_heads: H.
        attend: the attention function of its family.
        mode: "auto", "absorbed" or "expanded".
        arguments: how its forward takes its arguments.
        attention_before: name of the attention function that the patch has put another one in the place of, or None.
        settings: those of the module, where the name in them is ours, or None.
        methods: names of the methods of the module that the patch has put others in the place of.

    Attributes:
        materialised: what `kv_b_proj` multiplies by, where its weight cannot be read.
    """

    def __init__(
        self,
        name: str,
        patch: Any,
        owner: Any,
        stores_latent: bool,
        geometry: RowGeometry,
        num_heads: int,
        attend: Callable[..., Any],
        mode: str,
        arguments: upstream.ForwardArguments,
        attention_before: str | None,
        settings: Any,
        methods: tuple[str, ...],
    ) -> None:
        self.name = name
        self.patch = patch
        self.owner = owner
        self.stores_latent = stores_latent
        self.geometry = geometry
        self.num_heads = num_heads
        self.attend = attend
        self.mode = mode
        self.arguments = arguments
        self.attention_before = attention_before
        self.settings = settings
        self.methods = methods
        self.hooks: list[RemovableHandle] = []
        self.materialised = MaterialisedWeight()

    @property
    def splice(self) -> Any:
        return self.owner.kvsplice

    @property
    def by_itself(self) -> bool:
        """Whether the module computes attention by itself, so that no name in its settings is ours (`patch.alone`)."""
        return self.geometry.heads > 0 and self.settings is None

    def __getstate__(self) -> dict[str, Any]:
        name = None if self.settings is None else self.settings._attn_implementation
        return {**vars(self), "named": name.base if isinstance(name, AttentionName) else None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A model that was pickled whole may come back in a process that has never patched one.
        register_attention()
        named = state.pop("named", None)
        vars(self).update({"materialised": MaterialisedWeight(), **state})  # files of 0.3 have none
        if named is not None:  # copied settings do not know what they were copied with
            self.settings._attn_implementation_internal = AttentionName(named)


def title_of(module: Any) -> str:
    """Path and class of a patched module, for messages."""
    return f"{getattr(module, PATCH_ATTRIBUTE).name} ({type(module).__name__})"
