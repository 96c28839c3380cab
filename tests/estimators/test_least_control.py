"""The least-control principle against differences of its own objective, and its limits."""

import math
from typing import Any, Literal

import pytest
import torch
from torch import nn

import equigrad as eg
from equigrad.controllers import Controller
from equigrad.testing import affine_map_case, quadratic_case, tanh_map_case
from equigrad.vectors import relative
from helpers import along, random_direction, slope

TIGHT = eg.Anderson(tol=1e-13, max_steps=3000)


def cell(symmetric=False):
    """Seven neurons of two kinds, of which two are judged; θ: their weights and biases."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    w, b, target = normal(7, 7), normal(7), 0.5 * normal(2)
    w = w + w.T if symmetric else w
    w = 0.7 * w / torch.linalg.matrix_norm(w, 2)

    def relax(p, m):
        h = (m["w"] @ torch.cat([p["h"], p["y"]]) + m["b"]).tanh()
        return {"h": h[:5], "y": h[5:]}

    problem = eg.FixedPoint(relax, lambda p, m: 0.5 * (p["y"] - target).square().sum())
    start = {"h": torch.zeros(5).double(), "y": torch.zeros(2).double()}
    return problem, start, {"w": w, "b": b}


def learner():
    """Three weights of a softly saturating learner, pulled to a centre; both are θ, also of L."""
    torch.manual_seed(4)
    x, y = torch.randn(6, 3).double(), torch.randn(6).double()
    problem = eg.Bilevel(
        lambda p, m: (
            (x @ p["w"] - y).cosh().log().mean()
            + 0.5 * (m["rho"].exp() * (p["w"] - m["c"]).square()).sum()
        ),
        lambda p, m: 0.5 * (p["w"] - 0.3).square().sum() + 0.1 * m["c"].square().sum(),
    )
    meta = {"rho": torch.zeros(3).double(), "c": torch.full((3,), -0.5).double()}
    return problem, {"w": torch.zeros(3).double()}, meta


def relaxed_outer_loss(problem, params, meta, strength):
    """`min_φ L_out + ‖r‖² / 2b` by Newton's method, from the velocity alone."""
    sizes = [p.numel() for p in params.values()]

    def named(flat):
        parts = flat.split(sizes)
        return {n: t.view_as(p) for (n, p), t in zip(params.items(), parts, strict=True)}

    def value(flat):
        p = named(flat)
        if isinstance(problem, eg.FixedPoint):
            image = problem.map(p, meta)
            rest = [p[n] - image[n] for n in p]
        else:
            rest = torch.autograd.grad(
                problem.inner_loss(p, meta), list(p.values()), create_graph=True
            )
        return problem.outer_loss(p, meta) + sum(r.square().sum() for r in rest) / (2 * strength)

    flat = torch.cat([p.reshape(-1) for p in params.values()])
    for _ in range(50):
        flat = flat.detach().requires_grad_()
        hessian = torch.autograd.functional.hessian(value, flat)
        (gradient,) = torch.autograd.grad(value(flat), flat)
        flat = flat - torch.linalg.solve(hessian, gradient)
    return value(flat).item(), named(flat.detach())


def difference(problem, params, meta, strength, direction, step=1e-5):
    """Central difference of the relaxed outer loss along a direction in θ."""
    values = []
    for sign in (1, -1):
        moved = {n: m + sign * step * direction[n] for n, m in meta.items()}
        values.append(relaxed_outer_loss(problem, params, moved, strength)[0])
    return (values[0] - values[1]) / (2 * step)


def solve(
    system,
    controller,
    solver: eg.Solver = TIGHT,
    start: Literal["free", "params"] = "params",
):
    problem, params, meta = system
    return eg.meta_gradient(
        problem,
        params,
        meta,
        solver=solver,
        estimator=eg.LeastControl(controller=controller, start=start),
    )


def descent(max_steps=20000):
    return eg.GradientDescent(lr=0.2, momentum=0.5, tol=1e-12, max_steps=max_steps, check_every=1)


