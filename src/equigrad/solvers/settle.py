"""The loop in which everything settles, and the one place that decides when to stop."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from equigrad.errors import SettlingError
from equigrad.problems import Params, Velocity
from equigrad.solvers.phase import Phase, Settled, Watch
from equigrad.solvers.residual import Residual
from equigrad.solvers.solver import Objective, Solver
from equigrad.solvers.steps import Position, begin_steps


@torch.no_grad()
def settle(
    velocity: Velocity,
    loss: Callable[[Params, int], Tensor],
    start: Params,
    solver: Solver,
    *,
    beta: complex = 0.0,
    meta_params: Params | None = None,
    previous: Any = None,
    first_step: int = 0,
    steps: int | None = None,
    batches: int = 1,
    samples: bool = False,
    watch: Watch | None = None,
    share: float = 1.0,
    count: Callable[[int], None] = lambda evaluations: None,
    graph: bool = False,
    remedy: str | None = None,
) -> Settled:
    """Settle a phase: move the parameters along the velocity until they rest.

    Args:
        velocity: `(params, step) -> velocity, value`, as `Problem.velocity_at` gives it.
        loss: `(params, step) -> scalar`, for solvers that ask for values alone.
        start: where to start; not changed.
        solver: the rule, its limit of steps and its tolerance.
        beta: the phase's nudging strength, for its report and for solvers that ask.
        meta_params: θ, for solvers that ask.
        previous: solver state to go on from.
        first_step: number of the first step, which decides batches and randomness.
        steps: run exactly so many steps, whatever the solver's own limit and tolerance say.
        batches: mini-batches that make up the loss. With several, the residual is that of the
            velocity averaged over the last whole passes, and is looked at after a pass.
        samples: whether the first dimension of every parameter is one of samples that settle on
            their own. The phase has settled when each of them has. One that diverges goes back to
            the start, and the others go on without it.
        watch: sees the phase before every step.
        share: of the first residual, which has to be reached as well as the tolerance.
        count: is told how many velocities were evaluated, as they are.
        graph: record the steps, so that what has settled leads back to `start`, `previous` and
            whatever the velocity has a graph to. Only for solvers that are `differentiable`.
        remedy: what the error of a phase that diverges advises; that for a learner where None.

    Returns:
        The settled state.

    Raises:
        ConfigurationError: the solver compiles, and the steps are not alike or cannot be compiled.
        SettlingError: the velocity is no longer finite: of all samples, where they settle on their
            own, or of any, where the solver compiles or the steps are recorded.
    """
    limit, tol = (solver.max_steps, solver.tol) if steps is None else (steps, None)
    limit = math.inf if limit is None else limit
    params = dict(start)
    if not graph:
        params = {name: p.detach().clone().requires_grad_() for name, p in start.items()}
    position = Position(velocity, loss, params, first_step, count, solver.fixed_loss)
    objective = Objective(
        beta,
        samples,
        params,
        meta_params or {},
        step=position.number,
        loss=position.loss,
        evaluate=position.evaluate,
    )
    walk = begin_steps(
        position,
        solver,
        objective,
        previous,
        limit=limit,
        batches=batches,
        watched=watch is not None,
        graph=graph,
    )
    residual = Residual(
        walk.leaves,
        start.values(),
        every=batches * math.ceil(solver.check_every / batches),
        batches=batches,
        samples=samples,
        apart=walk.apart,
    )
    ahead = 0 if solver.jumps else 1
    rests = stalled = False

    while True:
        if watch is not None:
            watch(position.step, position.params, walk.state)
        v = walk.look()
        last = walk.taken + ahead >= limit
        if residual.see(v, walk.taken, last=last):
            if not math.isfinite(residual.norm):
                raise _diverged(residual, walk.taken, solver, beta, remedy)
            if tol is not None:
                rests = residual.norm <= min(tol, share * residual.first)
                slow = residual.norm > residual.before / 2
                stalled = solver.jumps and slow and not (last or rests)
        if rests or stalled or (last and solver.jumps):
            break
        stalled = walk.take()
        if residual.lost is not None:
            residual.put_back()
        if last or stalled:
            break

    return Settled(
        params=walk.ended(),
        solver_state=walk.state,
        end_step=position.step,
        velocity=v if rests and solver.fixed_loss else None,
        phase=Phase(
            beta,
            walk.taken,
            residual.first,
            residual.norm,
            _outcome(tol, rests=rests and residual.lost is None, stalled=stalled),
            tol,
            residual.each,
            residual.diverged(),
        ),
    )


def _outcome(
    tol: float | None, *, rests: bool, stalled: bool
) -> Literal["converged", "not converged", "stalled", "stopped"]:
    """A phase's outcome, as `Phase` names it."""
    if rests:
        return "converged"
    if stalled:
        return "stalled"
    return "stopped" if tol is None else "not converged"


def _diverged(
    residual: Residual, step: int, solver: Solver, beta: complex, remedy: str | None
) -> SettlingError:
    """What is raised where the velocity is no longer finite."""
    if step == 0:
        remedy = "It is so at the start: mend the function, or start elsewhere"
    return SettlingError(
        f"the phase with β = {beta:g} diverged: its residual, the norm of the gradient or of a "
        f"map's step, is {residual.norm} at step {step}{residual.where()}. "
        f"{_for_learners(solver, beta) if remedy is None else remedy}"
    )


def _for_learners(solver: Solver, beta: complex) -> str:
    """What to do where minimising a loss diverges."""
    first = "Bound the learner" if solver.jumps else "Lower the solver's step size"
    second = ", lower the nudging strength beta" if beta else ""
    return f"{first}{second}, or start nearer to a minimum"
