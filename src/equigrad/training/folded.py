"""Learn strengths by cross-validation: networks side by side, one a fold, and a refit."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from equigrad.errors import SettlingError
from equigrad.estimators import Contrastive
from equigrad.evaluation import Evaluation
from equigrad.nn import ComplexSynapse, SideBySide
from equigrad.problems import Bilevel, Params
from equigrad.solvers import LBFGS, Phase, Solver, TorchOptimizer
from equigrad.training.early_stopping import BEST, EarlyStopping
from equigrad.training.folds import Folds
from equigrad.training.loop import Callback, learn
from equigrad.training.proportional import ProportionalDescent
from equigrad.training.strengths import Learned, Network, Recipe, StrengthLearner

DECADES = (1.0, 0.1, 0.01, 0.001)
"""Single strengths that are tried first."""

WARM_STEPS = 30
"""Steps in which networks that have settled follow strengths that have changed a little."""

PATIENCE = 2
"""Outer steps that may bring nothing."""

MOST_AT_ONCE, BATCH, ADAMS_LR = 30_000, 1000, 1e-3
"""Rows up to which L-BFGS takes all at once; rows of Adam's mini-batches, and its step size."""

SOLVER = LBFGS(max_steps=200, tol=1e-3, history=20)
"""How networks learn unless told otherwise."""

RULE = Contrastive(beta=0.1, scheme="forward")
"""What estimates the gradients of the strengths unless told otherwise."""


@dataclass(frozen=True)
class Single:
    """The folds' networks at a single strength for all weights.

    Attributes:
        params: of shape folds × …, each.
        strength: the best of those that were tried.
        loss: of the rows that are held out.
        gradient_evaluations: that all of them took.
        seconds: likewise.
    """

    params: dict[str, Tensor]
    strength: float
    loss: float
    gradient_evaluations: int
    seconds: float = 0.0


