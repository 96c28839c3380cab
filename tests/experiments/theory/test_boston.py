"""What figure 2 says, with a stronger pull and fewer steps; its reference, on made-up homes."""

import os

import pytest
import torch

from equigrad import LBFGS, ConfigurationError
from equigrad.errors import SettlingError
from equigrad.experiments.data import boston_housing as boston
from equigrad.experiments.data.files import FOLDER
from equigrad.experiments.runs.error_curves import best_by, plateau
from equigrad.experiments.runs.reproduction import measure_all
from equigrad.experiments.theory.boston import Fig2, Learner
from helpers import along, directional_derivative, random_direction

needs_data = pytest.mark.skipif(
    FOLDER not in os.environ, reason=f"{FOLDER} names no folder with the Boston housing data"
)
CONFIG = Fig2(
    strength=0.3,
    steps=(150, 200, 250),
    smallest_exponent=-3,
    largest_exponent=1,
    per_decade=2,
    betas=(1e-3, 0.1, 1.0),
    total_steps=350,
    shares=(0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.98),
)


@pytest.fixture(scope="module")
def rows():
    return measure_all(CONFIG)


@pytest.fixture
def made_up_homes(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 13, generator=generator, dtype=torch.float64)
    y = (x[:, 0] - x[:, 1]).tanh() + 0.1 * x[:, 2]
    monkeypatch.setattr(boston, "load", lambda: (x, y))


def test_reference_is_the_derivative_of_the_resolved_outer_loss(made_up_homes):
    learner = Learner(Fig2())
    sizes = [m.numel() for m in learner.meta_params.values()]
    parts = learner.exact.split(sizes)
    exact = {
        name: part.view_as(m)
        for (name, m), part in zip(learner.meta_params.items(), parts, strict=True)
    }
    for seed in range(2):
        direction = random_direction(learner.meta_params, seed)
        resolved = directional_derivative(
            learner.problem,
            learner.settled,
            learner.meta_params,
            LBFGS(tol=1e-11),
            direction,
            step=3e-6,
        )
        assert along(exact, direction) == pytest.approx(resolved, rel=1e-4)


def test_learner_is_drawn_by_the_seed(made_up_homes):
    one, same, other = (Learner(Fig2(seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(one.exact, same.exact)
    assert not torch.allclose(one.exact, other.exact)


def test_learner_that_finds_no_equilibrium_says_so(made_up_homes):
    with pytest.raises(SettlingError, match="Lower the solver's step size"):
        Learner(Fig2(lr=50.0))


@needs_data
def test_best_beta_and_least_error_fall_with_steps(rows):
    best = best_by([r for r in rows if r.settled_alike], lambda row: row.free_steps)
    found = [best[steps] for steps in CONFIG.steps]
    for values in ([row.beta for row in found], [row.error for row in found]):
        assert values == sorted(values, reverse=True)
        assert values[0] > 5 * values[-1]


@needs_data
def test_rates_are_those_of_corollary_1(rows):
    """With β* and the least error ∝ √δ, both fall half as fast as δ."""
    drift, error, beta = CONFIG.rates(rows)
    assert error == pytest.approx(drift / 2, rel=0.2)
    assert beta == pytest.approx(drift / 2, rel=0.3)


@needs_data
def test_small_beta_divides_what_has_not_settled_and_large_beta_caps(rows):
    """Panel A: on the left the error is δ/β, on the right hardly a matter of δ."""
    error = {(r.free_steps, r.beta): r.error for r in rows if r.settled_alike}
    assert error[150, 1e-3] / error[150, 1e-2] == pytest.approx(10, rel=0.15)
    at_ten = [error[steps, 10.0] for steps in CONFIG.steps]
    assert max(at_ten) < 1.2 * min(at_ten)
    assert error[150, 1e-3] > 100 * error[250, 1e-3]
    assert max(at_ten) == pytest.approx(1.0, abs=0.1)
    assert min(at_ten) > 1.5 * error[250, 1.0]


@needs_data
def test_division_of_the_steps(rows):
    """Panel C: the free phase's best share falls with β, the plateau widens."""
    divided = [r for r in rows if r.free_steps + r.nudged_steps == CONFIG.total_steps]
    found = [plateau(divided, beta) for beta in CONFIG.betas]
    middles = [(first + last) / 2 for first, last in found]
    widths = [last - first for first, last in found]
    assert middles == sorted(middles, reverse=True)
    assert middles[0] > 1.1 * middles[-1]
    assert widths == sorted(widths)
    assert widths[-1] > 2 * widths[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed must be a whole number of at least 0"),
        ({"strength": 0.0}, "strength must be a finite number above 0"),
        ({"lr": float("nan")}, "lr must be a finite number above 0"),
        ({"momentum": 1.0}, r"momentum must be a finite number in \[0, 1\)"),
        ({"steps": (100, 100)}, "steps must be .*none twice"),
        ({"betas": (0.0,)}, "betas must be .*above 0"),
        ({"largest_exponent": -4}, "smallest_exponent must be less than"),
        ({"shares": (0.5, 1.0)}, "both phases at least one of total_steps=1200"),
        ({"total_steps": 10, "shares": (0.01,)}, "both phases at least one of total_steps=10"),
    ],
)
def test_settings_that_cannot_work(options, message):
    with pytest.raises(ConfigurationError, match=message):
        Fig2(**options)
