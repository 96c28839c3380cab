"""What a module holds beside buffers is the same in every phase, and after the call."""

import random
from collections import deque

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import mse_loss

import equigrad as eg

X, V = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(0)).double().unbind()
Y, W = torch.randn(2, 8, 1, generator=torch.Generator().manual_seed(1)).double().unbind()


class Held(nn.Module):
    """A linear layer that keeps something of every call, which its output does not depend on."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1).double()
        self.mean = nn.Parameter(torch.zeros(3).double(), requires_grad=False)
        self.calls, self.log, self.last = 0, deque([1]), {"calls": [0]}
        self.hidden: torch.Tensor | None = None
        self.table, self.names = np.zeros(2), {0}
        self.dice = random.Random(0), np.random.default_rng(0), torch.Generator()
        self.old = np.random.RandomState(0)

    def forward(self, x):
        self.calls += 1
        self.log.append(self.calls)
        self.names.add(self.calls)
        self.last["calls"][0] += 1
        self.hidden = x.mean(0)
        self.mean.data.mul_(0.9).add_(0.1 * x.mean(0))
        self.table += 1
        self.dice[0].random(), self.dice[1].normal(), torch.rand(1, generator=self.dice[2])
        self.old.rand()
        self.added = True
        return self.linear(x)

    def state(self):
        python, numpy, torchs = self.dice
        return [
            self.calls,
            list(self.log),
            str(self.last),
            self.hidden,
            self.mean.tolist(),
            self.table.tolist(),
            self.names.copy(),
            python.getstate(),
            numpy.bit_generator.state["state"],
            torchs.get_state().tolist(),
            str(self.old.get_state()),
            hasattr(self, "added"),
        ]


def ridge(module, call=functional_call):
    """A penalty's strength as θ."""
    problem = eg.Bilevel(
        lambda p, m: (
            mse_loss(call(module, p, (X,)), Y)
            + m["l"].exp() * sum(q.square().sum() for q in p.values())
        ),
        lambda p, m: mse_loss(call(module, p, (V,)), W),
    )
    params = {n: q.detach() for n, q in module.named_parameters() if q.requires_grad}
    return problem, params, {"l": torch.tensor(-1.0, dtype=torch.float64)}


DESCENT = eg.GradientDescent(lr=0.1, max_steps=60)
SYMMETRIC = eg.Contrastive(beta=0.01, scheme="symmetric")


def test_a_module_is_left_as_it_was():
    module = Held()
    before = module.state()
    result = eg.meta_gradient(*ridge(module), solver=DESCENT)
    assert module.state() == before
    assert "a function of params and step" not in result.status


def test_a_module_is_left_as_it_was_by_an_error():
    module = Held()
    before = module.state()
    problem, params, meta = ridge(module)

    def outer(p, m):
        if module.calls > 20:
            raise ZeroDivisionError
        return problem.outer_loss(p, m)

    with pytest.raises(ZeroDivisionError):
        eg.meta_gradient(eg.Bilevel(problem.inner_loss, outer), params, meta, solver=DESCENT)
    assert module.state() == before


class Annealed(nn.Module):
    """Its penalty rises with the calls."""

    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(3, 1).double(), 0

    def forward(self, x):
        self.calls += 1
        return self.linear(x) * (1 + 0.01 * self.calls)


class Averaging(nn.Module):
    """Divides by a running average that is a plain tensor."""

    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(3, 1).double(), torch.ones((), dtype=torch.float64)

    def forward(self, x):
        self.scale = 0.9 * self.scale + 0.1 * x.std()
        return self.linear(x / self.scale)


class Recurrent(nn.Module):
    """Starts from the hidden state that the last call has left."""

    def __init__(self):
        super().__init__()
        self.cell, self.out, self.h = nn.RNNCell(3, 4), nn.Linear(4, 1), None
        self.double()

    def forward(self, x):
        h = self.cell(x, self.h)
        self.h = h.detach()
        return self.out(h)


class Statistics(nn.Module):
    """Running statistics as a frozen parameter."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1).double()
        self.mean = nn.Parameter(torch.zeros(3).double(), requires_grad=False)

    def forward(self, x):
        self.mean.data.lerp_(x.mean(0) + 1, 0.1)
        return self.linear(x - self.mean)


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        (Annealed, "attribute 'calls' of Annealed"),
        (Averaging, "attribute 'scale' of Averaging"),
        (Recurrent, "attribute 'h' of Recurrent"),
        (Statistics, "frozen parameter 'mean'"),
    ],
)
def test_what_makes_two_calls_differ_is_named(kind, named):
    torch.manual_seed(0)
    module = kind()
    before = {n: p.clone() for n, p in module.state_dict().items()}
    one, two = (
        eg.meta_gradient(*ridge(module), solver=DESCENT, estimator=SYMMETRIC) for _ in range(2)
    )
    assert "not a function of params and step alone" in one.status
    assert named in one.status
    assert torch.equal(one.grads["l"], two.grads["l"])
    assert all(torch.equal(p, before[n]) for n, p in module.state_dict().items())


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: torch.Generator(), "torch.Generator"),
        (lambda: np.random.default_rng(0), "numpy.Generator"),
        (lambda: random.Random(0), "random.Random"),
    ],
)
def test_a_generator_of_the_losses_own_is_named(make, name):
    dice = make()

    def noise():
        if isinstance(dice, torch.Generator):
            return torch.randn((), generator=dice).item()
        return dice.normal() if isinstance(dice, np.random.Generator) else dice.gauss(0, 1)

    problem = eg.Bilevel(
        lambda p, m: (p["w"] - m["c"] - noise()).square().sum(), lambda p, m: p["w"].sum()
    )
    one = torch.ones((), dtype=torch.float64)
    result = eg.meta_gradient(problem, {"w": one}, {"c": one}, solver=DESCENT)
    assert name in result.status


def test_large_frozen_parameters_that_are_written_into_are_refused():
    module = Statistics()
    module.table = nn.Parameter(torch.zeros(2**17), requires_grad=False)
    module.register_forward_hook(lambda m, x, y: m.get_parameter("table").add_(1) and None)
    with pytest.raises(eg.ProblemError, match="frozen parameter 'table'"):
        eg.meta_gradient(*ridge(module), solver=DESCENT)
