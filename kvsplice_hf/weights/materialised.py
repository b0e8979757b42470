"""Weights that cannot be read, made dense once and kept: of packed, adapted and sharded layers.

A packed layer (bitsandbytes, torchao, ...) multiplies by what its library unpacks, an adapted one (LoRA) by the sum of
its weight and of what the adapter adds. Each can be asked: its own forward of the unit vectors gives the matrix. So no
library has to be known, and whatever is active in the layer is in it. It is asked again only when it has changed.
"""

from typing import Any, NamedTuple

import torch
from torch import nn

from kvsplice_hf.weights.changes import LayerState
from kvsplice_hf.weights.linear import probe
from kvsplice_hf.weights.offload import execution_device


# How far a layer may be from the matrix that it was taken for, as a share of what it gives: several times what
# rounding takes, and less than quantised activations do (about 2 % in eight bits).
_TOLERANCE = {torch.bfloat16: 2.0**-7}
_OTHER_TOLERANCE = 2.0**-9


# After so many in a row that did not last until the next call, none is made: asking takes longer than expanding.
_RESTLESS_AFTER = 3
_RESTLESS = "it is another one at each call (its tensors or settings are replaced all the time)"


class Materialised(NamedTuple):
    """What a layer multiplies by, [out, in], or why that cannot be told."""

    weight: torch.Tensor | None
    refused: str


class MaterialisedWeight:
    """What one layer multiplies by, made when it is first asked for, and kept until the layer changes.

    It is no buffer: it is neither saved, nor copied or pickled with the model.
    """

    def __init__(self) -> None:
        # Replaced as a whole: other threads may be in the middle of a call with the one before.
        self._kept: tuple[LayerState, torch.dtype, Materialised] | None = None
        self._short_lived = 0

    def of(self, module: nn.Module, size: int, dtype: torch.dtype) -> Materialised:
        """What `module` multiplies by now.

        Args:
            module: the layer.
            size: numbers that it takes.
            dtype: of its input in the model.
        """
        kept = self._kept
        lasts = kept is not None and kept[1] is dtype and kept[0].holds(module)
        if kept is not None:
            self._short_lived = 0 if lasts else self._short_lived + 1
            if lasts and kept[2].refused != _RESTLESS:
                return kept[2]
        self._kept = None  # before another one takes as much memory
        # For use outside of inference mode too.
        with torch.inference_mode(False), torch.no_grad():
            if self._short_lived > _RESTLESS_AFTER:
                made = Materialised(None, _RESTLESS)
            else:
                made = materialise(module, size, dtype)
            # Looked at afterwards: the first forward of a packed layer may rearrange it.
            self._kept = LayerState(module), dtype, made
        return made

    def verify(self, module: nn.Module) -> None:
        """Look at all numbers of the layer, and forget what was made of others."""
        if self._kept is not None and not self._kept[0].holds(module, thorough=True):
            self._kept = None

    def forget(self) -> None:
        """Free it."""
        if self._kept is not None:
            self._kept = None

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        made = None if self._kept is None else self._kept[2].weight
        return 0 if made is None else made.nbytes

    def __getstate__(self) -> dict[str, Any]:
        return {"_kept": None, "_short_lived": 0}


def materialise(module: nn.Module, size: int, dtype: torch.dtype) -> Materialised:
    """Ask a layer for what it multiplies by, and hold its answers to other questions against that.

    Args:
        module: the layer.
        size: numbers that it takes.
        dtype: of its input in the model.
    """
    held = [tensor for tensors in (module.parameters(), module.buffers()) for tensor in tensors]
    if any(tensor.is_meta for tensor in held):
        if execution_device(module).type == "meta":
            return Materialised(None, "its weights are not loaded (meta device)")
        return Materialised(None, "accelerate offloads its weights, and a dense copy would stay in memory")
    device = execution_device(module)
    try:
        found = probe(module, size, dtype, device)
        weight, offset = found.weight.contiguous(), found.offset
        refused = _refusal(module, weight, offset, found.dtype)
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return Materialised(None, f"its forward of unit vectors fails ({type(error).__name__}: {error})")
    return Materialised(None if refused else weight, refused)


def _refusal(module: nn.Module, weight: torch.Tensor, offset: torch.Tensor, dtype: torch.dtype) -> str:
    if not torch.isfinite(weight).all() or not torch.isfinite(offset).all():
        return "what it multiplies by is not finite"
    if offset.any():
        return "it adds a bias, which cannot be folded"
    off, computed = _distance_from_linear(module, weight, dtype)
    if off > _TOLERANCE.get(computed, _OTHER_TOLERANCE):
        return (
            f"what it gives is no matrix times what it gets ({off:.1%} off): its activations are quantised as well, or "
            "numbers are dropped at random"
        )
    return ""


def _distance_from_linear(module: nn.Module, weight: torch.Tensor, dtype: torch.dtype) -> tuple[float, torch.dtype]:
    """How far a layer is from a matrix on random inputs of different sizes, as a share of what it gives.

    And the dtype in which it computes, which may be bf16 inside a model in float32: then it gives no other numbers.

    Few large numbers and many small ones, of which quantised activations keep little. The largest stays below 6, from
    where some libraries (LLM.int8) compute in full.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)
    inputs = torch.randn(4, weight.shape[1], generator=generator, dtype=torch.float32, device="cpu") ** 3
    inputs *= torch.tensor([4.0, 0.5, 2.0, 0.1], dtype=torch.float32, device="cpu")[:, None] / inputs.abs().amax(
        1, keepdim=True
    )
    inputs = inputs.to(weight.device, dtype)
    with torch.autocast(weight.device.type, enabled=False):
        given = module(inputs)
    given = (given.to_local() if hasattr(given, "to_local") else given).float()
    expected = inputs.float() @ weight.float().T
    size = expected.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    computed = torch.bfloat16 if torch.equal(given, given.bfloat16().float()) else dtype
    return float(((given - expected).norm(dim=1) / size).max()), computed
