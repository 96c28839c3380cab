"""Gradient descent with momentum."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from equigrad.fields import Momentum, Positive, require
from equigrad.solvers.solver import Objective, Solver


@dataclass(frozen=True, kw_only=True)
class GradientDescent(Solver):
    """Gradient descent, with heavy-ball or Nesterov momentum.

        m ← μ m + v,    φ ← φ + η (v + μ m)   with nesterov,   φ ← φ + η m   without,

    where `v = -∂L/∂φ` is the velocity: the rule of `torch.optim.SGD`, in a few fused calls a step.
    For a `FixedPoint`, `v = F(φ, θ) - φ`: η = 1 without momentum iterates the map, η < 1 damps it.

    Attributes:
        lr: step size η > 0.
        momentum: μ in [0, 1).
        nesterov: look ahead along the momentum (Nesterov 1983, in Sutskever's form).

    Raises:
        ConfigurationError: a value outside its range.

    Example:
        >>> GradientDescent(lr=0.1, momentum=0.9, nesterov=True, max_steps=500, tol=1e-6).lr
        0.1
    """

    differentiable: ClassVar[bool] = True

    lr: Positive = 0.01
    momentum: Momentum = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not self.nesterov or self.momentum > 0,
            "nesterov=True needs momentum > 0, for example momentum=0.9",
        )

    def init(self, params: list[Tensor], previous: list[Tensor] | None = None) -> list[Tensor]:
        """Momentum buffers: zero, or a copy of those of an earlier phase."""
        if self.momentum == 0:
            return []
        if previous:
            return [m.clone() for m in previous]
        return [torch.zeros_like(p, requires_grad=False) for p in params]

    def update(
        self,
        params: list[Tensor],
        velocity: tuple[Tensor, ...],
        state: list[Tensor],
        objective: Objective,
    ) -> None:
        """One step."""
        if self.momentum == 0:
            torch._foreach_add_(params, velocity, alpha=self.lr)
            return
        torch._foreach_mul_(state, self.momentum)
        torch._foreach_add_(state, velocity)
        if self.nesterov:
            torch._foreach_add_(params, velocity, alpha=self.lr)
            torch._foreach_add_(params, state, alpha=self.lr * self.momentum)
        else:
            torch._foreach_add_(params, state, alpha=self.lr)
