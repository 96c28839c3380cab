"""Modules that `copy.deepcopy` refuses settle like any other."""

import threading
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import equigrad as eg
from equigrad.nn.copies import copied

X, Y = (torch.randn(12, n, generator=torch.Generator().manual_seed(n)) for n in (4, 2))


class Keeps(nn.Module):
    """Keeps its activations, alone, in a list and in a dictionary; and a lock."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.lock = threading.Lock()
        self.last, self.all, self.named = None, [], {}

    def forward(self, x):
        with self.lock:
            self.last = self.linear(x)
        self.all.append(self.last)
        self.named["last"] = (self.last, 1)
        return self.last


def pruned():
    net = nn.Linear(4, 2)
    prune.l1_unstructured(net, "weight", 0.5)
    return net


def normed():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(nn.Linear(4, 2))


def spectral():
    return nn.utils.spectral_norm(nn.Linear(4, 2)).eval()


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("make", [Keeps, pruned, normed, spectral])
def test_a_copy_computes_the_same_and_shares_no_weight(make, used):
    net = make()
    expected = net(X).detach() if used else None
    twin = copied(net)
    torch.testing.assert_close(twin(X), net(X) if expected is None else expected)
    own = {p.data_ptr() for p in net.parameters()}
    assert not own & {p.data_ptr() for p in twin.parameters()}
    twin(X).sum().backward()
    assert all(p.grad is None for p in net.parameters())
    if make is Keeps:
        assert twin.lock is net.lock
        assert twin.all is not net.all


@pytest.mark.parametrize("make", [Keeps, pruned, normed])
def test_it_settles(make):
    net = make()
    net(X)
    synapse = eg.nn.ComplexSynapse(net, strength=0.1)
    problem = eg.Bilevel(
        lambda p, m: nn.functional.mse_loss(synapse(p, X), Y),
        lambda p, m: nn.functional.mse_loss(synapse(p, X + 1), Y),
        regularizer=synapse,
    )
    solver = eg.GradientDescent(lr=0.1, max_steps=50)
    found = eg.meta_gradient(problem, synapse.params(), synapse.meta_params(), solver=solver)
    settled = synapse.module(found.params)
    loss = nn.functional.mse_loss(settled(X + 1), Y).item()
    assert loss == pytest.approx(found.outer_loss, rel=1e-5)
