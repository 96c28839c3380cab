"""Limited-memory BFGS with a line search."""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from equigrad.solvers.solver import Objective, Solver, require
from equigrad.vectors import flatten, unflatten

RESOLUTION = 1e-2
"""A loss has risen where it did so by more than this times √ε of its size; rounding does less."""


@dataclass(frozen=True, kw_only=True)
class LBFGS(Solver):
    r"""L-BFGS (Nocedal 1980): few, far-reaching steps for small smooth problems.

        φ ← φ - t B g,    g = ∂L/∂φ,

    where B approximates the inverse Hessian from the last moves and gradient changes. Along the
    direction `d = -B g`, the line search asks for `|g(t)·d| ≤ ½ |g(0)·d|` and for a loss that has
    not risen by more than rounding: in the spirit of the approximate Wolfe conditions (Hager, Zhang
    2005), which go on working where the loss no longer resolves the decrease, so that phases settle
    to what the dtype allows.

    The loss has to be the same at every evaluation: mini-batches and dropout are not for it. A
    nudged phase that keeps the free phase's memory knows the curvature from the start, since its
    loss is nearly the same.

    Attributes:
        history: moves that are remembered.
        max_evaluations: gradients that one line search may take.

    Raises:
        ConfigurationError: a value outside its range.

    Example:
        >>> LBFGS(tol=1e-8).history
        20
    """

    fixed_loss: ClassVar[bool] = True

    history: int = 20
    max_evaluations: int = 20
    check_every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.history >= 1, f"history must be at least 1, got {self.history}")
        require(
            self.max_evaluations >= 1,
            f"max_evaluations must be at least 1, got {self.max_evaluations}",
        )

    def init(self, params: list[Tensor], previous: "Memory | None" = None) -> "Memory":
        """An empty memory, or the moves of an earlier phase."""
        return Memory(moves=deque(previous.moves if previous else (), maxlen=self.history))

    def update(
        self,
        params: list[Tensor],
        velocity: tuple[Tensor, ...],
        state: "Memory",
        objective: Objective,
    ) -> bool:
        """One iteration: a direction, and how far to go along it."""
        position, gradient = flatten(params), -flatten(velocity)
        if not gradient.any():
            return True
        state.learn(position, gradient)
        direction = state.direction(gradient)
        slope = gradient.dot(direction).item()
        if not slope < 0:  # rounding, or a loss that changes between evaluations
            state.moves.clear()
            direction, slope = -gradient, -gradient.dot(gradient).item()
        loss = objective()[0].item() if state.loss is None else state.loss

        def along(t: float) -> tuple[float, float]:
            """Loss and slope at `position + t direction`, where the parameters are left."""
            for p, value in zip(params, unflatten(position + t * direction, params), strict=True):
                p.copy_(value)
            value, velocity = objective()
            return value.item(), -flatten(velocity).dot(direction).item()

        first = 1.0 if state.moves else min(1.0, 1 / gradient.abs().sum().item())
        eps = torch.finfo(gradient.dtype).eps
        rise = RESOLUTION * eps**0.5 * abs(loss)
        state.loss = search(along, loss, slope, first, rise, self.max_evaluations)
        return state.loss is not None


@dataclass
class Memory:
    """The last moves of an L-BFGS: pairs of a move and the change of the gradient it made."""

    moves: deque[tuple[Tensor, Tensor]]
    position: Tensor | None = None
    gradient: Tensor | None = None
    loss: float | None = None

    def learn(self, position: Tensor, gradient: Tensor) -> None:
        """Remember the move that led here, if the loss curved upward along it."""
        if self.position is not None and self.gradient is not None:
            move, change = position - self.position, gradient - self.gradient
            if move.dot(change) > torch.finfo(move.dtype).eps * change.dot(change):
                self.moves.append((move, change))
        self.position, self.gradient = position, gradient

    def direction(self, gradient: Tensor) -> Tensor:
        """`-B g` by the two-loop recursion."""
        q, shares = -gradient, []
        for move, change in reversed(self.moves):
            share = move.dot(q) / move.dot(change)
            q = q - share * change
            shares.append(share)
        if self.moves:
            move, change = self.moves[-1]
            q = q * (move.dot(change) / change.dot(change))
        for (move, change), share in zip(self.moves, reversed(shares), strict=True):
            q = q + (share - change.dot(q) / move.dot(change)) * move
        return q


def search(
    along: Callable[[float], tuple[float, float]],
    loss: float,
    slope: float,
    first: float,
    rise: float,
    evaluations: int,
) -> float | None:
    """Find a step with a flatter slope and a loss that has not risen, by bisection and secants.

    Args:
        along: loss and slope at a step; moves the parameters there.
        loss: at step zero.
        slope: at step zero, negative.
        first: the step to try first.
        rise: what the loss may rise by.
        evaluations: steps to try at most.

    Returns:
        The loss where the parameters were left; None where even the shortest step tried was
        refused, and the parameters are back at step zero.
    """
    low, low_slope, high, t = 0.0, slope, math.inf, first
    for _ in range(evaluations):
        value, here = along(t)
        if not math.isfinite(value) or value > loss + rise:
            high, t = t, 0.5 * (low + t)
            continue
        if abs(here) <= -0.5 * slope:
            return value
        if here < 0:
            low, low_slope = t, here
            t = 2 * t if high == math.inf else 0.5 * (low + high)
        else:
            high = t
            t = low + (t - low) * min(0.9, max(0.1, low_slope / (low_slope - here)))
    value, _ = along(low)
    return value if low > 0 else None