class FoldedLearner(StrengthLearner):
    """Strengths that all folds share, learned by the rows that each fold holds out.

    A network a fold learns from the other folds' rows, all from the same start. Of the rows that
    are held out, half judge: the strengths' logarithms follow the gradient of their loss. The other
    half say when to stop. In the end every fold's network learns on from all rows, under strengths
    that are weaker by as much as there are more rows, and predictions are their mean.
    """

    @property
    def folds(self) -> Folds:
        """How the rows are shared."""
        assert self.split.folds is not None
        return self.split.folds

    @cached_property
    def networks(self) -> SideBySide:
        """Copies of the network; so few that a loop is fastest."""
        return SideBySide(self.network, "loop")

    @cached_property
    def start(self) -> dict[str, Tensor]:
        """The network's own parameters, for every fold."""
        count = len(self.folds.train)
        own = self.network.named_parameters()
        return {name: p.detach().expand(count, *p.shape).clone() for name, p in own}

    @property
    def batch_count(self) -> int:
        """Mini-batches of the rows; one where L-BFGS takes them all."""
        rows = len(self.split.train[1])
        return 1 if rows <= MOST_AT_ONCE else -(-rows // BATCH)

    def fitting(self, solver: Solver) -> Solver:
        """The solver, or Adam in its place where there are too many rows for it.

        Ten steps of L-BFGS stand for one pass of Adam over the mini-batches.
        """
        if self.batch_count == 1 or not isinstance(solver, LBFGS):
            return solver
        steps = max(1, (solver.max_steps or 1000) // 10) * self.batch_count
        options = {"lr": ADAMS_LR}
        return TorchOptimizer(optimizer=torch.optim.Adam, options=options, max_steps=steps)

    def outputs(self, params: Params, x: Tensor) -> Tensor:
        """Of the networks side by side, of shape networks × n × outputs."""
        return self.networks(params, x)

    def losses(self, params: Params, x: Tensor, y: Tensor) -> Tensor:
        """Of each row, by each network."""
        outputs = self.outputs(params, x)
        return self.split.target.losses(outputs.flatten(0, 1), y.flatten()).view(y.shape)

    def weighed(self, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, targets and weights of the rows that a fold's network sees, of shape folds × n.

        Folds that see fewer rows than others have some more, of weight zero.
        """
        x, y = self.split.train
        seen = weights > 0
        most = int(seen.sum(1).max())
        rows = seen.byte().argsort(dim=1, descending=True, stable=True)[:, :most]
        return x[rows], y[rows], weights.gather(1, rows)

    def problem_of(self, synapse: ComplexSynapse, inner: Tensor, outer: Tensor) -> Bilevel:
        """A problem whose losses weigh the rows, each summed over networks."""
        count = self.batch_count

        def loss(params: Params, meta_params: Params, batch: tuple[Tensor, ...]) -> Tensor:
            x, y, weights = batch
            return (self.losses(params, x, y) * weights).sum()

        def batches(weights: Tensor) -> list[tuple[Tensor, ...]]:
            x, y, weights = self.weighed(weights)
            parts = (each.tensor_split(count, dim=1) for each in (x, y, count * weights))
            return list(zip(*parts, strict=True))

        return Bilevel(
            inner_loss=loss,
            outer_loss=loss,
            regularizer=synapse,
            inner_batches=batches(inner),
            outer_batches=batches(outer),
        )

    def settled(
        self,
        solver: Solver,
        strengths: float | Mapping[str, Tensor],
        start: Params,
        weights: Tensor,
    ) -> tuple[dict[str, Tensor], int, Phase]:
        """Networks that learn at fixed strengths; the gradients that it took, and how it ended."""
        synapse = ComplexSynapse(self.network, strength=strengths)
        problem = self.problem_of(synapse, weights, weights)
        with Evaluation(problem, start, synapse.meta_params()) as evaluation:
            settled = evaluation.settle(self.fitting(solver))
        return settled.params, evaluation.tally.gradient_evaluations, settled.phase

    @torch.no_grad()
    def loss(self, params: Params, weights: Tensor) -> float:
        """Of the rows by their weights, a mean over networks."""
        x, y, weights = self.weighed(weights)
        return (self.losses(params, x, y) * weights).sum().item() / len(weights)

    @torch.no_grad()
    def held_out(self, params: Params) -> dict[str, float]:
        """Metrics of the rows that are held out, by the networks that have not seen them."""
        x, y, weights = self.weighed(self.folds.held)
        return self._named("validation", self.outputs(params, x)[weights > 0], y[weights > 0])

    @torch.no_grad()
    def tested(self, params: Params) -> dict[str, float]:
        """Metrics of the test rows, judged by the mean of the networks."""
        if self.split.test is None:
            return {}
        x, y = self.split.test
        count = len(self.folds.train)
        return self._named("test", self.outputs(params, x.expand(count, *x.shape)).mean(0), y)

    def _named(self, part: str, outputs: Tensor, y: Tensor) -> dict[str, float]:
        found = self.split.target.metrics(outputs, y)
        return {f"{part}_{name}": value for name, value in found.items()}

    def best_single(self, solver: Solver, strengths: Sequence[float] = ()) -> tuple[Network, float]:
        """The best single strength by the rows that are held out, and what its refit is worth."""
        single = self.single(solver, strengths)
        network = self.refit(solver, single.strength, single.params)
        evaluations = single.gradient_evaluations + network.gradient_evaluations
        return replace(network, gradient_evaluations=evaluations), single.strength

    def single(self, solver: Solver, strengths: Sequence[float] = ()) -> Single:
        """The best single strength by the rows that are held out.

        Args:
            solver: settles the networks.
            strengths: to be tried; by default decades, and then half a decade to both sides. Each
                begins at the start: a network that a strong one has silenced does not wake again.
        """
        key = (solver, *strengths)
        if key not in self._searched:
            began = time.perf_counter()
            with self._seeded():
                first, *others = strengths or DECADES
                best = self._try(solver, first, self.start)
                for strength in others:
                    best = self._better(solver, best, strength)
                if not strengths and best.strength == DECADES[-1]:
                    best = self._better(solver, best, 0.1 * best.strength)
                for factor in () if strengths else (10**-0.5, 10**0.5):
                    best = self._better(solver, best, factor * best.strength)
            self._searched[key] = replace(best, seconds=time.perf_counter() - began)
        return self._searched[key]

    @cached_property
    def _searched(self) -> dict[tuple[Solver | float, ...], Single]:
        """What a search has found, which several estimators start at."""
        return {}

    def _try(self, solver: Solver, strength: float, start: Params) -> Single:
        params, cost, _ = self.settled(solver, strength, start, self.folds.train)
        return Single(params, strength, self.loss(params, self.folds.held), cost)

    def _better(self, solver: Solver, best: Single, strength: float) -> Single:
        """The better one, where the networks settle under the strength at all."""
        try:
            other = self._try(solver, strength, self.start)
        except SettlingError:
            return best
        spent = best.gradient_evaluations + other.gradient_evaluations
        return replace(min(best, other, key=lambda one: one.loss), gradient_evaluations=spent)

    def refit(
        self, solver: Solver, strengths: float | Mapping[str, Tensor], params: Params
    ) -> Network:
        """The folds' networks after they have learned on from all rows, and what they are worth."""
        folds = self.folds
        if isinstance(strengths, Mapping):
            weaker = {name: folds.shrink * s for name, s in strengths.items()}
        else:
            weaker = folds.shrink * strengths
        judged = self.held_out(params)
        following = replace(solver, max_steps=WARM_STEPS)
        weights = folds.refit.expand(len(folds.train), -1)
        with self._seeded():
            params, cost, phase = self.settled(following, weaker, params, weights)
        return Network(params, judged | self.tested(params), cost, phase)

    def learn_by(
        self,
        recipe: Recipe,
        *,
        outer_steps: int,
        initial_strength: float | None,
        callbacks: Sequence[Callback] = (),
        watched: bool = True,
    ) -> Learned:
        """Learn a strength for every weight, and then with them; torch's generator is put back.

        Args:
            recipe: how; the step size is that of `ProportionalDescent` on log λ.
            outer_steps: at most.
            initial_strength: where all start; None for the best single one, whose search counts.
            callbacks: watch the outer loop.
            watched: whether the test rows are looked at after every outer step.
        """
        single = self.single(recipe.solver, () if initial_strength is None else (initial_strength,))
        synapse = ComplexSynapse(self.network, strength=single.strength, positivity="log")
        meta_params = synapse.meta_params()
        following = self.fitting(replace(recipe.solver, max_steps=WARM_STEPS))
        rule = recipe.estimator
        if isinstance(rule, Contrastive) and rule.nudged_solver is not None:
            rule = replace(rule, nudged_solver=self.fitting(rule.nudged_solver))

        def evaluate(params: Params) -> dict[str, float]:
            found = {"stop_loss": self.loss(params, self.folds.stop), **self.held_out(params)}
            return found | (self.tested(params) if watched else {})

        with self._seeded():
            state = learn(
                self.problem_of(synapse, self.folds.train, self.folds.judge),
                single.params,
                meta_params,
                solver=following,
                estimator=rule,
                optimizer=ProportionalDescent(meta_params.values(), recipe.outer_lr),
                steps=outer_steps,
                start="warm",
                evaluate=evaluate,
                callbacks=[EarlyStopping("stop_loss", PATIENCE), *callbacks],
            )
            began = time.perf_counter()
            best = synapse.strengths(state.copies[BEST])
            params, cost, _ = self.settled(following, best, state.params, self.folds.train)
        network = self.refit(recipe.solver, best, params)
        compared = None
        if initial_strength is None:
            worth = self.refit(recipe.solver, single.strength, single.params).metrics
            compared = {"strength": single.strength, **worth}
        evaluations = single.gradient_evaluations + state.gradient_evaluations
        evaluations += cost + network.gradient_evaluations
        seconds = single.seconds + state.seconds + time.perf_counter() - began
        return Learned(state, network, best, evaluations, seconds, compared)
