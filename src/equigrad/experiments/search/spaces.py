"""Search spaces of hyperparameters: the paper's Tables S1 to S4, and those in users' files."""

import itertools
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equigrad.errors import ConfigurationError
from equigrad.experiments.runs.config_file import read_object
from equigrad.fields import Checked, Positive, require

Point = dict[str, Any]
"""Values by dotted path of the option."""


@dataclass(frozen=True)
class Choice:
    """One of several values."""

    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        require(bool(self.values), "a list of values to choose from is empty")

    def draw(self, generator: random.Random) -> Any:
        """One of the values, with equal probability."""
        return generator.choice(self.values)


@dataclass(frozen=True)
class LogUniform(Checked):
    """A number between two bounds, with a uniformly distributed logarithm."""

    low: Positive
    high: Positive

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.low < self.high, f"log_uniform needs low < high, got [{self.low}, {self.high}]"
        )

    def draw(self, generator: random.Random) -> float:
        """A number between the two bounds."""
        return math.exp(generator.uniform(math.log(self.low), math.log(self.high)))


@dataclass(frozen=True)
class Space:
    """Hyperparameters with their ranges.

    Attributes:
        source: the table that it comes from.
        domains: ranges by dotted path, as `equigrad run` spells the options.
        trials: number of points to draw; None for the whole grid.
    """

    source: str
    domains: Mapping[str, Choice | LogUniform]
    trials: int | None = None

    @property
    def size(self) -> int | None:
        """The number of points; None if there are intervals."""
        sizes = [len(d.values) for d in self.domains.values() if isinstance(d, Choice)]
        return math.prod(sizes) if len(sizes) == len(self.domains) else None

    def points(self, trials: int | None, seed: int) -> list[Point]:
        """Distinct points in random order; the whole grid if trials is None.

        A grid with fewer points than requested gives all of them, each once.

        Raises:
            ConfigurationError: the whole grid is requested, but the space has intervals.

        Example:
            >>> len(SPACES["mnist-10", "t1t2"].points(None, seed=0))
            245
        """
        generator = random.Random(seed)
        if self.size is not None:
            values = [d.values for d in self.domains.values() if isinstance(d, Choice)]
            grid = list(itertools.product(*values))
            drawn = generator.sample(grid, min(trials or len(grid), len(grid)))
        elif trials is None:
            raise ConfigurationError(
                f"{self.source} draws from intervals, so that there is no whole grid; say how many "
                f"points to draw with --trials"
            )
        else:
            drawn = [[d.draw(generator) for d in self.domains.values()] for _ in range(trials)]
        return [dict(zip(self.domains, values, strict=True)) for values in drawn]


RATES = Choice((0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1))
BETAS = Choice((0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0))


def among(*values: Any) -> Choice:
    """A hyperparameter that is one of several values, or fixed if there is a single value."""
    return Choice(values)


def contrastive(
    lr: Choice | LogUniform, steps: Choice, nudged_steps: Choice, outer_lr: Choice | LogUniform
) -> dict[str, Choice | LogUniform]:
    """The hyperparameters of the contrastive rule, as varied in a table of the paper."""
    return {
        "contrastive.rule.beta": BETAS,
        "contrastive.solver.lr": lr,
        "contrastive.outer_lr": outer_lr,
        "contrastive.solver.max_steps": steps,
        "contrastive.nudged_steps": nudged_steps,
    }


def t1t2(
    lr: Choice | LogUniform, steps: Choice, outer_lr: Choice | LogUniform
) -> dict[str, Choice | LogUniform]:
    """The hyperparameters of T1–T2, as varied in a table of the paper."""
    return {"t1t2.solver.lr": lr, "t1t2.outer_lr": outer_lr, "t1t2.solver.max_steps": steps}


ANY_RATE = LogUniform(0.0001, 0.1)

SPACES: dict[tuple[str, str], Space] = {
    ("cifar-50", "contrastive"): Space(
        "Table S1",
        contrastive(among(0.001), among(2000), among(20, 100, 200, 500), RATES),
        trials=500,
    ),
    ("cifar-50", "t1t2"): Space("Table S1", t1t2(RATES, among(500, 1000, 2000), RATES)),
    ("mnist-10", "contrastive"): Space(
        "Table S2",
        contrastive(RATES, among(2000), among(20, 50, 100, 200, 500), RATES),
        trials=500,
    ),
    ("mnist-10", "t1t2"): Space(
        "Table S2", t1t2(RATES, among(100, 200, 500, 1000, 2000), RATES), trials=500
    ),
    ("mnist-1", "contrastive"): Space(
        "Table S3",
        contrastive(
            ANY_RATE, among(100, 200, 500, 1000, 2000), among(20, 50, 100, 200, 500), ANY_RATE
        ),
        trials=500,
    ),
    ("mnist-1", "t1t2"): Space(
        "Table S3", t1t2(ANY_RATE, among(100, 200, 500, 1000, 2000), ANY_RATE), trials=500
    ),
    ("mnist-30000", "contrastive"): Space(
        "Table S4",
        contrastive(among(0.01), among(1000, 2000), among(20, 50, 100, 200, 500), RATES),
    ),
    ("mnist-30000", "t1t2"): Space("Table S4", t1t2(RATES, among(500, 1000, 2000), RATES)),
    ("digits", "contrastive"): Space(
        "equigrad's own space",
        {
            "contrastive.beta": BETAS,
            "solver.lr": among(0.003, 0.01, 0.03),
            "outer_lr": among(0.003, 0.01, 0.03),
            "solver.max_steps": among(200, 500, 1000),
            "nudged_steps": among(20, 50, 100, 200),
        },
        trials=50,
    ),
    ("tabular", "contrastive"): Space(
        "equigrad's own space",
        {
            "contrastive.beta": among(0.03, 0.1, 0.3),
            "outer_lr": among(0.2, 0.5, 1.0),
            "nudged_steps": among(5, 10, 20, 50),
            "folds": among(2, 3, 5),
        },
        trials=20,
    ),
    ("tabular", "t1t2"): Space(
        "equigrad's own space",
        {
            "outer_lr": among(0.2, 0.5, 1.0),
            "folds": among(2, 3, 5),
        },
    ),
    ("digits", "t1t2"): Space(
        "equigrad's own space",
        {
            "solver.lr": among(0.003, 0.01, 0.03),
            "outer_lr": among(0.003, 0.01, 0.03),
            "solver.max_steps": among(200, 500, 1000),
        },
    ),
}
"""Search spaces by data set and estimator."""


def read_space(path: Path) -> Space:
    """A user's own space: a JSON object of lists of values, or of `{"log_uniform": [low, high]}`.

    Raises:
        ConfigurationError: the file cannot be read, or is not such an object.
    """
    content = read_object(path)
    if not content:
        raise ConfigurationError(f"{path} varies nothing")
    try:
        domains = {name: _domain(name, described) for name, described in content.items()}
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from error
    return Space(str(path), domains)


def _domain(name: str, described: Any) -> Choice | LogUniform:
    try:
        match described:
            case list():
                return Choice(tuple(described))
            case {"log_uniform": [int() | float() as low, int() | float() as high], **others} if (
                not others
            ):
                return LogUniform(low, high)
    except ConfigurationError as error:
        raise ConfigurationError(f"{name}: {error}") from error
    raise ConfigurationError(
        f'{name} must be a list of values or {{"log_uniform": [low, high]}}, got {described!r}'
    )
