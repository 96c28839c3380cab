"""Meta-learning under least control: what tasks share follows the control that they needed."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import equigrad as eg
from equigrad.tasks import FewShotLearner, TaskBatch

DIRECT = eg.LinearFeedback(gain=0.0, proportional=0.5)
INVERTING = eg.DynamicInversion(gain=0.0, proportional=0.2)


class Once(torch.autograd.Function):
    """The identity, whose derivative refuses to be differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):  # pyright: ignore
        return NeverAgain.apply(gradient)


class NeverAgain(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(gradient):
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):  # pyright: ignore
        raise RuntimeError("trying to differentiate twice what has one derivative")


class OnceDifferentiable(nn.Module):
    def forward(self, x):
        return Once.apply(x)


def tasks(count=2):
    torch.manual_seed(0)
    x, v = torch.randn(2, count, 6, 3, dtype=torch.float64).unbind()
    y, w = torch.randn(2, count, 6, 1, dtype=torch.float64).unbind()
    return TaskBatch((x, y), (v, w))


def learner(model, controller, start: Any = "params", steps=2000, **options):
    return FewShotLearner(
        model=model,
        loss=nn.functional.mse_loss,
        solver=eg.GradientDescent(lr=0.3, momentum=0.5, tol=1e-8, max_steps=steps),
        estimator=eg.LeastControl(controller=controller, start=start),
        batching="vmap",
        **options,
    )


def synapse(*layers, learn=("center", "strength")):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), *layers, nn.Linear(4, 1)).double()
    return eg.nn.ComplexSynapse(net, 1.0, center="init", learn=learn)


def relative_error(found, exact):
    difference = torch.cat([(found[n] - exact[n]).flatten() for n in exact])
    return (difference.norm() / torch.cat([e.flatten() for e in exact.values()]).norm()).item()


def pressure(model, params, meta, batch, number):
    """`∂L_out/∂φ` of one task, by autograd."""
    leaves = {n: p[number].clone().requires_grad_() for n, p in params.items()}
    said = model(leaves, batch.query[0][number])
    loss = nn.functional.mse_loss(said, batch.query[1][number])
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def test_a_synapse_under_direct_control_learns_by_local_rules_of_first_order():
    """`∇ω = λ u` and `∇λ = -(φ - ω) u` for `u = ∂L_out/∂φ`, through a model that has no more."""
    model = synapse(OnceDifferentiable())
    meta, batch = model.meta_params(), tasks()
    result = learner(model, DIRECT).meta_gradient(meta, batch)
    assert result.phases[0].outcome == "converged"
    for name, weight in model.params().items():
        by_center, by_strength = torch.zeros_like(weight), torch.zeros_like(weight)
        for number in range(2):
            u = pressure(model, result.params, meta, batch, number)[name]
            by_center += 1.0 * u / 2
            by_strength -= (result.params[name][number] - meta[f"center.{name}"]) * u / 2
        for found, expected in (
            (result.grads[f"center.{name}"], by_center),
            (result.grads[f"strength.{name}"], by_strength),
        ):
            torch.testing.assert_close(found, expected.detach(), rtol=1e-6, atol=1e-8)


def test_the_controlled_learner_rests_where_both_losses_are_in_balance():
    """Direct control of strength b settles `L_in + b L_out`: the nudged phase of the contrast."""
    model, batch = synapse(), tasks()
    meta = model.meta_params()
    result = learner(model, DIRECT).meta_gradient(meta, batch)
    contrast = learner(model, DIRECT)
    problem = contrast.problem(batch)
    velocity = problem.velocity(result.params, meta, beta=0.5)
    assert max(v.abs().max().item() for v in velocity.values()) < 1e-8


@pytest.mark.parametrize(
    "controller", [DIRECT, eg.DynamicInversion(gain=0.0, proportional=0.2)], ids=str
)
def test_tasks_side_by_side_learn_as_each_would_alone(controller):
    model, batch = synapse(), tasks()
    meta = model.meta_params()
    together = learner(model, controller).meta_gradient(meta, batch)
    alone = learner(model, controller, chunk_size=1).meta_gradient(meta, batch)
    assert relative_error(together.grads, alone.grads) < 1e-6


