"""Fourier features: of the frequencies that were asked for, and what is refused."""

import math

import pytest
import torch

from equigrad.errors import ConfigurationError
from equigrad.nn import FourierFeatures


def test_an_axis_from_minus_one_to_one_has_as_many_cycles_as_its_frequency():
    """Of frequency 3, the sine is sin 3πx, which is 0 at multiples of a third."""
    encode = FourierFeatures(1, 1, frequency=1.0).double()
    encode.frequencies.fill_(3.0)
    x = torch.linspace(-1, 1, 7, dtype=torch.float64)[:, None]
    sine, cosine = encode(x).T
    torch.testing.assert_close(sine, torch.zeros(7).double(), rtol=0, atol=1e-14)
    signs = torch.tensor([-1.0, 1.0] * 4, dtype=torch.float64)[:7]
    torch.testing.assert_close(cosine, signs, rtol=0, atol=1e-14)


def test_likeness_of_places_is_a_gaussian_of_their_distance():
    """E cos πF(x - x') = exp(-π² σ² ‖x - x'‖² / 2) for normal F (Rahimi, Recht 2007)."""
    encode = FourierFeatures(2, 200_000, frequency=1.5).double()
    one, other = torch.tensor([[0.1, -0.2], [0.25, 0.0]], dtype=torch.float64)
    found = (encode(one) @ encode(other)).item() / 200_000
    squared = 0.15**2 + 0.2**2
    assert found == pytest.approx(math.exp(-((math.pi * 1.5) ** 2) * squared / 2), abs=0.01)


def test_frequencies_are_saved_and_not_learned():
    encode = FourierFeatures(2, 3, frequency=1.0)
    assert list(encode.state_dict()) == ["frequencies"]
    assert not list(encode.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 3, 1.0), "inputs must be a whole number of at least 1, got 0"),
        ((2, 1.5, 1.0), r"features must be a whole number of at least 1, got 1\.5"),
        ((2, 3, 0.0), r"frequency must be a finite number above 0, got 0\.0"),
    ],
)
def test_numbers_that_cannot_work(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        FourierFeatures(*arguments)
