"""What a map or an outer loss hides from autograd is named, and nothing else is."""

import warnings

import pytest
import torch
from torch import nn

import equigrad as eg
from equigrad.testing import affine_map_case, tanh_map_case

DRAW = torch.Generator().manual_seed(0)
W = 0.3 * torch.randn(5, 5, generator=DRAW).double()
U = torch.randn(5, 3, generator=DRAW).double()
NAMED = "does not change as autograd predicts"


def relax(h, m):
    return torch.tanh(W.to(h.dtype) @ h + U.to(h.dtype) @ m["t"] + m["b"])


def without_graph(h):
    with torch.no_grad():
        return h.norm() + 1


HIDDEN = {
    "all of φ": lambda h, m: relax(h.detach(), m),
    "half of φ": lambda h, m: relax(0.5 * h + 0.5 * h.detach(), m),
    "data": lambda h, m: relax(h.data, m),
    "item": lambda h, m: relax(h * (1 + h.mean().item()), m),
    "numpy": lambda h, m: relax(torch.from_numpy(h.detach().numpy().copy()), m),
    "no_grad": lambda h, m: relax(2 * h / without_graph(h) ** 2, m),
    "half of θ": lambda h, m: relax(h, {**m, "t": 0.5 * m["t"] + 0.5 * m["t"].detach()}),
    "one of θ": lambda h, m: relax(h, {**m, "b": m["b"].detach() + 0.1 * m["b"]}),
    "what adds up to one": lambda h, m: relax(h.detach(), m).softmax(0),
    "straight through": lambda h, m: relax(h + (h.round(decimals=1) - h).detach(), m),
}
SOUND = {
    "tanh": relax,
    "relu": lambda h, m: (W.to(h.dtype) @ h + U.to(h.dtype) @ m["t"] + m["b"]).relu(),
    "at the kink": lambda h, m: (W.to(h.dtype) @ h + (U.to(h.dtype) @ m["t"] + m["b"]) * 0).relu(),
    "maximum": lambda h, m: relax(h, m).maximum(0.3 * h),
    "normalised": lambda h, m: relax(h / (1 + h.square().sum()).sqrt(), m),
}


def outer(p, m):
    return (p["h"] - 1).square().sum() + m["b"].square().sum()


def found(cell, judged=outer, dtype=torch.float64, estimator=None):
    problem = eg.FixedPoint(lambda p, m: {"h": cell(p["h"], m)}, judged)
    meta = {"t": torch.ones(3, dtype=dtype), "b": torch.full((5,), 0.3, dtype=dtype)}
    return eg.meta_gradient(
        problem,
        {"h": torch.zeros(5, dtype=dtype)},
        meta,
        solver=eg.Picard(tol=1e-5, max_steps=500),
        estimator=estimator or eg.GMRES(),
    )


@pytest.mark.parametrize("estimator", [eg.GMRES(), eg.T1T2(), eg.Unrolled()], ids=repr)
@pytest.mark.parametrize("cell", HIDDEN.values(), ids=HIDDEN)
def test_what_a_map_hides_is_named(cell, estimator):
    assert f"map {NAMED}" in found(cell, estimator=estimator).status


@pytest.mark.parametrize("name", ["all of φ", "half of φ", "numpy", "half of θ"])
def test_in_single_precision_too(name):
    cell = HIDDEN[name]
    assert f"map {NAMED}" in found(cell, dtype=torch.float32).status


def drawn(seed, monkeypatch):
    """Other weights for all maps."""
    generator = torch.Generator().manual_seed(seed)
    monkeypatch.setitem(globals(), "W", 0.3 * torch.randn(5, 5, generator=generator).double())
    monkeypatch.setitem(globals(), "U", torch.randn(5, 3, generator=generator).double())


def test_in_single_precision_most_are_named_whatever_the_weights(monkeypatch):
    """Nine in ten of a hundred maps; softmax, of numbers near each other, hides best."""
    named = dict.fromkeys(HIDDEN, 0)
    for seed in range(100, 110):
        drawn(seed, monkeypatch)
        for name, cell in HIDDEN.items():
            named[name] += NAMED in found(cell, dtype=torch.float32).status
    assert sum(named.values()) >= 88
    assert all(count >= 6 for name, count in named.items() if name != "what adds up to one")


