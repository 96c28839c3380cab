"""What moves beside θ in one loop with it, and the direction for θ that follows."""

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
    """What one step says of θ.

    Attributes:
        grads: the direction against which θ moves, by name.
        outer_loss: on the step's batch, of the learner; of symmetric states their mean.
        error: estimated relative error for the states being at rest, where there is an estimate.
        beta: for the next step, where the direction adapts it.
    """

    grads: dict[str, Tensor]
    outer_loss: Tensor
    error: float | None = None
    beta: float | None = None


class Direction(Checked, ABC):
    """What moves beside θ, how, and the direction for θ that follows from where it stands."""

    @property
    @abstractmethod
    def estimator(self) -> Estimator:
        """What it is at rest: it serves the same problems."""

    def check(self, evaluation: Evaluation, solver: Solver) -> None:
        """Raise where it cannot serve."""
        self.estimator.check(evaluation, solver)

    @abstractmethod
    def starts(self, params: Params) -> list[dict[str, Tensor]]:
        """Where everything that moves starts, the learner first."""

    @abstractmethod
    def strengths(self, beta: float) -> list[float]:
        """The nudging strength of every state."""

    @abstractmethod
    def strength(self, share: float) -> float:
        """The nudging strength β when a share of the loop is done."""

    def learner(self, states: Sequence[State]) -> dict[str, Tensor]:
        """The φ that has been learned: where the first state is."""
        return {name: t.detach().clone() for name, t in states[0].tensors.items()}

    @abstractmethod
    def velocity(self, place: Place, index: int) -> tuple[Tensor, ...]:
        """Where the state of an index moves."""

    @abstractmethod
    def turn(self, place: Place) -> Turn:
        """The direction for θ."""


@dataclass(frozen=True, kw_only=True)
class AdaptiveBeta(Checked):
    r"""BOME's rule for β (Liu, Ye, Wright, Stone, Liu 2022), as a rule for `1/β`.

        1/β = max(η ‖∇q‖² - ⟨∇L_out, ∇q⟩, 0) / ‖∇q‖²,    q = L_in(φ_β, θ) - L_in(φ_0, θ)

    with gradients by θ and φ_β together: the least weight of the inner problem under which a step
    does not make q grow.

    Attributes:
        eta: η, by which share of its gradient q has to fall.
        least: β is at least this.
        most: β is at most this, and starts there.
    """

    eta: Positive = 0.5
    least: Positive = 1e-3
    most: Positive = 1.0


