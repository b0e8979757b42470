"""Which part of a decode step takes how long: linear layers, attention on the cache, and the rest.

What a cache costs is in attention alone. Linear layers take as long with any cache; but where a library of quantisation
is slow at them, they are most of a step, and hide what happens to the cache.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from kvsplice_hf.bench.rounds import synchronise


LINEAR, ATTENTION, REST = "linear layers", "attention on the cache", "the rest"
PARTS = (LINEAR, ATTENTION, REST)


def linear_layers(model: nn.Module, left_out: frozenset[str]) -> list[nn.Module]:
    """Innermost layers that are linear by their sizes, packed ones too, but for those of these names."""
    return [
        module
        for name, module in model.named_modules()
        if all(isinstance(getattr(module, size, None), int) for size in ("in_features", "out_features"))
        and not any(True for _ in module.children())
        and name.rpartition(".")[2] not in left_out
    ]


def parts_of_step(
    model: nn.Module, attention: list[nn.Module], run: Callable[[], object], device: str | torch.device
) -> dict[str, float]:
    """Seconds of each of `PARTS` in one call.

    `kv_b_proj` counts as attention: of a stock model it expands all stored latents at each step, and attention on codes
    does without.

    Args:
        model: the model.
        attention: its attention modules.
        run: makes one step.
        device: on which it computes.
    """
    clock = _Clock(device)
    layers = linear_layers(model, frozenset({"kv_b_proj"}))
    with clock.listening(layers, LINEAR), clock.listening(attention, ATTENTION):
        synchronise(device)
        start = time.perf_counter()
        run()
        synchronise(device)
        whole = time.perf_counter() - start
    inside = clock.seconds.get(LINEAR, 0.0), clock.seconds.get(ATTENTION, 0.0)
    own = inside[1] - clock.linear_inside
    return {LINEAR: inside[0], ATTENTION: own, REST: whole - inside[0] - own}


class _Clock:
    """Adds up the time in modules of each kind."""

    def __init__(self, device: str | torch.device) -> None:
        self._device = device
        self._started: list[tuple[str, float]] = []
        self.seconds: dict[str, float] = {}
        self.linear_inside = 0.0  # in linear layers of attention modules

    @contextmanager
    def listening(self, modules: list[nn.Module], kind: str) -> Iterator[None]:
        """Time these modules as a kind."""
        hooks = []
        # The hooks of a patch are a part of attention: theirs run between these two.
        for module in modules:
            hooks.append(module.register_forward_pre_hook(lambda *_: self._enter(kind), prepend=True))
            hooks.append(module.register_forward_hook(self._leave))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, kind: str) -> None:
        synchronise(self._device)
        self._started.append((kind, time.perf_counter()))

    def _leave(self, *_: Any) -> None:
        synchronise(self._device)
        kind, start = self._started.pop()
        taken = time.perf_counter() - start
        self.seconds[kind] = self.seconds.get(kind, 0.0) + taken
        if kind == LINEAR and any(outer == ATTENTION for outer, _ in self._started):
            self.linear_inside += taken
