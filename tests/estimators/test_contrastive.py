from dataclasses import replace
from typing import Any, Literal

import pytest
import torch

import equigrad as eg
from equigrad.evaluation import Evaluation
from equigrad.testing import CASES, Quadratic
from helpers import along, directional_derivative, random_direction, slope, small_network

EXACT = eg.GradientDescent(
    lr=0.4, momentum=0.9, nesterov=True, tol=1e-14, max_steps=5000, check_every=1
)


def exact_phases(quadratic: Quadratic, **options) -> torch.Tensor:
    result = eg.meta_gradient(
        quadratic.problem,
        quadratic.params(),
        quadratic.meta_params(),
        solver=EXACT,
        estimator=eg.Contrastive(matched=False, nudge="loss", **options),
    )
    assert result.phases[0].outcome == "converged"
    return result.grads["theta"]


SCHEMES: list[tuple[Literal["forward", "symmetric"], int]] = [
    ("forward", 2),
    ("forward", 3),
    ("forward", 4),
    ("forward", 5),
    ("symmetric", 2),
    ("symmetric", 4),
]


@pytest.mark.parametrize(("scheme", "points"), SCHEMES)
@pytest.mark.parametrize("beta", [0.3, -0.1])
def test_exact_phases_give_the_closed_form(quadratic, scheme, points, beta):
    estimate = exact_phases(quadratic, scheme=scheme, points=points, beta=beta)
    nodes = eg.Contrastive(scheme=scheme, points=points).nodes
    expected = quadratic.contrast(beta, nodes)
    assert ((estimate - expected).norm() / expected.norm()).item() < 1e-10


