"""Networks whose layers relax: against autograd through one sweep."""

import pytest
import torch
from torch import nn

import equigrad as eg
from equigrad.evaluation import Evaluation
from equigrad.nn import EquilibriumRNN, Relaxing, tanh_network

TIGHT = eg.Picard(tol=1e-12, max_steps=200)
EXACT = eg.Adjoint(solver=TIGHT)


def data(count=4, size=6):
    torch.manual_seed(0)
    return torch.randn(count, size).double(), torch.arange(count) % 3


def solve(net, x, y, estimator, solver: eg.Solver = TIGHT):
    meta = dict(net.named_parameters())
    return eg.meta_gradient(
        net.problem(x, y), net.start(x), meta, solver=solver, estimator=estimator
    )


def test_at_rest_it_is_the_network_and_its_gradient_backpropagation():
    x, y = data()
    net = Relaxing(tanh_network(6, [5, 4], 3)).double()
    result = solve(net, x, y, EXACT)
    assert result.phases[0].steps == 3  # as many as there are layers
    torch.testing.assert_close(net.logits(result.params, {}), net(x), rtol=1e-12, atol=1e-12)
    loss = nn.functional.cross_entropy(net(x), y, reduction="sum")
    grads = torch.autograd.grad(loss, list(net.parameters()))
    for found, exact in zip(result.grads.values(), grads, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12)


def test_a_convolutional_network():
    torch.manual_seed(1)
    x, y = torch.randn(2, 1, 6, 6).double(), torch.tensor([0, 2])
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3), nn.Tanh()
    )
    net = Relaxing(model).double()
    assert {n: s.shape for n, s in net.start(x).items()} == {"0": (2, 3, 4, 4), "1": (2, 3)}
    result = solve(net, x, y, EXACT)
    loss = nn.functional.cross_entropy(net(x), y, reduction="sum")
    grads = torch.autograd.grad(loss, list(net.parameters()))
    for found, exact in zip(result.grads.values(), grads, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12)


def test_the_drive_by_the_input_is_computed_once_and_is_the_same():
    x, y = data()
    for net in (Relaxing(tanh_network(6, [5, 4], 3)).double(), EquilibriumRNN(6, 5, 3).double()):
        relax = net.problem(x, y).map
        meta = {n: p.detach() for n, p in net.named_parameters()}
        state = {n: torch.randn_like(s) for n, s in net.start(x).items()}
        torch.testing.assert_close(relax.at(meta)(state), relax(state, meta))  # pyright: ignore


def test_a_recurrent_network_at_rest_against_the_exact_solve():
    torch.manual_seed(3)
    x, y = data()
    net = EquilibriumRNN(6, 5, 3, recurrence=0.8).double()
    result = solve(net, x, y, EXACT)
    exact = solve(net, x, y, eg.ExactSolve())
    torch.testing.assert_close(result.grads, exact.grads, rtol=1e-9, atol=1e-12)
    h = result.params["h"]
    again = torch.tanh(net.input(x) + h @ net.get_parameter("recurrent.weight").T)
    torch.testing.assert_close(again, h, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(net.logits(result.params, {}), net.readout(h))


def test_the_spectral_norm_of_a_new_recurrent_network():
    torch.manual_seed(0)
    weight = EquilibriumRNN(6, 256, 3, recurrence=0.5).get_parameter("recurrent.weight")
    assert torch.linalg.matrix_norm(weight, 2).item() == pytest.approx(0.5, rel=0.05)


def test_least_control_of_a_network_is_predictive_coding_at_any_strength():
    """`L_out + Σ_l ‖φ_l - f_l(φ_{l-1})‖² / 2b` over all φ, by LBFGS; its gradient is explicit."""
    torch.manual_seed(2)
    x, y = data()
    net = Relaxing(tanh_network(6, [5, 4], 3)).double()
    strength = 0.8
    solver = eg.Anderson(tol=1e-11, max_steps=500)
    controller = eg.DynamicInversion(gain=strength, leak=1.0)
    result = solve(net, x, y, eg.LeastControl(controller=controller, start="params"), solver)
    states = [s.clone().requires_grad_() for s in net.start(x).values()]
    optimiser = torch.optim.LBFGS(
        states,
        max_iter=500,
        tolerance_grad=1e-11,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def energy():
        below, total = x, nn.functional.cross_entropy(states[-1], y, reduction="sum")
        for state, block in zip(states, net.blocks, strict=True):
            total = total + (state - block(below)).square().sum() / (2 * strength)
            below = state
        return total

    def closure():
        optimiser.zero_grad()
        energy().backward()
        return energy().item()

    optimiser.step(closure)  # pyright: ignore
    for found, exact in zip(result.params.values(), states, strict=True):
        torch.testing.assert_close(found, exact.detach(), rtol=1e-6, atol=1e-7)
    grads = torch.autograd.grad(energy(), list(net.parameters()))
    for found, exact in zip(result.grads.values(), grads, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-7)


def test_models_that_cannot_relax():
    with pytest.raises(eg.ConfigurationError, match=r"must be a torch.nn.Sequential, .*got Linear"):
        Relaxing(nn.Linear(2, 2))  # pyright: ignore[reportArgumentType]
    with pytest.raises(eg.ConfigurationError, match="no layer with weights"):
        Relaxing(nn.Sequential(nn.Tanh()))
    with pytest.raises(eg.ConfigurationError, match=r"model has buffers.*nn.LayerNorm"):
        Relaxing(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2)))


