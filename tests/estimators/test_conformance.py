"""Every estimator against problems with known gradients, and against each other."""

import re

import pytest
import torch

import equigrad as eg
from equigrad.estimators import ESTIMATORS
from equigrad.testing import (
    ALL_CASES,
    CASES,
    affine_map_case,
    check_estimator,
    proximal_case,
    quadratic_case,
    scalar_case,
    start_case,
    tanh_map_case,
)
from helpers import small_network

SYMMETRIC = eg.Contrastive(beta=1e-3, scheme="symmetric", points=4)
EXACT = {
    "contrastive": (SYMMETRIC, 1e-7),
    "conjugate gradient": (eg.ConjugateGradient(tol=1e-12), 1e-9),
    "neumann": (eg.NeumannSeries(terms=3000), 1e-9),
    "nystrom": (eg.Nystrom(rank=100, damping=1e-9), 1e-6),
    "exact": (eg.ExactSolve(), 1e-9),
    "gmres": (eg.GMRES(tol=1e-12), 1e-9),
    "adjoint": (eg.Adjoint(solver=eg.Broyden(tol=1e-12, max_steps=1000)), 1e-9),
    "least control": (
        eg.LeastControl(controller=eg.DynamicInversion(gain=1e-9, leak=1.0)),
        1e-7,  # weak control, whose error is of first order in its strength
    ),
    "unrolled": (eg.Unrolled(), 1e-8),
    "unrolled in segments": (eg.Unrolled(segment=20), 1e-8),
    "maml": (eg.MAML(), 1e-12),
}
IDENTITY = {
    "t1t2": (eg.T1T2(), 1e-9),
    "phantom gradient": (eg.PhantomGradient(steps=1, damping=1), 1e-9),
    "finite difference t1t2": (eg.FiniteDifferenceT1T2(distance=1e-4), 1e-6),
    "first-order maml": (eg.FirstOrderMAML(), 1e-9),
    "reptile": (eg.Reptile(), 1e-9),
}
ON_ITS_OWN = {
    "imaml": (eg.IMAML(), 1e-9, (proximal_case,)),
    "evolution strategies": (
        eg.EvolutionStrategies(pairs=1000, sigma=1e-3),
        0.21,  # three times √((dim θ + 1) / n)
        (start_case,),
    ),
    "forward mode": (
        eg.ForwardMode(),
        1e-8,
        (scalar_case, affine_map_case, tanh_map_case, start_case),
    ),
}


def test_every_estimator_is_held_to_the_suite():
    suites = [*EXACT.values(), *IDENTITY.values(), *ON_ITS_OWN.values()]
    held = {type(estimator) for estimator, *_ in suites}
    assert held == set(ESTIMATORS)


@pytest.mark.parametrize("name", EXACT)
def test_exact_estimators_in_float64(name):
    estimator, rtol = EXACT[name]
    check_estimator(estimator, rtol=rtol)


@pytest.mark.parametrize("name", ON_ITS_OWN)
def test_estimators_that_have_cases_of_their_own(name):
    estimator, rtol, cases = ON_ITS_OWN[name]
    errors = check_estimator(estimator, rtol=rtol, cases=cases)
    assert len(errors) == len(cases)


def test_traits_decide_what_an_estimator_is_held_to():
    names = {build(torch.float64).name for build in ALL_CASES}
    assert set(check_estimator(eg.GMRES(tol=1e-12), rtol=1e-9)) == names - {"start"}
    assert set(check_estimator(eg.MAML(), rtol=1e-9)) == {"start"}
    losses = {build(torch.float64).name for build in CASES}
    assert set(check_estimator(SYMMETRIC, rtol=1e-7)) == losses | {"Hopfield network"}
    assert set(check_estimator(eg.ConjugateGradient(tol=1e-12), rtol=1e-7)) == losses


@pytest.mark.parametrize(
    "estimator",
    [
        eg.Contrastive(beta=0.05, scheme="symmetric", points=4),
        eg.ConjugateGradient(),
        eg.NeumannSeries(terms=1000),
        eg.ExactSolve(),
        eg.GMRES(),
        eg.Unrolled(),
    ],
)
def test_exact_estimators_in_float32(estimator):
    check_estimator(estimator, rtol=3e-3, dtype=torch.float32)


@pytest.mark.parametrize("name", IDENTITY)
def test_estimators_that_take_the_hessian_for_the_identity(name):
    estimator, rtol = IDENTITY[name]
    errors = check_estimator(estimator, rtol=rtol, exact=False)
    assert max(errors.values()) > 0.1  # elsewhere they are biased, as the table says


