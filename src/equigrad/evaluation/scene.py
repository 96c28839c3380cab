"""A problem at fixed meta-parameters, on its stage."""

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
    """The outer loss where its gradients were last taken, and the last two `∂L_in/∂θ`."""

    at: Settled | None = None
    loss: Tensor | None = None
    partials: list[tuple[Settled, dict[str, Tensor]]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, eq=False)
class Scene:
    """What phases, derivatives and estimators are functions of.

    Views of it, by `at` and `holding`, have the same stage and tally.

    Attributes:
        problem: whose functions compute in the lower precision under autocast.
        params: φ where the free phase starts, detached.
        meta_params: θ, detached.
        lower: the lowest precision that the problem's functions compute in under autocast; None
            without.
        start: φ and θ as they were given, with their graph.
        reaches: what the problem depends on.
        stage: the buffers, flags and random numbers that its functions find.
        tally: is told what was spent, and what is to be noted.
        judged: by `outer_gradients`, for `outer_loss`.
        streams: what draws from loaders.
        settled: where the free phase has ended already, if it has.
        before: where an earlier one ended, whose solver state and step it goes on from, if any.
        lost: the samples that are held.
        layouts: how φ and θ lay on processes when they were given.
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
        """With other params to settle from, at other meta-parameters."""
        return self._view(
            params=dict(params), meta_params=dict(meta_params), settled=None, judged=Judged()
        )

    def holding(self, at: Moment) -> Self:
        """With those samples held that a phase has lost until then: what follows has the others."""
        lost = at.lost
        if lost is None or lost is self.lost:
            return self
        return self._view(problem=held(self.problem, lost.params, lost.samples), lost=lost)

    def _view(self, **changed: Any) -> Self:
        view = copy(self)
        vars(view).update(changed)
        return view

    def evaluate(self, stream: Stream, params: Params, meta_params: Params, step: int = 0) -> Any:
        """The user's inner or outer function on one step's batch, with that step's randomness."""
        return self.problem.evaluate(stream, params, meta_params, step, self.stage.randomness)

    def probe(self, stream: Stream, params: Params, meta_params: Params, step: int = 0) -> Tensor:
        """A scalar that depends on all that the user's function depends on."""
        return self.problem.probe(stream, params, meta_params, step, self.stage.randomness)

    def residual(self, params: Params, meta_params: Params, step: int) -> tuple[Tensor, ...]:
        """What is zero at rest, with its graph, on one step's batch; whoever asks, counts it."""
        return self.problem.residual(params, meta_params, step, self.stage.randomness)

    def parts(self, params: Params, meta_params: Params, step: int) -> Iterator[Part]:
        """The problem's functions on one step's batch, as scalars to be differentiated."""
        return self.problem.parts(params, meta_params, step, self.stage.randomness)

    def residual_at(self) -> Callable[[Params, int], tuple[Tensor, ...]]:
        """The residual at this θ for a loop, with its graph to φ; whoever asks, counts it."""
        return self.problem.residual_at(self.meta_params, self.stage.randomness)

    def velocity(self, beta: complex = 0.0, force: Params | None = None) -> Velocity:
        """The velocity at this θ for a loop; whoever asks, counts it.

        Args:
            beta: nudging strength β.
            force: a constant `∂L_out/∂φ`, by name, which takes the place of the outer loss.
        """
        meta = like(beta, self.meta_params)
        return self.problem.velocity_at(meta, beta, self.stage.randomness, force)

    def buffers(self, at: Moment) -> dict[str, Tensor]:
        """The modules' buffers as they were at a moment of a phase, by name; means over ranks."""
        return self.problem.ranks.averaged(self.stage.named_buffers(at))

    def as_given(self, params: Params, meta_params: Params) -> tuple[Params, Params]:
        """Tensors like φ and like θ, as these lay on processes when they were given."""
        params_there, meta_there = self.layouts
        return params_there.laid_out(params), meta_there.laid_out(meta_params)

    def batch_steps(self, stream: Stream) -> range:
        """The steps that show every batch of a loss once."""
        return range(len(self.problem.batches(stream) or [None]))
