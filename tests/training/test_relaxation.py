"""Networks that settle, trained by mini-batches: against a loop written out with autograd."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import equigrad as eg
from equigrad.training import Checkpoint
from equigrad.training.relaxation import classify, train_network

PICARD = eg.Picard(tol=1e-13, max_steps=20)


class Perceptron(nn.Module):
    """Two layers as a map: hidden neurons, then outputs; it has settled after two steps."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.hidden = nn.Linear(4, 6).double()
        self.readout = nn.Linear(6, 3).double()

    def start(self, x):
        return {"h": x.new_zeros(len(x), 6), "y": x.new_zeros(len(x), 3)}

    def problem(self, x, y):
        def relax(params, meta):
            return {
                "h": torch.tanh(x @ meta["hidden.weight"].T + meta["hidden.bias"]),
                "y": params["h"] @ meta["readout.weight"].T + meta["readout.bias"],
            }

        return eg.FixedPoint(
            relax, lambda p, m: cross_entropy(p["y"], y, reduction="sum"), samples=True
        )

    def logits(self, params, meta_params):
        return params["y"]

    def forward(self, x):
        return self.readout(torch.tanh(self.hidden(x)))


def examples():
    torch.manual_seed(1)
    x = torch.randn(25, 4).double()
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def train(network, **changes):
    options = {"epochs": 3, "batch_size": 10, "solver": PICARD, "seed": 5}
    options |= {"estimator": eg.NeumannSeries(terms=3), **changes}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    return train_network(network, examples(), optimizer=optimizer, **options)


def by_autograd(epochs, clip=None):
    network, (x, y) = Perceptron(), examples()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(1_000_003 * 5 + epoch)
        order = torch.randperm(25, generator=generator)
        for batch in (order[:10], order[10:20]):
            optimizer.zero_grad()
            cross_entropy(network(x[batch]), y[batch]).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(network.parameters(), clip)
            optimizer.step()
    return network


@pytest.mark.parametrize(("clip", "rtol"), [(None, 1e-10), (0.05, 1e-4)])
def test_a_feed_forward_net_learns_as_by_backpropagation(clip, rtol):
    """Torch's clipping adds 1e-6 to the norm."""
    network = Perceptron()
    state = train(network, clip=clip)
    reference = by_autograd(3, clip)
    assert state.step == 6
    for name, w in reference.named_parameters():
        torch.testing.assert_close(network.get_parameter(name), w, rtol=rtol, atol=rtol)
    x, _ = examples()
    assert torch.equal(classify(network, x, solver=PICARD, batch_size=7), reference(x).argmax(1))


def test_the_loss_that_is_logged_is_a_mean():
    x, y = examples()
    network = Perceptron()
    state = train(network, epochs=1, batch_size=25)
    expected = cross_entropy(Perceptron()(x), y).item()
    assert state.history[0]["outer_loss"] == pytest.approx(expected, rel=1e-12)


def test_a_share_of_an_epoch_is_a_step_at_least():
    state = train(Perceptron(), epochs=0.001)
    assert (state.step, repr(state.steps)) == (1, "1")
    assert train(Perceptron(), epochs=0).step == 0


def test_validation_after_every_epoch_and_at_the_end():
    state = train(Perceptron(), epochs=2.5, validate=lambda: {"validation_accuracy": 1.0})
    watched = [row["outer_step"] for row in state.history if "validation_accuracy" in row]
    assert watched == [1, 3, 4]


def test_resumed_training_ends_with_the_same_bits(tmp_path):
    whole, first, second = Perceptron(), Perceptron(), Perceptron()
    train(whole)
    train(first, epochs=1.5, callbacks=[Checkpoint(tmp_path / "checkpoint.pt")])
    train(second, callbacks=[Checkpoint(tmp_path / "checkpoint.pt", resume=True)])
    for name, w in whole.named_parameters():
        assert torch.equal(w, second.get_parameter(name))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "of at least 1, got 0"),
        ({"batch_size": 26}, "got 26"),
        ({"batch_size": 2.5}, "must be a whole number of at least 1, got 2.5"),
        ({"epochs": -1}, "epochs must be a finite number of at least 0 or math.inf, got -1"),
        ({"clip": 0.0}, "clip must be a finite number above 0, or None, got 0"),
    ],
)
def test_knobs_that_cannot_work(options, message):
    with pytest.raises(eg.ConfigurationError, match=message):
        train(Perceptron(), **options)


def test_inputs_and_targets_that_differ_in_number():
    x, y = examples()
    network = Perceptron()
    with pytest.raises(eg.ConfigurationError, match="25 inputs, but 20 targets"):
        train_network(
            network,
            (x, y[:20]),
            solver=PICARD,
            estimator=eg.NeumannSeries(),
            optimizer=torch.optim.SGD(network.parameters(), lr=0.5),
            epochs=1,
            batch_size=5,
        )


def test_frozen_parameters_stay_and_the_others_learn_as_before():
    """Frozen hidden weights: autograd trains the readout alone, and clips by its norm alone."""
    network = Perceptron()
    network.hidden.requires_grad_(False)
    before = network.hidden.weight.clone()
    train(network, epochs=1, batch_size=25, clip=0.05)
    reference, (x, y) = Perceptron(), examples()
    cross_entropy(reference(x), y).backward()
    step = reference.readout.weight.grad
    bias = reference.readout.bias.grad
    assert step is not None
    assert bias is not None
    norm = torch.stack([step.norm(), bias.norm()]).norm()
    expected = reference.readout.weight - 0.5 * step * min(1, 0.05 / norm.item())
    torch.testing.assert_close(network.readout.weight, expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(network.hidden.weight, before)
    network.requires_grad_(False)
    with pytest.raises(eg.ConfigurationError, match="all parameters are frozen"):
        train(network)