@pytest.mark.parametrize("strength", [0.3, 2.0])
@pytest.mark.parametrize("system", [cell(), cell(symmetric=True), learner()], ids="abc")
def test_the_gradient_is_that_of_the_relaxed_outer_loss(system, strength):
    problem, params, meta = system
    direction = random_direction(meta)
    rests = solve(system, eg.EnergyInversion(gain=strength, leak=1.0), descent())
    reference = difference(problem, rests.params, meta, strength, direction)
    value, phi = relaxed_outer_loss(problem, rests.params, meta, strength)
    flow = eg.GradientFlow(dt=0.2, tol=1e-10, max_steps=20000)
    for controller, solver in (
        (eg.DynamicInversion(gain=strength, leak=1.0), flow),
        (eg.DynamicInversion(gain=strength, leak=1.0), TIGHT),
        (eg.DynamicInversion(gain=strength / 2, proportional=strength / 2, leak=1.0), TIGHT),
        (eg.DynamicInversion(gain=0.0, proportional=strength), TIGHT),
        (eg.EnergyInversion(gain=strength, leak=1.0), descent()),
    ):
        result = solve(system, controller, solver)
        assert result.phases[0].outcome == "converged", result.status
        for name, p in result.params.items():
            torch.testing.assert_close(p, phi[name], rtol=1e-7, atol=1e-8)
        assert along(result.grads, direction) == pytest.approx(reference, rel=1e-6)
    free = eg.meta_gradient(problem, params, meta, solver=descent(), estimator=eg.T1T2())
    assert value < free.outer_loss


@pytest.mark.parametrize("system", [cell(), learner()], ids="ab")
def test_weak_control_is_recurrent_backpropagation_with_an_error_of_first_order(system):
    problem, params, meta = system
    exact = eg.meta_gradient(problem, params, meta, solver=descent(), estimator=eg.ExactSolve())
    leaks, errors = [10.0, 30.0, 100.0, 300.0], []
    for leak in leaks:
        tau = {f"v.{n}": leak for n in ("y", "w") if n in params}  # stiff: it leaks α times a τ
        flow = eg.GradientFlow(dt=0.2, tau=tau, tol=1e-12, max_steps=5000)
        controller = eg.DynamicInversion(gain=1.0, leak=leak, solver=flow)
        result = solve(system, controller, descent(), start="free")
        assert result.phases[1].beta == pytest.approx(1 / leak)
        torch.testing.assert_close(result.params, exact.params, rtol=1e-9, atol=1e-10)
        assert result.outer_loss == pytest.approx(exact.outer_loss, rel=1e-10)
        missed = [(result.grads[n] - exact.grads[n]).square().sum() for n in meta]
        errors.append(math.sqrt(sum(missed)))
    assert slope(leaks, errors) == pytest.approx(-1, abs=0.05)


def test_a_tolerance_on_the_energy_is_one_on_the_control_for_any_strength():
    """Its gradient shrinks with b, and a tolerance on that would end weak phases at once."""
    problem, params, meta = cell()
    exact = eg.meta_gradient(problem, params, meta, solver=TIGHT, estimator=eg.ExactSolve())
    norm = math.sqrt(sum(g.square().sum() for g in exact.grads.values()))
    steps = set[int]()
    for strength in (1e-2, 1e-4, 1e-6):
        flow = eg.GradientFlow(dt=0.2, tol=1e-3, max_steps=1000)
        controller = eg.EnergyInversion(gain=strength, leak=1.0, solver=flow)
        result = solve((problem, params, meta), controller, TIGHT, start="free")
        missed = math.sqrt(sum((result.grads[n] - exact.grads[n]).square().sum() for n in meta))
        assert missed < (2e-3 + 2 * strength) * norm  # of the tolerance, and the O(b) of control
        steps.add(result.phases[1].steps)
    assert len(steps) == 1


def test_a_weaker_leak_meets_the_outer_loss_and_none_meets_it_exactly():
    system = cell()
    leaks = [0.03, 0.01, 0.003]
    losses = [solve(system, eg.DynamicInversion(gain=1.0, leak=leak)).outer_loss for leak in leaks]
    # the pressure is αU/k_i, and U tends to a constant
    assert slope(leaks, losses) == pytest.approx(2, abs=0.05)
    hard = solve(system, eg.DynamicInversion(gain=1.0, leak=0.0))
    assert hard.phases[0].outcome == "converged"
    assert hard.phases[0].beta == math.inf
    assert hard.outer_loss < 1e-20


def test_without_a_leak_the_gradient_is_that_of_the_control_itself():
    """`d/dθ ½‖ψ*‖²`: the limit of b times the relaxed gradient, and of differences of it."""
    problem, params, meta = cell()
    direction = random_direction(meta)

    def effort(sign):
        moved = {n: m + sign * 1e-4 * direction[n] for n, m in meta.items()}
        settled = solve((problem, params, moved), eg.DynamicInversion(gain=1.0, leak=0.0))
        velocity = problem.velocity(settled.params, moved)
        return 0.5 * sum(v.square().sum().item() for v in velocity.values())

    result = solve((problem, params, meta), eg.DynamicInversion(gain=1.0, leak=0.0))
    reference = (effort(1) - effort(-1)) / 2e-4
    assert along(result.grads, direction) == pytest.approx(reference, rel=1e-6)


