"""How a phase takes its steps: one by one, with their graph, or several by a compiled function."""

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
    """Where a phase stands, and its velocity and loss there.

    It knows nothing of the steps, and the steps hold it: a cycle would keep the tensors of a phase
    that has ended until Python's garbage collector finds it.

    Args:
        velocity: `(params, step) -> velocity, value`.
        loss: `(params, step) -> scalar`.
        params: where the phase starts.
        step: number of the first step.
        count: is told how many velocities were evaluated.
        fixed: whether velocity and loss depend on the parameters alone, and are remembered.

    Attributes:
        params: the parameters, by name.
        step: number of the step that comes next.
        velocity: as given.
        count: as given.
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
        """Velocity and, at no further cost, what gives the loss."""
        if not self._fixed:
            self.count(1)
            return self.velocity(self.params, self.step)
        versions = [p._version for p in self.params.values()]
        if self._seen[0] != versions:
            self.count(1)
            self._seen = versions, self.velocity(self.params, self.step)
        return self._seen[1]

    def number(self) -> int:
        """That of the step that comes next."""
        return self.step

    def loss(self) -> Tensor:
        """The loss without a gradient."""
        return self._loss(self.params, self.step)


class EagerSteps:
    """One step after the other, in place. To be used where no graph is recorded.

    Args:
        position: where the phase starts.
        solver: the rule.
        objective: what the rule may evaluate.
        previous: solver state to go on from.

    Attributes:
        apart: class attribute; whether samples that diverge can be left behind.
        position: where the phase stands.
        leaves: the parameters, which move.
        state: the solver's state.
        taken: how many steps have been taken.
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
        """The velocity where the phase stands."""
        self._velocity = self.position.evaluate()[0]
        return self._velocity

    def take(self) -> bool:
        """Move along the velocity last looked at.

        Returns:
            Whether the solver found no step that helps.
        """
        found = self.solver.update(self.leaves, self._velocity, self.state, self.objective)
        self._advance(1)
        return found is False

    def ended(self) -> dict[str, Tensor]:
        """The parameters where the phase ended."""
        return {name: p.detach() for name, p in self.position.params.items()}

    def _advance(self, steps: int) -> None:
        self.taken += steps
        self.position.step += steps


class RecordedSteps(EagerSteps):
    """One step after the other, with a graph from what is reached to the start and the state."""

    apart: ClassVar[bool] = False

    @torch.enable_grad()
    def __init__(
        self, position: Position, solver: Solver, objective: Objective, previous: Any
    ) -> None:
        super().__init__(position, solver, objective, previous)

    def take(self) -> bool:
        """Move copies: the parameters before are part of the graph."""
        with torch.enable_grad():
            kept = self.solver.functional
            self.leaves = [p if kept else p.clone() for p in self.leaves]
            self.state = [s if kept else s.clone() for s in self.state]
            self.solver.update(self.leaves, self._velocity, self.state, self.objective)
        self.position.params = dict(zip(self.position.params, self.leaves, strict=True))
        self._advance(1)
        return False

    def ended(self) -> dict[str, Tensor]:
        """The parameters where the phase ended, with their graph."""
        return self.position.params


class StretchedSteps(EagerSteps):
    """Several steps at once; the last ones one by one, so that the norm is looked at before each.

    Args:
        position: where the phase starts.
        solver: the rule.
        objective: what the rule may evaluate.
        previous: solver state to go on from.
        limit: steps of the phase, infinite without a limit.
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
        self._eager = False
        self._compiled = CompiledSteps(
            position.velocity, position.params, self.state, solver, position.step, position.count
        )

    def look(self) -> tuple[Tensor, ...]:
        """The velocity where the phase stands."""
        one = self._limit - self.taken <= self._compiled.steps
        self._eager = one and not self._compiled.singly
        return super().look() if self._eager else self._compiled.look(one=one)

    def take(self) -> bool:
        """Move to the end of the compiled steps, or by one step."""
        if self._eager:
            return super().take()
        self._advance(self._compiled.take())
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
    """The steps of a phase, as the solver and whoever settles ask for them.

    Raises:
        ConfigurationError: the solver compiles, and the steps are not alike or cannot be compiled.
    """
    if solver.compile:
        _require_alike(batches, each=watched or graph)
        if limit > solver.check_every:
            return StretchedSteps(position, solver, objective, previous, limit)
    kind = RecordedSteps if graph else EagerSteps
    return kind(position, solver, objective, previous)


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