def test_the_suite_catches_a_factor_of_two_and_a_dropped_term():
    class Half(eg.ExactSolve):
        def estimate(self, evaluation, solver):
            whole = super().estimate(evaluation, solver)
            for grad in whole.grads.values():
                grad.mul_(0.5)
            return whole

    with pytest.raises(AssertionError, match=r"error 5\.00e-01"):
        check_estimator(Half(), rtol=0.1)

    class WithoutDirectTerm(eg.ExactSolve):
        def estimate(self, evaluation, solver):
            whole = super().estimate(evaluation, solver)
            _, direct = evaluation.outer_gradients(whole.phases[0])
            for name, grad in whole.grads.items():
                grad.sub_(direct[name])
            return whole

    with pytest.raises(AssertionError, match="direct term"):
        check_estimator(WithoutDirectTerm(), rtol=0.1)


def settled(case, estimator):
    return eg.meta_gradient(
        case.problem, case.params, case.meta_params, solver=case.solver, estimator=estimator
    ).grads


@pytest.mark.parametrize("build", CASES, ids=lambda build: build.__name__)
@pytest.mark.parametrize("terms", [1, 4])
def test_nudged_steps_are_neumann_terms(build, terms):
    """K matched gradient steps of size η from equilibrium, β → 0, are K terms with α = η."""
    case, eta = build(torch.float64), 0.3
    steps = eg.GradientDescent(lr=eta, max_steps=terms)
    nudged = eg.Contrastive(
        beta=1e-4, scheme="symmetric", points=4, nudged_solver=steps, momentum="reset"
    )
    contrast = settled(case, nudged)
    series = settled(case, eg.NeumannSeries(terms=terms, alpha=eta))
    for name in series:
        torch.testing.assert_close(contrast[name], series[name], rtol=1e-6, atol=1e-10)


def test_one_symmetric_step_is_lr_times_finite_difference_t1t2_exactly():
    """For a finite β: both evaluate ∂θL_in at φ ± ηβ ∂L_out."""
    case, eta, beta = quadratic_case(torch.float64), 0.25, 0.3
    contrast = settled(
        case,
        eg.Contrastive(
            beta=beta,
            scheme="symmetric",
            nudged_solver=eg.GradientDescent(lr=eta, max_steps=1),
            momentum="reset",
        ),
    )
    phi = eg.meta_gradient(
        case.problem, case.params, case.meta_params, solver=case.solver, estimator=eg.T1T2()
    ).params["phi"]
    pressure = torch.autograd.functional.jacobian(
        lambda p: case.problem.outer_loss({"phi": p}, {}), phi
    )
    size = torch.linalg.vector_norm(pressure).item()
    difference = settled(case, eg.FiniteDifferenceT1T2(distance=eta * beta * size))
    torch.testing.assert_close(contrast["theta"], eta * difference["theta"], rtol=1e-9, atol=1e-12)


def test_conjugate_gradient_at_full_rank_equals_the_exact_solve_on_a_network():
    problem, synapse = small_network()
    solver = eg.GradientDescent(lr=0.1, momentum=0.95, nesterov=True, tol=1e-10, max_steps=30000)
    grads = [
        eg.meta_gradient(
            problem, synapse.params(), synapse.meta_params(), solver=solver, estimator=estimator
        ).grads
        for estimator in (eg.ConjugateGradient(tol=1e-12, max_iterations=500), eg.ExactSolve())
    ]
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], rtol=1e-7, atol=1e-12)


