"""The loop in which everything settles, and the one place that decides when to stop."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from equigrad.errors import ConfigurationError, SettlingError
from equigrad.problems import Params, Velocity
from equigrad.solvers.compiled import CompiledSteps
from equigrad.solvers.solver import Objective, Solver


@dataclass(frozen=True)
class Phase:
    """What is reported of one phase.

    Attributes:
        beta: nudging strength of the phase; 0 for a free one.
        steps: steps taken.
        start_residual: norm of the velocity at the start.
        residual: norm of the velocity where it was last evaluated: at the settled state where
            `converged` or where the solver jumps (`BlackBox`), else one step before the end.
        outcome: `converged` (residual ≤ tol), `not converged` (a tolerance was asked for and not
            reached), `stalled` (the solver found no step that helps, short of the tolerance) or
            `stopped` (ran the steps it was given; no tolerance applied).
        tol: the tolerance that applied, or None.
        residuals: of each sample, where samples settle on their own; `residual` is the largest of
            those that have not diverged.
        diverged: the samples whose velocity was no longer finite. They are left where the phase
            started, and their residual is infinite.
    """

    beta: complex
    steps: int
    start_residual: float
    residual: float
    outcome: Literal["converged", "not converged", "stalled", "stopped"]
    tol: float | None = None
    residuals: Tensor | None = field(default=None, compare=False, repr=False)
    diverged: tuple[int, ...] = ()

    @property
    def grew(self) -> bool:
        """Whether a phase without a tolerance ended with more than twice its first residual."""
        return self.outcome == "stopped" and self.residual > 2 * self.start_residual

    @property
    def failed(self) -> bool:
        """Whether it missed its tolerance or, without one, went away from rest; all or in part."""
        return self.outcome in ("not converged", "stalled") or self.grew or bool(self.diverged)

    @property
    def unsettled(self) -> list[int]:
        """The samples whose residual is above the tolerance, and those that have diverged."""
        if self.residuals is None or self.tol is None:
            return list(self.diverged)
        return torch.nonzero(~(self.residuals <= self.tol)).flatten().tolist()

    def __str__(self) -> str:
        slow = [sample for sample in self.unsettled if sample not in self.diverged]
        missed = self.outcome in ("not converged", "stalled") and self.tol is not None
        missed = missed and bool(slow or not self.diverged)
        tolerance = f" (tol {self.tol:.2g})" if missed else ""
        steps = "1 step" if self.steps == 1 else f"{self.steps} steps"
        said = f"{self.outcome}: residual {self.residual:.2g} after {steps}{tolerance}"
        if missed and self.residuals is not None:
            said += f" in {numbered(slow)} of {len(self.residuals)}"
        if self.grew:
            said += f", up from {self.start_residual:.2g}"
        if self.diverged and self.residuals is not None:
            said += f"; {numbered(list(self.diverged))} of {len(self.residuals)} diverged"
        return said


Watch = Callable[[int, Params, Any], None]
"""`(step, params, solver state)`: is shown both as they are before a step; not to change them."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Where a phase stands between two steps: enough to go on from there.

    Attributes:
        params: the parameters, detached but where a graph was asked for.
        solver_state: the solver's state (momentum, for example).
        end_step: number of the step that comes next.
        buffers: the modules' buffers, as `KeptBuffers.snapshot` takes them.
    """

    params: dict[str, Tensor]
    solver_state: Any
    end_step: int
    buffers: tuple[Tensor, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Settled(Moment):
    """Where a phase ended.

    Attributes:
        phase: the report.
    """

    phase: Phase


def resting(params: Params, buffers: tuple[Tensor, ...] = ()) -> Settled:
    """Params to be looked at as a free phase's end."""
    phase = Phase(0.0, 0, math.nan, math.nan, "stopped")
    return Settled(params=dict(params), solver_state=None, end_step=0, buffers=buffers, phase=phase)


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
    params = dict(start)
    if not graph:
        params = {name: p.detach().clone().requires_grad_() for name, p in start.items()}
    leaves = list(params.values())
    with torch.set_grad_enabled(graph):
        state = solver.init(leaves, previous)
    limit, tol = (solver.max_steps, solver.tol) if steps is None else (steps, None)
    step, start_residual, residual, rests, stalled = 0, math.nan, math.nan, False, False
    residuals: Tensor | None = None
    lost: Tensor | None = None
    every = batches * math.ceil(solver.check_every / batches)
    passed: list[Tensor] = []
    summed = 0

    seen: tuple[list[int], Any] = [], None

    def evaluate() -> tuple[tuple[Tensor, ...], Callable[[], Tensor]]:
        """Velocity and value, which are remembered where they depend on the parameters alone."""
        nonlocal seen
        if not solver.fixed_loss:
            count(1)
            return velocity(params, first_step + step)
        versions = [p._version for p in leaves]
        if seen[0] != versions:
            count(1)
            seen = versions, velocity(params, first_step + step)
        return seen[1]

    objective = Objective(
        beta,
        samples,
        params,
        meta_params or {},
        loss=lambda: loss(params, first_step + step),
        evaluate=evaluate,
    )
    ahead = 0 if solver.jumps else 1

    room = math.inf if limit is None else limit
    several = None
    if solver.compile:
        _require_alike(batches, each=watch is not None or graph)
    if solver.compile and room > every:  # the last steps are taken one by one, and looked at
        several = CompiledSteps(velocity, params, state, solver, first_step, count)

    apart = not graph and several is None  # one by one, samples can be left behind

    while True:
        if watch is not None:
            watch(first_step + step, params, state)
        together = several if several is not None and room - step > several.steps else None
        v = evaluate()[0] if together is None else together.begin()
        last = limit is not None and step + ahead >= limit
        if batches > 1:
            passed = list(torch._foreach_add(passed, v)) if passed else list(v)
            summed += 1
        if last or (step % every == 0 if batches == 1 else summed == every):
            mean = [m.detach() for m in passed or v]  # also from forward mode
            before = residual
            if samples:
                norms = [torch.linalg.vector_norm(m.reshape(len(m), -1), dim=1) for m in mean]
                residuals = torch.stack(norms).norm(dim=0)
                residuals /= max(summed, 1)
                residual = residuals.max().item()
                if lost is not None or (apart and not math.isfinite(residual)):
                    lost, residuals = _diverging(residuals, lost)
                    if not lost.all():  # those that are left go on
                        residual = residuals[~lost].max().item()
                        _put_back(leaves, start, lost)
            else:
                residual = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(mean))).item()
                residual /= max(summed, 1)
            passed, summed = [], 0
            if not math.isfinite(residual):
                where = ""
                if residuals is not None:
                    bad = torch.nonzero(~residuals.isfinite()).flatten().tolist()
                    where = f" in {numbered(bad)} of {len(residuals)}"
                if step == 0:
                    remedy = "It is so at the start: mend the function, or start elsewhere"
                raise SettlingError(
                    f"the phase with β = {beta:g} diverged: the velocity is {residual} at step "
                    f"{step}{where}. {_for_learners(solver, beta) if remedy is None else remedy}"
                )
            if math.isnan(start_residual):
                start_residual = residual
            if tol is not None and residual <= min(tol, share * start_residual):
                rests = True
                break
            stalled = solver.jumps and tol is not None and not last and residual > before / 2
        if stalled or (last and solver.jumps):
            break
        if together is not None:
            together.finish()
        elif graph:
            with torch.enable_grad():
                leaves = [p.clone() for p in leaves]  # those before are part of the graph
                state = [s.clone() for s in state]
                solver.update(leaves, v, state, objective)
            params = dict(zip(params, leaves, strict=True))
        else:
            stalled = solver.update(leaves, v, state, objective) is False
            if lost is not None:
                _put_back(leaves, start, lost)
        step += 1 if together is None else together.steps
        if last or stalled:
            break

    outcome = "stopped" if tol is None else "not converged"
    outcome = "converged" if rests and lost is None else "stalled" if stalled else outcome
    diverged = () if lost is None else tuple(torch.nonzero(lost).flatten().tolist())
    return Settled(
        params=params if graph else {name: p.detach() for name, p in params.items()},
        solver_state=state,
        end_step=first_step + step,
        phase=Phase(beta, step, start_residual, residual, outcome, tol, residuals, diverged),
    )


