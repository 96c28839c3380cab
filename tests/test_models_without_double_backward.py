"""Fused attention, compiled models and recurrent networks, against re-solved finite differences."""

import re
import shutil

import pytest
import torch
from torch import nn

import equigrad as eg
from helpers import along, directional_derivative, random_direction


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        # without dropout the CPU takes the fused kernel, in training mode
        self.encoder = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.encoder(x)).mean(1)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 3, batch_first=True)
        self.head = nn.Linear(3, 1)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Perceptron(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 1))


def compiled(backend) -> nn.Module:
    torch._dynamo.reset()  # else the compiles of earlier tests count towards the limit
    model = Perceptron().double()
    return torch.compile(model, backend=backend)  # pyright: ignore[reportReturnType]


needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch's inductor needs a C++ compiler"
)
MODELS = [
    pytest.param(Transformer, id="transformer"),
    pytest.param(Recurrent, id="lstm"),
    pytest.param(lambda: compiled("aot_eager"), id="compiled-aot_eager"),
    pytest.param(lambda: compiled("inductor"), id="compiled-inductor", marks=needs_compiler),
]


def problem_of(model):
    """θ: a strength for every weight, and a scale for every input, which acts through the model."""
    torch.manual_seed(1)
    x, v = torch.randn(2, 7, 3, 4, dtype=torch.float64).unbind()
    y, w = torch.randn(2, 7, 1, dtype=torch.float64).unbind()
    synapse = eg.nn.ComplexSynapse(model.double().train(), strength=0.3)
    problem = eg.Bilevel(
        lambda p, m: (synapse(p, m["scale"] * x) - y).square().mean(),
        lambda p, m: (synapse(p, m["scale"] * v) - w).square().mean(),
        regularizer=synapse,
    )
    meta = synapse.meta_params() | {"scale": torch.ones(4, dtype=torch.float64)}
    return problem, synapse.params(), meta


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("estimator", [eg.GMRES(tol=1e-12), eg.Unrolled()], ids=str)
def test_a_compiled_map_needs_no_second_derivatives(estimator):
    """A single backward through the map, for every product of a linear solve."""
    cell = nn.Sequential(nn.Linear(5, 5), nn.GELU(), nn.LayerNorm(5), nn.Linear(5, 5), nn.Tanh())
    torch._dynamo.reset()
    fast = torch.compile(cell.double(), backend="aot_eager")
    weights = {name: p.detach() for name, p in cell.named_parameters()}
    y = torch.randn(4, 5, dtype=torch.float64)

    def gradient(module, prefix, estimator):
        def relax(p, m):
            named = {prefix + name: value for name, value in m.items()}
            return {"h": 0.5 * torch.func.functional_call(module, named, (p["h"],))}

        problem = eg.FixedPoint(relax, lambda p, m: (p["h"] - y).square().mean())
        return eg.meta_gradient(
            problem,
            {"h": torch.zeros(4, 5, dtype=torch.float64)},
            weights,
            solver=eg.GradientDescent(lr=1, tol=1e-13),
            estimator=estimator,
        ).grads

    exact = gradient(cell, "", eg.ExactSolve())
    found = gradient(fast, "_orig_mod.", estimator)
    for name in exact:
        torch.testing.assert_close(found[name], exact[name], rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore")
def test_first_order_maml_trains_the_start_of_a_compiled_model():
    """Against its definition, the outer gradient at the end; MAML itself is told what can."""
    model = compiled("aot_eager")
    x, y = torch.randn(7, 3, 4, dtype=torch.float64), torch.randn(7, 1, dtype=torch.float64)
    net = eg.nn.Functional(model)
    problem = eg.Bilevel(
        lambda p, m: (net(p, x) - y).square().mean(), lambda p, m: (net(p, x) + y).square().mean()
    )
    start = {name: p.requires_grad_() for name, p in net.params().items()}
    solver = eg.GradientDescent(lr=0.05, max_steps=3)
    result = eg.meta_gradient(problem, start, start, solver=solver, estimator=eg.FirstOrderMAML())
    end = {name: p.clone().requires_grad_() for name, p in result.params.items()}
    expected = torch.autograd.grad(problem.outer_loss(end, {}), list(end.values()))
    for name, grad in zip(end, expected, strict=True):
        torch.testing.assert_close(result.grads[name], grad)
    with pytest.raises(eg.DoubleBackwardError, match=r"MAML.*Use FirstOrderMAML\(\) or Reptile"):
        eg.meta_gradient(problem, start, start, solver=solver, estimator=eg.MAML())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", MODELS)
def test_contrastive_agrees_with_finite_differences(make):
    problem, params, meta = problem_of(make())
    solver = eg.GradientDescent(lr=0.05, momentum=0.9, nesterov=True, tol=1e-10, max_steps=5000)
    result = eg.meta_gradient(
        problem,
        params,
        meta,
        solver=solver,
        estimator=eg.Contrastive(beta=1e-4, scheme="symmetric"),
    )
    assert result.phases[0].outcome == "converged"
    direction = random_direction(meta)
    reference = directional_derivative(problem, result.params, meta, solver, direction, step=1e-4)
    assert along(result.grads, direction) == pytest.approx(reference, rel=1e-3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [MODELS[0], MODELS[2], MODELS[3]])
@pytest.mark.parametrize(
    "estimator",
    [
        eg.T1T2(products="autograd"),
        eg.GMRES(products="autograd"),
        eg.Unrolled(),
        eg.ForwardMode(max_size=200),
    ],
    ids=str,
)
def test_others_say_why_they_cannot_and_what_can(make, estimator):
    torch.manual_seed(0)
    problem, params, meta = problem_of(make())
    solver = eg.GradientDescent(lr=0.01, max_steps=3)
    try:
        found = eg.meta_gradient(problem, params, meta, solver=solver, estimator=estimator)
    except eg.DoubleBackwardError as error:
        said = r"no second derivative.*Use .*Contrastive.*EvolutionStrategies"
        assert re.search(said, str(error))  # noqa: PT017
    else:  # torch 2.14 differentiates a compiled model's backward, forward
        assert isinstance(estimator, eg.ForwardMode)
        torch.manual_seed(0)
        eager = problem_of(Perceptron())
        expected = eg.meta_gradient(*eager, solver=solver, estimator=eg.Unrolled())
        grads = {name.replace("_orig_mod.", ""): g for name, g in found.grads.items()}
        torch.testing.assert_close(grads, expected.grads)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [MODELS[0], MODELS[2], MODELS[3]])
