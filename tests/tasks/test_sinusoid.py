"""Sinusoids: points that lie on one curve a task, drawn as the ranges say."""

import math

import pytest
import torch

from equigrad.errors import ConfigurationError
from equigrad.tasks import Sinusoids, curves


def test_points_of_a_task_lie_on_one_curve_of_its_own():
    batch = Sinusoids(shots=4, queries=6, amplitude=(2.0, 2.0), phase=(0.5, 0.5)).sample(3, draw=0)
    assert batch.support[0].shape == batch.support[1].shape == (3, 4, 1)
    assert batch.query[0].shape == batch.query[1].shape == (3, 6, 1)
    for x, y in (batch.support, batch.query):
        assert torch.allclose(y, 2 * (x - 0.5).sin(), atol=1e-6)


def test_curves_go_through_every_point():
    """Amplitude and phase are found from the points, in the ranges that they were drawn from."""
    batch = Sinusoids().sample(200, draw=0)
    grid = torch.linspace(-5, 5, 1001)
    at = curves(batch, grid)
    for x, y in (batch.support, batch.query):
        # between two points of the grid a curve moves by 0.05 at most
        nearest = ((x[..., 0] + 5) * 100).round().long()
        assert (at.gather(1, nearest) - y[..., 0]).abs().max() < 5 * 0.0051
    sine, cosine = curves(batch, torch.tensor([math.pi / 2, 0.0])).double().T
    amplitude, phase = torch.hypot(sine, cosine), torch.atan2(-cosine, sine)
    assert 0.1 - 1e-4 <= amplitude.min() < 0.4
    assert 4.7 < amplitude.max() <= 5 + 1e-4
    assert -1e-3 <= phase.min() < 0.1
    assert math.pi - 0.1 < phase.max() <= math.pi + 1e-3


def test_draws_are_uniform():
    """Means of 2,000 draws of U(a, b), within four of their standard errors (b - a) / √(12 n)."""
    batch = Sinusoids(shots=1, queries=1).sample(2000, draw=1)
    inputs = torch.cat([batch.support[0], batch.query[0]], 1)
    assert abs(inputs.mean()) < 4 * 10 / math.sqrt(12 * 4000)
    assert -5 <= inputs.min() < -4.9
    assert 4.9 < inputs.max() < 5
    # E y² = E A² · ½ (1 - E cos(2x - 2p)), whose last mean vanishes for phases from 0 to π
    squares = batch.query[1].square()
    expected = (5**3 - 0.1**3) / (3 * 4.9) / 2
    assert abs(squares.mean() - expected) < 4 * squares.std() / math.sqrt(2000)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"shots": 0}, "shots must be a whole number of at least 1.*got 0"),
        ({"queries": -1}, "queries must be a whole number of at least 1.*got -1"),
        ({"amplitude": (5.0, 0.1)}, r"amplitude must be .*the least first, got \(5\.0, 0\.1\)"),
        ({"inputs": (0.0, math.inf)}, "inputs must be .*each a finite number"),
        ({"phase": (math.nan, 1.0)}, "phase must be .*each a finite number"),
    ],
)
def test_knobs_that_cannot_be(knobs, message):
    with pytest.raises(ConfigurationError, match=message):
        Sinusoids(**knobs)
