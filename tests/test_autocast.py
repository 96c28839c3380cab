"""Autocast around a call: the losses compute in the lower precision, of weights as they are."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.func import functional_call

import equigrad as eg

BF16 = 2.0**-8


def regression(seen=None, inner_autocast=False):
    """Ridge regression by a linear layer, its strength learned; and where it starts."""
    generator = torch.Generator().manual_seed(1)
    x, v, truth = (torch.randn(n, 5, generator=generator) for n in (24, 24, 3))
    y, w = x @ truth.T, v @ truth.T  # so that a strength does harm that is no rounding
    net = nn.Linear(5, 3)
    nn.init.zeros_(net.weight)
    nn.init.zeros_(net.bias)

    def fit(p, inputs, targets):
        with torch.autocast("cpu", torch.bfloat16, enabled=inner_autocast or lower()):
            outputs = functional_call(net, p, (inputs,))
        if seen is not None:
            seen.append((outputs.dtype, p["weight"].dtype))
        return nn.functional.mse_loss(outputs.float(), targets)

    def inner(p, m):
        return fit(p, x, y) + m["l"].exp() * sum(t.square().sum() for t in p.values())

    problem = eg.Bilevel(inner, lambda p, m: fit(p, v, w))
    params = {n: p.detach() + 0.1 for n, p in net.named_parameters()}
    return problem, params, {"l": torch.tensor(0.5)}


def lower():
    return torch.is_autocast_enabled("cpu")


def off(found, expected):
    """Relative distance, all tensors as one vector."""
    flat = [torch.cat([t.flatten() for t in d.values()]) for d in (found, expected)]
    return ((flat[0] - flat[1]).norm() / flat[1].norm()).item()


SOLVERS = {
    "steps": eg.GradientDescent(lr=0.1, max_steps=200),
    "momentum": eg.GradientDescent(lr=0.05, momentum=0.8, max_steps=300),
    "lbfgs": eg.LBFGS(tol=2e-2, max_steps=50),
    "adam": eg.TorchOptimizer(optimizer=torch.optim.Adam, options={"lr": 0.01}, max_steps=400),
}


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize(
    "estimator",
    [
        eg.Contrastive(beta=0.5, scheme="symmetric"),  # β divides rounding, too
        eg.ConjugateGradient(),
        eg.T1T2(),
        eg.NeumannSeries(terms=100),
    ],
    ids=lambda e: type(e).__name__,
)
def test_a_minimum_and_its_gradient_are_those_without_autocast(solver, estimator):
    problem, params, meta = regression()
    plain = eg.meta_gradient(problem, params, meta, solver=solver, estimator=estimator)
    with torch.autocast("cpu", torch.bfloat16):
        found = eg.meta_gradient(problem, params, meta, solver=solver, estimator=estimator)
    assert off(found.params, plain.params) < 10 * BF16
    assert off(found.grads, plain.grads) < 20 * BF16


@pytest.mark.parametrize("estimator", [eg.GMRES(), eg.Adjoint(), eg.ExactSolve()], ids=str)
@pytest.mark.parametrize("widen", [True, False])
def test_a_map_and_its_gradient_are_those_without_autocast(estimator, widen):
    generator = torch.Generator().manual_seed(2)
    weight, z = (torch.randn(4, 4, generator=generator) for _ in range(2))

    def relax(p, m):
        drive = nn.functional.linear(p["h"], m["W"])
        return {"h": torch.tanh(0.3 * (drive.float() if widen else drive) + z)}

    problem = eg.FixedPoint(relax, lambda p, m: p["h"].square().mean())
    start, meta = {"h": torch.zeros(4, 4)}, {"W": weight}
    run = lambda: eg.meta_gradient(  # noqa: E731
        problem, start, meta, solver=eg.Picard(tol=5e-2, max_steps=50), estimator=estimator
    )
    plain = run()
    with torch.autocast("cpu", torch.bfloat16):
        found = run()
    assert found.params["h"].dtype == found.grads["W"].dtype == torch.float32
    assert off(found.params, plain.params) < 10 * BF16
    assert off(found.grads, plain.grads) < 20 * BF16


def test_neurons_with_an_energy_settle_as_without_autocast():
    torch.manual_seed(0)
    x, y = torch.rand(5, 4), torch.rand(5, 3)
    problem = eg.EnergyBased(
        lambda s, m: _coupling(s, m, x),
        lambda s, m: 0.5 * (s["o"] - y).square().sum(),
        activation=torch.tanh,
    )
    start = {"h": torch.zeros(5, 6), "o": torch.zeros(5, 3)}
    meta = {"a": 0.3 * torch.randn(6, 4), "b": 0.3 * torch.randn(3, 6)}
    run = lambda: eg.meta_gradient(  # noqa: E731
        problem,
        start,
        meta,
        solver=eg.Picard(damping=0.5, max_steps=60),
        estimator=eg.Contrastive(beta=0.3, scheme="symmetric"),
    )
    plain = run()
    with torch.autocast("cpu", torch.bfloat16):
        found = run()
    assert off(found.params, plain.params) < 10 * BF16
    assert off(found.grads, plain.grads) < 40 * BF16


def _coupling(s, m, x):
    return (s["h"] * nn.functional.linear(x, m["a"])).sum() + (
        s["o"] * nn.functional.linear(s["h"], m["b"])
    ).sum()


@pytest.mark.parametrize("around", [True, False])
def test_the_losses_see_the_dtype_that_was_asked_for(around):
    seen = []
    problem, params, meta = regression(seen)
    with torch.autocast("cpu", torch.float16 if around else torch.bfloat16, enabled=around):
        eg.meta_gradient(problem, params, meta, solver=eg.GradientDescent(lr=0.1, max_steps=3))
    expected = torch.bfloat16 if around else torch.float32  # the loss's own autocast has a dtype
    assert set(seen) == {(expected, torch.float32)}


@pytest.mark.parametrize("around", ["on", "off", "layered"])
def test_an_autocast_in_the_losses_has_no_stale_weights_within_another(around):
    problem, params, meta = regression(inner_autocast=True)
    solver, estimator = SOLVERS["steps"], eg.ConjugateGradient()
    alone = eg.meta_gradient(problem, params, meta, solver=solver, estimator=estimator)
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=around != "off"),
        torch.autocast("cpu", torch.bfloat16, enabled=around == "on"),
    ):
        found = eg.meta_gradient(problem, params, meta, solver=solver, estimator=estimator)
    torch.testing.assert_close(found.grads, alone.grads)
    torch.testing.assert_close(found.params, alone.params)


@pytest.mark.parametrize("fails", [False, True])
def test_the_callers_autocast_is_as_it_was(fails):
    problem, params, meta = regression()

    def outer(p, m):
        if fails and not torch.equal(p["weight"], params["weight"]):
            raise ZeroDivisionError
        return problem.outer_loss(p, m)

    with torch.autocast("cpu", torch.bfloat16):
        try:
            eg.meta_gradient(
                eg.Bilevel(problem.inner_loss, outer),
                params,
                meta,
                solver=eg.GradientDescent(lr=0.1, max_steps=3),
            )
        except ZeroDivisionError:
            assert fails
        else:
            assert not fails
        assert lower()
        assert torch.is_autocast_cache_enabled()
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
    assert not lower()


def test_what_rounding_keeps_from_settling_is_named():
    problem, params, meta = regression()
    with torch.autocast("cpu", torch.bfloat16):
        found = eg.meta_gradient(problem, params, meta, solver=eg.LBFGS(tol=1e-6, max_steps=50))
    assert found.phases[0].failed
    assert (
        "under autocast the losses compute in bfloat16, with a relative rounding error of 0.8 %"
        in found.status
    )
    plain = eg.meta_gradient(problem, params, meta, solver=eg.LBFGS(tol=1e-6, max_steps=1))
    assert "autocast" not in plain.status


def test_mini_batches_of_a_fixed_number_of_steps_are_not_taken_for_rounding():
    """The residual of the last batch may be twice that of the first for reasons of their own."""
    problem, params, meta = regression()
    scales = [torch.tensor(s) for s in (0.01, 1.0)]

    def scaled(p, m, scale):
        return scale * problem.inner_loss(p, m)

    batched = eg.Bilevel(scaled, problem.outer_loss, inner_batches=scales)
    adam = eg.TorchOptimizer(optimizer=torch.optim.Adam, options={"lr": 1e-3}, max_steps=4)
    rule = eg.Contrastive(
        beta=0.01, nudge="force", nudged_solver=dataclasses.replace(adam, max_steps=3)
    )
    with torch.autocast("cpu", torch.bfloat16):
        found = eg.meta_gradient(batched, params, meta, solver=adam, estimator=rule)
    nudged = found.phases[1]
    assert nudged.failed  # it grew, in this setting
    assert nudged.tol is None
    assert "bfloat16" not in found.status
