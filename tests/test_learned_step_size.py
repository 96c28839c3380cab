"""A step size is not what a settled learner depends on, and whoever would learn one is told so."""

import pytest
import torch

import equigrad as eg

TOLD = "solution .* does not depend on the step size.*learn what changes.*regulariser"


def call(solver, **more):
    problem = eg.Bilevel(
        lambda p, m: 0.5 * (p["w"] - m["t"]).square().sum(),
        lambda p, m: 0.5 * (p["w"] - 2).square().sum(),
    )
    meta = {"t": torch.ones(2, requires_grad=True), **more}
    return eg.meta_gradient(problem, {"w": torch.zeros(2)}, meta, solver=solver)


@pytest.mark.parametrize("name", ["lr", "log_step", "momentum"])
def test_among_the_meta_parameters(name):
    with pytest.raises(
        eg.ProblemError, match=f"depends on meta-parameter {name!r}, .*learning rate.*{TOLD}"
    ):
        call(eg.GradientDescent(lr=0.1, max_steps=5), **{name: torch.tensor(0.1)})


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize(
    "solver",
    [
        lambda t: eg.GradientDescent(lr=t, max_steps=5),
        lambda t: eg.GradientDescent(lr=0.1, momentum=t, max_steps=5),
        lambda t: eg.GradientFlow(dt=t, max_steps=5),
        lambda t: eg.Picard(damping=t, max_steps=5),
    ],
)
def test_a_tensor_in_the_solver(solver, learned):
    step = torch.tensor(0.1, requires_grad=learned)
    with pytest.raises(eg.ConfigurationError, match=f"must be a number, got a tensor.*{TOLD}"):
        call(solver(step))


def test_a_tensor_among_an_optimisers_options():
    step = torch.tensor(0.1, requires_grad=True)
    solver = eg.TorchOptimizer(optimizer=torch.optim.Adam, options={"lr": step}, max_steps=5)
    with pytest.raises(eg.ConfigurationError, match=f"lr of TorchOptimizer must be.*{TOLD}"):
        call(solver)
    constant = eg.TorchOptimizer(
        optimizer=torch.optim.Adam, options={"lr": torch.tensor(0.1)}, max_steps=5
    )
    plain = eg.TorchOptimizer(optimizer=torch.optim.Adam, options={"lr": 0.1}, max_steps=5)
    torch.testing.assert_close(call(constant).grads, call(plain).grads)
