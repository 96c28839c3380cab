"""The phases of a meta-gradient: free, nudged and controlled."""

import dataclasses
import math
from collections import deque
from collections.abc import Callable
from typing import Any

from torch import Tensor

from equigrad.errors import ConfigurationError
from equigrad.evaluation.scene import Scene
from equigrad.evaluation.tensors import like
from equigrad.problems import Params, Velocity, inner_product
from equigrad.solvers import Lost, Moment, Settled, Solver, Watch
from equigrad.solvers import settle as settle_phase

ANSWERED = 1e-2
"""Share of its first residual that a nudged phase must get below before a tolerance ends it."""

FOR_MAPS = "Make the weights of the map smaller (weight or spectral normalisation), damp it"
"""Advice for a map whose iteration diverges, as part of a sentence."""


def settle(scene: Scene, solver: Solver, watch: Watch | None = None) -> Settled:
    """Run the free phase: settle from the given parameters, without a nudge.

    Args:
        scene: the problem at its θ.
        solver: the solver of this phase.
        watch: called at every step, as in `equigrad.solvers.settle`.
    """
    if scene.settled is not None:
        return scene.settled
    scene.stage.stand_at_start()
    batches, before = _batches(scene, solver, 0.0), scene.before
    free = settle_phase(
        scene.velocity(),
        _loss(scene, 0.0),
        scene.params,
        solver,
        meta_params=scene.meta_params,
        previous=None if before is None else before.solver_state,
        first_step=0 if before is None else _next_step(before, batches),
        batches=batches,
        samples=scene.problem.samples,
        watch=watch,
        count=scene.tally.spend,
        remedy=_remedy(scene, 0.0),
    )
    lost = free.phase.diverged
    return dataclasses.replace(
        free,
        buffers=scene.stage.snapshot(),
        lost=Lost(lost, free.params) if lost else scene.lost,
    )


def settle_recorded(
    scene: Scene, solver: Solver, every: int | None = None, keep: int | None = None
) -> tuple[Settled, list[Moment]]:
    """Run the free phase and record moments from which it can be replayed.

    Args:
        scene: the problem at its θ.
        solver: the solver of this phase.
        every: steps between two moments; None to record the start alone.
        keep: how many of the latest moments to keep; None for all.
    """
    moments: deque[Moment] = deque(maxlen=keep)

    def watch(step: int, params: Params, state: Any) -> None:
        if step == 0 or (every is not None and step % every == 0):
            copies = {name: p.detach().clone() for name, p in params.items()}
            moments.append(
                Moment(
                    params=copies,
                    solver_state=[s.clone() for s in state],
                    end_step=step,
                    buffers=scene.stage.snapshot(),
                )
            )

    free = settle(scene, solver, watch)
    # a sample that is lost at the end has no gradient at any step, so every moment holds it
    return free, [dataclasses.replace(moment, lost=free.lost) for moment in moments]


def settle_nudged(
    scene: Scene,
    free: Moment,
    solver: Solver,
    beta: complex,
    *,
    keep_momentum: bool,
    steps: int | None = None,
    share: float = ANSWERED,
    force: Params | None = None,
) -> Settled:
    """Run a nudged phase from the free solution: settle `L_in + β L_out`, for any β.

    All such phases start with the same buffers, batches and randomness. The first residual of a
    nudged phase is of the order of β and may already be below the tolerance, so that the phase must
    also reduce it to the given share.

    Args:
        scene: the problem at its θ.
        free: the end of the free phase.
        solver: the solver of this phase.
        beta: nudging strength, of either sign, or zero for a matched phase. A complex number
            makes φ, θ and the losses complex, which must then be holomorphic.
        keep_momentum: whether to continue with the free phase's solver state or a new one.
        steps: the exact number of steps to run; None to let the solver decide.
        share: share of the first residual that a nudged phase must get below.
        force: a constant `∂L_out/∂φ`, by name, that replaces the outer loss: settle
            `L_in + β force·φ`.
    """
    scene = scene.holding(free)
    scene.stage.stand_at(free)
    by_loss = beta if force is None else 0.0
    batches = _batches(scene, solver, by_loss)
    first_step = _next_step(free, batches)
    for drawn in scene.streams:
        drawn.keep(first_step)
    nudged = settle_phase(
        scene.velocity(beta, force),
        _loss(scene, beta, force),
        like(beta, free.params),
        solver,
        beta=beta,
        meta_params=scene.meta_params,
        previous=_previous(free.solver_state, beta) if keep_momentum else None,
        first_step=first_step,
        steps=steps,
        batches=batches,
        samples=scene.problem.samples,
        share=share if beta != 0 else 1.0,
        count=scene.tally.spend_each(1 if by_loss == 0 else 2),
        remedy=_remedy(scene, beta),
    )
    return dataclasses.replace(nudged, buffers=scene.stage.snapshot(), lost=free.lost)


