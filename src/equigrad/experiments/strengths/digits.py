"""The digits experiment: a strength for every weight, with ten training images."""

from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from equigrad.estimators import Contrastive
from equigrad.experiments.runs.methods import PAPERS_RULE
from equigrad.experiments.strengths.strength_learning import LearningAlike
from equigrad.fields import Count, Positive
from equigrad.nn import tanh_network
from equigrad.solvers import GradientDescent
from equigrad.training.split import Split

DIGITS_SOLVER = GradientDescent(lr=0.01, momentum=0.9, nesterov=True, max_steps=500)


@dataclass(frozen=True, kw_only=True)
class Digits(LearningAlike):
    """Learn a regularisation strength for every weight of a network that sees ten images.

    A tanh network learns from ten 8×8 digits, one a class, and every weight's strength follows the
    hypergradient of the loss on 890 validation images. Beside it: no regularisation, the
    best of 13 single strengths, and the other estimator, all on the same split and start.
    """

    # other defaults than those of LearningAlike, which says what they mean
    outer_lr: Positive = 0.01
    contrastive: Contrastive = PAPERS_RULE

    scale: Literal["smoke", "small"] = "small"
    """`smoke` presets a few short steps, for a quick check that everything works."""

    hidden: tuple[Count, ...] = (64, 64, 64)
    """Widths of the hidden layers."""

    solver: GradientDescent = DIGITS_SOLVER
    """How the network is trained on the images (the free phase), from the same start each time."""

    @classmethod
    def _preset(cls, **chosen: str) -> Self:
        """The default settings of a scale."""
        if chosen.get("scale") != "smoke":
            return cls()
        return cls(
            scale="smoke",
            outer_steps=3,
            solver=replace(DIGITS_SOLVER, max_steps=20),
            nudged_steps=5,
        )

    @property
    def name(self) -> str:
        """The name of the data set."""
        return "digits, 10 training images"

    def network(self, split: Split) -> Module:
        """A network with 64 inputs, tanh layers and 10 outputs."""
        return tanh_network(64, self.hidden, 10)

    def load(self, device: torch.device, dtype: torch.dtype) -> Split:
        """Ten training images, the first of each class in a shuffle; 890 validation; 897 test.

        Pixels are shifted and scaled to zero mean and unit variance over training and validation
        images together; the test images have no part in it.
        """
        from sklearn.datasets import load_digits  # takes a second, which `--help` need not wait for

        images, labels = (np.asarray(part) for part in load_digits(return_X_y=True))
        order = np.random.default_rng(self.seed).permutation(len(labels))
        images, labels = images[order], labels[order]
        first = np.array([np.flatnonzero(labels == digit)[0] for digit in range(10)])
        rest = np.setdiff1d(np.arange(len(labels)), first)
        validation, test = rest[:890], rest[890:]
        seen = images[np.concatenate([first, validation])]
        images = (images - seen.mean()) / seen.std()

        def part(indices: np.ndarray) -> tuple[Tensor, Tensor]:
            return (
                torch.tensor(images[indices], device=device, dtype=dtype),
                torch.tensor(labels[indices], device=device),
            )

        return Split(part(first), part(validation), part(test))
