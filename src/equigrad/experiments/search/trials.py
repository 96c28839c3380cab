"""Settings and trials of a hyperparameter search."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from equigrad.errors import ConfigurationError
from equigrad.experiments.search.spaces import SPACES, Point, Space, read_space
from equigrad.experiments.strengths.strength_learning import StrengthExperiment
from equigrad.fields import Checked, Count, NotNegative, Rule, require
from equigrad.training.targets import Classes, Target


@dataclass(frozen=True, kw_only=True)
class Search(Checked):
    """Search an experiment's hyperparameters with Ray Tune, by validation accuracy.

    The spaces are those of the paper's Tables S1 to S4. Trials run in parallel, and poor ones are
    stopped after 10, 40 … outer steps (ASHA). The best one is saved as a configuration for
    `equigrad run NAME --config`.
    """

    experiment: Annotated[StrengthExperiment, tyro.conf.arg(name="")]
    """The experiment that every trial runs, with the searched hyperparameters changed."""

    trials: Count | Literal["grid"] | None = None
    """Number of random points to try, each once, or the whole `grid`; None for the paper's."""

    space: Path | None = None
    """A file with another space: for each option, a list or `{"log_uniform": [low, high]}`."""

    grace_period: Count = 10
    """Number of outer steps before a trial can be stopped."""

    reduction_factor: Annotated[float, Rule("above 1", lambda factor: factor > 1)] = 4.0
    """One in this many trials continues after the grace period, and again after each multiple."""

    parallel: Count | None = None
    """Number of trials in parallel; None for as many as the CPUs can run with their threads."""

    gpus: NotNegative | None = None
    """GPUs of a trial, 0.5 for two trials on each; None for one if the device is CUDA."""

    address: str | None = None
    """HOST:PORT of a running Ray cluster, or `auto`; None starts Ray here and ends it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.experiment.seeds is None,
            f"every trial runs one seed, given by seed; got seeds={self.experiment.seeds}",
        )

    def what(self) -> "Search":
        """The search without the options that say where it runs, which may change on resume."""
        return replace(self, parallel=None, gpus=None, address=None)

    def find_space(self) -> Space:
        """The user's space, or the one of the experiment and its estimator."""
        if self.space is not None:
            return read_space(self.space)
        experiment = self.experiment
        what = getattr(experiment, "setting", type(experiment).__name__.lower())
        if (space := SPACES.get((what, experiment.estimator))) is None:
            raise ConfigurationError(
                f"there is no search space for {what} with estimator {experiment.estimator}; "
                f"give one with --space FILE"
            )
        return space

    def points(self, space: Space) -> list[Point]:
        """The points of a space to try."""
        trials = space.trials if self.trials is None else self.trials
        return space.points(None if trials == "grid" else trials, self.experiment.seed)


def preset(kind: type[StrengthExperiment], **chosen: str) -> Search:
    """The default search for the settings of an experiment."""
    return Search(experiment=replace(kind.preset(**chosen), seed=kind.tuning_seed))


@dataclass(kw_only=True)
class Trial:
    """A point of the search space, and the result of its run.

    Attributes:
        number: index in the order of the points.
        point: values by dotted path of the option.
        config: the experiment with these values.
        folder: folder of its run.
        status: `whole` if it took all outer steps, `stopped` if it was stopped early, `failed` if
            it cannot be computed, `lost` if its process or disk failed, and `waiting` before.
        target: the kind of target.
        history: outer steps, with the validation score after each.
        seconds: seconds spent in the outer loop.
        error: the reason why it failed.
    """

    number: int
    point: Point
    config: StrengthExperiment
    folder: Path
    status: Literal["waiting", "whole", "stopped", "failed", "lost"] = "waiting"
    target: Target = field(default_factory=Classes)
    history: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    error: str = ""

    ENDING: ClassVar = ("status", "history", "seconds", "error")

    @property
    def outer_steps(self) -> int:
        """The number of outer steps with a known score."""
        return self.history[-1][0] if self.history else 0

    @property
    def validation(self) -> float:
        """The last validation score."""
        return self.history[-1][1] if self.history else float("nan")

    @property
    def ended(self) -> bool:
        """Whether it need not run again."""
        return self.status not in ("waiting", "lost")

    @property
    def summary(self) -> str:
        """Its outcome in one line."""
        said = f"trial {self.number}: {self.status} after {self.outer_steps} outer steps"
        if self.history:
            said += f", validation {self.target.say(self.validation)}"
        return f"{said}; {self.error}" if self.error else said
