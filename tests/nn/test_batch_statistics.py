import pytest
import torch
from torch import nn
from torch.testing import assert_close

import equigrad as eg
from equigrad.nn import ReferenceStatistics
from equigrad.nn.batch_statistics import BatchStatistics, with_statistics_of


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4)),
        nn.BatchNorm1d(4),
    ).double()


REFERENCE = torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(1)).double()
X = torch.randn(7, 2, 6, 6, generator=torch.Generator().manual_seed(2)).double() + 1


def test_statistics_are_those_of_the_reference_for_whatever_is_asked():
    net = ReferenceStatistics(network(), REFERENCE)
    known = with_statistics_of(network(), REFERENCE)  # torch's own layers, in eval mode
    assert_close(net(X), known(X))
    assert_close(net(X)[2:3], net(X[2:3]))  # whoever stands beside has no say
    assert_close(net(X[:5]), known(X[:5]))  # nor do as many rows as the reference has pass for it


def test_on_the_reference_itself_it_is_batch_normalisation():
    net = ReferenceStatistics(network(), REFERENCE)
    assert_close(net(REFERENCE), network().train()(REFERENCE))
    assert_close(net(REFERENCE), with_statistics_of(network(), REFERENCE)(REFERENCE))


def test_derivatives_go_through_the_statistics():
    net = eg.nn.Functional(ReferenceStatistics(network(), REFERENCE))
    params = {name: p.requires_grad_() for name, p in net.params().items()}

    def loss(*values: torch.Tensor) -> torch.Tensor:
        return net(dict(zip(params, values, strict=True)), X).square().sum()

    assert torch.autograd.gradcheck(loss, tuple(params.values()), fast_mode=True)


def test_constant_statistics_are_those_of_a_network_in_eval_mode():
    """Running statistics of the training set: the same answers, and the same derivatives."""
    net = ReferenceStatistics(network(), REFERENCE, constant=True)
    known = with_statistics_of(network(), REFERENCE)
    assert_close(net(X), known(X))
    grads = [
        torch.autograd.grad(module(X).square().sum(), list(module.parameters()))
        for module in (net, known)
    ]
    assert_close(*grads)
    through = ReferenceStatistics(network(), REFERENCE)
    whole = torch.autograd.grad(through(X).square().sum(), list(through.parameters()))
    assert not torch.allclose(grads[0][0], whole[0], rtol=0.1)


def test_the_reference_itself_has_all_its_derivatives_with_constant_statistics():
    nets = [ReferenceStatistics(network(), REFERENCE, constant=c) for c in (True, False)]
    grads = [
        torch.autograd.grad(net(REFERENCE).square().sum(), list(net.parameters())) for net in nets
    ]
    assert_close(*grads)


def test_the_reference_moves_with_the_module():
    assert ReferenceStatistics(network(), REFERENCE).float().reference.dtype == torch.float32


@pytest.mark.parametrize("gain", [True, False])
@pytest.mark.parametrize("reference", [None, 40])
@pytest.mark.parametrize("last", [True, False])
def test_statistics_of_a_lowered_batch_are_not_lowered(gain, reference, last):
    """Rounded to bfloat16, a mean near 10 would be off by up to 1/32."""
    layer = BatchStatistics(nn.BatchNorm2d(3, affine=gain))
    layer.reference = reference
    x = (10.02 + torch.randn(64, 3, 4, 4, generator=torch.Generator().manual_seed(0))).bfloat16()
    x = x.to(memory_format=torch.channels_last) if last else x
    exact = BatchStatistics(nn.BatchNorm2d(3, affine=gain).double())
    exact.reference = reference
    expected = exact(x.double())
    found = layer.normalise(x, layer.weight, layer.bias, channels_last=last)
    rounding = 2**-8 * expected.abs().max() if found.dtype == torch.bfloat16 else 1e-5
    assert (found - expected).abs().max() <= rounding
