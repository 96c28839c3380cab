"""Solver steps as CUDA graphs: captured kernels, replayed without Python between them."""

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from equigrad.errors import ConfigurationError
from equigrad.solvers.recording import EAGER, Recording, refused
from equigrad.solvers.solver import NO_OBJECTIVE, Solver

Compiler = Callable[[Callable[..., Sequence[Tensor]], list[Tensor]], Callable[..., Any]]
"""A compiler: takes a function of tensors and its inputs, and returns a faster function."""


class GraphedSteps:
    """The steps of a phase as CUDA graphs, on tensors of their own.

    There are three graphs: the part that does not depend on φ, run once a phase; `check_every`
    steps; and one step. All graphs share one pool of memory, so that a phase must end before
    another begins.

    Args:
        recording: one evaluation of the velocity.
        tensors: the leaves, the solver's state and all constants of a phase.
        count: number of leaves.
        solver: a differentiable solver.
        compiler: compiles the velocity before it is captured; None to capture it as recorded.
    """

    def __init__(
        self,
        recording: Recording,
        tensors: list[Tensor],
        count: int,
        solver: Solver,
        compiler: Compiler | None,
    ) -> None:
        moving = len(tensors) - len(recording.constants)
        own = [with_layout_of(t) for t in tensors]
        self._moving, self._constants = own[:moving], own[moving:]
        leaves, state = self._moving[:count], self._moving[count:]
        once, each = recording.split()
        self._load(tensors)
        self._prepare = _capture(lambda: recording.values(once, self._constants))
        known = self._prepare()

        def evaluate(*inputs: Tensor) -> tuple[Tensor, ...]:
            values = dict(zip(known, inputs[count:], strict=True))
            return recording.results(each, inputs[:count], values)

        inputs = [*leaves, *known.values()]
        velocity = evaluate if compiler is None else compiler(evaluate, inputs)

        def move(steps: int) -> tuple[Tensor, ...]:
            first = velocity(*inputs)
            kept = tuple(v.clone() for v in first)  # a velocity may be a view of a leaf
            solver.update(leaves, tuple(first), state, NO_OBJECTIVE)
            for _ in range(steps - 1):
                solver.update(leaves, tuple(velocity(*inputs)), state, NO_OBJECTIVE)
            return kept

        self._several = _capture(lambda: move(solver.check_every))
        self._one = _capture(lambda: move(1))

    def begin(self, tensors: Sequence[Tensor]) -> None:
        """Copy the constants of a phase, and compute what depends on them alone."""
        self._load(tensors)
        self._prepare()

    def run(
        self, tensors: Sequence[Tensor], steps: int
    ) -> tuple[int, tuple[Tensor, ...], list[Tensor]]:
        """The steps, one or `check_every`; the velocity before them; leaves and state after."""
        torch._foreach_copy_(self._moving, list(tensors[: len(self._moving)]))
        return steps, self._one() if steps == 1 else self._several(), self._moving

    def _load(self, tensors: Sequence[Tensor]) -> None:
        given = [_span(t) for t in tensors]
        torch._foreach_copy_([_span(t) for t in (*self._moving, *self._constants)], given)


@cache
def _pool() -> Any:
    """The memory pool of all graphs."""
    return torch.cuda.graph_pool_handle()


def _capture(run: Callable[[], Any]) -> Callable[[], Any]:
    """A function that replays a captured computation and returns the same tensors, filled anew."""
    if not torch.cuda.is_available():
        raise ConfigurationError(f'compile="graph" needs tensors on a CUDA device; {EAGER}')
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(side):  # warm up: initialisation of libraries cannot be captured
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The CUDA Graph is empty")  # views launch no kernel
            with torch.cuda.graph(graph, pool=_pool(), capture_error_mode="thread_local"):
                results = run()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise refused("cannot capture the steps as a CUDA graph", error) from error

    def replay() -> Any:
        graph.replay()
        return results

    return replay


def _span(tensor: Tensor) -> Tensor:
    """The memory that a tensor covers, as a vector."""
    if tensor.numel() == 0:
        return tensor.new_empty(0)
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.detach().as_strided((1 + reach,), (1,), tensor.storage_offset())


def with_layout_of(tensor: Tensor) -> Tensor:
    """An uninitialised tensor with the same shape and strides, which may overlap."""
    return torch.empty_like(_span(tensor)).as_strided(tensor.shape, tensor.stride())
