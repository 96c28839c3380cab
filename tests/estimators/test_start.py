"""θ as the initialisation: who sees it, who refuses it, and what each makes of it."""

import pytest
import torch

import equigrad as eg
from equigrad.evaluation import Evaluation
from equigrad.testing import start_case

SOLVER = eg.GradientDescent(lr=0.2, max_steps=4)
CONTRACTION = 0.8**4  # of ½‖w - goal‖² under SOLVER


def pull(p, m):
    return 0.5 * (p["w"] - 1.0).square().sum()


def judge(p, m):
    return 0.5 * (p["w"] - 3.0).square().sum()


def leaf(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def gradient(
    estimator, params, meta, problem: eg.Problem | None = None, solver: eg.Solver = SOLVER
):
    problem = problem or eg.Bilevel(pull, judge)
    return eg.meta_gradient(problem, params, meta, solver=solver, estimator=estimator)


SEEING = [eg.Unrolled(), eg.Unrolled(segment=3), eg.ForwardMode(), eg.MAML()]


@pytest.mark.parametrize("estimator", SEEING, ids=str)
def test_the_path_through_a_computed_start(estimator):
    """φ_0 = (a·b, b): `φ_T = 1 + C(φ_0 - 1)`, `∂L/∂φ_0 = C(φ_T - 3)`, then the chain rule."""
    meta = {"a": leaf(2.0), "b": leaf(-0.5)}
    start = {"w": torch.cat([meta["a"] * meta["b"], meta["b"]])}
    end = 1 + CONTRACTION * (start["w"].detach() - 1)
    by_start = CONTRACTION * (end - 3)
    grads = gradient(estimator, start, meta).grads
    assert grads["a"].item() == pytest.approx(-0.5 * by_start[0].item(), rel=1e-12)
    assert grads["b"].item() == pytest.approx((2 * by_start[0] + by_start[1]).item(), rel=1e-12)


def test_the_graph_of_the_start_can_be_used_again():
    meta = {"a": leaf(2.0)}
    start = {"w": meta["a"].exp()}
    one, two = (gradient(eg.MAML(), start, meta).grads["a"] for _ in range(2))
    assert torch.equal(one, two)
    torch.testing.assert_close(torch.autograd.grad(start["w"], meta["a"])[0], meta["a"].exp())


def test_start_and_loss_paths_add_up():
    """`L_in = ½‖w - θ‖²` from w = θ stays there, so `dL_out/dθ = θ - 3` whatever T is."""
    problem = eg.Bilevel(lambda p, m: 0.5 * (p["w"] - m["w"]).square().sum(), judge)
    meta = {"w": leaf(0.5, 2.0)}
    for estimator in SEEING:
        grads = gradient(estimator, meta, meta, problem).grads
        torch.testing.assert_close(grads["w"], meta["w"].detach() - 3, rtol=1e-12, atol=0)


def test_what_equilibrium_estimators_leave_out_is_said():
    problem = eg.Bilevel(lambda p, m: 0.5 * (p["w"] - m["w"]).square().sum(), judge)
    meta = {"w": leaf(0.5, 2.0)}
    result = gradient(eg.ExactSolve(), meta, meta, problem)
    assert "params are initialised by a function of 'w'" in result.status
    torch.testing.assert_close(result.grads["w"], meta["w"].detach() - 3)
    apart = gradient(eg.ExactSolve(), {"w": torch.zeros(2).double()}, meta, problem)
    assert "start at" not in apart.status


@pytest.mark.parametrize("estimator", [eg.Contrastive(), eg.ConjugateGradient(), eg.T1T2()])
def test_a_start_that_is_forgotten_is_refused(estimator):
    meta = {"w": leaf(0.5, 2.0)}
    with pytest.raises(
        eg.ProblemError,
        match=r"meta-parameter 'w' only through the initialisation.*exactly zero.*"
        r"does not depend on its initialisation.*ComplexSynapse\(learn=\('center',\)\).*"
        r"Unrolled\(\) or ForwardMode\(\) or MAML",
    ):
        gradient(estimator, meta, meta)


def test_a_start_without_a_graph_cannot_be_seen():
    meta = {"w": leaf(0.5, 2.0)}
    detached = {"w": meta["w"].detach()}
    for estimator in (eg.Unrolled(), eg.MAML(), eg.Contrastive()):
        with pytest.raises(
            eg.ProblemError,
            match=r"neither .* depends on meta-parameter 'w'.*computed from meta_params",
        ):
            gradient(estimator, detached, meta)


def test_the_maml_family_asks_for_a_start():
    problem = eg.Bilevel(lambda p, m: 0.5 * (p["w"] - m["goal"]).square().sum(), judge)
    start, meta = {"w": torch.zeros(2, dtype=torch.float64)}, {"goal": leaf(1.0, 1.0)}
    for estimator in (eg.MAML(), eg.FirstOrderMAML(), eg.Reptile()):
        with pytest.raises(eg.ProblemError, match="Compute params from meta_params"):
            gradient(estimator, start, meta, problem)


def test_first_order_maml_is_the_outer_gradient_at_the_end():
    case = start_case(torch.float64)
    result = gradient(eg.FirstOrderMAML(), case.params, case.meta_params, case.problem, case.solver)
    end = result.params["phi"].clone().requires_grad_()
    (expected,) = torch.autograd.grad(case.problem.outer_loss({"phi": end}, {}), end)
    torch.testing.assert_close(result.grads["phi"], expected, rtol=1e-14, atol=0)
    assert result.gradient_evaluations == 2 + 6 + 1


def test_reptile_is_the_way_that_the_learner_went():
    """θ ← θ - ε ĝ is the authors' θ ← θ + ε (φ_T - θ)."""
    meta = {"w": leaf(0.5, 2.0)}
    result = gradient(eg.Reptile(), meta, meta)
    expected = meta["w"].detach() - (1 + CONTRACTION * (meta["w"].detach() - 1))
    torch.testing.assert_close(result.grads["w"], expected, rtol=1e-12, atol=0)
    assert result.gradient_evaluations == 2 + 4


def test_first_order_maml_becomes_maml_for_small_steps():
    case = start_case(torch.float64)
    ratios = []
    for eta in (1e-3, 1e-4):
        solver = eg.GradientDescent(lr=eta, max_steps=5)
        first, full = (
            gradient(estimator, case.params, case.meta_params, case.problem, solver).grads["phi"]
            for estimator in (eg.FirstOrderMAML(), eg.MAML())
        )
        ratios.append(((first - full).norm() / full.norm()).item())
    assert ratios[0] / ratios[1] == pytest.approx(10, rel=0.1)  # first order in ηT


def test_paths_that_the_maml_family_does_not_see():
    meta = {"w": leaf(0.5, 2.0), "goal": leaf(1.0, 1.0), "shift": leaf(0.3)}
    problem = eg.Bilevel(
        lambda p, m: 0.5 * (p["w"] - m["goal"]).square().sum(),
        lambda p, m: 0.5 * (p["w"] - 3 - m["shift"]).square().sum(),
    )
    start = {"w": meta["w"]}
    with pytest.raises(
        eg.ProblemError, match=r"'goal' .* which FirstOrderMAML leaves out.*Unrolled"
    ):
        gradient(eg.FirstOrderMAML(), start, meta, problem)
    with pytest.raises(eg.ProblemError, match=r"'goal', 'shift' .* which Reptile leaves out"):
        gradient(eg.Reptile(), start, meta, problem)
    both = {"w": meta["w"], "shift": meta["shift"]}
    problem = eg.Bilevel(lambda p, m: pull(p, m) + m["w"].square().sum(), problem.outer_loss)
    result = gradient(eg.FirstOrderMAML(), start, both, problem)
    assert "leaves out the effect of 'w' through the inner loss" in result.status
    expected = -(result.params["w"] - 3.3).sum()  # the direct term
    torch.testing.assert_close(result.grads["shift"].sum(), expected)


def test_the_outer_loop_learns_an_initialisation():
    """`1 + C(θ - 1) = 3` where the outer loss is least."""
    meta = {"w": leaf(0.5, 2.0)}
    eg.training.learn(
        eg.Bilevel(pull, judge),
        meta,
        meta,
        solver=SOLVER,
        estimator=eg.MAML(),
        optimizer=torch.optim.SGD(meta.values(), lr=1 / CONTRACTION**2),  # Newton's step
        steps=2,
    )
    torch.testing.assert_close(meta["w"].detach(), torch.full((2,), 1 + 2 / CONTRACTION).double())


def test_a_computed_start_would_go_stale_in_the_outer_loop():
    meta = {"w": leaf(0.5, 2.0)}
    with pytest.raises(
        eg.ConfigurationError, match=r"params\['w'\] was computed.*would not change"
    ):
        eg.training.learn(
            eg.Bilevel(pull, judge),
            {"w": 2 * meta["w"]},
            meta,
            solver=SOLVER,
            estimator=eg.MAML(),
            optimizer=torch.optim.SGD(meta.values(), lr=0.1),
            steps=1,
        )


def test_a_graph_that_was_freed_is_named():
    meta = {"w": leaf(0.5, 2.0)}
    start = {"w": meta["w"].exp()}
    start["w"].sum().backward()
    with pytest.raises(eg.ProblemError, match=r"has already been freed.*Compute params anew"):
        gradient(eg.MAML(), start, meta)


def test_imaml_asks_for_a_learned_center():
    meta = {"goal": leaf(1.0, 1.0)}
    problem = eg.Bilevel(lambda p, m: 0.5 * (p["w"] - m["goal"]).square().sum(), judge)
    with pytest.raises(eg.ProblemError, match=r"IMAML learns the centre.*learn=\('center',\)"):
        gradient(eg.IMAML(), {"w": torch.zeros(2, dtype=torch.float64)}, meta, problem)


def test_pushing_and_pulling_are_transposes():
    """`⟨a, J d⟩ = ⟨Jᵀ a, d⟩` for a start that is not linear in θ."""
    meta = {"a": leaf(2.0, 1.0), "b": leaf(-0.5)}
    start = {"w": (meta["a"] * meta["b"]).exp(), "v": torch.ones(3, dtype=torch.float64)}
    problem = eg.Bilevel(
        lambda p, m: p["w"].square().sum() + p["v"].square().sum(), lambda p, m: p["w"].sum()
    )
    direction = {"a": leaf(0.3, -1.0).detach(), "b": leaf(0.7).detach()}
    adjoint = {"w": leaf(1.5, -2.0).detach(), "v": torch.ones(3, dtype=torch.float64)}
    with Evaluation(problem, start, meta) as evaluation:
        pushed = evaluation.start.push(direction)
        pulled = evaluation.start.pull_back(adjoint)
        assert evaluation.reaches.start == evaluation.reaches.only_start == ["a", "b"]
    w = start["w"].detach()
    torch.testing.assert_close(pushed["w"], w * (-0.5 * direction["a"] + 0.7 * meta["a"].detach()))
    assert not pushed["v"].any()
    one = sum((adjoint[n] * pushed[n].detach()).sum() for n in pushed)
    other = sum((pulled[n] * direction[n]).sum() for n in pulled)
    assert float(one) == pytest.approx(float(other), rel=1e-12)
