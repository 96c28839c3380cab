"""The loop of all solvers, the only place that decides when a phase stops."""

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
    """Run a phase: move the parameters along the velocity until its norm is small.

    Args:
        velocity: `(params, step) -> velocity, value`, as `Problem.velocity_at` returns it.
        loss: `(params, step) -> scalar`, for solvers that need values alone.
        start: initial parameters; not changed.
        solver: the update rule, its limit of steps and its tolerance.
        beta: the phase's nudging strength, for its report and for solvers that use it.
        meta_params: θ, for solvers that use it.
        previous: solver state to continue from.
        first_step: number of the first step, which selects batches and random numbers.
        steps: an exact number of steps to run, instead of the solver's limit and tolerance.
        batches: number of mini-batches that make up the loss. With several, the residual is that of
            the velocity averaged over the last whole passes, measured at the end of a pass.
        samples: whether the first dimension of every parameter counts samples that settle
            independently. The phase has settled when all of them have. A sample that diverges is
            reset to its start, and the others continue without it.
        watch: called before every step.
        share: share of the first residual that must be reached in addition to the tolerance.
        count: called with the number of velocities, when they are evaluated.
        graph: whether to record the steps, so that the result has a graph to `start`, `previous`
            and all tensors that the velocity depends on. Only for `differentiable` solvers.
        remedy: advice in the error of a phase that diverges; None for the advice for learners.

    Returns:
        The settled state.

    Raises:
        ConfigurationError: the solver compiles, and the steps differ or cannot be compiled.
        SettlingError: the velocity is not finite: for all samples, if they settle independently, or
            for any of them, if the solver compiles or the steps are recorded.
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
    # one step may settle a phase of a solver that jumps, so its residual is also measured after the
    # last step; other solvers measure it one step before the end, and save an evaluation
    ahead = 0 if solver.jumps else 1
    rests, stalled, rest = False, False, -1.0

    while True:
        if watch is not None:
            watch(position.step, position.params, walk.state)
        v = walk.look()
        last = walk.taken + ahead >= limit
        if residual.see(v, walk.taken, last=last):
            if not math.isfinite(residual.norm):
                raise _diverged(residual, walk.taken, solver, beta, remedy)
            if tol is not None:
                rest = min(tol, share * residual.first)
                rests = residual.norm <= rest
                slow = residual.norm > residual.before / 2
                stalled = solver.jumps and slow and not (last or rests)
        if rests or stalled or (last and solver.jumps):
            break
        stalled = walk.take(rest)
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
    """The outcome of a phase, as `Phase` names it."""
    if rests:
        return "converged"
    if stalled:
        return "stalled"
    return "stopped" if tol is None else "not converged"


def _diverged(
    residual: Residual, step: int, solver: Solver, beta: complex, remedy: str | None
) -> SettlingError:
    """The error for a velocity that is not finite."""
    if step == 0:
        remedy = (
            "This happens at the initial params, before any step: check the function there, or "
            "start from other params"
        )
    return SettlingError(
        f"the phase with β = {beta:g} diverged: its residual (the norm of the gradient of the "
        f"loss, or of F(φ, θ) - φ for a map) is {residual.norm} at step {step}{residual.where()}. "
        f"{_for_learners(solver, beta) if remedy is None else remedy}"
    )


def _for_learners(solver: Solver, beta: complex) -> str:
    """Advice for a phase that diverges while it minimises a loss."""
    first = "Limit the step size of the learner" if solver.jumps else "Lower the solver's step size"
    second = ", lower the nudging strength beta" if beta else ""
    return f"{first}{second}, or start nearer to a minimum"
