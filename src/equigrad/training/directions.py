"""Directions for θ when θ and φ are learned in one loop, and the states that they need."""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from equigrad.errors import ConfigurationError
from equigrad.estimators.contrastive import Contrastive
from equigrad.estimators.estimator import Estimator
from equigrad.estimators.neumann_series import NeumannSeries
from equigrad.evaluation import Evaluation
from equigrad.fields import Checked, CountFrom2, Positive, require
from equigrad.problems import Bilevel, Params
from equigrad.solvers import Solver
from equigrad.training.place import Place, Slopes, State
from equigrad.vectors import relative


@dataclass(frozen=True)
class Turn:
    """The direction for θ at an outer step.

    Attributes:
        grads: the direction against which θ moves, by name.
        outer_loss: outer loss of the learner on the step's batch; for a symmetric scheme, the mean
            of the states'.
        error: estimated relative error if the states are at rest; None if there is no estimate.
        beta: β of the next step, if the direction adapts it.
    """

    grads: dict[str, Tensor]
    outer_loss: Tensor
    error: float | None = None
    beta: float | None = None


class Direction(Checked, ABC):
    """A rule for the direction of θ, and for the states that move along with θ."""

    @property
    @abstractmethod
    def estimator(self) -> Estimator:
        """The estimator that has the same result at convergence, and so the same requirements."""

    def check(self, evaluation: Evaluation, solver: Solver) -> None:
        """Raise a `ConfigurationError` or `ProblemError` for a problem that is not supported."""
        self.estimator.check(evaluation, solver)

    @abstractmethod
    def starts(self, params: Params) -> list[dict[str, Tensor]]:
        """The initial values of all states, the learner's first."""

    @abstractmethod
    def strengths(self, beta: float) -> list[float]:
        """The nudging strength of every state."""

    @abstractmethod
    def strength(self, share: float) -> float:
        """The nudging strength β after a share of the loop."""

    def learner(self, states: Sequence[State]) -> dict[str, Tensor]:
        """The learned φ, that of the first state."""
        return {name: t.detach().clone() for name, t in states[0].tensors.items()}

    @abstractmethod
    def velocity(self, place: Place, index: int) -> tuple[Tensor, ...]:
        """The velocity of one of the states."""

    @abstractmethod
    def turn(self, place: Place) -> Turn:
        """The direction for θ."""


@dataclass(frozen=True, kw_only=True)
class AdaptiveBeta(Checked):
    r"""BOME's rule for β (Liu, Ye, Wright, Stone, Liu 2022), as a rule for `1/β`.

        1/β = max(η ‖∇q‖² - ⟨∇L_out, ∇q⟩, 0) / ‖∇q‖²,    q = L_in(φ_β, θ) - L_in(φ_0, θ)

    with gradients with respect to θ and φ_β together: the smallest weight of the inner problem for
    which a step does not increase q.

    Attributes:
        eta: η, the rate at which q must decrease, relative to ‖∇q‖².
        least: smallest value of β.
        most: largest value of β, and its first one.
    """

    eta: Positive = 0.5
    least: Positive = 1e-3
    most: Positive = 1.0


