"""Losses of batches: sums over samples, of targets that fit."""

import pytest
import torch

from equigrad.errors import ProblemError
from equigrad.nn.batches import summed_squares


def test_half_the_squared_error_is_summed():
    outputs = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    loss = summed_squares(outputs, torch.tensor([[0.0, 2.0], [3.0, 2.0]]))
    assert loss.item() == 2.5  # ½ (1 + 4)
    loss.backward()  # and its gradient is the error
    assert outputs.grad is not None
    assert outputs.grad.tolist() == [[1, 0], [0, 2]]


def test_targets_that_would_be_broadcast():
    with pytest.raises(ProblemError, match=r"shape of the outputs, \(4, 1\), got \(4,\)"):
        summed_squares(torch.zeros(4, 1), torch.zeros(4))
