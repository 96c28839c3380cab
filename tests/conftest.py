import pytest
import torch

from equigrad.experiments.data import cifar10, mnist
from equigrad.testing import Quadratic
from helpers import made_up


@pytest.fixture(autouse=True)
def same_start():
    torch.manual_seed(0)


@pytest.fixture
def quadratic() -> Quadratic:
    return Quadratic()


@pytest.fixture
def made_up_images(monkeypatch):
    """Few images in the places of MNIST and CIFAR-10."""
    for data, channels, side in ((mnist, 1, 28), (cifar10, 3, 32)):
        pool, test = (made_up(n, channels, side, s) for n, s in ((400, 0), (150, 1)))

        def load(files=None, pool=pool, test=test, held_out=data.TEST):
            return test if files is held_out else pool

        monkeypatch.setattr(data, "load", load)
