"""Reference values of a hypergradient that do not depend on its estimator."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from equigrad.errors import (
    ConfigurationError,
    CurvatureError,
    DoubleBackwardError,
    ProblemError,
    SettlingError,
)
from equigrad.estimators import Contrastive, Estimator, ExactSolve
from equigrad.evaluation import Evaluation
from equigrad.gradient import MetaGradient, meta_gradient
from equigrad.problems import Params, Problem
from equigrad.solvers import Phase, Solver
from equigrad.solvers.phase import resting
from equigrad.vectors import unflatten

MORE_STEPS = 10
"""The reference may take this many times the steps of the estimate's free phase."""

UNSETTLED = 1e-4
"""A phase has not settled if its residual is above this share of its first one."""

NUDGE_ASIDE = 1e-3
"""Relative size of the perturbation that tests whether a settled state is stable."""

MOST_BY_EXACT_SOLVE = 500
"""The largest number of inner parameters for which the whole matrix is formed."""


@dataclass(frozen=True)
class Direction:
    """The derivative of the outer loss along one unit direction of θ.

    Attributes:
        estimated: the estimator's value.
        reference: the value by central differences of the re-solved outer loss.
        uncertainty: change of the reference when its step is halved.
    """

    estimated: float
    reference: float
    uncertainty: float


