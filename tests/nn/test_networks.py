"""The paper's networks, and what becomes of the buffers of batch normalisation."""

import itertools

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import equigrad as eg
from equigrad.nn import lenet5, tanh_network

SOLVER = eg.GradientDescent(lr=0.05, momentum=0.9, nesterov=True, max_steps=7)
X, V = torch.randn(2, 12, 3, 32, 32, generator=torch.Generator().manual_seed(0)).unbind()
Y, W = torch.arange(12) % 10, torch.arange(12) % 7


def test_sizes_are_those_of_the_paper():
    net = tanh_network(784, [256] * 5, 10)
    assert [m.out_features for m in net if isinstance(m, nn.Linear)] == [256] * 5 + [10]
    assert isinstance(net[-1], nn.Linear)
    # 5·5·3·6+6 + 2·6, 5·5·6·16+16 + 2·16, 400·120+120 + 2·120, 120·84+84 + 2·84, 84·10+10
    assert sum(p.numel() for p in lenet5().parameters()) == 468 + 2448 + 48360 + 10332 + 850
    layers = list(lenet5())
    for before, after in itertools.pairwise(layers):
        if isinstance(after, nn.ReLU):
            assert isinstance(before, nn.BatchNorm1d | nn.BatchNorm2d)
    with pytest.raises(
        eg.ConfigurationError, match=r"each a whole number of at least 1, got \(3, 0\)"
    ):
        tanh_network(2, (3, 0), 2)


def meta_gradient(net, modules=None):
    synapse = eg.nn.ComplexSynapse(net, strength=0.01)
    problem = eg.Bilevel(
        lambda p, m: cross_entropy(synapse(p, X), Y),
        lambda p, m: cross_entropy(synapse(p, V), W),
        regularizer=synapse,
        modules=modules and (*modules, synapse.model),
    )
    return eg.meta_gradient(
        problem,
        synapse.params(),
        synapse.meta_params(),
        solver=SOLVER,
        estimator=eg.Contrastive(beta=0.1),
    )


def network(**options):
    torch.manual_seed(1)
    return lenet5(**options)


def test_buffers_handed_out_are_those_of_plain_training():
    net = network(running_statistics=True)
    before = {name: b.clone() for name, b in net.named_buffers()}
    result = meta_gradient(net)
    assert all(torch.equal(b, before[name]) for name, b in net.named_buffers())
    plain = network(running_statistics=True)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    for _ in range(7):
        optimizer.zero_grad()
        pull = sum(p.square().sum() for p in plain.parameters())
        (cross_entropy(plain(X), Y) + 0.005 * pull).backward()
        optimizer.step()
    expected = dict(plain.named_buffers())
    assert result.buffers.keys() == expected.keys()
    for name, buffer in result.buffers.items():
        torch.testing.assert_close(buffer, expected[name], rtol=1e-4, atol=1e-5)
    assert result.buffers["1.num_batches_tracked"] == 7
    # and the settled network computes the same in eval mode
    settled = functional_call(net.eval(), {**result.params, **result.buffers}, (V,))
    torch.testing.assert_close(settled, plain.eval()(V), rtol=1e-3, atol=1e-4)


def test_running_statistics_have_no_part_in_the_gradient():
    """In training mode they are written and never read, in every phase."""
    with_them = meta_gradient(network(running_statistics=True))
    without = meta_gradient(network())
    assert without.buffers == {}
    for name, grad in with_them.grads.items():
        assert torch.equal(grad, without.grads[name])


def test_names_of_the_buffers_of_several_modules():
    plain, other = nn.Linear(1, 1), nn.BatchNorm1d(2)
    buffers = meta_gradient(network(running_statistics=True), modules=(plain, other)).buffers
    assert {name for name in buffers if name.startswith("1.")} == {
        f"1.{name}" for name, _ in other.named_buffers()
    }
    assert buffers["2.1.num_batches_tracked"] == 7
    assert buffers["1.num_batches_tracked"] == 0
    assert not any(name.startswith("0.") for name in buffers)
