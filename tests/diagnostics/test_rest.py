"""A loss that flattens out without a minimum, in which every tolerance is met somewhere."""

import warnings

import pytest
import torch
from torch.nn.functional import softplus

import equigrad as eg

ENDLESS = {
    "exponential": lambda p, m: torch.exp(-m["a"] * p["w"]).sum(),
    "logarithm": lambda p, m: -(m["a"] * torch.log(p["w"] + 1)).sum(),
    "tanh": lambda p, m: torch.tanh(m["a"] * p["w"]).sum(),
    "separable classes": lambda p, m: softplus(-3 * m["a"] * p["w"]).sum(),
}
BOUNDED = {
    "quadratic": lambda p, m: (m["a"] * (p["w"] - 1).square()).sum(),
    "cosh": lambda p, m: torch.cosh(m["a"] * p["w"] - 2).sum(),
    "ridge": lambda p, m: (softplus(-3 * m["a"] * p["w"]) + 0.01 * p["w"].square()).sum(),
    "flat": lambda p, m: ((p["w"] - m["a"]).sum()).square(),
}


def given(dtype):
    start = {"w": torch.full((3,), 0.5, dtype=dtype)}
    return start, {"a": torch.tensor([1.0, 1.5, 2.0], dtype=dtype)}


def solver(dtype):
    return eg.LBFGS(tol=1e-5 if dtype == torch.float32 else 1e-8, max_steps=100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "named"), [(n, n in ENDLESS) for n in (*ENDLESS, *BOUNDED)])
def test_settle_tells_a_minimum_from_a_loss_that_flattens_out(name, named, dtype):
    problem = eg.Bilevel({**ENDLESS, **BOUNDED}[name], lambda p, m: p["w"].square().sum())
    settled = eg.settle(problem, *given(dtype), solver=solver(dtype))
    assert settled.phase.outcome == "converged"
    assert ("or it has no minimum" in settled.status) == named


@pytest.mark.parametrize(("name", "named"), [("separable classes", True), ("ridge", False)])
def test_argmin_warns_of_it_before_any_backward_pass(name, named):
    loss = {**ENDLESS, **BOUNDED}[name]
    start, meta = given(torch.float64)

    def inner_loss(p, m):
        return loss(p, m)

    meta["a"].requires_grad_()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = eg.argmin(inner_loss, start, meta, solver=solver(torch.float64))
    assert any("or it has no minimum" in str(w.message) for w in said) == named
    assert ("or it has no minimum" in found.status) == named


def test_a_saddle_that_a_tolerance_takes_for_rest_is_named():
    problem = eg.Bilevel(
        lambda p, m: (0.25 * (p["w"].square() - m["a"]).square()).sum(),
        lambda p, m: p["w"].sum(),
    )
    start = {"w": torch.full((2,), 1e-5).double()}
    meta = {"a": torch.ones(2).double()}
    settled = eg.settle(problem, start, meta, solver=eg.GradientDescent(lr=0.1, tol=1e-3))
    assert "its curvature there is not positive" in settled.status