def test_mini_batches_give_the_gradient_of_their_mean():
    """Two batches of equal size against the whole, for the estimators that differentiate twice."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(8, generator=generator, dtype=torch.float64)

    def inner(p, m, rows=slice(None)):
        fit = (x[rows] @ p["w"] - y[rows]).square().mean()
        return fit + m["rho"].exp() * p["w"].square().sum()

    def outer(p, m, rows=slice(None)):
        return (x[rows] @ p["w"] + y[rows]).square().mean()

    halves = [slice(0, 4), slice(4, 8)]
    whole = eg.Bilevel(inner, outer)
    batched = eg.Bilevel(inner, outer, inner_batches=halves, outer_batches=halves)
    solver = eg.GradientDescent(lr=0.05, tol=1e-12, max_steps=3000)
    meta = {"rho": torch.tensor(0.0, dtype=torch.float64)}
    start = {"w": torch.zeros(3, dtype=torch.float64)}
    settled_at = eg.meta_gradient(whole, start, meta, solver=solver, estimator=eg.T1T2()).params
    still = eg.GradientDescent(lr=1e-300, max_steps=1)  # both look from the same state
    for estimator in (eg.ConjugateGradient(tol=1e-12), eg.T1T2(), eg.FiniteDifferenceT1T2()):
        one, other = (
            eg.meta_gradient(problem, settled_at, meta, solver=still, estimator=estimator)
            for problem in (whole, batched)
        )
        torch.testing.assert_close(one.grads["rho"], other.grads["rho"], rtol=1e-9, atol=1e-12)
        assert one.outer_loss == pytest.approx(other.outer_loss)


# What cannot work is named


def saddle():
    return eg.Bilevel(
        lambda p, m: (p["w"][0] - m["c"]).square() - 0.1 * p["w"][1].square(),
        lambda p, m: p["w"].sum(),
    )


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (
            eg.ConjugateGradient(),
            r"curvature \(-?0\.\d+\) at iteration \d.*not a strict minimum.*Unrolled",
        ),
        (
            eg.ConjugateGradient(products="contrast"),
            r"curvature \(-?0\.\d+\) at iteration \d.*not a strict minimum.*Unrolled",
        ),
        (eg.NeumannSeries(), "diverges.*settle longer"),
        (eg.NeumannSeries(alpha=5.0), "diverges.*alpha=5.*Lower alpha"),
    ],
)
def test_indefinite_hessian(estimator, message):
    with pytest.raises(eg.CurvatureError, match=message):
        eg.meta_gradient(
            saddle(),
            {"w": torch.zeros(2, dtype=torch.float64)},
            {"c": torch.tensor(1.0, dtype=torch.float64)},
            solver=eg.GradientDescent(lr=0.1, max_steps=50),
            estimator=estimator,
        )


@pytest.mark.parametrize("estimator", [eg.ExactSolve(), eg.ConjugateGradient(), eg.GMRES()])
def test_flat_direction(estimator):
    problem = eg.Bilevel(
        lambda p, m: (p["w"][0] - m["c"]).square() + 0 * p["w"][1], lambda p, m: p["w"].sum()
    )
    with pytest.raises(eg.CurvatureError, match=r"singular|curvature \(0\) "):
        eg.meta_gradient(
            problem,
            {"w": torch.zeros(2)},
            {"c": torch.tensor(1.0)},
            solver=eg.GradientDescent(lr=0.1, max_steps=50),
            estimator=estimator,
        )


@pytest.mark.parametrize(
    ("estimator", "words"),
    [
        (eg.ConjugateGradient(max_iterations=2), "conjugate gradients did not converge"),
        (eg.NeumannSeries(terms=2), "Neumann series did not converge"),
        (eg.GMRES(max_iterations=2), "GMRES did not converge.*after 2 iterations"),
    ],
)
def test_too_few_iterations_are_named(estimator, words):
    case = quadratic_case(torch.float64)
    result = eg.meta_gradient(
        case.problem, case.params, case.meta_params, solver=case.solver, estimator=estimator
    )
    assert re.search(words, result.status)


def test_a_hessian_too_large_to_form():
    case = quadratic_case(torch.float64)
    with pytest.raises(eg.ConfigurationError, match=r"12 × 12 matrix.*max_size=5"):
        settled(case, eg.ExactSolve(max_size=5))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: eg.ConjugateGradient(max_iterations=0), "max_iterations"),
        (
            lambda: eg.ConjugateGradient(damping=-1.0),
            "damping must be a finite number of at least 0, got -1",
        ),
        (lambda: eg.ConjugateGradient(tol=0.0), "tol must be a finite number above 0"),
        (lambda: eg.NeumannSeries(terms=0), "terms must be a whole number of at least 1"),
        (
            lambda: eg.NeumannSeries(alpha=0.0),
            "alpha must be a finite number above 0, or None, got 0",
        ),
        (lambda: eg.Nystrom(rank=0), "rank must be a whole number of at least 1"),
        (lambda: eg.Nystrom(damping=0.0), "damping must be a finite number above 0"),
        (lambda: eg.ExactSolve(max_size=0), "max_size must be a whole number of at least 1"),
        (lambda: eg.FiniteDifferenceT1T2(distance=0.0), "distance must be a finite number above 0"),
        (lambda: eg.GMRES(restart=0), "restart must be a whole number of at least 1.* got 0"),
        (lambda: eg.GMRES(max_iterations=0), "max_iterations"),
        (lambda: eg.Unrolled(truncation=0), "truncation must be a whole number of at least 1, or"),
        (
            lambda: eg.Unrolled(segment=2.5),  # pyright: ignore
            "segment must be a whole number of at least 1, or None, got 2.5",
        ),
        (lambda: eg.ForwardMode(max_size=0), "max_size must be a whole number of at least 1"),
        (
            lambda: eg.EvolutionStrategies(pairs=0),
            "pairs must be a whole number of at least 1, got 0",
        ),
        (lambda: eg.EvolutionStrategies(sigma=0.0), "sigma must be a finite number above 0, got 0"),
    ],
)
def test_knobs_that_cannot_work(make, message):
    with pytest.raises(eg.ConfigurationError, match=message):
        make()
