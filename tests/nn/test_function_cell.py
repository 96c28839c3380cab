# pyright: basic, reportArgumentType=false, reportOptionalMemberAccess=false
"""Equilibrium layers of functions: the weights are found, and none is left without its gradient."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

import equigrad as eg

TIGHT = eg.Anderson(tol=1e-12, max_steps=500)


def linear(seed=0):
    torch.manual_seed(seed)
    made = nn.Linear(4, 4).double()
    with torch.no_grad():
        made.weight.mul_(0.7 / torch.linalg.matrix_norm(made.weight, 2))
    return made


EVERYWHERE = linear()


def through(module, h, x):
    return torch.tanh(module(h) + x)


def of_the_file(h, x):
    return helper(h) + 0 * x


def helper(h):
    return torch.tanh(EVERYWHERE(h) + 0.5)


class Net(nn.Module):
    """A network whose layer is of one of its own methods, and whose weight is its own."""

    def __init__(self):
        super().__init__()
        given = linear()
        self.weight, self.bias = given.weight, given.bias
        self.inner = nn.Identity()
        self.layer = eg.nn.EquilibriumLayer(self.step, solver=TIGHT, estimator=eg.ExactSolve())

    def step(self, h, x):
        return torch.tanh(h @ self.weight.T + self.bias + self.inner(x))

    def forward(self, x):
        return self.layer(x)


class Plain:
    """No module, but callable."""

    def __init__(self, parts):
        self.parts = parts

    def __call__(self, h, x):
        return through(self.parts["a"][0], h, x)


class AsModule(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, h, x):
        return through(self.module, h, x)


def layer_of(cell, estimator=None):
    estimator = eg.ExactSolve() if estimator is None else estimator
    return eg.nn.EquilibriumLayer(cell, solver=TIGHT, estimator=estimator)


def inputs():
    torch.manual_seed(1)
    return torch.randn(5, 4, dtype=torch.float64)


def gradients(layer, module, x):
    """By the module's weights."""
    module.zero_grad()
    layer(x).square().sum().backward()
    return [p.grad.clone() for p in module.parameters()]


@pytest.mark.parametrize("estimator", [eg.ExactSolve(), eg.T1T2()], ids=repr)
@pytest.mark.parametrize("how", ["lambda", "partial", "keyword", "object", "nested"])
def test_a_function_has_the_gradient_of_the_module_that_it_is(how, estimator):
    module, x = linear(), inputs()
    inner = partial(through, module)
    cell = {
        "lambda": lambda h, x: torch.tanh(module(h) + x),
        "partial": inner,
        "keyword": lambda h, x, m=None: inner(h, x),
        "object": partial(Plain({"a": [module]})),
        "nested": lambda h, x: inner(h, x),
    }[how]
    expected = gradients(layer_of(AsModule(module), estimator), module, x)
    found = gradients(layer_of(cell, estimator), module, x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_a_method_of_the_network_that_holds_the_layer():
    net, x = Net(), inputs()
    expected = gradients(layer_of(AsModule(reference := linear())), reference, x)
    torch.testing.assert_close(gradients(net, net, x), expected, rtol=1e-9, atol=1e-11)
    assert len(list(net.parameters())) == 2
    assert len(list(net.train().modules())) == 4  # and no end of them
    other = copy.deepcopy(net)
    with torch.no_grad():
        net.weight.mul_(0.5)
    torch.testing.assert_close(gradients(other, other, x), expected, rtol=1e-9, atol=1e-11)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), net(x))


def test_global_modules_and_those_of_functions_of_the_same_file():
    layer = layer_of(of_the_file)
    assert {id(p) for p in layer.parameters()} == {id(p) for p in EVERYWHERE.parameters()}
    found = gradients(layer, EVERYWHERE, inputs())
    assert all(grad.norm() > 0.01 for grad in found)


def test_batch_statistics_of_a_function_move_once_a_pass():
    norm, module, x = nn.BatchNorm1d(4).double(), linear(), inputs()
    layer = layer_of(lambda h, x: torch.tanh(0.1 * module(h) + norm(x)))
    layer(x)
    torch.testing.assert_close(norm.running_mean, 0.1 * x.mean(0))
    assert norm.num_batches_tracked == 1
    layer.eval()(x)
    assert norm.num_batches_tracked == 1
    assert norm.training  # the flag was the user's


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, h, x):
        self.calls = self.calls + 1
        return 0.5 * h + x


def test_a_buffer_that_is_replaced_moves_once_a_pass():
    counting = Counting()
    layer = layer_of(lambda h, x: counting(h, x))
    for passes in (1, 2):
        layer(inputs())
        assert counting.calls == passes


@pytest.mark.parametrize("derived", [False, True], ids=["leaf", "derived"])
def test_a_tensor_around_a_function_is_refused_where_its_gradient_would_be_missing(derived):
    weight = linear().weight.detach().requires_grad_()
    used = 0.9 * weight if derived else weight
    layer = layer_of(lambda h, x: torch.tanh(h @ used.T + x))
    for _ in range(2):
        with pytest.raises(eg.ProblemError, match=r"shape \(4, 4\) that requires a gradient"):
            layer(inputs())


def test_such_a_tensor_may_be_detached_or_be_an_input():
    module, x = linear(), inputs()
    weight = module.weight.detach().requires_grad_()
    layer_of(lambda h, x: torch.tanh(h @ weight.detach().T + x))(x)
    layer = layer_of(lambda h, x, w: torch.tanh(h @ w.T + module.bias + x))
    expected = gradients(layer_of(AsModule(module)), module, x)
    module.zero_grad()
    upstream = 2 * (0.5 * weight)  # the graph of an input is none of the function's business
    layer(x, upstream).square().sum().backward()
    torch.testing.assert_close(weight.grad, expected[0], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(module.bias.grad, expected[1], rtol=1e-9, atol=1e-11)


def test_a_copy_that_would_not_learn_is_refused():
    module = linear()
    for function in (lambda h, x: torch.tanh(module(h) + x), of_the_file):
        with pytest.raises(
            eg.ConfigurationError, match="cannot be copied, because Python does not copy func"
        ):
            copy.deepcopy(nn.Sequential(layer_of(function)))


def test_what_python_copies_with_its_weights_is_copied():
    x = inputs()
    for function in (
        Plain({"a": [linear()]}),
        partial(through, linear()),
        lambda h, x: torch.tanh(x),
    ):
        layer = layer_of(function)
        other = copy.deepcopy(layer)
        with torch.no_grad():
            for weight in layer.parameters():
                weight.mul_(2)
        changed = bool(list(layer.parameters()))
        assert torch.allclose(other(x), layer(x)) != changed


@pytest.mark.parametrize("cell", [1.0, "tanh", None, nn.GRUCell])
def test_what_cannot_be_called_is_named(cell):
    with pytest.raises(eg.ConfigurationError, match=r"called as cell\(h, \*inputs\), got"):
        eg.nn.EquilibriumLayer(cell)


def test_a_variable_that_comes_later_is_named():
    with pytest.raises(eg.ConfigurationError, match=r"no value yet.*Make the layer after"):
        layer_of(lambda h, x: through(later, h, x))
    later = linear()
