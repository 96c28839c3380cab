"""Flat vectors of named tensors."""

import pytest
import torch

from equigrad.vectors import finite


@pytest.mark.parametrize(
    ("entries", "whole"),
    [
        ([3e38, 3e38, 1.0], True),  # a sum that overflows, of numbers that are finite
        ([torch.inf, -torch.inf], False),
        ([1.0, torch.nan], False),
        ([1.0, torch.inf], False),
        ([], True),
        ([1j, 2.0], True),
        ([complex(1, torch.inf)], False),
    ],
    ids=str,
)
def test_finite_is_said_of_every_entry_and_not_of_their_sum(entries, whole):
    dtype = torch.complex64 if any(isinstance(e, complex) for e in entries) else torch.float32
    assert finite(torch.tensor(entries, dtype=dtype)) is whole


def test_the_largest_numbers_of_half_precision_are_finite():
    assert finite(torch.full((100,), 6e4, dtype=torch.float16))
