"""Fixed points of maps that are no gradients: problems, estimators, and what is refused."""

import pytest
import torch
from torch import nn

import equigrad as eg
from equigrad.estimators.implicit import Solution
from equigrad.testing import affine_map_case, picard, tanh_map_case
from helpers import along, directional_derivative, random_direction


def network(batches=None):
    """A small recurrent network at rest; θ: its weights and its input's scale."""
    torch.manual_seed(2)
    cell = nn.RNNCell(3, 5).double()
    readout = nn.Linear(5, 2).double()
    x, y = torch.randn(6, 3).double(), torch.randn(6, 2).double()
    meta = {name: p.detach().clone() for name, p in cell.named_parameters()}

    def relax(p, m, mask=None):
        h = torch.func.functional_call(cell, dict(m), (x, p["h"]))
        return {"h": h if mask is None else mask * h}

    problem = eg.FixedPoint(
        relax, lambda p, m: (readout(p["h"]) - y).square().mean(), inner_batches=batches
    )
    return problem, {"h": torch.zeros(6, 5, dtype=torch.float64)}, meta


def solve(problem, params, meta, estimator, solver=None):
    solver = solver or picard(torch.float64)
    return eg.meta_gradient(problem, params, meta, solver=solver, estimator=estimator)


def test_velocity_is_image_minus_state():
    case = affine_map_case(torch.float64)
    h = torch.linspace(-1, 1, 5, dtype=torch.float64)
    image = case.problem.function("inner")({"h": h}, case.meta_params)["h"]
    velocity = case.problem.velocity({"h": h}, case.meta_params)["h"]
    torch.testing.assert_close(velocity, image - h)
    nudged = case.problem.velocity({"h": h}, case.meta_params, beta=-0.3)["h"]
    leaf = h.clone().requires_grad_()
    (pressure,) = torch.autograd.grad(case.problem.outer_loss({"h": leaf}, {}), leaf)
    torch.testing.assert_close(nudged, image - h + 0.3 * pressure)


def test_unit_steps_iterate_the_map():
    problem, params, meta = network()
    assert isinstance(problem, eg.FixedPoint)
    steps = eg.GradientDescent(lr=1, max_steps=3)
    result = solve(problem, params, meta, eg.T1T2(), steps)
    expected = params
    for _ in range(3):
        expected = problem.map(expected, meta)
    torch.testing.assert_close(result.params["h"], expected["h"], rtol=1e-12, atol=1e-14)


def test_a_recurrent_network_at_rest_against_the_exact_solve_and_differences():
    problem, params, meta = network()
    exact = solve(problem, params, meta, eg.ExactSolve())
    assert exact.phases[0].outcome == "converged"
    for estimator in (
        eg.GMRES(tol=1e-13),
        eg.NeumannSeries(terms=200),
        eg.Unrolled(segment=10),
    ):
        result = solve(problem, params, meta, estimator)
        for name in meta:
            torch.testing.assert_close(result.grads[name], exact.grads[name], rtol=1e-9, atol=1e-12)
    direction = random_direction(meta)
    reference = directional_derivative(
        problem, exact.params, meta, picard(torch.float64), direction, step=1e-5
    )
    assert along(exact.grads, direction) == pytest.approx(reference, rel=1e-8)


@pytest.mark.parametrize("build", [affine_map_case, tanh_map_case])
def test_the_maps_are_far_from_symmetric_and_gmres_is_exact_on_them(build):
    """Solving with `∂r/∂φ` where its transpose belongs would be wrong by far."""

    class Untransposed(eg.ExactSolve):
        def solve(self, linear, pressure, notes):
            units = torch.eye(linear.size, dtype=pressure.dtype)
            rows = torch.stack([linear.product(unit) for unit in units])
            return Solution(torch.linalg.solve(rows, pressure))

    case = build(torch.float64)
    wrong = solve(case.problem, case.params, case.meta_params, Untransposed())
    assert case.relative_error(wrong.grads) > 0.05
    for restart in (30, 3, 2):
        gmres = eg.GMRES(tol=1e-12, restart=restart)
        result = solve(case.problem, case.params, case.meta_params, gmres)
        assert case.relative_error(result.grads) < 1e-10
        assert "not converged" not in result.status