@dataclass(frozen=True, kw_only=True)
class Contrasts(Direction):
    r"""States at several nudging strengths; the contrast of `∂L/∂θ` between them.

        ∇̂_θ = (1/β) Σ_i w_i ∂_θ [L_in(φ_i, θ) + b_i β L_out(φ_i, θ)],    φ_i near the minimum of
                                                                        L_in + b_i β L_out

    With two points, forward, this is F2SA with λ = 1/β (Kwon et al. 2023); with more points or
    symmetric ones F2SA-p; with `AdaptiveBeta`, BOME's choice of λ. All states see the same batches
    and random numbers, so that their noise cancels in the contrast.

    Attributes:
        beta: β; or a function of the share of the loop that is done, from 0 to 1; or
            `AdaptiveBeta()`.
        scheme: `forward` has a state without nudge, `symmetric` pairs of opposite nudges.
        points: how many states. With more than two, `error_estimate` compares with fewer.
        together: take θ's direction where the last step of each state begins, from the gradient
            that moves it, as SOBA does. An outer step then costs about half: p gradients of the
            inner loss instead of 2 p. For a `Bilevel` without a regulariser.

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
            "AdaptiveBeta compares a nudged state with a free one: take scheme='forward', points=2",
        )
        require(
            not (self.together and adapted),
            "AdaptiveBeta looks at the states after their step: take together=False",
        )

    def check(self, evaluation: Evaluation, solver: Solver) -> None:
        """Also refuse to have both gradients at once of what has no such loss."""
        super().check(evaluation, solver)
        problem = evaluation.problem
        plain = isinstance(problem, Bilevel) and problem.regularizer is None
        require(
            not self.together or plain,
            f"together=True takes both gradients of one loss, and a {type(problem).__name__} "
            + ("with a regularizer " if isinstance(problem, Bilevel) else "")
            + "moves by more than that: take together=False",
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
        """All at the same place."""
        return [dict(params) for _ in self._nodes]

    def strengths(self, beta: float) -> list[float]:
        """So many times β, by the scheme."""
        return [node * beta for node in self._nodes]

    def strength(self, share: float) -> float:
        """As given, or scheduled; an adapted one starts at its most."""
        if isinstance(self.beta, AdaptiveBeta):
            return self.beta.most
        schedule: Any = self.beta
        if not callable(schedule):
            return schedule
        try:
            beta: Any = schedule(share)
        except TypeError as error:
            raise ConfigurationError(
                f"beta is a schedule, called with the share of the loop that is done, such as "
                f"beta(0.5): {error}"
            ) from error
        number = isinstance(beta, Real) or (isinstance(beta, Tensor) and beta.numel() == 1)
        said = math.nan if isinstance(beta, bool) or not number else float(beta)
        require(
            math.isfinite(said) and said > 0,
            f"beta must stay a number above 0, and its schedule gave {beta!r} when {share:.0%} of "
            f"the loop was done: states that are all free have nothing to contrast",
        )
        return said

    def learner(self, states: Sequence[State]) -> dict[str, Tensor]:
        """The free state; of symmetric ones, half-way between the first two."""
        if self.scheme == "forward":
            return super().learner(states)
        one, other = (state.tensors for state in states[:2])
        return {name: torch.lerp(p.detach(), other[name].detach(), 0.5) for name, p in one.items()}

    def velocity(self, place: Place, index: int) -> tuple[Tensor, ...]:
        """Down the inner loss and its share of the outer one."""
        state, strength = place.states[index], self._nodes[index] * place.beta
        if not (self.together and place.last):
            return place.velocity(state.tensors, strength)
        state.seen = inner, outer = self._slopes(place, index, by_params=True)
        pulls = [*inner.params.values()]
        if strength and outer is not None and outer.params:
            pulls = torch._foreach_add(pulls, [*outer.params.values()], alpha=strength)
        return tuple(torch._foreach_neg(pulls))

    def turn(self, place: Place) -> Turn:
        """The contrast, and how far one of lower order is from it."""
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
        """How many states' outer losses are logged."""
        return 1 if self.scheme == "forward" else 2

    def _slopes(
        self, place: Place, index: int, *, by_params: bool = False
    ) -> tuple[Slopes, Slopes | None]:
        """Of the inner loss at a state; and of the outer one, if anything asks for it there."""
        at, node = place.states[index].tensors, self._nodes[index]
        inner = place.slopes("inner", at, by_params=by_params)
        moved = node and (by_params or place.reaches.functions["outer"])
        if not (moved or index < self._judged):
            return inner, None
        return inner, place.slopes("outer", at, by_params=by_params and bool(node))

    def _contrast(
        self, place: Place, rule: Contrastive, seen: Sequence[tuple[Slopes, Slopes | None]]
    ) -> dict[str, Tensor]:
        """The contrast of the first of the states, by a rule for so many."""
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
    r"""The learner, and beside it the solution of the implicit equation; both move all the time.

        φ ← φ - ρ ∂L_in/∂φ,    v ← v - ρ (H v + ∂L_out/∂φ),
        ∇̂_θ = ∂L_out/∂θ + (∂²L_in/∂θ∂φ)ᵀ v

    SOBA (Dagréou, Ablin, Vaiter, Moreau 2022) with one step of each a step of θ, AmIGO (Arbel and
    Mairal 2022) with several. Needs a double backward.
    """

    def starts(self, params: Params) -> list[dict[str, Tensor]]:
        """The learner where it is given, v at zero."""
        return [dict(params), {name: torch.zeros_like(p) for name, p in params.items()}]

    @property
    def estimator(self) -> NeumannSeries:
        """The Neumann series, which goes on from one step of θ to the next."""
        return NeumannSeries()

    def strength(self, share: float) -> float:
        """Nothing is nudged."""
        return 0.0

    def strengths(self, beta: float) -> list[float]:
        """Neither the learner nor v is."""
        return [0.0, 0.0]

    def velocity(self, place: Place, index: int) -> tuple[Tensor, ...]:
        """Down the inner loss; down the residual of the linear system."""
        learner, solution = place.states
        if index == 0:
            return place.velocity(learner.tensors, 0.0)
        pulled = place.slopes("outer", learner.tensors, by_params=True).params
        product = self._product(place, learner.tensors, solution.tensors, by="params")
        return tuple(-(product[name] + pulled[name]) for name in learner.tensors)

    def turn(self, place: Place) -> Turn:
        """The implicit direction at the v there is."""
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
        """The derivative of `⟨∂L_in/∂φ, v⟩` by φ, or by the θ that the inner loss depends on."""
        params = {name: p.detach().requires_grad_() for name, p in at.items()}
        names = place.reaches.loss("inner") if by == "meta" else ()
        meta = {name: place.meta_params[name].detach().requires_grad_() for name in names}
        residual = place.problem.residual(
            params, {**place.meta_params, **meta}, place.step, place.stage.randomness
        )
        place.tally.spend(2)
        along = [v.detach() for v in vector.values()]
        leaves = meta if by == "meta" else params
        grads = torch.autograd.grad(
            residual, list(leaves.values()), along, allow_unused=True, materialize_grads=True
        )
        return dict(zip(leaves, grads, strict=True))


def _adapted(rule: AdaptiveBeta, place: Place) -> float:
    """β for the next step."""
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
