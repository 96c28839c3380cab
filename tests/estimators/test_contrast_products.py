"""Hessian products by contrast: those of autograd to what the dtype allows, by first order."""

import dataclasses
import re

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import equigrad as eg
from equigrad.testing import CASES, check_estimator
from helpers import small_network

SOLVES = [
    (eg.ConjugateGradient(tol=1e-8), 1e-6),
    (eg.GMRES(tol=1e-8), 1e-6),
    (eg.NeumannSeries(terms=3000), 1e-6),
    (eg.ExactSolve(), 1e-6),
    (eg.Nystrom(rank=100, damping=1e-6), 1e-3),
]


def by(products, estimator):
    return dataclasses.replace(estimator, products=products)


@pytest.mark.parametrize(("estimator", "rtol"), SOLVES, ids=str)
def test_the_conformance_suite_is_passed_without_second_derivatives(estimator, rtol, monkeypatch):
    original = torch.autograd.grad

    def first_order(*args, create_graph=False, **kwargs):
        return original(*args, create_graph=create_graph, **kwargs)

    def refuse(*args, **kwargs):
        assert not kwargs.get("create_graph"), "a gradient was to be differentiated again"
        return first_order(*args, **kwargs)

    cases = [case for case in CASES if case(torch.float64).name != "proximal"]
    monkeypatch.setattr(torch.autograd, "grad", refuse)
    errors = check_estimator(by("contrast", estimator), rtol=rtol, cases=cases)
    assert len(errors) == len(cases)


def learning(dtype, scale=1.0, batches=False, dropout=0.2):
    """A network whose parameters are `scale` times as large, with the same loss."""
    torch.manual_seed(0)
    x, v = torch.randn(2, 24, 3).to(dtype)
    y, w = torch.randn(2, 24, 1).to(dtype)
    net = eg.nn.Functional(
        nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 1)).to(dtype)
    )

    def inner(params, meta, batch):
        weights = {n: p / scale for n, p in params.items()}
        pull = sum(p.square().sum() for p in weights.values())
        rows = slice(None) if batch is None else slice(12 * batch, 12 * batch + 12)
        return mse_loss(net(weights, x[rows]), y[rows]) + meta["log_strength"].exp() * pull

    def outer(params, meta):
        return mse_loss(net({n: p / scale for n, p in params.items()}, v), w)

    problem = eg.Bilevel(inner, outer, inner_batches=[0, 1] if batches else [None])
    start = {n: scale * p for n, p in net.params().items()}
    return problem, start, {"log_strength": torch.tensor(-5.0, dtype=dtype)}


def gradient(case, estimator, scale=1.0, steps=3000):
    problem, params, meta = case
    solver = eg.GradientDescent(lr=0.05 * scale**2, momentum=0.9, nesterov=True, max_steps=steps)
    torch.manual_seed(3)
    return eg.meta_gradient(problem, params, meta, solver=solver, estimator=estimator)


@pytest.mark.parametrize("batches", [False, True])
def test_batches_and_dropout_are_the_same_on_both_sides(batches):
    found, exact = (
        gradient(learning(torch.float64, batches=batches), by(products, eg.GMRES(tol=1e-9)))
        for products in ("contrast", "autograd")
    )
    torch.testing.assert_close(
        found.grads["log_strength"], exact.grads["log_strength"], rtol=1e-5, atol=0
    )
    assert found.params.keys() == exact.params.keys()


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e6])
def test_the_distance_follows_the_scale_of_the_parameters(scale):
    found = gradient(learning(torch.float64, scale), by("contrast", eg.GMRES()), scale)
    exact = gradient(learning(torch.float64), by("autograd", eg.GMRES()))
    torch.testing.assert_close(
        found.grads["log_strength"], exact.grads["log_strength"], rtol=1e-4, atol=0
    )


def test_float32_keeps_three_digits_and_says_how_many():
    found = gradient(learning(torch.float32, dropout=0), by("contrast", eg.GMRES(tol=1e-4)))
    exact = gradient(learning(torch.float64, dropout=0), by("autograd", eg.GMRES()))
    error = (found.grads["log_strength"].double() / exact.grads["log_strength"] - 1).abs()
    assert error < 2e-2
    said = float(found.status.partition("accurate to ")[2].split()[0])
    assert 1e-6 < said < 2e-2


def test_one_product_is_the_finite_difference_of_t1t2():
    problem, synapse = small_network()
    solver = eg.LBFGS(tol=1e-9, max_steps=500)
    results = [
        eg.meta_gradient(
            problem, synapse.params(), synapse.meta_params(), solver=solver, estimator=estimator
        )
        for estimator in (
            eg.T1T2(products="contrast"),
            eg.FiniteDifferenceT1T2(distance=1e-4),
        )
    ]
    for name, grad in results[0].grads.items():
        torch.testing.assert_close(results[1].grads[name], grad, rtol=1e-5, atol=1e-8)


