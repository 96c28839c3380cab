"""One loop for θ and φ: neither waits for the other to settle."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from equigrad.diagnostics.first_look import first_look
from equigrad.diagnostics.own_weights import checkpoints_named
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
    """The states, as a checkpoint knows them.

    Attributes:
        states: all that moves beside θ.
        beta: adapted so far, or None.
    """

    states: list[State]
    beta: float | None = None

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only."""
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
        """Go on from there."""
        if len(saved["states"]) != len(self.states):
            raise ValueError(f"{len(saved['states'])} states there, {len(self.states)} here")
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
    """Learn θ and φ in one loop: a few steps of each state, one of θ, and again.

    Nothing settles anew, so an outer step costs a few gradients on mini-batches: for problems that
    are trained with many noisy steps rather than solved. Where the states cannot follow, θ moves
    along a wrong direction: make its steps smaller than theirs, or raise `inner_steps`.

    Args:
        problem: the losses, usually with mini-batches.
        params: φ at the start.
        meta_params: θ, leaves that require a gradient; updated in place.
        solver: moves every state, each with a memory of its own: `GradientDescent` or
            `TorchOptimizer`. Its `max_steps` and `tol` play no part.
        direction: what moves, and the direction for θ; `Contrasts()` by default.
        optimizer: any `torch.optim` optimiser over the values of `meta_params`.
        steps: outer steps to have taken at the end, those before a resume included.
        inner_steps: steps of every state for each of θ.
        project: keeps θ feasible, in place, after every step.
        evaluate: metrics of the learner, logged every step: of the free state, or of the middle of
            symmetric ones.
        callbacks: watch the loop, in this order, as of `learn`; a `Checkpoint` resumes to the same
            bits.

    Returns:
        The state after the last step, the learner's φ among it in `params`.

    Raises:
        ConfigurationError: a solver that needs a loss that stays the same, or a value outside its
            range.
        ProblemError: losses or parameters are not what they have to be.
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
            f"{type(solver).__name__} settles a loss that stays the same, and here θ moves after "
            f"every few steps; use GradientDescent or TorchOptimizer"
        )
    direction = direction or Contrasts()
    with checkpoints_named(), Evaluation(problem, params, meta_params, solver=solver) as seen:
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
    """From the first batch of an outer step to that of the next: coprime to all numbers of batches.

    θ sees the last batch of each outer step, and so sees all of them in turn, as φ does.
    """
    return next(
        s for s in itertools.count(inner_steps) if all(math.gcd(s, n) == 1 for n in batches)
    )


def _move(direction: Direction, solver: Solver, place: Place, steps: range) -> list[float]:
    """Take the steps of all states, side by side: a batch is drawn once. The residuals at first.

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
                    f"the velocity of state {index} (β={place.beta:g}) is {norm} at step {step}: "
                    f"take smaller steps of φ or of θ, or a smaller beta"
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
    """What a solver is handed beside the velocity."""

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