def test_no_control_where_the_free_equilibrium_is_optimal():
    """H = 0 if and only if the free equilibrium minimises the outer loss; then nothing moves."""
    problem, params, meta = cell()
    free = eg.meta_gradient(problem, params, meta, solver=TIGHT, estimator=eg.T1T2())
    target = free.params["y"]
    reached = eg.FixedPoint(problem.map, lambda p, m: (p["y"] - target).square().sum())
    for kind in (eg.DynamicInversion, eg.EnergyInversion, eg.LinearFeedback):
        controller = kind(gain=1.0, leak=1.0)
        result = solve((reached, params, meta), controller)
        velocity = reached.velocity(result.params, meta)
        assert max(v.abs().max() for v in velocity.values()) < 1e-11
        assert max(g.abs().max() for g in result.grads.values()) < 1e-10
        other = solve((problem, params, meta), controller)
        assert max(v.abs().max() for v in problem.velocity(other.params, meta).values()) > 0.1


def test_every_inner_weight_pushed_by_its_own_pressure_needs_no_second_derivative():
    """`ψ = U` settles at a minimum of `L_in + b L_out`; for ω of a synapse, `∇ = -λψ/b`."""
    torch.manual_seed(1)
    x, y, v, w = (torch.randn(*s).double() for s in ((8, 3), (8, 1), (8, 3), (8, 1)))
    synapse = eg.nn.ComplexSynapse(nn.Linear(3, 1).double(), 0.5, learn=("center",))
    problem = eg.Bilevel(
        lambda p, m: (synapse(p, x) - y).square().mean(),
        lambda p, m: (synapse(p, v) - w).square().mean(),
        regularizer=synapse,
    )
    params, meta = synapse.params(), synapse.meta_params()
    strength = 0.7
    controller = eg.LinearFeedback(gain=0.0, proportional=strength)
    result = solve((problem, params, meta), controller)
    rest = problem.velocity(result.params, meta, beta=strength)
    assert max(r.abs().max() for r in rest.values()) < 1e-11
    leaves = {n: p.clone().requires_grad_() for n, p in result.params.items()}
    pressure = torch.autograd.grad(problem.outer_loss(leaves, meta), list(leaves.values()))
    for name, g in zip(leaves, pressure, strict=True):
        # ψ/b = -∂L_out/∂φ, and (∂_ω velocity)ᵀ ψ = λ ψ
        torch.testing.assert_close(result.grads[f"center.{name}"], 0.5 * g, rtol=1e-9, atol=1e-12)


def test_samples_settle_and_are_reported_each_by_itself():
    torch.manual_seed(0)
    w, x, y = torch.randn(4, 4).double() / 4, torch.randn(6, 4).double(), torch.rand(6, 4).double()

    def problem(rows, samples):
        return eg.FixedPoint(
            lambda p, m: {"h": torch.tanh(p["h"] @ m["w"].T + x[rows])},
            lambda p, m: 0.5 * (p["h"] - y[rows]).square().sum(),
            samples=samples,
        )

    def grads(rows, samples):
        start = {"h": torch.zeros(len(rows), 4).double()}
        return solve(
            (problem(rows, samples), start, {"w": w}), eg.DynamicInversion(gain=1.0, leak=0.5)
        )

    together = grads([0, 1, 2, 3, 4, 5], True)
    residuals = together.phases[0].residuals
    assert residuals is not None
    assert residuals.shape == (6,)
    assert residuals.max() <= 1e-13
    alone = sum(grads([i], False).grads["w"] for i in range(6))
    torch.testing.assert_close(together.grads["w"], alone, rtol=1e-9, atol=1e-12)


def test_mini_batches():
    """Dynamics average over batches: of `mean(c_i)` there is one problem with the mean in it."""
    case = affine_map_case(torch.float64)
    shifts = [torch.tensor(v).double() for v in (-0.5, 1.5)]
    image, outer = case.problem.function("inner"), case.problem.outer_loss

    def relax(p, m, shift):
        return {"h": image(p, m)["h"] + shift}

    batched = eg.FixedPoint(relax, outer, inner_batches=shifts)
    whole = eg.FixedPoint(relax, outer, inner_batches=[torch.tensor(0.5).double()])
    controller = eg.DynamicInversion(leak=1.0, gain=0.5)
    expected = solve((whole, case.params, case.meta_params), controller)
    settled = {n: p.clone() for n, p in expected.params.items()}
    flow = eg.GradientFlow(dt=0.03, max_steps=2000)  # Euler's method on the batches by turns
    found = solve((batched, settled, case.meta_params), controller, flow)
    torch.testing.assert_close(found.grads, expected.grads, rtol=1e-3, atol=1e-4)
    with pytest.raises(eg.ConfigurationError, match="squares over 2 mini-batches"):
        solve((batched, settled, case.meta_params), eg.EnergyInversion())


