"""Learn strengths by cross-validation: networks side by side, one a fold, and a refit."""

import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cached_property
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from equigrad.estimators import Contrastive
from equigrad.evaluation import Evaluation
from equigrad.nn import ComplexSynapse, SideBySide
from equigrad.problems import Bilevel, Params
from equigrad.solvers import LBFGS, Solver, TorchOptimizer
from equigrad.training.early_stopping import BEST, BEST_PARAMS, EarlyStopping
from equigrad.training.folds import Folds
from equigrad.training.loop import Callback, learn
from equigrad.training.proportional import ProportionalDescent
from equigrad.training.single_strength import Single, part, search
from equigrad.training.strengths import Learned, Network, Recipe, StrengthLearner

PATIENCE, GAIN = 2, 0.01
"""Outer steps that may bring no gain, as a share of the loss."""

MOST_AT_ONCE, BATCH, ADAMS_LR = 30_000, 1000, 1e-3
"""Rows up to which L-BFGS takes all at once; rows of Adam's mini-batches, and its step size."""

MOST_SIDE_BY_SIDE = 5000
"""Rows up to which networks are faster when computed all at once."""

SOLVER = LBFGS(max_steps=40, tol=1e-3, history=10)
"""The default for training the networks."""

QUICK = 0.9
"""How flat a step of L-BFGS is at fixed strengths; phases that are contrasted need better steps."""

RULE = Contrastive(beta=0.1, scheme="forward")
"""The default estimator of the strengths' gradient."""


