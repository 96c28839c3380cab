"""Ways to take the steps of a phase: eagerly, with a graph, or several in a compiled function."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from equigrad.errors import ConfigurationError
from equigrad.problems import Params, Velocity
from equigrad.solvers.solver import Objective, Solver

LossAtStep = Callable[[Params, int], Tensor]
"""`(params, step) -> scalar`."""


class Position:
    """The current position of a phase, with its velocity and loss.

    The steps refer to their position, but not the reverse: a cycle would keep the tensors of a
    finished phase alive until Python's garbage collector runs.

    Args:
        velocity: `(params, step) -> velocity, value`.
        loss: `(params, step) -> scalar`.
        params: initial parameters.
        step: number of the first step.
        count: called with the number of velocities that were evaluated.
        fixed: whether velocity and loss depend on the parameters alone, and can be reused.

    Attributes:
        params: the current parameters, by name.
        step: number of the next step.
        velocity: the argument.
        count: the argument.
    """

    def __init__(
        self,
        velocity: Velocity,
        loss: LossAtStep,
        params: dict[str, Tensor],
        step: int,
        count: Callable[[int], None],
        fixed: bool,
    ) -> None:
        self.params, self.step = params, step
        self.velocity, self.count = velocity, count
        self._loss, self._fixed = loss, fixed
        self._seen: tuple[list[int], Any] = [], None

    def evaluate(self) -> tuple[tuple[Tensor, ...], Callable[[], Tensor]]:
        """The velocity, and a function that returns the loss at no further cost."""
        if not self._fixed:
            self.count(1)
            return self.velocity(self.params, self.step)
        versions = [p._version for p in self.params.values()]
        if self._seen[0] != versions:
            self.count(1)
            self._seen = versions, self.velocity(self.params, self.step)
        return self._seen[1]

    def number(self) -> int:
        """Number of the next step."""
        return self.step

    def loss(self) -> Tensor:
        """The loss, without a gradient."""
        return self._loss(self.params, self.step)


class EagerSteps:
    """Single steps, in place and without a graph.

    Args:
        position: the start of the phase.
        solver: the update rule.
        objective: loss and velocity that the rule may evaluate.
        previous: solver state to continue from.

    Attributes:
        apart: class attribute; whether the other samples can continue when some diverge.
        position: the current position of the phase.
        leaves: the parameters that move.
        state: the solver's state.
        taken: number of steps taken.
    """

    apart: ClassVar[bool] = True

    def __init__(
        self, position: Position, solver: Solver, objective: Objective, previous: Any
    ) -> None:
        self.position, self.solver, self.objective = position, solver, objective
        self.leaves = list(position.params.values())
        self.state = solver.init(self.leaves, previous)
        self.taken = 0
        self._velocity: tuple[Tensor, ...] = ()

    def look(self) -> tuple[Tensor, ...]:
        """The velocity at the current position."""
        self._velocity = self.position.evaluate()[0]
        return self._velocity

    def take(self, rest: float) -> bool:
        """Move along the last velocity.

        Args:
            rest: the norm of the velocity at which the phase has settled, for compiled steps.

        Returns:
            Whether the solver found no step that helps.
        """
        found = self.solver.update(self.leaves, self._velocity, self.state, self.objective)
        self._advance(1)
        return found is False

    def ended(self) -> dict[str, Tensor]:
        """The final parameters, detached."""
        return {name: p.detach() for name, p in self.position.params.items()}

    def _advance(self, steps: int) -> None:
        self.taken += steps
        self.position.step += steps


class RecordedSteps(EagerSteps):
    """Single steps with a graph from the final parameters to the start and the solver state."""

    apart: ClassVar[bool] = False

    @torch.enable_grad()
    def __init__(
        self, position: Position, solver: Solver, objective: Objective, previous: Any
    ) -> None:
        super().__init__(position, solver, objective, previous)

    def take(self, rest: float) -> bool:
        """Move copies, since the parameters before the step are part of the graph."""
        with torch.enable_grad():
            kept = self.solver.functional
            self.leaves = [p if kept else p.clone() for p in self.leaves]
            self.state = [s if kept else s.clone() for s in self.state]
            self.solver.update(self.leaves, self._velocity, self.state, self.objective)
        self.position.params = dict(zip(self.position.params, self.leaves, strict=True))
        self._advance(1)
        return False

    def ended(self) -> dict[str, Tensor]:
        """The final parameters, with their graph."""
        return self.position.params


class StretchedSteps(EagerSteps):
    """Many steps at once, by a compiled function.

    Args:
        position: the start of the phase.
        solver: the update rule.
        objective: loss and velocity that the rule may evaluate.
        previous: solver state to continue from.
        limit: number of steps of the phase; infinite if there is no limit.
    """

    apart: ClassVar[bool] = False

    def __init__(
        self,
        position: Position,
        solver: Solver,
        objective: Objective,
        previous: Any,
        limit: float,
    ) -> None:
        from equigrad.solvers.compiled import CompiledSteps

        super().__init__(position, solver, objective, previous)
        self._limit = limit
        self._compiled = CompiledSteps(
            position.velocity,
            position.params,
            self.state,
            solver,
            position.step,
            position.count,
            objective.samples,
        )

    def look(self) -> tuple[Tensor, ...]:
        """The velocity at the current position."""
        return self._compiled.look(self._limit - self.taken)

    def take(self, rest: float) -> bool:
        """Move until the norm of the velocity is at most `rest`, or by a call's most steps."""
        self._advance(self._compiled.take(rest))
        return False


def begin_steps(
    position: Position,
    solver: Solver,
    objective: Objective,
    previous: Any,
    *,
    limit: float,
    batches: int,
    watched: bool,
    graph: bool,
) -> EagerSteps:
    """Choose how to take the steps of a phase.

    Raises:
        ConfigurationError: the solver compiles, and the steps differ or cannot be compiled.
    """
    if solver.compile:
        _require_alike(batches, each=watched or graph)
        if limit > solver.check_every:
            return StretchedSteps(position, solver, objective, previous, limit)
    kind = RecordedSteps if graph else EagerSteps
    return kind(position, solver, objective, previous)


def _require_alike(batches: int, *, each: bool) -> None:
    """Raise if several steps cannot be taken at once: they differ, or each one is needed."""
    if batches > 1:
        raise ConfigurationError(
            f"compile=True compiles several steps on the same loss into one function, but this "
            f"problem has {batches} mini-batches. Average over them in the loss, or use "
            f"compile=False"
        )
    if each:
        raise ConfigurationError(
            "compile=True compiles several steps into one function, but this estimator needs the "
            "params of every single step; use compile=False"
        )
