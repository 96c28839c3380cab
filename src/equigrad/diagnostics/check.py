"""A check of a meta-gradient against references, with an error and advice."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from equigrad.diagnostics.causes import Evidence, Vectors, advice
from equigrad.diagnostics.local_tests import local_faults
from equigrad.diagnostics.references import Direction, References, announcement, flat, ratio
from equigrad.diagnostics.verdict import Check
from equigrad.estimators import Contrastive, Estimator
from equigrad.fields import Count, Positive, expect
from equigrad.gradient import MetaGradient, meta_gradient
from equigrad.problems import Params, Problem
from equigrad.solvers import Solver

LEAST_BUDGET = 3000
"""Gradient evaluations that the references may always take, even if the hypergradient is cheap."""


def check_meta_gradient(
    problem: Problem,
    params: Params,
    meta_params: Params,
    *,
    solver: Solver,
    estimator: Estimator | None = None,
    directions: int = 3,
    rtol: float = 1e-2,
    seed: int = 0,
    budget: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Check:
    """Compare a meta-gradient with references that do not depend on the estimator.

    The inner problem is settled again at `θ ± h d` along random unit directions d, and the outer
    loss is differenced. These phases start from the settled state, which is first settled further,
    for up to ten times as many steps as the free phase had. If the model has a double backward and
    φ is small, `ExactSolve` computes the whole gradient, too; if differences of low uncertainty
    contradict it, they are used instead.

    If the gradient is wrong, possible causes are tested: losses that are random, or whose
    derivative by autograd is not that of their values; a regulariser whose closed forms disagree; a
    kink; a saddle; phases that have not settled; a β that is too small or too large, which is
    tested by halving it; an estimate without the direct term, or with a wrong factor or sign.

    Args:
        problem: as for `meta_gradient`.
        params: as for `meta_gradient`.
        meta_params: as for `meta_gradient`.
        solver: as for `meta_gradient`.
        estimator: the estimator to check.
        directions: number of directions to re-solve along; the axes of θ if it has no more entries,
            and fewer, but at least one, when the budget is spent.
        rtol: relative error to pass.
        seed: seed of the directions.
        budget: gradient evaluations that the references may take; by default ten times those of the
            estimate, and at least 3000.
        progress: called with a sentence about the work to be done and its cost; `print`, say.

    Returns:
        The verdict, with advice.

    Raises:
        ConfigurationError: directions < 1, rtol ≤ 0 or budget < 1.
        EquigradError: any error of `meta_gradient`.

    Example:
        >>> from equigrad.testing import Quadratic
        >>> q = Quadratic()
        >>> check = check_meta_gradient(
        ...     q.problem, q.params(), q.meta_params(), solver=q.solver(30)
        ... )
        >>> check.passed, "Settle longer" in str(check)
        (False, True)
    """
    expect(Count, directions=directions)
    expect(Count | None, budget=budget)
    expect(Positive, rtol=rtol)
    expect(int, seed=seed)
    estimator = Contrastive() if estimator is None else estimator
    directions = min(directions, sum(m.numel() for m in meta_params.values()))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        result = meta_gradient(problem, params, meta_params, solver=solver, estimator=estimator)
        if budget is None:
            budget = max(10 * result.gradient_evaluations, LEAST_BUDGET)
        if progress is not None:
            announcement(result, budget, directions, progress)
        references = References(problem, result, meta_params, solver, seed, budget)
        units, along = [], []
        for unit in references.units(directions):
            if along and references.spent >= budget:
                break
            units.append(unit)
            along.append(references.along(unit))
        check, vectors, read = _judge(result, references, units, along, rtol)
        if check.passed:
            return check
        halved = references.halved(estimator, solver, params)
        half = None if halved is None else ratio(read(halved) - vectors.truth, vectors.truth)
        evidence = Evidence(
            check=check,
            estimator=estimator,
            reference=references.phase,
            faults=local_faults(problem, result.params, meta_params, seed),
            vectors=vectors,
            half_beta=half,
        )
    return replace(check, advice=tuple(advice(evidence)), spent=references.spent)


def _judge(
    result: MetaGradient,
    references: References,
    units: list[Params],
    along: list[Direction],
    rtol: float,
) -> tuple[Check, Vectors, Callable[[Params], Tensor]]:
    """Choose the reference, and compare the estimate with it."""
    resolved = torch.tensor([d.reference for d in along], dtype=torch.float64)
    spread = torch.tensor([d.uncertainty for d in along], dtype=torch.float64)

    def project(grads: Params) -> Tensor:
        return torch.stack([flat(grads).dot(flat(unit)) for unit in units])

    exact = references.exact()
    read, truth, uncertainty = project, resolved, ratio(spread, resolved)
    said, unseen = "", False
    if exact is not None:
        apart = ratio(project(exact) - resolved, resolved)
        unseen = apart > max(rtol, 10 * uncertainty)
        if unseen:
            said = f"not the exact solve, which differs by {apart:.0%}, but "
        else:
            read, truth, uncertainty = flat, flat(exact), apart
            said = f"exact solve for all {truth.numel()} meta-parameters, and "
    said += f"central differences along {len(units)} directions; {references.phase}"
    estimate = read(result.grads)
    scale = torch.finfo(next(iter(result.grads.values())).dtype).eps ** 0.5 * max(
        abs(result.outer_loss), torch.finfo(torch.float64).tiny
    )
    zero = max(estimate.norm().item(), truth.norm().item()) <= scale / max(
        1.0, flat(references.meta_params).norm().item()
    )
    check = Check(
        result,
        tuple(along),
        0.0 if zero else ratio(estimate - truth, truth),
        1.0 if zero else (estimate.dot(truth) / (estimate.norm() * truth.norm())).item(),
        0.0 if zero else uncertainty,
        said
        + "; the gradient is zero up to rounding" * zero
        + "; the budget is spent" * (references.spent >= references.budget),
        references.settled,
        references.settled and not references.leaves(),
        (),
        rtol,
        references.spent,
    )
    return check, Vectors(estimate, truth, read(references.direct()), unseen), read