def test_gmres_takes_as_many_products_as_there_are_eigenvalues():
    case = affine_map_case(torch.float64)
    free = solve(case.problem, case.params, case.meta_params, eg.T1T2()).gradient_evaluations
    result = solve(case.problem, case.params, case.meta_params, eg.GMRES(tol=1e-12))
    # five products and one for the true residual, each a forward and a backward; T1T2 takes one
    assert result.gradient_evaluations - free == 2 * (5 + 1 - 1)


def test_gmres_on_an_indefinite_hessian():
    """Stationary but no minimum, where conjugate gradients break down: φ* = (c, c), `∇ = 4c`."""
    problem = eg.Bilevel(
        lambda p, m: (p["w"][0] - m["c"]).square() - 0.1 * (p["w"][1] - m["c"]).square(),
        lambda p, m: p["w"].square().sum(),
    )
    settled = {"w": torch.full((2,), 1.5, dtype=torch.float64)}
    meta = {"c": torch.tensor(1.5, dtype=torch.float64)}
    still = eg.GradientDescent(lr=1e-300, max_steps=1)
    result = solve(problem, settled, meta, eg.GMRES(), still)
    assert result.grads["c"].item() == pytest.approx(4 * 1.5, rel=1e-9)


def test_jacobian_free_backpropagation():
    """T1-T2 on a map is one backward through it: `∂L_out/∂θ + (∂F/∂θ)ᵀ ∂L_out/∂φ`."""
    case = tanh_map_case(torch.float64)
    result = solve(case.problem, case.params, case.meta_params, eg.T1T2())
    theta = case.meta_params["theta"].clone().requires_grad_()
    image = case.problem.function("inner")(result.params, {"theta": theta})
    loss = case.problem.outer_loss(image, {"theta": theta})
    (expected,) = torch.autograd.grad(loss, theta)
    torch.testing.assert_close(result.grads["theta"], expected, rtol=1e-9, atol=1e-12)
    assert case.relative_error(result.grads) > 0.1  # and biased, as the table says


def test_k_neumann_terms_are_recurrent_backpropagation():
    """`x ← (∂F/∂φ)ᵀ x + g` from zero, K times."""
    case = affine_map_case(torch.float64)
    image = case.problem.function("inner")
    jacobian = torch.autograd.functional.jacobian(
        lambda h: image({"h": h}, case.meta_params)["h"], case.params["h"]
    )
    by_theta = torch.autograd.functional.jacobian(
        lambda theta: image(case.params, {"theta": theta})["h"], case.meta_params["theta"]
    )
    result = solve(case.problem, case.params, case.meta_params, eg.NeumannSeries(terms=4))
    h = result.params["h"].clone().requires_grad_()
    (pressure,) = torch.autograd.grad(case.problem.outer_loss({"h": h}, {}), h)
    x = torch.zeros_like(pressure)
    for _ in range(4):
        x = jacobian.T @ x + pressure
    torch.testing.assert_close(result.grads["theta"], by_theta.T @ x, rtol=1e-9, atol=1e-12)


def test_a_map_that_does_not_contract_but_has_a_fixed_point():
    """`F = 2φ + θ`: iterating it leads away from φ* = -θ, yet its derivative is known there."""
    problem = eg.FixedPoint(
        lambda p, m: {"h": 2 * p["h"] + m["c"]}, lambda p, m: p["h"].square().sum()
    )
    settled, meta = {"h": torch.full((2,), -1.0)}, {"c": torch.ones(2)}
    still = eg.GradientDescent(lr=1, max_steps=1)
    result = solve(problem, settled, meta, eg.GMRES(), still)
    torch.testing.assert_close(result.grads["c"], torch.full((2,), 2.0))  # φ* = -θ
    with pytest.raises(eg.CurvatureError, match=r"diverges.*is not a contraction.*GMRES"):
        solve(problem, settled, meta, eg.NeumannSeries(), still)