def test_and_no_sound_one_is_accused_whatever_its_weights(monkeypatch):
    for seed in range(500, 520):
        drawn(seed, monkeypatch)
        for cell in SOUND.values():
            assert NAMED not in found(cell, dtype=torch.float32).status


class Cell(nn.Module):
    """A linear or convolutional map with a norm and an activation."""

    def __init__(self, mix, norm, activation):
        super().__init__()
        self.mix, self.norm, self.activation = mix, norm, activation

    def forward(self, h, x):
        return self.activation(self.norm(0.4 * self.mix(h) + x))


CELLS = {
    "convolution": lambda: (Cell(nn.Conv2d(4, 4, 3, padding=1), nn.Identity(), nn.Tanh()), 6),
    "kinked convolution": lambda: (
        Cell(nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.LeakyReLU()),
        6,
    ),
    "layer norm": lambda: (Cell(nn.Linear(6, 6), nn.LayerNorm(6), nn.ReLU()), 6),
    "clipped": lambda: (Cell(nn.Linear(6, 6), nn.Identity(), nn.Hardtanh()), 6),
    "softmax": lambda: (Cell(nn.Linear(6, 6), nn.Identity(), nn.Softmax(-1)), 6),
}


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("make", CELLS.values(), ids=CELLS)
def test_no_sound_layer_in_single_precision_is_accused(make, seed):
    torch.manual_seed(seed)
    cell, size = make()
    layer = eg.nn.EquilibriumLayer(
        cell, solver=eg.Anderson(tol=1e-4, max_steps=100), unsettled="ignore"
    )
    layer(torch.randn(3, 4, size, size)).square().sum().backward()
    assert NAMED not in layer.status


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cell", SOUND.values(), ids=SOUND)
def test_sound_maps_are_not_accused(cell, dtype):
    assert NAMED not in found(cell, dtype=dtype).status


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(10))
def test_two_thousand_units_with_kinks_are_not_accused(seed, dtype):
    """Some of the kinks lie within the distance of a difference, in single precision many."""
    torch.manual_seed(seed)
    linear, x = nn.Linear(20, 20, dtype=dtype), torch.randn(100, 20, dtype=dtype)
    layer = eg.nn.EquilibriumLayer(
        lambda h, x: 0.25 * linear(h).relu() + x, solver=eg.Anderson(tol=1e-3, max_steps=200)
    )
    layer(x).square().sum().backward()
    assert NAMED not in layer.status


@pytest.mark.parametrize("build", [affine_map_case, tanh_map_case])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_maps_with_known_answers_are_not_accused(build, dtype):
    case = build(dtype)
    result = eg.meta_gradient(
        case.problem, case.params, case.meta_params, solver=case.solver, estimator=eg.GMRES()
    )
    assert NAMED not in result.status


PRIMITIVES = {
    "coupling": lambda h, m: interact(h, m) + 0.5 * (h * h.detach().roll(1)).sum(),
    "half of θ": lambda h, m: interact(h, {**m, "t": 0.5 * (m["t"] + m["t"].detach())}),
    "gain": lambda h, m: interact(h, m) * (1 + h.norm().item()),
    "no_grad": lambda h, m: interact(h, m) / without_graph(h),
}


def interact(h, m):
    """A symmetric interaction, of which tanh is the activation."""
    return 0.2 * (h @ (W + W.T).to(h.dtype) @ h) + h @ (U.to(h.dtype) @ m["t"] + m["b"])


def of_primitive(primitive, estimator, dtype=torch.float64):
    problem = eg.EnergyBased(
        primitive=lambda p, m: primitive(p["h"], m), outer_loss=outer, activation=torch.tanh
    )
    return eg.meta_gradient(
        problem,
        {"h": torch.zeros(5, dtype=dtype)},
        {"t": torch.full((3,), 0.5, dtype=dtype), "b": torch.full((5,), 0.3, dtype=dtype)},
        solver=eg.Picard(tol=1e-5, max_steps=500),
        estimator=estimator,
    )


@pytest.mark.parametrize("estimator", [eg.Contrastive(), eg.GMRES(), eg.Unrolled()], ids=repr)
@pytest.mark.parametrize("primitive", PRIMITIVES.values(), ids=PRIMITIVES)
def test_what_a_primitive_hides_is_named(primitive, estimator):
    assert f"primitive {NAMED}" in of_primitive(primitive, estimator).status


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sound_primitive_is_not_accused(dtype):
    assert NAMED not in of_primitive(interact, eg.Contrastive(), dtype).status


