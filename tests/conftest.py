import pytest
import torch

from equigrad.testing import Quadratic


@pytest.fixture(autouse=True)
def same_start():
    torch.manual_seed(0)


@pytest.fixture
def quadratic() -> Quadratic:
    return Quadratic()
