"""Kinds of targets, classes or numbers, with their losses and scores."""

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
        score: name of the metric that tables report and a single strength is chosen by; larger is
            better.
        axis: label of the score in figures.
        unit: unit of the score.
        form: format of the score.
    """

    score: ClassVar[str]
    axis: ClassVar[str]
    unit: ClassVar[str]
    form: ClassVar[str]

    @property
    @abstractmethod
    def outputs(self) -> int:
        """The number of outputs that a network needs."""

    @abstractmethod
    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        """The training loss, a scalar."""

    @abstractmethod
    def losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """The loss of each row."""

    @abstractmethod
    def metrics(self, outputs: Tensor, y: Tensor) -> dict[str, float]:
        """The metrics for a reader, including the score."""

    @abstractmethod
    def read(self, texts: Sequence[str], numbers: Sequence[float | None]) -> list[Any]:
        """The user's values as targets of the network; None for values that cannot be targets.

        Args:
            texts: the values as text.
            numbers: the values as numbers; None for texts that are not numbers.
        """

    @abstractmethod
    def answers(self, outputs: Tensor) -> dict[str, list[Any]]:
        """Predictions in the user's terms, by name of the column."""

    def say(self, score: float) -> str:
        """A score with its unit, as text.

        Example:
            >>> Classes().say(97.123), Numbers().say(0.5)
            ('97.12 %', 'R² 0.500')
        """
        return f"{score:{self.form}} {self.unit}"


@dataclass(frozen=True)
class Classes(Target):
    """One of several classes: cross-entropy, and accuracy in percent.

    Attributes:
        names: names of the classes, in the order of the network's outputs; empty if they have none.

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
        """One output for each class."""
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
        """Class indices; None for an unknown class."""
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
        mean: mean of the target before standardisation.
        deviation: standard deviation of the target before standardisation.

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
        """A single output."""
        return 1

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Mean squared error."""
        return mse_loss(outputs.squeeze(1), y)

    def losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Squared error of each row."""
        return mse_loss(outputs.squeeze(1), y, reduction="none")

    def metrics(self, outputs: Tensor, y: Tensor) -> dict[str, float]:
        """R², NaN for constant targets, and the root-mean-square error in the target's units."""
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
