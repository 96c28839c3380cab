"""The base class of all estimators, and the traits that tables and error messages are made from."""

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
    """The requirements and properties of an estimator, for tables and error messages.

    Attributes:
        idea: how it computes the gradient, in a few words.
        cost: gradient evaluations beyond the free phase, which has T steps; K in what follows.
        error: error that remains at equilibrium, however long it computes.
        double_backward: it differentiates a gradient again.
        energy: it needs a loss that settling minimises, and does not work for a map.
        symmetric: it needs the residual to be the gradient of that loss, and `∂r/∂φ` its Hessian.
        equilibrium: it gives the gradient at equilibrium, not that of a learner that stopped early.
        sees_start: it differentiates through params that were computed from meta_params.
        needs_start: it gives no other derivative.
        minimum: it needs an outer loss that is bounded from below, which a linear one is not.
        memory: growth of memory with the T steps of the free phase.
        order: order of the error in the nudging strength β.
        steps: it needs the steps of the free phase, not only its end.
        one_system: it solves one linear system for all of φ, so that tasks which share only θ
            should settle one after the other.
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
        """Whether these traits fit a problem, or a class of problems."""
        return (problem.energy or not self.energy) and (problem.symmetric or not self.symmetric)

    def serve(self, evaluation: Evaluation) -> bool:
        """Whether these traits fit a problem and the paths by which its θ acts."""
        return (
            self.fit(evaluation.problem)
            and (self.sees_start or not evaluation.reaches.only_start)
            and (self.steps or not evaluation.reaches.only_solver)
            and (not self.needs_start or bool(evaluation.reaches.start))
        )


@dataclass(frozen=True)
class Estimate:
    """The result of an estimator.

    Attributes:
        grads: an estimate of `dL_out/dθ`, by name.
        phases: all phases that were run, the free one first.
        error_estimate: estimated relative error of `grads`; None if the estimator has no estimate.
        judge: computes an error estimate that takes further evaluations, on request, and adds notes
            to the evaluation.
    """

    grads: dict[str, Tensor]
    phases: tuple[Settled, ...]
    error_estimate: float | None = None
    judge: Callable[[], float | None] | None = None

    def error(self) -> float | None:
        """The error estimate, to be requested while the evaluation is open."""
        return self.error_estimate if self.judge is None else self.judge()


@dataclass(frozen=True, kw_only=True)
class Estimator(Checked):
    """A method that computes the gradient with respect to θ of a problem that settles."""

    traits: ClassVar[Traits]

    def check(self, evaluation: Evaluation, solver: Solver) -> None:
        """Refuse problems for which this estimator does not work, and name estimators that do.

        Raises:
            ConfigurationError: it needs an energy or a Hessian, and the problem has none.
            ProblemError: θ is only the initialisation and the estimator does not see that, or θ is
                not the initialisation and the estimator sees nothing else.
        """
        who, traits, reaches = type(self).__name__, self.traits, evaluation.reaches
        if not traits.fit(evaluation.problem):
            what = type(evaluation.problem).__name__
            if not evaluation.problem.energy:
                why = f"an inner loss, which a {what} problem does not have"
                if traits.fit(problems.EnergyBased):
                    why += (
                        " (if the map has a primitive function, declare it as an EnergyBased "
                        "problem)"
                    )
            else:
                why = (
                    f"a symmetric ∂r/∂φ (a Hessian), and that of a {what} problem is not symmetric"
                )
            raise ConfigurationError(f"{who} needs {why}; use {serving(evaluation)}")
        if reaches.only_start and not traits.sees_start:
            seeing = serving(evaluation, lambda t: t.sees_start)
            raise ProblemError(
                f"the losses depend on meta-parameter {listed(reaches.only_start)} only through "
                f"the initialisation of params. Its gradient at equilibrium is exactly zero, "
                f"because a converged solution does not depend on its initialisation. Make it the "
                f"centre of a proximal term, as in equigrad.nn.ComplexSynapse(learn=('center',)), "
                f"or use an estimator that differentiates a finite number of steps from the "
                f"initialisation: {seeing}"
            )
        self._check_settings_of_the_solver(evaluation)
        if traits.needs_start and not reaches.start:
            raise ProblemError(
                f"{who} computes the gradient with respect to the initialisation of params, but "
                f"these params do not depend on meta_params. Compute params from meta_params, for "
                f"example params=meta_params if θ is the initial φ itself"
            )
        if reaches.start and not traits.sees_start:
            evaluation.tally.note(
                f"params are initialised by a function of {listed(reaches.start)}; the gradient "
                f"leaves out the path through the initialisation, which vanishes at equilibrium"
            )

    def _check_settings_of_the_solver(self, evaluation: Evaluation) -> None:
        """Refuse θ that acts only through solver settings, or note a path that is left out."""
        reaches, who = evaluation.reaches, type(self).__name__
        if not reaches.solver or self.traits.steps:
            return
        if reaches.only_solver:
            raise ProblemError(
                f"meta-parameter {listed(reaches.only_solver)} is a setting of the solver, and "
                f"{who} computes the gradient at the converged solution: {NO_STEP_SIZE}; or "
                f"differentiate the steps themselves, with "
                f"{serving(evaluation, lambda t: t.steps)}"
            )
        evaluation.tally.note(
            f"settings of the solver are functions of {listed(reaches.solver)}; the gradient "
            f"leaves out the path through them, which vanishes at equilibrium"
        )

    @property
    def differentiates_twice(self) -> bool:
        """Whether it uses autograd to differentiate a gradient."""
        return self.traits.double_backward

    def check_settled(self, evaluation: Evaluation) -> None:
        """Raise if this estimator cannot continue from a free phase of an earlier call.

        Raises:
            ConfigurationError: it needs more of a free phase than its end, or no free phase.
        """
        if self.traits.steps:
            raise ConfigurationError(
                f"{type(self).__name__} needs all steps of the free phase, and settled= has only "
                f"its end. Leave settled out, or use {serving(evaluation, lambda t: not t.steps)}"
            )

    @abstractmethod
    def estimate(self, evaluation: Evaluation, solver: Solver) -> Estimate:
        """Run the phases that are needed, and estimate `dL_out/dθ`."""


def serving(evaluation: Evaluation, wanted: Callable[[Traits], bool] = lambda traits: True) -> str:
    """The estimators that work for a problem and meet a condition, in words."""
    from equigrad.estimators import ESTIMATORS

    fitting = [e for e in ESTIMATORS if e.traits.serve(evaluation) and wanted(e.traits)]
    return " or ".join(f"{e.__name__}()" for e in fitting)
