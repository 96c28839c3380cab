"""What an implicit estimator says of a free phase that is not at rest."""

from typing import cast

import pytest
import torch

import equigrad as eg
from equigrad.estimators.solve_error import Linear, Solution, Solved, solve_error
from equigrad.testing import Quadratic, zoo
from equigrad.testing.hard_zoo import HARD_ZOO

SLOW = "convolution", "lstm", "transformer", "deep-tanh", "softmax"
ZOO = {**{n: b for n, b in zoo.ZOO.items() if n not in SLOW}, **HARD_ZOO}
ESTIMATORS = [
    eg.ConjugateGradient(),
    eg.ExactSolve(),
    eg.GMRES(),
    eg.Adjoint(solver=eg.Anderson(max_steps=200)),
]
LOOSE = [
    eg.LBFGS(tol=1e-2),
    eg.LBFGS(tol=1e-3),
    eg.LBFGS(tol=1e-5),
    eg.GradientDescent(lr=0.05, momentum=0.9, max_steps=100),
]


@pytest.fixture(scope="module")
def cases():
    return {name: build() for name, build in ZOO.items()}


@pytest.mark.parametrize("solver", LOOSE, ids=["1e-2", "1e-3", "1e-5", "descent"])
def test_on_the_zoo_a_learner_that_stopped_early_is_told_from_one_at_rest(solver, cases):
    """The error is never more than four times the estimate, of whatever size it is."""
    judged = 0
    for name, case in cases.items():
        given = case.problem, case.params, case.meta_params
        try:
            settled = eg.settle(*given, solver=solver)
        except eg.SettlingError:  # descent in small units
            continue
        for estimator in ESTIMATORS:
            try:
                found = eg.meta_gradient(
                    *given, solver=solver, estimator=estimator, settled=settled
                )
            except (eg.CurvatureError, eg.SettlingError):
                continue
            wrong = min(case.relative_error(found.grads), 1.0)
            assert found.error_estimate is not None
            assert wrong <= max(4 * found.error_estimate, 1e-5), (name, estimator)
            assert wrong < 0.04 or "wrong by" in found.status, (name, estimator)
            judged += 1
    assert judged > 50


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("steps", [20, 60])
def test_on_a_quadratic_it_is_the_error_itself(estimator, steps):
    """The residual is linear in φ there, so that Newton's step ends at the minimum."""
    q = Quadratic(strength=0.1)
    found = eg.meta_gradient(
        q.problem, q.params(), q.meta_params(), solver=q.solver(steps), estimator=estimator
    )
    (grad,) = found.grads.values()
    wrong = q.relative_error(grad)
    assert wrong > 1e-6
    assert found.error_estimate == pytest.approx(wrong, rel=0.5)


def pulled(mean, **options):
    """A mean of squares over four batches, whose minimum is the mean of their targets."""
    batches = [torch.full((3,), float(k)).double() for k in range(4)]
    return eg.Bilevel(
        lambda p, m, b: 0.5 * (p["w"] - b * m["scale"]).square().sum(),
        lambda p, m: 0.25 * (p["w"] - mean).pow(4).sum(),
        inner_batches=batches,
        **options,
    )


@pytest.mark.parametrize("products", ["autograd", "contrast"])
def test_with_several_batches_and_by_contrast(products):
    given = pulled(5.0), {"w": torch.zeros(3).double()}, {"scale": torch.tensor(1.0).double()}
    found = eg.meta_gradient(
        *given,
        solver=eg.GradientDescent(lr=0.05, max_steps=80),
        estimator=eg.ConjugateGradient(products=products),
    )
    # w = 1.5 scale, and the gradient is 3 · 1.5 (1.5 - 5)³
    exact = 3 * 1.5 * (1.5 - 5) ** 3
    wrong = abs(found.grads["scale"].item() / exact - 1)
    assert wrong > 1e-3
    assert found.error_estimate == pytest.approx(wrong, rel=0.2)


def test_at_rest_it_costs_two_gradients_as_before():
    q = Quadratic(strength=1.0)
    start = {n: p.clone() for n, p in q.params().items()}
    settled = eg.settle(q.problem, start, q.meta_params(), solver=q.solver(4000))
    found = eg.meta_gradient(
        q.problem,
        start,
        q.meta_params(),
        solver=q.solver(4000),
        estimator=eg.ExactSolve(),
        settled=settled,
    )
    assert found.error_estimate is not None
    assert found.error_estimate < 1e-12


ENDLESS = {
    "exponential": lambda p, m: torch.exp(-m["a"] * p["w"]).sum(),
    "logistic": lambda p, m: torch.nn.functional.softplus(-3 * m["a"] * p["w"]).sum(),
    "logarithm": lambda p, m: -(m["a"] * torch.log(p["w"] + 1)).sum(),
    "tanh": lambda p, m: torch.tanh(m["a"] * p["w"]).sum(),
}


@pytest.mark.parametrize(
    "estimator", [*ESTIMATORS, eg.Contrastive()], ids=lambda e: type(e).__name__
)
@pytest.mark.parametrize("name", ENDLESS)
def test_a_loss_without_a_minimum_is_named_though_its_gradient_vanishes(name, estimator):
    """L-BFGS converges: the gradient falls below any tolerance on the way to infinity."""
    given = {"w": torch.full((3,), 0.5).double()}, {"a": torch.tensor([1.0, 1.5, 2.0]).double()}
    problem = eg.Bilevel(ENDLESS[name], lambda p, m: (p["w"] - 2).square().sum())
    try:
        found = eg.meta_gradient(
            problem, *given, solver=eg.LBFGS(tol=1e-6, max_steps=50), estimator=estimator
        )
    except eg.CurvatureError:
        return
    assert found.phases[0].outcome == "converged"
    assert found.error_estimate is not None
    assert found.error_estimate > 0.01
    assert "wrong by" in found.status or "estimated error" in found.status


def test_a_residual_that_the_mixed_derivative_does_not_see_is_looked_into():
    """It acts on θ through the inverse: a product with the residual itself is zero."""
    matrix = torch.tensor([[1.0, 0.9], [0.9, 1.0]]).double()
    mixed = torch.tensor([[1.0, 0.0]]).double()

    class System:
        size = 2

        def product(self, x):
            return matrix @ x

        def mixed(self, x):
            return {"theta": mixed @ x}

    x = torch.tensor([1.0, 0.0]).double()
    left = torch.tensor([0.0, 0.01]).double()
    exact = mixed @ (x + torch.linalg.solve(matrix, left))
    grads = {"theta": -(mixed @ x)}
    pressure = matrix @ x + left
    system = cast("Linear", System())
    solved = Solved(system, Solution(x), pressure, System().mixed(x), grads)
    true = ((grads["theta"] + exact).norm() / exact.norm()).item()
    assert solve_error(solved).relative == pytest.approx(true)


@pytest.mark.parametrize("tol", [None, 1e-3])
@pytest.mark.parametrize("estimator", ESTIMATORS[:3], ids=lambda e: type(e).__name__)
def test_a_phase_that_led_away_from_rest_has_no_accuracy(estimator, tol):
    """φ is then so large that a step of Newton's method is rounding beside it."""
    case = HARD_ZOO["mixed-units"]()
    found = eg.meta_gradient(
        case.problem,
        case.params,
        case.meta_params,
        solver=eg.Picard(max_steps=30, tol=tol),
        estimator=estimator,
    )
    assert case.relative_error(found.grads) > 1e3
    assert found.error_estimate is not None
    assert found.error_estimate >= 1
    assert "wrong by its own size or more" in found.status
