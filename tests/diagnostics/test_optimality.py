"""The optimality condition of the least-control principle, controller by controller."""

import pytest
import torch

import equigrad as eg
from equigrad.controllers import learn_feedback
from equigrad.nn import Relaxing, tanh_network, with_learned_feedback

TIGHT = eg.Anderson(tol=1e-11, max_steps=500)


def network(widths=(8,)):
    torch.manual_seed(3)
    net = Relaxing(tanh_network(6, widths, 3)).double()
    return net, torch.randn(5, 6).double(), torch.arange(5) % 3


def share(net, x, y, controller):
    meta, problem = dict(net.named_parameters()), net.problem(x, y)
    estimator = eg.LeastControl(controller=controller, start="params")
    result = eg.meta_gradient(problem, net.start(x), meta, solver=TIGHT, estimator=estimator)
    assert result.phases[0].outcome == "converged"
    return eg.column_space_condition(problem, result.params, meta)


def test_controllers_that_invert_satisfy_it_and_direct_feedback_does_not():
    net, x, y = network((8, 7))
    for controller in (
        eg.DynamicInversion(gain=1.0, leak=1.0),
        eg.EnergyInversion(gain=1.0, leak=1.0),
    ):
        found = share(net, x, y, controller)
        assert found.shape == (5,)
        assert found.max() < 1e-7
    # ψ = U at the outputs only: y alone is led, where the least control leads every layer
    direct = share(net, x, y, eg.LinearFeedback(gain=1.0, leak=1.0))
    assert direct.min() > 0.2


def test_feedback_by_the_transposed_weights_satisfies_it_with_one_hidden_layer():
    """`ψ_h = tanh'(h) ∘ Wᵀ u` and `ψ_y = u` are what dynamic inversion settles at."""
    net, x, y = network()
    weight = net.blocks[1][1].weight.detach()  # pyright: ignore
    gated = eg.LinearFeedback(gain=1.0, leak=1.0, feedback={"0": weight.T}, gate=torch.tanh)
    assert share(net, x, y, gated).max() < 1e-7
    ungated = eg.LinearFeedback(gain=1.0, leak=1.0, feedback={"0": weight.T})
    assert share(net, x, y, ungated).max() > 0.01


def test_feedback_learned_from_noise_is_the_transpose_up_to_the_noise_of_its_average():
    net, x, y = network()
    weight = net.blocks[1][1].weight.detach()  # pyright: ignore
    meta, problem = dict(net.named_parameters()), net.problem(x, y)
    errors, shares = [], []
    for draws in (20, 320):
        learned = learn_feedback(
            problem, net.start(x), meta, solver=TIGHT, draws=draws, gate=torch.tanh
        )
        errors.append((learned["0"] - weight.T).norm().item())
        hidden = {"0": learned["0"]}
        controller = eg.LinearFeedback(gain=1.0, leak=1.0, feedback=hidden, gate=torch.tanh)
        shares.append(share(net, x, y, controller).mean().item())
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.35)  # the root of 16 times the draws
    assert shares[1] < shares[0] / 2
    assert shares[1] < 0.1


def test_kolen_pollack_feedback_satisfies_it_as_it_aligns():
    torch.manual_seed(3)
    net = Relaxing(with_learned_feedback(tanh_network(6, (8,), 3))).double()  # pyright: ignore
    x, y = torch.randn(5, 6).double(), torch.arange(5) % 3
    meta, layer = dict(net.named_parameters()), net.blocks[1][1]  # pyright: ignore
    plain, _, _ = network()
    plain.load_state_dict({n: p for n, p in meta.items() if "feedback" not in n})
    found = []
    for mixed in (1.0, 0.1, 0.0):
        with torch.no_grad():
            layer.feedback.copy_((1 - mixed) * layer.weight + mixed * layer.feedback)
        estimator = eg.LeastControl(
            controller=eg.DynamicInversion(gain=1.0, leak=1.0), start="params"
        )
        led = eg.meta_gradient(
            net.problem(x, y), net.start(x), meta, solver=TIGHT, estimator=estimator
        ).params
        # by the true Jacobian, which the layers with learned feedback do not tell
        weights = dict(plain.named_parameters())
        found.append(eg.column_space_condition(plain.problem(x, y), led, weights).mean().item())
    assert found[0] > 0.3
    assert found[1] < 0.1
    assert found[2] < 1e-7


def test_a_matrix_too_large_to_form():
    net, x, y = network()
    with pytest.raises(eg.ConfigurationError, match=r"11 × 11 matrix, more than max_size=5"):
        eg.column_space_condition(
            net.problem(x, y), net.start(x), dict(net.named_parameters()), max_size=5
        )


def test_the_control_is_that_of_the_mean_over_batches():
    """Two batches against one map that is their mean: the same residual, the same share."""
    torch.manual_seed(0)
    weight, readout = 0.3 * torch.randn(3, 3).double(), torch.randn(3, 1).double()
    first, second = torch.randn(2, 3).double()

    def relax(params, meta, batch):
        return {
            "h": torch.tanh(params["h"] @ weight + batch + meta["b"]),
            "y": params["h"] @ readout,
        }

    def mean(params, meta):
        one, other = relax(params, meta, first), relax(params, meta, second)
        return {name: (one[name] + other[name]) / 2 for name in one}

    def outer(params, meta):
        return (params["y"] - 1).square().sum()

    led = {"h": torch.randn(3).double(), "y": torch.randn(1).double()}
    meta = {"b": torch.zeros(3).double()}
    batched = eg.FixedPoint(relax, outer, inner_batches=[first, second])
    found = eg.column_space_condition(batched, led, meta)
    torch.testing.assert_close(
        found, eg.column_space_condition(eg.FixedPoint(mean, outer), led, meta)
    )
    assert found > 0.1
