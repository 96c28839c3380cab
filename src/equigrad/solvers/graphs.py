"""Steps of a phase as CUDA graphs: recorded kernels, replayed without Python between them."""

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from equigrad.errors import ConfigurationError
from equigrad.solvers.recording import EAGER, Recording, refused
from equigrad.solvers.solver import Solver

Compiler = Callable[[Callable[..., Sequence[Tensor]], list[Tensor]], Callable[..., Any]]
"""Makes a faster function of tensors, given one and its inputs."""

_NO_OBJECTIVE: Any = None
"""A differentiable solver does not look around."""


class GraphedSteps:
    """The steps of a phase as graphs on tensors of their own.

    There are three: what does not depend on φ, once a phase; `check_every` steps; and one step. All
    graphs share their memory, so a phase has to have ended before that of another begins.

    Args:
        recording: one evaluation of the velocity.
        tensors: the leaves, the solver's state and all constants, as a phase has them.
        count: how many leaves there are.
        solver: a differentiable one.
        compiler: makes what is captured faster; as it was recorded where None.
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
        own = [_with_layout_of(t) for t in tensors]
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
            solver.update(leaves, tuple(first), state, _NO_OBJECTIVE)
            for _ in range(steps - 1):
                solver.update(leaves, tuple(velocity(*inputs)), state, _NO_OBJECTIVE)
            return kept

        self._several = _capture(lambda: move(solver.check_every))
        self._one = _capture(lambda: move(1))

    def begin(self, tensors: Sequence[Tensor]) -> None:
        """Take over the constants of a phase, and compute what follows from them alone."""
        self._load(tensors)
        self._prepare()

    def run(self, tensors: Sequence[Tensor], *, one: bool = False) -> tuple[Tensor, ...]:
        """The velocity where the steps start, then leaves and state where they end."""
        torch._foreach_copy_(self._moving, list(tensors[: len(self._moving)]))
        velocity = self._one() if one else self._several()
        return *velocity, *self._moving

    def _load(self, tensors: Sequence[Tensor]) -> None:
        given = [_span(t) for t in tensors]
        torch._foreach_copy_([_span(t) for t in (*self._moving, *self._constants)], given)


@cache
def _pool() -> Any:
    """The memory that all graphs share."""
    return torch.cuda.graph_pool_handle()


def _capture(run: Callable[[], Any]) -> Callable[[], Any]:
    """What runs again on the same memory, and returns the same tensors, filled anew."""
    if not torch.cuda.is_available():
        raise ConfigurationError(f'compile="graph" needs tensors on a CUDA device; {EAGER}')
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(side):  # libraries set themselves up, which cannot be captured
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The CUDA Graph is empty")  # views, or nothing
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
    """The stretch of memory that a tensor looks at, as a vector."""
    if tensor.numel() == 0:
        return tensor.new_empty(0)
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.detach().as_strided((1 + reach,), (1,), tensor.storage_offset())


def _with_layout_of(tensor: Tensor) -> Tensor:
    """A new tensor of the same shape and strides, which may overlap; not filled."""
    return torch.empty_like(_span(tensor)).as_strided(tensor.shape, tensor.stride())