@dataclass(frozen=True, kw_only=True)
class Contrasts(Direction):
    r"""The contrastive rule in one loop: states at several nudging strengths, all moving.

        ∇̂_θ = (1/β) Σ_i w_i ∂_θ [L_in(φ_i, θ) + b_i β L_out(φ_i, θ)],    φ_i near the minimum of
                                                                        L_in + b_i β L_out

    With two points, forward, this is F2SA with λ = 1/β (Kwon et al. 2023); with more points or
    symmetric ones F2SA-p; with `AdaptiveBeta`, BOME's choice of λ. All states see the same batches
    and random numbers, so that their noise cancels in the contrast.

    Attributes:
        beta: β, a function that returns it for the share of the loop that is done, from 0 to 1, or
            `AdaptiveBeta()`.
        scheme: `forward` has a state without nudge, `symmetric` has pairs of opposite nudges.
        points: number of states. With more than two, `error_estimate` compares with the contrast of
            fewer.
        together: compute θ's direction before the last step of each state, from the gradient that
            this step uses, as SOBA does. An outer step then costs p gradients of the inner loss
            instead of 2 p. Only for a `Bilevel` without a regulariser.

    Raises:
        ConfigurationError: an odd number of symmetric points; an adapted β of more than two points
            or without a free state, or together with `together`; `together` for another problem.
    """

    scheduled: ClassVar[frozenset[str]] = frozenset({"beta"})

    beta: Positive | AdaptiveBeta = 0.1
    scheme: Literal["forward", "symmetric"] = "forward"
    points: CountFrom2 = 2
    together: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        adapted = isinstance(self.beta, AdaptiveBeta)
        require(
            self._nodes == [0, 1] or not adapted,
            "AdaptiveBeta compares a nudged state with a free one; use scheme='forward' and "
            "points=2",
        )
        require(
            not (self.together and adapted),
            "AdaptiveBeta needs the states after their step; use together=False",
        )

    def check(self, evaluation: Evaluation, solver: Solver) -> None:
        """Also refuse `together` if states do not move along the gradient of a single loss."""
        super().check(evaluation, solver)
        problem = evaluation.problem
        plain = isinstance(problem, Bilevel) and problem.regularizer is None
        require(
            not self.together or plain,
            f"together=True takes both gradients from one evaluation of a loss, but a "
            f"{type(problem).__name__} problem "
            + ("with a regularizer " if isinstance(problem, Bilevel) else "")
            + "does not move along the gradient of that loss alone; use together=False",
        )

    @cached_property
    def _rule(self) -> Contrastive:
        return Contrastive(scheme=self.scheme, points=self.points, nudge="loss")

    @cached_property
    def _nodes(self) -> list[int]:
        return [int(node.real) for node in self._rule.nodes]

    @property
    def estimator(self) -> Contrastive:
        """The contrastive rule, nudged by the loss."""
        return self._rule

    def starts(self, params: Params) -> list[dict[str, Tensor]]:
        """All states start at the same params."""
        return [dict(params) for _ in self._nodes]

    def strengths(self, beta: float) -> list[float]:
        """β times the scheme's multiple for each state."""
        return [node * beta for node in self._nodes]

    def strength(self, share: float) -> float:
        """β as given or by its schedule; an adapted one starts at its largest value."""
        if isinstance(self.beta, AdaptiveBeta):
            return self.beta.most
        schedule: Any = self.beta
        if not callable(schedule):
            return schedule
        try:
            beta: Any = schedule(share)
        except TypeError as error:
            raise ConfigurationError(
                f"beta is a schedule, so it is called with the share of the loop that is done, "
                f"for example beta(0.5), and this failed: {error}"
            ) from error
        number = isinstance(beta, Real) or (isinstance(beta, Tensor) and beta.numel() == 1)
        value = float(beta) if number and not isinstance(beta, bool) else math.nan
        require(
            0 < value < math.inf,
            f"the schedule beta must return a number above 0, but it returned {beta!r} when "
            f"{share:.0%} of the loop was done; with β = 0 all states would be the same",
        )
        return value

    def learner(self, states: Sequence[State]) -> dict[str, Tensor]:
        """The params of the free state; for a symmetric scheme, the mean of two states."""
        if self.scheme == "forward":
            return super().learner(states)
        one, other = (state.tensors for state in states[:2])
        return {name: torch.lerp(p.detach(), other[name].detach(), 0.5) for name, p in one.items()}

    def velocity(self, place: Place, index: int) -> tuple[Tensor, ...]:
        """The velocity along the inner loss plus its multiple of the outer loss."""
        state, strength = place.states[index], self._nodes[index] * place.beta
        if not (self.together and place.last):
            return place.velocity(state.tensors, strength)
        state.seen = inner, outer = self._slopes(place, index, by_params=True)
        pulls = [*inner.params.values()]
        if strength and outer is not None and outer.params:
            pulls = torch._foreach_add(pulls, [*outer.params.values()], alpha=strength)
        return tuple(torch._foreach_neg(pulls))

    def turn(self, place: Place) -> Turn:
        """The contrast, with its error as the difference from one of lower order."""
        seen = []
        for index, state in enumerate(place.states):
            if state.seen is None:
                place.stand_at(state)
                seen.append(self._slopes(place, index))
            else:
                seen.append(state.seen)
                state.seen = None
        grads = self._contrast(place, self._rule, seen)
        error = beta = None
        fewer = len(seen) - (1 if self.scheme == "forward" else 2)
        if fewer >= 2:
            rule = dataclasses.replace(self._rule, points=fewer)
            rough = self._contrast(place, rule, seen[:fewer])
            error = relative([*rough.values()], [*grads.values()])
        if isinstance(self.beta, AdaptiveBeta):
            beta = _adapted(self.beta, place)
        judged = [outer.loss for _, outer in seen[: self._judged] if outer is not None]
        return Turn(grads, torch.stack(judged).mean(), error, beta)

    @property
    def _judged(self) -> int:
        """The number of states whose mean outer loss is reported."""
        return 1 if self.scheme == "forward" else 2

    def _slopes(
        self, place: Place, index: int, *, by_params: bool = False
    ) -> tuple[Slopes, Slopes | None]:
        """Gradients of the inner loss at a state, and of the outer loss if they are needed."""
        at, node = place.states[index].tensors, self._nodes[index]
        inner = place.slopes("inner", at, by_params=by_params)
        moved = node and (by_params or place.reaches.functions["outer"])
        if not (moved or index < self._judged):
            return inner, None
        return inner, place.slopes("outer", at, by_params=by_params and bool(node))

    def _contrast(
        self, place: Place, rule: Contrastive, seen: Sequence[tuple[Slopes, Slopes | None]]
    ) -> dict[str, Tensor]:
        """The contrast of the first few states, by a rule for that number of points."""
        weights = [w.real / place.beta for w in rule.weights]
        total = {name: torch.zeros_like(m) for name, m in place.meta_params.items()}
        first = seen[0][0].meta_params
        for node, weight, (inner, outer) in zip(self._nodes, weights, seen, strict=False):
            for name, grad in inner.meta_params.items():
                total[name].add_(grad - first[name], alpha=weight)
            if node and outer is not None:
                for name, grad in outer.meta_params.items():
                    total[name].add_(grad, alpha=weight * node * place.beta)
        if place.problem.regularizer is not None:
            pull = place.problem.regularizer.bind(place.meta_params)
            states = [state.tensors for state in place.states[: len(seen)]]
            for name, grad in pull.contrast(states, weights).items():
                total[name].add_(grad.real)
        return total


