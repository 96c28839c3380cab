"""What is learned: classes or numbers, with the loss that learns it and the score that tells."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import nan
from typing import Any, ClassVar

from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

from equigrad.training.names import places


class Target(ABC):
    """A kind of target.

    Attributes:
        score: name of the metric by which a table is made and a single strength chosen; larger is
            better.
        axis: the score as a figure's axis names it.
        unit: what stands behind a score.
        form: how a score is written.
    """

    score: ClassVar[str]
    axis: ClassVar[str]
    unit: ClassVar[str]
    form: ClassVar[str]

    @property
    @abstractmethod
    def outputs(self) -> int:
        """Outputs that a network needs."""

    @abstractmethod
    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        """What is minimised, a scalar."""

    @abstractmethod
    def losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """The loss of each row."""

    @abstractmethod
    def metrics(self, outputs: Tensor, y: Tensor) -> dict[str, float]:
        """What a reader wants to know, the score among it."""

    @abstractmethod
    def read(self, texts: Sequence[str], numbers: Sequence[float | None]) -> list[Any]:
        """What a user wrote as the network knows it, None where that cannot be.

        Args:
            texts: as they are written.
            numbers: what they mean as numbers, None where they mean none.
        """

    @abstractmethod
    def answers(self, outputs: Tensor) -> dict[str, list[Any]]:
        """Predictions in the user's own words, by name of the column."""

    def say(self, score: float) -> str:
        """A score with its unit.

        Example:
            >>> Classes().say(97.123), Numbers().say(0.5)
            ('97.12 %', 'R² 0.500')
        """
        return f"{score:{self.form}} {self.unit}"


@dataclass(frozen=True)
class Classes(Target):
    """One of several classes: cross-entropy, and accuracy in percent.

    Attributes:
        names: of the classes, in the order of the network's outputs; empty where they have none.

    Example:
        >>> import torch
        >>> Classes(("no", "yes")).answers(torch.zeros(1, 2))
        {'prediction': ['no'], 'p(no)': [0.5], 'p(yes)': [0.5]}
    """

    score: ClassVar[str] = "accuracy"
    axis: ClassVar[str] = "accuracy (%)"
    unit: ClassVar[str] = "%"
    form: ClassVar[str] = ".2f"

    names: tuple[str, ...] = ()

    @property
    def outputs(self) -> int:
        """One a class."""
        return len(self.names)

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy."""
        return cross_entropy(outputs, y)

    def losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy of each row."""
        return cross_entropy(outputs, y, reduction="none")

    def metrics(self, outputs: Tensor, y: Tensor) -> dict[str, float]:
        """Accuracy in percent."""
        return {"accuracy": 100 * (outputs.argmax(1) == y).double().mean().item()}

    def read(self, texts: Sequence[str], numbers: Sequence[float | None]) -> list[Any]:
        """Numbers of classes, None for another class."""
        return places(self.names, texts, numbers)

    def answers(self, outputs: Tensor) -> dict[str, list[Any]]:
        """The most probable class, and the probability of each."""
        probabilities = outputs.double().softmax(1)
        columns = zip(self.names, probabilities.T.tolist(), strict=True)
        return {
            "prediction": [self.names[i] for i in outputs.argmax(1).tolist()],
            **{f"p({name})": column for name, column in columns},
        }


@dataclass(frozen=True)
class Numbers(Target):
    """A number: mean squared error of the standardised target, and R².

    Attributes:
        mean: that standardised it.
        deviation: likewise.

    Example:
        >>> import torch
        >>> Numbers(mean=20.0, deviation=2.0).answers(torch.tensor([[1.5]]))
        {'prediction': [23.0]}
    """

    score: ClassVar[str] = "r2"
    axis: ClassVar[str] = "R²"
    unit: ClassVar[str] = "R²"
    form: ClassVar[str] = ".3f"

    mean: float = 0.0
    deviation: float = 1.0

    def say(self, score: float) -> str:
        """A score with its unit."""
        return f"{self.unit} {score:{self.form}}"

    @property
    def outputs(self) -> int:
        """One."""
        return 1

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Mean squared error."""
        return mse_loss(outputs.squeeze(1), y)

    def losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Squared error of each row."""
        return mse_loss(outputs.squeeze(1), y, reduction="none")

    def metrics(self, outputs: Tensor, y: Tensor) -> dict[str, float]:
        """R², NaN for constant targets; and the root of the mean squared error in their units."""
        error = (outputs.squeeze(1).double() - y.double()).square().mean()
        constant = bool(y.min() == y.max())
        return {
            "r2": nan if constant else (1 - error / y.double().var(correction=0)).item(),
            "rmse": self.deviation * error.sqrt().item(),
        }

    def read(self, texts: Sequence[str], numbers: Sequence[float | None]) -> list[Any]:
        """Standardised numbers."""
        return [None if x is None else (x - self.mean) / self.deviation for x in numbers]

    def answers(self, outputs: Tensor) -> dict[str, list[Any]]:
        """Numbers in the target's own units."""
        return {"prediction": (outputs.squeeze(1).double() * self.deviation + self.mean).tolist()}