def settle_controlled(
    scene: Scene,
    velocity: Velocity,
    start: Params,
    solver: Solver,
    strength: float,
    *,
    after: Moment,
    gradients: int,
    loss: Callable[[Params, int], Tensor],
) -> Settled:
    """Run a phase in which a learner and a controller settle together.

    Args:
        scene: the problem at its θ.
        velocity: velocity of φ and the controller.
        start: their initial values.
        solver: the solver of this phase.
        strength: strength of the control, which the phase reports as its β.
        after: the moment whose buffers and step count the phase begins with.
        gradients: gradients that one velocity takes.
        loss: the loss that the phase minimises, for solvers that compare values; else `no_loss`.
    """
    scene.stage.stand_at(after)
    batches = _batches(scene, solver, strength)
    settled = settle_phase(
        velocity,
        loss,
        start,
        solver,
        beta=strength,
        meta_params=scene.meta_params,
        first_step=_next_step(after, batches),
        batches=batches,
        samples=scene.problem.samples,
        count=scene.tally.spend_each(gradients),
        remedy="Take shorter steps (GradientFlow(dt=…), Picard(damping=…))",
    )
    return dataclasses.replace(settled, buffers=scene.stage.snapshot(), lost=after.lost)


def beginning(scene: Scene, solver: Solver) -> Moment:
    """The start of the free phase, as a moment."""
    return Moment(
        params=scene.params,
        solver_state=solver.init(list(scene.params.values())),
        end_step=0,
        buffers=scene.stage.first_buffers,
    )


def no_loss(*asked: Any) -> Any:
    """A placeholder for the loss that the dynamics of a learner and a controller do not have.

    Raises:
        ConfigurationError: always.
    """
    raise ConfigurationError(
        "this solver compares values of a loss, and the coupled dynamics of a learner and its "
        "controller have none. Use Picard(), Anderson() or GradientFlow(), or the controller "
        "EnergyInversion()"
    )


def _loss(
    scene: Scene, beta: complex, force: Params | None = None
) -> Callable[[Params, int], Tensor]:
    """The loss that a phase minimises, for solvers that compare values."""
    problem, meta_params = scene.problem, scene.meta_params

    def loss(params: Params, step: int) -> Tensor:
        value = problem.total_inner_loss(params, meta_params, step)
        if beta == 0:
            return value
        if force is not None:
            return value + beta * inner_product(tuple(force.values()), params)
        return value + beta * scene.evaluate("outer", params, meta_params, step)

    return loss


def _batches(scene: Scene, solver: Solver, beta: complex) -> int:
    """The number of steps in one pass over the data of a phase."""
    inner = len(scene.batch_steps("inner"))
    batches = math.lcm(inner, len(scene.batch_steps("outer"))) if beta != 0 else inner
    if batches > 1 and solver.fixed_loss:
        raise ConfigurationError(
            f"{type(solver).__name__} needs the same loss at every evaluation, but this problem "
            f"has mini-batches. Use GradientDescent or TorchOptimizer"
        )
    return batches


def _next_step(after: Moment, batches: int) -> int:
    """The number of the first step of a phase that continues another."""
    if isinstance(after, Settled) and after.phase.outcome == "converged":
        # it converged on the last velocity of a pass, without taking that step
        return batches * math.ceil(after.end_step / batches)
    return after.end_step


def _previous(state: Any, beta: complex) -> Any:
    """A solver state to continue from, complex if β is; None if it cannot be continued."""
    if not isinstance(beta, complex):
        return state
    return [s.to(s.dtype.to_complex()) for s in state] if isinstance(state, list) else None


def _remedy(scene: Scene, beta: complex) -> str | None:
    """Advice for a phase that diverges; None for the general advice."""
    if scene.problem.symmetric:
        return None
    return f"{FOR_MAPS}, or {'lower the nudging strength beta' if beta else 'start elsewhere'}"
