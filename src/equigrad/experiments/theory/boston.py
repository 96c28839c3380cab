"""Figure 2: error of the contrastive rule on Boston housing, against β and numbers of steps."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import Linear, Sequential, Tanh
from torch.nn.functional import mse_loss

from equigrad.errors import SettlingError
from equigrad.estimators import ExactSolve
from equigrad.evaluation import Evaluation
from equigrad.experiments.data import boston_housing as boston
from equigrad.experiments.runs.error_curves import (
    ErrorPoint,
    Panel,
    as_table,
    best_by,
    division_table,
    draw_panels,
    error_and_beta,
    slope,
)
from equigrad.experiments.runs.methods import PAPERS_RULE
from equigrad.experiments.runs.reproduction import Cell, Reproduction, check_grid, decades
from equigrad.fields import Count, CountFrom0, Counts, Momentum, Positive, Positives, require
from equigrad.gradient import meta_gradient
from equigrad.nn import ComplexSynapse
from equigrad.problems import Bilevel, Params
from equigrad.solvers import LBFGS, GradientDescent

HIDDEN = 20


@dataclass(frozen=True, kw_only=True)
class Fig2(Reproduction):
    """Fig. 2: error on Boston housing against β, steps, and the division of steps.

    A network with 20 tanh units learns home prices from 70 % of the rows, with a strength λ of its
    own for every weight; the outer loss is that of the other rows. Both losses are mean squared
    errors. Gradient descent takes a number of steps in each phase. Errors are relative to an exact
    solve with the whole Hessian, at the minimum that gradient descent tends to.
    """

    name: ClassVar[str] = "fig2"
    row: ClassVar[type] = ErrorPoint

    seed: CountFrom0 = 0
    """Seed of the split and of the network's initial weights."""

    strength: Positive = 0.1
    """λ of every weight, large enough for the steps to reach an equilibrium."""

    lr: Positive = 0.1
    """Step size of the free phase; that of a nudged phase is divided by 1 + β."""

    momentum: Momentum = 0.9
    """Nesterov momentum, which nudged phases continue; 0 for plain gradient descent."""

    steps: Counts = (200, 300, 400, 600, 800, 1000, 1200)
    """Numbers of steps in each phase, A and B."""

    smallest_exponent: int = -4
    """Exponent of ten of the smallest β in A."""

    largest_exponent: int = 1
    """Exponent of ten of the largest β in A."""

    per_decade: Count = 4
    """Values of β per decade in A."""

    betas: Positives = (1e-4, 1e-3, 1e-2, 0.1, 1.0)
    """Nudging strengths in B and C."""

    total_steps: int = 1200
    """Total number of steps of both phases in C."""

    shares: tuple[float, ...] = (
        *(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75),
        *(0.8, 0.84, 0.87, 0.9, 0.92, 0.94, 0.97, 0.99),
    )
    """Shares of the free phase in these steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_grid(self.smallest_exponent, self.largest_exponent)
        require(
            bool(self.shares) and all(min(pair) > 0 for pair in self._divided()),
            f"shares must leave both phases at least one of total_steps={self.total_steps}, "
            f"got {self.shares}",
        )

    def cells(self) -> list[Cell]:
        """The grid of A, the curves of B, then the divisions of C."""
        betas = decades(self.smallest_exponent, self.largest_exponent, self.per_decade)
        alike = [(2, t, t, beta) for t in self.steps for beta in (*betas, *self.betas)]
        return alike + [(2, *divided, beta) for beta in self.betas for divided in self._divided()]

    def _divided(self) -> list[tuple[int, int]]:
        free = [round(self.total_steps * share) for share in self.shares]
        return [(steps, self.total_steps - steps) for steps in free]

    def prepare(self) -> Callable[..., ErrorPoint]:
        """Settle the learner, and compute the exact meta-gradient there."""
        return Learner(self).measure

    def text(self, rows: Sequence[ErrorPoint]) -> str:
        """Best β by number of steps; best division by β."""
        best = best_by(self._alike(rows), lambda row: row.free_steps)
        drift, error, beta = self.rates(rows)
        return (
            as_table(
                ["steps in each phase", "least error (its β)"],
                [[f"{t:g}", error_and_beta(row)] for t, row in best.items()],
            )
            + f"\nFrom {max(self.steps) / 2:g} steps on, the error at the smallest β falls by "
            f"exp(-{drift:.4f}) a step, the least error by exp(-{error:.4f}), its β by "
            f"exp(-{beta:.4f}).\n"
            + f"\nOf {self.total_steps} steps in both phases together:\n\n"
            + division_table(self._divisions(rows))
        )

    def rates(self, rows: Sequence[ErrorPoint]) -> tuple[float, float, float]:
        """The decrease per step of three logarithms, in the second half of A.

        They are of the error at the smallest β, which is that of unsettled phases, of the least
        error, and of its β. By Corollary 1, the second and third should be half the first.
        """
        late = [row for row in self._alike(rows) if row.free_steps >= max(self.steps) / 2]
        smallest = min(row.beta for row in late)
        unsettled = [row for row in late if row.beta == smallest]
        best = list(best_by(late, lambda row: row.free_steps).values())

        def rate(curve: list[ErrorPoint], value: Callable[[ErrorPoint], float]) -> float:
            return -slope([row.free_steps for row in curve], [math.log(value(r)) for r in curve])

        return (
            rate(unsettled, lambda row: row.error),
            rate(best, lambda row: row.error),
            rate(best, lambda row: row.beta),
        )

    def draw(self, rows: Sequence[ErrorPoint]) -> Figure:
        """Against β, against steps, against the free phase's share."""
        alike, marked = self._alike(rows), [r for r in rows if r.beta in self.betas]
        share = {"xlabel": f"free phase's share of {self.total_steps} steps"}
        panels = [
            Panel("A", alike, "beta", "free_steps"),
            Panel("B", self._alike(marked), "free_steps", "beta"),
            Panel("C", self._divisions(marked), "free_share", "beta", axes=share),
        ]
        return draw_panels(panels, figsize=(13, 4))

    def _alike(self, rows: Sequence[ErrorPoint]) -> list[ErrorPoint]:
        return [row for row in rows if row.settled_alike and row.free_steps in self.steps]

    def _divisions(self, rows: Sequence[ErrorPoint]) -> list[ErrorPoint]:
        divided = set(self._divided())
        return [
            row
            for row in rows
            if (row.free_steps, row.nudged_steps) in divided and row.beta in self.betas
        ]


