"""Reverse-mode differentiation of the solver's steps."""

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from equigrad.estimators.contrast_steps import ContrastedGradient
from equigrad.estimators.estimator import Estimate, Estimator, Traits
from equigrad.estimators.linearisation import SecondDerivatives
from equigrad.estimators.replay import recorded, replay
from equigrad.evaluation import Evaluation
from equigrad.fields import Count, require
from equigrad.problems import pull_back
from equigrad.solvers import Moment, Settled, Solver


@dataclass(frozen=True, kw_only=True)
class Unrolled(Estimator):
    r"""The exact gradient of a learner that takes T steps, by backpropagation through them.

        s_{t+1} = Φ(s_t, θ),   a_T = ∂L_out/∂s_T,   a_t = (∂Φ/∂s_t)ᵀ a_{t+1}
        ∇_θ = ∂L_out/∂θ + Σ_t (∂Φ/∂θ)ᵀ a_{t+1} + (∂s_0/∂θ)ᵀ a_0

    where s is φ with the solver's state, and Φ is one step of the solver (Maclaurin et al. 2015;
    truncated, Shaban et al. 2019). No equilibrium is assumed; for T → ∞ the result is the implicit
    gradient. θ may also determine the initial `params`.

    If all steps are differentiated at once and their number is known, because the solver has no
    tolerance, the graph is recorded while the phase runs. Otherwise the free phase runs first and
    is replayed with its graph, segment by segment from the last to the first, at the cost of a
    further gradient for every step.

    `products="contrast"` takes the derivatives of a step's inner gradient as differences of two
    inner gradients, with first-order gradients alone: fused attention, autocast (differences are
    taken in full precision) and compiled models work, in about three times the evaluations of the
    steps themselves. φ and the solver's state of every step are kept, and no activations. The
    `error_estimate` is that of the differences. In float32 a kink of a ReLU network or of
    max-pooling may lie within their distance and make them wrong: the estimate and the status say
    so.

    Attributes:
        products: how products with `∂²L_in/∂φ²` and `∂²L_in/∂θ∂φ` are computed: by `autograd`, or
            by `contrast`, for a `Bilevel` without `samples`.
        truncation: number of last steps to differentiate; None for all.
        segment: number of steps whose graph is held at a time, with a copy of φ for every segment;
            None for the graph of all steps at once. About √T needs the least memory.

    Raises:
        ConfigurationError: from `meta_gradient`, if the solver's steps cannot be differentiated.
        DoubleBackwardError: from `meta_gradient`, if an operation of the model has no second
            derivative.

    Example:
        >>> import torch, equigrad as eg
        >>> problem = eg.Bilevel(
        ...     inner_loss=lambda p, m: 0.5 * p["w"].square().sum(),
        ...     outer_loss=lambda p, m: p["w"].sum(),
        ... )
        >>> start = {"w": torch.ones(2, requires_grad=True)}
        >>> result = eg.meta_gradient(
        ...     problem,
        ...     params=start,
        ...     meta_params=start,
        ...     solver=eg.GradientDescent(lr=0.5, max_steps=3),
        ...     estimator=eg.Unrolled(),
        ... )
        >>> result.grads["w"]  # a step halves w
        tensor([0.1250, 0.1250])
    """

    traits: ClassVar[Traits] = Traits(
        idea="reverse mode through the steps",
        cost="2T + 1, replayed 3T + 1",
        error="vanishes as T → ∞",
        double_backward=True,
        energy=False,
        equilibrium=False,
        sees_start=True,
        steps=True,
        memory="T, or √T in segments",
    )

    products: Literal["autograd", "contrast"] = "autograd"
    truncation: Count | None = None
    segment: Count | None = None

    @property
    def differentiates_twice(self) -> bool:
        """Not by contrast."""
        return super().differentiates_twice and self.products != "contrast"

    def check(self, evaluation: Evaluation, solver: Solver) -> None:
        """Also refuse a solver whose steps cannot be differentiated."""
        super().check(evaluation, solver)
        recorded(solver, type(self).__name__)
        problem = evaluation.problem
        require(
            self.products != "contrast" or (problem.symmetric and not problem.samples),
            "products='contrast' needs a single Hessian, that of a Bilevel problem with "
            "samples=False; use products='autograd'",
        )

    def estimate(self, evaluation: Evaluation, solver: Solver) -> Estimate:
        """Settle, then pull the outer gradient back through the steps."""
        solver = recorded(solver, type(self).__name__)
        contrast = ContrastedGradient(evaluation) if self.products == "contrast" else None
        free, moments, last = self._settle(evaluation, solver, contrast)
        end = free.end_step
        first = 0 if self.truncation is None else max(0, end - self.truncation)

        pressure, grads = evaluation.outer_gradients(free)
        adjoint = [*pressure.values(), *(s.new_zeros(s.shape) for s in moments[0].solver_state)]
        for moment in reversed(moments):
            stop = max(first, moment.end_step)
            if stop >= end:
                continue
            if stop > moment.end_step:  # up to the start of the graph
                ahead = stop - moment.end_step
                moment = evaluation.settle_nudged(
                    moment, solver, 0.0, keep_momentum=True, steps=ahead
                )
            with SecondDerivatives(evaluation, type(self).__name__):
                segment = last or _Segment(evaluation, solver, moment, range(stop, end), contrast)
                adjoint, by_meta = segment.pull_back(adjoint)
            for name, grad in by_meta.items():
                grads[name] = grads[name] + grad
            end = stop
        if first == 0:
            start = evaluation.start.pull_back(dict(zip(pressure, adjoint, strict=False)))
            grads = {name: grad + start[name] for name, grad in grads.items()}
        elif evaluation.reaches.start:
            evaluation.tally.note(
                f"truncation={self.truncation} differentiates fewer than all {free.end_step} "
                f"steps, so the gradient leaves out the path through the initialisation"
            )
        if contrast is not None:
            evaluation.tally.note(*contrast.notes(grads))
        error = None if contrast is None else contrast.error(grads)
        return Estimate(grads=grads, phases=(free,), error_estimate=error)

    def _settle(
        self, evaluation: Evaluation, solver: Solver, contrast: ContrastedGradient | None
    ) -> tuple[Settled, list[Moment], "_Segment | None"]:
        """The free phase, the moments to replay it from, and its whole graph if it was recorded."""
        every = self.segment or self.truncation
        if every is None and solver.tol is None and solver.max_steps is not None:
            start = evaluation.beginning(solver)
            with SecondDerivatives(evaluation, type(self).__name__):
                whole = _Segment(evaluation, solver, start, range(solver.max_steps), contrast)
            return whole.settled(), [start], whole
        keep = None
        if every is not None and self.truncation is not None:
            keep = math.ceil(self.truncation / every) + 1
        return *evaluation.settle_recorded(solver, every, keep), None


