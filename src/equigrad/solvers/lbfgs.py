"""Limited-memory BFGS with a line search."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from equigrad.fields import Count, Share
from equigrad.solvers.rows import at_least_single
from equigrad.solvers.solver import Objective, Solver
from equigrad.vectors import flatten, unflatten

RESOLUTION = 1e-2
"""A loss has risen if it did so by more than this times √ε of its size; rounding does less."""

PATIENCE = 200
"""Gradients without progress after which a phase has stalled: at least ten line searches."""


@dataclass(frozen=True, kw_only=True)
class LBFGS(Solver):
    r"""L-BFGS (Nocedal 1980), which takes few, long steps on small smooth problems.

        φ ← φ - t B g,    g = ∂L/∂φ,

    where B approximates the inverse Hessian from the last moves and gradient changes. Along the
    direction `d = -B g`, the line search requires `|g(t)·d| ≤ c |g(0)·d|` and a loss that has risen
    by no more than rounding. Like the approximate Wolfe conditions (Hager, Zhang 2005), this still
    works when the loss no longer resolves the decrease, so that phases settle to the limit of the
    dtype.

    The loss has to be the same at every evaluation, without mini-batches or dropout. A nudged phase
    that keeps the free phase's memory starts with a good curvature estimate, since its loss is
    nearly the same.

    Attributes:
        history: number of moves that are kept; each takes twice the memory of φ.
        max_evaluations: the most gradients that one line search may take.
        flatter: c, the share of its slope that a step has to get below. A large one takes fewer
            gradients a step; a small one makes each step exact.

    Raises:
        ConfigurationError: a value is out of range.

    Example:
        >>> LBFGS(tol=1e-8).history
        50
    """

    fixed_loss: ClassVar[bool] = True

    history: Count = 50
    max_evaluations: Count = 20
    flatter: Share = 0.5
    check_every: Count = 1

    def init(self, params: list[Tensor], previous: Any = None) -> Any:
        """An empty memory, or the moves of an earlier phase."""
        return Memory(self.history, flatten(params).detach(), previous)

    def update(
        self,
        params: list[Tensor],
        velocity: tuple[Tensor, ...],
        state: Any,
        objective: Objective,
    ) -> bool:
        """One iteration: choose a direction, and search along it."""
        position, gradient = flatten(params), -flatten(velocity)
        if not gradient.any():
            return True
        state.learn(position, gradient)
        direction = state.direction(gradient)
        slope = gradient.dot(direction).item()
        if state.idles(gradient, slope):
            return False
        if not slope < 0:  # not a descent direction: rounding, or a loss that changes
            state.forget()
            direction, slope = -gradient, -gradient.dot(gradient).item()
        loss = objective()[0].item() if state.loss is None else state.loss

        def along(t: float) -> tuple[float, float]:
            """Move the parameters to `position + t direction`; return loss and slope there."""
            for p, value in zip(params, unflatten(position + t * direction, params), strict=True):
                p.copy_(value)
            state.idle += 1
            value, velocity = objective()
            return value.item(), -flatten(velocity).dot(direction).item()

        # without curvature, a first move of length at most one; later the quasi-Newton step
        first = min(1.0, 1 / gradient.abs().sum().item()) if state.empty else 1.0
        eps = torch.finfo(gradient.dtype).eps
        rise = RESOLUTION * eps**0.5 * abs(loss)
        most, flatter = self.max_evaluations, self.flatter
        state.loss = search(along, loss, slope, first, rise, most, flatter)
        return state.loss is not None


class Memory:
    """The last moves of L-BFGS, and the approximate inverse Hessian that follows from them.

    A pair is a move s and the change y of the gradient along it, both scaled so that `s·y = 1`. The
    inverse Hessian is kept in compact form (Byrd, Nocedal, Schnabel 1994), in which a direction
    takes a few large operations instead of many small ones.

    Attributes:
        loss: the loss at the current parameters; None if it is unknown.
        idle: number of gradients since the last progress.
    """

    def __init__(self, history: int, like: Tensor, previous: "Memory | None" = None) -> None:
        self.loss: float | None = None
        self._at: tuple[Tensor, Tensor] | None = None
        self._least, self.idle = [math.inf] * 3, 0
        if previous is not None and previous.history == history:
            self._pairs, self._order = previous._pairs.clone(), previous._order
            self._products = previous._products
        else:
            # `_pairs` has rows of s and of y, `_order` their positions from the oldest to the
            # newest, and `_products` the matrices s_i·y_j (i ≤ j) and y_i·y_j in that order
            self._pairs = like.new_zeros(2, history, like.numel())
            self.forget()

    def idles(self, gradient: Tensor, slope: float) -> bool:
        """Whether gradient, predicted decrease and loss have not improved for long.

        All three are watched: on ill-conditioned problems, the predicted decrease `½ g·B g` keeps
        falling while the gradient oscillates and the loss no longer changes in its last digit.
        """
        low = math.inf if self.loss is None else self.loss
        seen = [gradient.norm().item(), abs(slope), low]
        size, decrease, least = self._least
        resolved = 100 * torch.finfo(gradient.dtype).eps * abs(low)
        if seen[0] < 0.9 * size or seen[1] < 0.9 * decrease or low < least - resolved:
            self._least, self.idle = [min(p) for p in zip(seen, self._least, strict=True)], 0
        return self.idle > PATIENCE

    def forget(self) -> None:
        """Drop all pairs."""
        self._pairs.zero_()
        self._order = torch.empty(0, dtype=torch.long, device=self._pairs.device)
        self._products = self._pairs.new_zeros(2, 0, 0)

    @property
    def history(self) -> int:
        """How many pairs it holds."""
        return self._pairs.shape[1]

    @property
    def empty(self) -> bool:
        """Whether there is no pair."""
        return len(self._order) == 0

    def learn(self, position: Tensor, gradient: Tensor) -> None:
        """Remember the last move, if the loss curved upward along it."""
        if self._at is not None:
            self.remember(position - self._at[0], gradient - self._at[1])
        self._at = position, gradient

    def remember(self, move: Tensor, change: Tensor) -> None:
        """Add a pair of positive curvature, which keeps B positive definite.

        It takes the place of the oldest pair if all places are taken.

        Args:
            move: a change of φ.
            change: the change of the gradient that it causes.
        """
        move, change = move.detach(), change.detach()
        curvature = move.dot(change).item()
        if not curvature > torch.finfo(move.dtype).eps * change.dot(change).item():
            return
        scale = 1 / math.sqrt(curvature)
        known = self._products
        if len(self._order) == self.history:
            self._order, known = self._order.roll(-1), known[:, 1:, 1:]
        else:
            self._order = torch.arange(len(self._order) + 1, device=move.device)
        row = self._order[-1]
        torch.mul(move, scale, out=self._pairs[0, row])
        torch.mul(change, scale, out=self._pairs[1, row])
        column = self._dot(self._pairs[1, row])
        self._products = torch.nn.functional.pad(known, (0, 1, 0, 1))
        self._products[:, :, -1] = column
        self._products[1, -1] = column[1]

    def _dot(self, vector: Tensor) -> Tensor:
        """`s_i · vector` and `y_i · vector`, the oldest pair first."""
        return (self._pairs.flatten(0, 1) @ vector).view(2, -1)[:, self._order]

    def direction(self, gradient: Tensor) -> Tensor:
        """`-B g`, where B approximates the inverse Hessian."""
        if self.empty:
            return -gradient
        # B = last I + S W Sᵀ - last (S R⁻ᵀ Yᵀ + Y R⁻¹ Sᵀ), W = R⁻ᵀ (I + last YᵀY) R⁻¹, where
        # R is `upper`, YᵀY is `sizes`, and the columns of S and Y are the pairs
        upper, sizes = at_least_single(self._products)
        last = 1 / sizes[-1, -1].item()  # s·y / y·y of the last pair
        along_moves, along_changes = at_least_single(self._dot(gradient))
        u = torch.linalg.solve_triangular(upper, along_moves[:, None], upper=True)[:, 0]
        right = u + last * (sizes @ u - along_changes)
        w = torch.linalg.solve_triangular(upper.T, right[:, None], upper=False)[:, 0]
        weights = self._pairs.new_zeros(self._pairs.shape[:2])
        weights[:, self._order] = torch.stack([w, -last * u]).to(weights.dtype)
        return -torch.addmv(last * gradient, self._pairs.flatten(0, 1).T, weights.flatten())


def search(
    along: Callable[[float], tuple[float, float]],
    loss: float,
    slope: float,
    first: float,
    rise: float,
    evaluations: int,
    flatter: float = 0.5,
) -> float | None:
    """Find a step with a flatter slope and a loss that has not risen, by bisection and secants.

    Args:
        along: moves the parameters to a step, and returns loss and slope there.
        loss: the loss at step zero.
        slope: the slope at step zero, negative.
        first: the first step to try.
        rise: the rise of the loss that is tolerated.
        evaluations: the most steps to try.
        flatter: share of the first slope that the slope has to get below.

    Returns:
        The loss where the parameters were left; None if no step was accepted, in which case the
        parameters are back at step zero.
    """
    low, low_slope, high, t = 0.0, slope, math.inf, first
    for _ in range(evaluations):
        value, here = along(t)
        # beyond `high` the loss has risen or its slope is positive; at `low` it still falls
        if not math.isfinite(value) or value > loss + rise:
            high, t = t, 0.5 * (low + t)
            continue
        if abs(here) <= -flatter * slope:
            return value
        if here < 0:
            low, low_slope = t, here
            t = 2 * t if high == math.inf else 0.5 * (low + high)
        else:
            high = t
            # the secant's zero of the slope, kept off both ends so that the bracket shrinks
            t = low + (t - low) * min(0.9, max(0.1, low_slope / (low_slope - here)))
    value, _ = along(low)
    return value if low > 0 else None
