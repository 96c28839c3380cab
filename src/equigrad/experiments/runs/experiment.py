"""Settings that all experiments share, and checks of their values."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Self, TypeVar

from equigrad.estimators import Estimator
from equigrad.fields import Checked, Count, CountFrom0, Positive, Threads, expect, require
from equigrad.training.device import DeviceName, DtypeName

ScaleName = Literal["smoke", "small", "paper"]

CHOOSERS = ("setting", "scale", "estimator", "method")
"""Options that choose the defaults of the others."""

Name = TypeVar("Name", bound=str)


def one_of(known: Iterable[Name], what: str, word: str) -> Name:
    """The word, checked to be one of the known words.

    Raises:
        ConfigurationError: it is not.

    Example:
        >>> one_of(("exact", "adjoint"), "method", "exact")
        'exact'
    """
    names = tuple(known)
    expect(Literal[names], **{what: word})  # pyright: ignore
    return names[names.index(word)]


def one_or_many(seed: int, seeds: int | None) -> None:
    """Raise a `ConfigurationError` if both a seed and a number of seeds are given."""
    if seeds is not None:
        require(
            seed == 0,
            f"seeds={seeds} means seeds 0 to {seeds - 1}, and seed={seed} means a single run; "
            f"give only one of them (a search has a single seed)",
        )


@dataclass(frozen=True, kw_only=True)
class Experiment(Checked):
    """The settings of a run: its randomness, its length, and the device."""

    scale: ScaleName = "small"
    """Preset of the length: `smoke` takes a few short steps as a test; `paper` is the paper's."""

    seed: CountFrom0 = 0
    """Seed of all random draws."""

    checkpoint_every: Count = 5
    """Number of outer steps between two checkpoints."""

    device: DeviceName = "auto"
    """The device to compute on; `auto` is CUDA if there is any."""

    dtype: DtypeName = "float32"
    """Floating-point type."""

    threads: Threads = 2
    """CPU threads."""

    @property
    def decays_from(self) -> float | None:
        """The initial step size if it decays linearly to zero, else None."""
        return None


@dataclass(frozen=True, kw_only=True)
class Training(Experiment, ABC):
    """The settings of a run in which a method trains on mini-batches of examples or tasks."""

    method: str
    """The training method."""

    estimator: Estimator
    """The estimator of the gradient, preset by the method, with its settings."""

    minutes: Positive | None = None
    """End training after this time instead of after a number of steps; includes validation."""

    outer_lr: Positive = 1e-3
    """Step size of Adam."""

    decay: bool = True
    """Whether the step size decays linearly to zero."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            type(self.estimator) is self.kind,
            f"method {self.method!r} needs the estimator {self.kind.__name__}, got "
            f"{type(self.estimator).__name__}; "
            f"{type(self).__name__}.preset(method={self.method!r}) sets it",
        )

    @classmethod
    @abstractmethod
    def preset(cls, **chosen: str) -> Self:
        """The defaults for `method`, `scale` and, if the experiment has one, `setting`."""

    @property
    @abstractmethod
    def kind(self) -> type[Estimator]:
        """The estimator class of the method."""

    @property
    @abstractmethod
    def label(self) -> str:
        """The method, in words."""

    @property
    def limit(self) -> float:
        """Seconds after which no further step begins."""
        return math.inf if self.minutes is None else 60 * self.minutes

    def unless_timed(self, amount: float) -> float:
        """The number of steps or epochs; infinite if the time ends the run."""
        return amount if self.minutes is None else math.inf

    @property
    def decays_from(self) -> float | None:
        """The initial step size if it decays, else None."""
        return self.outer_lr if self.decay else None
