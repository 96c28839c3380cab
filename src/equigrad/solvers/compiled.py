"""Several solver steps as one function, made by torch's compiler or captured as a CUDA graph.

At the start of every phase, one evaluation of the velocity is recorded, operation by operation, and
the recording is the key of a cache of compiled functions. A loss may therefore be a new closure in
every call, and whatever it reads (a batch, a flag, a module's mode) may change between phases:
tensors are inputs of the function, and everything else is part of its key.

On a CUDA device the steps are CUDA graphs (`equigrad.solvers.graphs`); on other devices they are a
loop made by torch's compiler (`equigrad.solvers.looped`).
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
from equigrad.solvers.looped import LoopedSteps
from equigrad.solvers.recording import EAGER, Recording, record, refused
from equigrad.solvers.solver import NO_OBJECTIVE, Solver

BACKEND = "inductor"
"""The compiler, one of `torch._dynamo.list_backends()`."""

LONGEST = 1000
"""About as many steps are taken by one call at most; Python's signals wait for its end."""

KEPT = 64
"""The largest number of compiled functions that are kept."""

GRAPHS_KEPT = 16
"""The largest number of sets of CUDA graphs that are kept."""

_compiled: dict[tuple[Any, ...], LoopedSteps] = {}
_graphs: dict[tuple[Any, ...], GraphedSteps] = {}


class CompiledSteps:
    """Takes many steps at once, on the tensors of one phase.

    Args:
        velocity: velocity of the phase, the same function at every step.
        params: the leaves.
        state: the solver's state.
        solver: a differentiable solver.
        step: number of the first step.
        count: called with the number of velocities that the phase takes, without those taken to
            record and check the function.
        samples: whether samples settle independently.

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
        samples: bool,
    ) -> None:
        self._every, self._counted, self._samples = solver.check_every, count, samples
        moving = [*params.values(), *state]
        # solvers that differ only in when to stop share one function
        rule = dataclasses.replace(solver, max_steps=1, tol=None)

        def recorded() -> tuple[Recording, list[Tensor], tuple[Any, ...]]:
            recording = record(velocity, params, step)
            tensors = [t.detach() for t in (*moving, *recording.constants.values())]
            layouts = tuple((t.shape, t.stride(), t.dtype, t.device) for t in tensors)
            return recording, tensors, (BACKEND, rule, len(params), recording.key(), layouts)

        on_cuda = all(p.device.type == "cuda" for p in params.values())
        self._graphed = solver.compile == "graph" or on_cuda
        known: dict[tuple[Any, ...], Any] = _graphs if self._graphed else _compiled
        recording, tensors, key = recorded()
        if key not in known:  # a first evaluation may fill caches and so differ from later ones
            recording, tensors, key = recorded()
        if (function := known.get(key)) is None:
            _make_room(known, GRAPHS_KEPT if self._graphed else KEPT, solver)
            if self._graphed:
                compiler = _compile if solver.compile == "inductor" else None
                function = GraphedSteps(recording, tensors, len(params), solver, compiler)
            else:
                function = LoopedSteps(recording, tensors, len(params), solver, _compile)
            ours = function.run(tensors, solver.check_every)[2][: len(params)]
            if _check(ours, velocity, params, state, solver, step):
                known[key] = function
        self._function: Any = function
        self._tensors = tensors
        self._moved: list[Tensor] = []
        function.begin(tensors)
        self._velocity: tuple[Tensor, ...] = ()
        if not self._graphed:
            _, self._velocity, _ = function.run(tensors, 0)

    def look(self, left: float) -> tuple[Tensor, ...]:
        """The velocity at the current position.

        Args:
            left: number of steps that the phase may still take. The last one is taken alone, so
                that the residual is measured before it.
        """
        self._counted(1)
        if not self._graphed:
            longest = self._every * (1 if self._samples else max(LONGEST // self._every, 1))
            self._taken = int(max(min(left - 1, longest), 1))
            return self._velocity
        # the graph takes the steps, but φ is not yet moved: the loop can stop on this velocity
        self._taken = self._every if left > self._every else 1
        _, velocity, self._moved = self._function.run(self._tensors, self._taken)
        return velocity

    def take(self, rest: float) -> int:
        """Move φ and the state.

        Args:
            rest: the norm of the velocity at which to stop.

        Returns:
            The number of steps.
        """
        if not self._graphed:
            self._taken, self._velocity, self._moved = self._function.run(
                self._tensors, self._taken, rest
            )
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


def _compile(
    run: Callable[..., Sequence[Tensor]], tensors: list[Tensor]
) -> Callable[..., Sequence[Tensor]]:
    """A function of tensors, compiled by torch; on a CPU without Python between its kernels."""
    from torch._dynamo import lookup_backend  # slow to import
    from torch._inductor import config
    from torch.fx.experimental.proxy_tensor import make_fx

    on_cpu = tensors[0].device.type == "cpu"
    try:
        graph = make_fx(run, tracing_mode="fake" if on_cpu else "real")(*tensors)
        with config.patch(cpp_wrapper=on_cpu):
            return lookup_backend(BACKEND)(graph, list(tensors))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        needs = "; on a CPU it needs a C++ compiler" if on_cpu else ""
        raise refused(f"failed in torch's compiler{needs}", error) from error


def _check(
    ours: list[Tensor],
    velocity: Velocity,
    params: Params,
    state: list[Tensor],
    solver: Solver,
    step: int,
) -> bool:
    """Compare compiled steps with eager ones, to find computations that torch cannot record.

    Args:
        ours: the leaves after `solver.check_every` compiled steps.
        velocity: velocity of the phase.
        params: the leaves before.
        state: the solver's state before.
        solver: the update rule.
        step: number of the first step.

    Returns:
        Whether the comparison is conclusive, which it is not if the steps diverge.
    """
    leaves = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    values, own = list(leaves.values()), [s.clone() for s in state]
    for i in range(solver.check_every):
        solver.update(values, velocity(leaves, step + i)[0], own, NO_OBJECTIVE)
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
