"""The contrastive rule to an accuracy that is asked for."""

import dataclasses
import math

from equigrad.estimators.estimator import Estimate
from equigrad.estimators.krylov_levels import KrylovLevels
from equigrad.estimators.refinement_pairs import Answer, enough
from equigrad.estimators.refinement_phases import RefinedPhases
from equigrad.estimators.step_levels import StepLevels

FIRST_REST = 2.5e-4
"""The share of the outer force that the free phase may leave before anything else is done."""


def refine(phases: RefinedPhases, beta: float) -> Estimate:
    r"""Settle, contrast and compare until the error estimate is below what was asked for.

    Where the learner is at rest, the response to the nudge solves a linear system, and Krylov steps
    find it with far fewer gradients than a learner's own (`KrylovLevels`). Where they meet a
    curvature that is not positive, a kink, or the floor of rounding, the learner settles phases at
    a finite β by its own steps (`StepLevels`): nudged by the outer force and, where answers do not
    come together, by the outer loss.

    Args:
        phases: settles the phases, and knows what stands in the way.
        beta: the β that the learner's own steps try first.
    """
    phases.begin(FIRST_REST)
    if phases.unforced:
        phases.evaluation.tally.note(
            "∂L_out/∂φ is zero, so the gradient is the direct term ∂L_out/∂θ alone"
        )
        error = math.inf if phases.obstacle else 0.0
        return Estimate(grads=phases.direct, phases=(phases.free,), error_estimate=error)
    best, apart = _best(phases, beta)
    if phases.rtol < best.error < 1 and phases.obstacle != "cancelled":
        best = phases.doubted(best, best.pairs[-1])
    if best.error > phases.rtol:
        phases.evaluation.tally.note(
            f"rtol={phases.rtol:g} was not reached, the estimated error is {best.error:.1e}: "
            f"{phases.reason}"
            + (". The true gradient may be zero" * (apart > 0.5 or best.error >= 1))
        )
    ends = [phase for pair in best.pairs for phase in (pair.plus, pair.minus)]
    if best.error <= phases.rtol:  # however far they settled, it was enough
        ends = [dataclasses.replace(s, phase=enough(s.phase)) for s in ends]
    return Estimate(grads=best.grads, phases=(phases.free, *ends), error_estimate=best.error)


def _best(phases: RefinedPhases, beta: float) -> tuple[Answer, float]:
    """The first answer that is near enough, or the best, and how far the last two are apart."""
    best, apart = Answer(math.inf, phases.direct, ()), math.inf
    # neurons rest at a map of their energy's gradient, whose Jacobian is no Hessian
    hessian = phases.evaluation.problem.symmetric
    if hessian and not (phases.obstacle or phases.solver.jumps):
        best, apart = KrylovLevels(phases).refined()
        if best.error <= phases.rtol or phases.obstacle in ("budget", "cancelled"):
            return best, apart
        phases.obstacle = None
    other, apart = StepLevels(phases, beta).refined()
    best = min(best, other, key=Answer.by_error)
    if phases.obstacle == "apart" and len(phases.evaluation.batch_steps("outer")) == 1:
        phases.obstacle, phases.by_force = None, False
        other, apart = StepLevels(phases, beta).refined()
        best = min(best, other, key=Answer.by_error)
    if best.error <= phases.rtol:
        best = phases.doubted(best, best.pairs[-1])
    return best, apart
