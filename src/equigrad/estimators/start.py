"""The base class of estimators that see θ only through the initialisation."""

from abc import abstractmethod
from dataclasses import dataclass

from equigrad.errors import ProblemError
from equigrad.estimators.estimator import Estimate, Estimator, serving
from equigrad.evaluation import Evaluation
from equigrad.problems import Params
from equigrad.solvers import Settled, Solver
from equigrad.wording import listed


@dataclass(frozen=True, kw_only=True)
class ThroughStart(Estimator):
    """Learns an initialisation, with an approximate adjoint of the start.

        ∇̂_θ = (∂φ_0/∂θ)ᵀ a_0 + direct term

    The estimators of this family differ in the adjoint a_0 that replaces `dL_out/dφ_0`. None of
    them sees how θ acts through the inner loss: a note says so if it does, and a θ that acts in no
    other way is refused.
    """

    @abstractmethod
    def adjoint(self, evaluation: Evaluation, free: Settled) -> tuple[Params, Params]:
        """The replacement for `dL_out/dφ_0`, and the direct term, zero if there is none."""

    @abstractmethod
    def sees(self, evaluation: Evaluation) -> set[str]:
        """The meta-parameters with a path that this estimator sees."""

    def check(self, evaluation: Evaluation, solver: Solver) -> None:
        """Also refuse a θ that acts only on the path which is not seen."""
        super().check(evaluation, solver)
        unseen = sorted(set(evaluation.meta_params) - self.sees(evaluation))
        who = type(self).__name__
        if unseen:
            others = serving(evaluation, lambda t: t.sees_start and not t.needs_start)
            raise ProblemError(
                f"meta-parameter {listed(unseen)} acts on a loss at every step, which {who} "
                f"leaves out, so its gradient would be zero; use {others}"
            )
        inner = [n for n in evaluation.meta_params if n in evaluation.reaches.loss("inner")]
        if inner:
            evaluation.tally.note(
                f"the gradient by {who} leaves out the effect of {listed(inner)} through the "
                f"inner loss"
            )

    def estimate(self, evaluation: Evaluation, solver: Solver) -> Estimate:
        """Settle, and pull the adjoint back to θ."""
        free = evaluation.settle(solver)
        adjoint, direct = self.adjoint(evaluation, free)
        start = evaluation.start.pull_back(adjoint)
        return Estimate(grads={n: start[n] + direct[n] for n in start}, phases=(free,))
