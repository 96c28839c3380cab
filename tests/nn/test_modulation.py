"""Learning by modulation, and a learned start: which weights a task changes."""

import pytest
import torch
from torch import nn

import equigrad as eg
from equigrad.nn import LearnedStart, Modulation, conv4


def test_gains_shifts_and_the_readout_are_fast_and_all_else_is_shared() -> None:
    modulation = Modulation(conv4(filters=4))
    norms = {f"{i}.{kind}" for i in (1, 5, 9, 13) for kind in ("weight", "bias")}
    assert set(modulation.params()) == norms | {"17.weight", "17.bias"}
    convolutions = {f"{i}.{kind}" for i in (0, 4, 8, 12) for kind in ("weight", "bias")}
    assert set(modulation.meta_params()) == convolutions


def test_head_can_be_named() -> None:
    net = nn.ModuleDict({"body": nn.Linear(3, 3), "norm": nn.LayerNorm(3), "out": nn.Linear(3, 2)})
    assert set(Modulation(net).params()) == {
        f"{m}.{k}" for m in ("norm", "out") for k in ("weight", "bias")
    }
    assert set(Modulation(net, head="body").meta_params()) == {"out.weight", "out.bias"}


def test_what_cannot_be_modulated_is_refused() -> None:
    with pytest.raises(eg.ProblemError, match="no normalisation layer"):
        Modulation(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    with pytest.raises(eg.ProblemError, match="no normalisation layer"):
        Modulation(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2, elementwise_affine=False)), "0")
    with pytest.raises(eg.ProblemError, match="no submodule 'readout'"):
        Modulation(conv4(filters=2), head="readout")
    with pytest.raises(eg.ProblemError, match="nothing is left"):
        Modulation(nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 2)))


@pytest.mark.parametrize("divide", [Modulation, LearnedStart])
def test_weights_at_the_start_are_the_modules(divide) -> None:
    net = conv4(filters=4)
    model = divide(net)
    meta_params = model.meta_params()
    weights = model.weights(model.start(meta_params), meta_params)
    for name, p in net.named_parameters():
        assert weights[name].equal(p)
    module = model.module({name: w + 1 for name, w in weights.items()})
    assert all(p.equal(dict(net.named_parameters())[n] + 1) for n, p in module.named_parameters())
    assert all(isinstance(p, nn.Parameter) for p in module.parameters())
    x = torch.randn(2, 1, 28, 28)
    assert model.module()(x).equal(net(x))
