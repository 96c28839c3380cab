"""Anderson acceleration."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from equigrad.fields import Count, Damping, NotNegative
from equigrad.solvers.rows import at_least_single, move_rows, rows
from equigrad.solvers.solver import Objective, Solver


@dataclass(frozen=True, kw_only=True)
class Anderson(Solver):
    r"""Anderson acceleration of a fixed-point iteration (Anderson 1965; Walker, Ni 2011).

        φ ← φ + d v - (ΔΦ + d ΔV) γ,    γ = argmin ‖v - ΔV γ‖²

    where v = F(φ) - φ is the velocity, and the columns of ΔΦ and ΔV are the last changes of φ and
    of v. On an affine map this is equivalent to GMRES. If samples settle independently, each has
    its own γ.

    Attributes:
        history: number of moves that are kept; each takes twice the memory of φ.
        damping: d in (0, 1].
        regularization: ridge in the normal equations for γ, as a share of their trace.

    Raises:
        ConfigurationError: a value is out of range.

    Example:
        >>> Anderson(tol=1e-5, max_steps=50).history
        5
    """

    history: Count = 5
    damping: Damping = 1.0
    regularization: NotNegative = 1e-8
    check_every: Count = 1

    def init(self, params: list[Tensor], previous: Any = None) -> "_Moves":
        """An empty history; the moves of another phase belong to another map."""
        return _Moves()

    def update(
        self,
        params: list[Tensor],
        velocity: tuple[Tensor, ...],
        state: "_Moves",
        objective: Objective,
    ) -> None:
        """One step."""
        v = rows(velocity, objective.samples)
        state.learn(v, self.history, self.damping)
        step = self.damping * v
        if state.known:
            gamma = state.coefficients(v, self.regularization)
            step -= torch.bmm(gamma, state.undone[:, : state.known]).squeeze(1)
        move_rows(params, step)
        state.last = v, step


class _Moves:
    """The last changes of φ and v (samples x history x size), and the inner products of those of v.

    `changes` is ΔV; `undone` is ΔΦ + d ΔV, from which γ forms the correction of a step.
    """

    def __init__(self) -> None:
        self.last: tuple[Tensor, Tensor] | None = None
        self.taken = 0

    @property
    def known(self) -> int:
        """The number of moves in the history."""
        return min(self.taken, self.changes.shape[1]) if self.taken else 0

    def learn(self, v: Tensor, history: int, damping: float) -> None:
        """Add the last move to the history, in the place of the oldest if it is full."""
        if self.last is None:
            return
        if not self.taken:
            self.changes = v.new_empty(len(v), history, v.shape[1])
            self.undone = torch.empty_like(self.changes)
            self.overlaps = v.new_zeros(len(v), history, history)
        before, step = self.last
        slot = self.taken % history
        self.taken += 1
        change = v - before
        self.changes[:, slot] = change
        torch.add(step, change, alpha=damping, out=self.undone[:, slot])
        row = torch.bmm(self.changes[:, : self.known], change[:, :, None].conj()).squeeze(2)
        self.overlaps[:, : self.known, slot] = row
        self.overlaps[:, slot, : self.known] = row.conj()

    def coefficients(self, v: Tensor, regularization: float) -> Tensor:
        """γ, samples x 1 x known."""
        overlaps = self.overlaps[:, : self.known, : self.known]
        right = torch.bmm(self.changes[:, : self.known].conj(), v[:, :, None])
        trace = overlaps.diagonal(dim1=1, dim2=2).real.sum(1)
        share = max(regularization, 10 * torch.finfo(v.dtype).eps)
        ridge = share * trace + torch.finfo(v.dtype).tiny
        matrix = overlaps.mT.clone()
        matrix.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
        solved, _ = torch.linalg.solve_ex(at_least_single(matrix), at_least_single(right))
        return solved.mT.to(v.dtype)  # the ridge makes the matrix regular
