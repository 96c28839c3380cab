"""What figures 1, S1 and S2 say."""

import pytest

from equigrad.experiments.runs.reproduction import measure_all
from equigrad.experiments.theory.bound import Fig1, FigS1, FigS2
from equigrad.theory import best_beta, error_bound
from helpers import slope


def test_fig1_curves_are_least_at_the_beta_of_corollary_1_and_cap():
    config = Fig1()
    rows = measure_all(config)
    for error in config.errors:
        curve = [row for row in rows if row.free_error == row.nudged_error == error]
        least = min(curve, key=lambda row: row.bound)
        assert least.beta == pytest.approx(best_beta(error, error), rel=0.13)  # a step is 12 %
        largest = max(curve, key=lambda row: row.beta)
        assert largest.bound == pytest.approx(1 + error, abs=0.02)  # caps at C


def test_fig1_settling_further_saturates_above_beta():
    config = Fig1()
    rows = measure_all(config)
    floors = []
    for beta in config.betas:
        curve = sorted((row for row in rows if row.beta == beta), key=lambda row: row.free_error)
        assert curve[0].bound == pytest.approx(beta / (1 + beta), rel=0.05)
        if beta < 0.1:  # above its floor the bound is 2δ/β
            assert slope(*_last_decade(curve)) == pytest.approx(1, abs=0.02)
        floors.append(curve[0].bound)
    assert floors == sorted(floors)
    assert floors[-1] > 100 * floors[0]


def _last_decade(curve):
    last = curve[-21:]
    return [row.free_error for row in last], [row.bound for row in last]


def test_fig_s1_a_precise_free_phase_cannot_make_up_for_a_coarse_nudged_one():
    """With δ' = 0.01 the least bound stays above 2 √δ', however small δ is."""
    config = FigS1(errors=(1e-6, 1e-4, 1e-2))
    rows = measure_all(config)
    least = [min(row.bound for row in rows if row.free_error == error) for error in config.errors]
    assert least[0] == pytest.approx(0.2, abs=0.002)  # δ' + 2 √δ' - δ'
    assert least[1] == pytest.approx(least[0], rel=0.01)
    assert least[2] > 1.3 * least[0]


def test_fig_s2_is_the_envelope_of_fig1():
    config = FigS2()
    rows = measure_all(config)
    for row in rows:
        bounds = [error_bound(row.error, row.error, beta) for beta in config.betas]
        assert row.bound <= min(bounds) * (1 + 1e-12)
    near = [row for row in rows if row.error < 1e-4]
    errors = [row.error for row in near]
    assert slope(errors, [row.bound for row in near]) == pytest.approx(0.5, abs=0.01)
    assert slope(errors, [row.beta for row in near]) == pytest.approx(0.5, abs=0.01)
    assert [row.beta for row in rows] == sorted(row.beta for row in rows)
