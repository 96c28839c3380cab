"""Broyden's method."""

from dataclasses import dataclass

import torch
from torch import Tensor

from equigrad.fields import Count
from equigrad.solvers.rows import move_rows, rows
from equigrad.solvers.solver import Objective, Solver


@dataclass(frozen=True, kw_only=True)
class Broyden(Solver):
    r"""Broyden's good method: a quasi-Newton root search for the velocity (Broyden 1965).

        φ ← φ + s,   s = B v,    B ← B + (s - B y) (sᵀB) / (sᵀB y),   y = v_before - v_after

    where v = F(φ) - φ and B, initially the identity, approximates the inverse of `I - ∂F/∂φ`. Also
    finds fixed points of maps that do not contract. If samples settle independently, each has its
    own B.

    Attributes:
        history: number of updates of B that are kept, each of twice the memory of φ; when the
            history is full, B starts again as the identity.

    Raises:
        ConfigurationError: a value is out of range.

    Example:
        >>> Broyden(tol=1e-6, max_steps=100).history
        30
    """

    history: Count = 30
    check_every: Count = 1

    def init(self, params: list[Tensor], previous: "_Inverse | None" = None) -> "_Inverse":
        """The identity, or the approximation at the end of another phase."""
        return _Inverse(self.history, previous)

    def update(
        self,
        params: list[Tensor],
        velocity: tuple[Tensor, ...],
        state: "_Inverse",
        objective: Objective,
    ) -> None:
        """One step."""
        v = rows(velocity, objective.samples)
        state.learn(v, rows(params, objective.samples))
        step = state.apply(v)
        move_rows(params, step)
        state.last = v, step


class _Inverse:
    """`B = I + Σ_i left_i right_iᵀ` for each sample; the factors are samples x history x size."""

    def __init__(self, history: int, previous: "_Inverse | None" = None) -> None:
        self.last: tuple[Tensor, Tensor] | None = None
        self.history, self.known = history, 0
        if previous is not None and previous.known and previous.history == history:
            self.left, self.right = previous.left.clone(), previous.right.clone()
            self.known = previous.known

    def apply(self, vector: Tensor) -> Tensor:
        """`B vector`."""
        return self._apply(vector, self.right, self.left) if self.known else vector.clone()

    def apply_transposed(self, vector: Tensor) -> Tensor:
        """`Bᵀ vector`."""
        return self._apply(vector, self.left, self.right) if self.known else vector

    def _apply(self, vector: Tensor, by: Tensor, along: Tensor) -> Tensor:
        weights = torch.bmm(by[:, : self.known], vector[:, :, None])
        return vector + torch.bmm(weights.mT, along[:, : self.known]).squeeze(1)

    def learn(self, v: Tensor, position: Tensor) -> None:
        """Update B with the last step and the change of the velocity that it made."""
        if self.last is None:
            return
        before, step = self.last
        if self.known in (0, self.history):
            self.known = 0
            self.left = v.new_empty(len(v), self.history, v.shape[1])
            self.right = torch.empty_like(self.left)
        change = before - v
        image, row = self.apply(change), self.apply_transposed(step)
        size = (step * image).sum(1, keepdim=True)
        # skip samples that no longer move: their changes of v are rounding errors of F(φ) - φ
        eps = torch.finfo(v.dtype).eps
        tiny = step.norm(dim=1, keepdim=True) * image.norm(dim=1, keepdim=True)
        rounding = 2 * eps * position.norm(dim=1, keepdim=True)
        teaches = (size.abs() > eps * tiny) & (change.norm(dim=1, keepdim=True) > rounding)
        left = (step - image) / torch.where(teaches, size, 1.0)
        self.left[:, self.known] = torch.where(teaches, left, 0.0)
        self.right[:, self.known] = row
        self.known += 1
