import math

import pytest
import torch

import equigrad as eg
from equigrad.solvers import settle
from equigrad.solvers.lbfgs import search
from equigrad.testing import CASES
from helpers import small_network


def minimise(function, start, **options):
    """Settle a plain function of one tensor."""

    def loss(params, step):
        return function(params["x"])

    def velocity(params, step):
        with torch.enable_grad():
            x = params["x"].detach().requires_grad_()
            value = function(x)
            return (-torch.autograd.grad(value, x)[0],), value.detach

    return settle(velocity, loss, {"x": start}, eg.LBFGS(**options))


def test_rosenbrock():
    def rosenbrock(x):
        return (100 * (x[1:] - x[:-1].square()).square() + (1 - x[:-1]).square()).sum()

    start = torch.tensor([-1.2, 1.0, -0.5, 2.0], dtype=torch.float64)
    settled = minimise(rosenbrock, start, tol=1e-10, max_steps=200)
    assert settled.phase.outcome == "converged"
    torch.testing.assert_close(settled.params["x"], torch.ones(4, dtype=torch.float64))


def test_a_badly_scaled_quadratic_takes_few_steps():
    h = torch.tensor([1.0, 3.0, 10.0, 30.0, 100.0], dtype=torch.float64)
    settled = minimise(lambda x: 0.5 * (h * x * x).sum(), torch.ones(5).double(), tol=1e-12)
    assert settled.phase.outcome == "converged"
    assert (
        settled.phase.steps <= 25
    )  # gradient descent at 1/L would take log(1e-14)/log(0.99) = 3200


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("build", CASES, ids=lambda build: build.__name__)
def test_settles_to_what_the_dtype_allows(build, dtype):
    """Line searches on the loss alone stall near the square root of that."""
    case = build(dtype)
    result = eg.meta_gradient(
        case.problem,
        case.params,
        case.meta_params,
        solver=eg.LBFGS(tol=1e-12 if dtype == torch.float64 else 2e-6, max_steps=100),
        estimator=eg.ConjugateGradient(tol=1e-9 if dtype == torch.float64 else 1e-5),
    )
    assert result.phases[0].outcome == "converged"
    assert case.relative_error(result.grads) < (1e-8 if dtype == torch.float64 else 1e-4)


def test_same_minimum_as_gradient_descent_in_fewer_gradients():
    problem, synapse = small_network()
    found = {}
    for solver in (
        eg.GradientDescent(lr=0.1, momentum=0.95, nesterov=True, tol=1e-9, max_steps=30000),
        eg.LBFGS(tol=1e-9),
    ):
        result = eg.meta_gradient(
            problem, synapse.params(), synapse.meta_params(), solver=solver, estimator=eg.T1T2()
        )
        assert result.phases[0].outcome == "converged"
        found[type(solver)] = result
    descent, lbfgs = found[eg.GradientDescent], found[eg.LBFGS]
    assert lbfgs.outer_loss == pytest.approx(descent.outer_loss, rel=1e-6)
    assert lbfgs.gradient_evaluations < 0.4 * descent.gradient_evaluations


def test_a_loss_that_is_infinite_beyond_a_wall():
    settled = minimise(
        lambda x: (x - x.log()).sum(), torch.full((3,), 1e-3, dtype=torch.float64), tol=1e-9
    )
    torch.testing.assert_close(settled.params["x"], torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("flatter", [0.1, 0.5, 0.9])
def test_search_accepts_only_a_flatter_slope_without_a_rise(flatter):
    tried = []

    def along(t):  # a parabola with its minimum at 0.01, far below the first step
        tried.append(t)
        return (t - 0.01) ** 2, 2 * (t - 0.01)

    value = search(along, 1e-4, -0.02, first=1.0, rise=0.0, evaluations=30, flatter=flatter)
    assert value is not None
    assert value < 1e-4
    slopes = [abs(2 * (t - 0.01)) for t in tried]
    assert [slope <= flatter * 0.02 for slope in slopes] == [False] * (len(tried) - 1) + [True]
    assert math.isfinite(value)


def test_search_gives_up_where_every_step_rises():
    left = []
    assert search(lambda t: (left.append(t) or 1 + t, 1.0), 0.0, -1.0, 1.0, 0.0, 8) is None
    assert left[-1] == 0.0  # the parameters are back where they were


@pytest.mark.parametrize("options", [{"history": 0}, {"max_evaluations": 0}])
def test_bad_options(options):
    with pytest.raises(eg.ConfigurationError, match=r"must be a whole number of at least 1, got 0"):
        eg.LBFGS(**options)


def test_at_rest_nothing_moves():
    """A matched phase starts where the free one rests, and runs its steps there."""
    case_problem = eg.Bilevel(
        lambda p, m: (p["w"] - m["c"]).square().sum(), lambda p, m: (p["w"] - 3).square().sum()
    )
    result = eg.meta_gradient(
        case_problem,
        {"w": torch.ones(1, dtype=torch.float64)},
        {"c": torch.zeros(1, dtype=torch.float64)},
        solver=eg.LBFGS(tol=1e-8),
        estimator=eg.Contrastive(beta=1e-4, scheme="symmetric"),
    )
    assert result.grads["c"].item() == pytest.approx(-6)
    matched = eg.meta_gradient(
        case_problem,
        {"w": torch.zeros(1, dtype=torch.float64)},
        {"c": torch.zeros(1, dtype=torch.float64)},
        solver=eg.LBFGS(tol=1e-8),
        estimator=eg.Contrastive(beta=1e-4),
    )
    assert matched.grads["c"].item() == pytest.approx(-6, rel=1e-3)


def test_a_tolerance_below_rounding_ends_as_stalled():
    settled = minimise(lambda x: (x.cosh() + 0.1 * x).sum(), torch.ones(5), tol=1e-12)
    assert settled.phase.outcome in ("stalled", "converged")
    assert settled.phase.steps < 100


def test_mini_batches_are_refused():
    problem = eg.Bilevel(
        lambda p, m, b: (p["w"] - m["c"] - b).square().sum(),
        lambda p, m: p["w"].sum(),
        inner_batches=[0.0, 1.0],
    )
    with pytest.raises(
        eg.ConfigurationError, match=r"LBFGS needs the same loss at every evaluation"
    ):
        eg.meta_gradient(
            problem, {"w": torch.ones(1)}, {"c": torch.ones(1)}, solver=eg.LBFGS(tol=1e-3)
        )


@pytest.mark.parametrize("build", CASES, ids=lambda build: build.__name__)
def test_a_tolerance_below_what_float32_resolves_ends_soon(build):
    case = build(torch.float32)
    result = eg.meta_gradient(
        case.problem,
        case.params,
        case.meta_params,
        solver=eg.LBFGS(tol=1e-12),
        estimator=eg.FiniteDifferenceT1T2(),
    )
    phase = result.phases[0]
    assert phase.outcome == "stalled" or phase.residual == 0
    assert phase.residual < 1e-6
    assert result.gradient_evaluations < 1000  # 20 a line search, for 30 iterations at the floor


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_params_of_sixteen_bits(dtype):
    """Matrix factorisations have none; the moves do."""
    curvature = torch.tensor([1.0, 3.0, 0.5, 2.0], dtype=dtype)
    settled = minimise(
        lambda x: 0.5 * (curvature * (x - 1).square()).sum(),
        torch.zeros(4, dtype=dtype),
        tol=0.02,
        max_steps=50,
    )
    assert settled.phase.outcome == "converged"
    assert settled.params["x"].dtype == dtype
    assert (settled.params["x"] - 1).abs().max() < 0.05