def test_weak_inversion_is_implicit_differentiation_up_to_the_strength():
    """The error is O(b): a tenth of b, a tenth of the error. Direct control has none of that."""
    model, batch = synapse(), tasks(1)
    meta = model.meta_params()
    solver = eg.GradientDescent(lr=0.3, momentum=0.5, tol=1e-8, max_steps=2000)
    exact = FewShotLearner(
        model=model, loss=nn.functional.mse_loss, solver=solver, estimator=eg.ExactSolve()
    ).meta_gradient(meta, batch)
    errors = []
    for b in (1e-2, 1e-3):
        controller = eg.DynamicInversion(gain=0.0, proportional=b)
        found = learner(model, controller, "free").meta_gradient(meta, batch)
        errors.append(relative_error(found.grads, exact.grads))
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.1)
    assert errors[1] < 2e-2
    direct = eg.LinearFeedback(gain=0.0, proportional=1e-3)
    biased = learner(model, direct, "free").meta_gradient(meta, batch)
    assert relative_error(biased.grads, exact.grads) > 0.1
    # which is the bias of T1-T2: both take the identity for the inverse Hessian
    t1t2 = FewShotLearner(
        model=model, loss=nn.functional.mse_loss, solver=solver, estimator=eg.T1T2()
    ).meta_gradient(meta, batch)
    assert relative_error(biased.grads, t1t2.grads) < 2e-2


def test_a_difference_in_the_place_of_the_mixed_derivative_is_of_first_order():
    """Central: its error falls with the square of its width. None where θ is a synapse's own."""
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1)).double()
    model, batch = eg.nn.Modulation(net), tasks()
    meta = model.meta_params()

    def grads(model, difference, meta=meta):
        rule = eg.LeastControl(controller=DIRECT, start="params", difference=difference)
        few = replace(learner(model, DIRECT, steps=7), estimator=rule)
        return few.meta_gradient(meta, batch).grads

    exact = grads(model, None)
    errors = [relative_error(grads(model, width), exact) for width in (0.1, 0.05)]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)
    layers = [nn.Linear(3, 4), nn.LayerNorm(4), OnceDifferentiable(), nn.Linear(4, 1)]
    single = eg.nn.Modulation(nn.Sequential(*layers).double())
    assert all(g.any() for g in grads(single, 0.1, single.meta_params()).values())
    with pytest.raises(eg.DoubleBackwardError, match="LinearFeedback"):
        grads(single, None, single.meta_params())
    synaptic = synapse()
    own = grads(synaptic, None, synaptic.meta_params())
    for name, grad in grads(synaptic, 1.0, synaptic.meta_params()).items():
        torch.testing.assert_close(grad, own[name])


def test_modulation_under_direct_control_is_a_direct_term_and_a_mixed_derivative():
    """`∂L_out/∂θ - ∂/∂θ (∂L_in/∂φ · u)` at the controlled φ, for u = ∂L_out/∂φ; by hand."""
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1)).double()
    model, batch = eg.nn.Modulation(net), tasks()
    meta = model.meta_params()
    result = learner(model, DIRECT, steps=7).meta_gradient(meta, batch)
    expected = {n: torch.zeros_like(m) for n, m in meta.items()}
    for number in range(2):
        leaves = {n: p[number].clone().requires_grad_() for n, p in result.params.items()}
        phi = list(leaves.values())

        def loss(part, leaves=leaves, number=number):
            x, y = part
            weights = model.weights(leaves, meta)
            return nn.functional.mse_loss(model(weights, x[number]), y[number])

        outer = loss(batch.query)
        u = [g.detach() for g in torch.autograd.grad(outer, phi, retain_graph=True)]
        pull = torch.autograd.grad(loss(batch.support), phi, create_graph=True)
        balance = outer - sum((g * u).sum() for g, u in zip(pull, u, strict=True))
        for name, grad in zip(meta, torch.autograd.grad(balance, [*meta.values()]), strict=True):
            expected[name] += grad / 2
    assert relative_error(result.grads, expected) < 1e-8


