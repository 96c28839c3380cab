"""The error estimate that every contrastive hypergradient carries."""

import statistics

import pytest
import torch

import equigrad as eg
from equigrad.testing.quadratic import Quadratic
from equigrad.testing.zoo import ZOO

DESCENT = eg.GradientDescent(lr=0.05, momentum=0.9, nesterov=True, max_steps=100)
SOLVERS = {
    "loose": eg.LBFGS(tol=1e-4, max_steps=2000),
    "tight": eg.LBFGS(tol=1e-7, max_steps=2000),
    "100 steps": DESCENT,
}


def on_the_zoo(solver, **options):
    """True and estimated error, and status, by name of the problem."""
    found = {}
    for name, build in ZOO.items():
        case = build()
        result = eg.meta_gradient(
            case.problem,
            case.params,
            case.meta_params,
            solver=solver,
            estimator=eg.Contrastive(**options),
        )
        found[name] = case.relative_error(result.grads), result.error_estimate, result.status
    return found


@pytest.mark.parametrize("name", SOLVERS)
def test_the_default_is_right_or_named_on_the_zoo(name):
    found = on_the_zoo(SOLVERS[name])
    if name != "100 steps":
        assert statistics.median(true for true, _, _ in found.values()) < 0.01
    for problem, (true, estimated, status) in found.items():
        assert estimated > 0.3 * true, problem
        assert (estimated > 0.1) == ("estimated error" in status), problem


@pytest.mark.parametrize(
    "options",
    [
        {"scheme": "forward", "nudge": "loss", "beta": 0.1},
        {"scheme": "forward", "points": 3},
        {"nudge": "loss"},
        {"points": 4, "beta": 0.05},
    ],
    ids=str,
)
def test_other_schemes_name_what_is_wrong(options):
    """Whatever is more than a fifth wrong is named on the zoo."""
    for problem, (true, _, status) in on_the_zoo(SOLVERS["loose"], **options).items():
        assert true < 0.2 or "estimated error" in status, problem


def test_a_force_is_exact_where_the_inner_loss_is_quadratic():
    quadratic = Quadratic()
    result = eg.meta_gradient(
        quadratic.problem,
        quadratic.params(),
        quadratic.meta_params(),
        solver=quadratic.solver(max_steps=2000),
        estimator=eg.Contrastive(beta=1.0),
    )
    assert quadratic.relative_error(result.grads["theta"]) < 1e-8
    assert result.error_estimate is not None
    assert result.error_estimate < 1e-8


