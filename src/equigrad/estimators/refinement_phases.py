"""Phases that go on until their residual is small enough, and what stands in the way."""

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor

from equigrad.estimators.refinement_pairs import Answer, Pair
from equigrad.evaluation import Evaluation
from equigrad.solvers import Settled, Solver
from equigrad.solvers.phase import resting
from equigrad.vectors import flatten

ROUNDING = 100
"""A residual of so many rounding errors of the largest one is at the floor of the dtype."""

TINY = torch.finfo(torch.float64).tiny

DIGIT = 0.1
"""A contrast of which rounding is worth more has no digit."""

FIRST_LOOK = 20
"""Steps until a phase is first asked whether it gets on; then twice as many, and so on."""

Obstacle = Literal["budget", "rounding", "restless", "lopsided", "apart", "cancelled"]


class RefinedPhases:
    """The free phase of a meta-gradient to an accuracy, the nudged ones, and their contrasts.

    Args:
        evaluation: evaluates and counts.
        solver: settles; its own limits give way to `rtol` and `budget`.
        rtol: relative error to reach.
        budget: gradient evaluations to spend.
        keep_momentum: whether a new phase goes on with the solver's state.

    Attributes:
        free: where the free phase stands.
        force: `∂L_out/∂φ` there, by name; `force_size` is its norm.
        direct: `∂L_out/∂θ` there, by name.
        by_force: phases are nudged by the force, or by the outer loss.
        obstacle: what stands in the way, or None; `reason` says it in words.
    """

    def __init__(
        self,
        evaluation: Evaluation,
        solver: Solver,
        *,
        rtol: float,
        budget: int,
        keep_momentum: bool,
    ) -> None:
        self.evaluation, self.solver, self.keep_momentum = evaluation, solver, keep_momentum
        self.rtol, self.budget = rtol, budget
        dtypes = {p.dtype for p in evaluation.params.values()}
        self.dtype = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
        self.eps = torch.finfo(self.dtype).eps
        self.largest_force = 0.0
        self.by_force = True
        self.obstacle: Obstacle | None = None
        self.free = resting(evaluation.params, evaluation.stage.first_buffers)
        self._look_at_force()

    def begin(self, share: float) -> None:
        """Settle the free phase until its residual is this share of the outer force."""
        tol = share * self.force_size
        tol = tol if TINY < tol < math.inf else TINY
        most = max(1, min(FIRST_LOOK, self.budget // 20))
        self.free = self.evaluation.settle(
            dataclasses.replace(self.solver, tol=tol, max_steps=most)
        )
        self.largest = self.free.phase.start_residual
        self._look_at_force()
        self.settle_free(share)

    def settle_free(self, share: float) -> None:
        """Go on with the free phase until its residual is this share of the outer force."""
        while not self.obstacle:
            tol = max(share * self.force_size, self.floor)
            if self.free.phase.residual <= tol and self.free.phase.outcome == "converged":
                break
            self.free = self.settle(self.free, 0.0, tol)
            self._look_at_force()

    def _look_at_force(self) -> None:
        self.force, self.direct = self.evaluation.outer_gradients(self.free)
        self.force_size = flatten(list(self.force.values())).norm().item()
        self.largest_force = max(self.force_size, self.largest_force)

    @property
    def unforced(self) -> bool:
        """Whether `∂L_out/∂φ` is nothing but rounding."""
        return self.force_size <= ROUNDING * self.eps * self.largest_force

    @property
    def floor(self) -> float:
        """The residual that rounding may leave; positive."""
        return max(ROUNDING * self.eps * self.largest, TINY)

    def contrast(self, one: Settled, other: Settled, apart: float) -> dict[str, Tensor]:
        """The contrast of two phases whose nudges differ by `apart`."""
        return self.evaluation.contrast([one, other], [1 / apart, -1 / apart], self.direct)

    def rounding(self, plus: Settled, minus: Settled) -> float:
        """What rounding φ is worth beside the distance between the phases."""
        one, other = flatten(list(plus.params.values())), flatten(list(minus.params.values()))
        moved = (one - other).norm().item()
        return self.eps * one.norm().item() / moved if moved else math.inf

    def cancelled(self, pair: Pair) -> float:
        """What rounding is worth where the contrast is small beside those of other directions.

        One of them is the response with its elements in reverse order.
        """
        other = {}
        for name, plus in pair.plus.params.items():
            response = plus - pair.minus.params[name]
            other[name] = pair.minus.params[name] + response.flatten().flip(0).view_as(plus)
        moved = self.contrast(
            pair.minus, dataclasses.replace(pair.plus, params=other), 2 * pair.beta
        )
        grads, direct = (flatten(list(g.values())).double() for g in (pair.grads, self.direct))
        usual = (flatten(list(moved.values())).double() - direct).norm() + direct.norm()
        least = max(ROUNDING * self.eps, pair.rounding)
        return (least * usual / grads.norm()).item() if usual else 0.0

    def doubted(self, answer: Answer, pair: Pair) -> Answer:
        """The answer, with what rounding is worth as the parts of a contrast cancel."""
        cancelled = self.cancelled(pair)
        if cancelled > self.rtol:
            digit = "no correct digit" if cancelled > DIGIT else "no more correct digits"
            self.rounds(f"the contrast has {digit}")
            self.obstacle = "cancelled"
        # without a digit, the differences that errors are estimated by have none, either
        error = math.inf if cancelled > DIGIT else answer.error + cancelled
        return dataclasses.replace(answer, error=error)

    def rounds(self, what: str) -> None:
        """Note that rounding stands in the way."""
        self.obstacle = "rounding"
        self.reason = f"in {self.dtype} {what}"
        if self.dtype != torch.float64:
            self.reason += "; use torch.float64"

    @property
    def spent(self) -> bool:
        """Whether the budget is spent."""
        return self.evaluation.tally.gradient_evaluations >= self.budget

    def settle(self, state: Settled, beta: float, tol: float, limit: int | None = None) -> Settled:
        """Go on with a phase, or start one at a state, until its residual is at most `tol`.

        Gives up where the residual does not get smaller, and says why in `obstacle`; or after as
        many steps as `limit` says.
        """
        begun = state.phase if state.phase.beta == beta else None
        keep, chunk = self.keep_momentum or begun is not None, FIRST_LOOK
        before = math.inf
        while True:
            room = self.budget - self.evaluation.tally.gradient_evaluations
            # a step with a line search takes several gradients
            most = max(1, min(chunk, room // 20, limit or chunk))
            solver = dataclasses.replace(self.solver, tol=tol, max_steps=most)
            state = self.evaluation.settle_nudged(
                state,
                solver,
                beta,
                keep_momentum=keep,
                share=1.0,
                force=self.force if self.by_force and beta != 0 else None,
            )
            phase = state.phase
            if begun is not None:
                phase = dataclasses.replace(
                    phase,
                    steps=begun.steps + phase.steps,
                    start_residual=begun.start_residual,
                )
                state = dataclasses.replace(state, phase=phase)
            if phase.outcome == "converged" or (limit is not None and phase.steps >= limit):
                return state
            stuck = phase.outcome == "stalled" or (
                most > 8 * FIRST_LOOK and phase.residual >= before
            )
            slow = most >= FIRST_LOOK and phase.residual > 0.7 * before
            at_floor = phase.residual <= self.floor
            if self.spent:
                self.obstacle = "budget"
                self.reason = (
                    f"the budget of {self.budget} gradient evaluations is spent; raise budget, or "
                    f"use a faster solver"
                )
            elif at_floor and (stuck or slow):
                self.rounds(f"residuals do not fall below {phase.residual:.1e}")
            elif stuck:
                self.obstacle = "restless"
                self.reason = (
                    f"the phase with β = {beta:.2g} does not converge ({phase}). There may be no "
                    f"equilibrium nearby, or the step size of the solver may be too large"
                )
            if self.obstacle:
                return state
            begun, before, keep, chunk = phase, phase.residual, True, 2 * chunk
