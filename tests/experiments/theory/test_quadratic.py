"""What figures S3 to S6 say, on fewer draws and points."""

import math

import pytest
import torch

from equigrad.experiments.runs.error_curves import EQUILIBRIUM, best_by, plateau
from equigrad.experiments.runs.reproduction import decades, measure_all
from equigrad.experiments.theory.quadratic import FigS3, FigS5, FigS6, initial_slope, measure
from equigrad.testing import Quadratic

RATE = math.log(2 / 0.98)
"""-log(1 - m/L) for λ = 1: curvatures from m = 1.02 to L = 2."""


@pytest.fixture(scope="module")
def model() -> Quadratic:
    return Quadratic(strength=1.0, seed=range(3))


@pytest.fixture(scope="module")
def division():
    return measure_all(FigS6(draws=2, betas=(1e-5, 1e-3, 0.01, 0.1, 1.0)))


def test_draws_side_by_side_are_those_drawn_alone(model):
    """Each settles on its own, and the error is the geometric mean of theirs."""
    alone = [Quadratic(strength=1.0, seed=seed) for seed in range(3)]
    assert torch.equal(model.meta_gradient, torch.stack([q.meta_gradient for q in alone]))
    errors = [measure(q, 3, 8, 12, 0.2).error for q in alone]
    assert len(set(errors)) == 3
    assert measure(model, 3, 8, 12, 0.2).error == pytest.approx(math.prod(errors) ** (1 / 3))


@pytest.mark.parametrize("points", [2, 3, 4])
def test_finite_difference_error_has_order_p_minus_1(model, points):
    settled = [
        measure(model, points, EQUILIBRIUM, EQUILIBRIUM, beta) for beta in decades(-3, -2, 5)
    ]
    assert initial_slope(settled) == pytest.approx(points - 1, abs=0.03)


@pytest.mark.parametrize("points", [2, 3, 4])
def test_long_phases_reach_the_error_at_equilibrium(model, points):
    """The closed form that D draws is where the measured rule of A to C ends."""
    for beta in (0.1, 1.0, 5.0):
        settled = measure(model, points, EQUILIBRIUM, EQUILIBRIUM, beta).error
        assert measure(model, points, 150, 150, beta).error == pytest.approx(settled, rel=1e-5)


def test_error_caps_for_large_beta(model):
    for points in (2, 3, 4):
        errors = [measure(model, points, 40, 40, beta).error for beta in (30.0, 100.0, 1e4)]
        assert errors == sorted(errors)
        assert 0.75 < errors[0] < errors[1] < errors[2] < 1.0
        assert errors[2] > 0.99


@pytest.mark.parametrize("strength", [0.1, 1.0])
def test_bound_of_equation_8_holds_and_is_tight(strength):
    for seed in range(3):
        model = Quadratic(strength=strength, seed=seed)
        for beta in decades(-4, 2, 2):
            lower, upper = model.contrast_error_bounds(beta)
            difference = (model.equilibrium(beta) - model.equilibrium(0.0)) / beta
            error = model.relative_error(-strength * difference)
            assert lower <= error <= upper
            assert error == pytest.approx(model.relative_error(model.contrast(beta, range(2))))
    alike = Quadratic(dim=1, strength=strength)  # one curvature: both bounds are the error
    lower, upper = alike.contrast_error_bounds(0.3)
    assert lower == upper == pytest.approx(alike.relative_error(alike.contrast(0.3, range(2))))
    assert upper == pytest.approx(0.3 / (1.3 + strength))


def test_longer_phases_saturate_at_a_floor_that_falls_with_beta(model):
    floors = []
    for beta in (1.0, 0.1, 0.01):
        short, long, longer = (measure(model, 2, t, t, beta).error for t in (4, 24, 40))
        assert short > 1.5 * long
        assert longer == pytest.approx(long, rel=0.01)
        floors.append(longer)
    assert floors == sorted(floors, reverse=True)
    assert floors[1] / floors[2] == pytest.approx(10, rel=0.1)  # the finite difference, O(β)


@pytest.fixture(scope="module")
def best():
    config = FigS5(
        draws=2,
        points=(2, 3),
        steps=(14, 18, 22, 26),
        smallest_exponent=-4,
        largest_exponent=0,
        per_decade=8,
    )
    return config, measure_all(config)


def test_best_beta_falls_with_steps_as_corollary_1_predicts(best):
    """β* ∝ √δ and least error ∝ √δ for p = 2: half the rate at which δ falls."""
    config, rows = best
    assert config.expected_rate() == pytest.approx(RATE)
    of_error, of_beta = config.rates(rows, 2)
    assert of_error == pytest.approx(RATE / 2, rel=0.05)
    assert of_beta == pytest.approx(RATE / 2, rel=0.08)
    for points in (2, 3):
        found = best_by([r for r in rows if r.points == points], lambda row: row.free_steps)
        betas = [row.beta for row in found.values()]
        assert betas == sorted(betas, reverse=True)
        assert len(set(betas)) == len(betas)


def test_more_points_err_less_at_a_larger_beta_and_fall_faster(best):
    """The balance of δ/β and β^(p-1): δ^((p-1)/p) at β ∝ δ^(1/p)."""
    config, rows = best
    of_error, of_beta = config.rates(rows, 3)
    assert of_error == pytest.approx(RATE * 2 / 3, rel=0.05)
    assert of_beta == pytest.approx(RATE / 3, rel=0.12)
    for steps in (14, 22):
        two, three = (
            min((r for r in rows if (r.points, r.free_steps) == (p, steps)), key=lambda r: r.error)
            for p in (2, 3)
        )
        assert three.error < two.error
        assert three.beta > two.beta


def test_optimal_share_of_the_free_phase_falls_with_beta(division):
    found = [plateau(division, beta) for beta in (1e-3, 0.01, 0.1, 1.0)]
    middles = [(first + last) / 2 for first, last in found]
    assert middles == sorted(middles, reverse=True)
    assert middles[0] > 1.3 * middles[-1]


def test_plateau_widens_with_beta(division):
    found = [plateau(division, beta) for beta in (1e-3, 0.01, 0.1, 1.0)]
    widths = [last - first for first, last in found]
    assert widths == sorted(widths)
    assert widths[0] < 0.1 < 0.5 < widths[-1]


def test_least_error_over_divisions_has_its_own_best_beta(division):
    """Too small a β hurts where the steps are limited: the error falls with β, then rises."""
    found = best_by(division, lambda row: row.beta)
    errors = [row.error for row in found.values()]
    lowest = errors.index(min(errors))
    assert 0 < lowest < len(errors) - 1
    assert errors[0] > 3 * errors[lowest]


def test_figure_says_that_equation_8_holds():
    config = FigS3(draws=2, points=(2,), steps=(3, 6), per_decade=2)
    rows = measure_all(config)
    assert len(config.within_bounds(rows)) == 13
    assert "Eq. (8) holds for p = 2 at 13 of 13 values of β" in config.text(rows)
    assert "power 1.00 (expected 1)" in config.text(rows)
