"""The place of one step in a single loop for θ and φ, with the losses and their gradients there."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from equigrad.evaluation.reaches import Reaches
from equigrad.evaluation.stage import Stage
from equigrad.evaluation.tally import Tally
from equigrad.problems import Params, Problem, slope
from equigrad.randomness import Stream
from equigrad.solvers.phase import Moment


@dataclass
class State:
    """One of the states that move along with θ and are never reset.

    Attributes:
        tensors: where it is, by name; leaves that require a gradient.
        memory: of its optimiser or solver.
        buffers: of the problem's modules as they were when it last moved.
        residual: norm of its last velocity.
        seen: the losses where it last moved, if not used yet.
    """

    tensors: dict[str, Tensor]
    memory: Any
    buffers: tuple[Tensor, ...] = ()
    residual: float = math.nan
    seen: Any = None


@dataclass(frozen=True)
class Slopes:
    """The value and derivatives of a loss.

    Attributes:
        params: `∂L/∂φ`, by name.
        meta_params: `∂L/∂θ`, by name.
        loss: the loss.
    """

    params: dict[str, Tensor]
    meta_params: dict[str, Tensor]
    loss: Tensor


@dataclass
class Place:
    """The problem at one θ, on the mini-batches of one step.

    Attributes:
        problem: the problem.
        meta_params: θ, detached.
        reaches: what each loss depends on.
        stage: the random numbers and buffers that the losses find.
        states: the states that move along with θ.
        tally: counts the gradients.
        step: which mini-batches.
        beta: nudging strength of this step.
        last: whether θ moves after this step of the states.
    """

    problem: Problem
    meta_params: dict[str, Tensor]
    reaches: Reaches
    stage: Stage
    states: Sequence[State]
    tally: Tally
    step: int
    beta: float
    last: bool = False

    def slopes(self, stream: Stream, at: Params, *, by_params: bool = False) -> Slopes:
        """A data loss and its derivatives by the θ that it depends on, and by φ if asked."""
        names = self.reaches.functions[stream]
        meta = {name: self.meta_params[name].detach().requires_grad_() for name in names}
        params = {n: p.detach().requires_grad_(by_params) for n, p in at.items()}
        loss = self.problem.evaluate(stream, params, {**self.meta_params, **meta}, self.step)
        asked = params if by_params else {}
        leaves = [*asked.values(), *meta.values()]
        if not leaves or not loss.requires_grad:
            loss = loss.detach()
            return Slopes({n: torch.zeros_like(p.detach()) for n, p in asked.items()}, {}, loss)
        self.tally.spend(1)
        grads = slope(loss, leaves)
        return Slopes(
            dict(zip(asked, grads, strict=False)),
            dict(zip(meta, grads[len(asked) :], strict=True)),
            loss.detach(),
        )

    def stand_at(self, state: State) -> None:
        """Have the losses find their modules as they were when a state last moved."""
        self.stage.stand_at(
            Moment(
                params=state.tensors,
                solver_state=state.memory,
                end_step=self.step,
                buffers=state.buffers,
            )
        )

    def velocity(self, at: Params, beta: float) -> tuple[Tensor, ...]:
        """`-∂(L_in + β L_out)/∂φ` there."""
        self.tally.spend(1 if beta == 0 else 2)
        move = self.problem.velocity_at(self.meta_params, beta)
        with torch.no_grad():
            return move(at, self.step)[0]
