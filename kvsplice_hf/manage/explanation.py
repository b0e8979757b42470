"""`explain(model)`: which code decodes and prefills each layer, and why none of the faster ones does."""

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from kvsplice_hf.attend import choice
from kvsplice_hf.attend.heads import refusal_of_heads
from kvsplice_hf.call import current_state
from kvsplice_hf.patch.expansion import absorbed_weight
from kvsplice_hf.patch.families import AttentionSite
from kvsplice_hf.patch.folding import compiled_refusal, megabytes
from kvsplice_hf.patch.heads import decoding_refusal
from kvsplice_hf.patch.site_patch import SitePatch
from kvsplice_hf.patch.state import all_patched_sites
from kvsplice_hf.retention.plan import plan_of
from kvsplice_hf.weights.offload import execution_device


EXPANDED = "expanded"
ORIGINAL = "original"


@dataclass(frozen=True)
class LayerPath:
    """How one layer attends.

    Attributes:
        layer_idx: of the layer in the cache.
        name: path of the attention module.
        decode: what serves a step of one new token: "C++", "Triton", "PyTorch" (all three on codes), "expanded" (all
            stored tokens are decoded and expanded at each step, as in the original model), or "original" (the splice
            is disabled in this thread). Of ordinary attention "on codes" or "expanded" (all stored keys and values are
            decoded).
        prefill: what serves many new tokens at once.
        refused: each faster way that does not decode, and why.
        materialised: bytes of the dense weight that is kept of a packed, adapted or sharded `kv_b_proj`; 0 of others.
        retention: which rows stay in the cache inside the context of `Retention`; empty where all do.
    """

    layer_idx: int
    name: str
    decode: str
    prefill: str
    refused: dict[str, str]
    materialised: int = 0
    retention: str = ""


@dataclass(frozen=True)
class Explanation:
    """What `explain` found. As a string it is a table.

    Attributes:
        layers: one per patched attention module, by ascending `layer_idx`.
        verdicts: what the first call of each kind has shown of the kernels in this process: "serves", or why not.
        tokens: how many stored tokens a step was assumed to read.
    """

    layers: list[LayerPath]
    verdicts: dict[str, str]
    tokens: int

    def __str__(self) -> str:
        out = io.StringIO()
        console = Console(file=out, width=140)
        console.print(self._layers_table())
        if self.verdicts:
            console.print(self._verdicts_table())
        if any(layer.materialised for layer in self.layers):
            console.print(self._memory(), soft_wrap=True)
        for kept in dict.fromkeys(layer.retention for layer in self.layers if layer.retention):
            count = sum(layer.retention == kept for layer in self.layers)
            console.print(f"retention, {count} layers: {kept}", soft_wrap=True)
        return out.getvalue().rstrip()

    def _layers_table(self) -> Table:
        table = Table("layer", "decode", "prefill", "why not faster", title=f"a step that reads {self.tokens} tokens")
        for layer in self.layers:
            why = "; ".join(f"{way}: {reason}" for way, reason in layer.refused.items())
            table.add_row(f"{layer.layer_idx} {layer.name}", layer.decode, layer.prefill, why)
        return table

    def _memory(self) -> str:
        sizes = sorted({layer.materialised for layer in self.layers if layer.materialised})
        each = " to ".join(megabytes(size) for size in dict.fromkeys((sizes[0], sizes[-1])))
        count = sum(layer.materialised > 0 for layer in self.layers)
        total = megabytes(sum(layer.materialised for layer in self.layers))
        return f"materialised kv_b_proj: {each} per layer, {count} layers, {total} (materialise_weights=False frees it)"

    def _verdicts_table(self) -> Table:
        table = Table("kernel, first calls in this process", "verdict")
        for kind, verdict in self.verdicts.items():
            table.add_row(kind, verdict)
        return table


def explain(model: nn.Module, tokens: int = 4096) -> Explanation:
    """Which code decodes and prefills each patched layer, and why none of the faster ones does.

    It is asked of the model as it is now, in this thread: gradients switched on, autocast, `splice_disabled`, adapters
    and torch.compile count (give it what `torch.compile` returned: the model inside does not know of it). Nothing is
    computed but what a packed, adapted or sharded `kv_b_proj` multiplies by, as the next step would
    (`KVSpliceConfig.materialise_weights`), and nothing is compiled but the C++ code, once per machine.

    Args:
        model: a patched model, or something wrapped around one.
        tokens: stored tokens that a step reads. With few of them expanding may be cheaper.

    Raises:
        PatchStateError: the model is not patched.

    Examples:
        >>> print(explain(model))
    """
    compiled = _compiled_parts(model)
    layers = []
    for site, state in all_patched_sites(model):
        path = _explain_layer(site, state, tokens)
        layers.append(_when_compiled(path, site) if id(site.module) in compiled else path)
    return Explanation(layers, choice.verdicts(), tokens)


