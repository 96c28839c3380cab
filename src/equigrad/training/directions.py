"""What moves beside θ in one loop with it, and the direction for θ that follows."""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from equigrad.estimators.contrastive import Contrastive
from equigrad.estimators.estimator import Estimator
from equigrad.estimators.neumann_series import NeumannSeries
from equigrad.evaluation.reaches import Reaches
from equigrad.evaluation.stage import Stage
from equigrad.evaluation.tally import Tally
from equigrad.fields import Checked, CountFrom2, Positive, require
from equigrad.problems import Params, Problem, slope
from equigrad.randomness import Stream
from equigrad.solvers.phase import Moment
from equigrad.vectors import relative


@dataclass
class State:
    """One of the things that move beside θ, and are never reset.

    Attributes:
        tensors: where it is, by name; leaves that require a gradient.
        memory: of its optimiser or solver.
        buffers: of the problem's modules as they were when it last moved.
        residual: norm of its last velocity.
    """

    tensors: dict[str, Tensor]
    memory: Any
    buffers: tuple[Tensor, ...] = ()
    residual: float = math.nan


@dataclass
class Place:
    """Where one step is taken: the problem at a θ, and on the mini-batches of a step.

    Attributes:
        problem: the problem.
        meta_params: θ, detached.
        reaches: what each loss depends on.
        stage: the random numbers and buffers that the losses find.
        states: all that moves beside θ.
        tally: is told of gradients.
        step: which mini-batches.
        beta: nudging strength of this step.
    """

    problem: Problem
    meta_params: dict[str, Tensor]
    reaches: Reaches
    stage: Stage
    states: Sequence[State]
    tally: Tally
    step: int
    beta: float

    def slopes(
        self, stream: Stream, at: Params, *, by_params: bool = False
    ) -> tuple[dict[str, Tensor], Tensor]:
        """`∂L/∂θ` of a data loss there, or `∂L/∂φ` too, by name; and the loss."""
        names = self.reaches.functions[stream]
        meta = {name: self.meta_params[name].detach().requires_grad_() for name in names}
        params = {n: p.detach().requires_grad_(by_params) for n, p in at.items()}
        loss = self.problem.evaluate(stream, params, {**self.meta_params, **meta}, self.step)
        leaves = {**(params if by_params else {}), **meta}
        if not leaves or not loss.requires_grad:
            return {}, loss.detach()
        self.tally.spend(1)
        return dict(zip(leaves, slope(loss, list(leaves.values())), strict=True)), loss.detach()

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

    Raises:
        ConfigurationError: an odd number of symmetric points; an adapted β of more than two points
            or without a free state.
    """

    scheduled: ClassVar[frozenset[str]] = frozenset({"beta"})

    beta: Positive | AdaptiveBeta = 0.1
    scheme: Literal["forward", "symmetric"] = "forward"
    points: CountFrom2 = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self._nodes == [0, 1] or not isinstance(self.beta, AdaptiveBeta),
            "AdaptiveBeta compares a nudged state with a free one: take scheme='forward', points=2",
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
        beta: Any = schedule(share) if callable(schedule) else schedule
        require(
            math.isfinite(beta) and beta > 0,
            f"beta must stay above 0, and its schedule gave {beta} when {share:.0%} of the loop "
            f"was done: states that are all free have nothing to contrast",
        )
        return beta

    def learner(self, states: Sequence[State]) -> dict[str, Tensor]:
        """The free state; of symmetric ones, half-way between the first two."""
        if self.scheme == "forward":
            return super().learner(states)
        one, other = (state.tensors for state in states[:2])
        return {name: torch.lerp(p.detach(), other[name].detach(), 0.5) for name, p in one.items()}

    def velocity(self, place: Place, index: int) -> tuple[Tensor, ...]:
        """Down the inner loss and its share of the outer one."""
        return place.velocity(place.states[index].tensors, self._nodes[index] * place.beta)

    def turn(self, place: Place) -> Turn:
        """The contrast, and how far one of lower order is from it."""
        nodes, inner, outer = self._nodes, [], []
        for i, (node, state) in enumerate(zip(nodes, place.states, strict=True)):
            place.stand_at(state)
            inner.append(place.slopes("inner", state.tensors)[0])
            asked = node or i == 0  # the free state is asked for its outer loss, to be logged
            outer.append(place.slopes("outer", state.tensors) if asked else ({}, None))
        grads = self._contrast(place, nodes, inner, [slopes for slopes, _ in outer])
        error = beta = None
        fewer = len(nodes) - (1 if self.scheme == "forward" else 2)
        if fewer >= 2:
            rough = self._contrast(place, nodes[:fewer], inner, [slopes for slopes, _ in outer])
            error = relative([*rough.values()], [*grads.values()])
        if isinstance(self.beta, AdaptiveBeta):
            beta = _adapted(self.beta, place)
        judged = [
            loss for _, loss in outer[: 1 if self.scheme == "forward" else 2] if loss is not None
        ]
        return Turn(grads, torch.stack(judged).mean(), error, beta)

    def _contrast(
        self,
        place: Place,
        nodes: Sequence[int],
        inner: Sequence[Mapping[str, Tensor]],
        outer: Sequence[Mapping[str, Tensor]],
    ) -> dict[str, Tensor]:
        """The contrast of the first of the states, at so many nodes."""
        rule = dataclasses.replace(self._rule, points=len(nodes))
        weights = [w.real / place.beta for w in rule.weights]
        total = {name: torch.zeros_like(m) for name, m in place.meta_params.items()}
        for node, weight, by_inner, by_outer in zip(nodes, weights, inner, outer, strict=False):
            for name, grad in by_inner.items():
                total[name].add_(grad - inner[0][name], alpha=weight)
            if node:
                for name, grad in by_outer.items():
                    total[name].add_(grad, alpha=weight * node * place.beta)
        if place.problem.regularizer is not None:
            pull = place.problem.regularizer.bind(place.meta_params)
            states = [state.tensors for state in place.states[: len(nodes)]]
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
        pulled, _ = place.slopes("outer", learner.tensors, by_params=True)
        product = self._product(place, learner.tensors, solution.tensors, by="params")
        return tuple(-(product[name] + pulled[name]) for name in learner.tensors)

    def turn(self, place: Place) -> Turn:
        """The implicit direction at the v there is."""
        learner, solution = place.states
        place.stand_at(learner)
        direct, loss = place.slopes("outer", learner.tensors)
        mixed = self._product(place, learner.tensors, solution.tensors, by="meta")
        grads = {
            name: mixed.get(name, torch.zeros_like(m)) + direct.get(name, torch.zeros_like(m))
            for name, m in place.meta_params.items()
        }
        return Turn(grads, loss)

    def _product(
        self, place: Place, at: Params, vector: Params, *, by: Literal["params", "meta"]
    ) -> dict[str, Tensor]:
        """The derivative of `⟨∂L_in/∂φ, v⟩` by φ, or by the θ that the inner loss depends on."""
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
    """β for the next step."""
    free, nudged = place.states
    outer, _ = place.slopes("outer", nudged.tensors, by_params=True)
    there, _ = place.slopes("inner", nudged.tensors, by_params=True)
    here, _ = place.slopes("inner", free.tensors)
    gap = {name: grad - here[name] if name in here else grad for name, grad in there.items()}
    square = sum(float(g.square().sum()) for g in gap.values())
    along = sum(float((gap[name] * outer[name]).sum()) for name in gap if name in outer)
    weight = max(rule.eta * square - along, 0.0) / square if square > 0 else math.inf
    return min(max(1 / weight if weight > 0 else math.inf, rule.least), rule.most)
