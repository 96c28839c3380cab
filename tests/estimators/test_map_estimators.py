"""Adjoint and PhantomGradient: what they compute, and what they say where they fall short."""

from typing import Any, cast

import pytest
import torch

import equigrad as eg
from equigrad.testing import affine_map_case, quadratic_case, tanh_map_case


def grads(case, estimator, solver=None):
    result = eg.meta_gradient(
        case.problem,
        case.params,
        case.meta_params,
        solver=solver or case.solver,
        estimator=estimator,
    )
    return torch.cat([g.flatten() for g in result.grads.values()]), result


@pytest.mark.parametrize("build", [affine_map_case, tanh_map_case, quadratic_case])
@pytest.mark.parametrize(("steps", "damping"), [(1, 1.0), (3, 0.3), (8, 0.2)])
def test_phantom_steps_at_rest_are_neumann_terms(build, steps, damping):
    case = build(torch.float64)
    phantom, _ = grads(case, eg.PhantomGradient(steps=steps, damping=damping))
    series, _ = grads(case, eg.NeumannSeries(terms=steps, alpha=damping, tol=9))
    torch.testing.assert_close(phantom, series, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("build", [affine_map_case, tanh_map_case, quadratic_case])
@pytest.mark.parametrize("solver", [eg.Picard(max_steps=3), eg.Picard(tol=1e-2), None])
@pytest.mark.parametrize("steps", [1, 5, 20])
def test_phantom_gradients_estimate_what_the_steps_and_the_free_phase_leave(build, solver, steps):
    """The error against the exact gradient at rest."""
    case = build(torch.float64)
    _, result = grads(case, eg.PhantomGradient(steps=steps), solver)
    wrong = case.relative_error(result.grads)
    assert result.error_estimate is not None
    assert wrong <= max(3 * result.error_estimate, 1e-7)
    assert result.error_estimate <= max(10 * wrong, 1e-5)
    assert ("wrong by" in result.status) == (result.error_estimate > 0.01)


def test_phantom_gradients_away_from_rest_are_of_the_steps_they_take():
    """Two steps short of rest: the derivative of `L(φ_k(θ))` with φ_0 held, by differences."""
    case, estimator = tanh_map_case(torch.float64), eg.PhantomGradient(steps=3, damping=0.7)
    early = eg.Picard(max_steps=2)
    found, result = grads(case, estimator, early)

    def loss(theta):
        params = result.params
        for _ in range(3):
            image = case.problem.function("inner")(params, {"theta": theta})
            params = {n: 0.3 * p + 0.7 * image[n] for n, p in params.items()}
        return case.problem.outer_loss(params, {"theta": theta})

    expected = torch.autograd.functional.jacobian(loss, case.meta_params["theta"])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    series, _ = grads(case, eg.NeumannSeries(terms=3, alpha=0.7, tol=9), early)
    assert (found - series).norm() > 0.01 * series.norm()


@pytest.mark.parametrize("solver", [eg.Picard, eg.Anderson, eg.Broyden])
def test_the_adjoint_is_exact_and_its_error_follows_its_tolerance(solver):
    case, errors = tanh_map_case(torch.float64), []
    exact = torch.cat([g.flatten() for g in case.exact.values()])
    for tol in (1e-2, 1e-6, 1e-10):
        found, result = grads(case, eg.Adjoint(solver=solver(tol=tol, max_steps=500)))
        assert "adjoint" not in result.status
        errors.append(((found - exact).norm() / exact.norm()).item())
    assert errors[0] < 0.1
    assert errors[1] < 1e-5
    assert errors[2] < 1e-9


def test_an_adjoint_of_k_picard_steps_is_recurrent_backpropagation():
    """`x ← Jᵀx + g` from g: K steps are K + 1 Neumann terms."""
    case = affine_map_case(torch.float64)
    series, _ = grads(case, eg.NeumannSeries(terms=4, tol=9))
    found, _ = grads(case, eg.Adjoint(solver=eg.Picard(max_steps=3)))
    torch.testing.assert_close(found, series, rtol=1e-9, atol=1e-11)


def test_an_adjoint_that_has_not_settled_is_named():
    case = tanh_map_case(torch.float64)
    _, result = grads(case, eg.Adjoint(solver=eg.Picard(tol=1e-9, max_steps=3)))
    assert (
        "the adjoint has not converged (residuals relative to ∂L_out/∂φ): not converged"
        in result.status
    )


def test_an_adjoint_that_diverges_names_those_that_do_not():
    problem = eg.FixedPoint(
        lambda p, m: {"h": 2 * p["h"] + m["c"]}, lambda p, m: p["h"].square().sum()
    )
    settled, meta = {"h": torch.full((2,), -1.0)}, {"c": torch.ones(2)}
    still = eg.Picard(max_steps=1)
    diverging = eg.Adjoint(solver=eg.Picard(tol=1e-6, max_steps=1000))
    with pytest.raises(eg.CurvatureError, match=r"is not a contraction.*GMRES\(\), or Adjoint"):
        eg.meta_gradient(problem, settled, meta, solver=still, estimator=diverging)
    newton = eg.Adjoint(solver=eg.Broyden(tol=1e-6))
    result = eg.meta_gradient(problem, settled, meta, solver=still, estimator=newton)
    torch.testing.assert_close(result.grads["c"], torch.full((2,), 2.0))  # φ* = -θ


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: eg.PhantomGradient(steps=0), "steps must be a whole number of at least 1.* got 0"),
        (
            lambda: eg.PhantomGradient(damping=0),
            r"damping must be a finite number in \(0, 1\], got 0",
        ),
        (lambda: eg.Adjoint(solver=cast(Any, 3)), "solver must be a Solver, got 3"),
        (lambda: eg.Adjoint(solver=cast(Any, eg.Picard)), "solver must be a Solver"),
        (lambda: eg.Anderson(history=0), "history must be a whole number of at least 1"),
        (lambda: eg.Broyden(history=0), "history must be a whole number of at least 1"),
    ],
)
def test_knobs_are_checked(make, message):
    with pytest.raises(eg.ConfigurationError, match=message):
        make()
