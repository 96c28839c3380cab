"""The loop and the rules it runs, against independent implementations."""

import pytest
import torch

import equigrad as eg
from equigrad.solvers import settle

TARGET = torch.tensor([3.0, -1.0], dtype=torch.float64)
CURVATURE = torch.tensor([1.0, 0.3], dtype=torch.float64)


def loss(params, step):
    return 0.5 * (CURVATURE * (params["w"] - TARGET).square()).sum()


def velocity(params, step):
    return (-CURVATURE * (params["w"].detach() - TARGET),), lambda: loss(params, step)


def start():
    return {"w": torch.zeros(2, dtype=torch.float64)}


def by_torch(optimizer, steps):
    w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    instance = optimizer([w])
    for _ in range(steps):
        w.grad = CURVATURE * (w.detach() - TARGET)
        instance.step()
    return w.detach()


@pytest.mark.parametrize(
    ("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True), (0.5, True)]
)
def test_gradient_descent_is_the_rule_of_torch_sgd(momentum, nesterov):
    solver = eg.GradientDescent(lr=0.1, momentum=momentum, nesterov=nesterov, max_steps=17)
    ours = settle(velocity, loss, start(), solver).params["w"]
    reference = by_torch(
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=momentum, nesterov=nesterov), 17
    )
    torch.testing.assert_close(ours, reference, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.Adam, {"lr": 0.1}),
        (torch.optim.RMSprop, {"lr": 0.05, "momentum": 0.5}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    ],
)
def test_torch_optimizer_is_unchanged(optimizer, options):
    solver = eg.TorchOptimizer(optimizer=optimizer, options=options, max_steps=13)
    ours = settle(velocity, loss, start(), solver).params["w"]
    assert torch.equal(ours, by_torch(lambda p: optimizer(p, **options), 13))


def test_an_optimizer_that_needs_a_closure():
    solver = eg.TorchOptimizer(
        optimizer=torch.optim.LBFGS, options={"tolerance_change": 1e-15}, tol=1e-6
    )
    settled = settle(velocity, loss, start(), solver)
    assert settled.phase.outcome == "converged"
    torch.testing.assert_close(settled.params["w"], TARGET, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "solver",
    [
        eg.GradientDescent(lr=0.1, momentum=0.9, nesterov=True, max_steps=8),
        eg.TorchOptimizer(optimizer=torch.optim.Adam, options={"lr": 0.1}, max_steps=8),
    ],
)
def test_going_on_with_the_solver_state_equals_never_having_stopped(solver):
    first = settle(velocity, loss, start(), solver, steps=8)
    second = settle(velocity, loss, first.params, solver, previous=first.solver_state, steps=9)
    whole = settle(velocity, loss, start(), solver, steps=17)
    assert torch.equal(second.params["w"], whole.params["w"])
    # a second phase from the same state finds it unchanged
    again = settle(velocity, loss, first.params, solver, previous=first.solver_state, steps=9)
    assert torch.equal(again.params["w"], whole.params["w"])


def test_stops_at_the_tolerance_and_says_so():
    solver = eg.GradientDescent(lr=0.5, tol=1e-6, check_every=1)
    settled = settle(velocity, loss, start(), solver)
    phase = settled.phase
    assert phase.outcome == "converged"
    assert velocity(settled.params, 0)[0][0].norm().item() == pytest.approx(phase.residual)
    # the slow direction contracts by 0.85 a step: log(1e-6 / 0.3) / log 0.85 steps
    assert phase.steps == 78
    assert str(phase) == "converged: residual 9.4e-07 after 78 steps"


def test_without_limit_of_steps():
    solver = eg.GradientDescent(lr=0.05, tol=1e-12, max_steps=None)
    assert settle(velocity, loss, start(), solver).phase.steps > 1000


def test_start_is_not_changed():
    w = start()
    settle(velocity, loss, w, eg.GradientDescent(lr=0.1, max_steps=3))
    assert torch.equal(w["w"], torch.zeros(2, dtype=torch.float64))
