"""The conformance suite, which tests an estimator on problems with known gradients."""

from collections.abc import Callable, Sequence

import torch

from equigrad.estimators import Estimator
from equigrad.gradient import meta_gradient
from equigrad.testing.cases import ALL_CASES, Case


def check_estimator(
    estimator: Estimator,
    *,
    rtol: float,
    dtype: torch.dtype = torch.float64,
    exact: bool = True,
    cases: Sequence[Callable[[torch.dtype], Case]] = ALL_CASES,
) -> dict[str, float]:
    """Test an estimator on all problems with known gradients that fit its traits.

    Args:
        estimator: the estimator, with settings that should reach `rtol`.
        rtol: relative error allowed on every problem.
        dtype: dtype of all tensors.
        exact: False for an estimator that takes the inner Hessian to be the identity: it must be
            accurate on problems where this is true, and give finite, non-zero gradients on others.
        cases: the problems.

    Returns:
        The relative error on every problem, by name.

    Raises:
        AssertionError: an error is above `rtol`; the message names the problem.

    Example:
        >>> import equigrad as eg
        >>> errors = check_estimator(eg.ConjugateGradient(tol=1e-10), rtol=1e-7)
        >>> sorted(errors)[0]
        'identity Hessian, direct term'
    """
    errors = {}
    for build in cases:
        case = build(dtype)
        if not case.suits(estimator.traits):
            continue
        result = meta_gradient(
            case.problem, case.params, case.meta_params, solver=case.solver, estimator=estimator
        )
        ended = "stopped" if case.start else "converged"
        assert result.phases[0].outcome == ended, f"{case.name}: {result.status}"
        for name, grad in result.grads.items():
            given = case.meta_params[name]
            assert grad.shape == given.shape, f"{case.name}: shape of {name!r}"
            assert grad.dtype == given.dtype, f"{case.name}: dtype of {name!r}"
            assert grad.any(), f"{case.name}: the gradient of {name!r} is zero"
        errors[case.name] = case.relative_error(result.grads)
        if exact or case.identity_hessian:
            assert errors[case.name] <= rtol, f"{case.name}: error {errors[case.name]:.2e} > {rtol}"
    return errors
