import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

import equigrad as eg


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(3, 3, bias=False)
        self.decode = nn.Linear(3, 3)
        self.decode.weight = self.encode.weight

    def forward(self, x):
        return self.decode(torch.tanh(self.encode(x)))


class Frozen(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        self[0].requires_grad_(False)


@pytest.mark.parametrize(
    "make", [Tied, Frozen, lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))]
)
def test_same_values_and_gradients_as_functional_call(make):
    model = make()
    before = copy.deepcopy(model.state_dict())
    functional = eg.nn.Functional(model)
    params = {n: torch.randn_like(p).requires_grad_() for n, p in functional.params().items()}
    x = torch.randn(5, 3)
    ours, reference = functional(params, x), functional_call(copy.deepcopy(model), params, x)
    torch.testing.assert_close(ours, reference)
    leaves = list(params.values())
    for a, b in zip(
        torch.autograd.grad(ours.square().sum(), leaves),
        torch.autograd.grad(reference.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    assert all(torch.equal(before[n], value) for n, value in model.state_dict().items())


def test_new_parameters_are_seen_at_the_next_call():
    functional = eg.nn.Functional(nn.Linear(2, 1, bias=False))
    x = torch.ones(1, 2)
    assert functional({"weight": torch.ones(1, 2)}, x).item() == 2
    weight = torch.zeros(1, 2)
    assert functional({"weight": weight}, x).item() == 0
    weight += 5  # in place: the tensor that is bound
    assert functional({"weight": weight}, x).item() == 10


def test_frozen_parameters_are_constants():
    assert sorted(eg.nn.Functional(Frozen()).params()) == ["2.bias", "2.weight"]


def test_nothing_to_train():
    with pytest.raises(eg.ProblemError, match="ReLU has no parameters"):
        eg.nn.Functional(nn.ReLU())
    with pytest.raises(eg.ProblemError, match=r"must be a torch\.nn\.Module, got function"):
        eg.nn.Functional(lambda x: x)  # pyright: ignore[reportArgumentType]


def test_hooks_on_parameters_which_a_copy_does_not_have_are_named():
    model = nn.Linear(3, 2)
    model.weight.register_hook(lambda grad: grad * 0)
    with pytest.warns(UserWarning, match="parameters 'weight' of Linear have backward hooks"):
        eg.nn.Functional(model)