class _Segment:
    """Several steps of the free phase, with their graph."""

    def __init__(
        self,
        evaluation: Evaluation,
        solver: Solver,
        begin: Moment,
        steps: range,
        contrast: ContrastedGradient | None,
    ) -> None:
        evaluation = evaluation.holding(begin)
        self._evaluation, self._steps = evaluation, steps
        params = {name: p.clone().requires_grad_() for name, p in begin.params.items()}
        state = [s.clone().requires_grad_() for s in begin.solver_state]
        self._before = [*params.values(), *state]
        self._meta = {n: m.clone().requires_grad_() for n, m in evaluation.meta_params.items()}
        evaluation.stage.stand_on_copies(begin)
        self._end = replay(evaluation, solver, params, state, self._meta, steps, contrast)
        self._buffers = evaluation.stage.snapshot()

    def settled(self) -> Settled:
        """The end of the steps, without their graph."""
        return dataclasses.replace(
            self._end,
            params={name: p.detach() for name, p in self._end.params.items()},
            solver_state=[s.detach() for s in self._end.solver_state],
            buffers=self._buffers,
        )

    def pull_back(self, adjoint: list[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The adjoint of φ and the solver's state before the steps, and the contribution for θ."""
        self._evaluation.tally.spend(2 * len(self._steps))
        after = [*self._end.params.values(), *self._end.solver_state]
        pulled = pull_back(after, adjoint, [*self._before, *self._meta.values()])
        cut = len(self._before)
        return list(pulled[:cut]), dict(zip(self._meta, pulled[cut:], strict=True))