def factorisation():
    """Two factors with a common ridge: every rotation of both leaves both losses as they are."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).double()

    matrix = normal(6, 5)
    other = matrix + 0.3 * normal(6, 5)

    def misfit(p, target):
        return 0.5 * (p["u"] @ p["v"].T - target).square().mean()

    problem = eg.Bilevel(
        lambda p, m: (
            misfit(p, matrix)
            + 0.5 * m["log"].exp() * (p["u"].square().sum() + p["v"].square().sum())
        ),
        lambda p, m: misfit(p, other),
    )
    return problem, {"u": normal(6, 2), "v": normal(5, 2)}, {"log": torch.tensor(-4.0).double()}


def test_a_symmetry_that_the_losses_share_is_named_under_a_force():
    problem, params, meta = factorisation()
    solver = eg.LBFGS(tol=1e-9, max_steps=5000)

    def value(log):
        settled = eg.settle(problem, params, {"log": log}, solver=solver)
        return problem.outer_loss(settled.params, {"log": log}).item()

    exact = (value(meta["log"] + 1e-3) - value(meta["log"] - 1e-3)) / 2e-3
    force, loss = (
        eg.meta_gradient(
            problem, params, meta, solver=solver, estimator=eg.Contrastive(nudge=nudge)
        )
        for nudge in ("force", "loss")
    )
    assert abs(force.grads["log"].item() - exact) > 0.5 * abs(exact)
    assert "estimated error 100 % or more" in force.status
    assert "try nudge='loss'" in force.status
    assert loss.grads["log"].item() == pytest.approx(exact, rel=1e-3)
    assert loss.status.startswith("converged")
    assert "estimated error" not in loss.status


def test_both_nudged_phases_of_a_pair_settle():
    """The phase at -β is the slow one: its curvature is 0.11 - 0.1."""
    problem = eg.Bilevel(
        lambda p, m: 0.055 * (p["x"] - m["t"]).square(), lambda p, m: 0.5 * (p["x"] - 1).square()
    )
    zero = torch.zeros((), dtype=torch.float64)
    result = eg.meta_gradient(
        problem,
        {"x": zero},
        {"t": zero},
        solver=eg.GradientDescent(lr=1, tol=1e-10, max_steps=5000),
        estimator=eg.Contrastive(beta=0.1, nudge="loss"),
    )
    # φ_β = β / (0.11 + β), and ∂L/∂t = -0.11 (φ - t)
    exact = -0.11 * (0.1 / 0.21 + 0.1 / 0.01) / 0.2
    assert result.grads["t"].item() == pytest.approx(exact, rel=1e-6)
    assert "estimated error 100 % or more" in result.status  # the limit β → 0 is -1


def test_phases_of_a_pair_are_equally_long():
    case = ZOO["logistic"]()
    result = eg.meta_gradient(
        case.problem,
        case.params,
        case.meta_params,
        solver=eg.GradientDescent(lr=1.0, tol=1e-5, max_steps=10_000),
    )
    _, up, down = result.phases
    assert up.steps == down.steps
    assert {phase.outcome for phase in result.phases} == {"converged"}


def test_an_adaptive_optimiser_far_from_rest_is_told_apart():
    case = ZOO["convolution"]()
    adam = eg.TorchOptimizer(optimizer=torch.optim.Adam, options={"lr": 1e-3}, max_steps=20)
    result = eg.meta_gradient(case.problem, case.params, case.meta_params, solver=adam)
    assert result.error_estimate is not None
    assert result.error_estimate > 0.1
    assert "the free phase has not converged" in result.status
    assert "with an adaptive optimiser, the contrast is not a gradient" in result.status
    sgd = eg.TorchOptimizer(optimizer=torch.optim.SGD, options={"lr": 1e-3}, max_steps=20)
    result = eg.meta_gradient(case.problem, case.params, case.meta_params, solver=sgd)
    assert "the free phase has not converged" in result.status
    assert "adaptive" not in result.status


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_number_format_that_is_too_coarse_is_named(dtype):
    target = torch.linspace(-1, 2, 5).to(dtype)
    result = eg.meta_gradient(
        eg.Bilevel(
            lambda p, m: 0.5 * (p["x"] - m["t"]).square().sum(),
            lambda p, m: 0.5 * (p["x"] - 1).square().sum(),
        ),
        {"x": torch.zeros_like(target)},
        {"t": target},
        solver=eg.GradientDescent(lr=0.5, max_steps=100),
    )
    assert "too small for this number format" in result.status


def test_an_outer_loss_that_does_not_push_leaves_no_error():
    result = eg.meta_gradient(
        eg.Bilevel(
            lambda p, m: (p["w"] - m["c"]).square().sum(), lambda p, m: p["w"].sub(1).pow(2).sum()
        ),
        {"w": torch.ones(2, dtype=torch.float64)},
        {"c": torch.ones(2, dtype=torch.float64)},
        solver=eg.GradientDescent(lr=0.5, max_steps=50),
    )
    assert result.error_estimate == 0
    assert "estimated error" not in result.status


def test_without_an_estimate_the_numbers_are_the_same():
    case = ZOO["softmax"]()
    with_estimate, without = (
        eg.meta_gradient(
            case.problem,
            case.params,
            case.meta_params,
            solver=DESCENT,
            estimator=eg.Contrastive(error=error),
        )
        for error in (True, False)
    )
    assert without.error_estimate is None
    for name, grad in without.grads.items():
        assert torch.equal(grad, with_estimate.grads[name])
    assert with_estimate.gradient_evaluations == without.gradient_evaluations + 4


def test_an_outer_loss_that_ends_near_by_is_named():
    """At β > 0 the phase leaves where the outer loss is defined; the contrast itself is finite."""
    result = eg.meta_gradient(
        eg.Bilevel(
            lambda p, m: 0.5 * (p["x"] - m["t"]).square().sum(),
            lambda p, m: (p["x"] + (p["x"] + 1e-3).sqrt()).sum(),
        ),
        {"x": torch.zeros(2, dtype=torch.float64)},
        {"t": torch.zeros(2, dtype=torch.float64)},
        solver=eg.GradientDescent(lr=0.5, max_steps=50),
    )
    assert result.grads["t"].isfinite().all()
    assert "estimated error 100 % or more" in result.status


def test_the_outer_loss_is_not_evaluated_for_its_value_alone():
    """Its gradient at the free solution, which is the force, has given it."""
    case, calls = ZOO["logistic"](), []

    def outer(p, m):
        calls.append(1)
        return case.problem.outer_loss(p, m)

    assert isinstance(case.problem, eg.Bilevel)
    problem = eg.Bilevel(case.problem.inner_loss, outer)
    eg.meta_gradient(problem, case.params, case.meta_params, solver=DESCENT)  # has a first look
    calls.clear()
    result = eg.meta_gradient(problem, case.params, case.meta_params, solver=DESCENT)
    assert len(calls) == 1 + 1 + 2  # the check, the force, and how it bends on both sides
    exact = case.problem.outer_loss(result.params, case.meta_params).item()
    assert result.outer_loss == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("offset", [1e2, 1e3, 1e4, 1e5])
def test_the_rounding_of_what_theta_is_told_by_is_in_the_estimate(offset):
    """`∂L_in/∂θ = φ + π offset` in float32, of which the contrast needs a change by β."""
    center, goal = torch.randn(2, 20, generator=torch.Generator().manual_seed(0))
    problem = eg.Bilevel(
        lambda p, m: (
            0.5 * (p["w"] - center).square().sum() + (m["t"] * (offset * torch.pi + p["w"])).sum()
        ),
        lambda p, m: 0.5 * (p["w"] - goal).square().sum(),
    )
    start, meta = {"w": torch.zeros(20)}, {"t": torch.zeros(20)}
    found = eg.meta_gradient(problem, start, meta, solver=eg.GradientDescent(lr=0.5, tol=1e-6))
    true = ((found.grads["t"] - (goal - center)).norm() / (goal - center).norm()).item()
    assert found.error_estimate is not None
    assert true < found.error_estimate < 20 * true
    assert (found.error_estimate > 0.1) == ("beta is too small for this number" in found.status)
