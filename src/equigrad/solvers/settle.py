"""The loop in which everything settles, and the one place that decides when to stop."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from equigrad.errors import SettlingError
from equigrad.problem import Params, Velocity
from equigrad.solvers.solver import Solver


@dataclass(frozen=True)
class Phase:
    """What is reported of one phase.

    Attributes:
        beta: nudging strength of the phase; 0 for a free one.
        steps: steps taken.
        start_residual: norm of the velocity at the start.
        residual: norm of the velocity where it was last evaluated: at the settled state where
            `converged`, else one step before the end.
        outcome: `converged` (residual ≤ tol), `not converged` (a tolerance was asked for and not
            reached) or `stopped` (ran the steps it was given; no tolerance applied).
        tol: the tolerance that applied, or None.
    """

    beta: float
    steps: int
    start_residual: float
    residual: float
    outcome: Literal["converged", "not converged", "stopped"]
    tol: float | None = None

    def __str__(self) -> str:
        tolerance = "" if self.outcome != "not converged" else f" (tol {self.tol:.2g})"
        return f"{self.outcome}: residual {self.residual:.2g} after {self.steps} steps{tolerance}"


@dataclass(frozen=True)
class Settled:
    """Where a phase ended.

    Attributes:
        params: the parameters, detached.
        solver_state: the solver's state (momentum, for example).
        end_step: number of the step that would come next.
        phase: the report.
        buffers: the modules' buffers at the end, as `KeptBuffers.snapshot` takes them.
    """

    params: dict[str, Tensor]
    solver_state: Any
    end_step: int
    phase: Phase
    buffers: tuple[Tensor, ...] = ()


@torch.no_grad()
def settle(
    velocity: Velocity,
    loss: Callable[[Params, int], Tensor],
    start: Params,
    solver: Solver,
    *,
    beta: float = 0.0,
    previous: Any = None,
    first_step: int = 0,
    steps: int | None = None,
) -> Settled:
    """Settle a phase: move the parameters along the velocity until they rest.

    Args:
        velocity: `(params, step) -> velocity`, in the order of `params`.
        loss: `(params, step) -> scalar`, for solvers that compare values.
        start: where to start; not changed.
        solver: the rule, its limit of steps and its tolerance.
        beta: what the report names as the phase's nudging strength.
        previous: solver state to go on from.
        first_step: number of the first step, which decides batches and randomness.
        steps: run exactly so many steps, whatever the solver's own limit and tolerance say.

    Returns:
        The settled state.

    Raises:
        SettlingError: the velocity is no longer finite.
    """
    params = {name: p.detach().clone().requires_grad_() for name, p in start.items()}
    leaves = list(params.values())
    state = solver.init(leaves, previous)
    limit, tol = (solver.max_steps, solver.tol) if steps is None else (steps, None)
    step, start_residual, residual, rests = 0, math.nan, math.nan, False

    def objective() -> tuple[Tensor, tuple[Tensor, ...]]:
        return loss(params, first_step + step), velocity(params, first_step + step)

    for step in itertools.count():
        v = velocity(params, first_step + step)
        if step % solver.check_every == 0 or step + 1 == limit:
            residual = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(v))).item()
            if not math.isfinite(residual):
                raise SettlingError(
                    f"the phase with β = {beta:g} diverged: the velocity is {residual} at step "
                    f"{step}. Lower the solver's step size"
                    + (" or the nudging strength beta" if beta else "")
                    + ", or start nearer to a minimum"
                )
            if step == 0:
                start_residual = residual
            # a nudged phase starts almost at rest, and must move before it may be called settled
            if tol is not None and residual <= tol and (step > 0 or beta == 0):
                rests = True
                break
        solver.update(leaves, v, state, objective)
        if step + 1 == limit:
            step += 1
            break

    outcome = "converged" if rests else "stopped" if tol is None else "not converged"
    return Settled(
        params={name: p.detach() for name, p in params.items()},
        solver_state=state,
        end_step=first_step + step,
        phase=Phase(beta, step, start_residual, residual, outcome, tol),
    )
