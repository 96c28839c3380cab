import pytest
import torch
from torch import nn

import equigrad as eg


def test_closed_form(quadratic):
    """∂²L_in/∂θ∂φ = -λI on the quadratic, so T1-T2 gives λ H (φ̂_0 - φᵛ)."""
    result = eg.meta_gradient(
        quadratic.problem,
        quadratic.params(),
        quadratic.meta_params(),
        solver=quadratic.solver(max_steps=20),
        estimator=eg.T1T2(),
    )
    pressure = quadratic._hessian * (result.params["phi"] - quadratic._validation)
    expected = quadratic.strength * pressure
    torch.testing.assert_close(result.grads["theta"], expected, rtol=1e-12, atol=0)
    assert result.gradient_evaluations == 2 + 20 + 1 + 2 + 2


def test_one_nudged_step_is_lr_times_t1t2():
    """One matched step from φ̂_0 moves the phases apart by -ηβ ∂L_out: η × T1-T2, as β → 0."""
    torch.manual_seed(5)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x, y, v, w = (torch.randn(8, k).double() for k in (3, 1, 3, 1))
    synapse = eg.nn.ComplexSynapse(net, strength=0.1, learn=("strength", "center"))
    problem = eg.Bilevel(
        lambda p, m: (synapse(p, x) - y).square().mean(),
        lambda p, m: (synapse(p, v) - w).square().mean(),
        regularizer=synapse,
    )
    eta = 0.05
    solver = eg.GradientDescent(lr=eta, momentum=0.95, nesterov=True, tol=1e-12, max_steps=50000)
    kwargs = {"params": synapse.params(), "meta_params": synapse.meta_params(), "solver": solver}
    one_step = eg.GradientDescent(lr=eta, max_steps=1)
    once = eg.Contrastive(beta=1e-4, nudged_solver=one_step, momentum="reset")
    step = eg.meta_gradient(problem, estimator=once, **kwargs).grads
    t1t2 = eg.meta_gradient(problem, estimator=eg.T1T2(), **kwargs).grads
    for name in t1t2:
        torch.testing.assert_close(step[name], eta * t1t2[name], rtol=2e-3, atol=1e-9)


def test_theta_in_the_outer_loss_alone():
    problem = eg.Bilevel(
        lambda p, m: p["w"].square().sum(), lambda p, m: (p["w"] + m["shift"] ** 2).sum()
    )
    result = eg.meta_gradient(
        problem,
        {"w": torch.ones(2)},
        {"shift": torch.tensor([1.0, 3.0])},
        solver=eg.GradientDescent(lr=0.1, max_steps=5),
        estimator=eg.T1T2(),
    )
    assert result.grads["shift"].tolist() == [2.0, 6.0]


def test_an_error_that_is_not_about_second_derivatives_is_not_explained_away():
    judged = []

    def inner(p, m):
        if len(judged) == 2:  # the check, then the outer gradient: what follows is the mixed one
            raise RuntimeError("out of patience")
        return (p["w"] - m["c"]).square().sum()

    def outer(p, m):
        judged.append(True)
        return p["w"].square().sum()

    with pytest.raises(RuntimeError, match="out of patience"):
        eg.meta_gradient(
            eg.Bilevel(inner, outer),
            {"w": torch.ones(2)},
            {"c": torch.zeros(2)},
            solver=eg.GradientDescent(lr=0.1, max_steps=5),
            estimator=eg.T1T2(),
        )