JUDGES = {
    "φ": lambda p, m: (p["h"] - 0.5 * p["h"].detach() - 1).square().sum(),
    "θ": lambda p, m: (p["h"] - 1).square().sum() + (m["b"] * m["b"].detach()).sum(),
    "item": lambda p, m: (p["h"] - 1).square().sum() * (1 + p["h"][0].item()),
}


@pytest.mark.parametrize("judged", JUDGES.values(), ids=JUDGES)
def test_what_an_outer_loss_hides_is_named(judged):
    assert f"outer_loss {NAMED}" in found(relax, judged).status


@pytest.mark.parametrize("estimator", [eg.Contrastive(), eg.GMRES()], ids=repr)
@pytest.mark.parametrize("judged", JUDGES.values(), ids=JUDGES)
def test_of_a_learner_as_well(judged, estimator):
    def inner(p, m):
        return 0.5 * (p["h"] - relax(0 * p["h"], m)).square().sum()

    meta = {"t": torch.ones(3).double(), "b": torch.full((5,), 0.3).double()}
    result = eg.meta_gradient(
        eg.Bilevel(inner, judged),
        {"h": torch.zeros(5).double()},
        meta,
        solver=eg.GradientDescent(lr=0.5, tol=1e-8, max_steps=500),
        estimator=estimator,
    )
    assert f"outer_loss {NAMED}" in result.status


def test_a_look_at_a_map_costs_two_gradients_and_two_values_once():
    calls = []

    def cell(p, m):
        calls.append(1)
        return {"h": relax(p["h"], m)}

    problem = eg.FixedPoint(cell, outer)
    meta = {"t": torch.ones(3).double(), "b": torch.full((5,), 0.3).double()}
    spent, counted = [], []
    for _ in range(2):
        calls.clear()
        result = eg.meta_gradient(
            problem,
            {"h": torch.zeros(5).double()},
            meta,
            solver=eg.Picard(tol=1e-8, max_steps=500),
            estimator=eg.GMRES(),
        )
        spent.append(len(calls))
        counted.append(result.gradient_evaluations)
    assert spent[0] - spent[1] == 4
    assert counted[0] == counted[1]


class Semi(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 3)

    def forward(self, h, x):
        return torch.tanh(0.5 * self.linear(h.detach()) + x)


@pytest.mark.parametrize(("unsettled", "times"), [("warn", 1), ("ignore", 0)])
def test_a_layer_warns_of_it_once(unsettled, times):
    layer = eg.nn.EquilibriumLayer(Semi().double(), unsettled=unsettled)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            layer(torch.linspace(-1, 1, 12).view(4, 3).double()).square().sum().backward()
    assert sum(f"map {NAMED}" in str(w.message) for w in caught) == times


def test_fixed_point_warns_of_it():
    b = torch.full((5,), 0.3).double().requires_grad_()
    rest = eg.fixed_point(
        lambda p, m: {"h": torch.tanh(W @ p["h"].detach() + m["b"])},
        {"h": torch.zeros(5).double()},
        {"b": b},
        solver=eg.Picard(tol=1e-9),
    )
    assert f"map {NAMED}" in rest.status


def of_a_loss_in_single_precision(seed, hidden):
    """A tenth of the derivative of θ is hidden, in a penalty that is a small part of the loss."""
    draw = torch.Generator().manual_seed(seed)
    x, y = torch.randn(50, 20, generator=draw), torch.randn(50, generator=draw)
    theta = torch.rand(20, generator=draw)

    def inner(p, m):
        log = m["a"] - hidden * (m["a"] - m["a"].detach())
        fit = (x @ torch.tanh(p["z"]) - y).square().mean()
        return fit + 0.1 * (log.exp() * p["z"].square()).sum()

    return eg.meta_gradient(
        eg.Bilevel(inner, lambda p, m: (p["z"] - 1).square().sum()),
        {"z": torch.zeros(20)},
        {"a": theta},
        solver=eg.LBFGS(max_steps=200, tol=1e-4),
        estimator=eg.ConjugateGradient(),
    ).status


def test_a_tenth_of_theta_is_named_in_single_precision():
    """In nine losses of ten: along some directions the penalty changes too little to tell."""
    hidden, sound = (
        sum(NAMED in of_a_loss_in_single_precision(seed, share) for seed in range(20))
        for share in (0.1, 0.0)
    )
    assert hidden >= 16
    assert sound == 0