def _diverging(residuals: Tensor, lost: Tensor | None) -> tuple[Tensor, Tensor]:
    """The samples that have diverged, now or before, and residuals that are infinite there."""
    now = ~residuals.isfinite()
    lost = now if lost is None else now | lost
    return lost, torch.where(lost, math.inf, residuals)


def _put_back(leaves: list[Tensor], start: Params, lost: Tensor) -> None:
    """Samples that have diverged go to where they started."""
    for leaf, before in zip(leaves, start.values(), strict=True):
        leaf[lost] = before.detach()[lost]


def _for_learners(solver: Solver, beta: complex) -> str:
    """What to do where minimising a loss diverges."""
    first = "Bound the learner" if solver.jumps else "Lower the solver's step size"
    second = ", lower the nudging strength beta" if beta else ""
    return f"{first}{second}, or start nearer to a minimum"


def _require_alike(batches: int, *, each: bool) -> None:
    """Refuse to take several steps at once where they differ, or where each is asked for."""
    if batches > 1:
        raise ConfigurationError(
            f"compile=True takes several steps at once on the same loss, and this problem has "
            f"{batches} mini-batches; average them in the loss, or use compile=False"
        )
    if each:
        raise ConfigurationError(
            "compile=True takes several steps at once, and this estimator has to see every one; "
            "use compile=False"
        )


def numbered(samples: list[int]) -> str:
    """Samples in words, the first five of them by number."""
    shown = ", ".join(map(str, samples[:5]))
    if len(samples) == 1:
        return f"sample {shown}"
    return f"{len(samples)} samples ({shown}{', …' if len(samples) > 5 else ''})"