class FoldedLearner(StrengthLearner):
    """Strengths that all folds share, learned by cross-validation.

    Every input has a strength, which pulls all weights that read it to zero, and so has every later
    layer. One network a fold is trained on the rows of the other folds, each from a start of its
    own. Half of the held-out rows form the outer loss, whose gradient the logarithms of the
    strengths follow; the other half decide when to stop. Then the networks are trained further on
    all rows, under strengths reduced in proportion to the larger number of rows. A prediction is
    the mean of these networks and of those trained with the best single strength.
    """

    @property
    def folds(self) -> Folds:
        """How the rows are shared."""
        assert self.split.folds is not None
        return self.split.folds

    @cached_property
    def networks(self) -> SideBySide:
        """Copies of the network: all at once where they have few rows, else in turn."""
        few = len(self.split.train[1]) <= MOST_SIDE_BY_SIDE
        return SideBySide(self.network, "grouped" if few else "loop")

    @cached_property
    def start(self) -> dict[str, Tensor]:
        """The network's own parameters for the first fold, drawn anew for each other one."""
        network = deepcopy(self.network)
        starts: list[dict[str, Tensor]] = [dict(self.network.named_parameters())]
        with self._seeded():
            for _ in self.folds.train[1:]:
                for module in network.modules():
                    if isinstance(redraw := getattr(module, "reset_parameters", None), MethodType):
                        redraw()
                starts.append({n: p.clone() for n, p in network.named_parameters()})
        return {name: torch.stack([p[name].detach() for p in starts]) for name in starts[0]}

    def shared(self, strength: float) -> dict[str, Tensor]:
        """One strength for each input, and one for every other parameter: shapes with ones."""
        own = dict(self.network.named_parameters())
        first = next(name for name, p in own.items() if p.ndim > 1)
        shapes = {name: [1] * p.ndim for name, p in own.items()}
        shapes[first][1] = own[first].shape[1]
        return {name: own[name].new_full(shape, strength) for name, shape in shapes.items()}

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
        """Outputs of the networks side by side, of shape networks × n × outputs."""
        return self.networks(params, x)

    def losses(self, params: Params, x: Tensor, y: Tensor) -> Tensor:
        """The loss of each row under each network, of shape networks × n."""
        outputs = self.outputs(params, x)
        return self.split.target.losses(outputs.flatten(0, 1), y.flatten()).view(y.shape)

    def weighed(self, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, targets and weights of the rows with a weight, of shape folds × n.

        Folds that have fewer of them are filled up with rows of weight zero.
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
            modules=(),
            reaches={"inner": [], "outer": []},
        )

    def settled(self, solver: Solver, strengths: Params, start: Params, weights: Tensor) -> Network:
        """Networks trained at fixed strengths, not yet scored."""
        solver = self.fitting(solver)
        if isinstance(solver, LBFGS):
            solver = replace(solver, flatter=QUICK)
        problem = self.problem_of(self._fixed, weights, weights)
        meta_params = {f"strength.{name}": s for name, s in strengths.items()}
        with Evaluation(problem, start, meta_params) as evaluation:
            settled = evaluation.settle(solver)
        return Network(settled.params, {}, evaluation.tally.gradient_evaluations, settled.phase)

    @cached_property
    def _fixed(self) -> ComplexSynapse:
        """For strengths that are not learned."""
        return ComplexSynapse(self.network, strength=self.shared(1.0))

    @torch.no_grad()
    def loss(self, params: Params, weights: Tensor) -> float:
        """The weighted loss of the rows, averaged over networks."""
        x, y, weights = self.weighed(weights)
        return (self.losses(params, x, y) * weights).sum().item() / len(weights)

    @torch.no_grad()
    def held_out(self, params: Params) -> dict[str, float]:
        """Metrics of the held-out rows, by the networks that have not seen them.

        With several sets of networks, one after the other, the mean of their outputs counts.
        """
        x, y, weights = self.weighed(self.folds.held)
        sets = len(next(iter(params.values()))) // len(x)
        outputs = self.outputs(params, x.repeat(sets, *[1] * (x.ndim - 1)))
        outputs = outputs.unflatten(0, (sets, len(x))).mean(0)
        return self._named("validation", outputs[weights > 0], y[weights > 0])

    @torch.no_grad()
    def tested(self, params: Params) -> dict[str, float]:
        """Metrics of the test rows, by the mean of the networks' outputs."""
        if self.split.test is None:
            return {}
        x, y = self.split.test
        count = len(next(iter(params.values())))
        return self._named("test", self.outputs(params, x.expand(count, *x.shape)).mean(0), y)

    def _named(self, part: str, outputs: Tensor, y: Tensor) -> dict[str, float]:
        found = self.split.target.metrics(outputs, y)
        return {f"{part}_{name}": value for name, value in found.items()}

    def best_single(self, solver: Solver, strengths: Sequence[float] = ()) -> tuple[Network, float]:
        """The best single strength by the held-out rows, and the scores of its refit."""
        single, network, _ = self.searched(solver, *strengths)
        spent = single.gradient_evaluations + network.gradient_evaluations
        return replace(network, gradient_evaluations=spent), single.strength

    def searched(self, solver: Solver, *strengths: float) -> tuple[Single, Network, float]:
        """The best single strength, its refit with scores, and the seconds that both took."""
        key = solver, strengths
        if key not in self._searched:
            began = time.perf_counter()
            with self._seeded():
                single = search(self._trial, solver, self.start, strengths)
            network = self.refit(solver, self.shared(single.strength), single.params)
            network = self.judged(network, single.params)
            self._searched[key] = single, network, time.perf_counter() - began
        return self._searched[key]

    @cached_property
    def _searched(self) -> dict[Any, tuple[Single, Network, float]]:
        """Results of searches, where several estimators start."""
        return {}

    def _trial(self, solver: Solver, strength: float, start: Params) -> Single:
        found = self.settled(solver, self.shared(strength), start, self.folds.train)
        loss = self.loss(found.params, self.folds.held)
        return Single(strength, found.params, loss, found.gradient_evaluations)

    def refit(self, solver: Solver, strengths: Params, params: Params) -> Network:
        """The folds' networks after further training on all rows."""
        weaker = {name: self.folds.shrink * s for name, s in strengths.items()}
        weights = self.folds.refit.expand(len(self.folds.train), -1)
        with self._seeded():
            return self.settled(part(2, solver), weaker, params, weights)

    def judged(self, network: Network, before: Params) -> Network:
        """With the scores of its test rows, and of rows held out before the refit."""
        return replace(network, metrics=self.held_out(before) | self.tested(network.params))

    def learn_by(
        self,
        recipe: Recipe,
        *,
        outer_steps: int,
        initial_strength: float | None,
        callbacks: Sequence[Callback] = (),
        watched: bool = True,
    ) -> Learned:
        """Learn the strengths, from the best single one unless told, and train with them.

        The arguments are those of `StrengthLearner.learn_by`. The step size of the recipe is that
        of `ProportionalDescent` on log λ; `outer_steps` is a limit, since held-out rows may stop it
        earlier.
        """
        given = () if initial_strength is None else (initial_strength,)
        single, beside, seconds = self.searched(recipe.solver, *given)
        strengths = self.shared(single.strength)
        synapse = ComplexSynapse(self.network, strength=strengths, positivity="log")
        meta_params = synapse.meta_params()
        rule = recipe.estimator
        if isinstance(rule, Contrastive) and rule.nudged_solver is not None:
            rule = replace(rule, nudged_solver=self.fitting(rule.nudged_solver))

        def evaluate(params: Params) -> dict[str, float]:
            seen = {"stop_loss": self.loss(params, self.folds.stop)}
            return seen | (self.held_out(params) | self.tested(params) if watched else {})

        with self._seeded():
            state = learn(
                self.problem_of(synapse, self.folds.train, self.folds.judge),
                single.params,
                meta_params,
                solver=self.fitting(part(4, recipe.solver)),
                estimator=rule,
                optimizer=ProportionalDescent(meta_params.values(), recipe.outer_lr),
                steps=outer_steps,
                start="warm",
                evaluate=evaluate,
                callbacks=[EarlyStopping("stop_loss", PATIENCE, GAIN), *callbacks],
            )
        began = time.perf_counter()
        best, params = synapse.strengths(state.copies[BEST]), state.copies[BEST_PARAMS]
        own = self.refit(recipe.solver, best, params)
        both = replace(own, params=_together(beside.params, own.params))
        stages = single, beside, state, own
        return Learned(
            state,
            self.judged(both, _together(single.params, params)),
            best,
            sum(stage.gradient_evaluations for stage in stages),
            seconds + state.seconds + time.perf_counter() - began,
            None if given else {"strength": single.strength, **beside.metrics},
        )


def _together(one: Params, other: Params) -> dict[str, Tensor]:
    """Networks of one set, and then those of another."""
    return {name: torch.cat([p, other[name]]) for name, p in one.items()}
