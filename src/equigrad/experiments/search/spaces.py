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
    """One of some values."""

    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        require(bool(self.values), "a list of values to choose from is empty")

    def draw(self, generator: random.Random) -> Any:
        """Each is as likely."""
        return generator.choice(self.values)


@dataclass(frozen=True)
class LogUniform(Checked):
    """A number between two, whose logarithm is uniform."""

    low: Positive
    high: Positive

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.low < self.high, f"log_uniform needs low < high, got [{self.low}, {self.high}]"
        )

    def draw(self, generator: random.Random) -> float:
        """A number between the two."""
        return math.exp(generator.uniform(math.log(self.low), math.log(self.high)))


@dataclass(frozen=True)
class Space:
    """Hyperparameters and where they are looked for.

    Attributes:
        source: the table it is from.
        domains: by dotted path, as `equigrad run` spells the options.
        trials: points to draw; None for the whole grid.
    """

    source: str
    domains: Mapping[str, Choice | LogUniform]
    trials: int | None = None

    @property
    def size(self) -> int | None:
        """How many points it has; None where they are of intervals."""
        sizes = [len(d.values) for d in self.domains.values() if isinstance(d, Choice)]
        return math.prod(sizes) if len(sizes) == len(self.domains) else None

    def points(self, trials: int | None, seed: int) -> list[Point]:
        """Different points in an order drawn by the seed; the whole grid where trials is None.

        A grid of fewer points than are to be drawn gives all of them, each once.

        Raises:
            ConfigurationError: the whole grid of a space that has none.

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
    """A hyperparameter that is one of some values, or fixed where there is a single one."""
    return Choice(values)


def contrastive(
    lr: Choice | LogUniform, steps: Choice, nudged_steps: Choice, outer_lr: Choice | LogUniform
) -> dict[str, Choice | LogUniform]:
    """The hyperparameters of the contrastive rule, as a table of the paper varies them."""
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
    """The hyperparameters of T1–T2, likewise."""
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
            "nudged_steps": among(10, 20, 50),
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
"""By what is learned from and the estimator."""


def read_space(path: Path) -> Space:
    """A user's own space: a JSON object of lists of values, or of `{"log_uniform": [low, high]}`.

    Raises:
        ConfigurationError: the file cannot be read, or holds something else.
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