def test_a_few_steps_of_inversion_are_as_many_terms_of_the_neumann_series():
    """`ψ_K = η Σ_{k<K} (I - ηH)^k U` from rest: exactly at K = 2, whatever b; up to O(b) beyond.

    Then `(1 - (1 - ηh)^K) / h` of the pressure along a direction of curvature h, which direct
    control takes whole: 0.36, 0.32 and 0.19 for h = 0.5, 1 and 4 here.
    """
    curvature = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)
    target, lr = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64), 0.2
    meta = {"pull": torch.tensor([0.3, 0.2, -0.1], dtype=torch.float64)}
    rest = {"w": meta["pull"] / curvature}
    problem = eg.Bilevel(
        inner_loss=lambda p, m: (0.5 * curvature * p["w"].square() - m["pull"] * p["w"]).sum(),
        outer_loss=lambda p, m: 0.5 * (p["w"] - target).square().sum(),
    )

    def gradient(terms, b):
        steps = eg.GradientDescent(lr=lr, max_steps=terms)
        controller = eg.DynamicInversion(gain=0.0, proportional=b, solver=steps)
        rule = eg.LeastControl(controller=controller, start="params")
        return eg.meta_gradient(problem, rest, meta, solver=steps, estimator=rule)

    def response(terms):
        return (1 - (1 - lr * curvature) ** terms) / curvature * (rest["w"] - target)

    torch.testing.assert_close(
        response(2) / (rest["w"] - target), torch.tensor([0.38, 0.36, 0.24]).double()
    )
    for b in (1e-3, 1.0):
        torch.testing.assert_close(gradient(2, b).grads["pull"], response(2), rtol=1e-14, atol=0)
    errors = [
        (gradient(5, b).grads["pull"] - response(5)).norm() / response(5).norm()
        for b in (1e-2, 1e-3)
    ]
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.05)
    assert errors[1] < 1e-3


def test_a_few_steps_of_weak_inversion_are_the_neumann_series_of_a_learner():
    """The same for tasks side by side, whose Hessians vary with φ: a tenth of b, of the error."""
    model, batch = synapse(), tasks()
    meta = model.meta_params()
    few = eg.GradientDescent(lr=0.1, max_steps=3)
    controlled = learner(model, DIRECT)
    series = replace(controlled, estimator=eg.NeumannSeries(terms=3, alpha=few.lr))
    expected = series.meta_gradient(meta, batch)
    assert expected.phases[0].outcome == "converged"
    errors = []
    for b in (1e-1, 1e-2):
        controller = eg.DynamicInversion(gain=0.0, proportional=b, solver=few)
        found = replace(controlled, estimator=eg.LeastControl(controller=controller))
        errors.append(relative_error(found.meta_gradient(meta, batch).grads, expected.grads))
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.1)
    assert errors[1] < 1e-2


def test_proportional_control_takes_one_gradient_of_the_outer_loss_a_step():
    """T + 3K + 3: none is spent on finding out which parameters it depends on, as integrals do."""
    problem = eg.Bilevel(
        inner_loss=lambda p, m: (p["w"] * m["v"]).square().sum(),
        outer_loss=lambda p, m: (p["w"] - m["v"]).square().sum(),
        reaches={"inner": ["v"], "outer": ["v"]},
    )
    start, meta = {"w": torch.ones(2)}, {"v": torch.ones(2)}
    steps = eg.GradientDescent(lr=0.1, max_steps=3)
    proportional = eg.DynamicInversion(gain=0.0, proportional=0.3)
    for controller, looks in ((proportional, 0), (eg.DynamicInversion(), 1)):
        rule = eg.LeastControl(controller=controller)
        result = eg.meta_gradient(problem, start, meta, solver=steps, estimator=rule)
        assert result.gradient_evaluations == 3 + 3 * 3 + 3 + looks