def test_an_unstable_controller_is_named():
    """Euler's method with a whole time constant a step cannot follow a strong controller."""
    case = affine_map_case(torch.float64)
    strong = eg.DynamicInversion(gain=0.0, proportional=50.0)
    with pytest.raises(
        eg.SettlingError,
        match=r"β = 50.*dt=….*LeastControl\(controller=DynamicInversion\), "
        r"whose controller and learner",
    ):
        solve((case.problem, case.params, case.meta_params), strong, eg.Picard(max_steps=2000))


@pytest.mark.parametrize("strength", [0.09, 0.11])
def test_what_rests_alone_by_plain_steps_may_not_under_control(strength):
    """`h ← j h` with loss ½h²: learner and control make [[j, b], [-1, j]], of modulus √(j² + b).

    That is 1 at b = 0.0975 for j = 0.95. Acceleration settles either, in two dimensions.
    """
    problem = eg.FixedPoint(
        lambda p, m: {"h": 0.95 * p["h"] + m["b"]}, lambda p, m: 0.5 * p["h"].square().sum()
    )
    h, b = torch.zeros(1).double(), torch.ones(1).double()

    def settled(solver):
        controller = eg.DynamicInversion(gain=0.0, proportional=strength, solver=solver)
        result = eg.meta_gradient(
            problem,
            {"h": h},
            {"b": b},
            solver=TIGHT,
            estimator=eg.LeastControl(controller=controller, start="params"),
        )
        return result.status

    plain, rests = settled(eg.Picard(tol=1e-3, max_steps=3000)), 0.95**2 + strength < 1
    assert plain.startswith("converged" if rests else "not converged")
    assert ("give the controller solver=Anderson()" in plain) == (not rests)
    assert settled(eg.Anderson(tol=1e-3, max_steps=10)).startswith("converged")


def test_what_has_not_settled_says_so():
    system = cell()
    result = solve(system, eg.DynamicInversion(), eg.Picard(tol=1e-12, max_steps=3), start="free")
    assert "phase β=0.1 not converged" in result.status
    one = solve(system, eg.DynamicInversion())
    assert "params and outer_loss are those of the controlled phase" in one.status


def test_a_hard_constraint_has_no_weight_for_a_direct_term():
    case = tanh_map_case(torch.float64)
    with pytest.raises(eg.ConfigurationError, match=r"'theta' directly.*leak > 0"):
        solve(
            (case.problem, case.params, case.meta_params), eg.DynamicInversion(gain=1.0, leak=0.0)
        )


def test_solvers_that_compare_values_serve_the_energy_alone():
    case = quadratic_case(torch.float64)
    system = case.problem, case.params, case.meta_params
    lbfgs = eg.LBFGS(tol=1e-11, max_steps=500)
    by_values = solve(system, eg.EnergyInversion(gain=1.0, leak=1.0), lbfgs)
    by_steps = solve(system, eg.DynamicInversion(gain=1.0, leak=1.0), descent(100000))
    torch.testing.assert_close(by_values.grads, by_steps.grads, rtol=1e-6, atol=1e-9)
    with pytest.raises(eg.ConfigurationError, match=r"have none.*EnergyInversion\(\)"):
        solve(system, eg.DynamicInversion(), lbfgs)


def wrong(value) -> Any:
    """A value that no type checker would let pass."""
    return value


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: eg.DynamicInversion(leak=-0.1),
            "leak must be a finite number of at least 0, got -0.1",
        ),
        (lambda: eg.DynamicInversion(gain=math.inf), "gain must be .* got inf"),
        (lambda: eg.LinearFeedback(gain=0.0), "both 0, so the controller does nothing"),
        (lambda: eg.EnergyInversion(leak=0.0), r"infinite for leak=0"),
        (lambda: eg.DynamicInversion(solver=wrong(3)), "solver must be a Solver, or None, got 3"),
        (
            lambda: eg.LinearFeedback(gate=wrong(2.0)),
            "gate must be a function that acts on each element.*got 2.0",
        ),
        (lambda: eg.LeastControl(controller=wrong(eg.Picard())), "controller must be a Controller"),
        (
            lambda: eg.LeastControl(start=wrong("there")),
            "start must be 'free' or 'params', got 'there'",
        ),
    ],
)
def test_knobs_that_cannot_work(make, message):
    with pytest.raises(eg.ConfigurationError, match=message):
        make()