def _explain_layer(site: AttentionSite, state: SitePatch, tokens: int) -> LayerPath:
    def path(decode: str, prefill: str, refused: dict[str, str]) -> LayerPath:
        plan = plan_of(site.module)
        kept = "" if plan is None else str(plan)
        return LayerPath(site.layer_idx, site.name, decode, prefill, refused, state.materialised.nbytes, kept)

    if not current_state(state.patch).enabled:
        return path(ORIGINAL, ORIGINAL, {"codes": "the splice is disabled in this thread (splice_disabled)"})
    if site.kv_heads:
        reason = decoding_refusal(site.module, state) or _gradients_of_packed(site, state)
        if reason is not None:
            return path(EXPANDED, EXPANDED, {"codes": reason})
        query = torch.empty(1, 1, dtype=site.dtype, device=site.device)
        backend = choice.claiming([query])
        kernel = "any kernel" if backend is None else backend.name
        reason = refusal_of_heads([query], state.splice) or _given_up()
        return path("PyTorch" if reason else kernel, EXPANDED, {kernel: reason} if reason else {})
    prefill = EXPANDED if absorbed_weight(site.module, state, 512, 512, site.dtype)[1] else "on codes"
    reason = absorbed_weight(site.module, state, 1, tokens, site.dtype)[1] or _gradients_of_packed(site, state)
    if reason is not None:
        return path(EXPANDED, prefill, {"codes": reason})
    tensors = list(_tensors_of_a_step(site, state))
    backend = choice.claiming(tensors)
    kernel = "any kernel" if backend is None else backend.name
    reason = choice.refusal(tensors, state.splice.codec, coded_keys=state.splice.keys is not None) or _given_up()
    if reason is not None:
        return path("PyTorch", prefill, {kernel: reason})
    return path(kernel, prefill, {})


def _compiled_parts(model: nn.Module) -> set[int]:
    """The identities of all modules that run inside torch.compile, by each of its three ways.

    `torch.compile(module)` wraps it, `module.compile()` notes what to call, and `module.forward =
    torch.compile(module.forward)` leaves the function that it was.
    """
    found: set[int] = set()
    for part in model.modules():
        held = vars(part)
        is_compiled = "_orig_mod" in part._modules or held.get("_compiled_call_impl") is not None
        if is_compiled or hasattr(held.get("forward"), "_torchdynamo_orig_callable"):
            found |= {id(inside) for inside in part.modules()}
    return found


def _when_compiled(path: LayerPath, site: AttentionSite) -> LayerPath:
    """What is left of a path inside torch.compile."""
    if path.decode in (EXPANDED, ORIGINAL):
        return path
    refused = "" if site.kv_heads else compiled_refusal(site.module.kv_b_proj)
    if refused:
        return replace(path, decode=EXPANDED, prefill=EXPANDED, refused={"codes": refused})
    if path.decode == "PyTorch":
        return path
    return replace(path, decode="PyTorch", refused={path.decode: "inside torch.compile PyTorch serves"})


def _gradients_of_packed(site: AttentionSite, state: SitePatch) -> str | None:
    wanted = torch.is_grad_enabled() and any(_requires_gradients(site.module))
    if state.splice.codec is None or not wanted:
        return None
    return "gradients are on, and packed rows have none: run under torch.no_grad()"


def _given_up() -> str | None:
    """What of a step kernels were given up for in this process, and why."""
    given_up = [f"{kind}: {verdict}" for kind, verdict in choice.verdicts().items() if verdict != "serves"]
    mine = [line for line in given_up if line.startswith(("decode", "attend"))]
    return f"given up in this process for {'; '.join(mine)}" if mine else None


def _tensors_of_a_step(site: AttentionSite, state: SitePatch) -> Iterator[torch.Tensor]:
    """What a step hands to the kernels, but for the codec: a query and rows as the model makes them, and weights."""
    device, splice = execution_device(site.module.kv_b_proj), state.splice
    row_dtype = state.geometry.row_dtype(site.dtype)
    trained = any(_requires_gradients(site.module))
    yield torch.empty(1, 1, dtype=site.dtype, device=device, requires_grad=trained)
    yield torch.empty(1, 1, dtype=row_dtype, device=device)
    yield from (tensor for tensor in splice.weights() if tensor is not None)


def _requires_gradients(module: Any) -> Iterator[bool]:
    """Whether the query of a step has gradients: where anything that makes it is trained."""
    return (parameter.requires_grad for parameter in module.parameters())
