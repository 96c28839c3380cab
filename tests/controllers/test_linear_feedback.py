"""Feedback weights that are a part of θ, and learn from noise beside what they lead."""

import pytest
import torch
from torch import nn

import equigrad as eg
from equigrad.controllers import learn_feedback
from equigrad.nn import Relaxing, tanh_network

TIGHT = eg.Picard(tol=1e-11, max_steps=500)


def network():
    """Six inputs, eight hidden neurons with feedback from three outputs, and five samples."""
    torch.manual_seed(3)
    start = {"0": 0.1 * torch.randn(8, 3)}
    net = Relaxing(tanh_network(6, [8], 3), feedback=start).double()
    return net, torch.randn(5, 6).double(), torch.arange(5) % 3


def gradient(net, x, y, controller, seed=0):
    meta = dict(net.named_parameters())
    torch.manual_seed(seed)
    return eg.meta_gradient(
        net.problem(x, y),
        net.start(x),
        meta,
        solver=TIGHT,
        estimator=eg.LeastControl(controller=controller),
    )


def learning(**knobs):
    return eg.LinearFeedback(feedback="feedback", gate=nn.Tanh(), **knobs)


def test_weights_in_theta_lead_as_the_same_weights_given_do():
    net, x, y = network()
    given = eg.LinearFeedback(feedback={"0": net.feedback["0"].detach()}, gate=nn.Tanh())
    found, expected = gradient(net, x, y, learning()), gradient(net, x, y, given)
    for name in expected.grads.keys() - {"feedback.0"}:
        torch.testing.assert_close(found.grads[name], expected.grads[name], rtol=0, atol=0)
    assert "'feedback.0' is exactly zero" in expected.status
    assert "exactly zero" not in found.status


def test_their_gradient_leads_to_what_the_same_noise_teaches():
    """`Σ g'² ∘ (Q - Q̂)`, a sum over samples, with Q̂ of `learn_feedback` from the same draws."""
    net, x, y = network()
    found = gradient(net, x, y, learning(draws=3, noise=1e-3), seed=7)
    torch.manual_seed(7)
    taught = learn_feedback(
        net.problem(x, y),
        net.start(x),
        dict(net.named_parameters()),
        solver=TIGHT,
        draws=3,
        noise=1e-3,
        gate=nn.Tanh(),
        seed=int(torch.randint(2**62, ())),
    )
    slopes = 1 - found.params["0"].tanh().square()
    expected = slopes.square().sum(0)[:, None] * (net.feedback["0"] - taught["0"])
    torch.testing.assert_close(found.grads["feedback.0"], expected.detach(), rtol=1e-6, atol=1e-8)


def test_descending_it_aligns_them_with_the_transposed_weights():
    net, x, y = network()
    weights = net.feedback["0"]
    forward = net.blocks[1][1].weight.detach()  # pyright: ignore
    assert (weights - forward.T).norm() > forward.norm()
    controller = learning(draws=10, solver=eg.Picard(tol=1e-3, max_steps=50))
    for step in range(40):  # by steps of 1 / t: the mean over all draws, nearly
        found = gradient(net, x, y, controller, seed=step).grads["feedback.0"]
        weights.data -= found / (len(x) * (step + 1))
    # noise leaves √(24 entries / 2000 draws) of it, by samples, steps and draws
    assert (weights - forward.T).norm() < 0.2 * forward.norm()


def test_they_must_be_there():
    net, x, y = network()
    with pytest.raises(
        eg.ConfigurationError,
        match=r"begin with 'backward.', but there are none; meta_params has 'blocks",
    ):
        gradient(net, x, y, eg.LinearFeedback(feedback="backward"))
    with pytest.raises(
        eg.ConfigurationError, match=r"an entry for 'h', which is not one of the states: '0', '1'"
    ):
        Relaxing(tanh_network(6, [8], 3), feedback={"h": torch.zeros(8, 3)})
    wrong = Relaxing(tanh_network(6, [8], 3), feedback={"0": torch.zeros(3, 8)}).double()
    with pytest.raises(eg.ConfigurationError, match=r"must have shape 8 x 3.*\(1\), got 3 x 8"):
        gradient(wrong, x, y, learning())


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"noise": 0.0}, "noise must be a finite number above 0, got 0.0"),
        ({"draws": 0}, "draws must be a whole number of at least 1, got 0"),
    ],
)
def test_noise_that_teaches_nothing(knobs, message):
    with pytest.raises(eg.ConfigurationError, match=message):
        learning(**knobs)
