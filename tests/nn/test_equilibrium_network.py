"""A network at rest with any cell: the gradient of a layer, of the exact solve, of tied weights."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import equigrad as eg
from equigrad.errors import ConfigurationError, ProblemError
from equigrad.nn import EquilibriumNetwork, ResidualCell

TIGHT = eg.Anderson(tol=1e-11, max_steps=500)


def network():
    torch.manual_seed(1)
    readout = nn.Sequential(nn.Flatten(), nn.Linear(4 * 9, 3))
    cell = ResidualCell(4, groups=2, deviation=0.05)
    return EquilibriumNetwork(nn.Conv2d(2, 4, 3, padding=1), cell, readout).double()


def data():
    torch.manual_seed(2)
    return torch.randn(5, 2, 3, 3).double(), torch.arange(5) % 3


def solve(net, x, y, estimator):
    weights = dict(net.named_parameters())
    return eg.meta_gradient(
        net.problem(x, y), net.start(x), weights, solver=TIGHT, estimator=estimator
    )


def test_the_gradient_is_that_of_the_exact_solve_and_of_a_layer_between_modules():
    net, (x, y) = network(), data()
    result = solve(net, x, y, eg.Adjoint(solver=TIGHT))
    exact = solve(net, x, y, eg.ExactSolve())
    torch.testing.assert_close(result.grads, exact.grads, rtol=1e-8, atol=1e-10)
    layer = eg.nn.EquilibriumLayer(net.recurrent, solver=TIGHT, estimator=eg.Adjoint(solver=TIGHT))
    said = net.readout(layer(net.input(x)))
    torch.testing.assert_close(net.logits(result.params, {}), said, rtol=1e-9, atol=1e-10)
    cross_entropy(said, y, reduction="sum").backward()
    found = {name: p.grad for name, p in net.named_parameters()}
    torch.testing.assert_close(found, result.grads, rtol=1e-8, atol=1e-10)


def test_what_is_made_of_the_input_is_computed_once_and_is_the_same():
    net, (x, y) = network(), data()
    relax = net.problem(x, y).map
    meta = {n: p.detach() for n, p in net.named_parameters()}
    state = {n: torch.randn_like(s) for n, s in net.start(x).items()}
    torch.testing.assert_close(relax.at(meta)(state), relax(state, meta))  # pyright: ignore


def test_a_sample_of_a_residual_cell_does_not_see_its_neighbours():
    torch.manual_seed(0)
    cell, h, z = ResidualCell(8, groups=4).double(), *torch.randn(2, 3, 8, 4, 4).double()
    together = cell(h, z)
    torch.testing.assert_close(cell(h[1:2], z[1:2]), together[1:2], rtol=1e-12, atol=1e-12)


def test_a_new_residual_cell_contracts():
    torch.manual_seed(0)
    cell, z = ResidualCell(16).double(), torch.randn(3, 16, 5, 5).double()
    with torch.no_grad():
        one, other = torch.randn(2, 3, 16, 5, 5).double()
        distances = []
        for _ in range(30):
            one, other = cell(one, z), cell(other, z)
            distances.append((one - other).norm().item())
    assert distances[-1] < 1e-3 * distances[0]


def test_weights_that_are_tied_are_one_parameter():
    """Input and recurrence by the same matrix: the gradient is the sum of both uses."""

    class Cell(nn.Module):
        def __init__(self, shared):
            super().__init__()
            self.shared = shared

        def forward(self, h, z):
            return torch.tanh(0.3 * self.shared(h) + z)

    torch.manual_seed(4)
    shared = nn.Linear(4, 4)
    tied = EquilibriumNetwork(shared, Cell(shared), nn.Linear(4, 3)).double()
    apart = EquilibriumNetwork(
        copy.deepcopy(shared), Cell(copy.deepcopy(shared)), copy.deepcopy(tied.readout)
    ).double()
    x, y = torch.randn(5, 4).double(), torch.arange(5) % 3
    assert "recurrent.shared.weight" not in dict(tied.named_parameters())
    one = solve(tied, x, y, eg.Adjoint(solver=TIGHT)).grads["input.weight"]
    two = solve(apart, x, y, eg.Adjoint(solver=TIGHT)).grads
    both = two["input.weight"] + two["recurrent.shared.weight"]
    torch.testing.assert_close(one, both, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"recurrent": torch.tanh}, r"recurrent must be a Module, got <"),
        ({"input": nn.BatchNorm2d(4)}, "input has buffers.*GroupNorm"),
    ],
)
def test_parts_that_cannot_be(part, message):
    parts = {"input": nn.Identity(), "recurrent": ResidualCell(8), "readout": nn.Flatten()}
    with pytest.raises(ConfigurationError, match=message):
        EquilibriumNetwork(**{**parts, **part})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 12}, "multiple of the 8 groups.*got 12"),
        ({"channels": 0}, "got 0"),
        (
            {"channels": 8, "deviation": -1.0},
            "deviation must be a finite number of at least 0, got -1",
        ),
    ],
)
def test_cells_that_cannot_be(options, message):
    with pytest.raises(ConfigurationError, match=message):
        ResidualCell(**options)


def test_inputs_that_cannot_be_read():
    with pytest.raises(ProblemError, match=r"EquilibriumNetwork.*cannot process x.*\(5, 3, 3, 3\)"):
        network().start(torch.zeros(5, 3, 3, 3).double())


class Widening(nn.Module):
    def forward(self, h, z):
        return torch.cat([h, z], 1)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (
            nn.Tanh(),
            r"recurrent is called as recurrent\(h, e\(x\)\).*\(4,\) for each sample, .*argument",
        ),
        (nn.Bilinear(3, 3, 4), r"\(4,\) for each sample, .*3"),
        (nn.Module(), r"\(4,\) for each sample, .*forward"),
        (Widening(), r"recurrent must return h with its shape, \(4,\) for each sample, got \(8,\)"),
    ],
)
def test_cells_that_do_not_fit_the_input(cell, message):
    net = EquilibriumNetwork(nn.Linear(2, 4), cell, nn.Linear(4, 3))
    with pytest.raises(ProblemError, match=message):
        net.start(torch.zeros(5, 2))