def test_two_points_give_the_formula_of_appendix_e(quadratic):
    a, beta = 1 + quadratic.strength / quadratic._hessian, 0.7
    expected = a / (a + beta) * quadratic.meta_gradient
    torch.testing.assert_close(quadratic.contrast(beta, (0, 1)), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize(("scheme", "points"), SCHEMES)
def test_order_in_beta(quadratic, scheme, points):
    order = points if scheme == "symmetric" else points - 1
    betas = [0.004 * 1.25**k for k in range(6)]
    errors = [
        quadratic.relative_error(exact_phases(quadratic, scheme=scheme, points=points, beta=b))
        for b in betas
    ]
    assert slope(betas, errors) == pytest.approx(order, abs=0.1)


def test_matched_phases_cancel_the_drift_of_an_unsettled_free_phase(quadratic):
    def error(**options: Any) -> float:
        result = eg.meta_gradient(
            quadratic.problem,
            quadratic.params(),
            quadratic.meta_params(),
            solver=quadratic.solver(max_steps=60),
            estimator=replace(eg.Contrastive(beta=1e-4, scheme="forward", nudge="loss"), **options),
        )
        return quadratic.relative_error(result.grads["theta"])

    plain, matched = error(matched=False), error(matched=True)
    symmetric = error(scheme="symmetric")
    assert plain > 1  # drift / β
    assert matched < 2e-3
    assert symmetric < 2e-3


def test_matched_limit_is_the_truncated_neumann_series(quadratic):
    """As β → 0, K steps give `λη Σ_k (I-ηA)^{K-1-k} ∂L_out(φ_k)` along the free path φ_k."""
    steps, eta = 7, quadratic.step_size
    result = eg.meta_gradient(
        quadratic.problem,
        quadratic.params(),
        quadratic.meta_params(),
        solver=quadratic.solver(max_steps=steps),
        estimator=eg.Contrastive(beta=1e-5, scheme="forward", nudge="loss"),
    )
    phi = result.params["phi"]
    contraction = 1 - eta * (quadratic._hessian + quadratic.strength)
    expected, moving = torch.zeros_like(phi), phi.clone()
    for k in range(steps):
        pressure = quadratic._hessian * (moving - quadratic._validation)
        expected += quadratic.strength * eta * contraction ** (steps - 1 - k) * pressure
        gradient = quadratic._hessian * (moving - quadratic._train) + quadratic.strength * (
            moving - quadratic._theta
        )
        moving = moving - eta * gradient
    torch.testing.assert_close(result.grads["theta"], expected, rtol=1e-4, atol=1e-6)


def test_direct_term_is_in_the_estimate(quadratic):
    """L_out gains c·θ, so its gradient gains c exactly, in every scheme."""
    c = torch.linspace(-1, 1, quadratic.dim, dtype=torch.float64)
    plain = quadratic.problem
    direct = eg.Bilevel(
        plain.inner_loss, lambda p, m: plain.outer_loss(p, m) + (c * m["theta"]).sum()
    )
    for scheme, points in SCHEMES:
        estimator = eg.Contrastive(beta=0.1, scheme=scheme, points=points, nudge="loss")
        with_term, without = (
            eg.meta_gradient(
                problem,
                quadratic.params(),
                quadratic.meta_params(),
                solver=quadratic.solver(max_steps=30),
                estimator=estimator,
            ).grads["theta"]
            for problem in (direct, plain)
        )
        torch.testing.assert_close(with_term - without, c, rtol=0, atol=1e-12)


def test_beta_of_either_sign_is_treated_alike(quadratic):
    """The closed form is analytic in β, so the average of ±β has no linear error term."""
    plus, minus = (exact_phases(quadratic, beta=b) for b in (0.1, -0.1))
    symmetric = exact_phases(quadratic, beta=0.1, scheme="symmetric")
    torch.testing.assert_close((plus + minus) / 2, symmetric, rtol=1e-10, atol=1e-13)
    flipped = exact_phases(quadratic, beta=-0.1, scheme="symmetric")
    torch.testing.assert_close(flipped, symmetric, rtol=1e-10, atol=1e-13)


def test_network_against_finite_differences_of_the_resolved_problem():
    problem, synapse = small_network()
    meta = synapse.meta_params()
    solver = eg.GradientDescent(lr=0.1, momentum=0.95, nesterov=True, tol=1e-11, max_steps=30000)
    result = eg.meta_gradient(
        problem,
        synapse.params(),
        meta,
        solver=solver,
        estimator=eg.Contrastive(beta=1e-4, scheme="symmetric"),
    )
    assert result.phases[0].outcome == "converged"
    for seed in range(2):
        direction = random_direction(meta, seed)
        reference = directional_derivative(
            problem, result.params, meta, solver, direction, step=1e-5
        )
        assert along(result.grads, direction) == pytest.approx(reference, rel=1e-4)


def test_keeping_momentum_cancels_the_drift_of_momentum_too(quadratic):
    """Matched phases share momentum whether it is kept or reset; both cancel."""
    for momentum in ("keep", "reset"):
        result = eg.meta_gradient(
            quadratic.problem,
            quadratic.params(),
            quadratic.meta_params(),
            solver=eg.GradientDescent(lr=0.5, momentum=0.9, max_steps=150),
            estimator=eg.Contrastive(beta=1e-4, momentum=momentum, scheme="forward", nudge="loss"),
        )
        assert quadratic.relative_error(result.grads["theta"]) < 1e-2


def test_phases_with_a_tolerance_are_matched_in_length(quadratic):
    solver = eg.GradientDescent(lr=0.8, max_steps=2000, tol=1e-6)
    result = eg.meta_gradient(
        quadratic.problem,
        quadratic.params(),
        quadratic.meta_params(),
        solver=solver,
        estimator=eg.Contrastive(beta=0.1, points=4, scheme="forward", nudge="loss"),
    )
    free, *others = result.phases
    assert free.outcome == "converged"
    assert {phase.steps for phase in others} == {others[0].steps}
    assert sorted(phase.beta.real for phase in others) == pytest.approx([0, 0.1, 0.2, 0.3])


def test_a_nudge_far_below_the_tolerance_is_answered_all_the_same(quadratic):
    """An absolute tolerance would call the nudged phase settled before it had moved."""
    result = eg.meta_gradient(
        quadratic.problem,
        quadratic.params(),
        quadratic.meta_params(),
        solver=eg.GradientDescent(lr=0.8, max_steps=2000, tol=1e-5),
        estimator=eg.Contrastive(beta=1e-5, scheme="forward", nudge="loss"),
    )
    assert result.phases[-1].outcome == "converged"
    assert quadratic.relative_error(result.grads["theta"]) < 0.05


def test_kept_momentum_is_handed_to_the_nudged_phases(quadratic):
    """One nudged step of size η from kept momentum m goes η μ m further than from a reset one."""

    def end(momentum):
        with Evaluation(
            quadratic.problem, quadratic.params(), quadratic.meta_params()
        ) as evaluation:
            solver = eg.GradientDescent(lr=0.5, momentum=0.9, max_steps=7)
            free = evaluation.settle(solver)
            nudged = evaluation.settle_nudged(free, solver, 0.1, keep_momentum=momentum, steps=1)
            return free, nudged.params["phi"]

    (free, kept), (_, reset) = end(True), end(False)
    torch.testing.assert_close(kept - reset, 0.5 * 0.9 * free.solver_state[0])


def test_nudge_below_rounding_is_named():
    quadratic = Quadratic(dtype=torch.float32)
    result = eg.meta_gradient(
        quadratic.problem,
        quadratic.params(),
        quadratic.meta_params(),
        solver=quadratic.solver(max_steps=300),
        estimator=eg.Contrastive(beta=1e-6, scheme="forward", nudge="loss"),
    )
    assert "too small for torch.float32" in result.status


@pytest.mark.parametrize("error", [False, True])
def test_gradient_evaluations_are_counted(quadratic, error):
    result = eg.meta_gradient(
        quadratic.problem,
        quadratic.params(),
        quadratic.meta_params(),
        solver=quadratic.solver(max_steps=11),
        estimator=eg.Contrastive(
            nudged_solver=quadratic.solver(max_steps=5), scheme="forward", nudge="loss", error=error
        ),
    )
    # check (2) + free (11) + nudged (5 · 2) + matched (5) + ∂L_in/∂θ at both; the estimate takes
    # ∂L_in/∂θ at both half-way, and ∂L_out/∂φ at the free and the nudged end
    assert result.gradient_evaluations == 2 + 11 + 10 + 5 + 2 + (2 + 2) * error


def test_a_phase_that_is_cut_short_of_its_tolerance_runs_once(quadratic):
    """The error estimate looks at a phase half-way; one that gets no further is not run again."""
    results = [
        eg.meta_gradient(
            quadratic.problem,
            quadratic.params(),
            quadratic.meta_params(),
            solver=quadratic.solver(max_steps=11),
            estimator=eg.Contrastive(
                nudged_solver=replace(quadratic.solver(max_steps=5), tol=1e-9),
                scheme="forward",
                nudge="force",
                error=error,
            ),
        )
        for error in (False, True)
    ]
    plain, judged = results
    assert torch.equal(plain.grads["theta"], judged.grads["theta"])
    assert [phase.tol for phase in judged.phases] == [phase.tol for phase in plain.phases]
    # the estimate takes the force at the nudged end, and no further step
    assert judged.gradient_evaluations == plain.gradient_evaluations + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta must be a finite number other than 0, got 0.0"),
        ({"beta": float("nan")}, "beta must be"),
        ({"points": 1}, "points must be a whole number of at least 2, got 1"),
        (
            {"scheme": "symmetric", "points": 3},
            r"^Contrastive\(points=3\): .* the default, needs an even number of points, got 3",
        ),
        ({"scheme": "central"}, "'forward', 'symmetric' or 'holomorphic', got 'central'"),
        ({"momentum": "drop"}, "'keep' or 'reset', got 'drop'"),
    ],
)
def test_knobs_that_cannot_work(options, message):
    with pytest.raises(eg.ConfigurationError, match=message):
        eg.Contrastive(**options)


