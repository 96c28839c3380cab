"""Learn θ and φ in one loop, without waiting for φ to converge."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from equigrad.diagnostics.first_look import first_look
from equigrad.diagnostics.own_weights import backward_explained
from equigrad.errors import ConfigurationError, SettlingError
from equigrad.evaluation.evaluation import Evaluation
from equigrad.evaluation.stage import Stage
from equigrad.evaluation.tally import Tally
from equigrad.fields import Count, expect
from equigrad.gradient import MetaGradient
from equigrad.problems import Params, Problem
from equigrad.randomness import Stream
from equigrad.solvers import Phase, Solver
from equigrad.solvers.phase import resting
from equigrad.solvers.solver import Objective
from equigrad.training.directions import Contrasts, Direction
from equigrad.training.loop import Callback, OuterState, descend
from equigrad.training.place import Place, State
from equigrad.vectors import tracked

STREAMS: tuple[Stream, ...] = ("inner", "outer")


@dataclass
class Carriage:
    """The states of the loop, in a form that a checkpoint can save.

    Attributes:
        states: all states that move along with θ.
        beta: the adapted β, or None.
    """

    states: list[State]
    beta: float | None = None

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors and plain values."""
        return {
            "beta": self.beta,
            "states": [
                {
                    "tensors": {name: t.detach() for name, t in state.tensors.items()},
                    "memory": _told(state.memory),
                    "buffers": list(state.buffers),
                    "residual": state.residual,
                }
                for state in self.states
            ],
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        if len(saved["states"]) != len(self.states):
            raise ValueError(
                f"there are {len(saved['states'])} states there, {len(self.states)} here"
            )
        self.beta = saved["beta"]
        for state, kept in zip(self.states, saved["states"], strict=True):
            with torch.no_grad():
                for name, tensor in state.tensors.items():
                    tensor.copy_(kept["tensors"][name])
            if hasattr(state.memory, "load_state_dict"):
                state.memory.load_state_dict(kept["memory"])
            else:
                state.memory = kept["memory"]
            state.buffers = tuple(kept["buffers"])
            state.residual = kept["residual"]


def learn_jointly(
    problem: Problem,
    params: Params,
    meta_params: dict[str, Tensor],
    *,
    solver: Solver,
    direction: Direction | None = None,
    optimizer: torch.optim.Optimizer,
    steps: int,
    inner_steps: int = 1,
    project: Callable[[dict[str, Tensor]], None] | None = None,
    evaluate: Callable[[Params], Mapping[str, float]] | None = None,
    callbacks: Sequence[Callback] = (),
) -> OuterState:
    """Learn θ and φ in one loop: a few steps of each state, then one of θ, and so on.

    An outer step costs only a few gradients on mini-batches, since φ does not converge in between.
    This suits problems that are trained by many noisy steps rather than solved. If the states
    cannot follow θ, its direction is wrong: make its steps smaller than theirs, or raise
    `inner_steps`.

    Args:
        problem: the losses, usually with mini-batches.
        params: φ at the start.
        meta_params: θ, leaves that require a gradient; updated in place.
        solver: `GradientDescent` or `TorchOptimizer`, which moves every state, each with its own
            momentum. Its `max_steps` and `tol` are not used.
        direction: the rule for θ's direction and its states; `Contrasts()` by default.
        optimizer: any `torch.optim` optimiser over the values of `meta_params`.
        steps: number of outer steps, including those before a resume.
        inner_steps: number of steps of every state for each step of θ.
        project: called after every outer step to keep θ feasible, in place.
        evaluate: metrics of the learner, logged at every outer step: of the free state, or of the
            mean of symmetric ones.
        callbacks: called in this order, as by `learn`; a `Checkpoint` resumes to the same bits.

    Returns:
        The state after the last step; its `params` are the learner's φ.

    Raises:
        ConfigurationError: the solver needs a loss that stays the same, or a value is out of range.
        ProblemError: the losses or parameters are not valid.
        SettlingError: a state is no longer finite.

    Example:
        >>> import torch, equigrad as eg
        >>> problem = eg.Bilevel(
        ...     inner_loss=lambda p, m: 0.5 * (p["w"] - m["target"]).square().sum(),
        ...     outer_loss=lambda p, m: 0.5 * (p["w"] - 3.0).square().sum(),
        ... )
        >>> meta = {"target": torch.zeros(1, requires_grad=True)}
        >>> state = learn_jointly(
        ...     problem,
        ...     {"w": torch.zeros(1)},
        ...     meta,
        ...     solver=eg.GradientDescent(lr=0.5),
        ...     optimizer=torch.optim.SGD(meta.values(), lr=0.1),
        ...     steps=300,
        ... )
        >>> round(meta["target"].item(), 3)
        3.0
    """
    expect(Count, inner_steps=inner_steps)
    expect(Direction | None, direction=direction)
    expect(Solver, solver=solver)
    expect(Callable | None, evaluate=evaluate)
    if solver.fixed_loss or solver.jumps:
        raise ConfigurationError(
            f"{type(solver).__name__} needs a loss that stays the same, but here θ changes after "
            f"every few steps; use GradientDescent or TorchOptimizer"
        )
    direction = direction or Contrasts()
    with backward_explained(), Evaluation(problem, params, meta_params, solver=solver) as seen:
        direction.check(seen, solver)
        first_look(seen, resting(seen.params, seen.stage.first_buffers), direction.estimator)
        problem, reaches, notes = seen.problem, seen.reaches, seen.tally.notes
        buffers = seen.stage.first_buffers
        stride = _stride(inner_steps, *(len(seen.batch_steps(s)) for s in STREAMS))
    states = []
    for start in direction.starts(params):
        tensors = {n: tracked(p).detach().clone().requires_grad_() for n, p in start.items()}
        states.append(State(tensors, solver.init(list(tensors.values())), buffers))
    carried = Carriage(states)

    def gradient(state: OuterState) -> MetaGradient:
        beta = carried.beta or direction.strength(state.share)
        tally = Tally()
        meta = {name: tracked(m).detach() for name, m in meta_params.items()}
        tensors = [t for s in states for t in s.tensors.values()]
        with Stage(problem.modules or (), [*tensors, *meta.values()]) as stage:
            place = Place(problem, meta, reaches, stage, states, tally, 0, beta)
            first = state.step * stride
            starts = _move(direction, solver, place, range(first, first + inner_steps))
            turn = direction.turn(place)
        carried.beta = turn.beta
        state.params = direction.learner(states)
        phases = tuple(
            Phase(strength, inner_steps, start, s.residual, "stopped")
            for strength, start, s in zip(direction.strengths(beta), starts, states, strict=True)
        )
        return MetaGradient(
            grads=turn.grads,
            params=state.params,
            buffers={},
            outer_loss=turn.outer_loss.item(),
            status="; ".join([str(phases[0]), *([f"β={beta:g}"] if beta else []), *notes]),
            phases=phases,
            gradient_evaluations=tally.gradient_evaluations,
            error_estimate=turn.error,
            _meta_params=meta_params,
        )

    return descend(
        gradient,
        meta_params,
        params=params,
        optimizer=optimizer,
        steps=steps,
        project=project,
        evaluate=None if evaluate is None else lambda _, result: evaluate(result.params),
        callbacks=callbacks,
        carried=carried,
    )


def _stride(inner_steps: int, *batches: int) -> int:
    """The number of batches from one outer step to the next, coprime to all numbers of batches.

    θ sees the last batch of each outer step, and so sees all of them in turn, as φ does.
    """
    return next(
        s for s in itertools.count(inner_steps) if all(math.gcd(s, n) == 1 for n in batches)
    )


def _move(direction: Direction, solver: Solver, place: Place, steps: range) -> list[float]:
    """Take some steps of all states side by side, on the same batches; return the first residuals.

    Raises:
        SettlingError: one of them is no longer finite.
    """
    starts = []
    for step in steps:
        place.step, place.last = step, step == steps[-1]
        for index, state in enumerate(place.states):
            place.stand_at(state)
            velocity = direction.velocity(place, index)
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(velocity))).item()
            if not math.isfinite(norm):
                raise SettlingError(
                    f"the velocity of state {index} (β={place.beta:g}) is {norm} at step {step}; "
                    f"use smaller steps of φ or of θ, or a smaller beta"
                )
            if step == steps.start:
                starts.append(norm)
            state.residual = norm
            objective = _objective(place, direction, index)
            with torch.no_grad():
                solver.update(list(state.tensors.values()), velocity, state.memory, objective)
            state.buffers = place.stage.snapshot()
    return starts


def _objective(place: Place, direction: Direction, index: int) -> Objective:
    """The objective that a solver is given beside the velocity."""

    def evaluate() -> tuple[tuple[Tensor, ...], Callable[[], Tensor]]:
        return direction.velocity(place, index), lambda: torch.zeros(())

    return Objective(
        beta=place.beta,
        samples=False,
        params=place.states[index].tensors,
        meta_params=place.meta_params,
        step=lambda: place.step,
        loss=lambda: torch.zeros(()),
        evaluate=evaluate,
    )


def _told(memory: Any) -> Any:
    return memory.state_dict() if hasattr(memory, "state_dict") else memory
