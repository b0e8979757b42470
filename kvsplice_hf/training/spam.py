"""`AdamWSPAM`: AdamW that clips spikes of single gradient elements and forgets its moments now and then.

After "SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training" (arXiv 2501.06842). A gradient element whose
square exceeds `threshold` times the second moment of that element is set to the root of that product, sign kept. Every
`reset_every` steps both moments start anew, and the learning rate rises along a cosine over the next `warmup` steps.

Where the paper leaves room: the second moment is the bias-corrected one of the steps before, as Adam divides by it, so
that ordinary gradients are not clipped right after a reset; elements that had no gradient so far are not clipped; and
weight decay is decoupled, as in AdamW.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from kvsplice_hf.errors import ConfigError


class AdamWSPAM(torch.optim.Optimizer):
    """AdamW with spike-aware clipping and momentum reset.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        betas: of the first and the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled.
        threshold: theta; a gradient element is clipped where its square exceeds this many times its second moment.
        reset_every: steps between resets of the moments; 0 never resets.
        warmup: steps after a reset over which the learning rate rises from 0 along a cosine.

    Raises:
        ConfigError: a value is out of its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        threshold: float = 5000.0,
        reset_every: int = 500,
        warmup: int = 150,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "threshold": threshold,
            "reset_every": reset_every,
            "warmup": warmup,
        }
        _check(defaults)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> Any:  # type: ignore[override]
        """One step; `closure`, if given, computes the loss, which is then returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_of(parameter, parameter.grad, group)
        return loss

    def _step_of(self, parameter: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        age = _steps_since_reset(state["step"], group["reset_every"])
        if age == 0 and state["step"]:
            mean.zero_()
            square.zero_()
        beta1, beta2 = group["betas"]
        if age > 0:
            gradient = clip_spikes(gradient, square / (1 - beta2**age), group["threshold"])
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        resumed = state["step"] >= group["reset_every"] > 0
        lr = group["lr"] * (_rise(age + 1, group["warmup"]) if resumed else 1.0)
        age, state["step"] = age + 1, state["step"] + 1
        parameter.mul_(1 - lr * group["weight_decay"])
        root = (square / (1 - beta2**age)).sqrt_().add_(group["eps"])
        parameter.addcdiv_(mean, root, value=-lr / (1 - beta1**age))


def clip_spikes(gradient: torch.Tensor, second_moment: torch.Tensor, threshold: float) -> torch.Tensor:
    """The gradient, its elements of a square above `threshold` times the second moment brought down to that.

    Args:
        gradient, second_moment: of one shape; elements without a second moment are left as they are.
        threshold: theta.
    """
    limit = (threshold * second_moment).sqrt_()
    return torch.where((gradient.abs() > limit) & (second_moment > 0), limit.copysign(gradient), gradient)


def _steps_since_reset(step: int, reset_every: int) -> int:
    return step % reset_every if reset_every else step


def _rise(steps: int, warmup: int) -> float:
    return 1.0 if steps >= warmup else 0.5 * (1 - math.cos(math.pi * steps / warmup))


def _check(values: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay", "reset_every", "warmup"):
        if not values[name] >= 0:
            raise ConfigError(f"`{name}` is {values[name]!r}; it must be 0 or more.")
    if not values["threshold"] > 0:
        raise ConfigError(f"`threshold` is {values['threshold']!r}; it must be above 0.")
    if not all(0 <= beta < 1 for beta in values["betas"]):
        raise ConfigError(f"`betas` is {values['betas']!r}; both must be in [0, 1).")
