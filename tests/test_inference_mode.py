"""Calls under inference mode are as those without; what cannot be used is named."""

from typing import Any

import pytest
import torch
from torch import nn

import equigrad as eg

GENERATOR = torch.Generator().manual_seed(0)
X, Y = (torch.randn(12, n, generator=GENERATOR) for n in (4, 2))


def problem(x):
    return eg.Bilevel(
        lambda p, m: (x @ p["w"] - Y).square().mean() + m["l"].exp() * p["w"].square().sum(),
        lambda p, m: ((X + 1) @ p["w"] - Y).square().mean(),
    )


def run(x=X, start=None, strength=None, estimator=None):
    return eg.meta_gradient(
        problem(x),
        {"w": torch.zeros(4, 2) if start is None else start},
        {"l": torch.tensor(-1.0) if strength is None else strength},
        solver=eg.GradientDescent(lr=0.1, max_steps=30),
        estimator=estimator,
    ).grads["l"]


@pytest.mark.parametrize(
    "estimator", [eg.Contrastive(), eg.ConjugateGradient(), eg.Unrolled(), eg.T1T2()], ids=str
)
def test_a_call_under_inference_mode(estimator):
    expected = run(estimator=estimator)
    with torch.inference_mode():
        found = run(estimator=estimator)
        assert torch.is_inference_mode_enabled()
    torch.testing.assert_close(found, expected)
    assert not found.is_inference()


def test_params_and_meta_params_made_under_inference_mode():
    with torch.inference_mode():
        start, strength = torch.zeros(4, 2), torch.tensor(-1.0)
    expected = run()
    torch.testing.assert_close(run(start=start, strength=strength), expected)
    assert not start.any()


def batches(x):
    loss = lambda p, m, b: (b @ p["w"] - Y).square().mean() * m["l"]  # noqa: E731
    return eg.meta_gradient(
        eg.Bilevel(loss, problem(X).outer_loss, inner_batches=[x]),
        {"w": torch.zeros(4, 2)},
        {"l": torch.tensor(1.0)},
        solver=eg.GradientDescent(lr=0.1, max_steps=3),
    )


@pytest.mark.parametrize("call", [run, batches])
def test_data_made_under_inference_mode_are_named(call):
    with torch.inference_mode():
        x = X * 1
    with pytest.raises(eg.ProblemError, match=r"inner_loss uses.*inference_mode.*\.clone\(\)"):
        call(x)
    call(x.clone())


@pytest.mark.parametrize("data", [False, True], ids=["call", "data"])
def test_a_new_task_is_learned_under_inference_mode(data):
    learner = eg.tasks.FewShotLearner(
        model=eg.nn.ComplexSynapse(nn.Linear(4, 2), strength=0.3, center="init", learn=("center",)),
        loss=nn.functional.mse_loss,
        solver=eg.GradientDescent(lr=0.1, max_steps=10),
        estimator=eg.Contrastive(),
    )
    meta = learner.model.meta_params()
    expected = learner.adapt(meta, (X, Y))(X)
    with torch.inference_mode():
        x, y = X * 1, Y * 1
        found = learner.adapt(meta, (X, Y))(X)
    if data:
        found = learner.adapt(meta, (x, y))(X)
    torch.testing.assert_close(found, expected)


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, h, x):
        return torch.tanh(0.4 * self.linear(h) + x)


def test_a_layer_on_what_was_made_under_inference_mode():
    cell: Any = Cell()
    layer = eg.nn.EquilibriumLayer(cell)
    with torch.inference_mode():
        x = X * 1
        inside = layer(X)
    outside = layer(x)
    torch.testing.assert_close(inside, outside.detach())
    outside.sum().backward()
    found = cell.linear.weight.grad.clone()
    layer.zero_grad()
    layer(X).sum().backward()
    torch.testing.assert_close(found, cell.linear.weight.grad)
