"""The causes of an incorrect hypergradient, and advice on what to change."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from equigrad.diagnostics.references import UNSETTLED, ratio
from equigrad.diagnostics.verdict import Check
from equigrad.estimators import Contrastive, Estimator
from equigrad.estimators.contrast_error import TOO_SMALL
from equigrad.solvers import Phase

PARALLEL = 0.999
"""Vectors with a larger cosine differ only by a factor."""


@dataclass(frozen=True)
class Vectors:
    """Hypergradients as vectors: over all of θ, or along the directions that were re-solved.

    Attributes:
        estimate: the hypergradient that is checked.
        truth: the reference.
        direct: the direct term `∂L_out/∂θ` at the settled φ.
        unseen: whether differences of low uncertainty contradict the exact solve.
    """

    estimate: Tensor
    truth: Tensor
    direct: Tensor
    unseen: bool


@dataclass(frozen=True)
class Evidence:
    """The evidence about a hypergradient that did not pass.

    Attributes:
        check: the verdict, without advice so far.
        estimator: the estimator that was checked.
        reference: the phase report of the reference.
        faults: the findings of local tests.
        vectors: the vectors that were compared.
        half_beta: relative error of the contrastive estimate at half the β; None for others.
    """

    check: Check
    estimator: Estimator
    reference: Phase
    faults: tuple[str, ...]
    vectors: Vectors
    half_beta: float | None


def advice(evidence: Evidence) -> list[str]:
    """Advice on what to change, for the most likely cause first."""
    said = list(evidence.faults)
    check = evidence.check
    if check.settled and check.stable and check.relative_error <= 2 * check.uncertainty:
        return said or [
            f"The reference itself is uncertain by {check.uncertainty:.1g}, so the error of "
            f"{check.relative_error:.1g} says little: use torch.float64, settle to a smaller tol, "
            f"or ask for a larger rtol"
        ]
    said += _place(evidence)
    said += _settling(evidence)
    said += _nudge(evidence)
    if not said:
        said += _form(evidence.vectors, evidence.check.rtol)
    if not said and evidence.vectors.unseen:
        said.append(
            "The exact solve disagrees with the re-solved differences, which are certain: θ acts "
            "by a path that autograd does not see, or φ is not a minimum of the inner loss"
        )
    return said or [
        f"All phases have settled, so what remains is the error of "
        f"{type(evidence.estimator).__name__} itself (at equilibrium: "
        f"{evidence.estimator.traits.error})"
    ]


def _place(evidence: Evidence) -> Iterator[str]:
    """Faults of the settled φ: it has not settled, or it is not a minimum."""
    check, reference = evidence.check, evidence.reference
    if not check.settled:
        yield (
            f"The reference has not settled either ({reference}): there may be no equilibrium "
            f"nearby, or the solver is too slow. Regularise the inner loss, or try another solver"
        )
    elif not check.stable:
        yield (
            "φ has settled at a saddle point or a maximum of the inner loss: after a small "
            "perturbation it settles elsewhere. Start from a point without that symmetry"
        )


def _settling(evidence: Evidence) -> Iterator[str]:
    """Free phases of the estimate that have not settled."""
    free = evidence.check.result.phases[0]
    if free.residual <= UNSETTLED * free.start_residual:
        return
    yield (
        f"Settle longer: the free phase began with a residual of {free.start_residual:.2g} and "
        f"ended with {free.residual:.2g}. Raise max_steps, or set a tol"
    )
    if isinstance(evidence.estimator, Contrastive) and not evidence.estimator.matched:
        yield "Use matched=True: with matched=False, the drift of the free phase is divided by β"


def _nudge(evidence: Evidence) -> Iterator[str]:
    """A β that is too small or too large, and nudged phases that have not settled."""
    check, estimator, half = evidence.check, evidence.estimator, evidence.half_beta
    if not isinstance(estimator, Contrastive) or half is None:
        return
    free, *nudged = check.result.phases
    change = f"halving it changes the error to {half:.2g}"
    coarse = TOO_SMALL in check.result.status
    if coarse or half > 1.2 * check.relative_error:
        dtype = next(iter(check.result.grads.values())).dtype
        yield (
            f"β = {estimator.beta:g} {TOO_SMALL} {dtype}, or for phases that have not "
            f"settled: {change}. Raise beta, settle longer, or use torch.float64"
        )
    elif half < 0.8 * check.relative_error:
        yield (
            f"β = {estimator.beta:g} is too large for the curvature: {change}. Lower beta, or use "
            f"more points or the symmetric scheme"
        )
    slow = [p for p in nudged if p.beta and p.residual > 0.1 * p.start_residual]
    if slow and free.residual <= UNSETTLED * free.start_residual:
        yield (
            f"The nudged phases have not converged (residual {slow[0].start_residual:.2g} to "
            f"{slow[0].residual:.2g} in {slow[0].steps} steps): give them more steps"
        )


def _form(vectors: Vectors, rtol: float) -> Iterator[str]:
    """Patterns in the estimate: a missing direct term, a wrong factor or a wrong sign."""
    estimate, truth, direct = vectors.estimate, vectors.truth, vectors.direct
    implicit = truth - direct
    if truth.numel() < 2:
        return
    two_parts = min(direct.norm(), implicit.norm()) > rtol * truth.norm()
    if two_parts and ratio(estimate - implicit, truth) <= rtol:
        yield "The direct term ∂L_out/∂θ is missing: the estimate is the implicit part alone"
    elif two_parts and abs(_cosine(estimate - direct, implicit)) > PARALLEL:
        factor = _factor(estimate - direct, implicit)
        yield (
            f"The implicit part is {factor:.4g} times what it should be, and the direct term "
            f"∂L_out/∂θ is right"
        )
    elif abs(_cosine(estimate, truth)) > PARALLEL:
        factor = _factor(estimate, truth)
        if abs(factor + 1) <= rtol:
            yield "The sign is wrong: the estimate is minus the gradient"
        else:
            yield f"The estimate is {factor:.4g} times the gradient, for all meta-parameters"


def _factor(one: Tensor, other: Tensor) -> float:
    """The factor between two parallel vectors."""
    return (one.dot(other) / other.dot(other)).item()


def _cosine(one: Tensor, other: Tensor) -> float:
    size = one.norm() * other.norm()
    return (one.dot(other) / size).item() if size else 0.0