@pytest.mark.parametrize("estimator", [eg.ConjugateGradient(), eg.GMRES()], ids=str)
def test_implicit_estimators_take_products_by_contrast(make, estimator):
    problem, params, meta = problem_of(make())
    solver = eg.GradientDescent(lr=0.05, momentum=0.9, nesterov=True, tol=1e-10, max_steps=5000)
    result = eg.meta_gradient(problem, params, meta, solver=solver, estimator=estimator)
    direction = random_direction(meta)
    reference = directional_derivative(problem, result.params, meta, solver, direction, step=1e-4)
    assert along(result.grads, direction) == pytest.approx(reference, rel=1e-3)
    assert "products by contrast (differences of gradients) accurate to" in result.status


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [MODELS[0], MODELS[2], MODELS[3]])
def test_steps_are_unrolled_by_contrast(make):
    """The gradient of ten steps of Adam, by differences of first-order gradients."""
    torch.manual_seed(0)
    problem, params, meta = problem_of(make())
    solver = eg.TorchOptimizer(
        optimizer=torch.optim.Adam, options={"lr": 0.02}, max_steps=10, tol=None
    )
    result = eg.meta_gradient(
        problem, params, meta, solver=solver, estimator=eg.Unrolled(products="contrast")
    )
    direction = random_direction(meta)
    losses = []
    for sign in (1, -1):
        there = {n: m + sign * 1e-5 * direction[n] for n, m in meta.items()}
        settled = eg.settle(problem, params, there, solver=solver)
        losses.append(problem.outer_loss(settled.params, there).item())
    reference = (losses[0] - losses[1]) / 2e-5
    apart = abs(along(result.grads, direction) - reference) / abs(reference)
    # Adam divides by the gradient of attention's key bias, which is zero but for rounding
    estimate = result.error_estimate
    assert estimate is not None
    assert apart < max(1e-6, estimate)
    assert estimate < 1e-2
    assert "does not change as autograd predicts" not in result.status  # θ is outside, too