class References:
    """Settles a problem again, and further, from a settled state.

    Args:
        problem: the problem.
        result: the hypergradient that is checked, with the settled φ to start from.
        meta_params: θ.
        solver: the solver, which may take up to ten times as many steps.
        seed: seed of the functions' random numbers, and of directions.
        budget: gradient evaluations to spend.

    Attributes:
        phase: report of the reference's phase.
        params: the settled φ of the reference.
        spent: gradient evaluations so far.
    """

    def __init__(
        self,
        problem: Problem,
        result: MetaGradient,
        meta_params: Params,
        solver: Solver,
        seed: int,
        budget: int,
    ) -> None:
        self.problem, self.result, self.seed, self.budget = problem, result, seed, budget
        self.meta_params = {name: m.detach() for name, m in meta_params.items()}
        self.spent = 0
        free = result.phases[0]
        eps = torch.finfo(next(iter(result.params.values())).dtype).eps
        self.solver = replace(
            solver,
            max_steps=MORE_STEPS * max(free.steps, 100),
            tol=max(10 * eps * free.start_residual, torch.finfo(torch.float64).tiny),
        )
        _, self.phase, self.params = self._settle(self.meta_params, result.params, self.solver)

    @property
    def settled(self) -> bool:
        """Whether the reference has settled, relative to the start of the free phase."""
        start = max(self.result.phases[0].start_residual, self.phase.start_residual)
        return self.phase.residual <= UNSETTLED * start

    def units(self, count: int) -> list[Params]:
        """Unit directions of θ: random ones, or its axes if there are no more than `count`."""
        entries = sum(m.numel() for m in self.meta_params.values())
        if entries <= count:
            axes = torch.eye(entries, dtype=torch.float64)
            like = list(self.meta_params.values())
            return [
                dict(zip(self.meta_params, unflatten(axis.to(like[0].device), like), strict=True))
                for axis in axes
            ]
        generator = torch.Generator().manual_seed(self.seed)
        units = []
        for _ in range(count):
            raw = {
                name: torch.randn(m.shape, generator=generator, dtype=torch.float64)
                for name, m in self.meta_params.items()
            }
            size = flat(raw).norm()
            units.append({name: (raw[name] / size).to(m) for name, m in self.meta_params.items()})
        return units

    def along(self, unit: Params) -> Direction:
        """The estimated and the re-solved derivative along a direction."""
        eps = torch.finfo(next(iter(self.meta_params.values())).dtype).eps
        step = eps ** (1 / 3) * max(1.0, flat(self.meta_params).norm().item())

        def difference(step: float) -> float:
            above, below = (
                self._settle_near({n: m + s * unit[n] for n, m in self.meta_params.items()})
                for s in (step, -step)
            )
            return (above - below) / (2 * step)

        coarse, fine = difference(step), difference(step / 2)
        estimated = flat(self.result.grads).dot(flat(unit)).item()
        return Direction(estimated, coarse, abs(coarse - fine))

    def leaves(self) -> bool:
        """Whether φ moves far away after a small perturbation.

        It was then at a saddle or a maximum, which solvers reach only by symmetry.
        """
        if len(self.problem.batches("inner") or [None]) > 1:  # mini-batches keep φ moving
            return False
        generator = torch.Generator().manual_seed(self.seed)
        aside = {}
        for name, p in self.params.items():
            scale = max(p.double().square().mean().sqrt().item(), 0.1)
            raw = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            aside[name] = p + (NUDGE_ASIDE * scale * raw).to(p)
        try:
            _, _, end = self._settle(self.meta_params, aside, self.solver)
        except SettlingError:
            return True
        pushed, moved = ((flat(state) - flat(self.params)).norm().item() for state in (aside, end))
        return moved > 10 * pushed

    def exact(self) -> Params | None:
        """The whole gradient by an exact solve; None if it is impossible or exceeds the budget."""
        size = sum(p.numel() for p in self.params.values())
        if 2 * size > self.budget - self.spent:
            return None
        try:
            torch.manual_seed(self.seed)
            result = meta_gradient(
                self.problem,
                self.params,
                self.meta_params,
                solver=self.solver,
                estimator=ExactSolve(max_size=MOST_BY_EXACT_SOLVE, products="autograd"),
            )
        except (ConfigurationError, CurvatureError, DoubleBackwardError, ProblemError):
            return None
        self.spent += result.gradient_evaluations
        return result.grads

    def direct(self) -> Params:
        """The direct term `∂L_out/∂θ` at the settled φ."""
        torch.manual_seed(self.seed)
        where = self.problem, self.result.params, self.meta_params
        with Evaluation(*where, solver=self.solver) as evaluation:
            at = resting(self.result.params, evaluation.stage.snapshot())
            return evaluation.outer_gradients(at)[1]

    def halved(self, estimator: Estimator, solver: Solver, params: Params) -> Params | None:
        """The contrastive estimate at half the β; None for other estimators."""
        if not isinstance(estimator, Contrastive) or estimator.rtol is not None:
            return None
        torch.manual_seed(self.seed)
        less = replace(estimator, beta=estimator.beta / 2, error=False)
        result = meta_gradient(
            self.problem, params, self.meta_params, solver=solver, estimator=less
        )
        self.spent += result.gradient_evaluations
        return result.grads

    def _settle(
        self, meta_params: Params, start: Params, solver: Solver
    ) -> tuple[float, Phase, Params]:
        """The outer loss of the settled inner problem, with the same random numbers each time."""
        left = max(self.budget - self.spent, 1)
        limit = solver.max_steps if solver.max_steps is not None else left
        torch.manual_seed(self.seed)
        with Evaluation(self.problem, start, meta_params, solver=solver) as evaluation:
            settled = evaluation.settle(replace(solver, max_steps=min(limit, left)))
            self.spent += evaluation.tally.gradient_evaluations
            return evaluation.outer_loss(settled).item(), settled.phase, settled.params

    def _settle_near(self, meta_params: Params) -> float:
        """The outer loss at slightly different meta-parameters, settled from the reference's φ."""
        one_step = replace(self.solver, max_steps=1, tol=None)
        pushed = self._settle(meta_params, self.params, one_step)[1].start_residual
        tol = max(1e-6 * pushed, 2 * self.phase.residual, torch.finfo(torch.float64).tiny)
        tol = None if tol > 0.01 * pushed else tol  # the reference itself has not settled
        return self._settle(meta_params, self.params, replace(self.solver, tol=tol))[0]


def announcement(
    result: MetaGradient, budget: int, directions: int, say: Callable[[str], None]
) -> None:
    """Announce the cost of the references before they are computed."""
    say(
        f"checking a gradient that took {result.gradient_evaluations} gradient evaluations. This "
        f"takes up to {budget:,} more: a longer free phase, {4 * directions} phases at shifted θ, "
        f"the exact solve if φ is small, and another estimate with half the β if the gradient is "
        f"wrong"
    )


def flat(tensors: Params) -> Tensor:
    """All entries as one vector, in double precision on the CPU."""
    return torch.cat([t.detach().double().cpu().flatten() for t in tensors.values()])


def ratio(difference: Tensor, whole: Tensor) -> float:
    """`‖difference‖ / ‖whole‖`; 0 where both are zero."""
    apart, size = difference.norm().item(), whole.norm().item()
    return apart / size if size else math.inf if apart else 0.0
