"""What an estimator is."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from equigrad import problems
from equigrad.errors import ConfigurationError, ProblemError
from equigrad.evaluation import NO_STEP_SIZE, Evaluation
from equigrad.fields import Checked
from equigrad.problems import Problem
from equigrad.solvers import Settled, Solver
from equigrad.wording import listed


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What an estimator needs and gives: the tables and the error messages are made from this.

    Attributes:
        idea: in a few words, how it has the gradient.
        cost: gradient evaluations beyond the free phase; T steps in it, K in what follows.
        error: what remains wrong at equilibrium, however long it computes.
        double_backward: differentiates a gradient once more.
        energy: needs a loss that settling minimises; a map will not do.
        symmetric: needs the residual to be the gradient of that loss, `∂r/∂φ` its Hessian.
        equilibrium: gives the gradient of a learner at rest, not of one that stopped early.
        sees_start: takes the derivative through params that were computed from meta_params.
        needs_start: gives nothing else.
        minimum: needs an outer loss that is bounded from below, which a linear one is not.
        memory: in the T steps of the free phase.
        order: of the error in the nudging strength β.
        steps: needs the steps of the free phase, and not its end alone.
        one_system: solves one linear system for all of φ, so that tasks that share θ alone are
            better settled one after the other.
    """

    idea: str
    cost: str
    error: str
    double_backward: bool
    energy: bool = True
    symmetric: bool = False
    equilibrium: bool = True
    sees_start: bool = False
    needs_start: bool = False
    minimum: bool = False
    memory: str = "flat"
    order: str = "–"
    steps: bool = False
    one_system: bool = False

    def fit(self, problem: Problem | type[Problem]) -> bool:
        """Whether these traits fit a problem, or any of a kind."""
        return (problem.energy or not self.energy) and (problem.symmetric or not self.symmetric)

    def serve(self, evaluation: Evaluation) -> bool:
        """Whether these traits fit a problem and what its θ acts on."""
        return (
            self.fit(evaluation.problem)
            and (self.sees_start or not evaluation.reaches.only_start)
            and (self.steps or not evaluation.reaches.only_solver)
            and (not self.needs_start or bool(evaluation.reaches.start))
        )


@dataclass(frozen=True)
class Estimate:
    """What an estimator returns.

    Attributes:
        grads: an estimate of `dL_out/dθ`, by name.
        phases: every phase that was settled, the free one first.
        error_estimate: estimated relative error of `grads`, or None where the estimator has none.
        judge: works the error estimate out where that takes further evaluations, for whoever asks;
            notes in the evaluation what is worth knowing.
    """

    grads: dict[str, Tensor]
    phases: tuple[Settled, ...]
    error_estimate: float | None = None
    judge: Callable[[], float | None] | None = None

    def error(self) -> float | None:
        """The error estimate; to be asked for while the evaluation lasts."""
        return self.error_estimate if self.judge is None else self.judge()


@dataclass(frozen=True, kw_only=True)
class Estimator(Checked):
    """How the gradient of θ is had from a problem that settles."""

    traits: ClassVar[Traits]

    def check(self, evaluation: Evaluation, solver: Solver) -> None:
        """Refuse what this estimator cannot serve, naming what can.

        Raises:
            ConfigurationError: the problem has no energy or no Hessian, and this needs one.
            ProblemError: θ is the initialisation alone and this does not see it, or θ is not the
                initialisation and this sees nothing else.
        """
        who, traits, reaches = type(self).__name__, self.traits, evaluation.reaches
        if not traits.fit(evaluation.problem):
            what = type(evaluation.problem).__name__
            if not evaluation.problem.energy:
                why = f"an inner loss that settling minimises, and a {what} has none"
                if traits.fit(problems.EnergyBased):
                    why += " (where the map has a primitive function, declare an EnergyBased)"
            else:
                why = f"a symmetric ∂r/∂φ, a Hessian, which that of {what} is not"
            raise ConfigurationError(f"{who} needs {why}; use {serving(evaluation)}")
        if reaches.only_start and not traits.sees_start:
            seeing = serving(evaluation, lambda t: t.sees_start)
            raise ProblemError(
                f"meta-parameter {listed(reaches.only_start)} has no path to a loss but through "
                f"the initialisation of params, and its gradient at equilibrium is truly zero: "
                f"what has settled has forgotten where it started. Make it the centre of a "
                f"proximal term, as in equigrad.nn.ComplexSynapse(learn=('center',)), or use an "
                f"estimator of finitely many steps that sees the start: {seeing}"
            )
        self._check_settings_of_the_solver(evaluation)
        if traits.needs_start and not reaches.start:
            raise ProblemError(
                f"{who} sees θ through the initialisation alone, and these params do not depend on "
                f"meta_params. Pass params made from meta_params, for example "
                f"params=meta_params where θ is the initial φ itself"
            )
        if reaches.start and not traits.sees_start:
            evaluation.tally.note(
                f"params start at a function of {listed(reaches.start)}: the path through the "
                f"start, which vanishes at equilibrium, is not in the gradient"
            )

    def _check_settings_of_the_solver(self, evaluation: Evaluation) -> None:
        """Refuse θ that act through the solver alone, or say that this path is left out."""
        reaches, who = evaluation.reaches, type(self).__name__
        if not reaches.solver or self.traits.steps:
            return
        if reaches.only_solver:
            raise ProblemError(
                f"meta-parameter {listed(reaches.only_solver)} is a setting of the solver, and "
                f"{who} has the gradient of what has settled: {NO_STEP_SIZE}; or learn the steps "
                f"themselves, with {serving(evaluation, lambda t: t.steps)}"
            )
        evaluation.tally.note(
            f"the solver's settings are a function of {listed(reaches.solver)}: that path, which "
            f"vanishes at equilibrium, is not in the gradient"
        )

    @property
    def differentiates_twice(self) -> bool:
        """Whether it takes autograd's word for the derivative of a gradient."""
        return self.traits.double_backward

    def check_settled(self, evaluation: Evaluation) -> None:
        """Refuse to go on from a free phase of an earlier call, where this cannot.

        Raises:
            ConfigurationError: this needs more of a free phase than its end, or none.
        """
        if self.traits.steps:
            raise ConfigurationError(
                f"{type(self).__name__} needs the steps of the free phase, and settled holds its "
                f"end alone; leave settled out, or use {serving(evaluation, lambda t: not t.steps)}"
            )

    @abstractmethod
    def estimate(self, evaluation: Evaluation, solver: Solver) -> Estimate:
        """Settle what is needed and estimate `dL_out/dθ`."""


def serving(evaluation: Evaluation, wanted: Callable[[Traits], bool] = lambda traits: True) -> str:
    """The estimators that serve a problem and are as wanted, in words."""
    from equigrad.estimators import ESTIMATORS

    fitting = [e for e in ESTIMATORS if e.traits.serve(evaluation) and wanted(e.traits)]
    return " or ".join(f"{e.__name__}()" for e in fitting)