def test_momentum_cannot_be_handed_to_another_kind_of_solver(quadratic):
    adam = eg.TorchOptimizer(optimizer=torch.optim.Adam, options={"lr": 1e-2}, max_steps=5)
    sgd = eg.TorchOptimizer(optimizer=torch.optim.SGD, options={"lr": 1e-2}, max_steps=5)
    for solver in (quadratic.solver(max_steps=5), sgd):
        with pytest.raises(eg.ConfigurationError, match="momentum='reset'"):
            eg.meta_gradient(
                quadratic.problem,
                quadratic.params(),
                quadratic.meta_params(),
                solver=solver,
                estimator=eg.Contrastive(nudged_solver=adam),
            )


# Nudged by a constant force


@pytest.mark.parametrize("beta", [1e-3, 1.0, -5.0, 100.0])
@pytest.mark.parametrize("scheme", ["forward", "symmetric"])
def test_a_constant_force_is_exact_for_any_beta_where_the_inner_loss_is_quadratic(beta, scheme):
    """β = -5 would make the augmented loss of the plain rule unbounded."""
    quadratic = Quadratic(dim=10, strength=0.5)
    result = eg.meta_gradient(
        quadratic.problem,
        quadratic.params(),
        quadratic.meta_params(),
        solver=eg.LBFGS(tol=1e-12),
        estimator=eg.Contrastive(beta=beta, scheme=scheme, nudge="force", matched=False),
    )
    assert quadratic.relative_error(result.grads["theta"]) < 1e-7


