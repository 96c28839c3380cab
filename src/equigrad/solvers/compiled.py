"""Several solver steps as one function, made by torch's compiler or captured as a CUDA graph.

At the start of every phase, one evaluation of the velocity is recorded, operation by operation, and
the recording is the key of a cache of compiled functions. A loss may therefore be a new closure in
every call, and whatever it reads (a batch, a flag, a module's mode) may change between phases:
tensors are inputs of the function, and everything else is part of its key.

On a CUDA device the steps are CUDA graphs (`equigrad.solvers.graphs`); on other devices they are
one function made by torch's compiler.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from equigrad.errors import ConfigurationError
from equigrad.problems import Params, Velocity
from equigrad.solvers.graphs import GraphedSteps
from equigrad.solvers.recording import EAGER, Recording, record, refused
from equigrad.solvers.solver import Solver

BACKEND = "inductor"
"""The compiler, one of `torch._dynamo.list_backends()`."""

KEPT = 64
"""The largest number of compiled functions that are kept."""

GRAPHS_KEPT = 16
"""The largest number of sets of CUDA graphs that are kept."""

_compiled: dict[tuple[Any, ...], "InductorSteps"] = {}
_graphs: dict[tuple[Any, ...], GraphedSteps] = {}

_NO_OBJECTIVE: Any = None
"""A differentiable solver evaluates no objective."""


class CompiledSteps:
    """Takes `solver.check_every` steps at once, on the tensors of one phase.

    Args:
        velocity: velocity of the phase, the same function at every step.
        params: the leaves.
        state: the solver's state.
        solver: a differentiable solver.
        step: number of the first step.
        count: called with the number of velocities that the phase takes, without those taken to
            record and check the function.

    Attributes:
        steps: number of steps in one call.
        singly: whether it can also take a single step.

    Raises:
        ConfigurationError: the velocity draws random numbers, changes a tensor that it did not
            create, uses values of φ in Python's control flow, or cannot be compiled.
    """

    def __init__(
        self,
        velocity: Velocity,
        params: Params,
        state: list[Tensor],
        solver: Solver,
        step: int,
        count: Callable[[int], None],
    ) -> None:
        self.steps = solver.check_every
        self._leaves, self._counted = len(params), count
        moving = [*params.values(), *state]
        # solvers that differ only in when to stop share one function
        rule = dataclasses.replace(solver, max_steps=1, tol=None)

        def recorded() -> tuple[Recording, list[Tensor], tuple[Any, ...]]:
            recording = record(velocity, params, step)
            tensors = [t.detach() for t in (*moving, *recording.constants.values())]
            layouts = tuple((t.shape, t.stride(), t.dtype, t.device) for t in tensors)
            return recording, tensors, (BACKEND, rule, len(params), recording.key(), layouts)

        on_cuda = all(p.device.type == "cuda" for p in params.values())
        self.singly = solver.compile == "graph" or on_cuda
        known: dict[tuple[Any, ...], Any] = _graphs if self.singly else _compiled
        recording, tensors, key = recorded()
        if key not in known:  # a first evaluation may fill caches and so differ from later ones
            recording, tensors, key = recorded()
        if (function := known.get(key)) is None:
            _make_room(known, GRAPHS_KEPT if self.singly else KEPT, solver)
            make = _graphed if self.singly else InductorSteps
            function = make(recording, tensors, len(params), solver)
            if _check(function.run(tensors), velocity, params, state, solver, step):
                known[key] = function
        self._function, self._tensors = function, tensors
        self._moved: list[Tensor] = []
        function.begin(tensors)

    def look(self, *, one: bool = False) -> tuple[Tensor, ...]:
        """The velocity at the current position. The steps are computed, but φ is not yet moved.

        The loop can thus stop on this velocity, before any of the steps.

        Args:
            one: whether to take a single step.
        """
        self._taken = 1 if one else self.steps
        self._counted(1)
        results = self._function.run(self._tensors, one=one)
        self._moved = list(results[self._leaves :])
        return tuple(results[: self._leaves])

    def take(self) -> int:
        """Move φ and the state to the end of the steps.

        Returns:
            The number of steps.
        """
        self._counted(self._taken - 1)
        torch._foreach_copy_(self._tensors[: len(self._moved)], self._moved)
        return self._taken


def _make_room(known: dict[tuple[Any, ...], Any], limit: int, solver: Solver) -> None:
    """Drop the oldest function, with a warning, if the cache is full."""
    if len(known) < limit:
        return
    del known[next(iter(known))]
    warnings.warn(
        f"compile={solver.compile!r} has compiled more than {limit} different versions of the "
        f"solver's steps. A Python number that changes from call to call makes a new version each "
        f"time; use a tensor for it",
        stacklevel=2,
    )


class InductorSteps:
    """`solver.check_every` steps as a function of the leaves, the solver's state and all constants.

    Args:
        recording: one evaluation of the velocity.
        tensors: the leaves, the state and the constants of a phase.
        count: number of leaves.
        solver: a differentiable solver.
    """

    def __init__(
        self, recording: Recording, tensors: list[Tensor], count: int, solver: Solver
    ) -> None:
        moving = len(tensors) - len(recording.constants)

        def run(*inputs: Tensor) -> tuple[Tensor, ...]:
            leaves, state = list(inputs[:count]), list(inputs[count:moving])
            velocities = []
            for _ in range(solver.check_every):
                velocities.append(recording.replay(leaves, inputs[moving:]))
                # the update works in place, and the inputs have to keep their values
                leaves, state = [p.clone() for p in leaves], [s.clone() for s in state]
                solver.update(leaves, velocities[-1], state, _NO_OBJECTIVE)
            return *velocities[0], *leaves, *state

        self._function = _compile(run, tensors)

    def begin(self, tensors: Sequence[Tensor]) -> None:
        """Begin a phase; this function keeps nothing of a phase."""

    def run(self, tensors: Sequence[Tensor], *, one: bool = False) -> Sequence[Tensor]:
        """The velocity before the first step, then leaves and state after the last."""
        return self._function(*tensors)


def _graphed(
    recording: Recording, tensors: list[Tensor], count: int, solver: Solver
) -> GraphedSteps:
    compiler = _compile if solver.compile == "inductor" else None
    return GraphedSteps(recording, tensors, count, solver, compiler)


def _compile(
    run: Callable[..., Sequence[Tensor]], tensors: list[Tensor]
) -> Callable[..., Sequence[Tensor]]:
    """A function of tensors, compiled by torch."""
    from torch._dynamo import lookup_backend  # slow to import
    from torch.fx.experimental.proxy_tensor import make_fx

    try:
        return lookup_backend(BACKEND)(make_fx(run)(*tensors), list(tensors))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        needs = "; on a CPU it needs a C++ compiler" if tensors[0].device.type == "cpu" else ""
        raise refused(f"failed in torch's compiler{needs}", error) from error


def _check(
    compiled: Sequence[Tensor],
    velocity: Velocity,
    params: Params,
    state: list[Tensor],
    solver: Solver,
    step: int,
) -> bool:
    """Compare compiled steps with eager ones, to find computations that torch cannot record.

    Returns:
        Whether the comparison is conclusive, which it is not if the steps diverge.
    """
    leaves = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    values, own = list(leaves.values()), [s.clone() for s in state]
    for i in range(solver.check_every):
        solver.update(values, velocity(leaves, step + i)[0], own, _NO_OBJECTIVE)
    ours = list(compiled[len(params) : 2 * len(params)])
    start = [p.detach() for p in params.values()]
    off, moved, size = (
        torch.stack([n.double() for n in torch._foreach_norm(tensors)]).norm().item()
        for tensors in (torch._foreach_sub(ours, values), torch._foreach_sub(values, start), start)
    )
    # fused kernels round differently; a lost computation makes a difference of the size of a move
    rounding = 1e3 * torch.finfo(start[0].dtype).eps * (size + moved)
    if off > 1e-3 * moved + rounding:
        raise ConfigurationError(
            f"compile=True gives wrong results here: {solver.check_every} compiled steps end "
            f"{off:.1e} away from the same steps without compilation, in which params moved by "
            f"{moved:.1e}. The losses probably compute something outside of torch, such as in "
            f"numpy; {EAGER}"
        )
    return math.isfinite(moved)