class Learner:
    """The network with its complex synapses, and its exact meta-gradient at equilibrium.

    Attributes:
        problem: both losses.
        start: φ at the start of every free phase.
        meta_params: λ, one for each weight.
        settled: φ at the minimum that gradient descent tends to.
        exact: the meta-gradient there, as one vector.
    """

    def __init__(self, config: Fig2) -> None:
        self.config = config
        (x, y), (v, w) = boston.split(*boston.load(), training_share=0.7, seed=config.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            net = Sequential(Linear(boston.FEATURES, HIDDEN), Tanh(), Linear(HIDDEN, 1)).double()
        synapse = ComplexSynapse(net, strength=config.strength)
        self.problem = Bilevel(
            inner_loss=lambda params, meta_params: mse_loss(synapse(params, x), y),
            outer_loss=lambda params, meta_params: mse_loss(synapse(params, v), w),
            regularizer=synapse,
        )
        self.start, self.meta_params = synapse.params(), synapse.meta_params()
        self.settled, self.exact = self._settle()

    def _settle(self) -> tuple[Params, Tensor]:
        """Follow gradient descent to its minimum, polish that, and solve there."""
        descent = replace(self._descent(max_steps=100_000), tol=1e-5)
        with Evaluation(self.problem, self.start, self.meta_params) as evaluation:
            near = evaluation.settle(descent)
        result = meta_gradient(
            self.problem,
            near.params,
            self.meta_params,
            solver=LBFGS(tol=1e-11),
            estimator=ExactSolve(),
        )
        if near.phase.outcome != "converged" or result.phases[0].outcome != "converged":
            raise SettlingError(
                f"no equilibrium to compare with: gradient descent {near.phase}, then L-BFGS "
                f"{result.status}. Raise the strength, or lower lr"
            )
        return result.params, _vector(result.grads)

    def _descent(self, max_steps: int, beta: float = 0.0) -> GradientDescent:
        momentum = self.config.momentum
        return GradientDescent(
            lr=self.config.lr / (1 + beta),
            momentum=momentum,
            nesterov=momentum > 0,
            max_steps=max_steps,
        )

    def measure(self, points: int, free_steps: int, nudged_steps: int, beta: float) -> ErrorPoint:
        """Measure the plain rule with a number of gradient descent steps in each phase."""
        rule = replace(
            PAPERS_RULE,
            beta=beta,
            points=points,
            matched=False,
            nudged_solver=self._descent(nudged_steps, beta),
        )
        result = meta_gradient(
            self.problem,
            self.start,
            self.meta_params,
            solver=self._descent(free_steps),
            estimator=rule,
        )
        error = (_vector(result.grads) - self.exact).norm() / self.exact.norm()
        return ErrorPoint(points, free_steps, nudged_steps, beta, error.item())


def _vector(grads: Params) -> Tensor:
    return torch.cat([grad.flatten() for grad in grads.values()])
