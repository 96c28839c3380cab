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

Name = TypeVar("Name", bound=str)


def one_of(known: Iterable[Name], what: str, word: str) -> Name:
    """The word, where it is one of those known.

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
    """Raise a `ConfigurationError` where both a seed and a number of seeds are given."""
    if seeds is not None:
        require(
            seed == 0,
            f"seeds={seeds} runs seeds 0 to {seeds - 1}, and seed={seed} is for a single run: give "
            f"one, not both (a search has a single seed)",
        )


@dataclass(frozen=True, kw_only=True)
class Experiment(Checked):
    """The settings of a run: what is drawn, how far it goes and where it is computed."""

    scale: ScaleName = "small"
    """`smoke` presets a few short steps, to see that all works, `paper` what the paper did."""

    seed: CountFrom0 = 0
    """Draws whatever is drawn."""

    checkpoint_every: Count = 5
    """Outer steps between two checkpoints."""

    device: DeviceName = "auto"
    """Where to compute; `auto` takes CUDA where there is any."""

    dtype: DtypeName = "float32"
    """Floating-point type."""

    threads: Threads = 2
    """CPU threads."""

    @property
    def decays_from(self) -> float | None:
        """The step size that falls linearly to zero, if one does."""
        return None


@dataclass(frozen=True, kw_only=True)
class Training(Experiment, ABC):
    """The settings of a run in which a method trains by mini-batches, of examples or of tasks."""

    method: str
    """What trains."""

    estimator: Estimator
    """Of the gradient; the method presets which, and these are its knobs."""

    minutes: Positive | None = None
    """End training after so long, instead of after so many steps; validation included."""

    outer_lr: Positive = 1e-3
    """Adam's step size."""

    decay: bool = True
    """Let it fall linearly, to zero at the end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            type(self.estimator) is self.kind,
            f"method {self.method!r} has the estimator {self.kind.__name__}, got "
            f"{type(self.estimator).__name__}; {type(self).__name__}.preset(method="
            f"{self.method!r}) has the right one",
        )

    @classmethod
    @abstractmethod
    def preset(cls, **chosen: str) -> Self:
        """The defaults that some words choose: `method`, `scale` and, where there is, `setting`."""

    @property
    @abstractmethod
    def kind(self) -> type[Estimator]:
        """The estimator that the method goes with."""

    @property
    @abstractmethod
    def label(self) -> str:
        """What trains, in words."""

    @property
    def limit(self) -> float:
        """Seconds after which no further step is begun."""
        return math.inf if self.minutes is None else 60 * self.minutes

    def unless_timed(self, amount: float) -> float:
        """So many steps or epochs, and any number where the clock ends the run."""
        return amount if self.minutes is None else math.inf

    @property
    def decays_from(self) -> float | None:
        """The step size, where it falls."""
        return self.outer_lr if self.decay else None
