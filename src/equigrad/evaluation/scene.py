"""A problem at fixed meta-parameters, with its module state, random numbers and tally."""

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from equigrad.evaluation.reaches import Reaches
from equigrad.evaluation.stage import Stage
from equigrad.evaluation.start import Start
from equigrad.evaluation.tally import Tally
from equigrad.evaluation.tensors import like
from equigrad.parallel import Layout
from equigrad.problems import Params, Part, Problem, Velocity
from equigrad.problems.held import held
from equigrad.problems.streams import DrawnBatches
from equigrad.randomness import Stream
from equigrad.solvers import Lost, Moment, Settled


@dataclass
class Judged:
    """The outer loss where its gradients were last taken, and the last two `∂L_in/∂θ`.

    Attributes:
        at: the end of the phase.
        loss: its value.
        pressure: `∂L_out/∂φ` and `∂L_out/∂θ`, by name.
        partials: the ends of two phases, with `∂L_in/∂θ` there.
    """

    at: Settled | None = None
    loss: Tensor | None = None
    pressure: tuple[Params, Params] | None = None
    partials: list[tuple[Settled, dict[str, Tensor]]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, eq=False)
class Scene:
    """A problem at fixed θ: the argument of all phases, derivatives and estimators.

    The views that `at` and `holding` return share its stage and tally.

    Attributes:
        problem: the problem; its functions compute in lower precision under autocast.
        params: φ at the start of the free phase, detached.
        meta_params: θ, detached.
        lower: the lowest precision that the problem's functions compute in under autocast; None
            without.
        start: φ and θ as they were given, with their graph.
        reaches: the meta-parameters that each function depends on.
        stage: the buffers, training flags and random numbers of the functions.
        tally: counts gradients and collects notes.
        judged: set by `outer_gradients`, used by `outer_loss`.
        streams: the batches that are drawn from loaders.
        settled: the end of the free phase, if it has run already.
        before: the end of an earlier free phase to continue from, with solver state and step count.
        lost: the samples that are held constant.
        layouts: how the original φ and θ were distributed over processes.
    """

    problem: Problem
    params: dict[str, Tensor]
    meta_params: dict[str, Tensor]
    lower: torch.dtype | None
    start: Start
    reaches: Reaches
    stage: Stage
    tally: Tally
    judged: Judged
    streams: tuple[DrawnBatches, ...] = ()
    settled: Settled | None = None
    before: Settled | None = None
    lost: Lost | None = None
    layouts: tuple[Layout, Layout] = (Layout(), Layout())

    def at(self, params: Params, meta_params: Params) -> Self:
        """A view with another start φ and other meta-parameters."""
        return self._view(
            params=dict(params), meta_params=dict(meta_params), settled=None, judged=Judged()
        )

    def holding(self, at: Moment) -> Self:
        """A view that holds the samples which were lost by the end of a phase."""
        lost = at.lost
        if lost is None or lost is self.lost:
            return self
        return self._view(problem=held(self.problem, lost.params, lost.samples), lost=lost)

    def _view(self, **changed: Any) -> Self:
        view = copy(self)
        vars(view).update(changed)
        return view

    def evaluate(self, stream: Stream, params: Params, meta_params: Params, step: int = 0) -> Any:
        """The user's inner or outer function on a step's batch, with that step's random numbers."""
        return self.problem.evaluate(stream, params, meta_params, step)

    def probe(self, stream: Stream, params: Params, meta_params: Params, step: int = 0) -> Tensor:
        """A scalar with the dependences of the user's function."""
        return self.problem.probe(stream, params, meta_params, step)

    def residual(self, params: Params, meta_params: Params, step: int) -> tuple[Tensor, ...]:
        """The residual on a step's batch, with its graph; the caller counts the gradient."""
        return self.problem.residual(params, meta_params, step)

    def moves(self, params: Params, meta_params: Params, step: int) -> tuple[Tensor, ...]:
        """Minus the residual, with its graph; the caller counts the gradient."""
        return self.problem.moves(params, meta_params, step)

    def parts(self, params: Params, meta_params: Params, step: int) -> Iterator[Part]:
        """The problem's functions on a step's batch, as scalars that can be differentiated."""
        return self.problem.parts(params, meta_params, step)

    def residual_at(self) -> Callable[[Params, int], tuple[Tensor, ...]]:
        """The residual at this θ for a loop, with its graph to φ; the caller counts gradients."""
        return self.problem.residual_at(self.meta_params)

    def velocity(self, beta: complex = 0.0, force: Params | None = None) -> Velocity:
        """The velocity at this θ for a loop; the caller counts the gradients.

        Args:
            beta: nudging strength β.
            force: a constant `∂L_out/∂φ`, by name, that replaces the outer loss.
        """
        meta = like(beta, self.meta_params)
        return self.problem.velocity_at(meta, beta, force)

    def buffers(self, at: Moment) -> dict[str, Tensor]:
        """The modules' buffers at a moment of a phase, by name, averaged over ranks."""
        return self.problem.ranks.averaged(self.stage.named_buffers(at))

    def as_given(self, params: Params, meta_params: Params) -> tuple[Params, Params]:
        """Tensors in the shapes of φ and θ, distributed over processes as these were given."""
        params_there, meta_there = self.layouts
        return params_there.laid_out(params), meta_there.laid_out(meta_params)

    def batch_steps(self, stream: Stream) -> range:
        """The step numbers that show every batch of a loss once."""
        return range(len(self.problem.batches(stream) or [None]))