@pytest.mark.parametrize("estimator", [eg.GMRES(), eg.ExactSolve()])
def test_a_map_without_an_isolated_fixed_point(estimator):
    problem = eg.FixedPoint(
        lambda p, m: {"h": torch.stack([0.5 * p["h"][0] + m["c"], p["h"][1]])},
        lambda p, m: p["h"].sum(),
    )
    start, meta = {"h": torch.zeros(2).double()}, {"c": torch.tensor(1.0).double()}
    with pytest.raises(eg.CurvatureError, match="fixed point of the map is not isolated"):
        solve(problem, start, meta, estimator)


def test_mini_batches_of_a_map():
    """The map is the mean over batches; implicit estimators at its fixed point see all of them."""
    masks = [torch.tensor(value, dtype=torch.float64) for value in (0.6, 0.8)]
    batched, params, meta = network(masks)
    whole, _, _ = network([torch.tensor(0.7, dtype=torch.float64)])
    settled = solve(whole, params, meta, eg.GMRES(tol=1e-12))
    still = eg.GradientDescent(lr=1e-300, max_steps=1)
    other = solve(batched, settled.params, meta, eg.GMRES(tol=1e-12), still)
    for name in meta:
        torch.testing.assert_close(other.grads[name], settled.grads[name], rtol=1e-9, atol=1e-12)


def test_check_meta_gradient_judges_maps():
    problem, params, meta = network()
    solver = eg.GradientDescent(lr=1, tol=1e-9)
    check = eg.check_meta_gradient(problem, params, meta, solver=solver, estimator=eg.GMRES())
    assert check.passed
    check = eg.check_meta_gradient(problem, params, meta, solver=solver, estimator=eg.T1T2())
    assert check.told
    assert not check.passed


@pytest.mark.parametrize(
    "estimator",
    [eg.Contrastive(), eg.FiniteDifferenceT1T2(), eg.ConjugateGradient(), eg.Nystrom()],
)
def test_estimators_that_need_an_energy_name_those_that_do_not(estimator):
    problem, params, meta = network()
    with pytest.raises(
        eg.ConfigurationError,
        match=r"needs an inner loss, which a FixedPoint problem does not have.*; "
        r"use T1T2\(\) or .*GMRES\(\)",
    ) as refused:
        solve(problem, params, meta, estimator)
    would_serve = estimator.traits.fit(eg.EnergyBased)
    assert ("declare it as an EnergyBased" in str(refused.value)) == would_serve
    assert f"{type(estimator).__name__}()" not in str(refused.value)


def test_solvers_that_compare_values_are_refused():
    problem, params, meta = network()
    with pytest.raises(
        eg.ConfigurationError, match=r"a FixedPoint problem has no inner loss.*lr=1"
    ):
        solve(problem, params, meta, eg.GMRES(), eg.LBFGS(max_steps=5))


@pytest.mark.parametrize(
    ("map", "message"),
    [
        (3.0, r"map must be a function.*dictionary of tensors, got 3.0"),
        (lambda p, m: p["h"], r"a tensor for each of params \['h'\], got Tensor"),
        (lambda p, m: {"g": p["h"] * m["c"]}, r"a tensor for each of params \['h'\], got \['g'\]"),
        (
            lambda p, m: {"h": (p["h"] * m["c"]).sum()},
            r"'h' in the shape that it has in params, \(2,\), got",
        ),
        (lambda p, m: {"h": p["h"] / 0 * m["c"]}, "map is nan at the initial params"),
        (lambda p, m: {"h": p["k"] * m["c"]}, "map uses the name 'k'.*params has 'h'"),
        (
            lambda p, m: {"h": 0.5 * p["h"]},
            "neither map nor outer_loss depends on meta-parameter 'c'",
        ),
    ],
)
def test_maps_that_cannot_work(map, message):
    with pytest.raises(eg.ProblemError, match=message):
        solve(
            eg.FixedPoint(map, lambda p, m: p["h"].sum()),
            {"h": torch.zeros(2)},
            {"c": torch.ones(2)},
            eg.GMRES(),
        )
