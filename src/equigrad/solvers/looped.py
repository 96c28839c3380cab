"""Solver steps as one loop with its stopping rule, made by torch's compiler."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from equigrad.solvers.graphs import Compiler, with_layout_of
from equigrad.solvers.recording import Recording
from equigrad.solvers.solver import NO_OBJECTIVE, Solver


class LoopedSteps:
    """Any number of steps as a function of the leaves, the solver's state and all constants.

        v ← velocity(φ)
        while t < steps, unless t is a multiple of check_every above 0 and ‖v‖ ≤ rest:
            φ, state ← update(φ, v, state),    v ← velocity(φ),    t ← t + 1

    The loop also ends at such a t if the norm is not finite. It stops where single steps, whose
    residual is measured every `check_every`, stop. However many are taken, one step is compiled.

    Args:
        recording: one evaluation of the velocity.
        tensors: the leaves, the state and the constants of a phase.
        count: number of leaves.
        solver: a differentiable solver.
        compiler: compiles a function of tensors.
    """

    def __init__(
        self,
        recording: Recording,
        tensors: list[Tensor],
        count: int,
        solver: Solver,
        compiler: Compiler,
    ) -> None:
        from torch._higher_order_ops.while_loop import while_loop_op  # slow to import

        moving = len(tensors) - len(recording.constants)
        self._count, self._norm_dtype = count, tensors[0].abs().dtype
        self._device = tensors[0].device

        def velocity(leaves: Sequence[Tensor], constants: Sequence[Tensor]) -> list[Tensor]:
            # copies: a velocity may be a view of a leaf or a constant
            return [v.clone() for v in recording.replay(leaves, constants)]

        def goes_on(t: Tensor, *inputs: Tensor) -> Tensor:
            steps, rest = inputs[-2:]
            norms = [torch.linalg.vector_norm(v) for v in inputs[:count]]
            norm = torch.linalg.vector_norm(torch.stack(norms))
            unmeasured = (t == 0) | (t % solver.check_every != 0)
            return (t < steps) & (unmeasured | ((norm > rest) & norm.isfinite()))

        def step(t: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
            moves, moved = inputs[:count], inputs[count : count + moving]
            # the update works in place, and the inputs have to keep their values
            leaves, state = ([m.clone() for m in part] for part in (moved[:count], moved[count:]))
            solver.update(leaves, moves, state, NO_OBJECTIVE)
            return t + 1, *velocity(leaves, inputs[count + moving : -2]), *leaves, *state

        def run(*inputs: Tensor) -> tuple[Tensor, ...]:
            moves = velocity(inputs[:count], inputs[moving:-2])
            carried: Any = (torch.zeros_like(inputs[-2]), *moves, *inputs[:moving])
            return while_loop_op(condition, body, carried, inputs[moving:])

        # of their own memory: torch compiles no loop over tensors that share it
        inputs = [*map(with_layout_of, tensors), *self._limits(1, -1.0)]
        moves = [torch.empty_like(p) for p in tensors[:count]]
        carried = torch.zeros_like(inputs[-2]), *moves, *inputs
        condition, body = _functional(goes_on, carried), _functional(step, carried)
        self._function = compiler(run, inputs)

    def begin(self, tensors: Sequence[Tensor]) -> None:
        """Begin a phase; this function keeps nothing of a phase."""

    def run(
        self, tensors: Sequence[Tensor], steps: int, rest: float = -1.0
    ) -> tuple[int, tuple[Tensor, ...], list[Tensor]]:
        """The number of steps taken; the velocity after them; leaves and state after them."""
        taken, *results = self._function(*tensors, *self._limits(steps, rest))
        return int(taken), tuple(results[: self._count]), results[self._count :]

    def _limits(self, steps: int, rest: float) -> tuple[Tensor, Tensor]:
        """The number of steps and the norm at rest, as inputs of the function."""
        return (
            torch.tensor(steps, device=self._device),
            torch.tensor(rest, dtype=self._norm_dtype, device=self._device),
        )


def _functional(function: Any, inputs: Sequence[Tensor]) -> Any:
    """A function as a graph that writes to no input."""
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(torch.func.functionalize(function), tracing_mode="fake")(*inputs)
