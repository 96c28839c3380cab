"""Learn a regularisation strength for every weight: the same for experiments and estimators."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.nn import Module

from equigrad import estimators
from equigrad.errors import SettlingError
from equigrad.estimators import Contrastive, Estimator
from equigrad.evaluation import Evaluation
from equigrad.nn import ComplexSynapse
from equigrad.problems import Bilevel, Params
from equigrad.solvers import Phase, Solver
from equigrad.training.loop import Callback, OuterState, learn
from equigrad.training.split import Split

SINGLE_STRENGTHS = tuple(10 ** (k / 2) for k in range(-10, 3))
"""Strengths that are tried where one is to serve all weights."""


Settling = TypeVar("Settling", bound=Solver)


@dataclass(frozen=True)
class Recipe(Generic[Settling]):
    """How an estimator learns the strengths.

    Attributes:
        estimator: of the meta-gradient.
        solver: how the network learns: the free phase, from the same start each time.
        outer_lr: step size on the strengths.
    """

    estimator: Estimator
    solver: Settling
    outer_lr: float


def with_nudged(rule: Estimator, solver: Solver, steps: int) -> Estimator:
    """The rule, with nudged or controlled phases of so many steps unless it says how they settle.

    Args:
        rule: a `Contrastive` or a `LeastControl`; others are returned as they are.
        solver: of the free phase.
        steps: of each phase that follows it.
    """
    shorter = replace(solver, max_steps=steps)
    if isinstance(rule, Contrastive) and rule.nudged_solver is None and rule.rtol is None:
        return replace(rule, nudged_solver=shorter)
    if isinstance(rule, estimators.LeastControl) and rule.controller.solver is None:
        return replace(rule, controller=replace(rule.controller, solver=shorter))
    return rule


@dataclass(frozen=True)
class Network:
    """A network that has learned at fixed strengths.

    Attributes:
        params: its weights.
        metrics: what they are worth, `validation_accuracy` for example.
        gradient_evaluations: that it took.
        phase: the report of how it settled.
    """

    params: dict[str, Tensor]
    metrics: dict[str, float]
    gradient_evaluations: int
    phase: Phase


@dataclass(frozen=True)
class Learned:
    """What was learned, and the network that learned with it once more.

    Attributes:
        state: of the outer loop at its end.
        network: that learned with the strengths.
        strengths: λ by name of the weight.
        gradient_evaluations: that all of it took.
        seconds: that all of it took.
        single: where the search for the best single strength was part of it, that strength and
            what it is worth.
    """

    state: OuterState
    network: Network
    strengths: dict[str, Tensor]
    gradient_evaluations: int
    seconds: float
    single: dict[str, float] | None = None


class StrengthLearner:
    """A network and its data, and the strengths of its weights to be learned.

    Args:
        network: any module; its parameters are where it learns from each time.
        split: the data, on the network's device.
        seed: of whatever an estimator or a module draws.
        batch_sizes: rows of a mini-batch for training and for validation; None for all at once.
    """

    def __init__(
        self,
        network: Module,
        split: Split,
        *,
        seed: int,
        batch_sizes: tuple[int | None, int | None] = (None, None),
    ) -> None:
        self.network, self.split, self.seed = network, split, seed
        self.batch_sizes = batch_sizes

    def problem(self, synapse: ComplexSynapse) -> Bilevel:
        """Training loss plus the strengths' penalty inside, validation loss outside."""
        target = self.split.target

        def loss(params: Params, meta_params: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
            x, y = batch
            return target.loss(synapse(params, x), y)

        inner, outer = self.batch_sizes
        return Bilevel(
            inner_loss=loss,
            outer_loss=loss,
            regularizer=synapse,
            inner_batches=batches(*self.split.train, inner),
            outer_batches=batches(*self.split.validation, outer),
        )

    def metrics(self, synapse: ComplexSynapse, params: Params, *parts: str) -> dict[str, float]:
        """What weights are worth on some parts of the data; on validation and test, if none."""
        with torch.no_grad():
            return {
                f"{part}_{name}": value
                for part, (x, y) in self.split.judges.items()
                if not parts or part in parts
                for name, value in self.split.target.metrics(synapse(params, x), y).items()
            }

    def settle(
        self,
        solver: Solver,
        *parts: str,
        strength: float = 0.0,
        meta_params: Params | None = None,
    ) -> Network:
        """Learn at fixed strengths, and be judged by some parts of the data, by all if none."""
        synapse = ComplexSynapse(self.network, strength=strength)
        meta_params = meta_params or synapse.meta_params()
        with Evaluation(self.problem(synapse), synapse.params(), meta_params) as evaluation:
            settled = evaluation.settle(solver)
        metrics = self.metrics(synapse, settled.params, *parts)
        return Network(
            settled.params, metrics, evaluation.tally.gradient_evaluations, settled.phase
        )

    def best_single(
        self, solver: Solver, strengths: Sequence[float] = SINGLE_STRENGTHS
    ) -> tuple[Network, float]:
        """The best of some strengths for all weights, chosen by the validation data alone.

        Returns:
            What it is worth, with the gradient evaluations of all; the strength. Those under which
            the network diverges are left out.

        Raises:
            SettlingError: it diverges under each of them.
        """
        tried, diverged = [], None
        for strength in strengths:
            try:
                with self._seeded():
                    tried.append((self.settle(solver, "validation", strength=strength), strength))
            except SettlingError as error:  # a step size may be too large for the strongest
                diverged = error
        if diverged is not None and not tried:
            raise diverged
        score = f"validation_{self.split.target.score}"
        best, strength = max(tried, key=lambda entry: entry[0].metrics[score])
        evaluations = sum(network.gradient_evaluations for network, _ in tried)
        metrics = self.metrics(ComplexSynapse(self.network, strength=strength), best.params)
        return replace(best, metrics=metrics, gradient_evaluations=evaluations), strength

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        """Seed torch's generators, and put them back."""
        devices = {x.device for x in self.split.train if x.device.type == "cuda"}
        with torch.random.fork_rng(devices=list(devices)):
            torch.manual_seed(self.seed)
            yield

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
            recipe: how.
            outer_steps: of Adam.
            initial_strength: where all start; None for the best single one, whose search counts.
            callbacks: watch the outer loop.
            watched: whether metrics are taken at every outer step; a look at many test rows may
                cost as much as the step.
        """
        began, searched, single = time.perf_counter(), 0, None
        if initial_strength is None:
            best, initial_strength = self.best_single(recipe.solver)
            searched = best.gradient_evaluations
            single = {"strength": initial_strength, **best.metrics}
        synapse = ComplexSynapse(self.network, strength=initial_strength)
        meta_params = synapse.meta_params()
        with self._seeded():
            searching = time.perf_counter() - began
            state = learn(
                self.problem(synapse),
                synapse.params(),
                meta_params,
                solver=recipe.solver,
                estimator=recipe.estimator,
                optimizer=torch.optim.Adam(meta_params.values(), lr=recipe.outer_lr),
                steps=outer_steps,
                project=synapse.project_,
                evaluate=(lambda params: self.metrics(synapse, params)) if watched else None,
                callbacks=callbacks,
            )
            # what the last step of the strengths is worth: learn once more
            began = time.perf_counter()
            network = self.settle(recipe.solver, meta_params=meta_params)
        evaluations = searched + state.gradient_evaluations + network.gradient_evaluations
        seconds = searching + state.seconds + time.perf_counter() - began
        strengths = {n: s.detach() for n, s in synapse.strengths(meta_params).items()}
        return Learned(state, network, strengths, evaluations, seconds, single)


def batches(x: Tensor, y: Tensor, size: int | None) -> list[tuple[Tensor, Tensor]]:
    """Mini-batches of at most `size` rows that differ in length by one at most.

    Example:
        >>> [len(y) for _, y in batches(torch.zeros(7, 2), torch.arange(7), 3)]
        [3, 2, 2]
    """
    count = 1 if size is None else -(-len(y) // size)
    return list(zip(x.tensor_split(count), y.tensor_split(count), strict=True))