@dataclass(frozen=True, kw_only=True)
class LinearSystem(Direction):
    r"""The implicit direction in one loop: φ and the solution of its linear system both move.

        φ ← φ - ρ ∂L_in/∂φ,    v ← v - ρ (H v + ∂L_out/∂φ),
        ∇̂_θ = ∂L_out/∂θ + (∂²L_in/∂θ∂φ)ᵀ v

    This is SOBA (Dagréou, Ablin, Vaiter, Moreau 2022) with one step of φ and v for each step of θ,
    and AmIGO (Arbel and Mairal 2022) with several. It needs a double backward.
    """

    def starts(self, params: Params) -> list[dict[str, Tensor]]:
        """The learner at its params, v at zero."""
        return [dict(params), {name: torch.zeros_like(p) for name, p in params.items()}]

    @property
    def estimator(self) -> NeumannSeries:
        """The Neumann series, which continues from one step of θ to the next."""
        return NeumannSeries()

    def strength(self, share: float) -> float:
        """Zero, since no state is nudged."""
        return 0.0

    def strengths(self, beta: float) -> list[float]:
        """Zeros, since no state is nudged."""
        return [0.0, 0.0]

    def velocity(self, place: Place, index: int) -> tuple[Tensor, ...]:
        """The velocity along the inner loss, or along the residual of the linear system."""
        learner, solution = place.states
        if index == 0:
            return place.velocity(learner.tensors, 0.0)
        pulled = place.slopes("outer", learner.tensors, by_params=True).params
        product = self._product(place, learner.tensors, solution.tensors, by="params")
        return tuple(-(product[name] + pulled[name]) for name in learner.tensors)

    def turn(self, place: Place) -> Turn:
        """The implicit direction with the current v."""
        learner, solution = place.states
        place.stand_at(learner)
        outer = place.slopes("outer", learner.tensors)
        direct = outer.meta_params
        mixed = self._product(place, learner.tensors, solution.tensors, by="meta")
        grads = {
            name: mixed.get(name, torch.zeros_like(m)) + direct.get(name, torch.zeros_like(m))
            for name, m in place.meta_params.items()
        }
        return Turn(grads, outer.loss)

    def _product(
        self, place: Place, at: Params, vector: Params, *, by: Literal["params", "meta"]
    ) -> dict[str, Tensor]:
        """The derivative of `⟨∂L_in/∂φ, v⟩` with respect to φ, or to the θ that L_in depends on."""
        params = {name: p.detach().requires_grad_() for name, p in at.items()}
        names = place.reaches.loss("inner") if by == "meta" else ()
        meta = {name: place.meta_params[name].detach().requires_grad_() for name in names}
        residual = place.problem.residual(params, {**place.meta_params, **meta}, place.step)
        place.tally.spend(2)
        along = [v.detach() for v in vector.values()]
        leaves = meta if by == "meta" else params
        grads = torch.autograd.grad(
            residual, list(leaves.values()), along, allow_unused=True, materialize_grads=True
        )
        return dict(zip(leaves, grads, strict=True))


def _adapted(rule: AdaptiveBeta, place: Place) -> float:
    """BOME's β for the next step."""
    free, nudged = place.states
    outer = place.slopes("outer", nudged.tensors, by_params=True)
    there = place.slopes("inner", nudged.tensors, by_params=True)
    here = place.slopes("inner", free.tensors).meta_params
    by_theta = {name: grad - here[name] for name, grad in there.meta_params.items()}
    square = along = 0.0
    for gap, pull in ((there.params, outer.params), (by_theta, outer.meta_params)):
        for name, grad in gap.items():
            square += float(grad.square().sum())
            along += float((grad * pull[name]).sum()) if name in pull else 0.0
    weight = max(rule.eta * square - along, 0.0) / square if square > 0 else math.inf
    return min(max(1 / weight if weight > 0 else math.inf, rule.least), rule.most)
