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

    where v = F(φ) - φ is the velocity and the columns of ΔΦ and ΔV are the last moves of φ and the
    changes of v they made. On an affine map it is GMRES. Where samples settle on their own, each
    has a γ of its own.

    Attributes:
        history: moves that are remembered, twice the size of φ each.
        damping: d in (0, 1].
        regularization: added to the normal equations for γ, as a share of their trace.

    Raises:
        ConfigurationError: a value outside its range.

    Example:
        >>> Anderson(tol=1e-5, max_steps=50).history
        5
    """

    history: Count = 5
    damping: Damping = 1.0
    regularization: NotNegative = 1e-8
    check_every: Count = 1

    def init(self, params: list[Tensor], previous: Any = None) -> "_Moves":
        """No moves; those of another phase tell of another map."""
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
    """What the last moves changed (samples x history x size), and how these changes overlap.

    `changes` is ΔV, `undone` is ΔΦ + d ΔV: what γ takes from a step.
    """

    def __init__(self) -> None:
        self.last: tuple[Tensor, Tensor] | None = None
        self.taken = 0

    @property
    def known(self) -> int:
        """How many moves there are."""
        return min(self.taken, self.changes.shape[1]) if self.taken else 0

    def learn(self, v: Tensor, history: int, damping: float) -> None:
        """Remember the last move by what it changed, in the place of the oldest."""
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
        return solved.mT.to(v.dtype)  # the ridge has made the matrix regular