def test_every_gradient_is_counted():
    problem, params, meta = learning(torch.float64)
    calls = []

    def counted(function):
        def call(*arguments):
            if torch.is_grad_enabled():
                calls.append(function)
            return function(*arguments)

        return call

    problem = dataclasses.replace(
        problem, inner_loss=counted(problem.inner_loss), outer_loss=counted(problem.outer_loss)
    )
    result = gradient((problem, params, meta), by("contrast", eg.GMRES()), steps=5)
    assert result.gradient_evaluations == len(calls) - 4  # the first look at a problem


def test_a_map_is_told_that_it_needs_no_contrast():
    problem = eg.FixedPoint(lambda p, m: {"h": (m["a"] * p["h"]).tanh() + 1}, lambda p, m: p["h"])
    half = torch.tensor(0.5, dtype=torch.float64)
    with pytest.raises(
        eg.ConfigurationError, match=r"FixedPoint problem has none.*products='auto'"
    ):
        eg.meta_gradient(
            problem,
            {"h": torch.zeros((), dtype=torch.float64)},
            {"a": half},
            solver=eg.Picard(tol=1e-9),
            estimator=eg.GMRES(products="contrast"),
        )


@pytest.mark.parametrize("word", ["forward", None, True])
def test_another_way_of_products_is_refused(word):
    problem, synapse = small_network()
    with pytest.raises(eg.ConfigurationError, match="products must be 'auto'"):
        eg.meta_gradient(
            problem,
            synapse.params(),
            synapse.meta_params(),
            solver=eg.LBFGS(),
            estimator=eg.GMRES(products=word),
        )


def test_a_saddle_is_still_named():
    problem = eg.Bilevel(
        lambda p, m: (p["a"] ** 2 - p["b"] ** 2 + m["c"] * p["a"]).sum(),
        lambda p, m: (p["a"] + p["b"]).sum(),
    )
    params = {n: torch.zeros(1, dtype=torch.float64) for n in "ab"}
    with pytest.raises(eg.CurvatureError, match="not a strict minimum"):
        eg.meta_gradient(
            problem,
            params,
            {"c": torch.zeros(1, dtype=torch.float64)},
            solver=eg.GradientDescent(lr=0.1, max_steps=1),
            estimator=eg.ConjugateGradient(products="contrast"),
        )


def kinked(size, draw, nearest, dtype):
    """A curvature that jumps from 1 to 7 at distances of `10 ** nearest` to 1 from the solution."""
    generator = torch.Generator().manual_seed(draw)
    distance = torch.logspace(nearest, 0, size).double()
    distance = distance * torch.randn(size, generator=generator).double().sign()
    goal = torch.randn(size, generator=generator).double()
    share = 1 - (distance > 0).double() * 6 / 7  # dw/dθ
    problem = eg.Bilevel(
        lambda p, m: (
            0.5 * (p["w"] - m["theta"]).square() + 3 * (p["w"] - 1).relu().square()
        ).sum(),
        lambda p, m: 0.5 * (p["w"] - goal.to(dtype)).square().sum(),
    )
    start = {"w": (1 + share * distance).to(dtype)}
    exact = share * (1 + share * distance - goal)
    return problem, start, {"theta": (1 + distance).to(dtype)}, exact


@pytest.mark.parametrize("nearest", [-4, -3, -2, -1])
@pytest.mark.parametrize("size", [6, 20])
@pytest.mark.parametrize("draw", [0, 1, 2])
def test_a_kink_between_the_two_points_is_named(nearest, size, draw):
    """In float32 the best distance by its neighbours may lie beyond all kinks."""
    problem, start, meta, exact = kinked(size, draw, nearest, torch.float32)
    found = eg.meta_gradient(
        problem,
        start,
        meta,
        solver=eg.LBFGS(tol=1e-5),
        estimator=eg.ConjugateGradient(products="contrast"),
    )
    wrong = ((found.grads["theta"].double() - exact).norm() / exact.norm()).item()
    assert found.error_estimate is not None
    assert wrong <= max(10 * found.error_estimate, 1e-4)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU, nn.Softplus])
@pytest.mark.parametrize("depth", [0, 2, 5])
def test_no_smooth_network_in_single_precision_is_taken_for_one_with_kinks(activation, depth):
    torch.manual_seed(depth)
    layers = [nn.Linear(20, 32), activation()]
    for _ in range(depth):
        layers += [nn.LayerNorm(32), nn.Linear(32, 32), activation()]
    net = eg.nn.Functional(nn.Sequential(*layers, nn.Linear(32, 5)))
    x, y = torch.randn(2, 50, 20), torch.randint(5, (50,))

    def inner(p, m):
        decay = torch.stack([q.square().sum() for q in p.values()]).sum()
        return nn.functional.cross_entropy(net(p, x[0]), y) + m["l"].exp() * decay

    found = eg.meta_gradient(
        eg.Bilevel(inner, lambda p, m: nn.functional.cross_entropy(net(p, x[1]), y)),
        net.params(),
        {"l": torch.tensor(-5.0)},
        solver=eg.GradientDescent(lr=0.05, max_steps=100),
        estimator=eg.ConjugateGradient(products="contrast", indefinite="stop", max_iterations=3),
    )
    (accuracy,) = re.findall(r"accurate to ([^ ]+)", found.status)
    assert float(accuracy) < 3e-3
