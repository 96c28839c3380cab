"""Feedback weights that learn: what a backward pass sees, and how they align."""

import math

import pytest
import torch
from torch import nn

import equigrad as eg
from equigrad.nn import LearnedFeedback, Relaxing, tanh_network, with_learned_feedback


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(4, 3), (5, 4)),
        (nn.Linear(4, 3, bias=False), (2, 5, 4)),
        (nn.Conv2d(2, 4, 3, stride=2, padding=1), (2, 2, 7, 7)),
        (nn.Conv2d(2, 4, 3, groups=2, dilation=2), (2, 2, 7, 7)),
    ],
)
def test_forward_by_one_matrix_and_backward_by_the_other(layer, shape):
    torch.manual_seed(0)
    layer = layer.double()
    x = torch.randn(*shape).double().requires_grad_()
    swapped = LearnedFeedback(layer)
    out = swapped(x)
    torch.testing.assert_close(out, layer(x))
    bar = torch.randn_like(out)
    by_weights = torch.autograd.grad(layer(x), list(layer.parameters()), bar)
    found = torch.autograd.grad(out, [x, *layer.parameters(), swapped.feedback], bar)
    torch.testing.assert_close(found[1:-1], by_weights)
    torch.testing.assert_close(found[-1], by_weights[0])
    with torch.no_grad():
        layer.weight.copy_(swapped.feedback)
    (by_feedback,) = torch.autograd.grad(layer(x), x, bar)
    torch.testing.assert_close(found[0], by_feedback)


def task():
    torch.manual_seed(4)
    x = torch.randn(40, 6)
    return x, (x @ torch.randn(6, 3)).argmax(1)


def test_the_matrices_differ_by_a_geometrically_shrinking_part():
    """The same gradient and the same decay: `W - B = (1 - lr·decay)^t (W_0 - B_0)`."""
    x, y = task()
    net = with_learned_feedback(tanh_network(6, [8], 3))
    layer = net[2]  # pyright: ignore
    before = (layer.weight - layer.feedback).detach().clone()
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.2)
    for _ in range(20):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimiser.step()
    after = (layer.weight - layer.feedback).detach()
    torch.testing.assert_close(after, (1 - 0.02) ** 20 * before, rtol=1e-4, atol=1e-6)


def test_kolen_pollack_control_aligns_and_its_gradient_becomes_that_of_inversion():
    x, y = task()
    torch.manual_seed(5)
    net = Relaxing(with_learned_feedback(tanh_network(6, [12], 3)))  # pyright: ignore
    optimiser = torch.optim.AdamW(net.parameters(), lr=0.03, weight_decay=1.0)
    controller = eg.DynamicInversion(gain=1.0, leak=1.0)

    def gradients():
        meta = dict(net.named_parameters())
        return eg.meta_gradient(
            net.problem(x, y),
            net.start(x),
            meta,
            solver=eg.Anderson(tol=1e-4),
            estimator=eg.LeastControl(controller=controller, start="params"),
        ).grads

    def angle():
        """Between the gradient by the feedback weights and that by the transposes of W."""
        given = gradients()
        kept = {n: p.detach().clone() for n, p in net.named_parameters()}
        with torch.no_grad():
            for layer in net.modules():
                if isinstance(layer, LearnedFeedback):
                    layer.feedback.copy_(layer.weight)
        exact = gradients()
        with torch.no_grad():
            for name, p in net.named_parameters():
                p.copy_(kept[name])
        a, b = (torch.cat([g["blocks.0.0.weight"].flatten()]) for g in (given, exact))
        return math.degrees(math.acos((a @ b / (a.norm() * b.norm())).item()))

    layer = net.blocks[1][1]  # pyright: ignore
    assert isinstance(layer, LearnedFeedback)
    before, wrong = layer.alignment(), angle()
    assert before > 60
    for _ in range(50):
        for name, grad in gradients().items():
            net.get_parameter(name).grad = grad / len(x)
        optimiser.step()
    assert layer.alignment() < 15
    assert angle() < 15 < wrong


def test_layers_that_have_none():
    with pytest.raises(eg.ConfigurationError, match=r"numeric zero padding, .*; got Conv2d"):
        LearnedFeedback(nn.Conv2d(1, 1, 3, padding="same"))
    with pytest.raises(eg.ConfigurationError, match="got Tanh"):
        LearnedFeedback(nn.Tanh())  # pyright: ignore[reportArgumentType]


def test_a_layer_in_two_places_stays_one():
    shared = nn.Linear(3, 3)
    net = with_learned_feedback(nn.Sequential(shared, nn.Tanh(), shared))
    assert net[0] is net[2]  # pyright: ignore
    assert len(list(net.parameters())) == 3


class Exponential(nn.Linear):
    """What it computes is not what a linear layer does."""

    def forward(self, input):
        return nn.functional.linear(input, self.weight.exp(), self.bias)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(Exponential(3, 2)),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)),
        lambda: nn.MultiheadAttention(4, 2),
    ],
)
def test_layers_that_are_more_than_linear_are_not_swapped(make):
    with pytest.raises(eg.ConfigurationError, match="not their subclasses"):
        with_learned_feedback(make())


def test_a_weight_that_is_computed_is_none_to_learn():
    with pytest.warns(FutureWarning):
        layer = nn.utils.weight_norm(nn.Linear(3, 2))
    with pytest.raises(eg.ConfigurationError, match="computed weights"):
        LearnedFeedback(layer)


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Linear(4, 3), (5, 4)), (nn.Conv2d(2, 3, 3), (2, 2, 5, 5))]
)
def test_gradients_under_autocast_are_those_without_to_the_digits_of_bfloat16(layer, shape):
    torch.manual_seed(0)
    swapped = LearnedFeedback(layer)
    x = torch.randn(*shape).requires_grad_()
    leaves = [x, *swapped.parameters()]
    exact = torch.autograd.grad(swapped(x).square().sum(), leaves)
    with torch.autocast("cpu", torch.bfloat16):
        loss = swapped(x).float().square().sum()
    for found, expected in zip(torch.autograd.grad(loss, leaves), exact, strict=True):
        assert found.dtype == torch.float32
        assert (found - expected).norm() < 2**-6 * expected.norm()


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Linear(3, 2), (4, 3)), (nn.Conv2d(2, 3, 3, padding=1), (2, 2, 4, 4))]
)
def test_the_second_derivative_is_whole_where_feedback_is_the_weight(layer, shape):
    """Torch leaves it out without a word where a backward pass is marked `once_differentiable`."""
    torch.manual_seed(0)
    swapped, x = LearnedFeedback(layer.double()), torch.randn(*shape).double().requires_grad_()
    weight = swapped.weight.detach()

    def slope(x):
        out = torch.func.functional_call(swapped, {"weight": weight, "feedback": weight}, (x,))
        return torch.autograd.grad(out.tanh().square().sum(), x, create_graph=True)[0]

    assert torch.autograd.gradcheck(slope, (x,))