@pytest.mark.parametrize("first", [nn.Identity(), nn.Dropout(0.5)])
def test_dropout_is_the_same_at_every_step_and_in_the_form_that_is_differentiated(first):
    torch.manual_seed(0)
    x, y = data()
    parts = [first, nn.Linear(6, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3)]
    net = Relaxing(nn.Sequential(*parts)).double()
    meta = dict(net.named_parameters())
    with Evaluation(net.problem(x, y), net.start(x), meta) as evaluation:
        settled = evaluation.settle(TIGHT)
        left = evaluation.residual(settled.params, meta, 0)
    assert settled.phase.outcome == "converged"
    assert max(r.abs().max().item() for r in left) == 0
    assert (settled.params["1"] - net.eval()(x)).abs().max() > 1e-2


def test_a_layer_in_two_places_gets_both_gradients():
    torch.manual_seed(0)
    x, y = data(size=3)
    shared = nn.Linear(3, 3)
    net = Relaxing(nn.Sequential(shared, nn.Tanh(), shared)).double()
    result = solve(net, x, y, EXACT)
    loss = nn.functional.cross_entropy(net(x), y, reduction="sum")
    grads = torch.autograd.grad(loss, list(net.parameters()))
    torch.testing.assert_close(list(result.grads.values()), list(grads))


@pytest.mark.parametrize("net", [Relaxing(tanh_network(6, [5], 3)), EquilibriumRNN(6, 5, 3)])
def test_what_a_network_cannot_read(net):
    net = net.double()
    x, y = data()
    for given, labels, message in [
        (x[:, :2], y, r"cannot process x of torch.float64 with shape \(4, 2\) \(samples first\)"),
        (x.float(), y, "weights of torch.float64, cannot process x of torch.float32"),
        (x * float("nan"), y, "x holds NaN or infinite values"),
        (x, y.float(), "whole number .*got torch.float32"),
        (x, y + 2, "from 0 to 2; got torch.int64 .* from 2 to 4"),
        (x, y[:2], "targets must be a class for each of the 4 samples"),
    ]:
        with pytest.raises(eg.ProblemError, match=message):
            solve(net, given, labels, EXACT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 0}, "hidden must be a whole number of at least 1, got 0"),
        ({"inputs": 2.5}, "inputs must be a whole number of at least 1, got 2.5"),
        ({"recurrence": -1.0}, "recurrence must be a finite number of at least 0, got -1"),
    ],
)
def test_recurrent_networks_that_cannot_be(options, message):
    with pytest.raises(eg.ConfigurationError, match=message):
        EquilibriumRNN(**{"inputs": 6, "hidden": 5, "outputs": 3, **options})
