"""Gradient descent with momentum."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from equigrad.fields import Momentum, Positive, require
from equigrad.problems import Params
from equigrad.solvers.schedules import settings
from equigrad.solvers.solver import Objective, Solver

if TYPE_CHECKING:  # or a schedule
    Rate = Share = Any
else:
    Rate, Share = Positive, Momentum


@dataclass(frozen=True, kw_only=True)
class GradientDescent(Solver):
    """Gradient descent with heavy-ball or Nesterov momentum.

        m ← μ m + v,    φ ← φ + η (v + μ m)   with nesterov,   φ ← φ + η m   without,

    where `v = -∂L/∂φ` is the velocity: the rule of `torch.optim.SGD`, with a few fused calls in
    each step. For a `FixedPoint`, `v = F(φ, θ) - φ`: η = 1 without momentum iterates the map, and
    η < 1 damps it.

    Attributes:
        lr: step size η > 0, or a function `(meta_params, step)` that returns it: a schedule, or a
            learned step size. It is a number for all params, or a dictionary by their names with a
            number for each param or for each of its weights. Estimators that differentiate the
            steps (`Unrolled`, `MAML`, `ForwardMode`) compute its derivative.
        momentum: μ in [0, 1), or such a function.
        nesterov: whether to look ahead along the momentum (Nesterov 1983, in Sutskever's form).

    Raises:
        ConfigurationError: a value is out of range.

    Example:
        >>> GradientDescent(lr=0.1, momentum=0.9, nesterov=True, max_steps=500, tol=1e-6).lr
        0.1
    """

    differentiable: ClassVar[bool] = True
    scheduled: ClassVar[frozenset[str]] = frozenset({"lr", "momentum"})

    lr: Rate = 0.01
    momentum: Share = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not self.nesterov or self.momentum != 0,
            "nesterov=True needs momentum > 0, such as momentum=0.9",
        )
        require(
            not (self.compile and self.schedules()),
            "compile=True compiles several steps into one function, but a setting that is a "
            "function of (meta_params, step) has to be called before every step; use "
            "compile=False",
        )

    def schedules(self) -> dict[str, Callable[[Params, int], Any]]:
        """The step size and the momentum, where they are functions."""
        given = {"lr": self.lr, "momentum": self.momentum}
        return {name: setting for name, setting in given.items() if callable(setting)}

    def init(self, params: list[Tensor], previous: list[Tensor] | None = None) -> list[Tensor]:
        """Momentum buffers: zeros, or copies of those of an earlier phase."""
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
        if callable(self.lr) or callable(self.momentum):
            self._scheduled(params, velocity, state, objective)
            return
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

    def _scheduled(
        self,
        params: list[Tensor],
        velocity: tuple[Tensor, ...],
        state: list[Tensor],
        objective: Objective,
    ) -> None:
        """One step with settings that may differ between params and may have a graph."""
        rates = settings("lr", self.lr, objective)
        momenta = settings("momentum", self.momentum, objective)
        for i, (p, v) in enumerate(zip(params, velocity, strict=True)):
            move = v
            if state:
                state[i] = momenta[i] * state[i] + v
                move = v + momenta[i] * state[i] if self.nesterov else state[i]
            p.add_(rates[i] * move)