def test_a_constant_force_has_the_order_of_the_scheme_elsewhere():
    problem, synapse = small_network(strength=0.3)
    solver = eg.LBFGS(tol=1e-13)
    arguments = problem, synapse.params(), synapse.meta_params()
    exact = eg.meta_gradient(*arguments, solver=solver, estimator=eg.ExactSolve()).grads
    orders: list[tuple[Literal["forward", "symmetric"], int]] = [("forward", 1), ("symmetric", 2)]
    for scheme, order in orders:
        betas, errors = [0.001, 0.002, 0.004], []
        for beta in betas:
            estimator = eg.Contrastive(beta=beta, scheme=scheme, nudge="force", matched=False)
            grads = eg.meta_gradient(*arguments, solver=solver, estimator=estimator).grads
            errors.append(sum((grads[n] - exact[n]).square().sum().item() for n in exact) ** 0.5)
        assert slope(betas, errors) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("error", [False, True])
def test_a_constant_force_takes_one_outer_gradient(error):
    """T + K + K steps of one gradient each, two for the checks, one for the force."""
    quadratic = Quadratic(dim=5)
    result = eg.meta_gradient(
        quadratic.problem,
        quadratic.params(),
        quadratic.meta_params(),
        solver=quadratic.solver(30),
        estimator=eg.Contrastive(
            nudge="force", nudged_solver=quadratic.solver(20), scheme="forward", error=error
        ),
    )
    contrast = 2  # ∂L_in/∂θ at both ends
    estimate = contrast + 1  # the same half-way, and ∂L_out/∂φ at the nudged end
    assert result.gradient_evaluations == 30 + 20 + 20 + 2 + 1 + contrast + estimate * error


def test_a_constant_force_keeps_the_direct_term():
    case = CASES[1](torch.float64)  # L_out depends on θ directly
    result = eg.meta_gradient(
        case.problem,
        case.params,
        case.meta_params,
        solver=case.solver,
        estimator=eg.Contrastive(beta=1e-3, scheme="symmetric", nudge="force"),
    )
    assert case.relative_error(result.grads) < 1e-7


@pytest.mark.parametrize("count", [2, 5])
def test_the_plain_rule_compares_phases_at_the_same_place_of_a_pass(count):
    """A learner on mini-batches goes in circles; where on the circle it stands is divided by β."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    y = x.sum(1) + 0.5 * torch.randn(40, generator=generator, dtype=torch.float64)

    def inner(p, m, rows):
        return (x[rows] @ p["w"] - y[rows]).square().mean() + (m["r"].exp() * p["w"].square()).sum()

    problem = eg.Bilevel(
        inner,
        lambda p, m: (x @ p["w"] + y).square().mean(),
        inner_batches=[slice(i, None, count) for i in range(count)],
    )
    start = {"w": torch.zeros(3, dtype=torch.float64)}
    meta = {"r": torch.full((3,), -1.0, dtype=torch.float64)}
    solver = eg.GradientDescent(lr=0.02, tol=1e-8, max_steps=20_000)
    plain, matched = (
        eg.meta_gradient(
            problem,
            start,
            meta,
            solver=solver,
            estimator=eg.Contrastive(beta=0.01, matched=m, scheme="forward", nudge="loss"),
        ).grads["r"]
        for m in (False, True)
    )
    torch.testing.assert_close(plain, matched, rtol=0.05, atol=0)