@pytest.mark.parametrize(
    ("feedback", "message"),
    [
        ({"k": torch.eye(2)}, "weights for 'k', which is not one of the params: 'h', 'y'"),
        ({"h": torch.eye(2)}, r"feedback\['h'\] must have shape 5 x 2.*outputs \(y\), got 2 x 2"),
    ],
)
def test_feedback_of_the_wrong_shape(feedback, message):
    with pytest.raises(eg.ConfigurationError, match=message):
        solve(cell(), eg.LinearFeedback(feedback=feedback))


def test_the_default_controller_errs_by_about_its_strength():
    """b = 0.1: near the gradient of the outer loss itself, which the paper's b = 10 is far from."""
    problem, params, meta = cell()
    exact = eg.meta_gradient(problem, params, meta, solver=TIGHT, estimator=eg.ExactSolve())
    size = math.sqrt(sum(g.square().sum() for g in exact.grads.values()))
    errors = []
    for controller in (eg.DynamicInversion(), eg.DynamicInversion(gain=1.0, leak=0.1)):
        found = solve((problem, params, meta), controller)
        assert found.phases[0].outcome == "converged"
        missed = [(found.grads[n] - g).square().sum() for n, g in exact.grads.items()]
        errors.append(math.sqrt(sum(missed)) / size)
    assert errors[0] < 0.2
    assert errors[1] > 0.5


def test_strength():
    assert eg.DynamicInversion(leak=0.1, gain=1.0, proportional=2.0).strength == 12
    assert issubclass(eg.EnergyInversion, Controller)


def test_the_advice_for_a_phase_that_has_not_settled_is_one_that_helps():
    """More steps where it has Anderson's method already, that method or less strength elsewhere."""
    problem = eg.FixedPoint(
        lambda p, m: {"h": 0.95 * p["h"] + m["b"]}, lambda p, m: 0.5 * p["h"].square().sum()
    )
    given = problem, {"h": torch.zeros(1).double()}, {"b": torch.ones(1).double()}

    def status(solver, proportional):
        controller = eg.DynamicInversion(gain=0.0, proportional=proportional, solver=solver)
        return solve(given, controller, TIGHT).status

    said = status(eg.Anderson(tol=1e-10, max_steps=2), 0.11)
    assert "give the controller more steps, or less strength (gain, proportional)" in said
    assert "have not settled together" not in status(eg.Anderson(tol=1e-10, max_steps=50), 0.11)
    plain = eg.Picard(tol=1e-3, max_steps=3000)
    assert "solver=Anderson(), more steps, or less strength" in status(plain, 0.11)
    assert "have not settled together" not in status(plain, 0.05)


@pytest.mark.parametrize("start", ["free", "params"])
@pytest.mark.parametrize("leak", [0.0, 0.05, 1.0])
def test_a_controlled_phase_that_ended_early_gives_an_estimate_of_the_error(leak, start):
    """The error against a controlled phase at rest, over four orders of magnitude."""
    normal = torch.Generator().manual_seed(0)
    w, b, target = (torch.randn(*s, generator=normal).double() for s in ((8, 8), (8,), (8,)))
    meta = {"w": 0.6 * w / torch.linalg.matrix_norm(w, 2), "b": b}
    problem = eg.FixedPoint(
        lambda p, m: {"h": torch.tanh(m["w"] @ p["h"] + m["b"])},
        lambda p, m: 0.5 * (p["h"] - target).square().sum(),
    )
    given = problem, {"h": torch.zeros(8).double()}, meta
    estimator = eg.LeastControl(controller=eg.DynamicInversion(leak=leak), start=start)

    def found(**options):
        return eg.meta_gradient(*given, solver=eg.Picard(**options), estimator=estimator)

    exact = found(tol=1e-10, max_steps=20_000)
    assert exact.error_estimate is not None
    assert exact.error_estimate < 1e-8
    for steps in (4, 10, 20, 40):
        early = found(max_steps=steps)
        assert early.error_estimate is not None
        wrong = relative([*early.grads.values()], [*exact.grads.values()])
        assert 1e-10 < min(wrong, 1.0) <= 2 * early.error_estimate < max(30 * wrong, 1e-6)
        assert ("wrong by" in early.status) == (early.error_estimate > 0.01)
